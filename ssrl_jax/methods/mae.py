"""MAE: reconstruct the three quarters of the patches that the encoder did not see (He 2022).

Official code: facebookresearch/mae models_mae.py. The loss is on masked patches only, each target
patch standardised with torch's unbiased variance. The class token is part of the encoder's and of
the decoder's sequence, as there. Departure: weights begin as in all ViTs here (normal, 0.02; the
patch projection by flax's default), where the official code draws them from xavier_uniform.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.masked import patchify, random_order, standardise_patches
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
from ssrl_jax.models.vit import NORMAL, check_vit, make_block, sincos


class Network(nn.Module):
  """Images [N, s, s, 3] and an order of the patches -> pooled [N, D], patches [N, n, p * p * 3]."""

  encoder: nn.Module
  num_visible: int  # patches that the encoder sees: the first of the order
  dim: int
  depth: int
  heads: int

  @nn.compact
  def __call__(self, images: Array, train: bool, order_BN: Array):
    features = self.encoder(images, train, keep_BK=order_BN[:, : self.num_visible])
    tokens_BND = nn.Dense(self.dim, kernel_init=NORMAL, name="embed")(features.tokens)
    split = self.encoder.num_prefix
    b, n = order_BN.shape
    token_D = self.param("mask_token", NORMAL, (self.dim,))
    hidden_BMD = jnp.broadcast_to(token_D.reshape(1, 1, -1), (b, n - self.num_visible, self.dim))
    patches_BND = jnp.concatenate([tokens_BND[:, split:], hidden_BMD], axis=1)
    place_BN = jnp.argsort(order_BN, axis=1)
    patches_BND = jnp.take_along_axis(patches_BND, place_BN[:, :, None], axis=1)
    side = round(n**0.5)
    patches_BND += jnp.asarray(sincos(side, side, self.dim)).reshape(1, n, self.dim)
    x_BND = jnp.concatenate([tokens_BND[:, :split], patches_BND], axis=1)
    block = make_block(self.encoder.remat)
    for i in range(self.depth):
      x_BND, _ = block(self.heads, 0.0, self.encoder.dtype, name=f"block{i + 1}")(x_BND, train)
    x_BND = nn.LayerNorm(name="norm")(x_BND[:, split:].astype(jnp.float32))
    size = self.encoder.patch**2 * 3
    return features.pooled, nn.Dense(size, kernel_init=NORMAL, name="pixels")(x_BND)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  mask_ratio: float = 0.75,
  standardise: bool = True,
  decoder_dim: int = 512,
  decoder_depth: int = 8,
  decoder_heads: int = 16,
) -> Method:
  """MAE's Method.

  Args:
    encoder: a ViT.
    views: "global" with count 1 or more; crop and flip suffice (paper, table 1e).
    run: unused, the objective has no schedule.
    mask_ratio: share of the patches that are hidden, in (0, 1).
    standardise: each target patch to mean 0 and variance 1.
    decoder_dim, decoder_depth, decoder_heads: of the decoder.
  """
  del run
  check_fraction("mae", mask_ratio=mask_ratio)
  patch = check_vit("mae", encoder)
  num_patches = (global_views(views, method="mae", at_least=1, local=False).size // patch) ** 2
  num_visible = min(max(round(num_patches * (1 - mask_ratio)), 1), num_patches - 1)
  network = Network(encoder, num_visible, decoder_dim, decoder_depth, decoder_heads)

  def init(key, views):
    images = fold_views(views["global"])
    order_BN = random_order(key, images.shape[0], num_patches)
    params, stats = init_network(network, key, images, order_BN)
    return params, {"batch_stats": stats}

  def loss(params, method_state, views, key, step):
    del step
    keys, images_BVHWC = jax.random.split(key), views["global"]
    b, v = images_BVHWC.shape[:2]
    order_BN = random_order(keys[1], b * v, num_patches)
    (h_BVD, predicted_BVNM), stats = forward(
      network, params, method_state["batch_stats"], images_BVHWC, keys[0], order_BN
    )
    target_BNM = patchify(fold_views(images_BVHWC), patch)
    if standardise:
      target_BNM = standardise_patches(target_BNM)
    error_BN = jnp.mean((fold_views(predicted_BVNM) - target_BNM) ** 2, axis=-1)
    hidden_BM = order_BN[:, num_visible:]
    value = jnp.mean(jnp.take_along_axis(error_BN, hidden_BM, axis=1))
    aux = Aux(
      method_state={"batch_stats": stats},
      metrics={"reconstruction": value},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(h_BVD[:, 0]),
    )
    return value, aux

  return Method(views, init, loss, keep, encode_with(encoder))
