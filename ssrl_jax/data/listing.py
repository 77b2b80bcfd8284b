"""What lies under a folder: its pictures, its splits, its shards."""

from __future__ import annotations

import collections
import glob
import logging
import os
import re
import time
from typing import Any, NamedTuple

import numpy as np

from ssrl_jax.data import index_cache
from ssrl_jax.data.index_cache import Names

EXTENSIONS = (
  *(".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
  *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

# Data sets name the part that is kept for evaluation in one of these ways.
HELD_OUT = ("test", "val", "validation", "valid")


class Listing(NamedTuple):
  """Paths relative to the listed folder, in sorted order; "" is that folder itself."""

  pictures: Names
  folders: Names  # those that were entered


def find_split(split: str, available: tuple[str, ...], *, where: str) -> str:
  """`split`, or what stands for it in `available`; a slice such as train[:90%] is kept.

  Of HELD_OUT one stands for another if it is the only one there, or the only one for validation.

  Raises:
    ValueError: there is no such split.
  """
  base, bracket, rest = split.partition("[")
  if base in available:
    return split
  if base in HELD_OUT:
    held_out = [name for name in HELD_OUT if name in available]
    validation = [name for name in held_out if "test" not in (base, name)]
    for found in (validation, held_out):
      if len(found) == 1:
        return found[0] + bracket + rest
  raise ValueError(f"{where} has no split {base!r}; it has: {', '.join(available)}")


def describe(source: Any) -> str:
  """How the repr of a source ends."""
  return f"num_examples={len(source)}, num_classes={source.num_classes}"


def locate(ends: np.ndarray, position: Any) -> tuple[Any, Any]:
  """Of parts that end at `ends`: which holds a position, or each of an array, and where in it."""
  part = np.searchsorted(ends, position, side="right")
  return part, position - np.where(part > 0, ends[part - 1], 0)


def list_pictures(root: str) -> Listing:
  """All files under `root` that are named as pictures; from the cache where nothing has changed.

  Hidden files and folders are left out. Links are followed, but for one that leads back to a folder
  it lies in. A link that leads nowhere is a picture if it is named as one: reading it will say so.

  Raises:
    ValueError: a folder that may not be read.
  """
  kept = index_cache.load("folder", root)
  if kept is not None:
    listing = Listing(Names.from_arrays(kept, "pictures"), Names.from_arrays(kept, "folders"))
    if np.array_equal(_stamps(root, listing.folders), kept["stamps"]):
      return listing
  now = time.time_ns()
  pictures, stamp_of = _walk(os.fsencode(root), EXTENSIONS)
  pictures.sort()
  listing = Listing(Names.pack(pictures), Names.pack(sorted(stamp_of)))
  stamps = np.array([stamp_of[f] for f in sorted(stamp_of)], np.uint64)
  arrays = listing.pictures.arrays("pictures") | listing.folders.arrays("folders")
  index_cache.save("folder", root, arrays, stamps=stamps, now=now)
  return listing


def _walk(
  root: bytes, endings: tuple[str, ...]
) -> tuple[list[bytes], dict[bytes, tuple[int, ...]]]:
  """Files, and the stamp of each folder, taken before it is listed: a change shows later."""
  files, stamp_of, loops = [], {}, []
  byte_endings = tuple(e.encode() for e in endings)
  waiting: list[tuple[bytes, tuple]] = [(b"", ())]  # a folder, and which ones it lies in
  while waiting:
    below, above = waiting.pop()
    prefix = below + os.sep.encode() if below else b""
    status = os.stat(os.path.join(root, below))
    identity = (status.st_dev, status.st_ino)
    if identity in above:
      loops.append(os.fsdecode(below))
      continue
    stamp_of[below] = index_cache.stamp(status)
    try:
      with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
          if entry.name.startswith(b"."):
            continue
          if _is_folder(entry):
            waiting.append((prefix + entry.name, (*above, identity)))
          elif entry.name.lower().endswith(byte_endings) and _may_be_read(entry):
            files.append(prefix + entry.name)
    except PermissionError as error:
      raise ValueError(
        f"the folder {os.fsdecode(os.path.join(root, below))!r} may not be read "
        f"({error.strerror}); make it readable, or move it out of the set"
      ) from error
  if loops:
    logging.warning(
      "%s: %d links lead back to a folder they lie in and are not followed, e.g. %r",
      os.fsdecode(root), len(loops), min(loops),
    )  # fmt: skip
  return files, stamp_of


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself, or to what may not be looked at
    return False


def _may_be_read(entry: os.DirEntry) -> bool:
  """A file, or a link to nothing, which counts as damaged; no pipe or device, nor a link to one."""
  try:
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
  except OSError:  # a link to itself
    return True


def _stamps(root: str, folders: Names) -> np.ndarray | None:
  try:
    paths = (os.path.join(os.fsencode(root), folder) for folder in folders.tolist())
    return np.array([index_cache.stamp(os.stat(path)) for path in paths], np.uint64)
  except OSError:
    return None


def nothing_found(root: str) -> str:
  files = [name for _, _, names in os.walk(root) for name in names]
  counts = collections.Counter(os.path.splitext(f)[1].lower() or "no extension" for f in files)
  found = ", ".join(f"{n} x {extension}" for extension, n in sorted(counts.items())) or "no files"
  return f"no pictures in {root}: found {found}; expected files ending in {' '.join(EXTENSIONS)}"


def number_labels(classes: list[str], known: set[str]) -> tuple[tuple[str, ...], np.ndarray]:
  """Names of the classes, and labels [N] of examples in `classes`, "" and "-1" being none."""
  known, classes = known - {"-1"}, ["" if c == "-1" else c for c in classes]
  negative = sorted(c for c in known if c[:1] == "-" and c[1:].isdecimal())
  if negative:
    raise ValueError(f"a label is {negative[0]}; expected 0 and more, or -1 for none")
  if all(c.isdecimal() for c in known):
    most = max((int(c) for c in known), default=0)
    if most >= max(1_000_000, 10 * len(classes)):
      raise ValueError(
        f"a label is {most:,}, of {len(classes):,} pictures; labels are numbers of classes from 0"
      )
    names = tuple(str(k) for k in range(max((int(c) + 1 for c in known), default=0)))
    labels = [int(c) if c else -1 for c in classes]
  else:
    names = tuple(sorted(known))
    label_of = {name: label for label, name in enumerate(names)} | {"": -1}
    labels = [label_of[c] for c in classes]
  return names, np.array(labels, np.int32)


def find_shards(
  path: str,
  *,
  kind: str,
  split: str,
  endings: tuple[str, ...],
  by_folder: bool = False,
  compressed: tuple[str, ...] = (),
) -> tuple[list[str], list[str]]:
  """The files of a split, and all, among those under a folder or those that match a pattern.

  A file belongs to the split whose name is a word of its path, counted from the folder or from
  where the pattern begins: train/0.tar, set-train-0.tar; with `by_folder` only of a folder that is
  called so. If no file names a split, all are train.

  Raises:
    FileNotFoundError: there are none.
    ValueError: none of this split; or the folder has files with the endings `compressed`.
  """
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.isdir(path):
    root, (found, _) = path, _walk(os.fsencode(path), (*endings, *compressed))
    files = [os.path.join(path, os.fsdecode(f)) for f in found]
    packed = sorted(f for f in files if f.lower().endswith(compressed))
    if packed:
      raise ValueError(f"{packed[0]} is compressed, so it has no random access; decompress it")
  else:
    files = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    root = os.path.dirname(re.split(r"[*?\[]", path)[0])
  if not files:
    raise FileNotFoundError(
      f"no files for {kind}:{path}; give {kind}:PATH with a folder that has files ending in "
      f"{' '.join(endings)}, or a pattern that matches some"
    )
  known = ("train", *HELD_OUT, split)
  words = (lambda p: p.split(os.sep)) if by_folder else _words
  split_of = {
    f: next((w for w in words(os.path.relpath(f, root)) if w in known), "") for f in sorted(files)
  }
  if not any(split_of.values()):
    split_of = dict.fromkeys(split_of, "train")
  available = tuple(s for s in dict.fromkeys(known) if s in split_of.values())
  split = find_split(split, available, where=f"{kind}:{path}")
  strays = [f for f, s in split_of.items() if not s]
  if strays:
    logging.warning("%d files name no split and are left out, e.g. %s", len(strays), strays[0])
  return [f for f, s in split_of.items() if s == split], list(split_of)


def _words(path: str) -> list[str]:
  return re.split("[^a-z0-9]+", path.lower())


def choose_columns(
  pictures: list[str], labels: list[str], *, known: list[str], where: str
) -> tuple[str, str | None]:
  """The columns to take as picture and, if there is one, as label: the only ones, or by name."""
  picture = "image" if "image" in pictures else pictures[0] if len(pictures) == 1 else None
  label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
  if picture is None or (labels and label is None):
    raise ValueError(
      f"{where} needs one picture and at most one label, or those named 'image' and 'label'; it "
      f"has pictures {pictures} and labels {labels} among {known}"
    )
  return picture, label
