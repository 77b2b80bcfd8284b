"""Objectives on assignments to prototypes: Sinkhorn codes, centred teachers, cross-entropy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ssrl_jax.method import Array


def sinkhorn(
  scores_NK: Array,
  *,
  eps: Array | float,
  iterations: int = 3,
  others_QK: Array | None = None,
  chosen_N: Array | None = None,
) -> Array:
  """Codes: assignments of N rows to K prototypes that use every prototype alike; rows sum to 1.

  Caron et al. 2020 (SwAV), equation 3. The official code exponentiates first and overflows in
  bfloat16 (and in float32 where a score exceeds 88 eps); this one stays in log space.

  Args:
    scores_NK: products of embeddings and prototypes, of the global batch.
    eps: entropy of the codes, > 0; 0.05 in the paper.
    iterations: 3 in the paper.
    others_QK: scores of a queue, which are to use the prototypes alike together with the batch's.
    chosen_N: bool, the rows that count, one or more; None: all. What the others get means nothing.
  """
  # Not one array: the queue's rows would be dealt out to the devices among which the batch is cut.
  given = [scores_NK] if others_QK is None else [scores_NK, others_QK]
  parts = [x.astype(jnp.float32) / eps for x in given]
  count = [None if chosen_N is None else chosen_N[:, None], None]
  for _ in range(iterations):
    sums = [jax.nn.logsumexp(x, 0, keepdims=True, where=w) for x, w in zip(parts, count)]
    parts = [x - functools.reduce(jnp.logaddexp, sums) for x in parts]
    parts = [x - jax.nn.logsumexp(x, axis=1, keepdims=True) for x in parts]
  return jnp.exp(parts[0])


def centred_softmax(scores: Array, centre_K: Array, *, temperature: Array | float) -> Array:
  """DINO's teacher: softmax((scores - centre) / temperature) over the last axis.

  Caron et al. 2021, equation 1 and section 3.1.
  """
  centre = centre_K.reshape((1,) * (scores.ndim - 1) + (-1,))
  return jax.nn.softmax((scores.astype(jnp.float32) - centre) / temperature)


def cross_entropy(target: Array, scores: Array, *, temperature: float) -> Array:
  """-sum_k target_k log softmax(scores / temperature)_k over the last axis; others are kept."""
  return -jnp.sum(target * jax.nn.log_softmax(scores.astype(jnp.float32) / temperature), axis=-1)


def mean_entropy_gap(scores: Array, *, temperature: float) -> Array:
  """log K minus the entropy of the mean of softmax(scores / temperature); a scalar in [0, log K].

  The mean is over all axes but the last. Assran et al. 2022 (MSN), equation 1, whose regulariser is
  minus that entropy ("me-max"); the official losses.py adds log K, too.
  """
  p_NK = jax.nn.softmax(scores.astype(jnp.float32) / temperature).reshape(-1, scores.shape[-1])
  mean_K = jnp.mean(p_NK, axis=0)
  # An entry that underflows to 0 would have an infinite gradient.
  log_K = jnp.log(jnp.maximum(mean_K, jnp.finfo(jnp.float32).tiny))
  return jnp.log(len(mean_K)) + jnp.sum(mean_K * log_K)


def cross_view_entropy(target_BTK: Array, scores_BVK: Array, *, temperature: float) -> Array:
  """Mean cross-entropy over all pairs of a target view t and another view v; scalar.

  Target view t is view number t of the online ones; a view is not compared with itself. SwAV's
  and DINO's average alike.
  """
  log_BVK = jax.nn.log_softmax(scores_BVK.astype(jnp.float32) / temperature)
  exact = jax.lax.Precision.HIGHEST
  entropy_TV = -jnp.einsum("BTK,BVK->TV", target_BTK, log_BVK, precision=exact)
  entropy_TV /= target_BTK.shape[0]
  same_TV = jnp.eye(*entropy_TV.shape, dtype=bool)
  return jnp.sum(jnp.where(same_TV, 0, entropy_TV)) / jnp.sum(~same_TV)
