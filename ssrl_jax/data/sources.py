"""Where pictures come from: random-access sources of `{"image", "label"}`, opened by name.

`tfds:NAME` reads a prepared TensorFlow Datasets set without TensorFlow, `folder:PATH` a folder of
pictures, `clips:PATH` a folder of clips, `digit_scenes` the embedded set that needs no download.
"""

from __future__ import annotations

import collections
import functools
import os
import re
from typing import Any, Protocol

import numpy as np

EXTENSIONS = (
  *(".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
  *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

# Data sets name the part that is kept for evaluation in one of these ways.
_HELD_OUT = ("test", "val", "validation", "valid")

_NUM_SCENES = {"train": 8192, "test": 2048}  # of digit_scenes, unless a limit says otherwise


class Source(Protocol):
  """Pictures by position. Picklable, since worker processes read it, with a stable repr.

  A source that reads many at once faster has __getitems__(positions) -> list of examples, too.
  """

  num_classes: int | None  # None: no labels
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> dict[str, Any]:
    """{"image": whatever `decode` takes, "label": int in [0, num_classes) or -1 when unknown}.

    A clip has beside them "frames", a tuple of what `decode` takes; its "image" is the middle one.
    """
    ...


def open_source(
  name: str, *, split: str, size: int = 32, data_dir: str = "", limit: int = 0, seed: int = 0
) -> Source:
  """Opens `tfds:NAME`, `folder:PATH`, `clips:PATH` or `digit_scenes`.

  Args:
    name: which; `tfds:` takes what TFDS takes, e.g. `tfds:cifar10` or `tfds:NAME/CONFIG:VERSION`.
    split: "train", or the held-out part, where test, val, validation and valid stand for one
      another when only one is there. TFDS slices such as "train[:90%]" work for `tfds:`.
    size: side of the scenes in pixels. Only for `digit_scenes`.
    data_dir: where TFDS keeps its prepared sets; empty: TFDS' own default. Only for `tfds:`.
    limit: this many examples, drawn with `seed`; 0: all (`digit_scenes`, which has no end: 8,192
      of train, 2,048 of test).
    seed: of the draw, and of the scenes.
  """
  kind, _, rest = name.partition(":")
  if limit < 0:
    raise ValueError(f"limit {limit} of {name} is negative; 0 = all")
  if name == "digit_scenes":
    from ssrl_jax.data.digits import DigitScenes

    split = find_split(split, tuple(_NUM_SCENES), where=name)
    return DigitScenes(split=split, size=size, num_examples=limit or _NUM_SCENES[split], seed=seed)
  if kind == "tfds" and rest:
    source = TfdsSource(rest, split=split, data_dir=data_dir)
  elif kind == "folder" and rest:
    source = FolderSource(rest, split=split)
  elif kind == "clips" and rest:
    source = ClipSource(rest, split=split)
  else:
    raise ValueError(
      f"unknown data source {name!r}; expected 'tfds:NAME', 'folder:PATH', 'clips:PATH' or "
      "'digit_scenes'"
    )
  return Subset(source, limit, seed=seed) if limit else source


def check_same_classes(train: Source, test: Source) -> None:
  """Raises unless a label means the same in both sources."""
  if train.num_classes == test.num_classes and train.class_names == test.class_names:
    return
  only_train = [c for c in train.class_names if c not in test.class_names]
  only_test = [c for c in test.class_names if c not in train.class_names]
  raise ValueError(
    f"labels differ between {train!r} and {test!r}: classes only in the first: {only_train}, only "
    f"in the second: {only_test}; give both the same class names in the same order"
  )


@functools.lru_cache(maxsize=1)
def labels_of(source: Source) -> np.ndarray:
  """The label of every example, int32 [N]; a TFDS set is read through for them, once."""
  if isinstance(source, FolderSource | ClipSource):
    return source.labels
  if isinstance(source, Subset) and isinstance(source.whole, FolderSource | ClipSource):
    return source.whole.labels[source.positions]
  return np.array([source[i]["label"] for i in range(len(source))], np.int32)


def check_frames(source: Source, frames: int, span: int) -> None:
  """Raises ValueError unless `frames` frames can be drawn from windows of `span` of its clips."""
  if frames < 1:
    raise ValueError(f"data.frames is {frames}; expected at least 1, a frame for each view")
  if span and span < frames:
    raise ValueError(
      f"data.frame_span is {span}, a window of fewer than data.frames = {frames}; raise it to at "
      f"least {frames}, or 0 = the whole clip"
    )
  if (frames > 1 or span) and "frames" not in source[0]:
    raise ValueError(
      f"data.frames is {frames} and data.frame_span {span}, but {source!r} has still pictures; set "
      "them to 1 and 0, or give data.source=clips:PATH"
    )


class Subset:
  """`num_examples` of a source's examples, drawn with `seed`, in the source's order."""

  def __init__(self, source: Source, num_examples: int, *, seed: int):
    if num_examples > len(source):
      raise ValueError(f"{num_examples} examples are asked of {source!r}; lower it, or 0 = all")
    drawn = np.random.default_rng(seed).permutation(len(source))[:num_examples]
    self.whole, self.positions, self._seed = source, np.sort(drawn), seed
    self.num_classes, self.class_names = source.num_classes, source.class_names

  def __len__(self) -> int:
    return len(self.positions)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self.whole[int(self.positions[i])]

  def __repr__(self) -> str:
    return f"Subset({self.whole!r}, {len(self)}, seed={self._seed})"


class FolderSource:
  """Pictures under `path`, or under its subfolder `split` if it has folders for splits.

  The subfolders that hold pictures, at any depth, are the classes, in sorted order. If pictures
  also lie beside them, or there are no subfolders, nothing is labelled. Pictures are those with one
  of `EXTENSIONS`, in any case; hidden files and folders are left out. The order is that of the
  sorted relative paths, whatever the file system's.
  """

  def __init__(self, path: str, *, split: str):
    self._split = split
    self._root = _split_folder(_existing(path, "folder"), split)
    paths = sorted(_pictures(self._root))
    if not paths:
      raise ValueError(_nothing_found(self._root))
    tops = [p.split(os.sep, 1)[0] if os.sep in p else "" for p in paths]
    self.class_names, self.num_classes, self.labels = _classes(tops)
    # One array of bytes: a million strings would take longer to send to every worker.
    self._paths = np.array([os.fsencode(p) for p in paths])

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> dict[str, Any]:
    path = os.path.join(self._root, os.fsdecode(self._paths[i]))
    return {"image": path, "label": int(self.labels[i])}

  def __repr__(self) -> str:
    return f"FolderSource({self._root!r}, split={self._split!r}, {_size(self)})"


class ClipSource:
  """Clips, each a folder of frames: PATH[/split]/[CLASS/]CLIP/frame0001.jpg.

  A folder that holds pictures is a clip, at any depth; its frames are in the order of their names,
  numbers as numbers (frame2 before frame10). Labels as in `FolderSource`, if every clip lies in a
  class folder. Hidden files and folders are left out.
  """

  def __init__(self, path: str, *, split: str):
    self._split = split
    self._root = _split_folder(_existing(path, "clips"), split)
    clips: dict[str, list[str]] = {}
    for frame in _pictures(self._root, folders_need_some=True):
      clips.setdefault(os.path.dirname(frame), []).append(frame)
    if not clips:
      raise ValueError(_nothing_found(self._root))
    if "" in clips:
      raise ValueError(
        f"{len(clips[''])} pictures lie in {self._root} itself, e.g. {clips[''][0]}; put the "
        "frames of each clip into a folder of its own, or use folder:PATH for still pictures"
      )
    names = sorted(clips)
    tops = [n.split(os.sep, 1)[0] if os.sep in n else "" for n in names]
    self.class_names, self.num_classes, self.labels = _classes(tops)
    frames = [frame for n in names for frame in sorted(clips[n], key=_natural)]
    self._paths = np.array([os.fsencode(p) for p in frames])
    self._ends = np.cumsum([len(clips[n]) for n in names])

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, i: int) -> dict[str, Any]:
    end = self._ends[i]
    paths = self._paths[self._ends[i - 1] if i else 0 : end]
    frames = tuple(os.path.join(self._root, os.fsdecode(p)) for p in paths)
    return {"image": frames[len(frames) // 2], "frames": frames, "label": int(self.labels[i])}

  def __repr__(self) -> str:
    return f"ClipSource({self._root!r}, split={self._split!r}, {_size(self)})"


class TfdsSource:
  """A split of a prepared TFDS set in ArrayRecord format, pictures still encoded."""

  def __init__(self, name: str, *, split: str, data_dir: str = ""):
    import tensorflow_datasets as tfds

    self._reopen = functools.partial(TfdsSource, name, split=split, data_dir=data_dir)
    builder = _prepared_builder(name, data_dir)
    split = find_split(split, tuple(builder.info.splits), where=f"tfds:{name}")
    features = builder.info.features
    self._image, self._label = _feature_names(features, name)
    decoders = dict.fromkeys(_images(features), tfds.decode.SkipDecoding())
    self._records = builder.as_data_source(split=split, decoders=decoders)
    self._name = f"{builder.info.full_name}, split={split!r}"
    label = features[self._label] if self._label else None
    self.num_classes = getattr(label, "num_classes", None)
    names = label.names if self.num_classes and label.names else range(self.num_classes or 0)
    self.class_names = tuple(str(n) for n in names)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._example(self._records[i])

  def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
    return [self._example(record) for record in self._records.__getitems__(positions)]

  def _example(self, record: dict[str, Any]) -> dict[str, Any]:
    return {"image": record[self._image], "label": int(record[self._label]) if self._label else -1}

  def __reduce__(self):
    return self._reopen, ()  # TFDS' own objects pickle for some builders only

  def __repr__(self) -> str:
    return f"TfdsSource({self._name}, {_size(self)})"


def _size(source: Source) -> str:
  return f"num_examples={len(source)}, num_classes={source.num_classes}"


def find_split(split: str, available: tuple[str, ...], *, where: str) -> str:
  """`split`, or what stands for it in `available`; a slice such as train[:90%] is kept."""
  base, bracket, rest = split.partition("[")
  candidates = (base, *_HELD_OUT) if base in _HELD_OUT else (base,)
  for candidate in candidates:
    if candidate in available:
      return candidate + bracket + rest
  raise ValueError(f"{where} has no split {base!r}; it has: {', '.join(available)}")


def _split_folder(path: str, split: str) -> str:
  known = ("train", *_HELD_OUT)
  available = tuple(s for s in (*known, split) if os.path.isdir(os.path.join(path, s)))
  if available or split != "train":
    return os.path.join(path, find_split(split, available or ("train (all of it)",), where=path))
  return path


def _existing(path: str, kind: str) -> str:
  path = os.path.abspath(os.path.expanduser(path))
  if not os.path.isdir(path):
    raise FileNotFoundError(f"no folder {path}; give {kind}:PATH with an existing PATH")
  return path


def _classes(tops: list[str]) -> tuple[tuple[str, ...], int | None, np.ndarray]:
  """Names, number and labels [N] of examples in the folders `tops`; no labels if one is in none."""
  if "" in tops:
    return (), None, np.full(len(tops), -1, np.int32)
  names, labels = np.unique(tops, return_inverse=True)
  return tuple(names.tolist()), len(names), labels.astype(np.int32)


def _natural(name: str) -> tuple[list[Any], str]:
  """Sorts numbers in a name as numbers; the name itself parts frame1 from frame01."""
  parts = re.split("([0-9]+)", name)
  return [int(p) if i % 2 else p for i, p in enumerate(parts)], name


def _pictures(root: str, below: str = "", *, folders_need_some: bool = False) -> list[str]:
  """Paths of all pictures, relative to root."""
  found = []
  with os.scandir(os.path.join(root, below)) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      path = os.path.join(below, entry.name)
      if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
        found.append(path)
      elif entry.is_dir():
        found.extend(_pictures(root, path, folders_need_some=folders_need_some))
  if folders_need_some and below and not found:
    raise ValueError(
      f"the clip {os.path.join(root, below)} has no frames; remove the folder, or put pictures "
      f"into it, ending in {' '.join(EXTENSIONS)}"
    )
  return found


def _nothing_found(root: str) -> str:
  files = [name for _, _, names in os.walk(root) for name in names]
  counts = collections.Counter(os.path.splitext(f)[1].lower() or "no extension" for f in files)
  found = ", ".join(f"{n} x {extension}" for extension, n in sorted(counts.items())) or "no files"
  return f"no pictures in {root}: found {found}; expected files ending in {' '.join(EXTENSIONS)}"


def _prepared_builder(name: str, data_dir: str):
  """The TFDS builder, or an error at once: TFDS itself would first try to download for minutes."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError as e:
    raise ValueError(_unknown_tfds(name, tfds)) from e
  except AssertionError as e:  # TFDS' way to refuse a version
    raise ValueError(str(e)) from e
  option = f" --data_dir={data_dir}" if data_dir else ""
  prepare = f"python -m ssrl_jax.data.prepare_tfds {name}{option}"
  if not builder.is_prepared():
    raise FileNotFoundError(
      f"tfds:{name} is not prepared in {builder.data_path}. Prepare it once, with TensorFlow:\n"
      f"  pip install 'ssrl_jax[prepare]'\n  {prepare}"
    )
  formats = sorted(f.value for f in builder.info.available_file_formats())
  if "array_record" not in formats:
    raise ValueError(
      f"tfds:{name} in {builder.data_path} is prepared as {', '.join(formats)}, without random "
      "access; prepare it as array_record in another folder:\n"
      f"  python -m ssrl_jax.data.prepare_tfds {name} --data_dir=ANOTHER_FOLDER"
    )
  return builder


def _unknown_tfds(name: str, tfds) -> str:
  import difflib

  base = name.partition("/")[0].partition(":")[0]
  known = tfds.list_builders(with_community_datasets=False)
  near = difflib.get_close_matches(base, known, n=3)
  hint = f"; nearest: {', '.join(near)}" if near else ""
  return f"TensorFlow Datasets has no data set {base!r}{hint}"


def _images(features: Any) -> list[str]:
  import tensorflow_datasets as tfds

  return [k for k, f in features.items() if isinstance(f, tfds.features.Image)]


def _feature_names(features: Any, name: str) -> tuple[str, str | None]:
  """Names of the picture and, if there is one, of the label."""
  import tensorflow_datasets as tfds

  images = _images(features)
  labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  image = "image" if "image" in images else images[0] if len(images) == 1 else None
  label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
  if image is None or (labels and label is None):
    raise ValueError(
      f"tfds:{name} needs one picture and at most one label, or those named 'image' and 'label'; "
      f"it has pictures {images} and labels {labels} among the features {sorted(features)}"
    )
  return image, label
