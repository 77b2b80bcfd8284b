"""Constraints on the distribution of a batch of embeddings: what keeps it from collapsing without
negative samples. Each takes [B, P] and returns a scalar to be minimised; the batch is the global
batch. None is a mean over examples, so none has per-example values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssrl_jax.losses.factor import inverse_cholesky
from ssrl_jax.method import Array, exact_matmul, normalise


def coding_rate(z_BP: Array, *, eps: float) -> Array:
  """Minus the coding rate of the batch, per dimension: -logdet(I + P / (B eps^2) Z'Z) / (2 P).

  Yu et al. 2020 (MCR2), equation 1, on rows of unit length as in EMP-SSL (Tong et al. 2023) and
  SimDINO (Wu et al. 2025). It is least when the batch fills every direction of the sphere alike:
  then it is -log(1 + 1 / eps^2) / 2, for B >= P. Divided by P so that its weight does not depend
  on the width.

  Args:
    z_BP: embeddings, any scale.
    eps: permitted distortion, > 0; smaller asks for a flatter spectrum.
  """
  z_BP = normalise(z_BP)
  b, p = z_BP.shape
  # The same determinant, the smaller matrix.
  gram = exact_matmul(z_BP.T, z_BP) if p <= b else exact_matmul(z_BP, z_BP.T)
  scaled = jnp.eye(gram.shape[0], dtype=gram.dtype) + gram * (p / (b * eps**2))
  return jnp.sum(jnp.log(jnp.diagonal(inverse_cholesky(scaled)))) / p  # log det of the inverse / 2


def variance_covariance(z_BP: Array) -> tuple[Array, Array]:
  """VICReg's two regularisers of one branch: hinge on the standard deviation, off-diagonal squares.

  Bardes et al. 2022 (VICReg), equations 1 to 4. As the official code: variance unbiased, 1e-4
  inside the root, the covariance term divided by P. Equation 6 sums both terms over the two
  branches with weights 25 and 1; the official code halves the variance term, not the other.

  Returns:
    mean_j max(0, 1 - sqrt(var_j + 1e-4)), and sum_{i != j} cov_ij^2 / P.
  """
  z_BP = z_BP.astype(jnp.float32)
  b, p = z_BP.shape
  z_BP = z_BP - jnp.mean(z_BP, axis=0, keepdims=True)
  cov_PP = exact_matmul(z_BP.T, z_BP) / (b - 1)
  variance = jnp.mean(jax.nn.relu(1 - jnp.sqrt(jnp.diagonal(cov_PP) + 1e-4)))
  covariance = jnp.sum(jnp.where(jnp.eye(p, dtype=bool), 0, cov_PP) ** 2) / p
  return variance, covariance


def sigreg(z_BP: Array, key: Array, *, num_directions: int = 256) -> Array:
  """SIGReg: distance of random 1-D projections from a standard normal (Epps-Pulley statistic).

  Balestriero & LeCun 2025 (LeJEPA); as the official lejepa/univariate/epps_pulley.py: 17 points
  t in [0, 3], trapezoid weights doubled for the symmetric half, window exp(-t^2 / 2), times B.

  Args:
    z_BP: embeddings, NOT normalised: the target distribution has unit variance in each direction.
    key: draws the directions, the same on every device; a new one each step.
    num_directions: unit vectors per call (256 in the paper's minimal form, 1024 in full).
  """
  z_BP = z_BP.astype(jnp.float32)
  b, p = z_BP.shape
  direction_PK = jax.random.normal(key, (p, num_directions))
  direction_PK = direction_PK / jnp.linalg.norm(direction_PK, axis=0, keepdims=True)
  t_T = jnp.linspace(0.0, 3.0, 17)
  dt = 3.0 / 16
  weight_T = jnp.full(17, 2 * dt).at[jnp.array([0, 16])].set(dt) * jnp.exp(-(t_T**2) / 2)
  angle_BKT = exact_matmul(z_BP, direction_PK)[:, :, None] * t_T[None, None, :]
  real_KT = jnp.mean(jnp.cos(angle_BKT), axis=0) - jnp.exp(-(t_T**2) / 2)[None, :]
  imaginary_KT = jnp.mean(jnp.sin(angle_BKT), axis=0)
  statistic_K = b * jnp.sum((real_KT**2 + imaginary_KT**2) * weight_T[None, :], axis=1)
  return jnp.mean(statistic_K)


def koleo(z_BP: Array) -> Array:
  """KoLeo: minus the mean logarithm of the distance to the nearest neighbour on the unit sphere.

  Sablayrolles et al. 2019, equation 2 (Kozachenko-Leonenko's estimate of the entropy); as the
  official dinov2/loss/koleo_loss.py: 1e-8 is added to each difference, and to the distance.

  Args:
    z_BP: embeddings, any scale; two or more.
  """
  z_BP = normalise(z_BP)
  same_BB = jnp.eye(len(z_BP), dtype=bool)
  nearest_B = jnp.argmax(jnp.where(same_BB, -jnp.inf, exact_matmul(z_BP, z_BP.T)), axis=1)
  distance_B = jnp.linalg.norm(z_BP - z_BP[nearest_B] + 1e-8, axis=1)
  return -jnp.mean(jnp.log(distance_B + 1e-8))


def covariance_contrast(z_BP: Array, past_PP: Array, *, momentum: float) -> tuple[Array, Array]:
  """Mean squared length of the embeddings along the moving average of their own second moments.

  Zhu et al. 2022 (TiCo): mean_b z_b' C z_b, C = momentum past + (1 - momentum) Z'Z / B, not
  centred; as lightly's loss/tico_loss.py: this batch is in C, with gradient, the past has none.

  Args:
    z_BP: embeddings, any scale; rows are brought to unit length first.
    past_PP: C of the step before, 0 at the first.
    momentum: kept of it, in (0, 1).

  Returns:
    A scalar in [0, 1], at least 1 / P where C is the batch's moments; and C, without gradient.
  """
  z_BP = normalise(z_BP)
  moments_PP = exact_matmul(z_BP.T, z_BP) / len(z_BP)
  c_PP = momentum * jax.lax.stop_gradient(past_PP) + (1 - momentum) * moments_PP
  # The mean over the batch is a trace: of what the devices hold, only the moments are summed.
  return jnp.sum(c_PP * moments_PP), jax.lax.stop_gradient(c_PP)
