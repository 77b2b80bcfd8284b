"""SupCon: SimCLR in which all views of one class are positives (Khosla et al. 2020).

An upper control, not self-supervised: it reads the labels. An image without a label (-1) has its
other view as its only positive, so a few labels among many images are no special case. Official
code: HobbitLong/SupContrast, with temperature and base temperature equal. Departures: none known.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import supervised_contrastive
from ssrl_jax.method import (
  Method,
  Run,
  ViewSpec,
  check_labelled,
  check_positive,
  global_spec,
  joint_embedding,
)
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
  """SupCon's Method; the data must be labelled.

  Args:
    others: as `simclr.make`.
  """
  check_labelled("supcon", run)
  check_positive("supcon", temperature=temperature)
  global_spec(views, method="supcon", count=2)
  head = MLP(
    hidden=hidden_dim, out=out_dim, layers=num_layers, norm=False, final_norm=False, final_bias=True
  )
  network = JointEmbedding(encoder, head)

  def objective(z_BVP, q_BVP, label_B, key):
    """Equation 2 of the paper: the mean over positives outside the logarithm."""
    del q_BVP, key
    z1_BP, z2_BP = z_BVP[:, 0], z_BVP[:, 1]
    options = {"temperature": temperature, "block": block}
    loss = jnp.mean(supervised_contrastive(z1_BP, z2_BP, label_B, **options))
    return loss, {"supcon": loss}

  return joint_embedding(network, views, objective)
