"""Objectives that pull views of one image together."""

from __future__ import annotations

import jax.numpy as jnp

from ssrl_jax.method import Array, normalise


def cosine_distance(x: Array, y: Array) -> Array:
  """2 - 2 cos over the last axis, which is the squared distance of the unit vectors; in [0, 4].

  Grill et al. 2020 (BYOL), equation 2. Leading axes are kept: [..., P], [..., P] -> [...].
  """
  return 2 - 2 * jnp.sum(normalise(x) * normalise(y), axis=-1)
