"""Fusion: views and scales of one image agree, and a constraint spreads the embeddings out.

After Zhang 2026 (ISTAER2616). Only its abstract is public (multi-view consistency, cross-scale
feature fusion, no negative samples, a constraint on the distribution of the features), so the
concrete form is ours; each part is a switch, and ablations are overrides:

  cross-scale fusion       encoder.fusion.enabled
  multi-view consistency   consistency_weight, views.global.count, views.local.count
  scale consistency        scale_weight (each scale alone must predict the target)
  distribution constraint  constraint, constraint_weight, and scale_constraint_weight on each scale
  target branch            target = "views" (mean embedding of the image's global views) or
                           "momentum" (a moving average of the network sees the global views, and
                           an online predictor must meet its embedding of the other views)
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.consistency import cosine_distance
from ssrl_jax.losses.distribution import coding_rate, sigreg, variance_covariance
from ssrl_jax.method import Array, Aux, Method, ViewSpec, ema, fold_views, normalise, unfold_views
from ssrl_jax.models.heads import MLP

CONSTRAINTS = ("coding_rate", "variance_covariance", "sigreg", "none")
TARGETS = ("views", "momentum")


class Network(nn.Module):
  """images [N, h, w, 3] -> Features, projection z [N, P], prediction q [N, P], scales [N, S, P]."""

  encoder: nn.Module
  hidden_dim: int
  out_dim: int
  num_layers: int
  predict: bool
  predict_scales: bool

  @nn.compact
  def __call__(self, images: Array, train: bool):
    features = self.encoder(images, train)
    head = {"hidden": self.hidden_dim, "out": self.out_dim, "final_norm": False}
    h_ND = features.pooled if features.fused is None else features.fused
    z_NP = MLP(layers=self.num_layers, name="projector", **head)(h_ND, train)
    q_NP = MLP(name="predictor", **head)(z_NP, train) if self.predict else z_NP
    scales_NSP = None
    if self.predict_scales and features.scales is not None:
      heads = [MLP(name=f"scale{s}", **head) for s in range(features.scales.shape[1])]
      scales_NSP = jnp.stack(
        [mlp(features.scales[:, s], train) for s, mlp in enumerate(heads)], axis=1
      )
    return features, z_NP, q_NP, scales_NSP


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  total_steps: int,
  target: str = "views",
  tau: float = 0.99,
  consistency_weight: float = 2.0,
  scale_weight: float = 1.0,
  constraint: str = "coding_rate",
  constraint_weight: float = 1.0,
  scale_constraint_weight: float = 0.5,
  eps: float = 0.2,
  hidden_dim: int = 128,
  out_dim: int = 64,
  num_layers: int = 2,
) -> Method:
  """The fusion system's Method.

  Args:
    encoder: called as encoder(images, train) -> Features; one with `scales` (FusionEncoder) gets
      the scale-consistency term.
    views: "global" with count >= 2, and optionally "local", which only the online branch sees.
    total_steps: length of tau's schedule.
    target: see above. tau: kept by the moving average at step 0, rising to 1 as half a cosine.
    consistency_weight, scale_weight, constraint_weight, scale_constraint_weight: of the terms.
    constraint: "coding_rate" (with distortion `eps`), "variance_covariance", "sigreg" or "none".
    hidden_dim, out_dim, num_layers: of the projector; predictor and scale heads have 2 layers.
  """
  if constraint not in CONSTRAINTS or target not in TARGETS:
    raise ValueError(
      f"fusion: constraint {constraint!r} must be one of {CONSTRAINTS}, target {target!r} one of "
      f"{TARGETS}"
    )
  if [v.name for v in views][:1] != ["global"] or views[0].count < 2:
    raise ValueError(
      f"fusion needs at least 2 global views; views.global.count is {views[0].count}"
    )
  momentum = target == "momentum"
  use_scales = scale_weight > 0 or scale_constraint_weight > 0
  network = Network(encoder, hidden_dim, out_dim, num_layers, momentum, use_scales)

  def init(key, views):
    variables = network.init(key, fold_views(views["global"]), True)
    params, stats = variables["params"], {"batch_stats": variables.get("batch_stats", {})}
    return params, stats | ({"target": {"params": params, **stats}} if momentum else {})

  def forward(params, stats, views_BVHWC, key):
    (features, *heads), mutated = network.apply(
      {"params": params, **stats},
      fold_views(views_BVHWC),
      True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    outputs = jax.tree.map(lambda x: unfold_views(x, views_BVHWC.shape[1]), heads)
    return unfold_views(features.pooled, views_BVHWC.shape[1]), *outputs, mutated

  def loss(params, method_state, views, key, step):
    del step
    keys = jax.random.split(key, 4)
    stats = {"batch_stats": method_state["batch_stats"]}
    h_BVD, z_BVP, q_BVP, scales_BVSP, stats = forward(params, stats, views["global"], keys[0])
    new_state = dict(stats)
    if momentum:
      _, target_BVP, _, _, target_stats = forward(
        method_state["target"]["params"],
        {"batch_stats": method_state["target"]["batch_stats"]},
        views["global"],
        keys[1],
      )
      target_BVP = jax.lax.stop_gradient(normalise(target_BVP))
      new_state["target"] = {"params": method_state["target"]["params"], **target_stats}
      centre_BVP = mean_of_others(target_BVP)
      local_centre_BVP = jnp.mean(target_BVP, axis=1, keepdims=True)
    else:
      local_centre_BVP = jnp.mean(normalise(z_BVP), axis=1, keepdims=True)
      centre_BVP = jnp.broadcast_to(local_centre_BVP, z_BVP.shape)

    pairs = [(q_BVP, scales_BVSP, centre_BVP)]
    all_z, all_scales = [z_BVP], [scales_BVSP]
    if "local" in views:
      _, z, q, scales, stats = forward(params, stats, views["local"], keys[2])
      new_state |= stats
      pairs.append((q, scales, jnp.broadcast_to(local_centre_BVP, q.shape)))
      all_z.append(z)
      all_scales.append(scales)
    terms = {
      "consistency": mean_over_views([cosine_distance(q, centre) for q, _, centre in pairs]),
      "constraint": constrain(jnp.concatenate(all_z, axis=1), constraint, eps, keys[3]),
    }
    total = consistency_weight * terms["consistency"] + constraint_weight * terms["constraint"]
    if scales_BVSP is not None:
      scales_BVSP = jnp.concatenate(all_scales, axis=1)
      every_scale = scales_BVSP.reshape(scales_BVSP.shape[0], -1, scales_BVSP.shape[-1])
      terms["scale"] = mean_over_views([scale_distance(s, c) for _, s, c in pairs])
      terms["scale_constraint"] = constrain(every_scale, constraint, eps, keys[3])
      total += scale_weight * terms["scale"]
      total += scale_constraint_weight * terms["scale_constraint"]
    aux = Aux(
      method_state=new_state,
      metrics=terms,
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVP[:, 0]),
      targets=jax.lax.stop_gradient(centre_BVP[:, 0] if momentum else z_BVP[:, 1]),
    )
    return total, aux

  def after_update(params, method_state, step):
    if not momentum:
      return method_state
    tau_step = 1 - (1 - tau) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2
    target = method_state["target"]
    return method_state | {"target": target | {"params": ema(target["params"], params, tau_step)}}

  def encode(params, method_state, images):
    variables = {"params": params, "batch_stats": method_state["batch_stats"]}
    features, *_ = network.apply(variables, images, False)
    return features

  return Method(views, init, loss, after_update, encode)


def mean_of_others(z_BVP: Array) -> Array:
  """For each view the mean over the image's other views."""
  v = z_BVP.shape[1]
  return (jnp.sum(z_BVP, axis=1, keepdims=True) - z_BVP) / (v - 1)


def mean_over_views(distances: list[Array]) -> Array:
  """Mean over images and over all views, global and local alike; each array is [B, V_i]."""
  return jnp.mean(jnp.concatenate(distances, axis=1))


def scale_distance(scales_BVSP: Array, centre_BVP: Array) -> Array:
  """How far each scale's embedding is from the target, averaged over the scales; [B, V]."""
  centre_BVSP = jnp.broadcast_to(centre_BVP[:, :, None, :], scales_BVSP.shape)
  return jnp.mean(cosine_distance(scales_BVSP, centre_BVSP), axis=-1)


def constrain(z_BVP: Array, constraint: str, eps: float, key: Array) -> Array:
  """The distribution constraint of each view's batch, averaged over the views."""
  functions = {
    "coding_rate": lambda z_BP: coding_rate(z_BP, eps=eps),
    "variance_covariance": variance_covariance,
    "sigreg": lambda z_BP: sigreg(z_BP, key),
    "none": lambda z_BP: jnp.zeros(()),
  }
  values = [functions[constraint](z_BVP[:, v]) for v in range(z_BVP.shape[1])]
  return jnp.mean(jnp.stack(values))
