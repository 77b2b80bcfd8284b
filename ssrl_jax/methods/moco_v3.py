"""MoCo v3: BYOL's networks with a contrastive loss among the batch (Chen et al. 2021).

Official code: facebookresearch/moco-v3 moco/builder.py. Its loss of each direction is multiplied
by 2 * temperature; kept here, since learning rates depend on it. A random, frozen patch projection
stabilises ViTs (section 4.2): `PATCHES`. Departures: BatchNorm statistics over both views
at once, where the official code normalises each view's batch by itself.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import info_nce
from ssrl_jax.method import (
  NEVER,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  cosine_tau,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_spec,
  init_network,
  make_target,
)
from ssrl_jax.models.heads import MLP, JointEmbedding

# A ViT's patch projection, by itself or within one or both of the other encoders.
PATCHES = tuple(f"encoder/{'backbone/' * depth}patches" for depth in range(3))


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  temperature: float = 1.0,
  tau: float = 0.99,
  hidden_dim: int = 4096,
  out_dim: int = 256,
  num_layers: int = 2,
  predictor_norm: bool = False,
  block: int = 0,
) -> Method:
  """MoCo v3's Method.

  Args:
    encoder: called as encoder(images, train) -> Features. A ViT's patch projection is frozen.
    views: one spec named "global" with count 2.
    run: total_steps is the length of tau's schedule.
    temperature: of the cosines, > 0; 1.0 for ResNet-50, 0.2 for ViTs.
    tau: kept by the moving average at step 0, rising to 1 as half a cosine.
    hidden_dim, out_dim, num_layers: of the projector (2 layers for ResNets, 3 for ViTs); the
      predictor has 2 layers.
    predictor_norm: whether BatchNorm, without scale and offset, ends the predictor: official for
      ViTs, not for ResNets.
    block: keys at a time, 0 = all (losses/contrastive.py).
  """
  check_positive("moco_v3", temperature=temperature)
  check_fraction("moco_v3", tau=tau)
  global_spec(views, method="moco_v3", count=2)
  network = JointEmbedding(
    encoder,
    MLP(hidden=hidden_dim, out=out_dim, layers=num_layers),
    MLP(hidden=hidden_dim, out=out_dim, final_norm=predictor_norm),
  )

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = make_target(params, stats, ("encoder", "projector"))
    return params, {"batch_stats": stats, "target": target}

  def loss(params, method_state, views, key, step):
    del step
    (h_BVD, z_BVP, q_BVP), stats = forward(
      network, params, method_state["batch_stats"], views["global"], key
    )
    (_, k_BVP), target = forward_target(
      network, method_state["target"], views["global"], method="project"
    )
    options = {"temperature": temperature, "block": block}
    loss_B = info_nce(q_BVP[:, 0], k_BVP[:, 1], **options)
    loss_B += info_nce(q_BVP[:, 1], k_BVP[:, 0], **options)
    value = 2 * temperature * jnp.mean(loss_B)
    aux = Aux(
      method_state={"batch_stats": stats, "target": target},
      metrics={"info_nce": jnp.mean(loss_B) / 2},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVP[:, 0]),
      targets=k_BVP[:, 1],
    )
    return value, aux

  after_update = follow(lambda step: cosine_tau(tau, step, run.total_steps))
  frozen = dict.fromkeys(PATCHES, NEVER)
  return Method(views, init, loss, after_update, encode_with(encoder), frozen=frozen)
