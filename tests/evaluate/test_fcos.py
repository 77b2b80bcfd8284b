import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.evaluate import fcos
from ssrl_jax.parallel import quick_compile

STRIDES, SIZE = (4, 8, 16), 64
QUICK = {"compiler_options": quick_compile()}

assign = jax.jit(fcos.assign, **QUICK)
iou, giou = jax.jit(fcos.iou, **QUICK), jax.jit(fcos.giou, **QUICK)
loss = jax.jit(fcos.loss, **QUICK)
detect = jax.jit(fcos.detect, static_argnames=("candidates", "threshold", "count"), **QUICK)
nms = jax.jit(fcos.nms, static_argnames="threshold", **QUICK)


def random_boxes(seed, n, size=SIZE):
  rng = np.random.default_rng(seed)
  near = rng.uniform(0, size - 4, (n, 2))
  far = np.minimum(near + rng.uniform(2, size, (n, 2)), size)
  return np.concatenate([near, far], axis=1).astype(np.float32)


def brute_iou(a, b):
  shared = 1.0
  for near, far in ((0, 2), (1, 3)):
    shared *= max(0.0, min(a[far], b[far]) - max(a[near], b[near]))
  areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
  return shared / (sum(areas) - shared)


def brute_targets(boxes, labels, valid):
  """Point by point, box by box, from section 3 of the paper and its centre sampling."""
  found = []
  for level, stride in enumerate(STRIDES):
    low = 8 * STRIDES[level - 1] if level else 0
    high = 8 * stride if level < len(STRIDES) - 1 else float("inf")
    for row in range(SIZE // stride):
      for column in range(SIZE // stride):
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        best, best_area = None, float("inf")
        for number, (left, top, right, bottom) in enumerate(boxes.astype(np.float64)):
          if not valid[number]:
            continue
          sides = (x - left, y - top, right - x, bottom - y)
          far = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2))
          area = (right - left) * (bottom - top)
          answers = min(sides) > 0 and far < 1.5 * stride and low <= max(sides) <= high
          if answers and area < best_area:
            best, best_area = (labels[number], sides), area
        found.append(best)
  return found


@pytest.mark.parametrize("seed", range(3))
def test_targets_are_those_of_a_loop_over_points_and_boxes(seed):
  rng = np.random.default_rng(seed)
  boxes, labels, valid = random_boxes(seed, 9), rng.integers(0, 3, 9), np.arange(9) < 7
  points = fcos.make_points(STRIDES, SIZE)
  targets = assign(points, jnp.asarray(boxes), jnp.asarray(labels), jnp.asarray(valid))
  expected = brute_targets(boxes, labels, valid)
  assert sum(x is not None for x in expected) > 10
  assert len({x[0] for x in expected if x}) == 3
  for label, distance, one in zip(*targets, expected):
    assert label == (one[0] if one else -1)
    if one:
      np.testing.assert_allclose(distance, one[1], rtol=1e-5, atol=1e-4)


def test_a_picture_without_boxes_is_all_background():
  points = fcos.make_points(STRIDES, SIZE)
  targets = assign(points, jnp.zeros((4, 4)), jnp.zeros(4, int), jnp.zeros(4, bool))
  assert np.all(targets.label_P == -1)


def test_points_are_cell_centres_in_the_order_of_a_flattened_map():
  xy, stride, _ = fcos.make_points((4, 8), 16)
  np.testing.assert_array_equal(xy[:5], [[2, 2], [6, 2], [10, 2], [14, 2], [2, 6]])
  np.testing.assert_array_equal(xy[16:], [[4, 4], [12, 4], [4, 12], [12, 12]])
  np.testing.assert_array_equal(stride, [4] * 16 + [8] * 4)


@pytest.mark.parametrize(
  ("a", "b", "expected"),
  [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
    ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),  # hull = union
    ((0, 0, 1, 1), (2, 0, 3, 1), -1 / 3),  # nothing shared, union 2, hull 3
    ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - 2 / 9),
    ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16),
  ],
)
def test_giou_has_the_values_by_hand(a, b, expected):
  a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
  np.testing.assert_allclose(giou(a, b), expected, rtol=1e-6)
  np.testing.assert_allclose(giou(b, a), expected, rtol=1e-6)


def test_iou_is_that_of_a_loop():
  boxes = random_boxes(4, 20)
  found = iou(jnp.asarray(boxes[:, None]), jnp.asarray(boxes[None]))
  expected = [[brute_iou(a, b) for b in boxes.astype(float)] for a in boxes.astype(float)]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6])
def test_nms_keeps_what_a_loop_keeps(threshold):
  rng = np.random.default_rng(8)
  boxes, labels, valid = random_boxes(8, 60), rng.integers(0, 2, 60), rng.random(60) < 0.8
  kept = []
  for i in range(60):
    near = [brute_iou(boxes[i], boxes[j]) > threshold and labels[i] == labels[j] for j in kept]
    if valid[i] and not any(near):
      kept.append(i)
  found = nms(*map(jnp.asarray, (boxes, labels, valid)), threshold=threshold)
  np.testing.assert_array_equal(np.flatnonzero(found), kept)
  assert 0 < len(kept) < valid.sum()


