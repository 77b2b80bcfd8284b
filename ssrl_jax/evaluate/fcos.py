"""FCOS: what each point of a pyramid should say, the loss, and boxes out of what it says.

Tian et al. 2019, with centre sampling and GIoU as in the official code's improved setting. Pure
functions of fixed shapes. P points, N boxes of a picture (some of them padding), K classes, C
candidates, M boxes in the end. Boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssrl_jax.method import Array

REACH = (
  8  # the farthest side of a level's boxes, in its strides: 64 pixels at stride 8 (section 3.2)
)
RADIUS = 1.5  # of the centre in which a box has positive points, in strides (official code)
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


class Points(NamedTuple):
  """The centres of all cells of all levels."""

  xy_P2: np.ndarray  # float32
  stride_P: np.ndarray  # float32
  reach_P2: np.ndarray  # float32: a point answers for boxes whose farthest side is between


class Targets(NamedTuple):
  label_P: Array  # int32; -1: background
  distance_P4: Array  # float32, to left, top, right, bottom; of background without meaning


def make_points(strides: tuple[int, ...], size: int) -> Points:
  """Level by level, row by row; the finest level has no lower limit and the coarsest no upper."""
  xy, stride, reach = [], [], []
  for level, s in enumerate(strides):
    n = -(-size // s)
    rows, columns = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    xy.append((np.stack([columns, rows], -1).reshape(-1, 2) + 0.5) * s)
    low = strides[level - 1] * REACH if level else 0
    high = s * REACH if level < len(strides) - 1 else np.inf
    reach.append(np.tile([[low, high]], (n * n, 1)))
    stride.append(np.full(n * n, s))
  return Points(*(np.concatenate(x).astype(np.float32) for x in (xy, stride, reach)))


def assign(points: Points, boxes_N4: Array, label_N: Array, valid_N: Array) -> Targets:
  """What the points of one picture should say.

  A point belongs to a box if it is within RADIUS strides of its centre, inside the box, and the
  farthest side of the box is in its level's reach; of several to the smallest.
  """
  xy_P12, stride_P1 = points.xy_P2[:, None, :], points.stride_P[:, None]
  near_1N2, far_1N2 = boxes_N4[None, :, :2], boxes_N4[None, :, 2:]
  distance_PN4 = jnp.concatenate([xy_P12 - near_1N2, far_1N2 - xy_P12], axis=-1)
  offset_PN2 = jnp.abs(xy_P12 - (near_1N2 + far_1N2) / 2)
  central_PN = jnp.max(offset_PN2, axis=-1) < RADIUS * stride_P1
  inside_PN = jnp.min(distance_PN4, axis=-1) > 0
  farthest_PN = jnp.max(distance_PN4, axis=-1)
  reach_P2 = points.reach_P2
  in_reach_PN = (reach_P2[:, :1] <= farthest_PN) & (farthest_PN <= reach_P2[:, 1:])
  area_1N = jnp.prod(far_1N2 - near_1N2, axis=-1)
  own_PN = central_PN & inside_PN & in_reach_PN & valid_N[None, :]
  area_PN = jnp.where(own_PN, area_1N, jnp.inf)
  chosen_P = jnp.argmin(area_PN, axis=1)
  label_P = jnp.where(jnp.any(own_PN, axis=1), label_N[chosen_P], -1)
  distance_P4 = jnp.take_along_axis(distance_PN4, chosen_P[:, None, None], axis=1)[:, 0]
  return Targets(label_P, distance_P4)


def centreness(distance: Array) -> Array:
  """[..., 4] -> [...], 1 in the middle of a box and 0 at its border (equation 3)."""
  distance = jnp.maximum(distance, 1e-6)
  pairs = distance[..., :2], distance[..., 2:]
  return jnp.sqrt(jnp.prod(jnp.minimum(*pairs) / jnp.maximum(*pairs), axis=-1))


def loss(
  outputs: tuple[Array, Array, Array], targets: Targets, weight_B: Array
) -> tuple[Array, dict[str, Array]]:
  """Focal + GIoU + centreness, each a mean over the positive points of the global batch.

  GIoU weighs a point by its centreness. A picture of weight 0 has no part in it.

  Args:
    outputs: logits [B, P, K], distances [B, P, 4], centreness logits [B, P]; see `Detector`.
    targets: with a leading axis B.
  """
  logits_BPK, distance_BP4, centre_BP = outputs
  label_BP, weight_B1 = targets.label_P, weight_B[:, None]
  positive_BP = (label_BP >= 0) * weight_B1
  count = jnp.maximum(jnp.sum(positive_BP), 1)
  onehot_BPK = jax.nn.one_hot(label_BP, logits_BPK.shape[-1])
  focal_BPK = optax.sigmoid_focal_loss(logits_BPK, onehot_BPK, alpha=ALPHA, gamma=GAMMA)
  centre_target_BP = centreness(targets.distance_P4)
  share_BP = centre_target_BP * positive_BP
  # Around a point at 0 a box is (-left, -top, right, bottom).
  sign_114 = np.array([[[-1, -1, 1, 1]]], np.float32)
  overlap_BP = giou(distance_BP4 * sign_114, jnp.maximum(targets.distance_P4, 0) * sign_114)
  centre_BP = optax.sigmoid_binary_cross_entropy(centre_BP, centre_target_BP)
  terms = {
    "focal": jnp.sum(focal_BPK * weight_B1[..., None]) / count,
    "giou": jnp.sum((1 - overlap_BP) * share_BP) / jnp.maximum(jnp.sum(share_BP), 1e-6),
    "centre": jnp.sum(centre_BP * positive_BP) / count,
  }
  return sum(terms.values()), terms


def giou(a: Array, b: Array) -> Array:
  """Generalised IoU (Rezatofighi et al. 2019) of boxes [..., 4], in [-1, 1] of shape [...]."""
  shared, union = _shared_and_union(a, b)
  near, far = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
  hull = jnp.maximum(jnp.prod(far - near, axis=-1), 1e-6)
  return shared / jnp.maximum(union, 1e-6) - (hull - union) / hull


def iou(a: Array, b: Array) -> Array:
  """Intersection over union of boxes [..., 4], in [0, 1] of shape [...]."""
  shared, union = _shared_and_union(a, b)
  return shared / jnp.maximum(union, 1e-6)


def _shared_and_union(a: Array, b: Array) -> tuple[Array, Array]:
  near, far = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
  shared = jnp.prod(jnp.maximum(far - near, 0), axis=-1)
  areas = (jnp.prod(x[..., 2:] - x[..., :2], axis=-1) for x in (a, b))
  return shared, sum(areas) - shared


def detect(
  points: Points,
  logits_PK: Array,
  distance_P4: Array,
  centre_P: Array,
  limits_2: Array,
  *,
  candidates: int,
  threshold: float,
  count: int,
) -> tuple[Array, Array, Array]:
  """The boxes of one picture, best first: boxes [M, 4], scores [M] in [0, 1], labels int32 [M].

  The score is the geometric mean of a class's probability and the centreness (official code, in
  FCOS' later version). Boxes are clipped to `limits_2`, the picture's width and height. Where there
  are fewer than M = `count`, the score is 0.
  """
  score_PK = jnp.sqrt(jax.nn.sigmoid(logits_PK) * jax.nn.sigmoid(centre_P)[:, None])
  P, K = score_PK.shape
  score_C, place_C = jax.lax.top_k(score_PK.reshape(-1), min(candidates, P * K))
  point_C, label_C = place_C // K, place_C % K
  xy_C2, distance_C4 = jnp.asarray(points.xy_P2)[point_C], distance_P4[point_C]
  boxes_C4 = jnp.concatenate([xy_C2 - distance_C4[:, :2], xy_C2 + distance_C4[:, 2:]], axis=1)
  boxes_C4 = jnp.clip(boxes_C4, 0, jnp.tile(limits_2, 2)[None, :])
  some_C = jnp.all(boxes_C4[:, 2:] > boxes_C4[:, :2], axis=1)
  kept_C = nms(boxes_C4, label_C, some_C, threshold=threshold)
  score_M, best_M = jax.lax.top_k(jnp.where(kept_C, score_C, 0.0), min(count, len(score_C)))
  return boxes_C4[best_M], score_M, label_C[best_M]


def nms(boxes_C4: Array, label_C: Array, valid_C: Array, *, threshold: float) -> Array:
  """Which boxes stay, bool [C]: from the first on, each unless one that stays is too near.

  Near is an IoU above `threshold` with a box of the same class. The best come first.
  """
  C = len(label_C)
  near_CC = iou(boxes_C4[:, None], boxes_C4[None, :]) > threshold
  near_CC &= (label_C[:, None] == label_C[None, :]) & (np.arange(C)[:, None] < np.arange(C)[None])

  def visit(i, kept_C):
    return kept_C & ~(kept_C[i] & near_CC[i])

  return jax.lax.fori_loop(0, C, visit, valid_C)
