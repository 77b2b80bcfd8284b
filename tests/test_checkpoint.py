"""Checkpoints: whole or not at all, checked byte for byte, the newest whole one wins."""

import errno
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssrl_jax import checkpoint, parallel
from ssrl_jax.checkpoint import CheckpointError, Checkpoints, OtherState, abstract
from ssrl_jax.guard import new_guard
from ssrl_jax.state import TrainState, state_digest

# Orbax leaves the readers of the other arrays unawaited when one array cannot be read.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)


def make_state(step: int, *, num_devices: int = 1) -> TrainState:
  rng = np.random.default_rng(step)
  mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  return TrainState(
    step=put(jnp.asarray(step, jnp.int32)),
    params={
      "kernel": put(rng.normal(size=(64, 32)).astype(np.float32), "data"),
      "half": put(jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16)),
    },
    method_state={"batch_stats": {}},
    opt_state=(put(jnp.zeros((64, 32)), "data"),),
    probe=(),
    substituted=put(jnp.zeros((), jnp.int32)),
    key=put(jax.random.key(step)),
  )


def saved(folder, steps, **options) -> Checkpoints:
  checkpoints = Checkpoints(folder, **({"keep": 3, "keep_best": 0} | options))
  for step in steps:
    checkpoints.finish(make_state(step), step=step, score=float(-step))
  return checkpoints


def array_files(folder, step):
  files = (folder / "checkpoints" / str(step) / "state").rglob("*")
  return sorted(
    (f for f in files if f.is_file() and "/d/" in str(f)), key=lambda f: f.stat().st_size
  )


def test_restore_is_byte_equal(tmp_path):
  restored = saved(tmp_path, [5]).restore(abstract(make_state(0)))
  assert state_digest(restored) == state_digest(make_state(5))
  assert restored.key.dtype == make_state(5).key.dtype


@pytest.mark.parametrize("num_devices", [2, 8])
def test_restore_onto_other_device_counts_is_byte_equal(tmp_path, num_devices):
  target = abstract(make_state(0, num_devices=num_devices))
  restored = saved(tmp_path, [5]).restore(target)
  assert state_digest(restored) == state_digest(make_state(5))
  assert restored.params["kernel"].sharding.num_devices == num_devices


def test_restore_of_an_empty_folder_is_none(tmp_path):
  assert saved(tmp_path, []).restore(abstract(make_state(0))) is None


def test_keeps_the_newest_and_the_best(tmp_path):
  # The score falls with the step, so the best is the first.
  assert saved(tmp_path, [1, 2, 3, 4, 5], keep=2, keep_best=1).steps() == [1, 4, 5]


def flip_byte(folder):
  file = array_files(folder, 3)[-1]
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(bytes(data))


def truncate(folder):
  file = array_files(folder, 3)[-1]
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_arrays(folder):
  array_files(folder, 3)[-1].unlink()


def remove_metadata(folder):
  (folder / "checkpoints" / "3" / "state" / "_METADATA").unlink()


def remove_state(folder):
  shutil.rmtree(folder / "checkpoints" / "3" / "state")


def remove_meta(folder):
  shutil.rmtree(folder / "checkpoints" / "3" / "meta")


@pytest.mark.parametrize(
  "damage", [flip_byte, truncate, remove_arrays, remove_metadata, remove_state, remove_meta]
)
def test_damaged_checkpoint_falls_back_to_the_older_one(tmp_path, caplog, damage):
  saved(tmp_path, [2, 3]).close()
  damage(tmp_path)
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0)
  with caplog.at_level(logging.WARNING):
    restored = checkpoints.restore(abstract(make_state(0)))
  assert state_digest(restored) == state_digest(make_state(2))
  assert "checkpoint of step 3 cannot be used" in caplog.text
  assert "trying step 2" in caplog.text
  assert (tmp_path / "damaged" / "3").is_dir()  # nothing is thrown away
  checkpoints.finish(make_state(3), step=3, score=0.0)  # and its place is free again
  assert checkpoints.steps() == [2, 3]


