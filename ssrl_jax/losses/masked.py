"""What masked methods predict: patches of pixels, and which patches are hidden.

Shapes: N patches of a view, row by row, M = patch * patch * 3 numbers in a patch.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ssrl_jax.method import Array


def patchify(images_BHWC: Array, patch: int) -> Array:
  """[B, H, W, C] -> [B, N, patch * patch * C]; a patch is laid out row, column, channel."""
  b, h, w, c = images_BHWC.shape
  x = images_BHWC.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def standardise_patches(patches_BNM: Array) -> Array:
  """Each patch with mean 0 and variance 1: He et al. 2022 (MAE), section 4.1.

  As the official code: torch's variance, hence unbiased, and 1e-6 inside the root.
  """
  x = patches_BNM.astype(jnp.float32)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  var = jnp.var(x, axis=-1, keepdims=True, ddof=1)
  return (x - mean) * jax.lax.rsqrt(var + 1e-6)


def mean_where(x_BN: Array, chosen_BN: Array) -> Array:
  """float32 [B]: mean of each row over the chosen places, 0 where none is."""
  weight_BN = chosen_BN.astype(jnp.float32)
  return jnp.sum(x_BN * weight_BN, axis=1) / jnp.maximum(jnp.sum(weight_BN, axis=1), 1)


def random_order(key: Array, batch: int, num_patches: int) -> Array:
  """int32 [B, N]: an order of the patches for each example."""
  return jnp.argsort(jax.random.uniform(key, (batch, num_patches)), axis=1)


def random_blocks(
  key: Array,
  batch: int,
  grid: tuple[int, int],
  *,
  area: tuple[float, float],
  aspect: tuple[float, float],
) -> Array:
  """bool [B, N]: one random rectangle of patches for each example.

  Its share of the grid's area is drawn uniformly from `area`, its height over width
  log-uniformly from `aspect`, its place uniformly; it has at least one patch and at most all.
  """
  h, w = grid
  u_4B = jax.random.uniform(key, (4, batch))
  share_B = area[0] + (area[1] - area[0]) * u_4B[0]
  low, high = math.log(aspect[0]), math.log(aspect[1])
  ratio_B = jnp.exp(low + (high - low) * u_4B[1])
  height_B = jnp.clip(jnp.round(jnp.sqrt(share_B * h * w * ratio_B)), 1, h)
  width_B = jnp.clip(jnp.round(jnp.sqrt(share_B * h * w / ratio_B)), 1, w)
  top_B = jnp.floor(u_4B[2] * (h - height_B + 1))
  left_B = jnp.floor(u_4B[3] * (w - width_B + 1))

  def inside(start_B, length_B, size):
    place_1n = jnp.arange(size)[None, :]
    return (place_1n >= start_B[:, None]) & (place_1n < (start_B + length_B)[:, None])

  block_Bhw = inside(top_B, height_B, h)[:, :, None] & inside(left_B, width_B, w)[:, None, :]
  return block_Bhw.reshape(batch, h * w)
