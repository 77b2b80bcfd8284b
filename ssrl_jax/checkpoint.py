"""Saving and restoring the train state: asynchronous, atomic, checked byte for byte on restore.

A checkpoint is Orbax's `state` and a JSON item `meta` with the checksum of every array, because
Orbax alone restores a flipped byte without a word. Writing happens beside the next steps; a folder
gets its name only when complete, so a kill at any moment leaves the ones before it untouched.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ssrl_jax import parallel, processes
from ssrl_jax.state import TrainState, checksum_table


class CheckpointError(OSError):
  """A checkpoint could not be written, or none could be read."""


class Checkpoints:
  """The checkpoints of one run's folder, WORKDIR/checkpoints/STEP.

  Args:
    workdir: the run's folder.
    keep: how many of the newest to keep, >= 1.
    keep_best: how many of the highest `score` to keep beside them, >= 0.
    read_only: nothing is written, moved or deleted (an evaluation of a running run).
  """

  def __init__(self, workdir: str | Path, *, keep: int, keep_best: int, read_only: bool = False):
    if keep < 1 or keep_best < 0:
      raise ValueError(f"checkpoint.keep {keep} must be >= 1, keep_best {keep_best} >= 0")
    self.folder = Path(workdir).absolute() / "checkpoints"
    self._read_only = read_only
    newest = policies.LatestN(keep)
    best = policies.BestN(get_metric_fn=lambda m: m["score"], n=keep_best)
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy([newest, best] if keep_best else [newest]),
      enable_async_checkpointing=not read_only,
      read_only=read_only,
      create=not read_only,
      cleanup_tmp_directories=not read_only,
    )
    with _quiet():
      self._manager = ocp.CheckpointManager(self.folder, options=self._options)

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, *, step: int, score: float) -> None:
    """Starts saving; returns once the arrays may be donated. Raises what an earlier save met."""
    meta = {"step": step, "checksums": checksum_table(state)}
    item = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with self._report_failure(step), _quiet():
      if step not in self._manager.all_steps():
        self._manager.save(step, args=item, metrics={"score": score})

  def wait(self) -> None:
    """Returns when everything is on disk; raises CheckpointError if it is not."""
    with self._report_failure(None), _quiet():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._report_failure(None), _quiet():
      self._manager.close()

  def restore(self, abstract_state: TrainState) -> TrainState | None:
    """The newest checkpoint that is whole, onto the shardings of `abstract_state`; None if none is.

    One that cannot be read, or whose arrays differ from their checksums, is reported, moved to
    WORKDIR/damaged, and the next older one is taken. Raises CheckpointError if there are
    checkpoints but none is whole.
    """
    steps = self.steps()
    for step in reversed(steps):
      state, reason = None, "another process cannot read it"
      try:
        state = self._restore_step(step, abstract_state)
      except Exception as error:
        reason = " ".join(str(error).split())[:300]
      if not np.any(parallel.all_processes(np.array([state is None], np.int64))):
        return state
      older = [s for s in steps if s < step]
      logging.warning(
        "checkpoint of step %d cannot be used (%s); %s", step, reason,
        f"trying step {older[-1]}" if older else "there is no older one",
      )  # fmt: skip
      self._set_aside(step)
    if steps:
      raise CheckpointError(
        f"none of the checkpoints of steps {steps} in {self.folder} can be restored; they were "
        "left in place or in the folder `damaged` beside it: start again with another --workdir"
      )
    return None

  def _restore_step(self, step: int, abstract_state: TrainState) -> TrainState:
    item = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
    )
    with _quiet():
      restored = self._manager.restore(step, args=item)
    expected, got = restored.meta["checksums"], checksum_table(restored.state)
    wrong = [name for name in got if got[name] != expected.get(name)]
    if wrong or expected.keys() - got.keys():
      names = ", ".join((wrong or sorted(expected.keys() - got.keys()))[:3])
      raise CheckpointError(f"the checksum of {names} is not the one saved")
    return restored.state

  def _set_aside(self, step: int) -> None:
    if self._read_only:
      return
    target = self.folder.parent / "damaged" / str(step)

    def move() -> None:
      target.parent.mkdir(exist_ok=True)
      shutil.rmtree(target, ignore_errors=True)
      shutil.move(self.folder / str(step), target)

    with _quiet():
      self._manager.close()
      processes.first_does(move)
      self._manager = ocp.CheckpointManager(self.folder, options=self._options)

  @contextlib.contextmanager
  def _report_failure(self, step: int | None) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      with contextlib.suppress(Exception):
        self._manager.reload()
      complete = self.steps()
      reason = " ".join(str(error).split())[:300]
      raise CheckpointError(
        f"could not save a checkpoint{'' if step is None else f' at step {step}'}: {reason}. "
        f"{f'The one of step {complete[-1]} is safe' if complete else 'None was saved before'}; "
        "put that right (a full disk: make room) and the same command goes on from there"
      ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Orbax tells of every step it takes, and of failures twice: we report those ourselves."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


def abstract(state: Any) -> Any:
  """Shapes, types and shardings of a state: what `restore` needs."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
