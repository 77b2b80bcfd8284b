"""SimCLR: tell every image of the batch apart, whatever its view (Chen et al. 2020).

encoder -> projector -> NT-Xent between two global views. The baseline of the fusion system.
Official code: google-research/simclr. Departure: the mean of both directions, where the official
code has their sum, which only counts for what LARS does not rescale (biases, norms). BatchNorm
takes its statistics over both views at once, as the official code does.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import nt_xent
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
  """SimCLR's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: unused, the objective has no schedule.
    temperature: of the cosines, > 0; 0.1 for ImageNet, 0.5 for CIFAR (paper B.9).
    hidden_dim, out_dim, num_layers: of the projector; the paper's first version has 2 layers.
    block: keys at a time, 0 = all; bounds memory to batch x block (losses/contrastive.py).
  """
  del run
  check_positive("simclr", temperature=temperature)
  global_spec(views, method="simclr", count=2)
  network = JointEmbedding(encoder, MLP(hidden=hidden_dim, out=out_dim, layers=num_layers))

  def objective(z_BVP, q_BVP, label_B, key):
    """Equation 1 of the paper, both directions."""
    del q_BVP, label_B, key
    loss = jnp.mean(nt_xent(z_BVP[:, 0], z_BVP[:, 1], temperature=temperature, block=block))
    return loss, {"nt_xent": loss}

  return joint_embedding(network, views, objective)
