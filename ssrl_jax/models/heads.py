"""The MLP behind every projector and predictor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssrl_jax.method import Array, fold_views, normalise, unfold_views
from ssrl_jax.models.resnet import batch_norm

GELU = functools.partial(nn.gelu, approximate=False)  # as PyTorch's


class MLP(nn.Module):
  """Dense - BatchNorm - activation, layers - 1 times, then Dense and, by option, BatchNorm.

  [..., D] -> float32 [..., out]; BatchNorm's statistics run over all leading axes. A Dense followed
  by a BatchNorm has no bias, the offset being the BatchNorm's. The last BatchNorm has neither scale
  nor offset. Shapes at ImageNet size, from each paper's official code:

    SimCLR         MLP(2048, 128)  (official: the last BatchNorm has a scale)
    MoCo v2        MLP(2048, 128, norm=False, final_norm=False, final_bias=True)
    MoCo v3        ViT: projector MLP(4096, 256, layers=3), predictor MLP(4096, 256)
                   ResNet: projector MLP(4096, 256), predictor MLP(4096, 256, final_norm=False)
    BYOL           projector and predictor MLP(4096, 256, final_norm=False)
    SimSiam        projector MLP(2048, 2048, layers=3),
                   predictor MLP(512, 2048, final_norm=False, final_bias=True)
    SwAV           MLP(2048, 128, final_norm=False, final_bias=True)
    Barlow, VICReg MLP(8192, 8192, layers=3, final_norm=False)
  """

  hidden: int
  out: int
  layers: int = 2  # Dense layers in all
  norm: bool = True  # BatchNorm after the hidden layers; without it they have a bias
  final_norm: bool = True
  final_bias: bool = False
  activation: Callable[[Array], Array] = nn.relu
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    if self.layers < 1:
      raise ValueError(f"layers {self.layers}: an MLP has at least 1")
    x = x.astype(self.dtype)
    for _ in range(self.layers - 1):
      x = nn.Dense(self.hidden, use_bias=not self.norm, dtype=self.dtype)(x)
      if self.norm:
        x = batch_norm(train, dtype=self.dtype)(x)
      x = self.activation(x)
    x = nn.Dense(self.out, use_bias=self.final_bias, dtype=self.dtype)(x)
    if self.final_norm:
      x = batch_norm(train, dtype=self.dtype, use_scale=False, use_bias=False)(x)
    return x.astype(jnp.float32)


class JointEmbedding(nn.Module):
  """encoder -> projector -> predictor (or none): what most methods wire.

  Images [N, h, w, 3] -> pooled features h [N, D], projections z [N, P], predictions q [N, P].
  """

  encoder: nn.Module
  projector: nn.Module
  predictor: nn.Module | None = None

  def __call__(self, images: Array, train: bool) -> tuple[Array, Array, Array]:
    h_ND, z_NP = self.project(images, train)
    return h_ND, z_NP, self.predictor(z_NP, train) if self.predictor else z_NP

  def project(self, images: Array, train: bool) -> tuple[Array, Array]:
    """What a target network computes: everything but the prediction."""
    h_ND = self.encoder(images, train).pooled
    return h_ND, self.projector(h_ND, train)

  def crops(self, groups: Sequence[Array], train: bool) -> tuple[Array, Array, Array]:
    """As a call, of views of several sizes [B, V, h, w, 3]: [B, sum of V, ...].

    The encoder takes one size after the other, the heads all at once, and so do BatchNorms in them.
    """
    h_BVD = jnp.concatenate(
      [unfold_views(self.encoder(fold_views(x), train).pooled, x.shape[1]) for x in groups], axis=1
    )
    h_ND = fold_views(h_BVD)
    z_NP = self.projector(h_ND, train)
    q_NP = self.predictor(z_NP, train) if self.predictor else z_NP
    return unfold_views((h_ND, z_NP, q_NP), h_BVD.shape[1])


class Prototypes(nn.Module):
  """Products of unit-length rows with K prototypes: [N, P] -> float32 [N, K].

  `weight_norm`: prototypes are used at unit length whatever the parameter's (DINO's last layer, its
  gain fixed at 1); otherwise as they are (SwAV, which brings the parameter itself to unit length).
  """

  num: int
  weight_norm: bool = False

  @nn.compact
  def __call__(self, z_NP: Array, train: bool) -> Array:
    del train
    # Rows of the normal distribution are uniform on the sphere.
    init = nn.initializers.normal(1.0)
    kernel_KP = self.param("kernel", lambda *a: normalise(init(*a)), (self.num, z_NP.shape[-1]))
    if self.weight_norm:
      kernel_KP = normalise(kernel_KP)
    return normalise(z_NP) @ kernel_KP.T
