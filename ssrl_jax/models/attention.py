"""AttentionEncoder: attention over channels, places and heads at several stages of a backbone.

After Lin et al. 2025 (zenodo 15232950), of which only the abstract is public (a multi-level
attention module): the form is ours. At each of the coarsest stages, CBAM's channel and spatial
attention (Woo et al. 2018; official code Jongchan/attention-module) weigh the map, then the heads
of a learned query each pool it with a softmax over places.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.method import Array, Features
from ssrl_jax.models.resnet import conv, normalised
from ssrl_jax.models.vit import NORMAL, enlarge

# What `pooled` concatenates: the backbone's own vector, the levels' attended ones.
POOLED = {
  "backbone": ("backbone",),
  "scales": ("scales",),
  "backbone_scales": ("backbone", "scales"),
}


class AttentionEncoder(nn.Module):
  """Images [B, H, W, 3] -> Features with `attention`, attended `maps` and `scales`.

  `attention` [B, heads, 1, N] is the mean over levels, on the grid of the finest level, which is
  the coarsest map but levels - 1; each head's sums to 1. `maps` are the attended ones, `scales`
  [B, levels, width] the levels' vectors, finest first.
  """

  backbone: nn.Module  # images, train -> Features
  width: int = 128  # channels of an attended map
  heads: int = 4  # of the query that pools each level
  levels: int = 3  # of the coarsest maps
  reduction: int = 8  # of the channels, inside the channel attention
  pooled: str = "backbone_scales"  # backbone | scales | backbone_scales; scales retrieve better
  dtype: Any = jnp.float32
  norm: str = "batch"  # see models.resnet.normalised

  @nn.compact
  def __call__(self, images_BHWC: Array, train: bool) -> Features:
    features = self.backbone(images_BHWC, train)
    strides = sorted(features.maps)
    if not 1 <= self.levels <= len(strides):
      raise ValueError(
        f"levels {self.levels}: the backbone has maps of strides {strides}; 1 to {len(strides)}"
      )
    if self.pooled not in POOLED:
      raise ValueError(f"pooled {self.pooled!r}: expected one of {tuple(POOLED)}")
    if self.width % self.heads:
      raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
    strides = strides[-self.levels :]
    maps, levels, attentions = {}, [], []
    _, h, w, _ = features.maps[strides[0]].shape
    for s in strides:
      x_BHWC = self._attend_channels(features.maps[s], s)
      x_BHWC = self._attend_places(x_BHWC, s, train)
      x_BHWF = conv(self.width, 1, dtype=self.dtype, name=f"project{s}")(x_BHWC)
      x_BHWF = nn.relu(self._normalised(x_BHWF, train, f"project{s}_norm"))
      weights_BHWA = self._pooling_weights(x_BHWF, s)
      levels.append(pool(x_BHWF, weights_BHWA))
      factor = s // strides[0]
      # A coarse place's weight, shared out over the fine places that it covers.
      fine_BHWA = enlarge(weights_BHWA, factor)[:, :h, :w]
      attentions.append(fine_BHWA / jnp.sum(fine_BHWA, axis=(1, 2), keepdims=True))
      maps[s] = x_BHWF
    attention_BNA = jnp.mean(jnp.stack(attentions), axis=0).reshape(-1, h * w, self.heads)
    levels_BLF = jnp.stack(levels, axis=1)
    vectors = {
      "backbone": features.pooled,
      "scales": levels_BLF.reshape(levels_BLF.shape[0], -1),
    }
    return Features(
      jnp.concatenate([vectors[name] for name in POOLED[self.pooled]], axis=-1),
      maps,
      attention=attention_BNA.transpose(0, 2, 1)[:, :, None],
      scales=levels_BLF,
    )

  def _attend_channels(self, x_BHWC: Array, stride: int) -> Array:
    """x * sigmoid(MLP(mean) + MLP(max)), one MLP for both."""
    channels = x_BHWC.shape[-1]
    squeeze = nn.Dense(
      max(channels // self.reduction, 1), dtype=self.dtype, name=f"channel{stride}_in"
    )
    excite = nn.Dense(channels, dtype=self.dtype, name=f"channel{stride}_out")
    x_BNC = x_BHWC.reshape(x_BHWC.shape[0], -1, channels)
    pooled = jnp.mean(x_BNC, axis=1), largest(x_BNC, axis=1)
    gate_BC = nn.sigmoid(sum(excite(nn.relu(squeeze(v_BC))) for v_BC in pooled))
    return x_BHWC * gate_BC[:, None, None]

  def _attend_places(self, x_BHWC: Array, stride: int, train: bool) -> Array:
    """x * sigmoid(norm(conv 7x7 of the maximum and the mean over channels))."""
    both = [largest(x_BHWC, axis=-1), jnp.mean(x_BHWC, axis=-1)]
    y_BHW1 = conv(1, 7, dtype=self.dtype, name=f"place{stride}")(jnp.stack(both, axis=-1))
    return x_BHWC * nn.sigmoid(self._normalised(y_BHW1, train, f"place{stride}_norm"))

  def _normalised(self, x_BHWC: Array, train: bool, name: str) -> Array:
    return normalised(x_BHWC, kind=self.norm, train=train, dtype=self.dtype, name=name)

  def _pooling_weights(self, x_BHWF: Array, stride: int) -> Array:
    """float32 [B, H, W, A], each head's summing to 1."""
    b, h, w, _ = x_BHWF.shape
    query = nn.Dense(self.heads, kernel_init=NORMAL, use_bias=False, name=f"query{stride}")
    logits_BNA = query(x_BHWF.astype(jnp.float32)).reshape(b, h * w, self.heads)
    return jax.nn.softmax(logits_BNA, axis=1).reshape(b, h, w, self.heads)


