"""Fusion: views of an image agree on every scale, and a constraint spreads the embeddings out.

After Zhang 2026 (ISTAER2616). Only its abstract is public (multi-view consistency, cross-scale
feature fusion, no negative samples, a constraint on the distribution of the features), so the
concrete form is ours. One objective, view consistency plus distribution constraint, is put on the
embedding of the fused vector, with a smaller weight on one embedding of each scale, and on the
embeddings of the places of a fused map, which meet what the other view shows of the same spot. Each
part is a switch, and ablations are overrides:

  cross-scale fusion       encoder.fusion.enabled
  supervision per scale    scale_weight
  supervision per place    place_weight
  multi-view consistency   consistency_weight, global_views.count, local_views.count
  distribution constraint  constraint, constraint_weight
  target branch            target: "views", the mean embedding of the image's global views, or
                           "momentum", that of a moving average of the network over the other
                           global views, which an online predictor must meet

Letting each scale meet the target of the fused vector instead of its own was measured and worse:
docs/methods.md, "How fusion got its form".
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.consistency import cosine_distance
from ssrl_jax.losses.dense import seen_from
from ssrl_jax.losses.distribution import coding_rate, sigreg, variance_covariance
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_fraction,
  check_positive,
  cosine_tau,
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
from ssrl_jax.models.heads import MLP

CONSTRAINTS = ("coding_rate", "variance_covariance", "sigreg", "none")
TARGETS = ("views", "momentum")


class Network(nn.Module):
  """images [N, h, w, 3] -> pooled [N, D], embeddings z [N, E, P], predictions q [N, E, P], places.

  Embedding 0 is that of the fused vector (of the pooled one, for an encoder without fusion), the
  others are those of the scales, finest first; E = 1 + S. Places [N, h, w, P] are embeddings of the
  finest map that has at most `place_grid` rows and columns, or of the coarsest of all; None where
  that is 0, or with `places` False.
  """

  encoder: nn.Module
  hidden_dim: int
  out_dim: int
  num_layers: int
  use_scales: bool
  place_grid: int
  predict: bool

  @nn.compact
  def __call__(self, images: Array, train: bool, places: bool = True, predict: bool = True):
    features = self.encoder(images, train)
    sources = {"fused": features.pooled if features.fused is None else features.fused}
    if self.use_scales and features.scales is not None:
      sources |= {f"scale{s}": features.scales[:, s] for s in range(features.scales.shape[1])}
    head = {"hidden": self.hidden_dim, "out": self.out_dim, "final_norm": False}
    z_NEP = jnp.stack(
      [
        MLP(layers=self.num_layers, name=f"projector_{name}", **head)(h_NF, train)
        for name, h_NF in sources.items()
      ],
      axis=1,
    )
    q_NEP = MLP(name="predictor", **head)(z_NEP, train) if self.predict and predict else z_NEP
    places_NhwP = None
    if self.place_grid and places:
      maps = [features.maps[stride] for stride in sorted(features.maps)]
      small = [x for x in maps if max(x.shape[1:3]) <= self.place_grid]
      project = MLP(layers=self.num_layers, name="projector_places", **head)
      places_NhwP = project(small[0] if small else maps[-1], train)
    return features.pooled, z_NEP, q_NEP, places_NhwP


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  target: str = "views",
  tau: float = 0.99,
  consistency_weight: float = 2.0,
  constraint: str = "coding_rate",
  constraint_weight: float = 1.0,
  eps: float = 0.2,
  scale_weight: float = 0.5,
  place_weight: float = 0.0,
  place_grid: int = 8,
  hidden_dim: int = 128,
  out_dim: int = 64,
  num_layers: int = 2,
) -> Method:
  """The fusion system's Method.

  Args:
    encoder: called as encoder(images, train) -> Features; one with `scales` (FusionEncoder) gets
      an objective on each scale.
    views: "global" with count >= 2, and optionally "local", which only the online branch sees.
    run: total_steps is the length of tau's schedule.
    target: "views" (the mean of the image's) or "momentum" (a moving average's).
    tau: kept by the moving average at step 0, rising to 1 as half a cosine.
    consistency_weight: of the objective's first term. constraint_weight: of its second.
    constraint: "coding_rate", "variance_covariance", "sigreg" or "none".
    eps: the distortion of the coding rate.
    scale_weight: of each scale's objective; 0 = none.
    place_weight: of the objective of the places of global views; 0 = none, 1 in our recipes. They
      meet their target, also a moving average's, without a predictor. Not with "sigreg", whose
      statistic grows with the number of its rows.
    place_grid: rows and columns that the map of the places has at most, see `Network`.
    hidden_dim, out_dim, num_layers: of the projectors; the predictor has 2 layers.
  """
  if constraint not in CONSTRAINTS or target not in TARGETS:
    raise ValueError(
      f"fusion: constraint {constraint!r} must be one of {CONSTRAINTS}, target {target!r} one of "
      f"{TARGETS}"
    )
  check_positive("fusion", eps=eps)
  check_fraction("fusion", tau=tau)
  if place_grid < 1 or place_weight < 0:
    raise ValueError(
      f"fusion: place_grid is {place_grid} and place_weight {place_weight}; expected at least 1, "
      "e.g. 8, and 0 or more"
    )
  if place_weight > 0 and constraint == "sigreg":
    raise ValueError(
      f"fusion: constraint 'sigreg' with place_weight {place_weight}; set place_weight to 0, or "
      "take another constraint"
    )
  global_views(views, method="fusion", at_least=2)
  momentum = target == "momentum"
  network = Network(
    encoder, hidden_dim, out_dim, num_layers, scale_weight > 0, place_grid * (place_weight > 0),
    momentum,
  )  # fmt: skip

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    state = {"batch_stats": stats}
    return params, state | (
      {"target": make_target(params, stats, tuple(sorted(params.keys() - {"predictor"})))}
      if momentum
      else {}
    )

  def targets(method_state, views, z_BVEP, places_BVhwP):
    """Unit embeddings, for each view their centre that it must meet, places; the target's state."""
    if not momentum:
      t_BVEP = normalise(z_BVEP)
      centre_B1EP = jnp.mean(t_BVEP, axis=1, keepdims=True)
      return t_BVEP, jnp.broadcast_to(centre_B1EP, t_BVEP.shape), places_BVhwP, {}
    (_, t_BVEP, _, seen_BVhwP), after = forward_target(
      network, method_state["target"], views["global"], True, False
    )
    t_BVEP = normalise(t_BVEP)
    return t_BVEP, mean_of_others(t_BVEP), seen_BVhwP, {"target": after}

  def objective(consistency, spread):
    return consistency_weight * consistency + constraint_weight * spread

  def loss(params, method_state, views, key, step):
    del step
    keys = jax.random.split(key, 4)
    (h_BVD, z_BVEP, q_BVEP, places_BVhwP), stats = forward(
      network, params, method_state["batch_stats"], views["global"], keys[0]
    )
    t_BVEP, centre_BVEP, seen_BVhwP, target_state = targets(
      method_state, views, z_BVEP, places_BVhwP
    )
    all_z, distances = z_BVEP, cosine_distance(q_BVEP, centre_BVEP)
    if "local" in views:
      (_, z, q, _), stats = forward(network, params, stats, views["local"], keys[2], False)
      centre = jnp.broadcast_to(jnp.mean(t_BVEP, axis=1, keepdims=True), q.shape)
      all_z = jnp.concatenate([all_z, z], axis=1)
      distances = jnp.concatenate([distances, cosine_distance(q, centre)], axis=1)

    consistency_E = jnp.mean(distances, axis=(0, 1))
    constraint_E = constrain(all_z, constraint, eps, keys[3])
    value_E = objective(consistency_E, constraint_E)
    value = value_E[0] + scale_weight * jnp.sum(value_E[1:])
    metrics = {"consistency": consistency_E[0], "constraint": constraint_E[0]}
    if consistency_E.size > 1:
      metrics["scale_consistency"] = jnp.mean(consistency_E[1:])
      metrics["scale_constraint"] = jnp.mean(constraint_E[1:])
    if place_weight > 0:
      consistency = place_consistency(places_BVhwP, seen_BVhwP, views["global_box"])
      (spread,) = constrain(places_as_rows(places_BVhwP), constraint, eps, keys[3])
      metrics |= {"place_consistency": consistency, "place_constraint": spread}
      value += place_weight * objective(consistency, spread)
    aux = Aux(
      method_state={"batch_stats": stats, **target_state},
      metrics=metrics,
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVEP[:, 0, 0]),
      targets=jax.lax.stop_gradient(t_BVEP[:, 1, 0]),
    )
    return value, aux

  after_update = follow(lambda step: cosine_tau(tau, step, run.total_steps)) if momentum else keep
  return Method(views, init, loss, after_update, encode_with(encoder))


