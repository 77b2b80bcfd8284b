"""Folders of pictures, and of clips."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from ssrl_jax.data.index_cache import Names
from ssrl_jax.data.listing import (
  EXTENSIONS,
  HELD_OUT,
  Listing,
  describe,
  find_split,
  list_pictures,
  nothing_found,
)
from ssrl_jax.files import printable


class FolderSource:
  """Pictures under `path`, or under its subfolder `split` if it has folders for splits.

  Two or more folders directly below, with pictures at any depth, are the classes, in sorted order.
  If there are fewer, or pictures also lie beside them, nothing is labelled. Pictures are those with
  one of `EXTENSIONS`, in any case; hidden files and folders are left out. The order is that of the
  sorted relative paths, whatever the file system's.
  """

  def __init__(self, path: str, *, split: str):
    self._split = split
    self._root = _split_folder(_existing(path, "folder"), split)
    listing = list_pictures(self._root)
    if not len(listing.pictures):
      raise ValueError(nothing_found(self._root))
    self._paths = listing.pictures
    empty = [f for f in _without_pictures(listing) if os.sep not in f]
    paths = self._paths.tolist()
    self.class_names, self.num_classes, self.labels = _classes(paths, self._root, "pictures")
    if empty and any(_SEP in p for p in paths):
      logging.warning(
        "%d folders of %s have no pictures and are no classes, e.g. %r",
        len(empty), self._root, empty[0],
      )  # fmt: skip

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {"image": os.path.join(self._root, self.name(i)), "label": int(self.labels[i])}

  def name(self, i: int) -> str:
    return os.fsdecode(self._paths[i])

  def __repr__(self) -> str:
    return f"FolderSource({self._root!r}, split={self._split!r}, {describe(self)})"


class ClipSource:
  """Clips, each a folder of frames: PATH[/split]/[CLASS/]CLIP/frame0001.jpg.

  A folder that holds pictures is a clip, at any depth; its frames are in the order of their names,
  numbers as numbers (frame2 before frame10). Labels as in `FolderSource`, if every clip lies in a
  class folder. Hidden files and folders are left out.
  """

  def __init__(self, path: str, *, split: str):
    self._split = split
    self._root = _split_folder(_existing(path, "clips"), split)
    listing = list_pictures(self._root)
    empty = _without_pictures(listing)
    if empty:
      raise ValueError(
        f"the clip {os.path.join(self._root, empty[0])} has no frames; remove the folder, or put "
        f"pictures into it, ending in {' '.join(EXTENSIONS)}"
      )
    clips: dict[bytes, list[bytes]] = {}
    for frame in listing.pictures.tolist():
      clips.setdefault(os.path.dirname(frame), []).append(frame)
    if not clips:
      raise ValueError(nothing_found(self._root))
    if b"" in clips:
      raise ValueError(
        f"{len(clips[b''])} pictures lie in {self._root} itself, e.g. "
        f"{os.fsdecode(clips[b''][0])}; put the frames of each clip into a folder of its own, or "
        "use folder:PATH for still pictures"
      )
    self._names = Names.pack(sorted(clips))
    names = self._names.tolist()
    self.class_names, self.num_classes, self.labels = _classes(names, self._root, "clips")
    self._paths = Names.pack([f for n in sorted(clips) for f in sorted(clips[n], key=_natural)])
    self._ends = np.cumsum([len(clips[n]) for n in sorted(clips)])

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, i: int) -> dict[str, Any]:
    positions = range(self._ends[i - 1] if i else 0, self._ends[i])
    frames = tuple(os.path.join(self._root, os.fsdecode(self._paths[k])) for k in positions)
    return {"image": frames[len(frames) // 2], "frames": frames, "label": int(self.labels[i])}

  def name(self, i: int) -> str:
    return os.fsdecode(self._names[i])

  def __repr__(self) -> str:
    return f"ClipSource({self._root!r}, split={self._split!r}, {describe(self)})"


def _split_folder(path: str, split: str) -> str:
  known = ("train", *HELD_OUT)
  there = {}
  for name in (*known, split):
    forms = [f for f in (name, name.capitalize(), name.upper()) if _is_folder(path, f)]
    there |= {name: forms[0]} if forms else {}
  available = tuple(dict.fromkeys(s for s in (*known, split) if s in there))
  if available or split != "train":
    found = find_split(split, available or ("train (all of it)",), where=path)
    if split == "train" and (others := _others_with_pictures(path, there.values())):
      logging.warning(
        "%s is taken for the split of %s, so pictures in its other folders (%s) are left out; if "
        "%s is a class, give it another name", found, path, ", ".join(others[:3]), found,
      )  # fmt: skip
    return os.path.join(path, there.get(found, found))
  _warn_of_splits(path)
  return path


def _warn_of_splits(path: str) -> None:
  """Says where folders in `path`, or in its only folder, are called nearly as splits are."""
  with contextlib.suppress(OSError):  # of a folder that may not be read: said when it is listed
    folders = [f for f in sorted(os.listdir(path)) if _is_folder(path, f) and f[0] != "."]
    named = [f for f in folders if _LIKE_A_SPLIT.match(f)]
    if len(named) > 1:
      logging.warning(
        "%s look like splits of %s, and all their pictures are taken for training: to have splits, "
        "name the folders in PATH train and test", ", ".join(named[:3]), path,
      )  # fmt: skip
    elif len(folders) == 1:
      _warn_of_splits(os.path.join(path, folders[0]))


def _others_with_pictures(path: str, splits: Collection[str]) -> list[str]:
  """Folders in `path`, no split's and not hidden, that have a picture directly in them; sorted."""
  others = [f for f in sorted(os.listdir(path)) if f not in splits and not f.startswith(".")]
  found = []
  for folder in others:
    with contextlib.suppress(OSError):  # no folder, or one that may not be read: lost+found
      if any(f.lower().endswith(EXTENSIONS) for f in os.listdir(os.path.join(path, folder))):
        found.append(folder)
  return found


