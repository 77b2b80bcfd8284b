"""Which places of two views' maps belong together. Shapes: n, m places of a map, row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssrl_jax.method import Array, exact_matmul, normalise


def match_features(x_BnC: Array, y_BmC: Array) -> Array:
  """int32 [B, n]: for each place of x the place of y with the largest cosine; no gradient.

  Wang et al. 2021 (DenseCL), equation 4.
  """
  x_BnC, y_BmC = jax.lax.stop_gradient((normalise(x_BnC), normalise(y_BmC)))
  return jnp.argmax(exact_matmul(x_BnC, jnp.swapaxes(y_BmC, 1, 2)), axis=-1)


def take_places(x_BnC: Array, place_Bm: Array) -> Array:
  """[B, n, C] at the places [B, m] -> [B, m, C]."""
  return jnp.take_along_axis(x_BnC, place_Bm[:, :, None], axis=1)


def closest_pairs(x_BnC: Array, y_BmC: Array, *, num: int) -> tuple[Array, Array]:
  """The `num` places of x that are nearest to any place of y, and those places of y; [B, num] each.

  Euclidean distance, without gradient. Bardes et al. 2022 (VICRegL), section 3.2: on features, or
  on positions. In the order of x's places, as the official code: statistics over the batch are of
  places with the same rank.
  """
  x_BnC, y_BmC = jax.lax.stop_gradient((x_BnC, y_BmC))
  square_Bnm = (
    jnp.sum(x_BnC**2, axis=-1)[:, :, None]
    + jnp.sum(y_BmC**2, axis=-1)[:, None, :]
    - 2 * jnp.einsum("BnC,BmC->Bnm", x_BnC, y_BmC, precision=jax.lax.Precision.HIGHEST)
  )
  nearest_Bn = jnp.argmin(square_Bnm, axis=2)
  _, place_Bk = jax.lax.top_k(-jnp.min(square_Bnm, axis=2), num)
  place_Bk = jnp.sort(place_Bk, axis=1)
  return place_Bk, jnp.take_along_axis(nearest_Bn, place_Bk, axis=1)


def seen_from(map_BhwP: Array, box_B4: Array, *, at_box_B4: Array) -> tuple[Array, Array]:
  """What a view shows at the places of another view, whose map has the same grid.

  Bilinear between the centres of places; between the outermost ones and the edge these are
  repeated. Boxes are upright, so rows and columns are weighed apart: two products, no gather.

  Args:
    map_BhwP: of the view that is read.
    box_B4, at_box_B4: of it and of the other view, as `positions` takes them.

  Returns:
    float32 [B, h, w, P], and bool [B, h, w]: whether the place lies within the view that is read.
  """
  weights, inside = [], []
  for axis, n in enumerate(map_BhwP.shape[1:3]):
    start_B1, end_B1 = box_B4[:, axis, None], box_B4[:, axis + 2, None]
    at_start_B1, at_end_B1 = at_box_B4[:, axis, None], at_box_B4[:, axis + 2, None]
    at_Bn = at_start_B1 + (at_end_B1 - at_start_B1) * ((jnp.arange(n) + 0.5) / n)[None]
    share_Bn = (at_Bn - start_B1) / (end_B1 - start_B1)  # 0 to 1 within the view that is read
    place_Bn1 = jnp.clip(share_Bn * n - 0.5, 0, n - 1)[:, :, None]
    weights.append(jax.nn.relu(1 - jnp.abs(place_Bn1 - jnp.arange(n)[None, None])))
    inside.append((share_Bn >= 0) & (share_Bn <= 1))
  rows_Bih, columns_Bjw = weights
  exact = jax.lax.Precision.HIGHEST  # as in pixels.resample
  shown_BijP = jnp.einsum("Bih,BhwP,Bjw->BijP", rows_Bih, map_BhwP, columns_Bjw, precision=exact)
  return shown_BijP, inside[0][:, :, None] & inside[1][:, None, :]


def positions(box_B4: Array, grid: tuple[int, int]) -> Array:
  """float32 [B, n, 2]: where the centre of each place of a view's map lies in the picture.

  Args:
    box_B4: top, left, bottom, right of the view in the picture; left and right swapped where the
      view is mirrored.
    grid: rows and columns of the map.
  """
  h, w = grid
  row_h, column_w = (jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w
  top, left, bottom, right = (box_B4[:, i, None] for i in range(4))
  y_Bh = top + (bottom - top) * row_h[None]
  x_Bw = left + (right - left) * column_w[None]
  shape = (box_B4.shape[0], h, w)
  places = (jnp.broadcast_to(y_Bh[:, :, None], shape), jnp.broadcast_to(x_Bw[:, None, :], shape))
  return jnp.stack(places, axis=-1).reshape(shape[0], h * w, 2)
