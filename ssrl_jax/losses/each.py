"""One function of many batches of embeddings."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax

from ssrl_jax.method import Array


def each(function: Callable[[Array], Array], z_NBP: Array) -> Array:
  """`jax.vmap(function)`, which may factor matrices; on a CPU one batch after another.

  jaxlib's LAPACK kernels (0.10, 0.11) hand the matrices of a batch to the very threads that they
  run in, and wait for them. When several devices, or kernels of one program, do so at the same
  time, all threads wait and none is left to work: the program hangs. A single matrix is not handed
  on.
  """
  return lax.platform_dependent(
    z_NBP, cpu=lambda z_NBP: lax.map(function, z_NBP), default=jax.vmap(function)
  )
