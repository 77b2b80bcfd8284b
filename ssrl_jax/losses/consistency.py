"""Objectives that pull views of one image together."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssrl_jax.losses.prototypes import cross_entropy
from ssrl_jax.method import Array, exact_matmul, normalise


def cosine_distance(x: Array, y: Array) -> Array:
  """2 - 2 cos over the last axis, which is the squared distance of the unit vectors; in [0, 4].

  Grill et al. 2020 (BYOL), equation 2. Leading axes are kept: [..., P], [..., P] -> [...].
  """
  return 2 - 2 * jnp.sum(normalise(x) * normalise(y), axis=-1)


def relation_entropy(
  s_BVP: Array,
  t_BP: Array,
  queue_QP: Array,
  *,
  temperature: float,
  teacher_temperature: float,
) -> Array:
  """Cross-entropy of a view's likeness to other pictures with a teacher's: its relations.

  Zheng et al. 2021 (ReSSL); as the official ressl.py: both distributions are over the queue alone,
  neither has the picture itself in it. Rows are brought to unit length first.

  Args:
    s_BVP: a student's embeddings of V views, any scale.
    t_BP: the teacher's embedding of the same picture; no gradient is meant to reach it.
    queue_QP: the teacher's embeddings of other pictures.
    temperature, teacher_temperature: divide the cosines of student and teacher; > 0.

  Returns:
    float32 [B, V], at least the entropy of the teacher's relations.
  """
  queue_PQ = normalise(queue_QP).T
  relations_BQ = jax.nn.softmax(exact_matmul(normalise(t_BP), queue_PQ) / teacher_temperature)
  cosine_BVQ = exact_matmul(normalise(s_BVP), queue_PQ)
  return cross_entropy(relations_BQ[:, None], cosine_BVQ, temperature=temperature)
