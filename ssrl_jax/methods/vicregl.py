"""VICRegL: VICReg on pooled vectors, and on places of two views' maps that match (Bardes 2022).

Places match by features and by where they lie in the picture, in both directions; of each the
closest few count. Official code: facebookresearch/VICRegL main_vicregl.py. Unlike VICReg's, its
global covariance term is the mean over views, not the sum. Departures: its local_loss overwrites
the terms of earlier pairs of views and still divides by their number, which halves the local loss
for two views; here it is the mean, as in the paper. Its default lets all places count that match
by features (l2_all_matches), and of those that match by position 20 from view 1 and 4 from view 2;
here `num_matches` of each. The official runs train the maps' projector at a tenth of the learning
rate; here it has the same.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssrl_jax.losses.dense import closest_pairs, positions, take_places
from ssrl_jax.losses.distribution import variance_covariance
from ssrl_jax.method import (
  Array,
  Aux,
  Method,
  Run,
  ViewSpec,
  check_share,
  encode_with,
  fold_views,
  forward,
  global_spec,
  init_network,
  keep,
)
from ssrl_jax.models.heads import MLP


class Network(nn.Module):
  """h [N, D], global z [N, P], maps [N, h, w, C] of the coarsest stage."""

  encoder: nn.Module
  projector: nn.Module
  maps_projector: nn.Module

  def __call__(self, images: Array, train: bool):
    features = self.encoder(images, train)
    map_BhwC = features.maps[max(features.maps)]
    z_BP = self.projector(features.pooled, train)
    return features.pooled, z_BP, self.maps_projector(map_BhwC, train)


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  global_weight: float = 0.75,
  invariance_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  num_matches: int = 20,
  hidden_dim: int = 8192,
  out_dim: int = 8192,
  num_layers: int = 3,
  maps_dim: int = 512,
) -> Method:
  """VICRegL's Method.

  Args:
    encoder: called as encoder(images, train) -> Features; its coarsest map is used.
    views: one spec named "global" with count 2.
    run: unused, the objective has no schedule.
    global_weight: alpha, of the global loss; the local one has the rest. 0.75 or 0.9.
    invariance_weight, variance_weight, covariance_weight: of the three terms of both.
    num_matches: places of each map that count, the closest ones; at most all are used.
    hidden_dim, out_dim, num_layers: of the projector. maps_dim: of the maps' projector (3 layers).
  """
  del run
  check_share("vicregl", global_weight=global_weight)
  if num_matches < 1:
    raise ValueError(f"vicregl: num_matches is {num_matches}; expected at least 1, e.g. 20")
  global_spec(views, method="vicregl", count=2)
  network = Network(
    encoder,
    MLP(hidden=hidden_dim, out=out_dim, layers=num_layers, final_norm=False),
    MLP(hidden=maps_dim, out=maps_dim, layers=3, final_norm=False),
  )

  def init(key, views):
    params, stats = init_network(network, key, fold_views(views["global"]))
    return params, {"batch_stats": stats}

  def criterion(x_BP, y_BP):
    (var_x, cov_x), (var_y, cov_y) = variance_covariance(x_BP), variance_covariance(y_BP)
    invariance = invariance_weight * jnp.mean((x_BP - y_BP) ** 2)
    spread = variance_weight * (var_x + var_y) + covariance_weight * (cov_x + cov_y)
    return invariance + spread / 2

  def local(x_BnP, y_BnP, x_at_Bn2, y_at_Bn2):
    """Mean over both directions; each matched place has statistics over the batch of its own."""
    values = []
    for x, y, x_at, y_at in (
      (x_BnP, y_BnP, x_at_Bn2, y_at_Bn2),
      (y_BnP, x_BnP, y_at_Bn2, x_at_Bn2),
    ):
      for here, there in ((x, y), (x_at, y_at)):
        i_Bk, j_Bk = closest_pairs(here, there, num=min(num_matches, x.shape[1]))
        pairs = take_places(x, i_Bk), take_places(y, j_Bk)
        values.append(jnp.mean(jax.vmap(criterion, in_axes=1)(*pairs)))
    return sum(values) / 2  # two kinds of match, each the mean of two directions

  def loss(params, method_state, views, key, step):
    del step
    (h_BVD, z_BVP, maps_BVhwP), stats = forward(
      network, params, method_state["batch_stats"], views["global"], key
    )
    b, _, h, w, p = maps_BVhwP.shape
    x_BnP, y_BnP = (maps_BVhwP[:, v].reshape(b, h * w, p) for v in range(2))
    box_BV4 = views["global_box"]
    x_at_Bn2, y_at_Bn2 = (positions(box_BV4[:, v], (h, w)) for v in range(2))
    whole = criterion(z_BVP[:, 0], z_BVP[:, 1])
    dense = local(x_BnP, y_BnP, x_at_Bn2, y_at_Bn2)
    aux = Aux(
      method_state={"batch_stats": stats},
      metrics={"global": whole, "local": dense},
      features=jax.lax.stop_gradient(h_BVD[:, 0]),
      embeddings=jax.lax.stop_gradient(z_BVP[:, 0]),
      targets=jax.lax.stop_gradient(z_BVP[:, 1]),
    )
    return global_weight * whole + (1 - global_weight) * dense, aux

  return Method(views, init, loss, keep, encode_with(encoder), unit_variance=True)
