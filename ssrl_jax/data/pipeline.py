"""Order, batches, and this process's share of them.

The order of training is a pure function of (seed, step), made on ids only: shuffled anew each
epoch, cut to whole global batches, repeated, and each batch cut by process last. So the step is the
whole data state, and neither the number of processes nor of workers changes which examples a step
sees. What is read and decoded for an id happens after all that. Grain shuffles where each example
comes once an epoch, `sampling.EpochOrder` draws where some come more often.

An id is an example's position in the source. The second and further copies that an epoch has of an
example count in the bits from `sampling.COPY_BIT` on, so that copies get views of their own;
`sampling.position` undoes that wherever an example is named.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ssrl_jax.data.batches import Batch, Batches, Damage, damage_of
from ssrl_jax.data.decode import DamagedImage, Picture, decode_onto, name_of
from ssrl_jax.data.memory import Recycled
from ssrl_jax.data.sampling import EpochOrder, Sampling, draw_frames, position
from ssrl_jax.data.sources import Source, check_frames, read_together

Example = dict[str, Any]  # what a source gives
ChooseFrames = Callable[[int], np.ndarray]  # number of a clip's frames -> those to show

MAX_DAMAGED = 100  # so many unreadable pictures in a row mean that the set, not a file, is broken
PADDING = -1  # the id of what fills the last batch of an evaluation


def train_batches(
  source: Source,
  *,
  seed: int,
  batch_size: int,
  start_step: int,
  canvas: int,
  workers: int = 0,
  threads: int = 1,
  process_index: int = 0,
  process_count: int = 1,
  sampling: Sampling | None = None,
  frames: int = 1,
  frame_span: int = 0,
  resident: np.ndarray | None = None,
) -> Batches:
  """Endless batches of this process, the first being that of the update after `start_step`.

  A picture that cannot be read is replaced, label included, by the next one of the source that
  can, and that `sampling` draws; never left out, which would move everything behind it.

  Args:
    source: pictures by position.
    seed: of the order, which differs in each epoch.
    batch_size: of all processes together, B; this one gets b = B / process_count of them that lie
      side by side: so the devices have the same examples, whichever processes they belong to.
    start_step: updates done, from the very first epoch on.
    canvas: side S in pixels; see `decode`.
    workers: reader processes; 0: read in this one, one batch ahead.
    threads: that decode a batch, in each reader process.
    process_index: which of `process_count` this is.
    process_count: processes that share the global batch.
    sampling: how often each example is drawn in an epoch of len(source) draws; None: once.
    frames: F, drawn anew in each epoch of each clip; for still pictures 1.
    frame_span: from a random window of so many of the clip's frames; 0: from all.
    resident: bool [N], which examples are substituted, where the pictures are on the devices
      already (data/resident.py): nothing is read, and batches have only "id" and "substituted".

  Returns:
    An iterator of {"image": uint8 [b, S, S, 3], or [b, F, S, S, 3] with more than one frame,
    "extent": int32 [b, 2], "label": int32 [b], "id": int64 [b], "substituted": bool [b]}; id is
    that of the drawn example, also where another had to stand in. Its next() raises ValueError for
    a label that the source cannot have, and when MAX_DAMAGED pictures in a row cannot be read.
  """
  local_batch_size(batch_size, process_index, process_count)  # for what it refuses
  check_at_least(0, seed=seed, start_step=start_step, workers=workers)
  check_frames(source, frames, frame_span)
  drawn = epochs_and_ids(source, seed, batch_size, sampling)
  drawn = share(drawn, batch_size, process_index, process_count)
  reader = _Reader(
    source, canvas, threads, seed=seed, frames=frames, frame_span=frame_span, sampling=sampling
  )
  if resident is not None:
    return Batches(drawn[start_step:], functools.partial(_known, resident), reader)
  return Batches(drawn[start_step:], reader.train, reader, workers=workers)


def _known(substituted: np.ndarray, epochs_and_ids: tuple[np.ndarray, np.ndarray]) -> Batch:
  _, ids = epochs_and_ids
  return {"id": ids, "substituted": substituted[position(ids)]}


def each_as_trained(
  source: Source,
  *,
  canvas: int,
  workers: int,
  threads: int,
  sampling: Sampling | None,
  batch_size: int = 256,
) -> Iterator[Batch]:
  """Every still picture once, in the order of the source, as training sees it: with substitutes."""
  reader, n = _Reader(source, canvas, threads, sampling=sampling), len(source)
  ids = grain.MapDataset.range(-(-n // batch_size)).map(
    lambda k: np.arange(k * batch_size, min(n, (k + 1) * batch_size))
  )
  batches = Batches(ids, lambda i: reader.train((np.zeros_like(i), i)), reader, workers=workers)
  try:
    yield from batches
  finally:
    batches.close()


def epochs_and_ids(
  source: Any, seed: int, batch_size: int, sampling: Sampling | None = None
) -> grain.MapDataset:
  """The endless global stream of (epoch, id), whole batches an epoch."""
  n = len(source)
  if n < batch_size:
    raise ValueError(
      f"{source!r} has {n} examples, fewer than one batch of {batch_size}; lower batch_size to at "
      f"most {n}"
    )
  whole = n // batch_size * batch_size
  if sampling is None:
    ids = grain.MapDataset.range(n).seed(seed).shuffle()[:whole].repeat(None)
    return ids.map_with_index(lambda at, i: (at // whole, i))
  order = EpochOrder(sampling, seed)
  places = grain.MapDataset.range(whole).repeat(None)
  return places.map_with_index(lambda at, k: (at // whole, order(at // whole, k)))


def share(
  drawn: grain.MapDataset, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
  """This process's part of each batch of the endless stream: int64 [b] epochs, int64 [b] ids."""
  size = local_batch_size(batch_size, process_index, process_count)

  def part(k, _):
    start = k * batch_size + process_index * size
    epochs, ids = zip(*(drawn[at] for at in range(start, start + size)))
    return np.array(epochs, np.int64), np.array(ids, np.int64)

  return grain.MapDataset.range(1).repeat(None).map_with_index(part)


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  canvas: int,
  process_index: int = 0,
  process_count: int = 1,
  limit: int | None = None,
  workers: int = 0,
  threads: int = 1,
) -> Batches:
  """All examples once, in the order of the source; the same number of batches in every process.

  As `train_batches`, but process p has the p-th run of b consecutive examples of each global batch,
  and batches have one key more, "weight" float32 [b]: 1 for a picture; 0 for one that cannot be
  read (black, `substituted` set) and for what fills the last batch (black, id and label -1).

  Args:
    source: as for `train_batches`, and so is what is not named here.
    limit: only this many examples, spread evenly over the source, which may be sorted by class.
  """
  check_at_least(0, workers=workers)
  reader = _Reader(source, canvas, threads)
  ids = each_once(len(source), batch_size, process_index, process_count, limit)
  return Batches(ids, reader.evaluate, reader, workers=workers)