def largest(x: Array, *, axis: int) -> Array:
  """The maximum along an axis, its gradient going to the first place that has it.

  Not jnp.max: its gradient divides by the number of places equal to the maximum, which is 0, and
  the gradient NaN, where the compiler computes the array twice and rounds it differently.
  """
  place = jnp.expand_dims(jnp.argmax(x, axis=axis), axis)
  return jnp.squeeze(jnp.take_along_axis(x, place, axis=axis), axis)


def pool(x_BHWF: Array, weights_BHWA: Array) -> Array:
  """float32 [B, F]: head a pools the a-th run of F / A channels with its weights."""
  b, h, w, f = x_BHWF.shape
  heads = weights_BHWA.shape[-1]
  x_BHWAd = x_BHWF.astype(jnp.float32).reshape(b, h, w, heads, f // heads)
  return jnp.einsum("BHWAd,BHWA->BAd", x_BHWAd, weights_BHWA).reshape(b, f)


def most_attended(attention_BHW: Array, *, window: tuple[int, int], num: int) -> Array:
  """int32 [B, num, 2]: top and left place of the `num` windows that hold most attention.

  Each window is chosen after the attention inside those before it was taken away; of equals the
  first. No gradient.
  """
  left_BHW = jax.lax.stop_gradient(attention_BHW)
  b, h, w = left_BHW.shape
  corners = []
  for _ in range(num):
    # Sums over windows as differences of a cumulative sum would lose precision; these are small.
    sums_Bhw = jax.lax.reduce_window(left_BHW, 0.0, jax.lax.add, (1, *window), (1, 1, 1), "VALID")
    flat_B = jnp.argmax(sums_Bhw.reshape(b, -1), axis=1)
    top_B, left_B = flat_B // sums_Bhw.shape[2], flat_B % sums_Bhw.shape[2]
    corners.append(jnp.stack([top_B, left_B], axis=1))
    row_1H, column_1W = jnp.arange(h)[None], jnp.arange(w)[None]
    inside_BH = (row_1H >= top_B[:, None]) & (row_1H < top_B[:, None] + window[0])
    inside_BW = (column_1W >= left_B[:, None]) & (column_1W < left_B[:, None] + window[1])
    left_BHW = jnp.where(inside_BH[:, :, None] & inside_BW[:, None, :], 0, left_BHW)
  return jnp.stack(corners, axis=1)


def cut_parts(images_BHWC: Array, attention_BHW: Array, *, size: int, num: int) -> Array:
  """The `num` most attended squares of `size` pixels of each image: [B, num, size, size, C]."""
  _, height, width, channels = images_BHWC.shape
  _, h, w = attention_BHW.shape
  window = max(round(size * h / height), 1), max(round(size * w / width), 1)
  corner_BK2 = most_attended(attention_BHW, window=window, num=num)
  top_BK = jnp.minimum(corner_BK2[..., 0] * height // h, height - size)
  left_BK = jnp.minimum(corner_BK2[..., 1] * width // w, width - size)

  def cut(image_HWC, top, left):
    return jax.lax.dynamic_slice(image_HWC, (top, left, 0), (size, size, channels))

  return jax.vmap(jax.vmap(cut, in_axes=(None, 0, 0)))(images_BHWC, top_BK, left_BK)
