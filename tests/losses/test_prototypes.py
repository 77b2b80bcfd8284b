import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import prototypes
from tests.numeric import differences, softmax64, unit

sinkhorn = jax.jit(prototypes.sinkhorn, static_argnames="iterations")
centred_softmax = jax.jit(prototypes.centred_softmax)
cross_entropy = jax.jit(prototypes.cross_entropy)
cross_view_entropy = jax.jit(prototypes.cross_view_entropy)


def sinkhorn64(scores, eps, iterations):
  """SwAV's algorithm as main_swav.py's: prototypes to 1 / K each, then rows to 1 / N, by turns."""
  n, k = scores.shape
  q = np.exp(np.asarray(scores, np.float64) / eps)
  q = q / q.sum()
  for _ in range(iterations):
    for j in range(k):
      q[:, j] = q[:, j] / sum(q[:, j]) / k
    for i in range(n):
      q[i] = q[i] / sum(q[i]) / n
  return q * n


def scores_of(n=6, k=4, scale=1.0, seed=0):
  return (scale * np.random.default_rng(seed).normal(size=(n, k))).astype(np.float32)


@pytest.mark.parametrize(("n", "k"), [(6, 4), (3, 8)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_official_loop(n, k, iterations):
  scores = scores_of(n, k, scale=0.3)
  codes = sinkhorn(scores, eps=0.05, iterations=iterations)
  np.testing.assert_allclose(codes, sinkhorn64(scores, 0.05, iterations), rtol=2e-4, atol=1e-6)


def test_sinkhorn_by_hand():
  # Both rows prefer prototype 0 alike: it cannot have both, so each is shared out.
  scores = np.array([[1, 0], [1, 0]], np.float32)
  np.testing.assert_allclose(sinkhorn(scores, eps=0.05), np.full((2, 2), 0.5), rtol=1e-6)
  # A permutation is its own code, as eps is small.
  np.testing.assert_allclose(sinkhorn(np.eye(3, dtype=np.float32), eps=0.05), np.eye(3), atol=1e-6)


def test_sinkhorn_uses_every_prototype_alike():
  codes = np.asarray(prototypes.sinkhorn(scores_of(12, 4), eps=0.5, iterations=50))
  np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(codes.sum(axis=0), 12 / 4, rtol=1e-4)


def test_sinkhorn_of_chosen_rows_is_that_of_them_alone():
  scores, chosen = scores_of(9, 4), np.array([1, 0, 1, 1, 0, 1, 0, 1, 1], bool)
  codes = sinkhorn(scores, eps=0.3, chosen_N=chosen)
  np.testing.assert_allclose(codes[chosen], sinkhorn(scores[chosen], eps=0.3), rtol=1e-5)
  assert np.all(np.isfinite(codes))


def test_sinkhorn_of_scores_that_overflow_exp_in_float32():
  scores = np.array([[20, 0, -20], [19, 3, 0], [18, -5, 7], [21, 20.5, 0]], np.float32)
  assert np.exp(np.float64(scores.max()) / 0.05) > np.finfo(np.float32).max
  codes = sinkhorn(scores, eps=0.05)  # in float64 the official loop can still do it
  np.testing.assert_allclose(codes, sinkhorn64(scores, 0.05, 3), rtol=1e-3, atol=1e-6)


def test_sinkhorn_s_limit_knows_no_offset_of_a_row():
  mild = scores_of(5, 3, scale=0.2)
  shifted = mild + np.array([30, 0, -20, 5, 0], np.float32)[:, None]
  codes = prototypes.sinkhorn(shifted, eps=0.05, iterations=60)
  np.testing.assert_allclose(codes, sinkhorn64(mild, 0.05, 60), atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sinkhorn_computes_in_float32(dtype):
  scores = jnp.asarray(scores_of(scale=0.3), dtype)
  codes = sinkhorn(scores, eps=0.05)
  assert codes.dtype == jnp.float32
  expected = sinkhorn64(np.asarray(scores, np.float64), 0.05, 3)
  np.testing.assert_allclose(codes, expected, rtol=2e-4, atol=1e-6)


def test_centred_softmax_is_equation_1_with_the_centre_taken_away():
  rng = np.random.default_rng(0)
  scores, centre = rng.normal(size=(2, 3, 4)).astype(np.float32), np.float32([1, 0, -1, 0.5])
  got = centred_softmax(scores, centre, temperature=0.3)
  for i in np.ndindex(2, 3):
    np.testing.assert_allclose(got[i], softmax64((scores[i] - centre) / 0.3), rtol=1e-5)
  # A teacher at its centre says nothing.
  np.testing.assert_allclose(centred_softmax(centre, centre, temperature=0.04), [0.25] * 4)
  assert centred_softmax(scores.astype(jnp.bfloat16), centre, temperature=1).dtype == jnp.float32


def test_cross_entropy_by_hand_and_against_the_formula():
  target = np.array([[1, 0], [0.5, 0.5]], np.float32)
  scores = np.array([[np.log(3), 0], [0.7, 0.7]], np.float32)
  expected = [np.log(4 / 3), np.log(2)]
  np.testing.assert_allclose(cross_entropy(target, scores, temperature=1.0), expected, rtol=1e-6)
  scores = scores_of()
  target = np.stack([softmax64(row) for row in scores_of(seed=1)]).astype(np.float32)
  got = cross_entropy(target, scores, temperature=0.1)
  for i in range(6):
    probability = softmax64(scores[i] / 0.1)
    expected = -sum(t * np.log(p) for t, p in zip(target[i], probability))
    np.testing.assert_allclose(got[i], expected, rtol=1e-5)


def dino64(target, scores, temperature):
  """DINOLoss.forward of main_dino.py: teacher view iq, student view v, the same one skipped."""
  b, num_targets, _ = target.shape
  total, terms = 0.0, 0
  for t in range(num_targets):
    for v in range(scores.shape[1]):
      if v == t:
        continue
      for i in range(b):
        log = np.log(softmax64(scores[i, v] / temperature))
        total += -sum(target[i, t] * log) / b
      terms += 1
  return total / terms


def swav64(codes, scores, temperature):
  """main_swav.py: for each assigning crop the mean over the crops - 1 others; then their mean."""
  b, num_assign, _ = codes.shape
  num_crops, loss = scores.shape[1], 0.0
  for crop in range(num_assign):
    subloss = 0.0
    for v in np.delete(np.arange(num_crops), crop):
      for i in range(b):
        subloss -= codes[i, crop] @ np.log(softmax64(scores[i, v] / temperature)) / b
    loss += subloss / (num_crops - 1)
  return loss / num_assign


def views(num_targets, num_views, b=5, k=4):
  rng = np.random.default_rng(num_views)
  scores = rng.normal(size=(b, num_views, k)).astype(np.float32)
  target = [[softmax64(3 * rng.normal(size=k)) for _ in range(num_targets)] for _ in range(b)]
  return np.float32(target), scores


@pytest.mark.parametrize(("num_targets", "num_views"), [(2, 2), (2, 5), (3, 3), (1, 2)])
def test_cross_view_entropy_is_dinos_and_swavs_average(num_targets, num_views):
  target, scores = views(num_targets, num_views)
  got = cross_view_entropy(target, scores, temperature=0.1)
  np.testing.assert_allclose(got, dino64(target, scores, 0.1), rtol=1e-5)
  np.testing.assert_allclose(got, swav64(target, scores, 0.1), rtol=1e-5)


def test_cross_view_entropy_by_hand():
  target = np.array([[[1, 0], [0, 1]]], np.float32)  # view 0 says 0, view 1 says 1
  sure = np.array([[[0, 50], [50, 0]]], np.float32)  # each view predicts the other's
  np.testing.assert_allclose(cross_view_entropy(target, sure, temperature=1.0), 0, atol=1e-6)
  np.testing.assert_allclose(cross_view_entropy(target, sure[:, ::-1], temperature=1.0), 50)
  # A third, local view is met by both targets: 50 of four terms each.
  local = np.concatenate([sure, np.array([[[50, 0]]], np.float32)], axis=1)
  np.testing.assert_allclose(cross_view_entropy(target, local, temperature=1.0), 50 / 4, rtol=1e-6)


def test_cross_view_entropy_gradients_are_those_of_differences():
  target, scores = views(2, 3, b=2)
  gradients = jax.jit(
    jax.grad(lambda t, s: prototypes.cross_view_entropy(t, s, temperature=0.3), argnums=(0, 1))
  )(target, scores)
  expected = (
    differences(lambda t: dino64(t, scores, 0.3), target),
    differences(lambda s: dino64(target, s, 0.3), scores),
  )
  for got, want in zip(gradients, expected):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_mean_entropy_gap_is_the_official_regulariser():
  """losses.py: rloss = -sum log(avg^-avg) + log K, avg the mean over all anchors."""
  scores = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)

  def gap(scores):
    avg = sum(softmax64(row / 0.3) for row in scores.reshape(-1, 4)) / 15
    return sum(p * np.log(p) for p in avg) + np.log(4)

  function = jax.value_and_grad(lambda s: prototypes.mean_entropy_gap(s, temperature=0.3))
  value, gradient = jax.jit(function)(scores)
  np.testing.assert_allclose(value, gap(scores.astype(np.float64)), rtol=1e-5)
  np.testing.assert_allclose(gradient, differences(gap, scores), rtol=1e-3, atol=1e-6)


def test_mean_entropy_gap_by_hand():
  gap = lambda rows: prototypes.mean_entropy_gap(np.float32(rows), temperature=1.0)  # noqa: E731
  np.testing.assert_allclose(gap(50 * np.eye(4)), 0, atol=1e-6)  # sure, and all are used alike
  np.testing.assert_allclose(gap(np.zeros((3, 4))), 0, atol=1e-6)
  np.testing.assert_allclose(gap(np.tile([50, 0, 0, 0], (3, 1))), np.log(4), rtol=1e-6)
  np.testing.assert_allclose(gap([[50, 0, 0, 0], [0, 50, 0, 0]]), np.log(2), rtol=1e-6)


def test_everything_stays_finite_at_extreme_scores():
  target, scores = views(2, 3)

  @jax.jit
  def total(scores):
    codes = prototypes.sinkhorn(scores[:, 0], eps=0.01)
    teacher = prototypes.centred_softmax(scores, 10 * scores[0, 0], temperature=0.01)
    one = prototypes.cross_entropy(teacher, scores, temperature=0.01)
    pairs = prototypes.cross_view_entropy(target, scores, temperature=0.01)
    gap = prototypes.mean_entropy_gap(scores, temperature=0.01)
    return jnp.sum(codes[:, 0]) + jnp.sum(one) + pairs + gap

  for scale in (0.0, 1e-6, 1.0, 1e4):
    value, gradient = jax.value_and_grad(total)(np.float32(scale) * scores)
    assert np.isfinite(value), scale
    assert np.all(np.isfinite(gradient)), scale


def test_codes_of_unit_vectors_match_swavs_temperature_range():
  # Cosines over eps 0.05 reach 20: the official exp is safe there, and both agree.
  rng = np.random.default_rng(0)
  scores = (unit(rng.normal(size=(8, 3))) @ unit(rng.normal(size=(5, 3))).T).astype(np.float32)
  np.testing.assert_allclose(
    sinkhorn(scores, eps=0.05), sinkhorn64(scores, 0.05, 3), rtol=1e-4, atol=1e-6
  )
