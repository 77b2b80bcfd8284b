"""MoCo v2: find the other view's key among the keys of earlier batches (Chen et al. 2020).

A moving average of the network makes the keys, a queue holds them. Official code:
facebookresearch/moco. Departures: none of its shuffling of BatchNorm, which hides the batch's
statistics on each GPU from the loss; here statistics are those of the whole batch. Asymmetric, as
the official code: view 0 asks, view 1 answers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import info_nce_queue
from ssrl_jax.method import (
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  check_queue,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_spec,
  init_network,
  make_target,
  normalise,
  push,
  random_queue,
)
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  temperature: float = 0.2,
  tau: float = 0.999,
  queue_size: int = 65536,
  hidden_dim: int = 2048,
  out_dim: int = 128,
  block: int = 0,
) -> Method:
  """MoCo v2's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: queue_size must be a multiple of its batch size.
    temperature: of the cosines, > 0.
    tau: kept by the moving average, constant.
    queue_size: keys of earlier batches, at random at the start.
    hidden_dim, out_dim: of the projector, which has no BatchNorm.
    block: keys at a time, 0 = all (losses/contrastive.py).
  """
  check_positive("moco_v2", temperature=temperature)
  check_fraction("moco_v2", tau=tau)
  check_queue("moco_v2", queue_size, run)
  global_spec(views, method="moco_v2", count=2)
  head = MLP(hidden=hidden_dim, out=out_dim, norm=False, final_norm=False, final_bias=True)
  network = JointEmbedding(encoder, head)

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    queue_QP = random_queue(key, queue_size, out_dim)
    target = make_target(params, stats, ("encoder", "projector"))
    return params, {"batch_stats": stats, "target": target, "queue": queue_QP}

  def loss(params, method_state, views, key, step):
    del step
    queue_QP = method_state["queue"]
    (h_BVD, q_BVP, _), stats = forward(
      network, params, method_state["batch_stats"], views["global"][:, :1], key
    )
    (_, k_BVP), target = forward_target(
      network, method_state["target"], views["global"][:, 1:], method="project"
    )
    q_BP, k_BP = q_BVP[:, 0], normalise(k_BVP[:, 0])
    loss_B = info_nce_queue(q_BP, k_BP, queue_QP, temperature=temperature, block=block)
    value = jnp.mean(loss_B)
    aux = Aux(
      method_state={"batch_stats": stats, "target": target, "queue": push(queue_QP, k_BP)},
      metrics={"info_nce": value},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(q_BP),
      targets=k_BP,
    )
    return value, aux

  after_update = follow(lambda step: tau)
  return Method(views, init, loss, after_update, encode_with(encoder))
