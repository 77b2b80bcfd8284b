import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import consistency

cosine_distance = jax.jit(consistency.cosine_distance)


def cosine_distance64(x, y):
  """BYOL's equation 2 in its first form: the squared distance of the unit vectors."""
  return sum((a / np.linalg.norm(x) - b / np.linalg.norm(y)) ** 2 for a, b in zip(x, y))


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (7,)])
def test_cosine_distance_is_equation_2_over_the_last_axis(shape):
  rng = np.random.default_rng(0)
  x, y = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
  distance = cosine_distance(x, y)
  assert distance.shape == shape[:-1]
  for i in np.ndindex(*shape[:-1]):
    expected = cosine_distance64(x[i].astype(np.float64), y[i].astype(np.float64))
    np.testing.assert_allclose(distance[i], expected, rtol=1e-5)


def test_cosine_distance_by_hand():
  x = np.array([[3, 4], [3, 4], [3, 4], [0, 0]], np.float32)
  y = np.array([[6, 8], [-3, -4], [4, -3], [1, 0]], np.float32)
  # Parallel, opposite, at right angles; a zero vector has no direction and counts as a right angle.
  np.testing.assert_allclose(cosine_distance(x, y), [0, 4, 2, 2], atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_cosine_distance_and_its_gradient_stay_finite(scale):
  x = scale * np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  for y in (x, -x, np.zeros_like(x)):
    value, gradient = jax.value_and_grad(lambda x, y=y: jnp.sum(cosine_distance(x, y)))(x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_cosine_distance_gradient_is_that_of_differences():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(2, 5)).astype(np.float32)
  gradient = jax.grad(cosine_distance)(x, y)
  x, y, eps = x.astype(np.float64), y.astype(np.float64), 1e-6
  expected = [
    (cosine_distance64(x + step, y) - cosine_distance64(x - step, y)) / (2 * eps)
    for step in eps * np.eye(5)
  ]
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
  # It turns the vector and leaves its length alone.
  np.testing.assert_allclose(gradient @ x, 0, atol=1e-6)


@jax.jit
def relation_entropy(s, t, queue):
  return consistency.relation_entropy(s, t, queue, temperature=0.1, teacher_temperature=0.04)


def test_relation_entropy_by_hand():
  queue = 2 * np.eye(2, dtype=np.float32)
  # The teacher likes the first alone, but for exp(-25); of the student's cosines 1, 0 and 0, 1.
  value = relation_entropy(np.float32([[[5, 0], [0, 1]]]), np.float32([[3, 0]]), queue)
  near = np.log1p(np.exp(-10))
  np.testing.assert_allclose(value, [[near, 10 + near]], rtol=1e-5, atol=1e-7)
  # As like the one as the other: the teacher is undecided, and so should the student be.
  value = relation_entropy(np.float32([[[1, 1], [1, 0]]]), np.float32([[1, 1]]), queue)
  np.testing.assert_allclose(value, [[np.log(2), 5 + near]], rtol=1e-5)


def test_relation_entropy_of_large_and_of_no_embeddings_is_finite():
  rng = np.random.default_rng(0)
  s, t, queue = (rng.normal(size=n).astype(np.float32) for n in ((4, 2, 3), (4, 3), (8, 3)))
  total = jax.jit(jax.value_and_grad(lambda s: jnp.sum(relation_entropy(s, t, queue))))
  for scale in (0.0, 1e-6, 1e4):
    value, gradient = total(scale * s)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