def each_once(
  n: int, batch_size: int, process_index: int, process_count: int, limit: int | None
) -> grain.MapDataset:
  """The ids of this process's share of each batch, PADDING where the examples have ended."""
  local_size = local_batch_size(batch_size, process_index, process_count)
  if limit is not None:
    check_at_least(1, limit=limit)
  count = min(n, limit or n)
  num_batches = -(-count // batch_size)
  positions = np.full(num_batches * batch_size, PADDING, np.int64)
  positions[:count] = np.arange(count) * n // count
  mine = positions.reshape(num_batches, process_count, local_size)[:, process_index]
  return grain.MapDataset.range(num_batches).map(mine.__getitem__)


def local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
  check_at_least(1, batch_size=batch_size, process_count=process_count)
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index {process_index} is not below process_count {process_count}")
  if batch_size % process_count:
    below, above = (batch_size // process_count + k for k in (0, 1))
    nearest = f"{max(below, 1) * process_count} or {above * process_count}"
    raise ValueError(
      f"batch_size {batch_size} is not divisible by {process_count} processes; nearest: {nearest}"
    )
  return batch_size // process_count


def check_at_least(least: int, **values: int) -> None:
  for name, value in values.items():
    if value < least:
      raise ValueError(f"{name} is {value}; expected at least {least}")


class _Reader:
  """Ids -> a batch. Goes to worker processes, where it starts threads of its own."""

  def __init__(
    self,
    source: Source,
    canvas: int,
    threads: int,
    *,
    seed: int = 0,
    frames: int = 1,
    frame_span: int = 0,
    sampling: Sampling | None = None,
  ):
    check_at_least(1, canvas=canvas, threads=threads)
    self.source, self._canvas, self._threads = source, canvas, threads
    self._drawn_N = None if sampling is None else sampling.weights > 0
    self._frames = frames
    self._draw_frames = functools.partial(draw_frames, count=frames, span=frame_span, seed=seed)
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._memory = Recycled()

  def __getstate__(self):
    return self.__dict__ | {"_pool": None, "_memory": Recycled()}

  def close(self) -> None:
    if self._pool:
      self._pool.shutdown(cancel_futures=True)

  def train(self, epochs_and_ids: tuple[np.ndarray, np.ndarray]) -> Batch:
    epochs, ids = epochs_and_ids
    shape = (self._frames,) if self._frames > 1 else ()
    return self._batch(ids, functools.partial(self._put_substitute, epochs), shape)

  def evaluate(self, ids: np.ndarray) -> Batch:
    batch = self._batch(ids, self._put_or_mark)
    batch["weight"] = ((ids != PADDING) & ~batch["substituted"]).astype(np.float32)
    return batch

  def damage(self, i: int) -> Damage:
    """Why example `i` is damaged: reads all of it again, for workers can only send arrays."""
    frame: Any = ""
    try:
      example = self.source[i]
      frames = example.get("frames", (example["image"],))
      for frame in frames:
        self._decode(np.empty((2, self._canvas, self._canvas, 3), np.uint8), (frames[0], frame))
    except DamagedImage as e:
      return damage_of(frame, str(e))
    return damage_of(example["image"], "could not be read at first, and now can")

  def _batch(self, ids, put, frames: tuple[int, ...] = ()) -> Batch:
    n, side = len(ids), self._canvas
    batch = {
      "image": self._memory.empty((n, *frames, side, side, 3)),  # all of it is written
      "extent": np.full((n, 2), side, np.int32),
      "label": np.full(n, -1, np.int32),
      "id": np.asarray(ids, np.int64),
      "substituted": np.zeros(n, bool),
    }
    put = functools.partial(put, batch, self._read_together(batch["id"]))
    if self._threads == 1:
      put(range(n))
      return batch
    if self._pool is None:
      self._pool = concurrent.futures.ThreadPoolExecutor(self._threads)
    # A few runs of places for each thread: one by one would cost more than small pictures do.
    runs = np.array_split(np.arange(n), min(n, 4 * self._threads))
    for done in [self._pool.submit(put, run.tolist()) for run in runs]:
      done.result()
    return batch

  def _read_together(self, ids: np.ndarray) -> dict[int, Example]:
    """{position: example} of those that the source reads faster at once."""
    try:
      return read_together(self.source, np.unique(position(ids[ids != PADDING])).tolist())
    except DamagedImage:  # which one, reading them by themselves will tell
      return {}

  def _put_substitute(self, epochs: np.ndarray, batch: Batch, read, places) -> None:
    for j in places:
      example_id = int(batch["id"][j])
      chosen = functools.partial(self._draw_frames, epoch=int(epochs[j]), example_id=example_id)
      first = int(position(example_id))
      for i in itertools.islice(self._from(first), MAX_DAMAGED):
        try:
          self._put(batch, j, i, read, chosen)
          break
        except DamagedImage as e:
          batch["substituted"][j], error = True, e
      else:
        raise ValueError(
          f"{MAX_DAMAGED} examples in a row, from {first} on, of {self.source!r} cannot be read; "
          f"repair the set; the last: {error}"
        )

  def _from(self, first: int) -> Iterator[int]:
    """Positions from `first` on, round and round, without those that are never drawn."""
    n = len(self.source)
    for i in itertools.count(first):
      if self._drawn_N is None or self._drawn_N[i % n]:
        yield i % n

  def _put_or_mark(self, batch: Batch, read, places) -> None:
    for j in places:
      i = int(batch["id"][j])
      if i == PADDING:
        batch["image"][j] = 0
        continue
      try:
        self._put(batch, j, i, read)
      except DamagedImage:
        batch["image"][j], batch["substituted"][j] = 0, True

  def _put(
    self,
    batch: Batch,
    j: int,
    i: int,
    read: dict[int, Example],
    chosen: ChooseFrames | None = None,
  ) -> None:
    """Example `i` to place `j`; of a clip the `chosen` frames, or the middle one."""
    example = read.get(i) or self.source[i]
    label, classes = example["label"], self.source.num_classes
    if label < -1 or (classes is not None and label >= classes):
      raise ValueError(
        f"example {i} of {self.source!r} has label {label}; expected 0 to num_classes - 1, or -1 "
        "for unknown; correct the source's labels or its num_classes"
      )
    pictures, canvases = [example["image"]], batch["image"][j]
    if chosen and "frames" in example:
      pictures = [example["frames"][k] for k in chosen(len(example["frames"]))]
    if canvases.ndim == 3:
      canvases = canvases[None]
    batch["extent"][j], batch["label"][j] = self._decode(canvases, pictures), label

  def _decode(self, canvases: np.ndarray, pictures: Sequence[Picture]) -> tuple[int, int]:
    """Pictures onto canvases uint8 [F, S, S, 3]; returns the extent that they share."""
    extents = [decode_onto(canvas, picture) for canvas, picture in zip(canvases, pictures)]
    for picture, extent in zip(pictures, extents):
      if extent != extents[0]:
        raise DamagedImage(
          f"{name_of(picture)}: {extent[0]}x{extent[1]} pixels on the canvas, and another frame of "
          f"its clip, {name_of(pictures[0])}, {extents[0][0]}x{extents[0][1]}"
        )
    return extents[0]
