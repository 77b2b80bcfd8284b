"""FusionEncoder: an encoder whose stages are fused across scales.

After Zhang 2026 (ISTAER2616), of which only the abstract is public: the form is ours. Each stage
is projected to one width; a top-down and a bottom-up pass add them with learned weights (BiFPN's
fast normalised fusion, Tan et al. 2020, section 3.3); the mean of each fused map is a vector of its
scale; attention over the scales makes one vector of them.

Learned weights let the network leave out a scale that is hard. They can be watched:
`mutable=["intermediates"]` gives every node's normalised weights and the attention over scales.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.method import Array, Features
from ssrl_jax.models.resnet import conv, normalised
from ssrl_jax.models.vit import enlarge, shrink

# What `pooled` concatenates: the backbone's own vector, the fused one, the vectors of all scales.
POOLED = {
  "backbone": ("backbone",),
  "fused": ("fused",),
  "scales": ("scales",),
  "backbone_fused": ("backbone", "fused"),
  "backbone_scales": ("backbone", "scales"),
}
# What `maps` holds. A linear head reads more from both, a decoder from the fused ones:
# docs/results.md, "Segmentation".
MAPS = ("fused", "backbone_fused")
CONVS = ("none", "pointwise", "depthwise")


class FusionEncoder(nn.Module):
  """Images [B, H, W, 3] -> Features with `maps`, `scales` and `fused`.

  `maps` are the fused ones (F = width channels); or, before them, the backbone's of these strides.

  Departs from BiFPN: nearest and mean resizing without convolutions between scales, ReLU after a
  node's (optional) convolution and not before it, one pass.
  """

  backbone: nn.Module  # images, train -> Features
  width: int = 128  # channels of a fused map
  pooled: str = "backbone_scales"  # backbone | fused | scales | backbone_fused | backbone_scales
  maps: str = "fused"  # fused | backbone_fused: before them the backbone's
  coarsen: int = 0  # the finest maps that are averaged to the next one's grid: saves most time
  conv: str = "none"  # at every node, with BatchNorm: "none", "pointwise" 1x1 or "depthwise" 3x3
  dtype: Any = jnp.float32
  norm: str = "batch"  # see models.resnet.normalised

  @nn.compact
  def __call__(self, images_BHWC: Array, train: bool) -> Features:
    valid_of = {"pooled": POOLED, "maps": MAPS, "conv": CONVS}
    for name, valid in valid_of.items():
      value = getattr(self, name)
      if value not in valid:
        raise ValueError(f"{name} {value!r}: expected one of {tuple(valid)}")
    features = self.backbone(images_BHWC, train)
    strides = sorted(features.maps)
    if not 0 <= self.coarsen < len(strides):
      raise ValueError(
        f"coarsen {self.coarsen}: the backbone has maps of strides {strides}, of which 0 to "
        f"{len(strides) - 1} can be averaged"
      )
    grids = {s: max(s, strides[self.coarsen]) for s in strides}
    maps = {}
    for s in strides:
      x_BHWC = shrink(features.maps[s], grids[s] // s)
      x_BHWF = conv(self.width, 1, dtype=self.dtype, name=f"project{s}")(x_BHWC)
      norm = {"kind": self.norm, "train": train, "dtype": self.dtype}
      maps[s] = normalised(x_BHWF, **norm, name=f"project{s}_norm")
    maps = self._fuse(maps, grids, train)
    scales_BSF = jnp.stack(
      [jnp.mean(maps[s].astype(jnp.float32), axis=(1, 2)) for s in strides], axis=1
    )
    fused_BF = self._attend(scales_BSF)
    vectors = {
      "backbone": features.pooled,
      "fused": fused_BF,
      "scales": scales_BSF.reshape(scales_BSF.shape[0], -1),
    }
    pooled_BD = jnp.concatenate([vectors[name] for name in POOLED[self.pooled]], axis=-1)
    # Where two scales share a grid, the map of the coarser one has seen the finer one's.
    maps = {grids[s]: maps[s] for s in strides}
    if self.maps == "backbone_fused":
      maps = {s: jnp.concatenate([features.maps[s], x], axis=-1) for s, x in maps.items()}
    return features._replace(pooled=pooled_BD, maps=maps, scales=scales_BSF, fused=fused_BF)

  def _fuse(self, maps: dict[int, Array], grids: dict[int, int], train: bool) -> dict[int, Array]:
    """Top-down, then bottom-up; a node with one input is that input (BiFPN)."""
    strides, down, up = sorted(maps), dict(maps), {}
    for coarse, fine in pairwise(reversed(strides)):
      _, H, W, _ = maps[fine].shape
      # A map has ceil(H / stride) rows: twice the coarse one's, or one less.
      inputs = [maps[fine], enlarge(down[coarse], grids[coarse] // grids[fine])[:, :H, :W]]
      down[fine] = Node(self.conv, self.dtype, self.norm, name=f"top_down{fine}")(inputs, train)
    up[strides[0]] = down[strides[0]]
    for fine, coarse in pairwise(strides):
      inputs = [maps[coarse], shrink(up[fine], grids[coarse] // grids[fine])]
      if coarse != strides[-1]:
        inputs.append(down[coarse])
      up[coarse] = Node(self.conv, self.dtype, self.norm, name=f"bottom_up{coarse}")(inputs, train)
    return up

  def _attend(self, scales_BSF: Array) -> Array:
    """Mean of the scales, weighted by each one's product with a learned query; equal at init."""
    width = scales_BSF.shape[-1]
    query_F = self.param("scale_query", nn.initializers.zeros, (width,))
    keys_BSF = nn.LayerNorm(use_scale=False, use_bias=False)(scales_BSF)
    logits_BS = jnp.einsum("BSF,F->BS", keys_BSF, query_F) * width**-0.5
    weights_BS = jax.nn.softmax(logits_BS)
    self.sow("intermediates", "scale_attention", weights_BS)
    return jnp.einsum("BS,BSF->BF", weights_BS, scales_BSF)


class Node(nn.Module):
  """relu(conv(sum_i w_i x_i)), w = relu(v) / (eps + sum relu(v)), of maps of one shape."""

  conv: str
  dtype: Any
  norm: str = "batch"
  eps: float = 1e-4

  @nn.compact
  def __call__(self, inputs: list[Array], train: bool) -> Array:
    v = nn.relu(self.param("weights", nn.initializers.ones, (len(inputs),)))
    w = v / (self.eps + jnp.sum(v))
    self.sow("intermediates", "weights", w)
    w = w.astype(self.dtype)
    x_BHWF = sum(w[i] * x_BHWF for i, x_BHWF in enumerate(inputs))
    if self.conv != "none":
      width = x_BHWF.shape[-1]
      kernel, groups = (1, 1) if self.conv == "pointwise" else (3, width)
      x_BHWF = conv(width, kernel, dtype=self.dtype, groups=groups)(x_BHWF)
      x_BHWF = normalised(x_BHWF, kind=self.norm, train=train, dtype=self.dtype)
    return nn.relu(x_BHWF)
