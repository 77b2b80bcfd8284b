"""Reader workers that are killed, raise, or lose their parent."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssrl_jax.data import batches as module
from ssrl_jax.data.batches import ReadError
from ssrl_jax.data.pipeline import train_batches

ROOT = Path(__file__).resolve().parents[2]


class Odd(Exception):
  """Cannot be pickled: a database driver's may hold a connection."""

  def __init__(self, message):
    super().__init__(message)
    self.connection = lambda: None


class Pictures:
  """Picture i is grey level i; `trouble` is raised, or called, at position 5."""

  num_classes, class_names = None, ()

  def __init__(self, trouble=None):
    self._trouble = trouble

  def __len__(self):
    return 24

  def __getitem__(self, i):
    if i == 5 and self._trouble == "odd":
      raise Odd("the connection\nwas lost")
    if i == 5 and self._trouble == "abort":
      os.abort()
    return {"image": np.full((8, 8, 3), i, np.uint8), "label": -1}

  def __repr__(self):
    return "Pictures()"


def opened(trouble=None, **options):
  return train_batches(Pictures(trouble), seed=0, batch_size=8, start_step=2, canvas=8, **options)


def test_killed_worker_is_reported_and_started_anew_without_changing_a_batch(caplog):
  with contextlib.closing(opened()) as plain:
    want = [next(plain) for _ in range(12)]
  with contextlib.closing(opened(workers=1)) as batches:
    got = [next(batches)]
    with caplog.at_level(logging.WARNING, logger="absl"):
      os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
      got += [next(batches) for _ in range(11)]
  for a, b in zip(got, want, strict=True):
    for key in b:
      np.testing.assert_array_equal(a[key], b[key])
  (message,) = [r.getMessage() for r in caplog.records]
  assert "exit code -9; started anew, which changes no batch" in message
  assert not multiprocessing.active_children()


def test_worker_that_dies_again_over_the_same_picture_stops_the_run(monkeypatch):
  monkeypatch.setattr(module, "MAX_DEATHS", 2)
  batches = opened("abort", workers=1)
  with pytest.raises(ReadError, match=r"exit code -6, 2 times over .*examples \[.*find and rem"):
    list(itertools.islice(batches, 3))
  batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_source_is_one_line_with_its_own_words(workers):
  batches = opened("odd", workers=workers)
  with pytest.raises(ReadError) as error:
    list(itertools.islice(batches, 3))
  batches.close()
  assert str(error.value) == "Odd: the connection was lost"


PARENT = """
import multiprocessing, sys, time
sys.path[:0] = [sys.argv[1]]
from tests.data.test_batches import opened
if __name__ == "__main__":
  batches = opened(workers=1)
  next(batches)
  print(multiprocessing.active_children()[0].pid, flush=True)
  time.sleep(600)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  (tmp_path / "parent.py").write_text(PARENT)
  parent = subprocess.Popen(
    [sys.executable, str(tmp_path / "parent.py"), str(ROOT)], stdout=subprocess.PIPE, text=True
  )
  worker = int(parent.stdout.readline())
  parent.kill()
  parent.wait()
  parent.stdout.close()
  deadline = time.monotonic() + 30
  try:
    while running(worker):
      assert time.monotonic() < deadline, "the worker outlived its parent"
      time.sleep(0.1)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(worker, signal.SIGKILL)


def running(pid):
  """Whether a process is there and not merely waiting to be collected by whoever adopted it."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False