def test_flipped_byte_names_the_array(tmp_path, caplog):
  saved(tmp_path, [2, 3]).close()
  flip_byte(tmp_path)
  Checkpoints(tmp_path, keep=3, keep_best=0).restore(abstract(make_state(0)))
  assert "checksum of " in caplog.text
  assert any(name in caplog.text for name in ("params/kernel", "params/half", "opt_state", "key"))


def test_only_damaged_checkpoints_stop_the_run(tmp_path):
  saved(tmp_path, [3]).close()
  flip_byte(tmp_path)
  with pytest.raises(CheckpointError, match="none of the checkpoints of steps"):
    Checkpoints(tmp_path, keep=3, keep_best=0).restore(abstract(make_state(0)))


def test_read_only_moves_nothing(tmp_path):
  saved(tmp_path, [2, 3]).close()
  flip_byte(tmp_path)
  restored = Checkpoints(tmp_path, keep=1, keep_best=0, read_only=True).restore(
    abstract(make_state(0))
  )
  assert int(restored.step) == 2
  assert (tmp_path / "checkpoints" / "3").is_dir()
  assert not (tmp_path / "damaged").exists()


def test_unfinished_checkpoint_is_ignored(tmp_path):
  saved(tmp_path, [2]).close()
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
  assert int(Checkpoints(tmp_path, keep=3, keep_best=0).restore(abstract(make_state(0))).step) == 2


def test_donated_state_is_saved_as_it_was(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0)
  state = make_state(1)
  expected = state_digest(state)
  checkpoints.save(state, step=1, score=0.0)
  wreck = jax.jit(lambda s: s._replace(params=jax.tree.map(lambda x: x * 0, s.params)),
                  donate_argnums=0)  # fmt: skip
  wreck(state)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0)
  assert state_digest(checkpoints.restore(abstract(make_state(0)))) == expected


def test_full_disk_leaves_the_last_checkpoint_says_so_and_with_room_goes_on(tmp_path):
  """The disk is played by the process's limit on the size of a file."""
  saved(tmp_path, [1]).close()
  program = f"""
    import resource, sys
    sys.path.insert(0, {str(tmp_path)!r})
    import numpy as np, jax
    from ssrl_jax.checkpoint import Checkpoints, CheckpointError
    from ssrl_jax.state import TrainState
    big = np.random.default_rng(0).normal(size=(512, 512))
    state = TrainState(*jax.tree.map(jax.numpy.asarray, (2, {{"w": big}}, {{}}, (), (), 0)),
                       jax.random.key(0))
    checkpoints = Checkpoints({str(tmp_path)!r}, keep=3, keep_best=0, retries=1, retry_seconds=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
      checkpoints.finish(state, step=2, score=0.0)
    except CheckpointError as error:
      print("caught:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.finish(state, step=3, score=0.0)
    print("saved:", sorted(path.name for path in checkpoints.folder.iterdir()))
  """
  out = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
  )
  assert "caught: could not save a checkpoint" in out.stdout, out.stderr
  assert "the one of step 1 is safe" in out.stdout
  assert "saved: ['1', '3']" in out.stdout, out.stderr  # nor what was written in vain


def test_leftovers_that_vanish_while_they_are_removed_cost_no_try(tmp_path, monkeypatch):
  """As when one array's writer still ends while another's error is already reported."""
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0, retries=1, retry_seconds=0.0)
  Flaky(monkeypatch, "save", 1)
  checkpoints.save(make_state(1), step=1, score=0.0)
  leftover = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp" / "state"
  leftover.mkdir(parents=True)
  (leftover / "manifest.ocdbt.__lock").write_bytes(b"")
  unlink = os.unlink

  def late(path, **options):
    unlink(path, **options)
    if str(path).endswith("__lock"):
      raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

  monkeypatch.setattr(os, "unlink", late)
  checkpoints.finish(make_state(2), step=2, score=0.0)
  assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["2"]


class Flaky:
  """Fails the first `times` calls of an Orbax method with an error of the disk."""

  def __init__(self, monkeypatch, method: str, times: int):
    self.real, self.left = getattr(ocp.CheckpointManager, method), times
    monkeypatch.setattr(ocp.CheckpointManager, method, lambda *a, **k: self(*a, **k))

  def __call__(self, *arguments, **options):
    self.left -= 1
    if self.left >= 0:
      raise OSError(errno.EIO, "Input/output error")
    return self.real(*arguments, **options)


