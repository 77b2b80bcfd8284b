"""Bad steps: a NaN or infinity anywhere, or a loss far above those before it.

What is bad is found inside the compiled step. There, `guard.on_bad_step` = "skip" lets the state go
on as it was, so that no value has to reach the host first. One step later the host keeps the batch
in WORKDIR/bad_steps/STEP.npz, for `python -m ssrl_jax.replay`, and stops the run or counts.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ssrl_jax import parallel
from ssrl_jax.data.sampling import position
from ssrl_jax.files import whole, write_json
from ssrl_jax.method import Array
from ssrl_jax.metrics import collapse

WINDOW = 100  # updates over which mean and variance of the loss are taken, nearly
SETTLED = 20  # updates before the first that can be a spike
SPIKE = "spike of the loss"  # its name beside those of the tensors


def check_options(*, on_bad_step: str, spike: float, patience: int, keep: int) -> None:
  if on_bad_step not in ("stop", "skip"):
    raise ValueError(f"guard.on_bad_step is {on_bad_step!r}; expected 'stop' or 'skip'")
  if spike < 0 or patience < 1 or keep < 0:
    raise ValueError(
      f"guard.spike {spike} and guard.keep {keep} must be >= 0, guard.patience {patience} >= 1"
    )


def init_guard(options: ConfigDict) -> Any:
  """What is carried from step to step, so that a resumed run judges alike; () where nothing is."""
  return () if options.on_bad_step == "stop" and not options.spike else new_guard()


def new_guard() -> dict[str, Array]:
  """Before the first step."""
  real, whole = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
  return {"mean": real, "variance": real, "good": whole, "skipped": whole, "in_a_row": whole}


def judge(guard: dict[str, Array], loss: Array, bad: Array, *, spike: float, name: int) -> tuple:
  """One update's verdict.

  Args:
    guard: `init_guard`'s, after the update before.
    bad: index of the first tensor that is not finite, -1 if all are.
    spike: standard deviations above the mean of the good updates' losses; 0: any loss is good.
    name: the index that stands for a spike.

  Returns:
    `bad`, or `name` for a spike; and `guard` after it.
  """
  gap = loss - guard["mean"]
  if spike:
    high = (guard["good"] >= SETTLED) & (gap > spike * jnp.sqrt(guard["variance"]))
    bad = jnp.where((bad < 0) & high, name, bad)
  good = bad < 0
  share = jnp.maximum(1 / (guard["good"] + 1), 1 / WINDOW)  # an average first, then a moving one
  after = {
    "mean": guard["mean"] + share * gap,
    "variance": (1 - share) * (guard["variance"] + share * gap**2),
    "good": guard["good"] + 1,
  }
  after = {k: jnp.where(good, v, guard[k]) for k, v in after.items()}
  in_a_row = jnp.where(good, 0, guard["in_a_row"] + 1)
  return bad, after | {"skipped": guard["skipped"] + ~good, "in_a_row": in_a_row}


def unless(bad: Array, new: Any, old: Any) -> Any:
  """`new`, or where the update is bad `old` but for what counts: step, substitutes, guard."""
  moved = ("params", "method_state", "opt_state", "probe")
  kept = jax.tree.map(
    lambda n, o: jnp.where(bad, o, n), *({k: getattr(s, k) for k in moved} for s in (new, old))
  )
  return new._replace(**kept)


class Guard:
  """What is checked of every step's metrics, one step late: good, and not collapsed.

  Args:
    options: the config group `guard`.
    total_steps: of the run.
    watched: names of what `first_bad` indexes; dimensions of the embeddings judged for health.
    writes: whether this is process 0.
  """

  PATIENCE = 3  # log lines in a row that show a collapse

  def __init__(
    self,
    options: ConfigDict,
    workdir: Path,
    *,
    total_steps: int,
    watched: tuple[list[str], int],
    writes: bool,
  ):
    self._options, self._workdir, self._writes = options, workdir, writes
    self._names, self._num_dimensions = watched
    self._quiet_until = max(50, total_steps // 10)
    self._collapsed = 0

  def check(self, step: int, metrics: dict[str, float], batch: Callable[[], dict]) -> bool:
    """Whether the update that made `step` was good; `batch` is what it was given.

    Raises:
      FloatingPointError: it was not, and the run is to stop at it.
    """
    index = int(metrics["first_bad"])
    if index < 0:
      return True
    name, loss, arrays = self._names[index], metrics["loss"], batch()
    file = self._workdir / "bad_steps" / f"{step}.npz"
    if self._writes:
      write_bad_step(file, arrays, step=step, first_bad=name, loss=loss, keep=self._options.keep)
    ids = position(parallel.all_processes(arrays["id"])).tolist()
    what = (
      f"step {step}: {name} ({loss:.4g})" if name == SPIKE
      else f"step {step}: NaN or infinity, first in {name!r} (loss {loss:.4g})"
    )  # fmt: skip
    again = f"`python -m ssrl_jax.replay --workdir={self._workdir} --step={step}` makes it again"
    in_a_row = metrics.get("guard/in_a_row", 0)
    if self._options.on_bad_step == "skip" and in_a_row < self._options.patience:
      logging.warning("%s; this update is skipped. %s", what, again)
      return False
    if self._writes:
      record = {"step": step, "first_bad_tensor": name, "ids": ids}
      try:
        write_json(self._workdir / "non_finite.json", record)
      except OSError as error:  # which must not hide what follows
        logging.warning("%s: %s", self._workdir / "non_finite.json", error)
    count = f" for the {in_a_row:.0f}th time in a row (guard.patience)" if in_a_row else ""
    raise FloatingPointError(
      f"{what}{count}; images {ids[:8]}{' ...' if len(ids) > 8 else ''}, all of them in "
      f"{self._workdir / 'non_finite.json'}; {again}. Nothing of this step was saved: lower "
      "optim.learning_rate or set optim.clip_norm or guard.on_bad_step=skip, and run again with "
      "--allow_config_change"
    )

  def check_collapse(self, step: int, metrics: dict[str, float]) -> None:
    name = collapse(metrics, self._num_dimensions) if step >= self._quiet_until else None
    self._collapsed = self._collapsed + 1 if name else 0
    if self._collapsed == self.PATIENCE:
      logging.warning("step %d: %s", step, name)


def write_bad_step(
  file: Path, batch: dict[str, np.ndarray], *, step: int, first_bad: str, loss: float, keep: int
) -> None:
  """The batch and what became of it; of all such files only the `keep` newest stay.

  A disk that does not take it is no reason to end a run.
  """
  if not keep:
    return
  try:
    file.parent.mkdir(exist_ok=True)
    with whole(file) as partial, partial.open("wb") as stream:
      np.savez(stream, **batch, step=step, first_bad=first_bad, loss=loss)
    for old in sorted(file.parent.glob("*.npz"), key=lambda f: int(f.stem))[:-keep]:
      old.unlink()
  except OSError as error:
    logging.warning("the batch of step %d could not be kept in %s: %s", step, file, error)


def read_bad_step(file: Path) -> dict[str, np.ndarray]:
  """What `write_bad_step` wrote. Nothing in it is executed: it is arrays, or refused.

  Raises:
    FileNotFoundError: there is none; those that there are.
    ValueError: it is damaged or holds something else.
  """
  if not file.exists():
    there = sorted(int(f.stem) for f in file.parent.glob("*.npz"))
    raise FileNotFoundError(f"no {file}; bad steps whose batch was kept: {there or 'none'}")
  try:
    with np.load(file, allow_pickle=False) as arrays:
      found = {k: arrays[k] for k in arrays.files}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"{file} is damaged or no batch of a bad step: {error}") from error
  missing = {"image", "extent", "label", "id", "substituted", "step", "first_bad"} - found.keys()
  if missing:
    raise ValueError(f"{file} is no batch of a bad step: it has no {min(missing)!r}")
  return found
