"""`digit_scenes`: real handwriting on invented backgrounds, embedded, no download.

Every scene shows ONE labelled digit of scikit-learn's 1,797 handwritten ones (8x8 cells, 17 grey
levels; Alpaydin & Kaynak 1998, UCI optdigits) at a random place, scale, rotation and colour. Behind
it lie texture and distractors: loose strokes and halves of other digits. Scenes have boxes and
masks, so that every evaluation has something to measure on a machine that was never online.

The scenes are made so that a few minutes on a CPU show whether a method learns: the digit is always
paler than its ground, and the clutter differs from the ground in colour more than in level. Raw
pixels and untrained encoders are disturbed by that; a reader is not, nor is an encoder that has
learnt from mostly grey views what stays when colours go. It is no benchmark of anything else.

A scene is a pure function of (seed, split, index): NumPy's Philox generator is keyed with seed and
split and its counter starts at the index, so no scene depends on another. The layout does not
depend on the size in pixels. On another kind of processor a pixel may round to the next level.

Train and test hold different people's handwriting. The file does not name its writers, but its
labels repeat one form block after block, and digits resemble those of their own block most. The
split is cut where a block begins, after 72 % of the file.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = ("train", "test")
CLASS_NAMES = tuple("0123456789")
FIRST_TEST_DIGIT = 1287  # position in the file; the form begins 0123456789 0123456789 here again
SIZES = (16, 128)  # smallest legible scene; largest without visible atlas pixels
CACHE_BYTES = 2**30  # a larger set of scenes is rendered anew at every access

# Lengths are fractions of the scene's side, levels are luminances in [0, 1], angles are radians.
SIDE = (0.4, 0.65)  # of the digit's 8 cells
ANGLE = 0.2  # at most, either way; beyond a right angle 6 and 9 would be the same
GROUND_LEVEL = (0.2, 0.45)
PAINT_LEVEL = (0.75, 0.95)  # of the digit
VIVID = (0.5, 1)  # strength of a colour, of the most that its level allows
SHADING = 0.1  # amplitude in level: of blobs and a slope together, and half as much of stripes
NUM_STROKES, NUM_FRAGMENTS = 3, 2
CLUTTER_CONTRAST = 0.08  # in level, of strokes and fragments against the ground
NOISE = 0.05
MIN_INK = 0.1  # fainter coverage is not painted: the mask is then all that the digit touches

CELL = 10  # atlas pixels to a cell, so that nearest look-up is off by at most 1/20 of a cell
ATLAS = 10 * CELL  # side of an atlas picture: 8 cells and an empty rim, where look-ups may end
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


class Scene(NamedTuple):
  image: np.ndarray  # uint8 [S, S, 3]
  label: int  # 0 to 9
  box: np.ndarray  # float32 [4]: xmin ymin xmax ymax in pixels, max exclusive, tight around mask
  mask: np.ndarray  # bool [S, S]: the pixels that the digit paints


class DigitScenes:
  """Random access to the first `num_examples` scenes of a split, kept in memory once rendered."""

  num_classes = len(CLASS_NAMES)
  class_names = CLASS_NAMES

  def __init__(self, *, split: str, size: int = 32, num_examples: int, seed: int = 0):
    """See `scene`; another seed gives other scenes of the same handwriting."""
    if num_examples < 1:
      raise ValueError(f"num_examples is {num_examples}, but a data set needs at least one")
    _check(seed, num_examples - 1, split, size)
    self.split, self.size, self.num_examples, self.seed = split, size, num_examples, seed
    self._cache = None

  def __len__(self) -> int:
    return self.num_examples

  def __repr__(self) -> str:
    return (
      f"DigitScenes(split={self.split!r}, size={self.size}, "
      f"num_examples={self.num_examples}, seed={self.seed})"
    )

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_cache": None}  # workers render for themselves

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{"image": uint8 [S, S, 3], "label": int}; the image is the caller's own copy."""
    index = self._position(index)
    if self.num_examples * self.size**2 * 3 > CACHE_BYTES:
      drawn = self.scene(index)
      return {"image": drawn.image, "label": drawn.label}
    images, labels = self._cache or self._allocate()
    if labels[index] < 0:
      drawn = self.scene(index)
      images[index] = drawn.image
      labels[index] = drawn.label  # last: another thread must not see a label without its image
    return {"image": images[index].copy(), "label": int(labels[index])}

  def name(self, index: int) -> str:
    return f"scene {self._position(index)}"

  def scene(self, index: int) -> Scene:
    """Example `index` with its box and mask, rendered anew."""
    return scene(self.seed, self._position(index), split=self.split, size=self.size)

  def _position(self, index: int) -> int:
    index = operator.index(index)
    if not 0 <= index < self.num_examples:
      raise IndexError(f"index {index} is outside of {self!r}")
    return index

  def _allocate(self) -> tuple[np.ndarray, np.ndarray]:
    images = np.zeros((self.num_examples, self.size, self.size, 3), np.uint8)
    self._cache = images, np.full(self.num_examples, -1, np.int8)
    return self._cache


