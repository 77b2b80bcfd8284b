"""DCL: SimCLR whose denominator leaves the positive pair out (Yeh et al. 2022).

The pull of the positive no longer weakens the push of the negatives, so small batches lose less.
Code: raminnakhli/Decoupled-Contrastive-Learning (not the authors'). Departures: the mean of both
directions where that code has one; the weighted form (DCLW) is left out.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import decoupled
from ssrl_jax.method import Method, Run, ViewSpec, check_positive, global_spec, joint_embedding
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  temperature: float = 0.1,
  hidden_dim: int = 2048,
  out_dim: int = 128,
  num_layers: int = 2,
  block: int = 0,
) -> Method:
  """DCL's Method.

  Args:
    others: as `simclr.make`.
  """
  del run
  check_positive("dcl", temperature=temperature)
  global_spec(views, method="dcl", count=2)
  network = JointEmbedding(encoder, MLP(hidden=hidden_dim, out=out_dim, layers=num_layers))

  def objective(z_BVP, q_BVP, label_B, key):
    """Equation 6 of the paper, both directions."""
    del q_BVP, label_B, key
    loss = jnp.mean(decoupled(z_BVP[:, 0], z_BVP[:, 1], temperature=temperature, block=block))
    return loss, {"decoupled": loss}

  return joint_embedding(network, views, objective)
