"""Saving and restoring the train state: asynchronous, atomic, checked byte for byte on restore.

A checkpoint is Orbax's `state` and a JSON item `meta` with the checksum of every array, because
Orbax alone restores a flipped byte without a word. Writing happens beside the next steps; a folder
gets its name only when complete, so a kill at any moment leaves the ones before it untouched. A
disk that fails for a while is waited for: saving is tried again with the state that the run has
come to by then, while it goes on. Several processes find out together whether the disk is there
before they save or restore, and wait for it together: Orbax meets at many places, where nobody may
be missing. What fails in between ends them with a status that asks to be started again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ssrl_jax import parallel, processes
from ssrl_jax.guard import new_guard
from ssrl_jax.state import TrainState, checksum_table, named_leaves

PATIENCE = 60.0  # seconds between two tries: less than a watchdog's


class CheckpointError(OSError):
  """A checkpoint could not be written, or none could be read."""


class OtherState(ValueError):
  """A checkpoint is of another state than the config makes, which says nothing against it."""


class Unreadable(OSError):
  """The file system does not give the bytes of a checkpoint: it may, later."""


class Checkpoints:
  """The checkpoints of one run's folder, WORKDIR/checkpoints/STEP.

  Args:
    workdir: the run's folder.
    keep: how many of the newest to keep, >= 1.
    keep_best: how many of the highest `score` to keep beside them, >= 0.
    retries: how often in a row a failed save, or reading what cannot be read, is tried again.
    retry_seconds: before the first of them; each waits twice as long as the one before, and
      PATIENCE at most.
    read_only: nothing is written, moved or deleted (an evaluation of a running run).
    moved: is called while processes wait to save: a sign of life.
  """

  def __init__(
    self,
    workdir: str | Path,
    *,
    keep: int,
    keep_best: int,
    retries: int = 5,
    retry_seconds: float = 1.0,
    read_only: bool = False,
    moved: Callable[[], object] = lambda: None,
  ):
    if keep < 1 or keep_best < 0:
      raise ValueError(f"checkpoint.keep {keep} must be >= 1, keep_best {keep_best} >= 0")
    if retries < 0 or retry_seconds < 0:
      raise ValueError(
        f"checkpoint.retries {retries} and retry_seconds {retry_seconds} must be >= 0"
      )
    self.folder = Path(workdir).absolute() / "checkpoints"
    self._read_only, self._retries, self._retry_seconds = read_only, retries, retry_seconds
    self._failures, self._due, self._saving, self._moved = 0, None, False, moved
    newest = policies.LatestN(keep)
    best = policies.BestN(get_metric_fn=lambda m: m["score"], n=keep_best)
    kept = policies.AnyPreservationPolicy([newest, best] if keep_best else [newest])
    with _quiet():
      self._options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        enable_async_checkpointing=not read_only,
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
      )
    # When one array cannot be written Orbax forgets the others' errors, which asyncio then prints.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with _quiet():
      self._manager = ocp.CheckpointManager(self.folder, options=self._options)

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, *, step: int, score: float) -> None:
    """Starts saving; returns once the arrays may be donated.

    A save that fails, or turns out to have failed, becomes `due`. Raises CheckpointError if it was
    the last that `retries` allows.
    """
    if not self._ended():
      return
    meta = {"step": step, "checksums": checksum_table(state), "arrays": _arrays(state)}
    item = ocp.args.Composite(
      state=ocp.args.StandardSave(_saved(state)), meta=ocp.args.JsonSave(meta)
    )
    is_new = step not in self._manager.all_steps()
    if is_new and (reason := self._wait_together(lambda: self._no_room(state), self._moved)):
      raise CheckpointError(self._told(step, reason))
    with self._counted(step), _quiet():
      if not self.folder.is_dir():  # Orbax would make it: where a disk was mounted, for one
        raise FileNotFoundError(f"{self.folder} has vanished")
      if self._failures:
        self._reopen()
      if step not in self._manager.all_steps():
        self._manager.save(step, args=item, metrics={"score": score})
      self._due, self._saving = None, True

  def due(self) -> bool:
    """Whether a save failed and it is time for the next: of whatever state there is by now.

    Several processes waited for the disk before, and stop if it failed all the same.
    """
    if jax.process_count() > 1:
      return False
    if self._saving and not self._manager.is_saving_in_progress():
      self._ended()
    return self._due is not None and time.monotonic() >= self._due

  def finish(self, state: TrainState, *, step: int, score: float) -> None:
    """Returns when `state` is on disk; raises CheckpointError if it does not get there."""
    self.save(state, step=step, score=score)
    while not self._ended() or self._due is not None:
      self._moved()  # waiting for a disk is no hanging
      time.sleep(max(0.0, self._due - time.monotonic()))
      self.save(state, step=step, score=score)

  def close(self) -> None:
    try:
      with _quiet():
        self._manager.close()
    except Exception as error:
      logging.warning("the last save did not end well: %s", _line(error))

  def _ended(self) -> bool:
    """Waits for the save that was started; False if it failed, or one did that is not yet due."""
    if self._saving:
      self._saving = False
      with self._counted(None), _quiet():
        self._manager.wait_until_finished()
        self._failures = 0
    return self._due is None or time.monotonic() >= self._due

  def _pause(self, attempt: int) -> float:
    return min(PATIENCE, self._retry_seconds * 2**attempt)

  def _wait_together(
    self, fault: Callable[[], str], moved: Callable[[], object] = lambda: None
  ) -> str:
    """With several processes: waits, `retries` times, until none has a `fault` to name.

    Returns, in all of them, the fault that is left; empty if there is none. Restoring is no time to
    call `moved`, after which a step is due: what comes next is compiling.
    """
    if jax.process_count() == 1:
      return ""
    for attempt in itertools.count():
      reason = fault()
      failing = np.flatnonzero(parallel.all_processes(np.array([bool(reason)], np.int64)))
      if not failing.size:
        return ""
      reason = reason or f"process {failing[0]} cannot use it"
      if attempt == self._retries:
        return reason
      seconds = self._pause(attempt)
      logging.warning("%s: %s; all wait, trying again in %g s", self.folder, reason, seconds)
      moved()
      time.sleep(seconds)

  def _disagree(self) -> str:
    """Several processes: whether they see other checkpoints than each other; looks again."""
    self._manager.reload()
    steps = self.steps()
    seen_P2 = parallel.all_processes(np.array([len(steps), sum(steps)], np.int64)).reshape(-1, 2)
    return "" if (seen_P2 == seen_P2[0]).all() else f"this process sees the steps {steps}"

  def _no_room(self, state: TrainState) -> str:
    """Why this process cannot write into the folder, or all together a state; empty if they can.

    Orbax compresses, so it may refuse the last few per cent of a disk.
    """
    needed = sum(x.nbytes for x in jax.tree.leaves(_saved(state)))
    probe = self.folder / f".writable-{jax.process_index()}"
    try:
      probe.write_bytes(b"x")
      disk = shutil.disk_usage(self.folder)
    except OSError as error:
      return _line(error)
    finally:
      with contextlib.suppress(OSError):
        probe.unlink()
    if disk.free >= needed or not disk.total:  # a mounted bucket may have no size
      return ""
    return f"{disk.free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} needed"

  @contextlib.contextmanager
  def _counted(self, step: int | None) -> Iterator[None]:
    """Around a save: its failure is reported and sets when to try again, or is the last straw."""
    try:
      yield
    except Exception as error:
      self._failures += 1
      told = self._told(step, _line(error))
      if jax.process_count() > 1:
        raise processes.StartAgain(told) from error
      if self._failures > self._retries:
        raise CheckpointError(told) from error
      seconds = self._pause(self._failures - 1)
      self._due = time.monotonic() + seconds
      logging.warning("%s; trying again in %g s", told, seconds)

  def _told(self, step: int | None, reason: str) -> str:
    """A failed save, and what there is beside it."""
    complete = sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())
    safe = f"the one of step {complete[-1]} is safe" if complete else "none was saved before"
    return (
      f"could not save a checkpoint{'' if step is None else f' at step {step}'}: {reason}. In "
      f"{self.folder} {safe}; put that right (a full disk: make room) and the same command goes on "
      "from there"
    )

  def _reopen(self) -> None:
    """Orbax's manager anew, which looks what there is and removes what was written in vain."""
    with _quiet(), contextlib.suppress(Exception):
      self._manager.close()
    # The writers of a failed save may still be taking away files of theirs, at which Orbax's own
    # removing stops: what is left of it finds none.
    for leftover in self.folder.glob("*.orbax-checkpoint-tmp"):
      shutil.rmtree(leftover, ignore_errors=True)
    with _quiet():
      self._manager = ocp.CheckpointManager(self.folder, options=self._options)

  def restore(self, abstract_state: TrainState, *, at_most: int | None = None) -> TrainState | None:
    """The newest checkpoint that is whole, onto the shardings of `abstract_state`; None if none is.

    One that can be read but not restored, or whose arrays differ from their checksums, is reported,
    moved to WORKDIR/damaged, and the next older one is taken. What is carried to judge steps
    (`guard`) may be in one of the two only: it is left out then.

    Args:
      at_most: of this step or an earlier one.

    Raises:
      CheckpointError: there are checkpoints but none is whole, or one cannot be read for now, which
        says nothing about it: it stays where it is.
      OtherState: the newest has other arrays than `abstract_state`; likewise.
    """
    if reason := self._wait_together(self._disagree):
      raise CheckpointError(f"{self.folder} is not the same for all processes: {reason}")
    steps = [s for s in self.steps() if at_most is None or s <= at_most]
    for step in reversed(steps):
      error, reason = None, "another process cannot read it"
      try:
        state = self._restore_patiently(step, abstract_state)
      except Exception as caught:
        error, reason = caught, _line(caught)
      verdict = 0 if error is None else 1
      if isinstance(error, Unreadable):
        verdict = 2
      if isinstance(error, OtherState | MemoryError | jax.errors.JaxRuntimeError):
        verdict = 3  # not the checkpoint's fault
      verdict_P = parallel.all_processes(np.array([verdict], np.int64))
      if not np.any(verdict_P):
        return state
      if np.any(verdict_P == 3):
        raise error or CheckpointError(reason)
      if np.any(verdict_P == 2):
        raise CheckpointError(
          f"the checkpoint of step {step} in {self.folder} cannot be read ({reason}); it was left "
          "as it is: when the disk is there again, the same command goes on"
        ) from error
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

  def _restore_patiently(self, step: int, abstract_state: TrainState) -> TrainState:
    """Tries `retries` times while its files cannot be read, and twice when they can.

    Several processes look first whether all can read, and then try once.
    """
    folder = self.folder / str(step)
    if reason := self._wait_together(lambda: _unreadable(folder, whole=False)):
      raise Unreadable(reason)
    retries, tries = (self._retries, 2) if jax.process_count() == 1 else (0, 1)
    wrong = 0  # times that they could be read
    for attempt in itertools.count():
      try:
        return self._restore_step(step, abstract_state)
      except OtherState:
        raise
      except Exception as error:
        reason = _unreadable(folder)
        if reason and attempt >= retries:
          raise Unreadable(reason) from error
        wrong += not reason
        if wrong == tries:
          raise
        time.sleep(self._pause(attempt) if reason else 0)

  def _restore_step(self, step: int, abstract_state: TrainState) -> TrainState:
    with _quiet():
      item = ocp.args.Composite(meta=ocp.args.JsonRestore())
      meta = self._manager.restore(step, args=item).meta
    expected = meta["checksums"]
    guard = abstract_state.guard
    if not any(name.startswith("guard/") for name in expected):
      guard = ()
    elif not guard:
      guard = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=abstract_state.step.sharding),
        new_guard(),
      )
    asked = abstract_state._replace(guard=guard)
    self._check_same(step, meta.get("arrays") or dict.fromkeys(expected), _arrays(asked))
    item = ocp.args.Composite(state=ocp.args.StandardRestore(_saved(asked)))
    with _quiet():
      state = asked._replace(**self._manager.restore(step, args=item).state)
    got = checksum_table(state)
    wrong = [name for name in got if got[name] != expected.get(name)]
    if wrong or expected.keys() - got.keys():
      names = ", ".join((wrong or sorted(expected.keys() - got.keys()))[:3])
      raise CheckpointError(f"the checksum of {names} is not the one saved")
    return state if abstract_state.guard else state._replace(guard=())

  def _check_same(self, step: int, there: dict[str, Any], asked: dict[str, str]) -> None:
    """Raises OtherState, which names up to three arrays, unless both are the same."""
    told = [f"{n} is only in the checkpoint" for n in sorted(there.keys() - asked.keys())]
    told += [f"{n} is not in the checkpoint" for n in sorted(asked.keys() - there.keys())]
    both = [n for n in asked if n in there and there[n] and there[n] != asked[n]]
    told += [f"{n} is {there[n]} in the checkpoint and {asked[n]} here" for n in both]
    if told:
      more = f" and {len(told) - 3} more" if len(told) > 3 else ""
      raise OtherState(
        f"the checkpoint of step {step} in {self.folder} is of another state than this config "
        f"makes: {'; '.join(told[:3])}{more}. All is left as it is: undo the change of the "
        "config, or start with another --workdir"
      )

  def _set_aside(self, step: int) -> None:
    if self._read_only:
      return
    target = self.folder.parent / "damaged" / str(step)

    def move() -> None:
      target.parent.mkdir(exist_ok=True)
      shutil.rmtree(target, ignore_errors=True)
      shutil.move(self.folder / str(step), target)

    processes.first_does(move)
    self._reopen()


def _saved(state: TrainState) -> dict[str, Any]:
  """The fields of a state, but for an empty guard: checkpoints that are older have none."""
  return {k: v for k, v in state._asdict().items() if k != "guard" or v}


def _arrays(state: TrainState) -> dict[str, str]:
  """{name: "float32[64, 32]"}, of shapes or arrays."""
  return {name: f"{x.dtype}{list(x.shape)}" for name, x in named_leaves(state)}


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]


def _unreadable(folder: Path, *, whole: bool = True) -> str:
  """Why a file, or its first byte, cannot be read, as far as the file system is to blame."""

  def refuse(error: OSError) -> None:
    raise error

  try:
    for place, _, names in os.walk(folder, onerror=refuse):
      for name in names:
        with Path(place, name).open("rb") as file:
          while file.read(2**24 if whole else 1) and whole:
            pass
  except OSError as error:
    return str(error)
  return ""


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
