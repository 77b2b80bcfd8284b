"""SimSiam: predict one view's embedding from the other's, without gradient into what is predicted.

Chen & He 2021. No negatives, no target network: the stop-gradient alone keeps it from collapsing.
Official code: facebookresearch/simsiam main_simsiam.py. Departures: BatchNorm statistics over both
views at once, where the official code normalises each view's batch by itself.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.consistency import cosine_distance
from ssrl_jax.method import Method, Run, ViewSpec, global_spec, joint_embedding
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  hidden_dim: int = 2048,
  out_dim: int = 2048,
  num_layers: int = 3,
  predictor_dim: int = 512,
  predictor: bool = True,
  stop_gradient: bool = True,
  constant_predictor_lr: bool = True,
) -> Method:
  """SimSiam's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: unused, the objective has no schedule.
    hidden_dim, out_dim, num_layers: of the projector, 3 layers (2 on CIFAR).
    predictor_dim: the bottleneck of the predictor, a quarter of out_dim in the paper.
    predictor, stop_gradient: False collapses (the paper's tables 1 and figure 2); for ablations.
    constant_predictor_lr: the predictor's learning rate stays at its peak (section 4.2).
  """
  del run
  global_spec(views, method="simsiam", count=2)
  head = MLP(hidden=predictor_dim, out=out_dim, final_norm=False, final_bias=True)
  network = JointEmbedding(
    encoder,
    MLP(hidden=hidden_dim, out=out_dim, layers=num_layers),
    head if predictor else None,
  )
  fixed = jax.lax.stop_gradient if stop_gradient else lambda z: z

  def objective(z_BVP, q_BVP, label_B, key):
    """Equation 4 of the paper: -cos, the mean of both directions; in [-1, 1]."""
    del label_B, key
    distance_BV = cosine_distance(q_BVP, fixed(z_BVP[:, ::-1]))
    loss = jnp.mean(distance_BV) / 2 - 1
    return loss, {"negative_cosine": loss}

  constant = ("predictor",) if predictor and constant_predictor_lr else ()
  return joint_embedding(network, views, objective, constant_lr=constant)
