"""`digit_scenes`: real handwriting on invented backgrounds, embedded, no download."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_CLASSES = 10
SPLITS = ("train", "test")
FIRST_TEST_DIGIT = 1287
GRID = 100
CELL = 10
SIDE = (0.45, 0.7)
DARK = 0.5
STROKES = 2
FRAGMENTS = 1
CHROMA = 0.6
FINE = 0.08
COARSE = 0.2
ANGLE = 0.3
NOISE = 0.05
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Scene(NamedTuple):
  image: np.ndarray
  label: int
  box: np.ndarray
  mask: np.ndarray


def scene(seed: int, index: int, *, split: str, size: int = 32) -> Scene:
  clutter, ink, paint, noise, label = _layers(seed, index, split, size)
  image = clutter + ink[..., None] * (paint - clutter)
  mask = ink > 0
  return Scene(_develop(image, noise), label, _box(mask), mask)


def backdrop(seed, index, *, split, size=32):
  clutter, _, _, noise, _ = _layers(seed, index, split, size)
  return _develop(clutter, noise)


def _layers(seed, index, split, size):
  counter = np.array([0, index, 0, 0], np.uint64)
  rng = np.random.Generator(np.random.Philox(key=np.array([seed, SPLITS.index(split)], np.uint64), counter=counter))
  atlas, by_class = _atlas(split)
  flip = rng.random() < DARK
  level = _between(rng, 0.15, 0.4)
  clutter = _texture(rng, level, size)
  for _ in range(STROKES):
    _blend(clutter, _stroke(rng, size), _colour(rng, level + _between(rng, -0.2, 0.2)))
  for _ in range(FRAGMENTS):
    glyph = atlas[int(rng.random() * len(atlas))]
    ink = _ink(rng, glyph, (0.3, 0.45), 3.14, size, half=True)
    _blend(clutter, ink, _colour(rng, level + _between(rng, -0.2, 0.2)))
  label = int(rng.random() * NUM_CLASSES)
  members = by_class[label]
  glyph = atlas[members[int(rng.random() * len(members))]]
  ink = _ink(rng, glyph, SIDE, ANGLE, size)
  ink = np.where(ink < 0.1, 0, ink)
  paint = _colour(rng, _between(rng, 0.75, 0.95))
  noise = NOISE * (rng.random((size, size, 3), dtype=np.float32) * 2 - 1)
  if flip:
    clutter, paint = 1 - clutter, 1 - paint
  return clutter, ink, paint, noise, label


def _between(rng, low, high):
  return low + (high - low) * rng.random()


def _colour(rng, luminance):
  rgb = rng.random(3).astype(np.float32)
  return np.clip(luminance + CHROMA * (rgb - LUMA @ rgb), 0, 1).astype(np.float32)


def _blend(image, ink, colour):
  image += ink[..., None] * (colour - image)


@functools.lru_cache(4)
def _coords(size):
  return ((np.arange(size, dtype=np.float32) + 0.5) / size).reshape(1, -1)


@functools.lru_cache(4)
def _tent(size, knots):
  position = _coords(size).reshape(-1, 1) * (knots - 1)
  return np.maximum(0, 1 - np.abs(position - np.arange(knots).reshape(1, -1))).astype(np.float32)


def _texture(rng, level, size):
  x, y = _coords(size), _coords(size).T
  angle, phase, cycles = 3.1416 * rng.random(), rng.random(), _between(rng, 2, 6)
  t = (x * math.cos(angle) + y * math.sin(angle)) * cycles + phase
  stripes = 4 * np.abs(t - np.floor(t) - 0.5) - 1
  knots = _tent(size, 5)
  blobs = knots @ (2 * rng.random((5, 5), dtype=np.float32) - 1) @ knots.T
  gx, gy = 2 * rng.random(2) - 1
  slope = (x - 0.5) * gx + (y - 0.5) * gy
  w = rng.random(3)
  field = COARSE * (w[0] * 1.5 * blobs + w[1] * 1.5 * slope) + FINE * w[2] * stripes
  a, b = _colour(rng, level), _colour(rng, level)
  mix = np.clip(0.5 + 2 * slope + blobs, 0, 1).astype(np.float32)
  return (a + mix[..., None] * (b - a) + field[..., None]).astype(np.float32)


def _stroke(rng, size):
  x, y = _coords(size), _coords(size).T
  x0, y0, angle, length, width = rng.random(5)
  angle, length, width = 6.2832 * angle, 0.15 + 0.35 * length, 0.02 + 0.03 * width
  dx, dy = math.cos(angle), math.sin(angle)
  along = np.clip((x - x0) * dx + (y - y0) * dy, 0, length)
  gap = np.sqrt((x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2)
  return np.clip((width - gap) * size + 0.5, 0, 1).astype(np.float32)


def _ink(rng, glyph, side_range, max_angle, size, half=False):
  u = rng.random(4)
  side = side_range[0] + (side_range[1] - side_range[0]) * u[0]
  angle = max_angle * (2 * u[1] - 1)
  c, s = math.cos(angle), math.sin(angle)
  room = max(0, 1 - side * (abs(c) + 0.6 * abs(s)))
  cx, cy = 0.5 + room * (u[2] - 0.5), 0.5 + room * (u[3] - 0.5)
  if half:
    cx, cy = u[2], u[3]
  x, y = _coords(size) - cx, _coords(size).T - cy
  k = 8 * CELL / side
  col = np.clip((c * x + s * y) * k + GRID / 2, 0, GRID - 1).astype(np.intp)
  row = np.clip((c * y - s * x) * k + GRID / 2, 0, GRID - 1).astype(np.intp)
  ink = glyph.take(row * GRID + col)
  if half:
    ink = np.where(row < GRID // 2, ink, 0)
  return ink.astype(np.float32) / 255


def _develop(image, noise):
  return (np.clip(image + noise, 0, 1) * 255 + 0.5).astype(np.uint8)


def _box(mask):
  cols, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
  return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], np.float32)


@functools.lru_cache(2)
def _atlas(split):
  data = load_digits()
  part = slice(0, FIRST_TEST_DIGIT) if split == "train" else slice(FIRST_TEST_DIGIT, None)
  digits, labels = data.images[part] / 16, data.target[part]
  atlas = []
  for cells in np.pad(digits, ((0, 0), (1, 1), (1, 1))).astype(np.float32):
    fine = np.asarray(Image.fromarray(cells).resize((GRID, GRID), Image.Resampling.BICUBIC))
    atlas.append((np.clip((fine - 0.4) / 0.4, 0, 1) * 255 + 0.5).astype(np.uint8).ravel())
  return np.stack(atlas), [np.flatnonzero(labels == c) for c in range(NUM_CLASSES)]
