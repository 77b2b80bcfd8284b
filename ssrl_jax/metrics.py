"""Health of a representation, computed inside the step; and where the figures of a run are kept."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ssrl_jax.files import write_whole
from ssrl_jax.method import Array, normalise


def health(
  embeddings_BP: Array, targets_BP: Array | None, *, unit_variance: bool = False
) -> dict[str, Array]:
  """Figures that show collapse long before the loss does.

  Returns:
    health/std: standard deviation of the unit-length embeddings over the batch, averaged over
      dimensions, times sqrt(P): 1 when they fill the sphere evenly, 0 when all are the same.
    health/raw_std: standard deviation of the embeddings as they are, root mean square over
      dimensions; only for a loss that asks for 1 (`unit_variance`).
    health/cosine: mean |cosine| between different images: 1 when all are parallel.
    health/rank: effective dimensions as the participation ratio (sum e)^2 / sum e^2 of the
      covariance's eigenvalues e, in [1, P], or 0 when nothing varies; it needs one matrix product,
      no decomposition.
    health/target_distance: mean 2 - 2 cos to the target, in [0, 4]; only where there is one.
  """
  z_BP = normalise(embeddings_BP)
  b, p = z_BP.shape
  centred_BP = z_BP - jnp.mean(z_BP, axis=0, keepdims=True)
  var_P = jnp.mean(centred_BP**2, axis=0)
  few_BP = z_BP[:512]
  cosine_BB = jnp.abs(few_BP @ few_BP.T)
  n = few_BP.shape[0]
  cov = centred_BP.T @ centred_BP / b if p <= b else centred_BP @ centred_BP.T / b
  figures = {
    "health/std": jnp.mean(jnp.sqrt(var_P)) * math.sqrt(p),
    "health/cosine": (jnp.sum(cosine_BB) - jnp.trace(cosine_BB)) / max(n * (n - 1), 1),
    "health/rank": jnp.trace(cov) ** 2 / (jnp.sum(cov**2) + 1e-12),
  }
  if unit_variance:
    raw_BP = embeddings_BP.astype(jnp.float32)
    figures["health/raw_std"] = jnp.sqrt(jnp.mean(jnp.var(raw_BP, axis=0)))
  if targets_BP is not None:
    cosine_B = jnp.sum(z_BP * normalise(targets_BP), axis=-1)
    figures["health/target_distance"] = jnp.mean(2 - 2 * cosine_B)
  return figures


def first_non_finite(tree: Any) -> Array:
  """int32: index, in the tree's order, of the first array with a NaN or infinity; -1 if none.

  Also one whose sum of squares overflows float32 (values beyond 1e19): the sums are those that
  `global_norm` needs anyway, so looking costs nothing more.
  """
  bad = jnp.stack([~jnp.isfinite(sum_squares(x)) for x in jax.tree.leaves(tree)])
  return jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)


def sum_squares(x: Array) -> Array:
  return jnp.sum(jnp.square(x.astype(jnp.float32)))


def global_norm(tree: Any) -> Array:
  """Length of all arrays of a tree as one vector."""
  return jnp.sqrt(sum(sum_squares(x) for x in jax.tree.leaves(tree)))


def collapse(figures: dict[str, float], num_dimensions: int) -> str | None:
  """The name of the collapse that the health figures show, or None.

  complete: every image has the same embedding, or its opposite, or, where the loss asks for a
  variance of 1, they have shrunk to a point. dimensional: fewer than 2 effective dimensions of 8 or
  more carry anything.
  """
  if figures.get("health/raw_std", 1.0) < 0.1:
    return (
      "complete collapse: the embeddings have shrunk to a point (their standard deviation is "
      f"{figures['health/raw_std']:.3f}, where the loss asks for 1)"
    )
  if figures["health/std"] < 0.05 or figures["health/cosine"] > 0.99:
    return (
      "complete collapse: all embeddings are nearly the same or opposite (std "
      f"{figures['health/std']:.3f} of 1, mean |cosine| {figures['health/cosine']:.3f})"
    )
  if num_dimensions >= 8 and figures["health/rank"] < 2:
    return (
      f"dimensional collapse: only {figures['health/rank']:.1f} of {num_dimensions} dimensions of "
      "the embedding are in use"
    )
  return None


class Writer:
  """metrics.jsonl (one JSON object a line) and TensorBoard events of one run's folder.

  On resume at `step`, lines after it are dropped: each figure of a step stands there once, whatever
  happened. What was evaluated at a step is a line of its own.
  Only one process may have `writes`.
  """

  def __init__(self, workdir: str | Path, *, step: int, tensorboard: bool, writes: bool = True):
    self._file = self._board = None
    if not writes:
      return
    self._path = Path(workdir) / "metrics.jsonl"
    kept = [r for r in read_metrics(workdir) if r["step"] <= step]
    write_whole(self._path, "".join(json.dumps(r) + "\n" for r in kept))
    self._file = self._path.open("a")
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

  def write(self, step: int, figures: dict[str, float]) -> None:
    if self._file:
      self._write_line(json.dumps({"step": step, **figures}))
    if self._board:
      for name, value in figures.items():
        self._board.add_scalar(name, value, step)

  def _write_line(self, line: str) -> None:
    try:
      self._file.write(line + "\n")
      self._file.flush()
    except OSError as error:
      raise OSError(
        f"could not write {self._path} ({error.strerror}); put that right (a full disk: make room) "
        "and the same command goes on from the newest checkpoint"
      ) from error

  def close(self) -> None:
    with contextlib.suppress(OSError):  # of a line that could not be written
      if self._file:
        self._file.close()
    if self._board:
      self._board.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
  """The lines of metrics.jsonl; a last line that a kill cut short is left out.

  Raises:
    ValueError: another line is damaged, which no kill does.
  """
  path = Path(workdir) / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  records = []
  for number, line in enumerate(lines, start=1):
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number < len(lines):
        raise ValueError(f"{path}, line {number} is damaged ({error}); remove that line") from error
  return records