def test_failed_save_is_made_again_of_the_state_that_there_is_by_then(
  tmp_path, monkeypatch, caplog
):
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0, retries=2, retry_seconds=0.0)
  Flaky(monkeypatch, "save", 2)
  for step in (1, 2):
    checkpoints.save(make_state(step), step=step, score=0.0)
    assert checkpoints.due()
  checkpoints.finish(make_state(3), step=3, score=0.0)
  assert not checkpoints.due()
  assert checkpoints.steps() == [3]
  assert caplog.text.count("trying again in 0 s") == 2


def test_save_is_not_tried_before_its_time_and_the_last_failure_stops_the_run(
  tmp_path, monkeypatch
):
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0, retries=1, retry_seconds=1.0)
  flaky = Flaky(monkeypatch, "save", 2)
  checkpoints.save(make_state(1), step=1, score=0.0)
  assert not checkpoints.due()
  checkpoints.save(make_state(2), step=2, score=0.0)
  assert flaky.left == 1
  with pytest.raises(CheckpointError, match=r"at step 2: .*Input/output error.* none was saved"):
    checkpoints.finish(make_state(2), step=2, score=0.0)
  assert checkpoints.steps() == []


def test_checkpoint_that_cannot_be_read_for_a_while_is_waited_for(tmp_path, monkeypatch):
  saved(tmp_path, [2, 3]).close()
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0, retries=3, retry_seconds=0.0)
  flaky = Flaky(monkeypatch, "restore", 3)
  monkeypatch.setattr(
    checkpoint, "_unreadable", lambda folder, whole=True: "EIO" if flaky.left else ""
  )
  assert int(checkpoints.restore(abstract(make_state(0))).step) == 3
  assert not (tmp_path / "damaged").exists()


def test_folder_that_cannot_be_listed_cannot_be_read(tmp_path, monkeypatch):
  assert checkpoint._unreadable(tmp_path) == ""
  assert "No such file" in checkpoint._unreadable(tmp_path / "gone")
  error = PermissionError(errno.EACCES, "Permission denied")
  monkeypatch.setattr(os, "scandir", lambda *args: (_ for _ in ()).throw(error))
  assert "Permission denied" in checkpoint._unreadable(tmp_path)


def test_room_is_looked_for_without_a_trace(tmp_path, monkeypatch):
  checkpoints, state = saved(tmp_path, [1]), make_state(1)
  before = sorted(checkpoints.folder.iterdir())
  assert checkpoints._no_room(state) == ""
  disk = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=10))
  assert "0 MiB free" in checkpoints._no_room(state)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(total=0, free=0))  # a bucket
  assert checkpoints._no_room(state) == ""

  def full(path, data):
    path.touch()
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  assert "No space left" in checkpoints._no_room(state)
  assert sorted(checkpoints.folder.iterdir()) == before


def test_waiting_together_to_save_is_a_sign_of_life_and_to_restore_none(tmp_path, monkeypatch):
  """A sign asks for a step in the usual time; after restoring, the step is compiled first."""
  saved(tmp_path, [1]).close()
  signs, pauses, faults = [], [], ["full"] * 8
  options = {"keep": 1, "keep_best": 0, "retries": 8, "retry_seconds": 1.0}
  checkpoints = Checkpoints(tmp_path, moved=lambda: signs.append("alive"), **options)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(parallel, "all_processes", lambda values: np.tile(values, 2))
  monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
  monkeypatch.setattr(checkpoints, "_no_room", lambda state: faults.pop() if faults else "")
  monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **options: None)
  checkpoints.save(make_state(2), step=2, score=0.0)
  assert len(signs) == 8
  assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
  monkeypatch.setattr(checkpoint, "_unreadable", lambda folder, whole=True: "EIO")
  with pytest.raises(CheckpointError, match="cannot be read"):
    checkpoints.restore(abstract(make_state(0)))
  assert len(signs) == 8
  assert len(pauses) == 16