def scene(seed: int, index: int, *, split: str, size: int = 32) -> Scene:
  """Scene `index` of `split`, `size` pixels square; seed and index may be anything below 2^64."""
  ground, ink, paint, noise, label = _layers(seed, index, split, size)
  image = ground + ink[..., None] * (paint - ground)
  mask = ink > 0
  return Scene(_develop(image, noise), label, _box(mask), mask)


def backdrop(seed: int, index: int, *, split: str, size: int = 32) -> np.ndarray:
  """The same picture without its digit, uint8 [S, S, 3]: equal to the scene outside of its mask."""
  ground, _, _, noise, _ = _layers(seed, index, split, size)
  return _develop(ground, noise)


def _layers(
  seed: int, index: int, split: str, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
  """Ground [S, S, 3], the digit's coverage [S, S] and paint [1, 1, 3], noise [S, S, 3], label."""
  _check(seed, index, split, size)
  glyphs, members = _atlas(split)
  rng = np.random.Generator(
    np.random.Philox(
      key=np.array([seed, SPLITS.index(split)], np.uint64),
      counter=np.array([0, index, 0, 0], np.uint64),  # 2^64 blocks of numbers for each scene
    )
  )
  level = _between(rng, *GROUND_LEVEL)
  ground = _texture(rng, level, size)
  for _ in range(NUM_STROKES):
    _blend(ground, _stroke(rng, size), _clutter_colour(rng, level))
  for _ in range(NUM_FRAGMENTS):
    _blend(ground, _fragment(rng, _choice(rng, glyphs), size), _clutter_colour(rng, level))
  label = int(rng.random() * len(CLASS_NAMES))
  ink = _digit(rng, glyphs[_choice(rng, members[label])], size)
  paint = _colour(rng, _between(rng, *PAINT_LEVEL))
  noise = NOISE * (2 * rng.random((size, size, 3), dtype=np.float32) - 1)  # last: depends on size
  return ground, ink, paint, noise, label


def _develop(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
  return (np.clip(image + noise, 0, 1) * 255 + 0.5).astype(np.uint8)


def _box(mask: np.ndarray) -> np.ndarray:
  columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


# --- the parts of a scene: each draws its own numbers, the same count at every size ---


def _between(rng: np.random.Generator, low: float, high: float) -> float:
  return low + (high - low) * rng.random()


def _choice(rng: np.random.Generator, items: np.ndarray) -> np.ndarray:
  return items[int(rng.random() * len(items))]


def _colour(rng: np.random.Generator, level: float) -> np.ndarray:
  """A random colour [1, 1, 3] of luminance `level`, as vivid as that level allows or less."""
  rgb = rng.random(3).tolist()  # three numbers: plain Python is faster than NumPy
  own_level = sum(weight * value for weight, value in zip(LUMINANCE, rgb))
  tint = [value - own_level for value in rgb]
  room = min((1 - level if t > 0 else level) / max(abs(t), 1e-6) for t in tint)
  strength = room * _between(rng, *VIVID)
  return np.array([[[level + strength * t for t in tint]]], np.float32)


def _clutter_colour(rng: np.random.Generator, level: float) -> np.ndarray:
  return _colour(rng, level + _between(rng, -CLUTTER_CONTRAST, CLUTTER_CONTRAST))


def _blend(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
  image += coverage[..., None] * (colour - image)


def _texture(rng: np.random.Generator, level: float, size: int) -> np.ndarray:
  """Two colours that run into each other, shaded by blobs, a slope and stripes: [S, S, 3]."""
  x, y = _coordinates(size)
  angle, phase, cycles = math.pi * rng.random(), rng.random(), _between(rng, 2, 6)
  turns = (x * math.cos(angle) + y * math.sin(angle)) * cycles + phase
  stripes = 4 * np.abs(turns - np.floor(turns) - 0.5) - 1
  tent = _tent(size, 5)
  blobs = tent @ (2 * rng.random((5, 5), dtype=np.float32) - 1) @ tent.T
  slope = (x - 0.5) * _between(rng, -1, 1) + (y - 0.5) * _between(rng, -1, 1)
  weights = rng.random(3).tolist()  # NumPy's own float64 would widen all that follows
  shade = weights[0] * blobs + weights[1] * slope + 0.5 * weights[2] * stripes
  mix = np.clip(0.5 + 2 * slope + blobs + 0.5 * weights[2] * stripes, 0, 1)
  first, second = _colour(rng, level), _colour(rng, level)
  return first + mix[..., None] * (second - first) + SHADING * shade[..., None]


def _stroke(rng: np.random.Generator, size: int) -> np.ndarray:
  """Coverage [S, S] of a straight line with round ends."""
  x, y = _coordinates(size)
  x, y = x - rng.random(), y - rng.random()
  angle, length, radius = (
    2 * math.pi * rng.random(),
    _between(rng, 0.15, 0.5),
    _between(rng, 0.02, 0.05),
  )
  along = np.clip(x * math.cos(angle) + y * math.sin(angle), 0, length)
  distance = np.sqrt((x - along * math.cos(angle)) ** 2 + (y - along * math.sin(angle)) ** 2)
  return np.clip((radius - distance) * size + 0.5, 0, 1)


def _fragment(rng: np.random.Generator, glyph: np.ndarray, size: int) -> np.ndarray:
  """Coverage [S, S] of the upper half of a small digit, turned anyhow and perhaps cut off."""
  side, angle = _between(rng, 0.3, 0.45), 2 * math.pi * rng.random()
  ink, row = _look_up(glyph, rng.random(), rng.random(), side, angle, size)
  return np.where(row < ATLAS // 2, ink, 0)


def _digit(rng: np.random.Generator, glyph: np.ndarray, size: int) -> np.ndarray:
  """Coverage [S, S] of the labelled digit, wholly inside the scene."""
  side, angle = _between(rng, *SIDE), _between(rng, -ANGLE, ANGLE)
  reach = side / 2 * (math.cos(angle) + math.sin(abs(angle)))
  centre_x, centre_y = _between(rng, reach, 1 - reach), _between(rng, reach, 1 - reach)
  ink, _ = _look_up(glyph, centre_x, centre_y, side, angle, size)
  return np.where(ink < MIN_INK, 0, ink)


def _look_up(
  glyph: np.ndarray, centre_x: float, centre_y: float, side: float, angle: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """A glyph's coverage at every pixel of the scene, and the row of the atlas it came from."""
  x, y = _coordinates(size)
  x, y = x - centre_x, y - centre_y
  scale = 8 * CELL / side
  cos, sin = scale * math.cos(angle), scale * math.sin(angle)
  column = np.clip(x * cos + y * sin + ATLAS / 2, 0, ATLAS - 1).astype(np.intp)
  row = np.clip(y * cos - x * sin + ATLAS / 2, 0, ATLAS - 1).astype(np.intp)
  return glyph.take(row * ATLAS + column) * np.float32(1 / 255), row


@functools.lru_cache(maxsize=8)
def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
  """x [1, S] and y [S, 1] of the pixel centres, in (0, 1)."""
  centres = (np.arange(size, dtype=np.float32) + 0.5) / size
  return centres.reshape(1, size), centres.reshape(size, 1)


@functools.lru_cache(maxsize=8)
def _tent(size: int, knots: int) -> np.ndarray:
  """[S, knots]: the weights of linear interpolation between evenly spaced knots."""
  position = _coordinates(size)[1] * (knots - 1)
  return np.maximum(0, 1 - np.abs(position - np.arange(knots, dtype=np.float32).reshape(1, knots)))


@functools.lru_cache(maxsize=len(SPLITS))
def _atlas(split: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """The split's handwriting: coverage uint8 [N, ATLAS * ATLAS] and, by label, positions in it."""
  digits = load_digits()
  part = slice(FIRST_TEST_DIGIT) if split == "train" else slice(FIRST_TEST_DIGIT, None)
  cells = np.pad(digits.images[part] / 16, ((0, 0), (1, 1), (1, 1))).astype(np.float32)
  glyphs = np.empty((len(cells), ATLAS * ATLAS), np.uint8)
  for glyph, picture in zip(glyphs, cells):
    ink = np.asarray(Image.fromarray(picture).resize((ATLAS, ATLAS), Image.Resampling.BICUBIC))
    glyph[:] = (np.clip(2.5 * (ink - 0.4), 0, 1) * 255 + 0.5).ravel()  # firm edges, open loops
  target = digits.target[part]
  return glyphs, tuple(np.flatnonzero(target == label) for label in range(len(CLASS_NAMES)))


def _check(seed: int, index: int, split: str, size: int) -> None:
  if split not in SPLITS:
    raise ValueError(f"digit_scenes has no split {split!r}; it has {' and '.join(SPLITS)}")
  if not SIZES[0] <= size <= SIZES[1]:
    raise ValueError(f"size is {size}, but digit_scenes are {SIZES[0]} to {SIZES[1]} pixels square")
  for name, value in (("seed", seed), ("index", index)):
    if not 0 <= value < 2**64:
      raise ValueError(f"{name} is {value}, expected 0 to 2^64 - 1")