def test_centreness_is_one_in_the_middle_and_the_papers_elsewhere():
  distance = jnp.array([[3.0, 2, 3, 2], [1, 2, 4, 8]])
  np.testing.assert_allclose(fcos.centreness(distance), [1, np.sqrt(1 / 4 * 2 / 8)], rtol=1e-6)


@functools.partial(jax.jit, static_argnames="num_classes", **QUICK)
def perfect(targets, num_classes):
  """Outputs that say what the targets are."""
  logits = jnp.where(jax.nn.one_hot(targets.label_P, num_classes) > 0, 12.0, -12.0)
  centre = jnp.log(jnp.clip(fcos.centreness(targets.distance_P4), 1e-6, 1 - 1e-6))
  distance = jnp.maximum(targets.distance_P4, 1e-3)
  return logits, distance, centre - jnp.log1p(-jnp.exp(centre))


def test_boxes_come_back_out_of_their_own_targets():
  boxes = np.array([[4, 6, 20, 18], [30, 30, 62, 60], [40, 2, 50, 12]], np.float32)
  labels, points = np.array([2, 0, 1]), fcos.make_points(STRIDES, SIZE)
  targets = assign(points, jnp.asarray(boxes), jnp.asarray(labels), jnp.ones(3, bool))
  found, score, label = detect(
    points, *perfect(targets, 3), jnp.array([64.0, 64.0]), candidates=50, threshold=0.6,
    count=10,
  )  # fmt: skip
  order = np.argsort(label[:3])
  np.testing.assert_allclose(found[:3][order], boxes[[1, 2, 0]], atol=1e-3)
  np.testing.assert_array_equal(label[:3][order], [0, 1, 2])
  assert np.all(np.diff(score) <= 0)
  assert np.all(score[:3] > 0.5)
  assert np.all(score[3:] < 0.1)


def test_loss_is_that_of_a_transcription():
  rng = np.random.default_rng(3)
  points, B, K = fcos.make_points((8, 16), 32), 2, 2
  P = len(points.stride_P)
  logits, centre = rng.normal(size=(B, P, K)), rng.normal(size=(B, P))
  distance = rng.uniform(1, 20, (B, P, 4))
  label, target = rng.integers(-1, K, (B, P)), rng.uniform(1, 20, (B, P, 4))
  weight = np.array([1.0, 0.0])
  outputs = [jnp.asarray(x, jnp.float32) for x in (logits, distance, centre)]
  targets = fcos.Targets(jnp.asarray(label), jnp.asarray(target, jnp.float32))
  value, terms = loss(tuple(outputs), targets, jnp.asarray(weight, jnp.float32))
  focal = giou = bce = share = count = 0.0
  for p in range(P):  # of the first picture: the second has weight 0
    for k in range(K):
      prob = 1 / (1 + np.exp(-logits[0, p, k]))
      if label[0, p] == k:
        focal -= 0.25 * (1 - prob) ** 2 * np.log(prob)
      else:
        focal -= 0.75 * prob**2 * np.log(1 - prob)
    if label[0, p] < 0:
      continue
    left, top, right, bottom = target[0, p]
    ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
    c, prob = ratio**0.5, 1 / (1 + np.exp(-centre[0, p]))
    a, b = ((-x[0], -x[1], x[2], x[3]) for x in (distance[0, p], target[0, p]))
    hull = np.prod(np.maximum(distance[0, p], target[0, p])[:2] + np.maximum(a, b)[2:])
    areas = sum((x[0] + x[2]) * (x[1] + x[3]) for x in (distance[0, p], target[0, p]))
    union = areas / (1 + brute_iou(a, b))
    giou += c * (1 - brute_iou(a, b) + (hull - union) / hull)
    bce -= c * np.log(prob) + (1 - c) * np.log(1 - prob)
    share, count = share + c, count + 1
  expected = {"focal": focal / count, "giou": giou / share, "centre": bce / count}
  for name, x in expected.items():
    np.testing.assert_allclose(terms[name], x, rtol=1e-5)
  np.testing.assert_allclose(value, sum(expected.values()), rtol=1e-5)


def test_loss_of_a_batch_without_boxes_is_finite_with_its_gradient():
  targets = fcos.Targets(jnp.full((2, 4), -1), jnp.zeros((2, 4, 4)))
  outputs = jnp.zeros((2, 4, 2)), jnp.ones((2, 4, 4)), jnp.zeros((2, 4))
  value_and_grad = jax.jit(jax.value_and_grad(fcos.loss, has_aux=True), **QUICK)
  (value, _), grads = value_and_grad(outputs, targets, jnp.ones(2))
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
