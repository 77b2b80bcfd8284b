"""BYOL: predict what a moving average of the network makes of the other view (Grill et al. 2020).

No negatives; predictor and target network keep it from collapsing. Official code:
google-deepmind/deepmind-research/byol. The loss is the sum of both directions, so its range is
[0, 8]. Departures: BatchNorm statistics over all views at once, where the official code normalises
each view's batch by itself; any number of global views and optional local ones (each online view
predicts every global target but its own), the mean over pairs times two.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  cosine_tau,
  encode_with,
  exact_matmul,
  fold_views,
  follow,
  forward,
  forward_target,
  global_views,
  init_network,
  make_target,
  normalise,
)
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  tau: float = 0.99,
  hidden_dim: int = 4096,
  out_dim: int = 256,
  num_layers: int = 2,
  predictor: bool = True,
) -> Method:
  """BYOL's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: "global" with count >= 2, and optionally "local", which only the online network sees.
    run: total_steps is the length of tau's schedule.
    tau: kept by the moving average at step 0, rising to 1 as half a cosine; the paper has 0.97,
      0.99, 0.99, 0.996 for 40, 100, 300, 1000 epochs.
    hidden_dim, out_dim, num_layers: of the projector; the predictor has 2 layers.
    predictor: False collapses (paper, table 5); for ablations.
  """
  check_fraction("byol", tau=tau)
  global_views(views, method="byol", at_least=2)
  network = JointEmbedding(
    encoder,
    MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, final_norm=False),
    MLP(hidden=hidden_dim, out=out_dim, final_norm=False) if predictor else None,
  )

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = make_target(params, stats, ("encoder", "projector"))
    return params, {"batch_stats": stats, "target": target}

  def loss(params, method_state, views, key, step):
    del step
    keys = jax.random.split(key)
    (h_BVD, z_BVP, q_BVP), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0]
    )
    if "local" in views:
      (_, _, q), stats = forward(network, params, stats, views["local"], keys[1])
      q_BVP = jnp.concatenate([q_BVP, q], axis=1)
    (_, t_BTP), target = forward_target(
      network, method_state["target"], views["global"], method="project"
    )
    value = objective(q_BVP, t_BTP)
    aux = Aux(
      method_state={"batch_stats": stats, "target": target},
      metrics={"prediction": value},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVP[:, 0]),
      targets=t_BTP[:, 1],
    )
    return value, aux

  after_update = follow(lambda step: cosine_tau(tau, step, run.total_steps))
  return Method(views, init, loss, after_update, encode_with(encoder))


def objective(q_BVP: Array, t_BTP: Array) -> Array:
  """Equations 2 and 3 of the paper: 2 - 2 cos, twice its mean over pairs of different views."""
  t_BPT = jnp.swapaxes(normalise(t_BTP), 1, 2)
  cosine_VT = jnp.mean(exact_matmul(normalise(q_BVP), t_BPT), axis=0)
  different_VT = ~jnp.eye(*cosine_VT.shape, dtype=bool)
  return 2 * jnp.sum(jnp.where(different_VT, 2 - 2 * cosine_VT, 0)) / jnp.sum(different_VT)
