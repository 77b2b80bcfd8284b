"""W-MSE: two views' embeddings are close after whitening, which cannot collapse (Ermolov 2021).

Official code: htdt/self-supervised. The batch is cut at random into slices, each view of each
slice is whitened by its own inverse Cholesky factor, and the distance is that of unit vectors; this
is done `iterations` times with other slices. Departures: BatchNorm statistics over both views at
once.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.consistency import cosine_distance
from ssrl_jax.losses.correlation import whiten
from ssrl_jax.method import Method, Run, ViewSpec, check_share, global_spec, joint_embedding
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  slice_size: int = 128,
  iterations: int = 1,
  eps: float = 0.0,
  hidden_dim: int = 1024,
  out_dim: int = 64,
) -> Method:
  """W-MSE's Method, for two views.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: its batch size must be a multiple of `slice_size`.
    slice_size: examples whitened together, more than out_dim (official: twice as many).
    iterations: slicings a step; the official CIFAR and STL-10 runs use 1 for four views, 4 for two.
    eps: shrinks the covariance towards the identity; 0 in the official code.
    hidden_dim, out_dim: of the projector.
  """
  global_spec(views, method="w_mse", count=2)
  check_share("w_mse", eps=eps)
  if slice_size <= out_dim or run.batch_size % slice_size:
    raise ValueError(
      f"w_mse: slice_size is {slice_size}; it must exceed out_dim {out_dim} and divide batch_size "
      f"{run.batch_size}"
    )
  network = JointEmbedding(encoder, MLP(hidden=hidden_dim, out=out_dim, final_norm=False))

  def whitened_distance(z_BVP, key):
    order_B = jax.random.permutation(key, z_BVP.shape[0])
    z_SCVP = z_BVP[order_B].reshape(-1, slice_size, *z_BVP.shape[1:])
    each = jax.vmap(jax.vmap(lambda z_CP: whiten(z_CP, eps=eps), in_axes=1, out_axes=1))
    w_SCVP = each(z_SCVP)
    return jnp.mean(cosine_distance(w_SCVP[:, :, 0], w_SCVP[:, :, 1]))

  def objective(z_BVP, q_BVP, label_B, key):
    """Equation 5 of the paper, normalised as in section 3.2."""
    del q_BVP, label_B
    losses = [whitened_distance(z_BVP, k) for k in jax.random.split(key, iterations)]
    loss = sum(losses) / iterations
    return loss, {"whitened_distance": loss}

  return joint_embedding(network, views, objective)
