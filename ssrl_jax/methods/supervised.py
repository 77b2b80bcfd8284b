"""Supervised: cross-entropy on the labels, with the same views, encoder, step and evaluations.

An upper control, not self-supervised. The classifier is a linear layer on the pooled features
(`logits` stands in for the projection in the health figures). Images without a label (-1) count
for nothing.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import optax

from ssrl_jax.method import Method, Run, ViewSpec, check_labelled, global_views, joint_embedding
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  label_smoothing: float = 0.0,
) -> Method:
  """The supervised Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: "global" with count 1 or more; each view is an example of its own.
    run: its num_classes is the number of outputs; unlabelled data are refused.
    label_smoothing: share of the target spread over all classes, in [0, 1).
  """
  check_labelled("supervised", run)
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"supervised: label_smoothing is {label_smoothing}; expected 0 <= x < 1")
  global_views(views, method="supervised", at_least=1, local=False)
  classifier = MLP(hidden=0, out=run.num_classes, layers=1, final_norm=False, final_bias=True)
  network = JointEmbedding(encoder, classifier)

  def objective(logits_BVK, q_BVP, label_B, key):
    del q_BVP, key
    target_BK = nn.one_hot(label_B, run.num_classes) * (1 - label_smoothing)  # -1: zeros
    target_BK += label_smoothing / run.num_classes
    shape = logits_BVK.shape
    target_BVK = jnp.broadcast_to(target_BK[:, None], shape)
    known_B1 = (label_B >= 0).astype(jnp.float32)[:, None]
    loss_BV = optax.softmax_cross_entropy(logits_BVK, target_BVK) * known_B1
    loss = jnp.sum(loss_BV) / jnp.maximum(jnp.sum(known_B1) * shape[1], 1)
    right_BV = (jnp.argmax(logits_BVK, axis=-1) == label_B[:, None]) * known_B1
    accuracy = 100 * jnp.sum(right_BV) / jnp.maximum(jnp.sum(known_B1) * shape[1], 1)
    return loss, {"cross_entropy": loss, "accuracy": accuracy}

  return joint_embedding(network, views, objective)
