"""LeJEPA: all views predict the mean of the global ones; embeddings are an isotropic Gaussian.

Balestriero & LeCun 2025. No target network, no stop-gradient, no schedule: SIGReg alone keeps the
embeddings apart. Official code: galilai-group/lejepa, MINIMAL.md, where the centre is the mean of
all views; with local views the paper's centre, the mean of the global ones, is used, as lightly
does after its correction. Directions are drawn anew each step, the same for all views.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.distribution import sigreg
from ssrl_jax.method import Method, Run, ViewSpec, global_views, joint_embedding
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  sigreg_weight: float = 0.02,
  num_directions: int = 256,
  hidden_dim: int = 2048,
  out_dim: int = 16,
  num_layers: int = 3,
) -> Method:
  """LeJEPA's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: "global" with count >= 2, and optionally "local".
    run: unused, the objective has no schedule.
    sigreg_weight: lambda, the one trade-off, in [0, 1]; 0.02 in MINIMAL.md, 0.05 in the README.
    num_directions: of SIGReg; 256 in MINIMAL.md, 1024 in full.
    hidden_dim, out_dim, num_layers: of the projector (2048 - 2048 - out in MINIMAL.md).
  """
  del run
  if not 0 <= sigreg_weight <= 1:
    raise ValueError(f"lejepa: sigreg_weight is {sigreg_weight}; expected 0 to 1, e.g. 0.02")
  num_global = global_views(views, method="lejepa", at_least=2).count
  head = MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, final_norm=False, final_bias=True)
  network = JointEmbedding(encoder, head)

  def objective(z_BVP, q_BVP, label_B, key):
    """MINIMAL.md: (1 - lambda) mean ||z_v - centre||^2 + lambda SIGReg, each a mean over views."""
    del q_BVP, label_B
    centre_B1P = jnp.mean(z_BVP[:, :num_global], axis=1, keepdims=True)
    invariance = jnp.mean((z_BVP - centre_B1P) ** 2)
    one = lambda z_BP: sigreg(z_BP, key, num_directions=num_directions)  # noqa: E731
    gaussian = jnp.mean(jax.vmap(one, in_axes=1)(z_BVP))
    loss = (1 - sigreg_weight) * invariance + sigreg_weight * gaussian
    return loss, {"invariance": invariance, "sigreg": gaussian}

  return joint_embedding(network, views, objective, unit_variance=True)
