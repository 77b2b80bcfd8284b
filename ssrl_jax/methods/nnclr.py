"""NNCLR: the positive of a view is the nearest neighbour of the other view in a queue.

Dwibedi et al. 2021. Neighbours come from a support queue of earlier projections of first views; no
target network. As solo-learn's and lightly's code (the authors' own is not public). Departures:
BatchNorm statistics over both views at once.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import info_nce
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_positive,
  check_queue,
  encode_with,
  exact_matmul,
  fold_views,
  forward,
  global_spec,
  init_network,
  keep,
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
  temperature: float = 0.1,
  queue_size: int = 98304,
  hidden_dim: int = 2048,
  out_dim: int = 256,
  num_layers: int = 3,
  predictor_dim: int = 4096,
  block: int = 0,
) -> Method:
  """NNCLR's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: queue_size must be a multiple of its batch size.
    temperature: of the cosines, > 0.
    queue_size: projections that neighbours are looked for among, at random at the start.
    hidden_dim, out_dim, num_layers: of the projector. predictor_dim: hidden one of the predictor.
    block: keys at a time, 0 = all (losses/contrastive.py).
  """
  check_positive("nnclr", temperature=temperature)
  check_queue("nnclr", queue_size, run)
  global_spec(views, method="nnclr", count=2)
  network = JointEmbedding(
    encoder,
    MLP(hidden=hidden_dim, out=out_dim, layers=num_layers),
    MLP(hidden=predictor_dim, out=out_dim, final_norm=False, final_bias=True),
  )

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    queue_QP = random_queue(key, queue_size, out_dim)
    return params, {"batch_stats": stats, "queue": queue_QP}

  def loss(params, method_state, views, key, step):
    del step
    queue_QP = method_state["queue"]
    (h_BVD, z_BVP, q_BVP), stats = forward(
      network, params, method_state["batch_stats"], views["global"], key
    )
    z_BVP = jax.lax.stop_gradient(normalise(z_BVP))
    near1_BP, near2_BP = (nearest(z_BVP[:, v], queue_QP) for v in range(2))
    options = {"temperature": temperature, "block": block}
    # The neighbours ask and the predictions answer, as equation 3 of the paper.
    loss_B = info_nce(near1_BP, q_BVP[:, 1], **options)
    loss_B += info_nce(near2_BP, q_BVP[:, 0], **options)
    value = jnp.mean(loss_B) / 2
    aux = Aux(
      method_state={"batch_stats": stats, "queue": push(queue_QP, z_BVP[:, 0])},
      metrics={
        "info_nce": value,
        "neighbour_cosine": jnp.mean(jnp.sum(near1_BP * z_BVP[:, 0], axis=1)),
      },
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=z_BVP[:, 0],
      targets=z_BVP[:, 1],
    )
    return value, aux

  return Method(views, init, loss, keep, encode_with(encoder))


def nearest(z_BP: Array, queue_QP: Array) -> Array:
  """The row of the queue with the largest cosine to each row; all rows of unit length."""
  return queue_QP[jnp.argmax(exact_matmul(z_BP, queue_QP.T), axis=1)]
