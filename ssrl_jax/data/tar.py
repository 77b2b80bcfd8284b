"""WebDataset archives: tar files of KEY.jpg with KEY.cls or KEY.json beside it.

Nothing is unpacked: an index of where each picture lies is made once for each archive and kept in
the user's cache folder, and pictures are read from their places.
"""

from __future__ import annotations

import json
import os
import tarfile
import time
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from ssrl_jax.data import index_cache
from ssrl_jax.data.decode import DamagedImage
from ssrl_jax.data.index_cache import Names
from ssrl_jax.data.listing import EXTENSIONS, describe, find_shards, locate, number_labels

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Index(NamedTuple):
  """The pictures of an archive, in its order."""

  keys: Names
  classes: Names  # what KEY.cls says, else "label" of KEY.json, else empty
  places: np.ndarray  # int64 [n, 2]: offset and size in bytes


class TarSource:
  """The pictures of all archives of a split, in the order of the archives' names.

  A member's KEY is its path up to the first dot of the file name, so a.seg.png is no picture of
  a.cls; how many such there are is said. Classes are numbers, 0 to the largest one, or else names,
  sorted, over the archives of all splits; an example without one, or of -1, has the label -1.
  """

  def __init__(self, path: str, *, split: str):
    self._split, self._where = split, f"tar:{os.path.abspath(os.path.expanduser(path))}"
    self._archives, archives = find_shards(
      path, kind="tar", split=split, endings=(".tar",), compressed=COMPRESSED
    )
    shown = tqdm(archives, "indexing archives", disable=None, delay=2)
    index_of = {archive: _index(archive) for archive in shown}
    indices = [index_of[archive] for archive in self._archives]
    self._ends = np.cumsum([len(index.keys) for index in indices])
    if not self._ends[-1]:
      raise ValueError(
        f"no pictures in {len(indices)} archives of {self._where}, e.g. {self._archives[0]}; "
        f"expected members KEY.EXTENSION with one of {' '.join(EXTENSIONS)}"
      )
    self._keys = Names.pack([key for index in indices for key in index.keys.tolist()])
    self._places = np.concatenate([index.places for index in indices])
    known = {c for index in index_of.values() for c in index.classes.tolist()}
    classes = [os.fsdecode(c) for index in indices for c in index.classes.tolist()]
    self.class_names, self.labels = number_labels(classes, {os.fsdecode(c) for c in known if c})
    self.num_classes = len(self.class_names) or None

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, i: int) -> dict[str, Any]:
    archive, (offset, length) = self._archive(i), self._places[i].tolist()
    try:
      # Opened for each picture, as in a folder: thousands of archives may not all stay open.
      with open(archive, "rb", buffering=0) as file:
        image = os.pread(file.fileno(), length, offset)
    except OSError as error:
      raise DamagedImage(f"{archive}: {error}") from error
    if len(image) != length:
      raise DamagedImage(f"{archive} has become shorter since it was indexed: {self.name(i)}")
    return {"image": image, "label": int(self.labels[i])}

  def name(self, i: int) -> str:
    return f"{os.path.basename(self._archive(i))}/{os.fsdecode(self._keys[i])}"

  def _archive(self, i: int) -> str:
    return self._archives[locate(self._ends, i)[0]]

  def __repr__(self) -> str:
    return f"TarSource({self._where!r}, split={self._split!r}, {describe(self)})"


def _index(archive: str) -> Index:
  """From the cache, unless the archive has changed since."""
  now, stamps = time.time_ns(), np.array([index_cache.stamp(os.stat(archive))], np.uint64)
  kept = index_cache.load("tar", archive)
  if kept is not None and np.array_equal(kept["stamps"], stamps):
    return Index(*(Names.from_arrays(kept, k) for k in ("keys", "classes")), kept["places"])
  index = _read_index(archive)
  arrays = index.keys.arrays("keys") | index.classes.arrays("classes")
  index_cache.save("tar", archive, arrays | {"places": index.places}, stamps=stamps, now=now)
  return index


def _read_index(archive: str) -> Index:
  places: dict[str, tuple[int, int]] = {}
  class_of: dict[str, str] = {}
  passed_over = unread = 0
  try:
    with tarfile.open(archive, "r:") as tar:
      for member in tar:
        key, ending = _split_name(member.name)
        if ending not in (*EXTENSIONS, ".cls", ".json"):
          passed_over += ending.endswith(EXTENSIONS)
        elif not member.isreg() or member.issparse():
          raise ValueError(f"{member.name!r} of {archive} is no plain file; pack it anew")
        elif ending == ".cls":
          class_of[key] = tar.extractfile(member).read().decode("utf-8-sig").strip()
        elif ending == ".json":
          label = _label_of_json(tar.extractfile(member).read())
          unread += label is None
          class_of.setdefault(key, label or "")
        elif key in places:
          raise ValueError(f"{archive} has two pictures of the key {key!r}; give them two keys")
        else:
          places[key] = (member.offset_data, member.size)
        tar.members = []  # kept by the library otherwise, a kilobyte for each
      _check_end(tar)
  except (tarfile.TarError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{archive} cannot be indexed ({error}); expected a whole, uncompressed tar file: compressed "
      "ones have no random access"
    ) from error
  if unread:
    logging.warning(
      "%s: in %d KEY.json the label is no whole number or name, so it counts as unknown",
      archive, unread,
    )  # fmt: skip
  if passed_over:
    logging.warning("%s: %d pictures named KEY.WORD.EXTENSION left out", archive, passed_over)
  keys, where = [os.fsencode(key) for key in places], np.array(list(places.values()), np.int64)
  classes = [os.fsencode(class_of[key]) if key in class_of else b"" for key in places]
  return Index(Names.pack(keys), Names.pack(classes), where.reshape(-1, 2))


def _check_end(tar: tarfile.TarFile) -> None:
  """Refuses what the library takes for the end of an archive: a bad header, or none, or another."""
  tar.fileobj.seek(tar.offset)
  if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
    raise tarfile.ReadError(f"it is damaged or cut off at byte {tar.offset:,}")
  while block := tar.fileobj.read(1 << 20):
    if block.count(0) != len(block):
      raise tarfile.ReadError(f"more follows its end, at byte {tar.offset:,}; join none with cat")


def _split_name(path: str) -> tuple[str, str]:
  """a/b.c.JPG -> a/b, .c.jpg"""
  folder, slash, name = path.rpartition("/")
  stem, dot, ending = name.partition(".")
  return folder + slash + stem, (dot + ending).lower()


def _label_of_json(content: bytes) -> str | None:
  """ "" where there is none, None where it is of another kind."""
  try:
    label = json.loads(content).get("label", "")
  except (ValueError, AttributeError):
    return None
  if isinstance(label, float) and label.is_integer():
    label = int(label)
  is_label = isinstance(label, int | str) and not isinstance(label, bool)
  return str(label) if is_label else None
