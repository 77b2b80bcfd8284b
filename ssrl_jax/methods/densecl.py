"""DenseCL: MoCo v2, and the same between matching places of two views' maps (Wang et al. 2021).

Official code: WXinlong/DenseCL densecl.py. A place of one view is matched with the place of the
other whose backbone features are most similar; negatives are mean dense keys of earlier images.
Departures: those of moco_v2.py.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.contrastive import info_nce_queue
from ssrl_jax.losses.dense import match_features, take_places
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  check_queue,
  check_share,
  encode_with,
  fold_views,
  follow,
  forward,
  forward_target,
  global_spec,
  init_network,
  make_target,
  normalise,
  push,
  random_queue,
)
from ssrl_jax.models.heads import MLP


class Network(nn.Module):
  """h [N, D], global z [N, P], dense z [N, n, P] of the coarsest map, and that map [N, n, C]."""

  encoder: nn.Module
  projector: nn.Module
  dense_projector: nn.Module

  def __call__(self, images: Array, train: bool):
    features = self.encoder(images, train)
    map_BhwC = features.maps[max(features.maps)]
    map_BnC = map_BhwC.reshape(map_BhwC.shape[0], -1, map_BhwC.shape[-1])
    z_BP = self.projector(features.pooled, train)
    return features.pooled, z_BP, self.dense_projector(map_BnC, train), map_BnC


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  temperature: float = 0.2,
  tau: float = 0.999,
  queue_size: int = 65536,
  dense_weight: float = 0.5,
  hidden_dim: int = 2048,
  out_dim: int = 128,
) -> Method:
  """DenseCL's Method.

  Args:
    encoder: called as encoder(images, train) -> Features; its coarsest map is used.
    views: one spec named "global" with count 2.
    run: queue_size must be a multiple of its batch size.
    temperature: of the cosines, > 0.
    tau: kept by the moving average, constant.
    queue_size: of each of the two queues, at random at the start.
    dense_weight: of the dense loss, in [0, 1]; the global one has the rest.
    hidden_dim, out_dim: of both projectors, which have no BatchNorm.
  """
  check_positive("densecl", temperature=temperature)
  check_fraction("densecl", tau=tau)
  check_share("densecl", dense_weight=dense_weight)
  check_queue("densecl", queue_size, run)
  global_spec(views, method="densecl", count=2)
  heads = [
    MLP(hidden=hidden_dim, out=out_dim, norm=False, final_norm=False, final_bias=True)
    for _ in range(2)
  ]
  network = Network(encoder, *heads)

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    target = make_target(params, stats, ("encoder", "projector", "dense_projector"))
    queue = random_queue(key, 2, queue_size, out_dim)
    return params, {
      "batch_stats": stats,
      "target": target,
      "queue": {"global": queue[0], "dense": queue[1]},
    }

  def loss(params, method_state, views, key, step):
    del step
    queue = method_state["queue"]
    outputs, stats = forward(
      network, params, method_state["batch_stats"], views["global"][:, :1], key
    )
    target_outputs, target = forward_target(network, method_state["target"], views["global"][:, 1:])
    h_BD, q_BP, q_BnP, map_BnC = (x[:, 0] for x in outputs)
    _, k_BP, k_BnP, k_map_BnC = (x[:, 0] for x in target_outputs)
    # Pooled before the places are brought to unit length, as the official neck does.
    mean_BP = normalise(jnp.mean(k_BnP, axis=1))
    k_BP, k_BnP = normalise(k_BP), normalise(k_BnP)
    match_Bn = match_features(map_BnC, k_map_BnC)
    whole_B = info_nce_queue(q_BP, k_BP, queue["global"], temperature=temperature)
    # [B, n, P] -> [B * n, P], as views are folded.
    q_MP, k_MP = fold_views(q_BnP), fold_views(take_places(k_BnP, match_Bn))
    dense_M = info_nce_queue(q_MP, k_MP, queue["dense"], temperature=temperature)
    whole, dense = jnp.mean(whole_B), jnp.mean(dense_M)
    queue = {
      "global": push(queue["global"], k_BP),
      "dense": push(queue["dense"], mean_BP),
    }
    aux = Aux(
      method_state={"batch_stats": stats, "target": target, "queue": queue},
      metrics={"global": whole, "dense": dense},
      features=jax.lax.stop_gradient(h_BD),
      embeddings=jax.lax.stop_gradient(q_BP),
      targets=k_BP,
    )
    return (1 - dense_weight) * whole + dense_weight * dense, aux

  after_update = follow(lambda step: tau)
  return Method(views, init, loss, after_update, encode_with(encoder))
