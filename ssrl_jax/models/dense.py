"""Heads that read an encoder's maps: a pyramid of one width, a detector, two segmenters.

Shapes: B batch, h w a map's rows and columns, C channels of the encoder, F width of the head, K
classes, P points of all levels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax.method import Array
from ssrl_jax.models.resnet import batch_norm, conv
from ssrl_jax.models.vit import enlarge, shrink

Maps = dict[int, Array]  # stride in pixels -> [B, h, w, C]

PRIOR = 0.01  # probability of an object at the start (focal loss, Lin et al. 2017, section 4.1)


def pyramid_strides(map_strides: list[int], *, stride: int, levels: int) -> tuple[int, ...]:
  """Strides of the levels: doubling, from the encoder's first that is at least `stride`."""
  if levels < 1 or stride < 1:
    raise ValueError(f"levels is {levels} and stride {stride}; both must be at least 1")
  first = min((s for s in map_strides if s >= stride), default=0)
  if not first:
    first = max(map_strides)
    while first < stride:
      first *= 2
  return tuple(first * 2**level for level in range(levels))


def to_grid(x_BhwC: Array, factor: float) -> Array:
  """A map on a grid `factor` times as fine: means of pixels, or bilinear between them."""
  B, h, w, C = x_BhwC.shape
  if factor < 1:
    return shrink(x_BhwC, round(1 / factor))
  shape = (B, round(h * factor), round(w * factor), C)
  return jax.image.resize(x_BhwC, shape, "bilinear") if factor > 1 else x_BhwC


def stack_at(maps: Maps, stride: int) -> Array:
  """All maps beside one another on the grid of `stride`, float32 [B, h, w, sum of C]."""
  parts = [to_grid(x.astype(jnp.float32), s / stride) for s, x in sorted(maps.items())]
  return jnp.concatenate(parts, axis=-1)


class Pyramid(nn.Module):
  """Maps of any strides and widths -> one of width F for each of `strides`.

  A level takes the encoder's map of its stride through a 1x1 convolution; the finest one has beside
  it the finer maps, averaged, and the coarsest one the coarser maps, enlarged. A level without a
  map is a 3x3 convolution of stride 2 over the level before. Then the coarse is added to the fine,
  as FPN does (Lin et al. 2017), unless the maps already have one width: such encoders have fused
  their scales, or have but one (ViT).
  """

  strides: tuple[int, ...]
  width: int

  @nn.compact
  def __call__(self, maps: Maps, train: bool) -> Maps:
    first, last = self.strides[0], self.strides[-1]
    levels: Maps = {}
    for s in self.strides:
      own = {t: x for t, x in maps.items() if t == s or t < s == first or t > s == last}
      if own:
        x_BhwF = conv(self.width, 1, dtype=jnp.float32, name=f"lateral{s}")(stack_at(own, s))
      else:
        x_BhwF = conv(self.width, 3, 2, dtype=jnp.float32, name=f"down{s}")(nn.relu(x_BhwF))
      x_BhwF = batch_norm(train, dtype=jnp.float32, name=f"norm{s}")(x_BhwF)
      levels[s] = x_BhwF
    if len({x.shape[-1] for x in maps.values()}) > 1:
      for fine, coarse in reversed(list(zip(self.strides, self.strides[1:]))):
        _, h, w, _ = levels[fine].shape
        levels[fine] = levels[fine] + enlarge(levels[coarse], 2)[:, :h, :w]
    return levels


