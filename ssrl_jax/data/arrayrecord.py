"""Sets that `ssrl_jax.data.prepare` wrote: sharded ArrayRecord with an index.

PATH/SPLIT/ holds 00000-of-00008.arrayrecord ..., index.npz (label, source position and size of each
record) and manifest.json. A record is a msgpack map: "name" bytes, "label" int, "pictures" [bytes],
and "clip", whether they are the frames of a clip.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from ssrl_jax.data.decode import DamagedImage
from ssrl_jax.data.listing import describe, find_shards, locate

ENDING = ".arrayrecord"
MANIFEST, INDEX = "manifest.json", "index.npz"


def encode_record(name: str, label: int, pictures: list[bytes], clip: bool) -> bytes:
  record = {"name": os.fsencode(name), "label": label, "pictures": pictures, "clip": clip}
  return msgpack.packb(record)


class ArrayRecordSource:
  """The records of a prepared folder, or of the shards that match a pattern, in their order.

  A record that cannot be read is a DamagedImage: ArrayRecord has checksums.
  """

  def __init__(self, path: str, *, split: str):
    self._where = f"arrayrecord:{os.path.abspath(os.path.expanduser(path))}"
    self._shards, _ = find_shards(
      path, kind="arrayrecord", split=split, endings=(ENDING,), by_folder=True
    )
    folders = dict.fromkeys(os.path.dirname(shard) for shard in self._shards)
    labels, classes = {}, {}
    for folder in folders:
      manifest, of_shard = _read_index(folder)
      labels |= of_shard
      classes[manifest["num_classes"], tuple(manifest["class_names"])] = folder
    if len(classes) > 1:
      raise ValueError(f"{' and '.join(classes.values())} have different classes; open one of them")
    missing = labels.keys() - set(self._shards)
    if missing and os.path.isdir(os.path.expanduser(path)):
      raise FileNotFoundError(f"the shard {min(missing)} is not there; run prepare anew")
    foreign = set(self._shards) - labels.keys()
    if foreign:
      raise ValueError(f"{min(foreign)} is no shard of the set beside it; move it elsewhere")
    ((self.num_classes, self.class_names),) = classes
    self.labels = np.concatenate([labels[shard] for shard in self._shards])
    self._ends = np.cumsum([len(labels[shard]) for shard in self._shards])
    self._split = split
    self.__setstate__(self.__dict__)

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_readers": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ |= state | {"_readers": {}, "_lock": threading.Lock()}

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._example(i, self._record(i))

  def read_together(self, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    return {i: self._example(i, r) for i, r in zip(positions, self._read(np.asarray(positions)))}

  def _example(self, i: int, record: dict[str, Any]) -> dict[str, Any]:
    pictures = record["pictures"]
    example = {"image": pictures[len(pictures) // 2], "label": int(self.labels[i])}
    return example | {"frames": tuple(pictures)} if record["clip"] else example

  def name(self, i: int) -> str:
    """What the example was called where it came from; of one that cannot be read, its place."""
    try:
      return os.fsdecode(self._record(i)["name"])
    except DamagedImage:
      shard, at = locate(self._ends, i)
      return f"{self._shards[shard]}, record {at}"

  def _record(self, i: int) -> dict[str, Any]:
    (record,) = self._read(np.array([i]))
    return record

  def _read(self, position_N: np.ndarray) -> list[dict[str, Any]]:
    """Records, those of a shard in one call: one by one would cost more than small pictures do."""
    shard_N, at_N = locate(self._ends, position_N)
    records: dict[int, dict[str, Any]] = {}
    for k in np.unique(shard_N).tolist():
      mine = np.flatnonzero(shard_N == k)
      try:
        for j, record in zip(mine.tolist(), self._reader(k).read(at_N[mine].tolist())):
          records[j] = msgpack.unpackb(record)
      except Exception as error:  # RuntimeError, ValueError or what msgpack raises on other bytes
        which = f"record {at_N[mine][0]}" if len(mine) == 1 else "one of several records"
        raise DamagedImage(f"{self._shards[k]}, {which}: {error}") from error
    return [records[j] for j in range(len(position_N))]

  def _reader(self, k: int) -> ArrayRecordReader:
    with self._lock:  # opened in the process that reads
      if k not in self._readers:
        self._readers[k] = ArrayRecordReader(self._shards[k], options="readahead_buffer_size:0")
      return self._readers[k]

  def __repr__(self) -> str:
    return f"ArrayRecordSource({self._where!r}, split={self._split!r}, {describe(self)})"


def _read_index(folder: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The manifest, and the labels of each shard."""
  try:
    with open(os.path.join(folder, MANIFEST)) as file:
      manifest = json.load(file)
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{folder} has no {MANIFEST}: it was not written by python -m ssrl_jax.data.prepare, or not "
      "to the end; run that again (sets of TFDS are read with tfds:NAME)"
    ) from None
  with np.load(os.path.join(folder, INDEX), allow_pickle=False) as index:
    labels = index["label"]
  shards = manifest["shards"]
  if len(labels) != sum(shard["examples"] for shard in shards):
    raise ValueError(f"{INDEX} and {MANIFEST} of {folder} do not match; run prepare anew")
  parts = np.split(labels, np.cumsum([shard["examples"] for shard in shards])[:-1])
  return manifest, {os.path.join(folder, s["file"]): part for s, part in zip(shards, parts)}
