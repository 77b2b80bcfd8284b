"""Inverse Cholesky factors, nuclear norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from ssrl_jax.method import Array, exact_matmul


@jax.custom_vjp
def inverse_cholesky(a_PP: Array) -> Array:
  """W = inv(L) of the lower Cholesky factor L of a symmetric positive definite matrix: W a W' = I.

  NaN where it is not positive definite. The gradient, W' phi(-dW W') W with phi the lower triangle
  and half of the diagonal, needs no factorisation of its own.

  On a CPU the matrices of a batch are factored one after another: jaxlib's LAPACK kernels (0.10,
  0.11) hand a batch to the very threads that they run in, and wait for them. When several devices,
  or kernels of one program, do so at the same time, all threads wait and none is left to work: the
  program hangs. A single matrix is not handed on.
  """
  return lax.platform_dependent(
    a_PP, cpu=sequential_vmap(_inverse_cholesky), default=_inverse_cholesky
  )


def _inverse_cholesky(a_PP: Array) -> Array:
  identity = jnp.eye(a_PP.shape[0], dtype=a_PP.dtype)
  return lax.linalg.triangular_solve(
    jnp.linalg.cholesky(a_PP), identity, left_side=True, lower=True
  )


def _forward(a_PP: Array) -> tuple[Array, Array]:
  w_PP = inverse_cholesky(a_PP)
  return w_PP, w_PP


def _backward(w_PP: Array, dw_PP: Array) -> tuple[Array]:
  inner_PP = jnp.tril(exact_matmul(-dw_PP, w_PP.T))
  inner_PP = inner_PP - jnp.diag(jnp.diagonal(inner_PP)) / 2
  da_PP = exact_matmul(exact_matmul(w_PP.T, inner_PP), w_PP)
  return ((da_PP + da_PP.T) / 2,)


inverse_cholesky.defvjp(_forward, _backward)


@jax.custom_vjp
def nuclear_norm(x_MN: Array) -> Array:
  """The sum of the singular values; a scalar, at most sqrt(min(M, N)) times the Frobenius norm.

  The gradient is U V' of x = U S V', whichever vectors are found for singular values that coincide.
  In directions without any (up to 1e-6 of the largest) the norm has a kink, and they get no
  gradient: the smallest of the subgradients, and what central differences give. So it is finite
  for every finite matrix, and 0 for zeros. As above, on a CPU a batch is taken one after another.
  """
  return _norm_and_gradient(x_MN)[0]


def _norm_and_gradient(x_MN: Array) -> tuple[Array, Array]:
  return lax.platform_dependent(x_MN, cpu=sequential_vmap(_decompose), default=_decompose)


def _decompose(x_MN: Array) -> tuple[Array, Array]:
  u_MK, s_K, v_KN = jnp.linalg.svd(x_MN, full_matrices=False)
  there_K = s_K > 1e-6 * s_K[0]
  return jnp.sum(s_K), exact_matmul(jnp.where(there_K[None, :], u_MK, 0), v_KN)


nuclear_norm.defvjp(_norm_and_gradient, lambda gradient_MN, d: (d * gradient_MN,))
