"""Pictures with boxes or masks: what detection and segmentation learn from.

`coco:PATH` has PATH/images/SPLIT/* and PATH/annotations/SPLIT.json in COCO's format, `masks:PATH`
has PATH/images/SPLIT/* and PATH/masks/SPLIT/*.png of class numbers. Opening a source reads every
picture's header, and every mask whole, so that a broken set is refused before anything is trained.
What is left out or changed is named once and counted in `dropped`.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ssrl_jax.data.batches import Batch
from ssrl_jax.data.decode import FORMATS, orientation
from ssrl_jax.data.listing import EXTENSIONS, find_split
from ssrl_jax.data.pipeline import check_at_least

IGNORE = 255  # of a mask: no class, and what lies outside the picture
CLIPPED = 0.02  # pixels outside the picture that COCO's own rounding to 0.01 may cause


class DenseSource(Protocol):
  """Annotated pictures by position; picklable, since worker processes read it."""

  paths: list[str]
  class_names: tuple[str, ...]
  num_classes: int
  dropped: dict[str, int]  # what was left out or changed, by its kind

  def __len__(self) -> int: ...

  def blank(self, n: int, canvas: int) -> Batch:
    """The annotations of n examples of which nothing is known."""
    ...

  def annotate(self, batch: Batch, j: int, i: int) -> None:
    """Writes those of example `i` to place `j`, where extent and image are already."""
    ...


class Boxes(NamedTuple):
  """The boxes of one picture, in its own pixels."""

  corners: np.ndarray  # float64 [n, 4]: left, top, right, bottom
  labels: np.ndarray  # int32 [n], in [0, num_classes)
  crowd: np.ndarray  # bool [n]: many objects in one box


def open_boxes(name: str, *, split: str, max_boxes: int = 0) -> CocoSource:
  """Opens `coco:PATH`; see `CocoSource`."""
  return CocoSource(_path_of(name, "coco"), split=split, max_boxes=max_boxes)


def open_masks(name: str, *, split: str) -> MaskSource:
  """Opens `masks:PATH`; see `MaskSource`."""
  return MaskSource(_path_of(name, "masks"), split=split)


class CocoSource:
  """Boxes of COCO's format; classes are the categories in the order of their ids.

  A box is clipped to its picture, and dropped if no area is left. Pictures that the file lists but
  that are not there are left out, as are those that it does not list; one without a box stays.
  Crowd boxes are kept for evaluation and are no part of the batches.

  Batches have `boxes` float32 [b, N, 4] (left, top, right, bottom in pixels of the canvas),
  `box_label` int32 [b, N] and `box_valid` bool [b, N].

  Args:
    path: of the folder.
    split: the name of a file in annotations/, where test, val, validation and valid stand for one
      another.
    max_boxes: N; of a picture with more, the largest are kept in its batches; 0: as many as the
      fullest picture has.
  """

  def __init__(self, path: str, *, split: str, max_boxes: int = 0):
    check_at_least(0, max_boxes=max_boxes)
    root = Path(path)
    splits = tuple(sorted(p.stem for p in (root / "annotations").glob("*.json")))
    if not splits:
      raise FileNotFoundError(f"no annotations/SPLIT.json in {root}; expected COCO's format there")
    split = find_split(split, splits, where=f"coco:{path}")
    self._file, folder = root / "annotations" / f"{split}.json", root / "images" / split
    images, annotations, categories = _read_coco(self._file)
    self.category_ids = tuple(sorted(categories))
    self.class_names = tuple(categories[i] for i in self.category_ids)
    self.num_classes = len(self.class_names)
    of_image = self._group(images, annotations)
    present, sizes, self.dropped = self._present(images, folder)
    self.ids = [image["id"] for image in present]
    self.paths = [str(folder / image["file_name"]) for image in present]
    self.sizes = np.array(sizes, np.int32).reshape(-1, 2)  # height, width
    self.boxes = [self._clean(of_image[i], size) for i, size in zip(self.ids, self.sizes)]
    counts = [int(np.sum(~boxes.crowd)) for boxes in self.boxes]
    self.max_boxes = max_boxes or max(1, *counts)
    self.dropped["truncated_boxes"] = sum(max(0, n - self.max_boxes) for n in counts)
    for key, what in (
      ("clipped_boxes", "boxes reach beyond their picture and were clipped"),
      ("empty_boxes", "boxes have no area inside their picture and were left out"),
      ("truncated_boxes", f"boxes are more than max_boxes {self.max_boxes} in one picture; the "
       "smallest were left out of training"),
    ):  # fmt: skip
      if self.dropped[key]:
        logging.warning("%s: %d %s", self._file, self.dropped[key], what)

  def __len__(self) -> int:
    return len(self.paths)

  def __repr__(self) -> str:
    return f"CocoSource({str(self._file)!r}, num_examples={len(self)})"

  def blank(self, n: int, canvas: int) -> Batch:
    del canvas
    return {
      "boxes": np.zeros((n, self.max_boxes, 4), np.float32),
      "box_label": np.zeros((n, self.max_boxes), np.int32),
      "box_valid": np.zeros((n, self.max_boxes), bool),
    }

  def annotate(self, batch: Batch, j: int, i: int) -> None:
    corners, labels, crowd = self.boxes[i]
    corners, labels = corners[~crowd], labels[~crowd]
    if len(labels) > self.max_boxes:
      area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
      kept = np.sort(np.argsort(-area, kind="stable")[: self.max_boxes])
      corners, labels = corners[kept], labels[kept]
    scale = (batch["extent"][j] / self.sizes[i])[::-1]
    n = len(labels)
    batch["boxes"][j, :n] = corners * np.tile(scale, 2)
    batch["box_label"][j, :n], batch["box_valid"][j, :n] = labels, True

  def _group(self, images: Sequence[dict], annotations: Sequence[dict]) -> dict[Any, list[dict]]:
    """The annotations of each image; refuses those of unknown images, categories or shape."""
    groups: dict[Any, list[dict]] = {image["id"]: [] for image in images}
    for number, one in enumerate(annotations):
      if not isinstance(one, dict):
        raise ValueError(f"{self._file}: annotation {number} is {one!r:.80}; expected an object")
      where = f"{self._file}: annotation {one.get('id', number)}"
      image, category, box = one.get("image_id"), one.get("category_id"), one.get("bbox")
      if not _is_id(image) or image not in groups:
        raise ValueError(f"{where} is of image {image!r}, which is not among its images")
      if not _is_id(category) or category not in self.category_ids:
        raise ValueError(
          f"{where} has category_id {category!r}; expected one of {self.category_ids}: add it to "
          "the categories, or remove the annotation"
        )
      if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x) for x in box):
        raise ValueError(f"{where} has bbox {box}; expected [left, top, width, height] in pixels")
      groups[image].append(one)
    return groups

  def _present(
    self, images: Sequence[dict], folder: Path
  ) -> tuple[list[dict], list[tuple[int, int]], dict[str, int]]:
    """The images that are there, their heights and widths, and the counts of those that are not."""
    sizes = _in_threads(lambda image: _upright_size(folder / image["file_name"]), images)
    kept, kept_sizes, missing, damaged = [], [], [], []
    for image, size in zip(images, sizes):
      if size is None:
        found = (folder / image["file_name"]).is_file()
        (damaged if found else missing).append(image["file_name"])
        continue
      given = (image.get("height"), image.get("width"))
      stated = tuple(real if one is None else one for one, real in zip(given, size))
      if stated != size:
        raise ValueError(
          f"{self._file} says that {image['file_name']} has {stated[1]}x{stated[0]} pixels, but it "
          f"has {size[1]}x{size[0]}; its boxes would be wrong: put back the picture of that size"
        )
      kept.append(image)
      kept_sizes.append(size)
    _warn(missing, f"pictures that {self._file} lists are not in {folder} and are left out")
    _warn(damaged, f"pictures in {folder} cannot be read and are left out")
    if not kept:
      raise FileNotFoundError(
        f"none of the {len(images)} pictures that {self._file} lists can be read in {folder}"
      )
    listed = {os.path.normpath(image["file_name"]) for image in images}
    unlisted = [p for p in _pictures(folder) if p not in listed]
    _warn(unlisted, f"pictures in {folder} are not listed in {self._file} and are left out")
    counts = {"missing_images": len(missing), "damaged_images": len(damaged)}
    zeros = dict.fromkeys(("clipped_boxes", "empty_boxes", "crowd_boxes"), 0)
    return kept, kept_sizes, counts | {"unlisted_images": len(unlisted)} | zeros

  def _clean(self, annotations: Sequence[dict], size: np.ndarray) -> Boxes:
    """The boxes of one picture, clipped to it."""
    given = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    given[:, 2:] += given[:, :2]
    limits = np.tile(size[::-1], 2).reshape(1, 4)
    corners = np.clip(given, 0, limits)
    some = np.all(corners[:, 2:] > corners[:, :2], axis=1)
    labels = [self.category_ids.index(a["category_id"]) for a in annotations]
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool)
    self.dropped["empty_boxes"] += int(np.sum(~some))
    self.dropped["clipped_boxes"] += int(
      np.sum(np.any(np.abs(given - corners) > CLIPPED, 1) & some)
    )
    self.dropped["crowd_boxes"] += int(np.sum(crowd & some))
    return Boxes(corners[some], np.array(labels, np.int32)[some], crowd[some])


class MaskSource:
  """Masks of one channel: class numbers from 0 on, 255 = no class; palettes are read as numbers.

  Picture, upright, and mask have the same name up to the extension and the same size. A picture
  without a mask, or the reverse, is left out. The classes are the lines of PATH/classes.txt;
  without it there are as many as the highest number in any split's masks says. Masks of class 0
  alone are refused, as those that write the foreground as 255 are.

  Batches have `mask` uint8 [b, S, S], resized to the canvas by nearest neighbour; 255 outside.
  """

  def __init__(self, path: str, *, split: str):
    root = Path(path)
    splits = tuple(sorted(p.name for p in (root / "masks").glob("*") if p.is_dir()))
    if not splits:
      raise FileNotFoundError(f"no folder masks/SPLIT in {root}; expected masks as PNG there")
    split = find_split(split, splits, where=f"masks:{path}")
    images, self._root = root / "images" / split, root / "masks" / split
    pictures, masks = _by_stem(images, EXTENSIONS), _by_stem(self._root, (".png",))
    bare, alone = sorted(pictures.keys() - masks), sorted(masks.keys() - pictures)
    _warn(bare, f"pictures in {images} have no mask in {self._root} and are left out")
    _warn(alone, f"masks in {self._root} have no picture in {images} and are left out")
    both = sorted(pictures.keys() & masks)
    if not both:
      raise FileNotFoundError(
        f"no picture in {images} has a mask of its name in {self._root}; expected pairs such as "
        f"{images / 'a.jpg'} and {self._root / 'a.png'}"
      )
    self.paths = [str(images / pictures[stem]) for stem in both]
    self._masks = [str(self._root / masks[stem]) for stem in both]
    self.dropped = {"missing_masks": len(bare), "missing_images": len(alone)}
    highest = self._highest_labels()
    if highest.max() < 1:
      raise ValueError(
        f"the {len(highest)} masks in {self._root} have only class 0 (and {IGNORE} = none); "
        "expected at least 2 classes: write the foreground as 1"
      )
    self.class_names = _class_names(root)
    self.num_classes = len(self.class_names)
    if highest.max() >= self.num_classes:
      worst = int(np.argmax(highest))
      raise ValueError(
        f"{np.sum(highest >= self.num_classes)} of {len(highest)} masks have numbers beyond the "
        f"{self.num_classes} classes, first {self._masks[worst]} with {highest[worst]}; expected 0 "
        f"to {self.num_classes - 1}, or {IGNORE} for no class: complete classes.txt"
      )

  def __len__(self) -> int:
    return len(self.paths)

  def __repr__(self) -> str:
    return f"MaskSource({str(self._root)!r}, num_examples={len(self)})"

  def blank(self, n: int, canvas: int) -> Batch:
    return {"mask": np.full((n, canvas, canvas), IGNORE, np.uint8)}

  def annotate(self, batch: Batch, j: int, i: int) -> None:
    height, width = batch["extent"][j]
    mask = Image.fromarray(self.mask(i))
    mask = mask.resize((int(width), int(height)), Image.Resampling.NEAREST)
    batch["mask"][j, :height, :width] = np.asarray(mask)

  def mask(self, i: int) -> np.ndarray:
    """Class numbers of example `i`, uint8 [h, w], of the size of its upright picture."""
    return read_mask(self._masks[i])

  def _highest_labels(self) -> np.ndarray:
    """The highest class number of each mask, -1 if it has none; refuses masks of another size."""

    def look(paths: tuple[str, str]) -> tuple[int, str]:
      mask, size = read_mask(paths[1]), _upright_size(paths[0])
      if size is not None and size != mask.shape:
        return -1, (
          f"{paths[1]} has {mask.shape[1]}x{mask.shape[0]} pixels, its picture {size[1]}x{size[0]}"
        )
      return _highest(mask), ""

    found = _in_threads(look, list(zip(self.paths, self._masks)))
    bad = [message for _, message in found if message]
    if bad:
      raise ValueError(
        f"{len(bad)} of {len(found)} masks have another size than their picture, first {bad[0]}; "
        "resize the mask by nearest neighbour, or the picture"
      )
    return np.array([label for label, _ in found])


def read_mask(path: str) -> np.ndarray:
  """Class numbers, uint8 [h, w]."""
  try:
    with Image.open(path, formats=("PNG",)) as im:
      mask = np.asarray(im)
      bits = _bits_of_grey(path)
  except Exception as e:  # Pillow's plugins raise many kinds on damaged files
    raise ValueError(f"the mask {path} cannot be read ({type(e).__name__}: {e}); replace it") from e
  if bits in (2, 4):  # Pillow spreads them over 0 to 255
    raise ValueError(f"the mask {path} is of {bits}-bit grey; save it with 8 bits, or a palette")
  if mask.ndim != 2:
    raise ValueError(
      f"the mask {path} has {mask.shape[2]} channels; expected one of class numbers, not of colours"
    )
  if mask.dtype != bool and (mask.min() < 0 or mask.max() > IGNORE):
    raise ValueError(f"the mask {path} has numbers from {mask.min()} to {mask.max()}; at most 255")
  return mask.astype(np.uint8)


def _bits_of_grey(path: str) -> int:
  """Of a grey PNG; 0 of one of colours or a palette. (ISO/IEC 15948, IHDR.)"""
  with open(path, "rb") as file:
    header = file.read(26)
  return header[24] if header[25] == 0 else 0


def _path_of(name: str, kind: str) -> str:
  found, _, path = name.partition(":")
  if found != kind or not path:
    raise ValueError(f"source is {name!r}; expected '{kind}:PATH', the folder of an annotated set")
  path = os.path.abspath(os.path.expanduser(path))
  if not os.path.isdir(path):
    raise FileNotFoundError(f"no folder {path}; give {kind}:PATH with an existing PATH")
  return path


def _read_coco(file: Path) -> tuple[list[dict], list[Any], dict[Any, str]]:
  """Images, annotations (not looked at yet), and names of categories by their id."""
  try:
    content = json.loads(file.read_bytes())
    images, annotations, categories = (
      content[key] for key in ("images", "annotations", "categories")
    )
    if not all(isinstance(part, list) for part in (images, annotations, categories)):
      raise TypeError("one of the three is no list")
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(
      f"{file} is not in COCO's format ({type(e).__name__}: {e}); expected an object with lists of "
      "images, annotations and categories"
    ) from e
  if not images or not categories:
    raise ValueError(
      f"{file} has {len(images)} images and {len(categories)} categories; expected at least one of "
      "each"
    )
  for one_is, entries, name, kind in (
    ("image", images, "file_name", str),
    ("category", categories, "name", str | int),
  ):
    for number, one in enumerate(entries):
      if not (isinstance(one, dict) and _is_id(one.get("id")) and isinstance(one.get(name), kind)):
        raise ValueError(
          f"{file}: {one_is} {number} in the list is {one!r:.80}; expected an object with an id, a "
          f"number or a word, and a {name}"
        )
    _refuse_repeats(file, f"{one_is} ids", [one["id"] for one in entries])
  _refuse_repeats(file, "file_names", [os.path.normpath(image["file_name"]) for image in images])
  for image in images:
    for key in ("height", "width"):
      if image.get(key) is not None and not _is_number(image[key]):
        raise ValueError(
          f"{file}: image {image['id']} has {key} {image[key]!r}; expected pixels, or none stated"
        )
  words = [one["id"] for one in categories if isinstance(one["id"], str)]
  if 0 < len(words) < len(categories):
    raise ValueError(
      f"{file} has words as category ids, first {words[0]!r}, and numbers; expected one kind"
    )
  return images, annotations, {one["id"]: str(one["name"]) for one in categories}


def _refuse_repeats(file: Path, what: str, values: list) -> None:
  twice = [value for value, n in Counter(values).items() if n > 1]
  if twice:
    raise ValueError(f"{file} has {len(twice)} {what} twice, first {twice[0]}; drop one")


def _is_id(value: Any) -> bool:
  return isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
  """Finite, also as a float; a truth value is none."""
  is_real = isinstance(value, int | float) and not isinstance(value, bool)
  return is_real and abs(value) <= sys.float_info.max


def _class_names(root: Path) -> tuple[str, ...]:
  if (root / "classes.txt").is_file():
    text = (root / "classes.txt").read_text(encoding="utf-8-sig")
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if "" in names:
      raise ValueError(
        f"line {names.index('') + 1} of {root / 'classes.txt'} is empty; class {names.index('')} "
        "needs a name, as line n is that of class n - 1"
      )
    return names
  masks = [str(root / "masks" / p) for p in _pictures(root / "masks") if p.lower().endswith(".png")]
  highest = _in_threads(lambda path: _highest(read_mask(path)), masks)
  return tuple(str(number) for number in range(max(highest) + 1))


def _highest(mask: np.ndarray) -> int:
  return int(np.max(mask.astype(np.int32), initial=-1, where=mask != IGNORE))


def _upright_size(path: str | Path) -> tuple[int, int] | None:
  """Height and width as `decode` shows the picture, from its header; None: it cannot be read."""
  try:
    with Image.open(path, formats=FORMATS) as im:
      # Of a TIFF that lies sideways `size` is exchanged already, its tags are not.
      stored = (im.tag_v2[256], im.tag_v2[257]) if im.format == "TIFF" else im.size
      height, width = stored[::-1]
      # Asked for it, Pillow would decode a whole PNG to see whether a tag stands behind the pixels.
      sideways = (im.format != "PNG" or "exif" in im.info) and orientation(im) >= 5
  except Exception:  # Pillow's plugins raise many kinds on damaged files
    return None
  return (width, height) if sideways else (height, width)


def _in_threads(function: Callable, items: Sequence) -> list:
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(function, items))


def _pictures(folder: Path) -> list[str]:
  """Relative paths; hidden files and folders are left out."""
  paths = (p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
  return sorted(str(p) for p in paths if not any(part.startswith(".") for part in p.parts))


def _by_stem(folder: Path, extensions: tuple[str, ...]) -> dict[str, str]:
  """Relative path without extension -> relative path; two of one name are refused."""
  found: dict[str, str] = {}
  for path in _pictures(folder):
    stem, extension = os.path.splitext(path)
    if extension.lower() not in extensions:
      continue
    if stem in found:
      raise ValueError(f"{folder} has {found[stem]} and {path}; give them two names, or drop one")
    found[stem] = path
  return found


def _warn(names: list[str], what: str) -> None:
  if names:
    logging.warning("%d %s, first %s", len(names), what, names[0])
