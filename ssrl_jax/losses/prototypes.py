"""Objectives on assignments to prototypes: Sinkhorn codes, centred teachers, cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssrl_jax.method import Array


def sinkhorn(scores_NK: Array, *, eps: float, iterations: int = 3) -> Array:
  """Codes: assignments of N rows to K prototypes that use every prototype alike; rows sum to 1.

  Caron et al. 2020 (SwAV), equation 3. The official code exponentiates first and overflows in
  bfloat16 (and in float32 where a score exceeds 88 eps); this one stays in log space.

  Args:
    scores_NK: products of embeddings and prototypes, of the global batch.
    eps: entropy of the codes, > 0; 0.05 in the paper.
    iterations: 3 in the paper.
  """
  log_NK = scores_NK.astype(jnp.float32) / eps
  for _ in range(iterations):
    log_NK -= jax.nn.logsumexp(log_NK, axis=0, keepdims=True)
    log_NK -= jax.nn.logsumexp(log_NK, axis=1, keepdims=True)
  return jnp.exp(log_NK)


def centred_softmax(scores: Array, centre_K: Array, *, temperature: Array | float) -> Array:
  """DINO's teacher: softmax((scores - centre) / temperature) over the last axis.

  Caron et al. 2021, equation 1 and section 3.1.
  """
  centre = centre_K.reshape((1,) * (scores.ndim - 1) + (-1,))
  return jax.nn.softmax((scores.astype(jnp.float32) - centre) / temperature)


def cross_entropy(target: Array, scores: Array, *, temperature: float) -> Array:
  """-sum_k target_k log softmax(scores / temperature)_k over the last axis; others are kept."""
  return -jnp.sum(target * jax.nn.log_softmax(scores.astype(jnp.float32) / temperature), axis=-1)


def cross_view_entropy(target_BTK: Array, scores_BVK: Array, *, temperature: float) -> Array:
  """Mean cross-entropy over all pairs of a target view t and another view v; scalar.

  Target view t is view number t of the online ones; a view is not compared with itself. SwAV's
  and DINO's average alike.
  """
  log_BVK = jax.nn.log_softmax(scores_BVK.astype(jnp.float32) / temperature)
  entropy_TV = -jnp.einsum("BTK,BVK->TV", target_BTK, log_BVK) / target_BTK.shape[0]
  same_TV = jnp.eye(*entropy_TV.shape, dtype=bool)
  return jnp.sum(jnp.where(same_TV, 0, entropy_TV)) / jnp.sum(~same_TV)