class Detector(nn.Module):
  """FCOS (Tian et al. 2019): one head on every level of a pyramid.

  Returns logits [B, P, K], distances [B, P, 4] in pixels (left, top, right, bottom, all positive)
  and centreness logits [B, P]; points in the order of `fcos.make_points`.
  """

  num_classes: int
  strides: tuple[int, ...]
  width: int = 64
  depth: int = 2  # convolutions of each tower; FCOS has 4

  @nn.compact
  def __call__(self, maps: Maps, train: bool) -> tuple[Array, Array, Array]:
    levels = Pyramid(self.strides, self.width, name="pyramid")(maps, train)
    towers = [Tower(self.width, self.depth, name=name) for name in ("class_tower", "box_tower")]
    prior = nn.initializers.constant(-np.log((1 - PRIOR) / PRIOR))
    classify = _last(self.num_classes, "classify", bias_init=prior)
    regress, centre = _last(4, "regress"), _last(1, "centre")
    found = []
    for s, x_BhwF in levels.items():
      class_BhwF, box_BhwF = (tower(x_BhwF) for tower in towers)
      scale = self.param(f"scale{s}", nn.initializers.ones, ())
      # Cut at e^8 strides, far beyond any picture, so that a wild step cannot become infinite.
      distance_Bhw4 = jnp.exp(jnp.minimum(regress(box_BhwF) * scale, 8.0)) * s
      found.append((classify(class_BhwF), distance_Bhw4, centre(box_BhwF)))
    flat = ([x.reshape(x.shape[0], -1, x.shape[-1]) for x in kind] for kind in zip(*found))
    logits_BPK, distance_BP4, centre_BP1 = (jnp.concatenate(kind, axis=1) for kind in flat)
    return logits_BPK, distance_BP4, centre_BP1[..., 0]


class Tower(nn.Module):
  """3x3 convolutions with group norm, which sees one picture only, so levels may share it."""

  width: int
  depth: int

  @nn.compact
  def __call__(self, x_BhwF: Array) -> Array:
    for _ in range(self.depth):
      x_BhwF = conv(self.width, 3, dtype=jnp.float32)(x_BhwF)
      x_BhwF = nn.relu(nn.GroupNorm(num_groups=max(1, self.width // 8))(x_BhwF))
    return x_BhwF


class LinearSegmenter(nn.Module):
  """Logits [B, h, w, K] at `stride`: BatchNorm and a 1x1 convolution on all maps, stacked there."""

  num_classes: int
  stride: int

  @nn.compact
  def __call__(self, maps: Maps, train: bool) -> Array:
    # Without scale and shift, which the convolution has anyway.
    norm = batch_norm(train, dtype=jnp.float32, use_scale=False, use_bias=False, name="norm")
    x_BhwC = norm(stack_at(maps, self.stride))
    kernel_init = nn.initializers.normal(0.01)
    return nn.Conv(self.num_classes, (1, 1), kernel_init=kernel_init, name="classify")(x_BhwC)


class LightSegmenter(nn.Module):
  """Logits [B, h, w, K] at `stride`: a pyramid, summed on one grid, and two 3x3 convolutions.

  After Panoptic FPN's semantic branch (Kirillov et al. 2019), with one enlargement for each level.
  """

  num_classes: int
  stride: int
  strides: tuple[int, ...]
  width: int = 64

  @nn.compact
  def __call__(self, maps: Maps, train: bool) -> Array:
    levels = Pyramid(self.strides, self.width, name="pyramid")(maps, train)
    _, h, w, _ = levels[self.stride].shape
    # A coarse level covers the picture and up to a stride beyond it.
    x_BhwF = sum(to_grid(x, s / self.stride)[:, :h, :w] for s, x in levels.items())
    x_BhwF = nn.relu(x_BhwF)
    for i in (1, 2):
      x_BhwF = conv(self.width, 3, dtype=jnp.float32, name=f"conv{i}")(x_BhwF)
      x_BhwF = nn.relu(batch_norm(train, dtype=jnp.float32, name=f"norm{i}")(x_BhwF))
    kernel_init = nn.initializers.normal(0.01)
    return nn.Conv(self.num_classes, (1, 1), kernel_init=kernel_init, name="classify")(x_BhwF)


def _last(features: int, name: str, **options) -> nn.Conv:
  kernel_init = nn.initializers.normal(0.01)
  return nn.Conv(
    features, (3, 3), padding=((1, 1), (1, 1)), kernel_init=kernel_init, name=name, **options
  )