def _is_folder(path: str, name: str) -> bool:
  return os.path.isdir(os.path.join(path, name))


def _existing(path: str, kind: str) -> str:
  path = os.path.abspath(os.path.expanduser(path))
  if not os.path.isdir(path):
    raise FileNotFoundError(f"no folder {path}; give {kind}:PATH with an existing PATH")
  return path


def _classes(
  paths: list[bytes], root: str, what: str
) -> tuple[tuple[str, ...], int | None, np.ndarray]:
  """Names, number and labels [N] of the topmost folders, in which all paths must lie; two or more.

  Else there are no labels, and a line says so if there are folders that could be taken for classes.
  """
  tops = [os.fsdecode(top) if rest else "" for top, _, rest in (p.partition(_SEP) for p in paths)]
  names = sorted(set(tops))
  if "" in names or len(names) == 1:
    if len(names) > 1:
      logging.warning(
        "nothing in %s is labelled: %d of its %s lie beside its folders, e.g. %r; if the folders "
        "are classes, move what lies beside them into one, or away",
        root, tops.count(""), what, os.fsdecode(paths[tops.index("")]),
      )  # fmt: skip
    elif names != [""]:
      logging.warning(
        "nothing in %s is labelled: all its %s lie in one folder, %r; classes are two or more",
        root, what, names[0],
      )  # fmt: skip
    return (), None, np.full(len(tops), -1, np.int32)
  label_of = {name: label for label, name in enumerate(names)}
  labels = np.array([label_of[top] for top in tops], np.int32)
  return tuple(map(printable, names)), len(names), labels


_LIKE_A_SPLIT = re.compile(r"(train|test|val)(ing|ation)?([_-].*)?$", re.IGNORECASE)
_SEP = os.sep.encode()


def _without_pictures(listing: Listing) -> list[str]:
  """The folders below the listed one with no picture at any depth, sorted."""
  full = {b""}
  for folder in {os.path.dirname(p) for p in listing.pictures.tolist()}:
    while folder not in full:
      full.add(folder)
      folder = os.path.dirname(folder)
  return [os.fsdecode(f) for f in listing.folders.tolist() if f not in full]


def _natural(path: bytes) -> tuple[list[Any], bytes]:
  """Sorts numbers in a path as numbers; the path itself parts frame1 from frame01."""
  parts = re.split(b"([0-9]+)", path)
  return [int(p) if i % 2 else p for i, p in enumerate(parts)], path
