"""Many small pictures on one, to look at a set."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ssrl_jax.data.decode import DamagedImage, decode_pixels
from ssrl_jax.data.sources import Source, labels_of

TILE, GAP = 96, 4  # pixels
COLUMNS, ROWS = 10, 16  # at most
NAME = 140  # pixels to the left of a row, for the name of its class
PAPER, INK, MISSING = (255, 255, 255), (0, 0, 0), (200, 0, 0)


def contact_sheet(source: Source) -> Image.Image:
  """A row for each class (of many classes some, spread evenly), or any pictures; red: damaged."""
  rows = _rows(source)
  left = NAME if source.class_names else 0
  size = (left + GAP + COLUMNS * (TILE + GAP), GAP + len(rows) * (TILE + GAP))
  sheet = Image.new("RGB", size, PAPER)
  draw = ImageDraw.Draw(sheet)
  for row, (name, ids) in enumerate(rows):
    top = GAP + row * (TILE + GAP)
    # Pillow's own font has no letters beyond Latin-1.
    label = name.encode("latin-1", "replace").decode("latin-1")
    draw.text((GAP, top + TILE // 2 - 6), label[:22], fill=INK)
    for column, i in enumerate(ids):
      sheet.paste(_tile(source, i), (left + GAP + column * (TILE + GAP), top))
  return sheet


def _rows(source: Source) -> list[tuple[str, list[int]]]:
  if not source.class_names:
    ids = _spread(np.arange(len(source)), COLUMNS * ROWS)
    return [("", ids[k : k + COLUMNS]) for k in range(0, len(ids), COLUMNS)]
  labels = labels_of(source)
  classes = _spread(np.unique(labels[labels >= 0]), ROWS)
  return [(source.class_names[k], _spread(np.flatnonzero(labels == k), COLUMNS)) for k in classes]


def _spread(values: np.ndarray, count: int) -> list[int]:
  """At most `count` of the values, at even distances."""
  count = min(count, len(values))
  return [int(values[k * len(values) // count]) for k in range(count)]


def _tile(source: Source, i: int) -> Image.Image:
  try:
    picture = Image.fromarray(decode_pixels(source[i]["image"], TILE))
  except DamagedImage:
    return Image.new("RGB", (TILE, TILE), MISSING)
  tile = Image.new("RGB", (TILE, TILE), PAPER)
  factor = TILE / max(picture.size)
  if (
    factor >= 2
  ):  # small pictures are enlarged by whole steps, so that their pixels stay to be seen
    picture = picture.resize([s * int(factor) for s in picture.size], Image.Resampling.NEAREST)
  tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
  return tile
