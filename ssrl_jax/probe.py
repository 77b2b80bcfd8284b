"""The online linear probe: a classifier trained beside the encoder, on features without gradient.

It costs one small matrix product a step, shows while a run is young whether it learns anything,
and cannot influence the encoder: it has parameters and an optimizer of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssrl_jax.method import Array

SMOOTHING = 0.98  # of the running accuracy: about the last 50 steps


class Probe(NamedTuple):
  params: dict[str, Array]  # kernel [D, K], bias [1, K]
  opt_state: Any
  correct: Array  # running number of labelled examples that were right, the newest weighing most
  labelled: Array  # running number of labelled examples, weighted alike


def _optimizer(learning_rate: float) -> optax.GradientTransformation:
  return optax.adam(learning_rate)


def init_probe(num_features: int, num_classes: int, *, learning_rate: float) -> Probe:
  params = {"kernel": jnp.zeros((num_features, num_classes)), "bias": jnp.zeros((1, num_classes))}
  return Probe(params, _optimizer(learning_rate).init(params), jnp.zeros(()), jnp.zeros(()))


def update_probe(
  probe: Probe, features_BD: Array, label_B: Array, *, learning_rate: float
) -> tuple[Probe, dict[str, Array]]:
  """One Adam step on the batch; features are standardised with the batch's own statistics.

  Labels of -1 are unknown and count for nothing. The accuracy is that before each update, on the
  augmented training views, in percent of the labelled examples of about the last 50 steps; 0 until
  there is one.
  """
  h_BD = jax.lax.stop_gradient(features_BD).astype(jnp.float32)
  h_BD = (h_BD - jnp.mean(h_BD, 0, keepdims=True)) / (jnp.std(h_BD, 0, keepdims=True) + 1e-6)
  known_B = (label_B >= 0).astype(jnp.float32)
  num_known = jnp.sum(known_B)

  def loss_fn(params):
    logits_BK = h_BD @ params["kernel"] + params["bias"]
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, jnp.maximum(label_B, 0))
    right_B = (jnp.argmax(logits_BK, axis=-1) == label_B).astype(jnp.float32)
    return jnp.sum(loss_B * known_B) / jnp.maximum(num_known, 1), jnp.sum(right_B * known_B)

  (loss, num_right), grads = jax.value_and_grad(loss_fn, has_aux=True)(probe.params)
  updates, opt_state = _optimizer(learning_rate).update(grads, probe.opt_state)
  correct = SMOOTHING * probe.correct + num_right
  labelled = SMOOTHING * probe.labelled + num_known
  new = Probe(optax.apply_updates(probe.params, updates), opt_state, correct, labelled)
  return new, {"probe/loss": loss, "probe/accuracy": 100 * correct / jnp.maximum(labelled, 1e-6)}
