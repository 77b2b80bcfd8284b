"""Bad steps: found, skipped or stopped at, their batches kept, and made again on their own."""

import json
import logging
import os
import pickle
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssrl_jax import parallel
from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.config import base_config
from ssrl_jax.experiment import build, create_state, open_split
from ssrl_jax.guard import SETTLED, SPIKE, WINDOW, Guard, init_guard, judge, read_bad_step
from ssrl_jax.methods import simclr
from ssrl_jax.replay import replay
from ssrl_jax.state import state_digest
from ssrl_jax.step import make_watched_step
from ssrl_jax.train import train, training_batches
from tests.test_train import Linear, tiny

WHITE = 5  # the example whose picture has one colour: its views make the loss NaN


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  root, np_rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
  for i in range(16):
    pixels = (
      np_rng.integers(0, 256, (16, 16, 3), np.uint8) if i != WHITE else np.full((16, 16, 3), 255)
    )
    Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i:02}.png")
  return root


def prepared(pictures, **guard):
  """An experiment of two steps an epoch, of which one has the white picture; and its pictures."""
  config = tiny(pictures, devices=1, sampling="uniform")
  config.guard.update(guard)
  config.steps, config.checkpoint.every_steps, config.log.every_steps = 6, 2, 1
  config.checkpoint.keep, config.optim.warmup_epochs = 9, 0.0
  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=None)
  views = experiment.method.views
  method = simclr.make(encoder=Linear(), views=views, run=None, hidden_dim=8, out_dim=8)

  def loss(params, method_state, views, key, step):
    value, aux = method.loss(params, method_state, views, key, step)
    flat = jnp.min(jnp.std(views["global"], axis=(2, 3))) < 1e-4
    return jnp.where(flat, jnp.nan, value), aux

  return replace(experiment, method=method._replace(loss=loss)), source


def run(experiment, source, workdir, *, stop_after=0):
  workdir.mkdir(exist_ok=True)

  def say(line):
    if line.startswith(f"step {stop_after}/"):
      os.kill(os.getpid(), signal.SIGTERM)

  state, _ = train(experiment, source, workdir, say=say)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return state, lines


def test_skipped_step_changes_nothing_but_what_counts(pictures):
  experiment, source = prepared(pictures, on_bad_step="skip")
  step, batches = (
    jax.jit(make_watched_step(experiment)),
    training_batches(experiment, source, start_step=0),
  )
  state, seen = create_state(experiment), []
  for _ in range(2):
    batch = next(batches)
    new, metrics = step(state, parallel.to_device(batch, experiment.mesh))
    bad = WHITE in batch["id"]
    assert (int(metrics["first_bad"]) >= 0) == bad
    moved = [state_digest(a) != state_digest(b) for a, b in zip(state[1:5], new[1:5]) if b]
    assert moved == [not bad] * len(moved)
    assert int(new.step) == int(state.step) + 1
    assert (int(new.guard["skipped"]), int(new.guard["good"])) == (
      sum(seen) + bad,
      len(seen) - sum(seen) + (not bad),
    )
    state, seen = new, [*seen, bad]
  batches.close()
  assert sorted(seen) == [False, True]


def test_skipping_run_ends_as_if_it_had_not_been_interrupted_and_keeps_the_batches(
  pictures, tmp_path, caplog
):
  experiment, source = prepared(pictures, on_bad_step="skip", keep=2)
  with caplog.at_level(logging.WARNING):
    state, lines = run(experiment, source, tmp_path / "whole")
  assert int(state.guard["skipped"]) == 3
  bad = [line["step"] for line in lines if np.isnan(line["loss"])]
  assert [line["guard/skipped"] for line in lines] == np.cumsum(
    [i + 1 in bad for i in range(6)]
  ).tolist()
  assert caplog.text.count("this update is skipped") == 3
  files = sorted((tmp_path / "whole" / "bad_steps").iterdir())
  assert [int(f.stem) for f in files] == bad[1:]  # the newest `keep`
  assert WHITE in read_bad_step(files[0])["id"]
  run(experiment, source, tmp_path / "stopped", stop_after=bad[0])
  again, _ = run(experiment, source, tmp_path / "stopped")
  assert state_digest(again) == state_digest(state)


def test_stopped_run_is_made_again_with_its_batch_and_writes_nothing(pictures, tmp_path):
  experiment, source = prepared(pictures)
  with pytest.raises(
    FloatingPointError, match=r"step [12]: NaN or infinity, first in 'loss/total'"
  ):
    run(experiment, source, tmp_path)
  (file,) = (tmp_path / "bad_steps").iterdir()
  step, said = int(file.stem), []
  before = sorted(tmp_path.rglob("*"))
  assert replay(experiment, source, tmp_path, step, say=said.append)
  assert said[-1] == f"step {step}: first bad is 'loss/total', as it was then"
  assert sorted(tmp_path.rglob("*")) == before
  saved = read_bad_step(file)
  other = next(i for i in range(16) if i not in saved["id"])
  image = saved["image"].copy()
  image[saved["id"] == WHITE] = source_picture(source, other)
  np.savez(file, **saved | {"image": image})
  assert not replay(experiment, source, tmp_path, step, say=said.append)
  assert said[-1] == f"step {step}: first bad is 'nothing', not 'loss/total'"


def test_replay_judges_as_the_run_does_where_its_checkpoint_is_older_than_the_guard(
  pictures, tmp_path
):
  experiment, source = prepared(pictures)
  with pytest.raises(FloatingPointError):
    run(experiment, source, tmp_path)
  (file,) = (tmp_path / "bad_steps").iterdir()
  Checkpoints(tmp_path, keep=1, keep_best=0).finish(create_state(experiment), step=0, score=0.0)
  said, (skipping, _) = [], prepared(pictures, on_bad_step="skip")
  assert replay(skipping, source, tmp_path, int(file.stem), say=said.append)
  assert "  guard/skipped 1" in said


