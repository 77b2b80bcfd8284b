"""TiCo: meet the target's view of a picture, keep away from where all pictures are (Zhu 2022).

What keeps it from collapsing is the moving average of the embeddings' second moments: each one's
squared length along it is paid for, which is a contrast with all earlier batches without a queue.
After lightly's loss/tico_loss.py and sayannag/TiCo-pytorch, the authors' own code not being known
to us. One direction, as both: view 0 is the online network's, view 1 the target's. Departures: none
known. The weight of the second term is 20 in both; the latter says that the paper recommends 8.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.consistency import cosine_distance
from ssrl_jax.losses.distribution import covariance_contrast
from ssrl_jax.method import (
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  cosine_tau,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_spec,
  init_network,
  make_target,
)
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  covariance_weight: float = 20.0,
  covariance_momentum: float = 0.9,
  tau: float = 0.99,
  hidden_dim: int = 4096,
  out_dim: int = 256,
) -> Method:
  """TiCo's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: one spec named "global" with count 2.
    run: total_steps is the length of tau's schedule.
    covariance_weight: of the contrast, the distance of the views having 1; 0 collapses.
    covariance_momentum: kept of the covariance at each step.
    tau: kept by the moving average at step 0, rising to 1 as half a cosine.
    hidden_dim, out_dim: of the projector, of 2 layers; there is no predictor.
  """
  check_fraction("tico", covariance_momentum=covariance_momentum, tau=tau)
  global_spec(views, method="tico", count=2)
  head = MLP(hidden=hidden_dim, out=out_dim, final_norm=False, final_bias=True)
  network = JointEmbedding(encoder, head)

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = make_target(params, stats, ("encoder", "projector"))
    covariance_PP = jnp.zeros((out_dim, out_dim))
    return params, {"batch_stats": stats, "target": target, "covariance": covariance_PP}

  def loss(params, method_state, views, key, step):
    del step
    (h_BVD, z_BVP, _), stats = forward(
      network, params, method_state["batch_stats"], views["global"][:, :1], key
    )
    (_, t_BVP), target = forward_target(
      network, method_state["target"], views["global"][:, 1:], method="project"
    )
    z_BP, t_BP = z_BVP[:, 0], t_BVP[:, 0]
    invariance = jnp.mean(cosine_distance(z_BP, t_BP)) / 2
    contrast, covariance_PP = covariance_contrast(
      z_BP, method_state["covariance"], momentum=covariance_momentum
    )
    aux = Aux(
      method_state={"batch_stats": stats, "target": target, "covariance": covariance_PP},
      metrics={"invariance": invariance, "contrast": contrast},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BP),
      targets=t_BP,
    )
    return invariance + covariance_weight * contrast, aux

  after_update = follow(lambda step: cosine_tau(tau, step, run.total_steps))
  return Method(views, init, loss, after_update, encode_with(encoder))
