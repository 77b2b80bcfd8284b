"""Objectives on the correlations between dimensions of two views' embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssrl_jax.losses.factor import inverse_cholesky
from ssrl_jax.method import Array, exact_matmul


def barlow_twins(z1_BP: Array, z2_BP: Array, *, off_diagonal_weight: float) -> Array:
  """Squared distance of the views' cross-correlation matrix from the identity; a scalar.

  Zbontar et al. 2021, equation 1. As the official main.py: each dimension standardised over the
  global batch by a BatchNorm without scale (biased variance, 1e-5), the product divided by the
  global batch size.

  Args:
    z1_BP, z2_BP: embeddings, any scale.
    off_diagonal_weight: of the squares beside the diagonal (lambda; 0.0051 in the paper).
  """
  z1_BP, z2_BP = _standardise(z1_BP), _standardise(z2_BP)
  c_PP = exact_matmul(z1_BP.T, z2_BP) / z1_BP.shape[0]
  diagonal_PP = jnp.eye(c_PP.shape[0], dtype=bool)
  on = jnp.sum(jnp.where(diagonal_PP, c_PP - 1, 0) ** 2)
  return on + off_diagonal_weight * jnp.sum(jnp.where(diagonal_PP, 0, c_PP) ** 2)


def _standardise(z_BP: Array) -> Array:
  z_BP = z_BP.astype(jnp.float32)
  z_BP = z_BP - jnp.mean(z_BP, axis=0, keepdims=True)
  return z_BP * jax.lax.rsqrt(jnp.mean(z_BP**2, axis=0, keepdims=True) + 1e-5)


def whiten(z_BP: Array, *, eps: float) -> Array:
  """The rows with mean 0 and covariance the identity, by the inverse Cholesky factor.

  Ermolov et al. 2021 (W-MSE); as the official whitening.py: unbiased covariance, shrunk to
  (1 - eps) cov + eps I, the triangular root and not the symmetric one. B must exceed P.
  """
  z_BP = z_BP.astype(jnp.float32)
  b, p = z_BP.shape
  z_BP = z_BP - jnp.mean(z_BP, axis=0, keepdims=True)
  cov_PP = (1 - eps) * exact_matmul(z_BP.T, z_BP) / (b - 1) + eps * jnp.eye(p)
  return exact_matmul(z_BP, inverse_cholesky(cov_PP).T)
