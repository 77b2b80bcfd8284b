"""Batches from reader workers: read ahead, started anew when they die, their errors in one line.

What Grain (0.2.18) leaves to its user: it waits for ever for a worker whose exception cannot be
pickled, ends the run with the first worker that the system kills, and its workers outlive a parent
that was killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags, logging

from ssrl_jax.data.memory import Recycled
from ssrl_jax.data.sampling import position

Batch = dict[str, np.ndarray]

MAX_DEATHS = 3  # of reader workers, without a batch in between: then it is no accident


class ReadError(ValueError):
  """What a source or a reader raised, in one line; also the end of workers that die again."""


class Damage(NamedTuple):
  """Why an example cannot be read."""

  path: str  # of the file; empty where the picture is not a file of its own
  reason: str

  def __str__(self) -> str:
    return f"{self.path}: {self.reason}" if self.path else self.reason


def damage_of(picture: Any, reason: str) -> Damage:
  path = os.fspath(picture) if isinstance(picture, str | os.PathLike) else ""
  return Damage(path, reason.removeprefix(f"{path}: "))


class Batches(Iterator[Batch]):
  """Host batches; names each damaged picture once, and `close()` ends threads and workers.

  Workers that die, as when the system runs out of memory, are reported and started anew at the
  batch that is due; MAX_DEATHS times without a batch in between is a ReadError.

  Args:
    ids: what `read` is given for each batch.
    read: makes a batch, and goes to the workers.
    reader: whose `read` it is; asked for its `source` and each `damage`, and closed.
    workers: reader processes; 0: read in this one.
  """

  def __init__(self, ids: grain.MapDataset, read: Callable, reader: Any, *, workers: int = 0):
    self._ids, self._read, self._reader, self._workers = ids, read, reader, workers
    self._done, self._deaths = 0, 0
    self._damages: dict[int, Damage] = {}
    self._batches: grain.DatasetIterator | None = self._start()

  def __next__(self) -> Batch:
    if self._batches is None:
      raise StopIteration
    batch = self._next()
    self._done, self._deaths = self._done + 1, 0
    for i in position(batch["id"][batch["substituted"]]).tolist():
      self.damage(i)
    return batch

  def damage(self, i: int) -> Damage:
    """Why example `i` cannot be read; it is warned of once, however many read the source."""
    if i not in self._damages:
      self._damages[i] = self._reader.damage(i)
      _warn_once(f"example {i} of {self._reader.source!r} is damaged: {self._damages[i]}")
    return self._damages[i]

  def close(self) -> None:
    if self._batches is not None:
      self._batches.close()
      self._reader.close()
    self._batches = None  # now, since Grain's iterators complain when they are collected at exit

  def _start(self) -> grain.DatasetIterator:
    read = functools.partial(_read_or_tell, self._read)
    return iter(_prefetched(self._ids.map(read)[self._done :], self._workers))

  def _next(self) -> Batch:
    while True:
      try:
        return next(self._batches)
      except RuntimeError as error:  # Grain's, for a worker that ended; a reader's is a ReadError
        self._deaths += 1
        what = f"a reader died: {str(error).split('. ')[0]}"
        if self._deaths == MAX_DEATHS:
          ids = self._ids[self._done]
          ids = position(ids[1] if isinstance(ids, tuple) else ids)[:8].tolist()
          raise ReadError(
            f"{what}, {MAX_DEATHS} times over the same batch: examples {ids} and on. "
            "Exit code -9 is mostly a lack of memory (lower data.workers, data.threads), -7 a full "
            "/dev/shm, -11 and -6 a picture that the decoder cannot bear (find and remove it)"
          ) from error
        logging.warning("%s; started anew, which changes no batch", what)
        self._batches.close()
        self._batches = self._start()


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning("%s", message)


def _read_or_tell(read: Callable[[Any], Batch], ids: Any) -> Batch:
  """read(ids); what it raises becomes a ReadError of text alone.

  Grain waits for ever for a worker whose exception cannot be pickled.
  """
  try:
    return read(ids)
  except Exception as error:
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    raise ReadError(" ".join(message.split())) from error


def _prefetched(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
  """Reads ahead: batches are whole already, so more than a few would only cost memory."""
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  dataset = batches.to_iter_dataset(options)
  if not workers:
    return dataset
  if not flags.FLAGS.is_parsed():  # Grain asks absl for flags, which only absl's own main parses
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers=workers)
  dataset = dataset.mp_prefetch(options, worker_init_fn=_depend_on_parent).map(
    functools.partial(_owned, Recycled())
  )
  return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)


def _owned(memory: Recycled, batch: Batch) -> Batch:
  """Workers send arrays in shared memory that is unmapped with the array, even if views remain."""
  return {k: memory.copy(v) for k, v in batch.items()}


def _depend_on_parent(worker: int, num_workers: int) -> None:
  """Ends a worker whose parent was killed, and would stay for ever; leaves Ctrl-C to the parent."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def wait() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
