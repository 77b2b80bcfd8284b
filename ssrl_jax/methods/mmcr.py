"""MMCR: views of an image meet, and the means of images fill all directions (Yerxa et al. 2023).

Official code: ThomasYerxa/mmcr. The nuclear norm of the matrix of all images' mean embeddings is
made as large as it can be; it grows when views agree, as means of unit vectors are then longer, and
when means of different images are orthogonal. Its ImageNet runs (pretrain_imagenet.py) have
`momentum`: a moving average of the network sees the same views, and its embeddings count in the
means; the online encoder is what is judged. The loss is a sum, as there: its size grows with the
batch. Departure: the gradient is the global batch's; on W devices the official one is 1 / W of it,
each having that of its own images, which are then averaged.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.factor import nuclear_norm
from ssrl_jax.method import (
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_views,
  init_network,
  keep,
  make_target,
  normalise,
)
from ssrl_jax.models.heads import MLP, JointEmbedding


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  within_weight: float = 0.0,
  momentum: bool = False,
  tau: float = 0.99,
  hidden_dim: int = 8192,
  out_dim: int = 512,
  num_layers: int = 3,
) -> Method:
  """MMCR's Method.

  Args:
    encoder: called as encoder(images, train) -> Features.
    views: "global" with count 2 or more; 8 in the official ImageNet runs, 40 in those on CIFAR.
    run: unused, the objective has no schedule.
    within_weight: lambda, of the mean nuclear norm of each image's views; 0 in the official runs.
    momentum: embeddings of a moving average of the network count in the means, without gradient.
    tau: kept by the moving average, at every step.
    hidden_dim, out_dim, num_layers: of the projector; 512, 128, 2 in the official CIFAR runs.
  """
  del run
  check_fraction("mmcr", tau=tau)
  global_views(views, method="mmcr", at_least=2, local=False)
  network = JointEmbedding(
    encoder, MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, final_norm=False)
  )

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = {"target": make_target(params, stats, ("encoder", "projector"))} if momentum else {}
    return params, {"batch_stats": stats, **target}

  def loss(params, method_state, views, key, step):
    del step
    (h_BVD, z_BVP, _), stats = forward(
      network, params, method_state["batch_stats"], views["global"], key
    )
    new_state, t_BVP = {"batch_stats": stats}, z_BVP
    if momentum:
      (_, t_BVP), new_state["target"] = forward_target(
        network, method_state["target"], views["global"], method="project"
      )
    # Without a target this is the mean of the views.
    centroid_BP = jnp.mean((normalise(z_BVP) + normalise(t_BVP)) / 2, axis=1)
    metrics = {"centroids": nuclear_norm(centroid_BP)}
    value = -metrics["centroids"]
    if within_weight:
      metrics["within"] = jnp.mean(jax.vmap(nuclear_norm)(normalise(z_BVP)))
      value += within_weight * metrics["within"]
    aux = Aux(
      method_state=new_state,
      metrics=metrics,
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVP[:, 0]),
      targets=jax.lax.stop_gradient(t_BVP[:, 1]),
    )
    return value, aux

  after_update = follow(lambda step: tau) if momentum else keep
  return Method(views, init, loss, after_update, encode_with(encoder))
