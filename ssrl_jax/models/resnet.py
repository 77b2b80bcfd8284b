"""ResNet (He et al. 2016), version 1.5: a bottleneck strides on its 3x3 convolution.

Parameter counts and shapes are torchvision's. Padding is torch's too, explicit and symmetric: SAME
pads a strided convolution on one side only, which cost 4.6 points of ImageNet accuracy where
weights crossed frameworks (deepmind-research issue 84). The running variance is flax's, biased;
torch's is unbiased.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssrl_jax.method import Array, Features
from ssrl_jax.models.convolution import conv_general_dilated, max_pool

# depth -> blocks per stage, bottleneck. 6, 8 and 10 are ours, for tests and CPU recipes.
DEPTHS = {
  6: ((1, 1), False),
  8: ((1, 1, 1), False),
  10: ((1, 1, 1, 1), False),
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
}
STEMS = ("imagenet", "cifar")
NORMS = ("batch", "group")


def make_resnet(
  *,
  depth: int,
  width: int = 64,
  stem: str = "imagenet",
  zero_init: bool = True,
  dtype: str = "float32",
  norm: str = "batch",
  remat: bool = False,
) -> ResNet:
  """The ResNet of a depth in `DEPTHS`. `dtype` is the computation's; parameters are float32."""
  blocks, bottleneck = DEPTHS[depth]
  return ResNet(blocks, bottleneck, width, stem, zero_init, jnp.dtype(dtype), norm, remat)


class ResNet(nn.Module):
  """Images [B, H, W, 3] -> Features with one map per stage, in the compute dtype.

  A map of stride s has ceil(H / s) rows. `pooled` is the mean over the last map: D = C of that map.
  """

  blocks: tuple[int, ...]  # per stage
  bottleneck: bool
  width: int = 64  # channels of the stem and of the first stage's 3x3 convolutions
  stem: str = "imagenet"  # imagenet: 7x7/2, max pool, strides 4, 8, ... | cifar: 3x3, 1, 2, ...
  zero_init: bool = True  # every block starts as its shortcut (Goyal et al. 2017, section 5.1)
  dtype: Any = jnp.float32
  norm: str = "batch"  # one of NORMS
  remat: bool = False  # the backward pass computes each block again instead of keeping its insides

  @nn.compact
  def __call__(self, images_BHWC: Array, train: bool) -> Features:
    if self.stem not in STEMS:
      raise ValueError(f"stem {self.stem!r}: expected one of {STEMS}")
    large = self.stem == "imagenet"
    kernel, stride = (7, 2) if large else (3, 1)
    x_BHWC = images_BHWC.astype(self.dtype)
    x_BHWC = conv(self.width, kernel, stride, dtype=self.dtype, name="stem_conv")(x_BHWC)
    norm = partial(normalised, kind=self.norm, train=train, dtype=self.dtype)
    x_BHWC = nn.relu(norm(x_BHWC, name="stem_norm"))
    if large:
      x_BHWC = max_pool(x_BHWC)
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    maps = {}
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        x_BHWC = block(
          features=self.width * 2**stage,
          stride=2 if stage > 0 and i == 0 else 1,
          bottleneck=self.bottleneck,
          zero_init=self.zero_init,
          dtype=self.dtype,
          norm=self.norm,
          name=f"stage{stage + 1}_block{i + 1}",
        )(x_BHWC, train)
      maps[(4 if large else 1) * 2**stage] = x_BHWC
    return Features(jnp.mean(x_BHWC.astype(jnp.float32), axis=(1, 2)), maps)


class Block(nn.Module):
  """relu(shortcut(x) + residual(x)); the residual has two 3x3 convolutions, or is a bottleneck."""

  features: int  # of the 3x3 convolutions; a bottleneck puts out four times as many
  stride: int
  bottleneck: bool
  zero_init: bool
  dtype: Any
  norm: str = "batch"

  @nn.compact
  def __call__(self, x_BHWC: Array, train: bool) -> Array:
    conv_ = partial(conv, dtype=self.dtype)
    norm = partial(normalised, kind=self.norm, train=train, dtype=self.dtype)
    if self.bottleneck:
      y_BHWC = nn.relu(norm(conv_(self.features, 1)(x_BHWC)))
      y_BHWC = nn.relu(norm(conv_(self.features, 3, self.stride)(y_BHWC)))
      y_BHWC = conv_(4 * self.features, 1)(y_BHWC)
    else:
      y_BHWC = nn.relu(norm(conv_(self.features, 3, self.stride)(x_BHWC)))
      y_BHWC = conv_(self.features, 3)(y_BHWC)
    scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
    y_BHWC = norm(y_BHWC, scale_init=scale_init)
    if x_BHWC.shape != y_BHWC.shape:
      x_BHWC = conv_(y_BHWC.shape[-1], 1, self.stride, name="shortcut_conv")(x_BHWC)
      x_BHWC = norm(x_BHWC, name="shortcut_norm")
    return nn.relu(x_BHWC + y_BHWC)


def conv(
  features: int,
  kernel: int,
  stride: int = 1,
  *,
  dtype: Any,
  groups: int = 1,
  name: str | None = None,
) -> nn.Conv:
  """Square, without bias; torch's padding, kernel // 2 on every side; He's normal init."""
  pad = kernel // 2
  return nn.Conv(
    features,
    (kernel, kernel),
    (stride, stride),
    padding=((pad, pad), (pad, pad)),
    feature_group_count=groups,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    dtype=dtype,
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


def batch_norm(train: bool, *, dtype: Any, **options: Any) -> nn.BatchNorm:
  """Statistics in float32 over the global batch: under jit over a mesh a mean is global."""
  return nn.BatchNorm(
    use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **options
  )


def normalised(x: Array, *, kind: str, train: bool, dtype: Any, **options: Any) -> Array:
  """`x` through a norm of its own, with scale and shift, made in the module that calls this.

  kind "batch": see `batch_norm`. "group": GroupNorm (Wu & He 2018), which sees one image only, with
  16 channels a group, or as many as divide both 16 and the channels.
  """
  if kind == "batch":
    return batch_norm(train, dtype=dtype, **options)(x)
  size = math.gcd(16, x.shape[-1])
  return nn.GroupNorm(None, size, epsilon=1e-5, dtype=dtype, **options)(x)
