"""Local Hugging Face image sets: folders of Parquet or Arrow files, read with pyarrow alone."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import threading
from typing import Any

import numpy as np

from ssrl_jax.data.decode import DamagedImage
from ssrl_jax.data.listing import choose_columns, describe, find_shards, locate, number_labels

# Parquet is read a row group at a time. So much of them is kept, hence a small set is read once; of
# a larger one every picture would cost a group in random order: prepare it.
KEPT_BYTES = 2**29


class HfSource:
  """The rows of a split: of save_to_disk's Arrow files (mapped into memory), or of Parquet files.

  Pictures and class names are found by the features in the schema's metadata. Without these the
  picture is the column "image" and a column "label" of whole numbers is the label.
  """

  def __init__(self, path: str, *, split: str):
    self._split, self._where = split, f"hf:{os.path.abspath(os.path.expanduser(path))}"
    if importlib.util.find_spec("pyarrow") is None:
      raise ValueError(f"{self._where} needs pyarrow: pip install -e '.[hf]'")
    found = find_shards(path, kind="hf", split=split, endings=(".parquet", ".arrow"))
    left = ("cache-", "indices-")  # by `map`, beside a saved set
    files, every = ([f for f in some if not os.path.basename(f).startswith(left)] for some in found)
    kinds = {(os.path.dirname(f), os.path.splitext(f)[1]) for f in files}
    if len(kinds) != 1:
      raise ValueError(
        f"{self._where} has rows of split {split!r} in {len(kinds)} places: "
        f"{', '.join(sorted(f'{folder}/*{ending}' for folder, ending in kinds))}; name one of them"
      )
    groups = [(f, k, n) for f in files for k, n in enumerate(_group_sizes(f))]
    self._groups = [(f, k) for f, k, _ in groups]
    self._ends = np.cumsum([n for _, _, n in groups])
    self._image, self._label, self.class_names = _columns(files[0], self._where)
    if not self._label:
      self.labels = np.full(self._ends[-1], -1, np.int32)
    elif self.class_names:
      self.labels = _read_labels(files, self._label).astype(np.int32)
    else:  # numbers, of which each split may lack some
      labelled = [f for f in every if f in files or self._label in _schema(f).names]
      known = np.unique(_read_labels(labelled, self._label)).tolist()
      own = _read_labels(files, self._label).tolist()
      self.class_names, self.labels = number_labels(list(map(str, own)), set(map(str, known)))
    self.num_classes = len(self.class_names) or None
    self.__setstate__(self.__dict__)

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_kept": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ |= state | {"_kept": collections.OrderedDict(), "_lock": threading.Lock()}

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict[str, Any]:
    k, row = locate(self._ends, i)
    with self._lock:
      column = self._column(k)
    picture = column[row].as_py()
    if isinstance(picture, dict):
      picture = picture["bytes"] or picture["path"]
    if not picture:
      raise DamagedImage(f"{self.name(i)} is empty")
    return {"image": picture, "label": int(self.labels[i])}

  def name(self, i: int) -> str:
    k, row = locate(self._ends, i)
    file, group = self._groups[k]
    return f"{os.path.basename(file)}, group {group}, row {row}"

  def _column(self, k: int) -> Any:
    """The pictures of group `k`, those used last being kept."""
    if k not in self._kept:
      column = _read(*self._groups[k], self._image)
      mapped = self._groups[k][0].endswith(".arrow")
      self._kept[k] = column, 0 if mapped else column.nbytes
      while len(self._kept) > 1 and sum(cost for _, cost in self._kept.values()) > KEPT_BYTES:
        self._kept.popitem(last=False)
    self._kept.move_to_end(k)
    return self._kept[k][0]

  def __repr__(self) -> str:
    return f"HfSource({self._where!r}, split={self._split!r}, {describe(self)})"


def _read_labels(files: list[str], column: str) -> np.ndarray:
  """Whole numbers [N], -1 where there is none."""
  import pyarrow

  for file in files:
    if column not in _schema(file).names:
      raise ValueError(f"{file} has no column {column!r}, which other files of its split have")
  groups = [(f, k) for f in files for k in range(len(_group_sizes(f)))]
  whole = [_read(f, k, column).cast(pyarrow.int64()) for f, k in groups]
  return np.concatenate([labels.fill_null(-1).to_numpy() for labels in whole])


def _schema(file: str) -> Any:
  import pyarrow.parquet

  return _arrow_table(file).schema if file.endswith(".arrow") else pyarrow.parquet.read_schema(file)


def _group_sizes(file: str) -> list[int]:
  """Rows of each group; an Arrow file is one, since all of it is mapped."""
  import pyarrow.parquet

  if file.endswith(".arrow"):
    return [_arrow_table(file).num_rows]
  meta = pyarrow.parquet.read_metadata(file)
  return [meta.row_group(k).num_rows for k in range(meta.num_row_groups)]


def _read(file: str, group: int, column: str) -> Any:
  import pyarrow.parquet

  if file.endswith(".arrow"):
    return _arrow_table(file).column(column)
  with pyarrow.parquet.ParquetFile(file) as opened:
    return opened.read_row_group(group, columns=[column]).column(column)


def _arrow_table(file: str) -> Any:
  import pyarrow

  mapped = pyarrow.memory_map(file)
  try:
    return pyarrow.ipc.open_stream(mapped).read_all()  # what save_to_disk writes
  except pyarrow.ArrowInvalid:
    return pyarrow.ipc.open_file(mapped).read_all()


def _columns(file: str, where: str) -> tuple[str, str | None, tuple[str, ...]]:
  """Names of the picture, of the label if there is one, and of its classes."""
  import pyarrow

  schema = _schema(file)
  info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
  features = info["info"]["features"] if "info" in info else {}
  kinds = {k: f["_type"] for k, f in features.items() if isinstance(f, dict) and "_type" in f}
  pictures = [k for k, kind in kinds.items() if kind == "Image"]
  labels = [k for k, kind in kinds.items() if kind == "ClassLabel"]
  if not kinds:
    pictures = [k for k in schema.names if k == "image"]
    labels = [k for k in schema.names if k == "label"]
  image, label = choose_columns(pictures, labels, known=schema.names, where=where)
  column = schema.field(image).type
  if pyarrow.types.is_struct(column):
    readable = {column.field(i).name for i in range(column.num_fields)} >= {"bytes", "path"}
  else:
    readable = pyarrow.types.is_binary(column) or pyarrow.types.is_large_binary(column)
  if not readable:
    raise ValueError(f"{where}: the column {image!r} is {column}; expected encoded pictures")
  if label and not pyarrow.types.is_integer(schema.field(label).type):
    raise ValueError(f"{where}: the column {label!r} is {schema.field(label).type}; expected ints")
  names = features[label]["names"] if label and "names" in features.get(label, {}) else ()
  return image, label, tuple(names or ())
