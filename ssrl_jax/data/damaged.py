"""The examples that a run could not read: listed in its folder, and the run stopped by too many."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssrl_jax.data.batches import Damage
from ssrl_jax.files import write_whole


class DamagedList:
  """WORKDIR/damaged.jsonl: {"example", "path", "reason", "step"}, a line for each example.

  What it holds and when it stops the run is a function of the damaged examples of all processes and
  of the step alone: so it is the same in every process, and after a resume, for which lines of
  later steps are dropped. Only process 0 writes.

  Args:
    folder: WORKDIR.
    step: that the run goes on from.
    batch_size: of all processes together.
    num_examples: that training draws from.
    max_fraction: of the examples seen that may be damaged; see `allowed`.
    substituted: pictures replaced up to `step`, in all processes.
    gather: int64 [b] of each process -> those of all.
    writes: whether this is process 0.
  """

  def __init__(
    self,
    folder: Path,
    *,
    step: int,
    batch_size: int,
    num_examples: int,
    max_fraction: float,
    substituted: int,
    gather: Callable[[np.ndarray], np.ndarray],
    writes: bool,
  ):
    self._path, self._writes = folder / "damaged.jsonl", writes
    self._batch_size, self._num_examples = batch_size, num_examples
    self._max_fraction, self._substituted, self._gather = max_fraction, substituted, gather
    self._lines = {d["example"]: d for d in read_damaged(folder) if d["step"] <= step}
    self._write()

  def settle(
    self, step: int, substituted: int, unread_B: np.ndarray, why: Callable[[int], Damage]
  ) -> None:
    """Lists what the batch of `step` could not read.

    Args:
      step: updates done with that batch.
      substituted: pictures replaced so far, in all processes.
      unread_B: positions of this process's share of the batch, -1 for what was read.
      why: is asked about each example when it is listed, by process 0.

    Raises:
      ValueError: the damaged examples are too many.
    """
    before, self._substituted = self._substituted, substituted
    if substituted == before:  # in every process alike, so that all of them gather or none
      return
    examples = self._gather(unread_B)
    examples = np.unique(examples[examples >= 0]).tolist()
    new = [i for i in examples if i not in self._lines]
    for i in new:
      path, reason = why(i) if self._writes else Damage("", "")
      self._lines[i] = {"example": i, "path": path, "reason": reason, "step": step}
    if new:
      self._write()
    seen = min(step * self._batch_size, self._num_examples)
    most = allowed(seen, self._num_examples, self._max_fraction)
    if len(self._lines) > most:
      first = "; ".join(d["path"] or f"example {i}" for i, d in list(self._lines.items())[:8])
      raise ValueError(
        f"step {step}: {len(self._lines)} of the {seen} examples seen so far cannot be read, "
        f"more than the {most} that data.max_bad_fraction {self._max_fraction} allows: {first}"
        f"{'; ...' if len(self._lines) > 8 else ''}. All of them, with the reasons, are in "
        f"{self._path}: put them right, or raise data.max_bad_fraction, and the same command goes "
        "on; or remove them and start again with another --workdir"
      )

  def _write(self) -> None:
    if not self._writes or not (self._lines or self._path.exists()):
      return
    write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self._lines.values()))


def read_damaged(folder: Path) -> list[dict]:
  """The lines of a run's damaged.jsonl; none without it."""
  path = folder / "damaged.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_fraction(fraction: float) -> None:
  if not 0 <= fraction <= 1:
    raise ValueError(f"data.max_bad_fraction is {fraction}; expected 0 (none) to 1 (never stop)")


def allowed(seen: int, num_examples: int, fraction: float) -> int:
  """How many of the first `seen` of `num_examples` examples may be damaged; with fraction 0 none.

  The fraction of them; and 3, so that a stray file does not stop a run on a few dozen pictures; and
  while not all have been seen, four standard deviations of the number that chance puts among the
  first: drawn 2,000 times, a set just at the limit was stopped at most once (docs/data.md).
  """
  if not fraction:
    return 0
  expected = fraction * seen
  return int(expected + 3 + 4 * math.sqrt(expected * (1 - seen / num_examples)))
