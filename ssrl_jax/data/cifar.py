"""CIFAR-10 and CIFAR-100 as their authors give them: the binary version, unpacked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssrl_jax.data.listing import describe, find_split, locate

PIXELS = 3 * 32 * 32  # red, green, blue, each row by row


class Form(NamedTuple):
  folder: str  # that the archive unpacks to
  files: dict[str, tuple[str, ...]]  # of each split
  names: str  # file of the classes' names, one a line
  labels: int  # bytes before the pixels, of which the last is the class


FORMS = (
  Form(
    "cifar-10-batches-bin",
    {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)},
    "batches.meta.txt",
    labels=1,
  ),
  Form(
    "cifar-100-binary",
    {"train": ("train.bin",), "test": ("test.bin",)},
    "fine_label_names.txt",
    labels=2,
  ),
)


class CifarSource:
  """A split; of CIFAR-100 with its 100 fine classes. Layout: cs.toronto.edu/~kriz/cifar.html.

  Args:
    path: the unpacked folder, or the one that it lies in.

  Raises:
    FileNotFoundError: neither is there, or not all of it.
    ValueError: both are there, a file that is no whole number of pictures, or a class without a
      name.
  """

  def __init__(self, path: str, *, split: str):
    self._path, self._split = path, split
    root = Path(path).expanduser().absolute()
    places = [(folder, form) for form in FORMS for folder in (root, root / form.folder)]
    found = [(folder, form) for folder, form in places if (folder / form.names).is_file()]
    if not found:
      names = " or ".join(form.folder for form in FORMS)
      raise FileNotFoundError(f"cifar:{path} holds no {names}: unpack the binary version there")
    if len(found) > 1:
      raise ValueError(f"cifar:{path} holds {' and '.join(str(f) for f, _ in found)}; name one")
    folder, form = found[0]
    self._files = [folder / f for f in form.files[find_split(split, tuple(form.files), where=path)]]
    rows = [_rows(file, form.labels + PIXELS) for file in self._files]
    self._rows, self._ends = rows, np.cumsum([len(part) for part in rows])
    self.labels = np.concatenate([part[:, form.labels - 1] for part in rows]).astype(np.int32)
    lines = (folder / form.names).read_text().splitlines()
    self.class_names = tuple(line.strip() for line in lines if line.strip())
    self.num_classes = len(self.class_names)
    if self.labels.max(initial=0) >= self.num_classes:
      raise ValueError(f"cifar:{path} has label {self.labels.max()}, of {self.num_classes} names")

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict[str, Any]:
    file, at = locate(self._ends, i)
    image = self._rows[file][at, -PIXELS:].reshape(3, 32, 32).transpose(1, 2, 0)
    return {"image": np.ascontiguousarray(image), "label": int(self.labels[i])}

  def read_together(self, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    return {i: self[i] for i in positions}

  def name(self, i: int) -> str:
    file, at = locate(self._ends, i)
    return f"{self._files[file].name}/{at}"

  def __reduce__(self):
    return _reopen, (self._path, self._split)  # a process maps the files itself

  def __repr__(self) -> str:
    return f"CifarSource({self._path!r}, split={self._split!r}, {describe(self)})"


def _reopen(path: str, split: str) -> CifarSource:
  return CifarSource(path, split=split)


def _rows(file: Path, length: int) -> np.ndarray:
  """uint8 [N, length], mapped and not read."""
  size = os.stat(file).st_size
  if not size or size % length:
    raise ValueError(f"{file} has {size:,} bytes, no multiple of {length:,}: unpack it again")
  return np.memmap(file, np.uint8, "r").reshape(-1, length)
