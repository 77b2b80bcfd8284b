"""Where pictures come from: random-access sources of `{"image", "label"}`, opened by name.

`open_source` has the list of kinds; docs/data.md says what each expects on the disk.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ssrl_jax.data.arrayrecord import ArrayRecordSource
from ssrl_jax.data.cifar import CifarSource
from ssrl_jax.data.decode import DamagedImage
from ssrl_jax.data.folders import ClipSource, FolderSource
from ssrl_jax.data.hf import HfSource
from ssrl_jax.data.listing import describe, find_split, locate
from ssrl_jax.data.tar import TarSource
from ssrl_jax.data.tfds_source import TfdsSource

_NUM_SCENES = {"train": 8192, "test": 2048}  # of digit_scenes, unless a limit says otherwise


class Source(Protocol):
  """Pictures by position. Picklable, since worker processes read it, with a stable repr.

  Where all labels are known without reading pictures there is also `labels`, int32 [N]. A source
  that reads many at once faster has read_together(positions) -> {position: example}, too. What it
  leaves out is read one by one; so are all where it raises DamagedImage.
  """

  num_classes: int | None  # None: no labels
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> dict[str, Any]:
    """{"image": whatever `decode` takes, "label": int in [0, num_classes) or -1 when unknown}.

    A clip has beside them "frames", a tuple of what `decode` takes; its "image" is the middle one.

    Raises:
      DamagedImage: the picture's bytes cannot be had.
    """
    ...

  def name(self, i: int) -> str:
    """What a person would look for: a path within a folder, a member of an archive."""
    ...


def open_source(
  name: str,
  *,
  split: str,
  size: int = 32,
  data_dir: str = "",
  limit: int = 0,
  seed: int = 0,
  mixture: Sequence[str] = (),
) -> Source:
  """Opens `tfds:NAME`, `folder:PATH`, `clips:PATH`, `arrayrecord:PATH`, `tar:PATH`, `hf:PATH`,
  `cifar:PATH`, `digit_scenes` or `mixture`.

  Args:
    name: which; `tfds:` takes what TFDS takes, e.g. `tfds:cifar10` or `tfds:NAME/CONFIG:VERSION`;
      `arrayrecord:`, `tar:` and `hf:` a folder or a pattern of files.
    split: "train", or the held-out part, where test, val, validation and valid stand for one
      another when only one is there. TFDS slices such as "train[:90%]" work for `tfds:`.
    size: side of the scenes in pixels. Only for `digit_scenes`.
    data_dir: where TFDS keeps its prepared sets; empty: TFDS' own default. Only for `tfds:`.
    limit: this many examples, drawn with `seed`; 0: all (`digit_scenes`, which has no end: 8,192
      of train, 2,048 of test).
    seed: of the draw, and of the scenes.
    mixture: names of the sources that `mixture` puts one behind the other.
  """
  kind, _, rest = name.partition(":")
  if limit < 0:
    raise ValueError(f"limit {limit} of {name} is negative; 0 = all")
  kinds = {
    "tfds:NAME": lambda: TfdsSource(rest, split=split, data_dir=data_dir),
    "folder:PATH": lambda: FolderSource(rest, split=split),
    "clips:PATH": lambda: ClipSource(rest, split=split),
    "arrayrecord:PATH": lambda: ArrayRecordSource(rest, split=split),
    "tar:PATH": lambda: TarSource(rest, split=split),
    "hf:PATH": lambda: HfSource(rest, split=split),
    "cifar:PATH": lambda: CifarSource(rest, split=split),
    "digit_scenes": lambda: _digit_scenes(split, size, limit, seed),
    "mixture": lambda: Mixture(
      [open_source(n, split=split, size=size, data_dir=data_dir, seed=seed) for n in mixture]
    ),
  }
  form = next((f for f in kinds if f.split(":")[0] == kind and (":" in f) == bool(rest)), None)
  if form is None:
    raise ValueError(f"unknown data source {name!r}; expected {', '.join(map(repr, kinds))}")
  if "[" in split and kind not in ("tfds", "mixture"):
    raise ValueError(f"split {split!r} of {name}: only tfds: has slices; give a limit instead")
  source = kinds[form]()
  return Subset(source, limit, seed=seed) if limit and kind != "digit_scenes" else source


def _digit_scenes(split: str, size: int, limit: int, seed: int) -> Source:
  from ssrl_jax.data.digits import DigitScenes

  split = find_split(split, tuple(_NUM_SCENES), where="digit_scenes")
  return DigitScenes(split=split, size=size, num_examples=limit or _NUM_SCENES[split], seed=seed)


def check_same_classes(train: Source, test: Source) -> None:
  """Raises unless a label means the same in both sources."""
  if train.num_classes == test.num_classes and train.class_names == test.class_names:
    return
  for one, other in ((train, test), (test, train)):
    if one.num_classes is None:
      raise ValueError(
        f"{one!r} has no labels, and {other!r} has; give both the same classes, or neither any"
      )
  only_train = [c for c in train.class_names if c not in test.class_names]
  only_test = [c for c in test.class_names if c not in train.class_names]
  raise ValueError(
    f"labels differ between {train!r} and {test!r}: classes only in the first: {only_train}, only "
    f"in the second: {only_test}; give both the same class names in the same order"
  )


@functools.lru_cache(maxsize=1)
def labels_of(source: Source) -> np.ndarray:
  """The label of every example, int32 [N]; where `labels` is missing all are read through, once."""
  if hasattr(source, "labels"):
    return source.labels
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
  whole = source.whole if isinstance(source, Subset) else source
  for part in whole.parts if isinstance(whole, Mixture) else (whole,):
    if (frames > 1 or span) and not has_frames(part):
      raise ValueError(
        f"data.frames is {frames} and data.frame_span {span}, but {part!r} has still pictures; set "
        "them to 1 and 0, or give data.source=clips:PATH"
      )


def has_frames(source: Source) -> bool:
  """Whether its examples are clips, by the first that can be read."""
  for i in range(len(source)):
    with contextlib.suppress(DamagedImage):
      return "frames" in source[i]
  return False


def read_together(source: Source, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
  """{position: example} of those that the source reads faster at once; often of none."""
  if not len(positions) or not hasattr(source, "read_together"):
    return {}  # a process's share of the last batch may be empty
  return source.read_together(positions)


class NoPictures:
  """Of a run whose own pictures are not looked at."""

  num_classes, class_names = None, ()

  def __len__(self) -> int:
    return 0

  def __repr__(self) -> str:
    return "NoPictures()"


class Part:
  """A source's examples of these positions."""

  def __init__(self, source: Source, positions: np.ndarray):
    self.whole, self.positions = source, positions
    self.num_classes, self.class_names = source.num_classes, source.class_names
    for known in ("labels", "origins"):
      if hasattr(source, known):
        setattr(self, known, getattr(source, known)[self.positions])

  def __len__(self) -> int:
    return len(self.positions)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self.whole[int(self.positions[i])]

  def read_together(self, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    inner = dict(zip(self.positions[np.asarray(positions)].tolist(), positions))
    return {inner[i]: x for i, x in read_together(self.whole, list(inner)).items()}

  def name(self, i: int) -> str:
    return self.whole.name(int(self.positions[i]))

  def __repr__(self) -> str:
    return f"Part({self.whole!r}, {len(self)} from {self.positions[:1]})"


class Subset(Part):
  """`num_examples` of a source's examples, drawn with `seed`, in the source's order."""

  def __init__(self, source: Source, num_examples: int, *, seed: int):
    if num_examples > len(source):
      raise ValueError(
        f"{num_examples} examples are asked of {source!r}; lower data.num_train or data.num_test "
        "(or --limit), or 0 = all"
      )
    drawn = np.random.default_rng(seed).permutation(len(source))[:num_examples]
    super().__init__(source, np.sort(drawn))
    self._seed = seed

  def __repr__(self) -> str:
    return f"Subset({self.whole!r}, {len(self)}, seed={self._seed})"


class Mixture:
  """Several sources, one behind the other; `origins`, int32 [N], says of which each example is.

  Labelled only where all have the same classes. How often each source is drawn is for
  `sampling.make_sampling` to say.
  """

  def __init__(self, parts: Sequence[Source]):
    if not parts:
      raise ValueError("data.source is 'mixture' and data.mixture is empty; name its sources there")
    self.parts, self._ends = tuple(parts), np.cumsum([len(part) for part in parts])
    self.origins = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    classes = {(part.num_classes, part.class_names) for part in parts}
    self.num_classes, self.class_names = classes.pop() if len(classes) == 1 else (None, ())
    if self.num_classes is None:
      self.labels = np.full(len(self), -1, np.int32)
      if classes:
        logging.warning("%r: the classes of its sources differ, so nothing is labelled", self)
    elif all(hasattr(part, "labels") for part in parts):
      self.labels = np.concatenate([part.labels for part in parts])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    part, at = locate(self._ends, i)
    return self._labelled(self.parts[part][int(at)])

  def read_together(self, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    found = {}
    for k, part in enumerate(self.parts):
      start = int(self._ends[k]) - len(part)
      inner = [i - start for i in positions if start <= i < self._ends[k]]
      together = read_together(part, inner) if inner else {}
      found |= {start + i: self._labelled(x) for i, x in together.items()}
    return found

  def _labelled(self, example: dict[str, Any]) -> dict[str, Any]:
    return example if self.num_classes is not None else example | {"label": -1}

  def name(self, i: int) -> str:
    part, at = locate(self._ends, i)
    return self.parts[part].name(int(at))

  def __repr__(self) -> str:
    return f"Mixture({', '.join(map(repr, self.parts))}, {describe(self)})"
