"""Objectives that tell examples of the batch apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssrl_jax.method import Array, normalise


def nt_xent(z1_BP: Array, z2_BP: Array, *, temperature: float) -> Array:
  """NT-Xent: cross-entropy of finding the other view among the 2B - 1 other views of the batch.

  Chen et al. 2020 (SimCLR), equation 1; rows are brought to unit length first. The batch is the
  global batch. Official code: google-research/simclr objective.py (both directions, self masked).

  Args:
    z1_BP: embeddings of the first views, any scale.
    z2_BP: embeddings of the second views; row i belongs to the image of row i of `z1_BP`.
    temperature: divides the cosines; > 0.

  Returns:
    float32 [B], in [0, inf): the mean of the two directions for each image.
  """
  z1_BP, z2_BP = normalise(z1_BP), normalise(z2_BP)
  b = z1_BP.shape[0]
  itself_BB = jnp.eye(b, dtype=bool)
  logits_12_BB = z1_BP @ z2_BP.T / temperature
  logits_11_BB = jnp.where(itself_BB, -jnp.inf, z1_BP @ z1_BP.T / temperature)
  logits_22_BB = jnp.where(itself_BB, -jnp.inf, z2_BP @ z2_BP.T / temperature)
  # From the same product as the negatives: accelerators round it, and the loss must stay >= 0.
  positive_B = jnp.sum(jnp.where(itself_BB, logits_12_BB, 0), axis=1)
  loss_1_B = jax.nn.logsumexp(jnp.concatenate([logits_12_BB, logits_11_BB], axis=1), axis=1)
  loss_2_B = jax.nn.logsumexp(jnp.concatenate([logits_12_BB.T, logits_22_BB], axis=1), axis=1)
  return (loss_1_B + loss_2_B) / 2 - positive_B