def test_waiting_for_a_disk_at_the_end_is_a_sign_of_life(tmp_path, monkeypatch):
  signs, options = [], {"keep": 1, "keep_best": 0, "retries": 2, "retry_seconds": 0.0}
  checkpoints = Checkpoints(tmp_path, moved=lambda: signs.append("alive"), **options)
  Flaky(monkeypatch, "save", 2)
  checkpoints.finish(make_state(1), step=1, score=0.0)
  assert checkpoints.steps() == [1]
  assert len(signs) == 2


def test_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
  saved(tmp_path, [2, 3]).close()
  checkpoints = Checkpoints(tmp_path, keep=3, keep_best=0, retries=1, retry_seconds=0.0)
  files = checkpoints.folder

  def read(path, *mode, **options):
    if files in path.parents:
      raise OSError(errno.EIO, "Input/output error")
    return real(path, *mode, **options)

  real = pathlib.Path.open
  monkeypatch.setattr(pathlib.Path, "open", read)
  Flaky(monkeypatch, "restore", 2)
  with pytest.raises(CheckpointError, match=r"step 3 in .* cannot be read .*left as it is"):
    checkpoints.restore(abstract(make_state(0)))
  assert sorted(p.name for p in files.iterdir()) == ["2", "3"]


def test_folder_that_vanishes_is_not_made_again_and_is_used_when_it_is_back(tmp_path):
  checkpoints = Checkpoints(tmp_path / "run", keep=3, keep_best=0, retries=2, retry_seconds=0.0)
  checkpoints.finish(make_state(1), step=1, score=0.0)
  (tmp_path / "run").rename(tmp_path / "away")
  checkpoints.save(make_state(2), step=2, score=0.0)
  assert checkpoints.due()
  assert not (tmp_path / "run").exists()
  (tmp_path / "away").rename(tmp_path / "run")
  checkpoints.finish(make_state(3), step=3, score=0.0)
  assert checkpoints.steps() == [1, 3]
  shutil.rmtree(tmp_path / "run")
  with pytest.raises(CheckpointError, match="has vanished"):
    checkpoints.finish(make_state(4), step=4, score=0.0)
  assert not (tmp_path / "run").exists()


def test_restore_of_a_step_or_an_earlier_one(tmp_path):
  checkpoints = saved(tmp_path, [2, 4])
  assert int(checkpoints.restore(abstract(make_state(0)), at_most=3).step) == 2
  assert checkpoints.restore(abstract(make_state(0)), at_most=1) is None


@pytest.mark.parametrize(
  ("other", "told"),
  [
    (lambda s: s._replace(opt_state=(*s.opt_state, s.step)), r"opt_state/1 is not in the"),
    (lambda s: s._replace(opt_state=()), r"opt_state/0 is only in the checkpoint"),
    (
      lambda s: s._replace(params=s.params | {"half": s.params["kernel"]}),
      r"params/half is bfloat16\[8\] in the checkpoint and float32\[64, 32\] here",
    ),
  ],
  ids=["more", "fewer", "shape"],
)
def test_checkpoint_of_another_state_is_named_and_left_where_it_is(tmp_path, other, told):
  checkpoints = saved(tmp_path, [5, 7])
  with pytest.raises(OtherState, match=rf"step 7 .*{told}"):
    checkpoints.restore(abstract(other(make_state(0))))
  assert not (tmp_path / "damaged").exists()
  assert checkpoints.steps() == [5, 7]
  assert state_digest(checkpoints.restore(abstract(make_state(0)))) == state_digest(make_state(7))


@pytest.mark.parametrize("before", [False, True])
def test_what_judges_steps_may_come_and_go_between_two_runs(tmp_path, before):
  put = lambda x: jax.device_put(x, make_state(0).step.sharding)  # noqa: E731
  guard = jax.tree.map(put, new_guard())
  one, other = make_state(7)._replace(guard=guard), make_state(7)
  one, other = (one, other) if before else (other, one)
  checkpoints = Checkpoints(tmp_path, keep=1, keep_best=0)
  checkpoints.finish(one, step=7, score=0.0)
  restored = checkpoints.restore(abstract(other))
  assert state_digest(restored._replace(guard=())) == state_digest(make_state(7))
  assert not restored.guard
