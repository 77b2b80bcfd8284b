"""Vision transformer (Dosovitskiy et al. 2021), pre-norm, as in timm and DINO.

Counts equal timm's with learned positions and no registers. Tokens are in the order class,
registers, patches (row by row): the patches are always the last h * w of the N tokens.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax.method import Array, Features

# size -> dim, layers, heads. pico and nano are ours, for tests and CPU recipes.
SIZES = {
  "pico": (24, 2, 2),
  "nano": (96, 6, 3),
  "ti": (192, 12, 3),
  "s": (384, 12, 6),
  "b": (768, 12, 12),
  "l": (1024, 24, 16),
}
POSITIONS = ("learned", "sincos")
POOLS = ("class", "mean")
# timm's and DINO's truncated normal cuts at +-2, that is at 100 standard deviations.
NORMAL = nn.initializers.normal(0.02)


def make_vit(
  *,
  size: str,
  patch: int = 16,
  heads: int = 0,
  registers: int = 0,
  position: str = "learned",
  drop_path: float = 0.0,
  pool: str = "class",
  dtype: str = "float32",
  remat: bool = False,
) -> ViT:
  """The ViT of a size in `SIZES`; `dtype` is the computation's, parameters are float32.

  Raises:
    ValueError: the width is no multiple of `heads`.
  """
  dim, layers, usual = SIZES[size]
  heads = heads or usual
  if dim % heads:
    raise ValueError(f"encoder.vit.heads is {heads}, which does not divide the width {dim}")
  return ViT(
    dim, layers, heads, patch, registers, position, drop_path, pool, jnp.dtype(dtype), remat
  )


class ViT(nn.Module):
  """Images [B, H, W, 3] -> Features: pooled [B, dim], four maps, attention of the last block.

  All layers of a ViT have one stride. So that detection, segmentation and fusion meet the pyramid
  they know from a ResNet, the layers at 1/4, 2/4, 3/4 and 4/4 of the depth, each through the final
  LayerNorm (as DINOv2's get_intermediate_layers), are resized without parameters to the strides
  patch/4, patch/2, patch and 2*patch (ViTDet, Li et al. 2022, makes the same strides). A stride
  that is no whole number is left out. Where the maps are not used, jit drops them.

  Learned positions belong to the grid of the image seen by init; other grids get them resized
  (bicubic without smoothing, nearly as DINO, whose kernel has a = -0.75 where this has -0.5).
  `drop_path` drops in training, where rngs={"dropout": key} is given.

  Masked methods look at a part of the patches, in one of three ways:
    keep_BK   int32 [B, K]: only these patches enter, in this order; there are no maps then.
    mask_BN   bool [B, N]: these patches are replaced by a learned mask token.
    hide_BN   bool [B, N]: nothing looks at these patches, as if they were left out, at full cost
              but with as many for each example as it likes. Their own tokens mean nothing; pooled
              leaves them out.
  """

  dim: int
  layers: int
  heads: int  # of the attention; as an option 0 is the size's (MoCo v3's ViT-S has 12, not 6)
  patch: int = 16  # side of a patch, pixels
  registers: int = 0  # extra tokens without a position (Darcet et al. 2024)
  position: str = "learned"  # learned | sincos, which is fixed
  drop_path: float = 0.0  # probability at the last block, linear from 0 at the first
  pool: str = "class"  # pooled: the class token, or the "mean" of the patches; after the LayerNorm
  dtype: Any = jnp.float32
  remat: bool = False  # the backward pass computes each block again instead of keeping its insides

  @property
  def num_prefix(self) -> int:
    """Tokens before the patches."""
    return 1 + self.registers

  @nn.compact
  def __call__(
    self,
    images_BHWC: Array,
    train: bool,
    *,
    keep_BK: Array | None = None,
    mask_BN: Array | None = None,
    hide_BN: Array | None = None,
  ) -> Features:
    self._check(images_BHWC.shape)
    x_BhwD = nn.Conv(
      self.dim,
      (self.patch,) * 2,
      (self.patch,) * 2,
      padding="VALID",
      dtype=self.dtype,
      name="patches",
    )(images_BHWC.astype(self.dtype))
    B, h, w, D = x_BhwD.shape
    if mask_BN is not None:
      token_D = self.param("mask_token", NORMAL, (D,)).astype(self.dtype)
      x_BhwD = jnp.where(mask_BN.reshape(B, h, w, 1), token_D.reshape(1, 1, 1, D), x_BhwD)
    x_BhwD += self._positions(h, w).astype(self.dtype)
    x_BND = x_BhwD.reshape(B, h * w, D)
    if keep_BK is not None:
      x_BND = jnp.take_along_axis(x_BND, keep_BK[:, :, None], axis=1)
    prefix_BND = self._prefix(B)
    x_BND = jnp.concatenate([prefix_BND, x_BND], axis=1)
    if hide_BN is not None:
      hide_BN = jnp.pad(hide_BN, ((0, 0), (prefix_BND.shape[1], 0)))
    outputs = []
    for i in range(self.layers):
      rate = self.drop_path * i / max(1, self.layers - 1)
      block = make_block(self.remat)(self.heads, rate, self.dtype, name=f"block{i + 1}")
      x_BND, attention_BANN = block(x_BND, train, hide_BN)
      outputs.append(x_BND)
    norm = nn.LayerNorm(dtype=self.dtype, name="norm")
    last_BND = norm(outputs[-1]).astype(jnp.float32)
    patches_BND = last_BND[:, prefix_BND.shape[1] :]
    if self.pool == "class":
      pooled_BD = last_BND[:, 0]
    elif hide_BN is None:
      pooled_BD = jnp.mean(patches_BND, axis=1)
    else:
      seen_BN1 = ~hide_BN[:, prefix_BND.shape[1] :, None]
      pooled_BD = jnp.sum(jnp.where(seen_BN1, patches_BND, 0), axis=1)
      pooled_BD /= jnp.maximum(jnp.sum(seen_BN1, axis=1), 1)
    maps = {}
    if keep_BK is None:
      levels = [norm(outputs[-(-self.layers * k // 4) - 1]) for k in (1, 2, 3, 4)]
      maps = pyramid([x_BND[:, -h * w :].reshape(B, h, w, D) for x_BND in levels], self.patch)
    return Features(pooled_BD, maps, attention_BANN, last_BND)

  def _check(self, shape: tuple[int, ...]) -> None:
    for name, value, valid in (("position", self.position, POSITIONS), ("pool", self.pool, POOLS)):
      if value not in valid:
        raise ValueError(f"{name} {value!r}: expected one of {valid}")
    for side in shape[1:3]:
      if side % self.patch or not side:
        low = max(self.patch, side // self.patch * self.patch)
        near = sorted({low, (side // self.patch + 1) * self.patch})
        raise ValueError(
          f"image of {shape[1]} x {shape[2]} pixels: {side} is not divisible by patch "
          f"{self.patch}; nearest: {' or '.join(map(str, near))}"
        )

  def _positions(self, h: int, w: int) -> Array:
    """[1, h, w, D]."""
    if self.position == "sincos":
      return jnp.asarray(sincos(h, w, self.dim))[None]
    grid = (h, w)
    if self.has_variable("params", "position"):
      grid = self.get_variable("params", "position").shape[:2]
    position_hwD = self.param("position", NORMAL, (*grid, self.dim))
    if grid != (h, w):
      position_hwD = jax.image.resize(position_hwD, (h, w, self.dim), "bicubic", antialias=False)
    return position_hwD[None]

  def _prefix(self, B: int) -> Array:
    """The tokens before the patches, [B, 1 + registers, D]."""
    token_D = self.param("class_token", NORMAL, (self.dim,))
    if self.position == "learned":
      # One parameter too many, the token could carry it: kept so that timm's weights fit.
      # Not +=, which would change a caller's NumPy parameters in place.
      token_D = token_D + self.param("class_position", NORMAL, (self.dim,))
    prefix_ND = token_D[None]
    if self.registers:
      registers_ND = self.param("registers", NORMAL, (self.registers, self.dim))
      prefix_ND = jnp.concatenate([prefix_ND, registers_ND])
    return jnp.broadcast_to(prefix_ND[None].astype(self.dtype), (B, *prefix_ND.shape))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); and the attention, float32 [B, A, N, N]."""

  heads: int
  drop_path: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x_BND: Array, train: bool, hide_BN: Array | None = None
  ) -> tuple[Array, Array]:
    # One draw for an example drops its whole residual.
    still = not (train and self.has_rng("dropout"))
    drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=still)
    y_BND = nn.LayerNorm(dtype=self.dtype, name="norm1")(x_BND)
    y_BND, attention_BANN = SelfAttention(self.heads, self.dtype, name="attention")(y_BND, hide_BN)
    x_BND += drop(y_BND)
    y_BND = nn.LayerNorm(dtype=self.dtype, name="norm2")(x_BND)
    y_BNM = nn.Dense(4 * x_BND.shape[-1], kernel_init=NORMAL, dtype=self.dtype, name="mlp_in")(
      y_BND
    )
    y_BNM = nn.gelu(y_BNM, approximate=False)
    y_BND = nn.Dense(x_BND.shape[-1], kernel_init=NORMAL, dtype=self.dtype, name="mlp_out")(y_BNM)
    return x_BND + drop(y_BND), attention_BANN