def mean_of_others(x_BVEP: Array) -> Array:
  """For each view the mean over the image's other views."""
  v = x_BVEP.shape[1]
  return (jnp.sum(x_BVEP, axis=1, keepdims=True) - x_BVEP) / (v - 1)


def places_as_rows(places_BVhwP: Array) -> Array:
  """[B * h * w, V, 1, P], example-major, so that the first axis stays sharded."""
  v, p = places_BVhwP.shape[1], places_BVhwP.shape[-1]
  return jnp.moveaxis(places_BVhwP, 1, 3).reshape(-1, v, 1, p)


def place_consistency(places_BVhwP: Array, seen_BVhwP: Array, box_BV4: Array) -> Array:
  """Mean cosine distance of each place to what another view shows there, over those it shows.

  Of all pairs of views, in both directions; 0 for a pair of which no two overlap. A scalar.
  """
  distances = []
  for v, w in itertools.permutations(range(places_BVhwP.shape[1]), 2):
    other_BhwP, shown_Bhw = seen_from(
      normalise(seen_BVhwP[:, w]), box_BV4[:, w], at_box_B4=box_BV4[:, v]
    )
    distance_Bhw = cosine_distance(places_BVhwP[:, v], other_BhwP)
    distances.append(jnp.sum(distance_Bhw * shown_Bhw) / jnp.maximum(jnp.sum(shown_Bhw), 1))
  return sum(distances) / len(distances)


def vicreg(z_BP: Array) -> Array:
  variance, covariance = variance_covariance(z_BP)
  return variance + 2 / 25 * covariance  # the official code's ratio, as branches are averaged


def constrain(z_BVEP: Array, constraint: str, eps: float, key: Array) -> Array:
  """The distribution constraint on each embedding of each view's batch, mean over views; [E]."""
  functions = {
    "coding_rate": lambda z_BP: coding_rate(z_BP, eps=eps),
    "variance_covariance": vicreg,
    "sigreg": lambda z_BP: sigreg(z_BP, key),
    "none": lambda z_BP: jnp.zeros(()),
  }
  value_VE = jax.vmap(jax.vmap(functions[constraint], in_axes=1), in_axes=1)(z_BVEP)
  return jnp.mean(value_VE, axis=0)
