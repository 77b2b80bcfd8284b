"""VICReg: two views' embeddings are close; each dimension varies, no two vary together.

Bardes et al. 2022. Official code: facebookresearch/vicreg main_vicreg.py. Its variance term is
halved (the mean over the two branches) while its covariance term is their sum, unlike the paper's
equation 6; both are over the gathered, global batch, variance unbiased. Departures: BatchNorm
statistics over both views at once.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.distribution import variance_covariance
from ssrl_jax.method import Method, Run, ViewSpec, global_spec, joint_embedding
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  invariance_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  hidden_dim: int = 8192,
  out_dim: int = 8192,
  num_layers: int = 3,
) -> Method:
  """VICReg's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: unused, the objective has no schedule.
    invariance_weight, variance_weight, covariance_weight: of the three terms; without variance it
      collapses (paper, table 7).
    hidden_dim, out_dim, num_layers: of the projector ("expander").
  """
  del run
  global_spec(views, method="vicreg", count=2)
  head = MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, final_norm=False)
  network = JointEmbedding(encoder, head)

  def objective(z_BVP, q_BVP, label_B, key):
    """main_vicreg.py, VICReg.forward."""
    del q_BVP, label_B, key
    invariance = jnp.mean((z_BVP[:, 0] - z_BVP[:, 1]) ** 2)
    variance, covariance = (
      jnp.mean(x_V) for x_V in jax.vmap(variance_covariance, in_axes=1)(z_BVP)
    )
    terms = {"invariance": invariance, "variance": variance, "covariance": 2 * covariance}
    weights = invariance_weight, variance_weight, covariance_weight
    return sum(w * x for w, x in zip(weights, terms.values())), terms

  return joint_embedding(network, views, objective, unit_variance=True)
