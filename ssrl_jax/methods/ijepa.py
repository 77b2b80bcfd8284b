"""I-JEPA: from one block of an image predict the features of others, not pixels (Assran 2023).

Official code: facebookresearch/ijepa. Four target blocks, a large context block without them; a
moving average of the encoder, its output layer-normalised, makes the targets. Departures: what a
network must not see is hidden from attention instead of cut out, so that each example has blocks of
its own sizes (the official code draws sizes once for a batch, and cuts contexts to the shortest);
aspect ratios are drawn log-uniformly (there uniformly), and a block may fill the grid (there not);
the class token stays as a register, so set encoder.vit.pool to "mean".
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.masked import mean_where, random_blocks
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_range,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_views,
  init_network,
  make_target,
  unfold_views,
)
from ssrl_jax.models.vit import NORMAL, check_vit, make_block, sincos


class Network(nn.Module):
  """Images and what to hide and to predict -> pooled [N, D], predictions [N, M, n, D].

  M target blocks, n patches; a prediction is meant only where its block is.
  """

  encoder: nn.Module
  dim: int
  depth: int
  heads: int

  @nn.compact
  def __call__(self, images: Array, train: bool, hide_Bn: Array, target_BMn: Array):
    features = self.encoder(images, train, hide_BN=hide_Bn)
    x_BnD = features.tokens[:, self.encoder.num_prefix :]
    x_BnE = nn.Dense(self.dim, kernel_init=NORMAL, name="embed")(x_BnD)
    _, m, n = target_BMn.shape
    side = round(n**0.5)
    token_E = self.param("mask_token", NORMAL, (self.dim,))
    target_CnE = fold_views(target_BMn)[:, :, None]  # C = B * M
    x_CnE = jnp.where(target_CnE, token_E.reshape(1, 1, -1), x_BnE.repeat(m, axis=0))
    x_CnE += jnp.asarray(sincos(side, side, self.dim)).reshape(1, n, self.dim)
    hide_Cn = hide_Bn.repeat(m, axis=0) & ~fold_views(target_BMn)
    for i in range(self.depth):
      block = make_block(self.encoder.remat)(
        self.heads, 0.0, self.encoder.dtype, name=f"block{i + 1}"
      )
      x_CnE, _ = block(x_CnE, train, hide_Cn)
    x_CnE = nn.LayerNorm(name="norm")(x_CnE.astype(jnp.float32))
    predicted_CnD = nn.Dense(x_BnD.shape[-1], kernel_init=NORMAL, name="out")(x_CnE)
    return features.pooled, unfold_views(predicted_CnD, m)

  def teach(self, images: Array, train: bool):
    """Pooled [N, D], and the patches' features [N, n, D] that are to be predicted."""
    features = self.encoder(images, train)
    tokens_BnD = features.tokens[:, self.encoder.num_prefix :]
    return features.pooled, standardise(tokens_BnD)


def standardise(x: Array) -> Array:
  """LayerNorm without parameters."""
  mean = jnp.mean(x, axis=-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-5)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  tau: float = 0.996,
  num_targets: int = 4,
  target_area: tuple[float, float] = (0.15, 0.2),
  target_aspect: tuple[float, float] = (0.75, 1.5),
  context_area: tuple[float, float] = (0.85, 1.0),
  predictor_dim: int = 384,
  predictor_depth: int = 12,
  predictor_heads: int = 12,
) -> Method:
  """I-JEPA's Method.

  Args:
    encoder: a ViT.
    views: "global" with count 1 or more; the paper only crops, and draws areas from 0.3 to 1.
    run: total_steps is the length of tau's schedule.
    tau: kept by the moving average at step 0, rising to 1 linearly.
    num_targets: blocks to predict. target_area, target_aspect: of the blocks to predict,
      relative to the view.
    context_area: of the block that the context is, square.
    predictor_dim, predictor_depth, predictor_heads: of the predictor.
  """
  check_fraction("ijepa", tau=tau)
  check_range("ijepa", most=1, target_area=target_area, context_area=context_area)
  check_range("ijepa", most=math.inf, target_aspect=target_aspect)
  patch = check_vit("ijepa", encoder)
  side = global_views(views, method="ijepa", at_least=1, local=False).size // patch
  network = Network(encoder, predictor_dim, predictor_depth, predictor_heads)

  def draw_blocks(key, num):
    keys, grid = jax.random.split(key), (side, side)
    target_Bn = random_blocks(
      keys[0], num * num_targets, grid, area=target_area, aspect=target_aspect
    )
    target_BMn = unfold_views(target_Bn, num_targets)
    context_Bn = random_blocks(keys[1], num, grid, area=context_area, aspect=(1.0, 1.0))
    return ~context_Bn | jnp.any(target_BMn, axis=1), target_BMn

  def init(key, views):
    images = fold_views(views["global"])
    params, stats = init_network(network, key, images, *draw_blocks(key, images.shape[0]))
    return params, {"batch_stats": stats, "target": make_target(params, stats, ("encoder",))}

  def loss(params, method_state, views, key, step):
    del step
    keys = jax.random.split(key, 3)
    b, v = views["global"].shape[:2]
    hide_Bn, target_BMn = draw_blocks(keys[2], b * v)
    (h_BVD, predicted_BVMnD), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0], hide_Bn, target_BMn
    )
    (g_BVD, wanted_BVnD), target = forward_target(
      network, method_state["target"], views["global"], method="teach"
    )
    error_BVMnD = smooth_l1(predicted_BVMnD - wanted_BVnD[:, :, None])
    error_Bn = fold_views(fold_views(jnp.mean(error_BVMnD, axis=-1)))
    value = jnp.mean(mean_where(error_Bn, fold_views(target_BMn)))
    aux = Aux(
      method_state={"batch_stats": stats, "target": target},
      metrics={"prediction": value, "hidden": jnp.mean(hide_Bn)},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=g_BVD[:, 0],
    )
    return value, aux

  after_update = follow(lambda step: tau + (1 - tau) * step / run.total_steps)
  return Method(views, init, loss, after_update, encode_with(encoder, target=True))


def smooth_l1(x: Array) -> Array:
  """x^2 / 2 up to 1, |x| - 1/2 beyond: torch's, with beta 1."""
  size = jnp.abs(x)
  return jnp.where(size < 1, x * x / 2, size - 0.5)
