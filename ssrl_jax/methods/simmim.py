"""SimMIM: predict the raw pixels of masked squares by one linear layer (Xie et al. 2022).

Official code: microsoft/SimMIM models/simmim.py and data/data_simmim.py. A learned token stands in
for each masked patch, the encoder sees all of them, and the loss is the absolute error of the
masked pixels, normalised by the channels' mean and deviation as the views are. Departures: a ViT of
this package, with its positions and first weights and without LayerScale, where the official one
has relative position biases; the learning rate falls as a cosine, where theirs falls once.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.masked import mean_where, patchify, random_order
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  encode_with,
  fold_views,
  forward,
  global_views,
  init_network,
  keep,
)
from ssrl_jax.models.vit import NORMAL, check_vit


class Network(nn.Module):
  """Images [N, s, s, 3] and which patches are masked -> pooled [N, D], pixels [N, n, p * p * 3]."""

  encoder: nn.Module

  @nn.compact
  def __call__(self, images: Array, train: bool, mask_BN: Array):
    features = self.encoder(images, train, mask_BN=mask_BN)
    patches_BND = features.tokens[:, self.encoder.num_prefix :]
    size = self.encoder.patch**2 * 3
    return features.pooled, nn.Dense(size, kernel_init=NORMAL, name="pixels")(patches_BND)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  mask_ratio: float = 0.6,
  mask_size: int = 32,
) -> Method:
  """SimMIM's Method.

  Args:
    encoder: a ViT.
    views: "global" with count 1 or more; crop and flip suffice.
    run: unused, the objective has no schedule.
    mask_ratio: share of the squares that are masked, in (0, 1); rounded up.
    mask_size: side of a square in pixels: whole patches, and the view whole squares.
  """
  del run
  check_fraction("simmim", mask_ratio=mask_ratio)
  patch = check_vit("simmim", encoder)
  size = global_views(views, method="simmim", at_least=1, local=False).size
  fitting = [n for n in range(patch, size, patch) if size % n == 0]
  if size == patch:
    raise ValueError(
      f"simmim: a view of {size} pixels is a single patch; set encoder.vit.patch lower"
    )
  if mask_size not in fitting and size % patch == 0:  # else the ViT says what is wrong
    raise ValueError(
      f"simmim: mask_size {mask_size} does not consist of patches of {patch} pixels or does not "
      f"divide a view of {size}; these do: {', '.join(map(str, fitting))}"
    )
  across, side = size // mask_size, size // patch  # squares and patches of a row
  num_masked = min(math.ceil(mask_ratio * across**2), across**2 - 1)
  network = Network(encoder)

  def init(key, views):
    images = fold_views(views["global"])
    params, stats = init_network(network, key, images, jnp.zeros((len(images), side**2), bool))
    return params, {"batch_stats": stats}

  def draw_mask(key, b):
    """bool [B, N] of the patches."""
    rank_BS = jnp.argsort(random_order(key, b, across**2), axis=1)
    mask_Bhw = (rank_BS < num_masked).reshape(b, across, across)
    for axis in (1, 2):
      mask_Bhw = jnp.repeat(mask_Bhw, mask_size // patch, axis=axis)
    return mask_Bhw.reshape(b, side**2)

  def loss(params, method_state, views, key, step):
    del step
    keys, images_BVHWC = jax.random.split(key), views["global"]
    mask_BN = draw_mask(keys[1], math.prod(images_BVHWC.shape[:2]))
    (h_BVD, predicted_BVNM), stats = forward(
      network, params, method_state["batch_stats"], images_BVHWC, keys[0], mask_BN
    )
    target_BNM = patchify(fold_views(images_BVHWC), patch)
    error_BN = jnp.mean(jnp.abs(fold_views(predicted_BVNM) - target_BNM), axis=-1)
    value = jnp.mean(mean_where(error_BN, mask_BN))  # as many are masked in each
    aux = Aux(
      method_state={"batch_stats": stats},
      metrics={"reconstruction": value},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(h_BVD[:, 0]),
    )
    return value, aux

  return Method(views, init, loss, keep, encode_with(encoder))
