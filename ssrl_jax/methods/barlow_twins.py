"""Barlow Twins: the cross-correlation of two views' embeddings is the identity (Zbontar 2021).

Official code: facebookresearch/barlowtwins main.py. The product is divided by the global batch
size, and the loss is a sum over the matrix, hence its size; the released run scales it by 0.024
(its README), solo-learn by 0.1. Departures: BatchNorm statistics over both views at once.
"""

from __future__ import annotations

import flax.linen as nn

from ssrl_jax.losses.correlation import barlow_twins
from ssrl_jax.method import Method, Run, ViewSpec, check_positive, global_spec, joint_embedding
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  off_diagonal_weight: float = 0.0051,
  scale: float = 0.024,
  hidden_dim: int = 8192,
  out_dim: int = 8192,
  num_layers: int = 3,
) -> Method:
  """Barlow Twins' Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: unused, the objective has no schedule.
    off_diagonal_weight: lambda of the paper, of the squares beside the diagonal.
    scale: factor of the whole loss.
    hidden_dim, out_dim, num_layers: of the projector.
  """
  del run
  check_positive("barlow_twins", off_diagonal_weight=off_diagonal_weight, scale=scale)
  global_spec(views, method="barlow_twins", count=2)
  head = MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, final_norm=False)
  network = JointEmbedding(encoder, head)

  def objective(z_BVP, q_BVP, label_B, key):
    """Equation 1 of the paper."""
    del q_BVP, label_B, key
    weight = off_diagonal_weight
    loss = barlow_twins(z_BVP[:, 0], z_BVP[:, 1], off_diagonal_weight=weight)
    return scale * loss, {"barlow_twins": loss}

  return joint_embedding(network, views, objective)
