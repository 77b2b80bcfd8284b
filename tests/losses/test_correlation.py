import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import correlation
from tests.numeric import differences

barlow_twins = jax.jit(correlation.barlow_twins)
whiten = jax.jit(correlation.whiten)


@jax.jit
def barlow_and_gradients(z1, z2, weight):
  def total(z1, z2):
    return correlation.barlow_twins(z1, z2, off_diagonal_weight=weight)

  return jax.value_and_grad(total, argnums=(0, 1))(z1, z2)


def barlow64(z1, z2, weight):
  """Equation 1 as main.py: nn.BatchNorm1d(affine=False), then divided by the batch size."""

  def batch_norm(z):
    out = np.zeros(z.shape)
    for j in range(z.shape[1]):
      mean = sum(z[:, j]) / len(z)
      var = sum((x - mean) ** 2 for x in z[:, j]) / len(z)  # biased, as BatchNorm normalises
      out[:, j] = (z[:, j] - mean) / np.sqrt(var + 1e-5)
    return out

  z1, z2 = (batch_norm(np.asarray(z, np.float64)) for z in (z1, z2))
  loss, dims = 0.0, range(z1.shape[1])
  for i in dims:
    for j in dims:
      c_ij = sum(a[i] * b[j] for a, b in zip(z1, z2)) / len(z1)
      loss += (c_ij - 1) ** 2 if i == j else weight * c_ij**2
  return loss


def pair(b=7, p=4, seed=0):
  rng = np.random.default_rng(seed)
  z1 = rng.normal(size=(b, p)) @ (np.eye(p) + 0.4 * rng.normal(size=(p, p))) + 0.3
  return z1.astype(np.float32), (z1 + 0.5 * rng.normal(size=(b, p))).astype(np.float32)


@pytest.mark.parametrize("weight", [0.0051, 1.0])
def test_barlow_twins_and_its_gradients_are_those_of_equation_1(weight):
  z1, z2 = pair()
  loss, gradients = barlow_and_gradients(z1, z2, weight)
  np.testing.assert_allclose(loss, barlow64(z1, z2, weight), rtol=1e-5)
  expected = (
    differences(lambda z: barlow64(z, z2, weight), z1),
    differences(lambda z: barlow64(z1, z, weight), z2),
  )
  for got, want in zip(gradients, expected):
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)


def test_barlow_twins_by_hand():
  z = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)  # two independent signs
  weight = {"off_diagonal_weight": 0.5}
  c = 1 / (1 + 1e-5)  # the variance is 1, and 1e-5 is added to it
  np.testing.assert_allclose(barlow_twins(z, z, **weight), 2 * (c - 1) ** 2, atol=1e-9)
  np.testing.assert_allclose(barlow_twins(z, -z, **weight), 2 * (c + 1) ** 2, rtol=1e-5)
  # Dimensions exchanged: nothing on the diagonal, ones beside it.
  np.testing.assert_allclose(barlow_twins(z, z[:, ::-1], **weight), 2 + 0.5 * 2, rtol=1e-4)


def test_barlow_twins_divides_by_the_batch_with_the_biased_variance():
  """With an unbiased deviation, or B - 1 below, the diagonal would be off by 1 / B."""
  z = 10 * pair(b=3)[0]
  assert barlow_twins(z, z, off_diagonal_weight=0.0) < 1e-6
  # Three copies of a batch are that batch.
  z1, z2 = pair()
  thrice = barlow_twins(
    np.tile(z1, (3, 1)), np.tile(z2, (3, 1)), off_diagonal_weight=np.float32(0.1)
  )
  np.testing.assert_allclose(thrice, barlow_twins(z1, z2, off_diagonal_weight=0.1), rtol=1e-5)


def test_barlow_twins_follows_neither_scale_nor_offset():
  z1, z2 = pair()
  loss = barlow_twins(z1, z2, off_diagonal_weight=0.1)
  moved = barlow_twins(1e2 * z1 + 5, 1e3 * z2 - 50, off_diagonal_weight=0.1)
  np.testing.assert_allclose(moved, loss, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_barlow_twins_and_its_gradients_stay_finite(scale):
  z1, z2 = pair()
  for arrays in ((scale * z1, scale * z2), (scale * z1, 0 * z2), (0 * z1 + scale, scale * z2)):
    loss, gradients = barlow_and_gradients(*(a.astype(np.float32) for a in arrays), 0.0051)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def whiten64(z, eps):
  """htdt/self-supervised whitening.py, row by row: forward substitution with the Cholesky factor.

  The factor itself too, by Cholesky and Banachiewicz' recursion.
  """
  z = np.asarray(z, np.float64)
  b, p = z.shape
  z = z - sum(z) / b
  cov = sum(np.outer(row, row) for row in z) / (b - 1)
  cov = (1 - eps) * cov + eps * np.eye(p)
  low = np.zeros((p, p))
  for i in range(p):
    for j in range(i + 1):
      rest = cov[i, j] - sum(low[i, k] * low[j, k] for k in range(j))
      low[i, j] = np.sqrt(rest) if i == j else rest / low[j, j]
  out = np.zeros((b, p))
  for n in range(b):
    for i in range(p):
      out[n, i] = (z[n, i] - sum(low[i, k] * out[n, k] for k in range(i))) / low[i, i]
  return out


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_whiten_is_the_official_triangular_solve(eps):
  z, _ = pair(b=9)
  np.testing.assert_allclose(whiten(z, eps=eps), whiten64(z, eps), rtol=1e-4, atol=1e-5)


def test_whitened_rows_have_mean_zero_and_the_identity_as_unbiased_covariance():
  z, _ = pair(b=16)
  w = np.asarray(whiten(50 * z + 3, eps=0.0), np.float64)
  np.testing.assert_allclose(w.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(np.cov(w.T), np.eye(4), atol=1e-4)  # np.cov divides by B - 1


def test_whiten_is_not_the_symmetric_root():
  """Triangular: the first dimension is only divided by its deviation; ZCA would mix all of them."""
  z, _ = pair(b=16)
  w = np.asarray(whiten(z, eps=0.0))
  centred = (z - z.mean(axis=0)).astype(np.float64)
  np.testing.assert_allclose(w[:, 0], centred[:, 0] / z[:, 0].std(ddof=1), rtol=1e-4, atol=1e-5)
  values, vectors = np.linalg.eigh(np.cov(centred.T))
  zca = centred @ vectors @ np.diag(values**-0.5) @ vectors.T
  assert np.abs(w - zca).max() > 0.1


def test_whiten_gradient_is_that_of_differences():
  z, weight = pair(b=6, p=3)[0], np.random.default_rng(3).normal(size=(6, 3)).astype(np.float32)
  gradient = jax.jit(jax.grad(lambda z: jnp.sum(weight * correlation.whiten(z, eps=0.1))))(z)
  expected = differences(lambda z: (weight * whiten64(z, 0.1)).sum(), z)
  np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_whiten_and_its_gradient_stay_finite(scale):
  z = (scale * pair(b=12)[0]).astype(np.float32)
  value, gradient = jax.jit(
    jax.value_and_grad(lambda z: jnp.sum(correlation.whiten(z, eps=0.0)[:, 0] ** 3))
  )(z)
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))
