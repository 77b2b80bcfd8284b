"""Batches of annotated pictures (`dense.py`): shuffled for training, each once for evaluation."""

from __future__ import annotations

import concurrent.futures

import numpy as np

from ssrl_jax.data.batches import Batch, Batches, Damage, damage_of
from ssrl_jax.data.decode import DamagedImage, decode
from ssrl_jax.data.dense import DenseSource
from ssrl_jax.data.pipeline import (
  PADDING,
  check_at_least,
  each_once,
  epochs_and_ids,
  local_batch_size,
  share,
)


def train_batches(
  source: DenseSource,
  *,
  seed: int,
  batch_size: int,
  start_step: int = 0,
  canvas: int,
  workers: int = 0,
  threads: int = 1,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Endless batches of this process, in an order that is a pure function of (seed, step).

  As `pipeline.train_batches`: shuffled anew each epoch, of which the uneven rest is left out. A
  picture that cannot be read has weight 0, and so has its annotation no part in a loss.

  Returns:
    An iterator of {"image": uint8 [b, S, S, 3], "extent": int32 [b, 2], "id": int64 [b], "weight":
    float32 [b], "substituted": bool [b]} and what the source adds; see there.
  """
  local_batch_size(batch_size, process_index, process_count)  # for what it refuses
  check_at_least(0, seed=seed, start_step=start_step, workers=workers)
  drawn = epochs_and_ids(source, seed, batch_size)
  ids = share(drawn, batch_size, process_index, process_count).map(lambda both: both[1])
  reader = _Reader(source, canvas, threads)
  return Batches(ids[start_step:], reader, reader, workers=workers)


def eval_batches(
  source: DenseSource,
  *,
  batch_size: int,
  canvas: int,
  workers: int = 0,
  threads: int = 1,
  process_index: int = 0,
  process_count: int = 1,
  limit: int | None = None,
) -> Batches:
  """All examples once, in the source's order; what fills the last batch has weight 0 and id -1.

  Args:
    limit: only so many of them, spread evenly over the source.
  """
  check_at_least(0, workers=workers)
  reader = _Reader(source, canvas, threads)
  ids = each_once(len(source), batch_size, process_index, process_count, limit)
  return Batches(ids, reader, reader, workers=workers)


class _Reader:
  """Ids -> a batch. Goes to worker processes, where it starts threads of its own."""

  def __init__(self, source: DenseSource, canvas: int, threads: int):
    check_at_least(1, canvas=canvas, threads=threads)
    self.source, self._canvas, self._threads = source, canvas, threads
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None

  def __getstate__(self):
    return self.__dict__ | {"_pool": None}

  def close(self) -> None:
    if self._pool:
      self._pool.shutdown(cancel_futures=True)

  def damage(self, i: int) -> Damage:
    path = self.source.paths[i]
    try:
      decode(path, canvas=self._canvas)
    except DamagedImage as e:
      return damage_of(path, f"{e} (counts nothing)")
    return damage_of(path, "could not be read at first, and now can")

  def __call__(self, ids: np.ndarray) -> Batch:
    n, side = len(ids), self._canvas
    batch = {
      "image": np.zeros((n, side, side, 3), np.uint8),
      "extent": np.full((n, 2), side, np.int32),
      "id": np.asarray(ids, np.int64),
      "weight": np.zeros(n, np.float32),
      "substituted": np.zeros(n, bool),
    } | self.source.blank(n, side)
    places = [j for j in range(n) if ids[j] != PADDING]
    if self._threads == 1:
      for j in places:
        self._put(batch, j)
      return batch
    if self._pool is None:
      self._pool = concurrent.futures.ThreadPoolExecutor(self._threads)
    list(self._pool.map(lambda j: self._put(batch, j), places))
    return batch

  def _put(self, batch: Batch, j: int) -> None:
    i = int(batch["id"][j])
    try:
      batch["image"][j], batch["extent"][j] = decode(self.source.paths[i], canvas=self._canvas)
    except DamagedImage:
      batch["substituted"][j] = True
      return
    batch["weight"][j] = 1
    self.source.annotate(batch, j, i)
