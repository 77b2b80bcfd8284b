"""What a run could not read: listed once, and too much of it stops the run, on every process."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.data.batches import Damage
from ssrl_jax.data.damaged import DamagedList, allowed, read_damaged
from ssrl_jax.data.pipeline import train_batches

ROOT = Path(__file__).resolve().parents[2]


def why(i):
  return Damage(f"{i}.jpg", "empty")


def damaged_list(folder, *, step=0, num_examples=100, max_fraction=0.05, substituted=0, **options):
  return DamagedList(
    folder, step=step, batch_size=10, num_examples=num_examples, max_fraction=max_fraction,
    substituted=substituted, **({"gather": lambda x: x, "writes": True} | options),
  )  # fmt: skip


def settle(damaged, step, substituted, *examples):
  unread = np.full(10, -1)
  unread[: len(examples)] = examples
  damaged.settle(step, substituted, unread, why)


def listed(folder):
  return [(d["example"], d["path"], d["reason"], d["step"]) for d in read_damaged(folder)]


def test_each_damaged_example_is_listed_once_also_after_a_resume(tmp_path):
  damaged = damaged_list(tmp_path)
  assert not (tmp_path / "damaged.jsonl").exists()
  settle(damaged, 1, 2, 7, 3)
  settle(damaged, 2, 4, 7, 50)  # 7 comes again
  want = [(3, "3.jpg", "empty", 1), (7, "7.jpg", "empty", 1), (50, "50.jpg", "empty", 2)]
  assert listed(tmp_path) == want
  damaged = damaged_list(tmp_path, step=1, substituted=2)  # step 2 is done again
  assert listed(tmp_path) == want[:2]
  settle(damaged, 2, 4, 50, 7)
  assert listed(tmp_path) == want


def test_too_many_damaged_examples_stop_a_run_and_a_resumed_one_alike(tmp_path):
  most = allowed(100, 100, 0.05)
  damaged = damaged_list(tmp_path)
  for step in range(2, 12):
    settle(damaged, step, step, *range(min(step, most)))  # the same ones count once
  message = rf"step 12: {most + 1} of the 100 examples.* than the {most} that .*0.05.*0.jpg; 1.jpg"
  with pytest.raises(ValueError, match=message):
    settle(damaged, 12, 12, 90)
  resumed = damaged_list(tmp_path, step=11, substituted=11)
  with pytest.raises(ValueError, match=message):
    settle(resumed, 12, 12, 90)
  assert len(listed(tmp_path)) == most + 1  # the list has the one that was too many
  settle(damaged_list(tmp_path, step=11, substituted=11, max_fraction=1.0), 12, 12, 90)


def test_allowance_bears_a_stray_file_and_chance_but_no_more():
  assert allowed(20, 20, 0.01) == 3
  assert allowed(10_000, 10_000, 0.01) == 103
  assert allowed(10**6, 10**6, 0.01) == 10_003
  assert [allowed(n, 1000, 0.0) for n in (1, 1000)] == [0, 0]
  assert all(allowed(n, 1000, 1.0) >= n for n in (1, 10, 1000))
  np_rng = np.random.default_rng(0)
  stopped = {10: 0, 40: 0}  # of 1,000 examples, at the limit and at four times it
  for damaged in stopped:
    for _ in range(300):
      places = np.sort(np_rng.permutation(1000)[:damaged])
      seen = places // 16 * 16 + 16
      count = np.arange(1, damaged + 1)
      most = [allowed(int(min(n, 1000)), 1000, 0.01) for n in seen]
      stopped[damaged] += bool((count > most).any())
  assert stopped == {10: 0, 40: 300}


class Half:
  """Picture i cannot be read if i is in `damaged`."""

  num_classes, class_names = None, ()

  def __init__(self, damaged):
    self._damaged = damaged

  def __len__(self):
    return 48

  def __getitem__(self, i):
    return {"image": b"" if i in self._damaged else np.full((4, 4, 3), i, np.uint8), "label": -1}

  def __repr__(self):
    return "Half()"


def run_until_stopped(folder, process_index, process_count):
  """The steps of a run with 6 damaged pictures, without its model; where and why it stopped."""
  batches = train_batches(
    Half({1, 2, 3, 4, 5, 6}), seed=0, batch_size=8, start_step=0, canvas=4,
    process_index=process_index, process_count=process_count,
  )  # fmt: skip
  damaged = DamagedList(
    folder, step=0, batch_size=8, num_examples=48, max_fraction=0.02, substituted=0,
    gather=parallel.all_processes, writes=process_index == 0,
  )  # fmt: skip
  substituted = 0
  with contextlib.closing(batches):
    for step in range(1, 7):
      batch = next(batches)
      unread = np.where(batch["substituted"], batch["id"], -1)
      # What the compiled step sums up on the devices.
      substituted += int((parallel.all_processes(unread) >= 0).sum())
      try:
        damaged.settle(step, substituted, unread, batches.damage)
      except ValueError as error:
        return str(error).replace(str(folder), "")
  return "not stopped"


TWO_PROCESSES = """
import sys
from pathlib import Path
import jax
address, index, folder, root = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(address, num_processes=2, process_id=int(index))
sys.path.insert(0, root)
from tests.data.test_damaged import run_until_stopped
said = run_until_stopped(Path(folder), int(index), 2)
Path(folder, f"said{index}").write_text(said)
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_step_where_one_would_with_the_same_list(tmp_path):
  alone, shared = tmp_path / "alone", tmp_path / "shared"
  alone.mkdir()
  shared.mkdir()
  want = run_until_stopped(alone, 0, 1)
  assert want.startswith("step ")
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  children = [
    subprocess.Popen(
      [sys.executable, "-c", TWO_PROCESSES, address, str(i), str(shared), str(ROOT)],
      env=environment,
    )
    for i in range(2)
  ]
  assert [child.wait(timeout=300) for child in children] == [0, 0]
  first, second = ((shared / f"said{i}").read_text() for i in range(2))
  assert first == want
  cut = want.index(" allows: ")  # process 1 does not read anew what process 0 could not
  assert second[:cut] == want[:cut]
  assert (shared / "damaged.jsonl").read_text() == (alone / "damaged.jsonl").read_text()
  assert all(reason for _, _, reason, _ in listed(shared))