def make_block(remat: bool) -> type[Block]:
  """`Block`, or with `remat` one whose insides the backward pass computes again."""
  return nn.remat(Block, static_argnums=(2,)) if remat else Block


class SelfAttention(nn.Module):
  """Scaled dot-product attention; the softmax in float32. d is a head's width, D / A."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BND: Array, hide_BN: Array | None = None) -> tuple[Array, Array]:
    B, N, D = x_BND.shape
    qkv_BNM = nn.Dense(3 * D, kernel_init=NORMAL, dtype=self.dtype, name="qkv")(x_BND)
    qkv_BN3Ad = qkv_BNM.reshape(B, N, 3, self.heads, D // self.heads)
    q_BNAd, k_BNAd, v_BNAd = (qkv_BN3Ad[:, :, i] for i in range(3))
    q_BNAd *= (D // self.heads) ** -0.5
    logits_BANN = jnp.einsum("BQAd,BKAd->BAQK", q_BNAd, k_BNAd, preferred_element_type=jnp.float32)
    if hide_BN is not None:
      logits_BANN = jnp.where(hide_BN[:, None, None, :], -1e30, logits_BANN)
    attention_BANN = jax.nn.softmax(logits_BANN)
    x_BNAd = jnp.einsum("BAQK,BKAd->BQAd", attention_BANN.astype(self.dtype), v_BNAd)
    x_BND = nn.Dense(D, kernel_init=NORMAL, dtype=self.dtype, name="out")(x_BNAd.reshape(B, N, D))
    return x_BND, attention_BANN


def check_vit(method: str, encoder: nn.Module) -> int:
  """The patch size of the ViT that a masked method needs."""
  if not isinstance(encoder, ViT):
    raise ValueError(
      f"{method} hides patches from a ViT, but the encoder is a {type(encoder).__name__}; set "
      "encoder.name to vit_ti or another ViT, and encoder.fusion.enabled and "
      "encoder.attention.enabled to False"
    )
  return encoder.patch


def sincos(h: int, w: int, dim: int) -> np.ndarray:
  """Fixed 2-D positions, float32 [h, w, dim]: sin and cos of the column, then of the row.

  Chen et al. 2021 (MoCo v3), in the order of MAE's code.
  """
  if dim % 4:
    raise ValueError(f"dim {dim} is not divisible by 4, as sincos positions need")
  frequency = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
  column, row = (np.outer(np.arange(n), frequency) for n in (w, h))
  column, row = (np.concatenate([np.sin(x), np.cos(x)], axis=-1) for x in (column, row))
  parts = column[None].repeat(h, axis=0), row[:, None].repeat(w, axis=1)
  return np.concatenate(parts, axis=-1).astype(np.float32)


def pyramid(levels: list[Array], patch: int) -> dict[int, Array]:
  """Four [B, h, w, D] of stride `patch` -> {patch/4, patch/2, patch, 2*patch: [B, ., ., D]}."""
  maps = {
    patch // factor: enlarge(x_BhwD, factor)
    for x_BhwD, factor in zip(levels[:3], (4, 2, 1))
    if patch % factor == 0
  }
  return maps | {2 * patch: shrink(levels[3], 2)}


def enlarge(x_BHWC: Array, factor: int) -> Array:
  """Nearest neighbour, [B, H, W, C] -> [B, factor*H, factor*W, C]."""
  return x_BHWC.repeat(factor, axis=1).repeat(factor, axis=2)


def shrink(x_BHWC: Array, factor: int) -> Array:
  """Mean of factor x factor pixels, [B, ceil(H/factor), ceil(W/factor), C]; edges are repeated."""
  B, H, W, C = x_BHWC.shape
  h, w = -(-H // factor), -(-W // factor)
  pad = (0, h * factor - H), (0, w * factor - W), (0, 0)
  # Of each example: else the gradient sends maps of zeros between the devices that share a batch.
  x_BHWC = jax.vmap(lambda x_HWC: jnp.pad(x_HWC, pad, mode="edge"))(x_BHWC)
  return x_BHWC.reshape(B, h, factor, w, factor, C).mean(axis=(2, 4))