def source_picture(source, i):
  with Image.open(source[i]["image"]) as image:
    return np.asarray(image)


def options(**changes):
  group = base_config("simclr").guard
  group.update(changes)
  return group


def test_verdict_is_that_of_the_mean_and_variance_of_the_good_losses():
  losses = np.random.default_rng(0).normal(-3, 1, 60).astype(np.float32)
  losses[[SETTLED - 1, 30, 31, 45]] = 3, 1e3, np.nan, -9  # too early; spike; NaN; low is good
  guard, good, verdicts = init_guard(options(spike=6.0)), [], {}
  step = jax.jit(lambda g, loss, bad: judge(g, loss, bad, spike=6.0, name=7))
  for i, loss in enumerate(losses):
    bad, guard = step(guard, loss, np.int32(-1 if np.isfinite(loss) else 3))
    if bad >= 0:
      verdicts[i] = int(bad), int(guard["in_a_row"])
    else:
      good.append(loss)
      assert int(guard["in_a_row"]) == 0
    np.testing.assert_allclose(guard["mean"], np.mean(good), rtol=1e-4)
    np.testing.assert_allclose(guard["variance"], np.var(good), rtol=1e-3, atol=1e-5)
  assert verdicts == {30: (7, 1), 31: (3, 2)}
  assert int(guard["skipped"]) == 2


def test_average_of_the_losses_moves_with_what_the_last_ones_are():
  """Losses of 1, then of 3: by hand, what the older ones still count."""
  losses = jnp.repeat(jnp.array([1.0, 3.0]), 150)

  @jax.jit
  def last(guard):
    one = lambda guard, loss: (judge(guard, loss, -1, spike=0.0, name=7)[1], None)  # noqa: E731
    return jax.lax.scan(one, guard, losses)[0]

  guard, old = last(init_guard(options(on_bad_step="skip"))), (1 - 1 / WINDOW) ** 150
  np.testing.assert_allclose(guard["mean"], 3 - 2 * old, rtol=1e-4)
  np.testing.assert_allclose(guard["variance"], 4 * old * (1 - old), rtol=1e-4)
  assert int(guard["good"]) == 300


def test_collapse_is_told_once_when_it_has_lasted_and_not_at_the_start(tmp_path, caplog):
  guard = Guard(options(), tmp_path, total_steps=9, watched=(["a"], 4), writes=True)
  fine = {"health/std": 1.0, "health/cosine": 0.1, "health/rank": 3.0}
  collapsed = fine | {"health/std": 0.01}
  seen = [(step, collapsed) for step in (10, 20, 30, 40, 50, 60)]  # from step 50 on they count
  seen += [(70, fine), (80, collapsed), (90, collapsed)]
  for step, figures in seen:
    guard.check_collapse(step, figures)
  assert caplog.text == ""
  for step in (100, 110, 120):
    guard.check_collapse(step, collapsed)
  (line,) = caplog.messages
  assert line.startswith("step 100: complete collapse")


def test_nothing_is_carried_where_nothing_is_asked_for():
  assert init_guard(options()) == ()


def test_patience_ends_a_run_of_bad_steps(tmp_path):
  batch = {"id": np.arange(3)}
  guard = Guard(
    options(on_bad_step="skip", patience=2), tmp_path, total_steps=9, watched=(["a", SPIKE], 4),
    writes=True,
  )  # fmt: skip
  figures = {"first_bad": 1, "loss": 9.0, "guard/in_a_row": 1}
  assert not guard.check(5, figures, lambda: batch)
  with pytest.raises(
    FloatingPointError, match=r"step 6: spike of the loss \(9\).* 2th time in a row"
  ):
    guard.check(6, figures | {"guard/in_a_row": 2}, lambda: batch)
  assert json.loads((tmp_path / "non_finite.json").read_text())["first_bad_tensor"] == SPIKE


def test_disk_that_takes_nothing_does_not_hide_what_happened(tmp_path, caplog):
  (tmp_path / "bad_steps").write_text("in the way")
  (tmp_path / "non_finite.json").mkdir()
  guard = Guard(options(), tmp_path, total_steps=9, watched=(["a"], 4), writes=True)
  with pytest.raises(FloatingPointError, match="step 5: NaN or infinity, first in 'a'"):
    guard.check(5, {"first_bad": 0, "loss": 1.0}, lambda: {"id": np.arange(3)})
  assert "could not be kept" in caplog.text
  assert "non_finite.json: [Errno" in caplog.text


class Bomb:
  def __reduce__(self):
    return os.mkdir, (os.environ["BOMB"],)


def test_kept_batch_that_would_execute_something_is_refused(tmp_path, monkeypatch):
  monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
  file = tmp_path / "3.npz"
  np.savez(file, id=np.array([Bomb()], dtype=object))
  with pytest.raises(ValueError, match="is damaged or no batch of a bad step"):
    read_bad_step(file)
  file.write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(ValueError, match="is damaged or no batch of a bad step"):
    read_bad_step(file)
  assert not (tmp_path / "executed").exists()
  with pytest.raises(FileNotFoundError, match=r"bad steps whose batch was kept: \[3\]"):
    read_bad_step(tmp_path / "4.npz")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"on_bad_step": "skp"}, "expected 'stop' or 'skip'"),
    ({"spike": -1.0}, "must be >= 0"),
    ({"patience": 0}, "guard.patience 0 >= 1"),
  ],
)
def test_wrong_options_are_refused_with_what_is_expected(pictures, changes, message):
  with pytest.raises(ValueError, match=message):
    prepared(pictures, **changes)
