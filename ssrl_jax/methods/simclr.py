"""SimCLR: tell every image of the batch apart, whatever its view (Chen et al. 2020).

encoder -> projector -> NT-Xent between two global views. The baseline of the fusion system.
Official code: google-research/simclr. Departures: none known in the objective; BatchNorm takes its
statistics over both views at once, as the official code does.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import nt_xent
from ssrl_jax.method import Array, Aux, Method, ViewSpec, fold_views, global_spec, unfold_views
from ssrl_jax.models.heads import MLP


class Network(nn.Module):
  encoder: nn.Module
  projector: nn.Module

  def __call__(self, images: Array, train: bool):
    features = self.encoder(images, train)
    return features, self.projector(features.pooled, train)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  total_steps: int,
  temperature: float = 0.1,
  hidden_dim: int = 2048,
  out_dim: int = 128,
  num_layers: int = 2,
) -> Method:
  """SimCLR's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    total_steps: unused, the objective has no schedule.
    temperature: of the cosines, > 0; 0.1 for ImageNet, 0.5 for CIFAR (paper B.9).
    hidden_dim, out_dim, num_layers: of the projector; the paper's first version has 2 layers.
  """
  del total_steps
  if temperature <= 0:
    raise ValueError(f"simclr: temperature is {temperature}; it must be positive, e.g. 0.1")
  spec = global_spec(views, method="simclr", count=2)
  network = Network(encoder, MLP(hidden=hidden_dim, out=out_dim, layers=num_layers))

  def init(key, views):
    variables = network.init(key, fold_views(views[spec.name]), True)
    return variables["params"], {"batch_stats": variables.get("batch_stats", {})}

  def loss(params, method_state, views, key, step):
    del step
    (features, z_NP), mutated = network.apply(
      {"params": params, **method_state},
      fold_views(views[spec.name]),
      True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    z_BVP = unfold_views(z_NP, 2)
    loss_B = objective(z_BVP[:, 0], z_BVP[:, 1], temperature)
    h_BVD = unfold_views(features.pooled, 2)
    aux = Aux(
      method_state=mutated,
      metrics={"nt_xent": jnp.mean(loss_B)},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVP[:, 0]),
      targets=jax.lax.stop_gradient(z_BVP[:, 1]),
    )
    return jnp.mean(loss_B), aux

  def after_update(params, method_state, step):
    del params, step
    return method_state

  def encode(params, method_state, images):
    features, _ = network.apply({"params": params, **method_state}, images, False)
    return features

  return Method(views, init, loss, after_update, encode)


def objective(z1_BP: Array, z2_BP: Array, temperature: float) -> Array:
  """Equation 1 of the paper, both directions; float32 [B]."""
  return nt_xent(z1_BP, z2_BP, temperature=temperature)
