"""RotNet: tell by how many quarter turns an image is turned (Gidaris et al. 2018).

A pretext task. View number v of each image is turned v quarter turns, so that all four are in every
batch, as in the official code (gidariss/FeatureLearningRotNet), which turns after cropping and
flipping. (VISSL flips after turning, which makes 90 and 270 degrees the same question.) Departures:
each of the four has a crop of its own.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ssrl_jax.method import (
  Aux,
  Method,
  Run,
  ViewSpec,
  encode_with,
  fold_views,
  forward,
  global_spec,
  init_network,
  keep,
)
from ssrl_jax.models.heads import MLP, JointEmbedding

TURNS = 4


def make(*, encoder: nn.Module, views: tuple[ViewSpec, ...], run: Run) -> Method:
  """RotNet's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 4.
    run: unused, the objective has no schedule.
  """
  del run
  global_spec(views, method="rotation", count=TURNS)
  classifier = MLP(hidden=0, out=TURNS, layers=1, final_norm=False, final_bias=True)
  network = JointEmbedding(encoder, classifier)

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    return params, {"batch_stats": stats}

  def loss(params, method_state, views, key, step):
    del step
    turned_BVHWC = jnp.stack(
      [jnp.rot90(views["global"][:, v], v, axes=(1, 2)) for v in range(TURNS)], axis=1
    )
    (h_BVD, logits_BVK, _), stats = forward(
      network, params, method_state["batch_stats"], turned_BVHWC, key
    )
    turn_BV = jnp.broadcast_to(jnp.arange(TURNS)[None], logits_BVK.shape[:2])
    value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BVK, turn_BV))
    aux = Aux(
      method_state={"batch_stats": stats},
      metrics={
        "cross_entropy": value,
        "accuracy": 100 * jnp.mean(jnp.argmax(logits_BVK, axis=-1) == turn_BV),
      },
      features=jax.lax.stop_gradient(h_BVD[:, 0]),  # upright
      embeddings=jax.lax.stop_gradient(h_BVD[:, 0]),
    )
    return value, aux

  return Method(views, init, loss, keep, encode_with(encoder))
