"""Where an encoder looks: maps over test pictures, and how well they lie on masks of objects."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

from ssrl_jax import parallel
from ssrl_jax.data.dense import IGNORE, MaskSource, open_masks
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.method import Array, Features
from ssrl_jax.pixels import normalise

KINDS = ("attention", "similarity", "occlusion")
SCALE_TO = 96  # pixels: smaller pictures are enlarged on the sheet


class Sums(NamedTuple):
  """Over pictures; `masked` of them have a mask that is neither empty nor the whole picture."""

  entropy: float = 0.0
  pictures: int = 0
  hits: int = 0
  centre_hits: int = 0
  iou: float = 0.0
  area: float = 0.0
  masked: int = 0
  unmasked: int = 0


def run(
  evaluation: Evaluation,
  *,
  kind: str = "auto",
  source: str = "",
  split: str = "test",
  target: int = -1,
  num_test: int = 500,
  num_shown: int = 16,
  window: float = 0.25,
) -> dict[str, float]:
  """Maps of test pictures: a sheet of them, and figures of where they point.

  Args:
    kind: "attention": of the last block, mean over heads, of the class token on the patches (ViT)
      or of the pooling query (AttentionEncoder). "similarity": the cosine of each place of the
      coarsest map with the mean over all places. "occlusion" (Zeiler & Fergus 2014): 1 - cosine
      between the pooled vectors of the picture and of the picture with a grey square at that place.
      "auto": attention if the encoder has it, else occlusion. None takes a gradient.
    source: "masks:PATH", see `data.dense.MaskSource`; empty: the test pictures, without masks.
    split: of `source`.
    target: the class of the mask that is the object; -1: all but 0. 255, no class, is outside it.
    num_test: pictures, spread evenly; 0: all.
    num_shown: of them on the sheet: picture, map, and the mask's outline in white.
    window: side of the occluding square as a share of the view; it moves by half of it.

  Returns:
    attention/entropy: of the map, made to sum to 1, over log of its number of places; mean, in
      [0, 1]: 1 for an even map.
    attention/num_test: pictures that were read.
    With masks, over pictures whose mask is neither empty nor everything:
    attention/pointing: percent whose map, enlarged to the view, is highest inside the mask (Zhang
      et al. 2018, the pointing game, without their tolerance of 15 pixels).
    attention/iou: percent, mean: the highest places, as many pixels as the mask has, against it.
    attention/centre_pointing: percent whose middle lies in the mask: what no encoder gets too.
    attention/area: percent, mean share of the mask: what pointing at random gets.
    attention/masked, attention/unmasked: pictures that counted for these four, and that did not.
    attention.png in the evaluation's folder: the sheet.
  """
  if not 0 < window <= 1:
    raise ValueError(f"attention: window is {window}; expected a share above 0 and at most 1")
  pictures, masks = evaluation, None
  if source:
    opened = open_masks(source, split=split)
    found, found_masks = Pictures(opened), Masks(opened, target)
    pictures = dataclasses.replace(evaluation, test=found, cache={})
    masks = dataclasses.replace(evaluation, test=found_masks, cache={})
  compute = _maps_of(evaluation, kind, window)
  total = min(len(pictures.test), num_test or len(pictures.test))
  shown_at = set((np.arange(num_shown) * total // max(num_shown, 1)).tolist())
  sums, shown, number = Sums(), {}, 0
  views = pictures.views("test", limit=num_test)
  for (pixels_BHWC, _, rows), mask_BHW in zip(views, _mask_views(masks, num_test)):
    map_Bhw, fine_BHW = jax.device_get(compute(pixels_BHWC))
    for i in np.flatnonzero(rows.ids >= 0):
      if rows.counts[i]:
        mask_HW = None if mask_BHW is None else mask_BHW[i]
        sums = _add(sums, map_Bhw[i], fine_BHW[i], mask_HW)
        if number in shown_at:
          shown[int(rows.ids[i])] = fine_BHW[i], mask_HW
      number += 1
  if not sums.pictures:
    raise ValueError(f"none of the pictures of {pictures.test!r} can be read")
  if shown and (folder := evaluation.own_folder()):
    views_NHWC = pictures.pictures("test", list(shown))
    Image.fromarray(sheet(views_NHWC, *zip(*shown.values()))).save(folder / "attention.png")
  return _figures(sums, with_masks=bool(source))


def _maps_of(evaluation: Evaluation, kind: str, window: float) -> Callable[[Array], Any]:
  """pixels [B, S, S, 3] in [0, 1] -> map [B, h, w] and the map enlarged to [B, S, S]; float32."""
  size = evaluation.size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  encode = lambda weights, x: evaluation.apply(weights, x, False, None)[0]  # noqa: E731
  features = jax.eval_shape(encode, evaluation.weights, images)
  if kind == "auto":
    kind = "occlusion" if features.attention is None else "attention"
  if kind not in KINDS:
    raise ValueError(f"attention: kind is {kind!r}; expected 'auto' or one of {', '.join(KINDS)}")
  if kind == "attention" and features.attention is None:
    raise ValueError("this encoder has no attention; set evaluate.attention.kind to 'occlusion'")
  if kind == "similarity" and not features.maps:
    raise ValueError("this encoder has no maps; set evaluate.attention.kind to 'occlusion'")
  norm = functools.partial(normalise, mean=evaluation.mean, std=evaluation.std)

  @jax.jit
  def compute(weights, pixels_BHWC):
    images_BHWC = jax.vmap(norm)(pixels_BHWC)
    if kind == "occlusion":
      pooled = lambda x_BHWC: encode(weights, x_BHWC).pooled  # noqa: E731
      map_Bhw = occlusion_map(pooled, images_BHWC, window=window)
    else:
      maps = {"attention": attention_map, "similarity": similarity_map}
      map_Bhw = maps[kind](encode(weights, images_BHWC))
    fine_BHW = jax.image.resize(map_Bhw, (map_Bhw.shape[0], size, size), "bilinear")
    return jax.lax.with_sharding_constraint(
      (map_Bhw, fine_BHW), parallel.replicated(evaluation.mesh)
    )

  return functools.partial(compute, evaluation.weights)


def attention_map(features: Features) -> Array:
  """float32 [B, h, w], mean over heads; see `run`. What goes to class token and registers is cut.

  The patches are the last of the N tokens, and their grid is the finest map's that fits into N.
  Without a token before them, the mean over all queries is taken.
  """
  attention_BQN = jnp.mean(features.attention.astype(jnp.float32), axis=1)
  _, q, n = attention_BQN.shape
  grids = [x.shape[1:3] for x in features.maps.values() if x.shape[1] * x.shape[2] <= n]
  if not grids:
    raise ValueError(f"no map of the encoder has at most {n} places, as its attention has")
  h, w = max(grids, key=lambda grid: grid[0] * grid[1])
  alone = n == h * w and q > 1
  row_BN = jnp.mean(attention_BQN, axis=1) if alone else attention_BQN[:, 0]
  return row_BN[:, n - h * w :].reshape(-1, h, w)


def similarity_map(features: Features) -> Array:
  """float32 [B, h, w] in [-1, 1]: cosine of each place of the coarsest map with their mean."""
  x_BhwC = features.maps[max(features.maps)].astype(jnp.float32)
  return cosine(x_BhwC, jnp.mean(x_BhwC, axis=(1, 2), keepdims=True))


def occlusion_map(pooled: Callable[[Array], Array], images_BHWC: Array, *, window: float) -> Array:
  """float32 [B, n, n] in [0, 2]: 1 - cosine of the vectors with and without a grey square there.

  Grey is the mean colour, 0 after normalisation. The squares lie about half a window
  apart, their middles at those of n x n even cells of the picture.
  """
  size = images_BHWC.shape[1]
  side = max(round(window * size), 1)
  step = max(side // 2, 1)
  n = max(round(size / step), 1)
  middle_n = (np.arange(n) + 0.5) * size / n
  near_nS = np.abs(np.arange(size).reshape(1, -1) + 0.5 - middle_n.reshape(-1, 1)) <= side / 2
  whole_BD = pooled(images_BHWC).astype(jnp.float32)
  near_nS = jnp.asarray(near_nS)

  def hide(place):
    rows_S, columns_S = near_nS[place // len(middle_n)], near_nS[place % len(middle_n)]
    hidden_1SS1 = (rows_S[:, None] & columns_S[None, :])[None, :, :, None]
    changed_BD = pooled(jnp.where(hidden_1SS1, 0, images_BHWC)).astype(jnp.float32)
    return 1 - cosine(changed_BD, whole_BD)

  map_nB = jax.lax.map(hide, jnp.arange(len(middle_n) ** 2))
  return map_nB.T.reshape(-1, len(middle_n), len(middle_n))


def cosine(x: Array, y: Array) -> Array:
  """Along the last axis; 0 with a zero vector."""
  product = jnp.sum(x * y, axis=-1)
  length = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return product / jnp.maximum(length, 1e-12)


def _add(sums: Sums, map_hw: np.ndarray, fine_HW: np.ndarray, mask_HW: np.ndarray | None) -> Sums:
  sums = sums._replace(entropy=sums.entropy + entropy(map_hw), pictures=sums.pictures + 1)
  if mask_HW is None:
    return sums
  if mask_HW.all() or not mask_HW.any():
    return sums._replace(unmasked=sums.unmasked + 1)
  middle = tuple(n // 2 for n in mask_HW.shape)
  return sums._replace(
    hits=sums.hits + int(mask_HW.flat[np.argmax(fine_HW)]),
    centre_hits=sums.centre_hits + int(mask_HW[middle]),
    iou=sums.iou + iou_at_area(fine_HW, mask_HW),
    area=sums.area + float(mask_HW.mean()),
    masked=sums.masked + 1,
  )


def entropy(map_hw: np.ndarray) -> float:
  """In [0, 1], of the map made to sum to 1; negative values count as 0, an empty map as even."""
  positive = np.maximum(map_hw.astype(np.float64).ravel(), 0)
  if positive.size == 1 or positive.sum() <= 0:
    return 1.0
  share = positive / positive.sum()
  share = share[share > 0]
  return float(-np.sum(share * np.log(share)) / np.log(positive.size))


def iou_at_area(fine_HW: np.ndarray, mask_HW: np.ndarray) -> float:
  """In [0, 1]: the highest places, as many as the mask has, against it; of equals the first."""
  area = int(mask_HW.sum())
  highest = np.argsort(-fine_HW, axis=None, kind="stable")[:area]
  both = int(mask_HW.ravel()[highest].sum())
  return both / (2 * area - both)


def _figures(sums: Sums, *, with_masks: bool) -> dict[str, float]:
  figures = {
    "attention/entropy": sums.entropy / sums.pictures,
    "attention/num_test": float(sums.pictures),
  }
  if not with_masks:
    return figures
  if not sums.masked:
    raise ValueError(
      f"attention: none of {sums.pictures} masks has the target beside something else; check "
      "evaluate.attention.target"
    )
  return figures | {
    "attention/pointing": 100 * sums.hits / sums.masked,
    "attention/iou": 100 * sums.iou / sums.masked,
    "attention/centre_pointing": 100 * sums.centre_hits / sums.masked,
    "attention/area": 100 * sums.area / sums.masked,
    "attention/masked": float(sums.masked),
    "attention/unmasked": float(sums.unmasked),
  }


class Pictures:
  """Those of a MaskSource, as a Source without labels."""

  num_classes, class_names = None, ()

  def __init__(self, source: MaskSource):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {"image": self._source.paths[i], "label": -1}

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self._source!r})"


class Masks(Pictures):
  """Their masks: white where the target is, black elsewhere, also where there is no class."""

  def __init__(self, source: MaskSource, target: int):
    super().__init__(source)
    self._target = target

  def __getitem__(self, i: int) -> dict[str, Any]:
    mask_hw = self._source.mask(i)
    wanted_hw = mask_hw != 0 if self._target == -1 else mask_hw == self._target
    inside_hw = wanted_hw & (mask_hw != IGNORE)
    return {"image": inside_hw.astype(np.uint8) * 255, "label": -1}


def _mask_views(masks: Evaluation | None, num_test: int) -> Iterator[np.ndarray | None]:
  """bool [B, S, S] for each batch: the masks, resized and cropped as the pictures are."""
  if masks is None:
    yield from itertools.repeat(None)
    return
  whole = parallel.replicated(masks.mesh)
  inside = jax.jit(lambda pixels_BHWC: pixels_BHWC[..., 0] > 0.5, out_shardings=whole)
  for pixels_BHWC, _, _ in masks.views("test", limit=num_test):
    yield jax.device_get(inside(pixels_BHWC))


def sheet(
  views_NHWC: np.ndarray,
  maps_NHW: Sequence[np.ndarray],
  masks_NHW: Sequence[np.ndarray | None],
  *,
  columns: int = 4,
) -> np.ndarray:
  """uint8 RGB: pairs of a picture, its mask outlined in white, and of the map over it."""
  cells = []
  for view_HWC, map_HW, mask_HW in zip(views_NHWC, maps_NHW, masks_NHW):
    low, high = map_HW.min(), map_HW.max()
    heat_HWC = matplotlib.colormaps["magma"]((map_HW - low) / max(high - low, 1e-12))[..., :3]
    over_HWC = (0.35 * view_HWC + 0.65 * 255 * heat_HWC).astype(np.uint8)
    left_HWC = view_HWC.copy()
    if mask_HW is not None:
      left_HWC[mask_HW & ~ndimage.binary_erosion(mask_HW)] = 255
    cells.append(np.pad(np.concatenate([left_HWC, over_HWC], 1), ((0, 2), (0, 4), (0, 0))))
  cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
  rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
  factor = max(SCALE_TO // views_NHWC.shape[1], 1)
  return np.concatenate(rows).repeat(factor, axis=0).repeat(factor, axis=1)
