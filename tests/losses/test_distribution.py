import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from ssrl_jax.losses import distribution
from tests.numeric import differences

coding_rate = jax.jit(distribution.coding_rate)
variance_covariance = jax.jit(distribution.variance_covariance)
sigreg = jax.jit(distribution.sigreg, static_argnames="num_directions")
koleo = jax.jit(distribution.koleo)
covariance_contrast = jax.jit(functools.partial(distribution.covariance_contrast, momentum=0.9))


def coding_rate64(z, eps):
  """MCR2's equation 1 on unit rows, by the eigenvalues of sum_i z_i z_i'; minus, per dimension."""
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  b, p = z.shape
  scatter = sum(np.outer(row, row) for row in z)
  eigenvalues = np.linalg.eigvalsh(np.eye(p) + p / (b * eps**2) * scatter)
  return -sum(np.log(e) for e in eigenvalues) / 2 / p


def vicreg64(z):
  """Equations 1 to 4 of VICReg as main_vicreg.py computes them: variance term, covariance term."""
  b, p = z.shape
  mean = [sum(z[i, j] for i in range(b)) / b for j in range(p)]
  cov = np.zeros((p, p))
  for j in range(p):
    for k in range(p):
      cov[j, k] = sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in range(b)) / (b - 1)
  variance = sum(max(0, 1 - np.sqrt(cov[j, j] + 1e-4)) for j in range(p)) / p
  return variance, sum(cov[j, k] ** 2 for j in range(p) for k in range(p) if j != k) / p


def epps_pulley64(x):
  """lejepa/univariate/epps_pulley.py for one projection x [B]."""
  t = np.linspace(0, 3, 17)
  weights = np.full(17, 2 * 3 / 16)
  weights[0] = weights[-1] = 3 / 16
  error = 0.0
  for t_i, weight in zip(t, weights):
    real = np.mean([np.cos(t_i * v) for v in x]) - np.exp(-(t_i**2) / 2)
    imaginary = np.mean([np.sin(t_i * v) for v in x])
    error += weight * np.exp(-(t_i**2) / 2) * (real**2 + imaginary**2)
  return len(x) * error


def embeddings(b=9, p=5, scale=1.0):
  rng = np.random.default_rng(b)
  mixed = rng.normal(size=(b, p)) @ (np.eye(p) + 0.4 * rng.normal(size=(p, p))) + 0.3
  return (scale * mixed).astype(np.float32)


@pytest.mark.parametrize(("b", "p"), [(9, 5), (4, 7)])  # the determinant of either matrix
@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_coding_rate_is_equation_1(b, p, eps):
  z = embeddings(b, p)
  np.testing.assert_allclose(
    coding_rate(z, eps=eps), coding_rate64(z.astype(np.float64), eps), rtol=1e-5
  )


@pytest.mark.parametrize("b", [5, 10, 20])
def test_coding_rate_is_least_when_every_direction_is_filled_alike(b):
  filled = np.tile(np.eye(5, dtype=np.float32), (b // 5, 1))
  least = -np.log(1 + 1 / 0.2**2) / 2  # as documented
  np.testing.assert_allclose(coding_rate(filled, eps=0.2), least, rtol=1e-6)
  assert coding_rate(embeddings(b), eps=0.2) > least


def test_coding_rate_of_a_collapsed_batch():
  z = np.ones((9, 5), np.float32)  # one eigenvalue, P / eps^2
  np.testing.assert_allclose(coding_rate(z, eps=0.2), -np.log(1 + 5 / 0.2**2) / 10, rtol=1e-5)
  assert coding_rate(z, eps=0.2) > coding_rate(embeddings(), eps=0.2)


def test_coding_rate_does_not_depend_on_the_scale():
  np.testing.assert_allclose(
    coding_rate(embeddings(scale=1e4), eps=0.2), coding_rate(embeddings(), eps=0.2), rtol=1e-5
  )


def test_variance_covariance_is_equations_1_to_4():
  # Scales on both sides of the hinge.
  z = embeddings() * np.array([0.2, 0.5, 1, 2, 3], np.float32)
  variance, covariance = vicreg64(z.astype(np.float64))
  assert variance > 0
  got = variance_covariance(z)
  np.testing.assert_allclose(got[0], variance, rtol=1e-5)
  np.testing.assert_allclose(got[1], covariance, rtol=1e-5)


def test_variance_covariance_by_hand():
  # Rows (0, 0), (2, 2): variances and covariance 2, so no hinge and 2 * 4 / 2 of off-diagonals.
  variance, covariance = variance_covariance(np.array([[0, 0], [2, 2]], np.float32))
  np.testing.assert_allclose([variance, covariance], [0, 4], rtol=1e-6)
  # Collapsed: the hinge is 1 - sqrt(1e-4), nothing else.
  variance, covariance = variance_covariance(np.full((4, 3), 7.0, np.float32))
  np.testing.assert_allclose([variance, covariance], [0.99, 0], rtol=1e-6)


def test_variance_covariance_takes_the_unbiased_variance():
  # Rows -1/2 and 1/2: variance 1/2 unbiased, 1/4 biased.
  variance, _ = variance_covariance(np.array([[-0.5], [0.5]], np.float32))
  np.testing.assert_allclose(variance, 1 - np.sqrt(0.5 + 1e-4), rtol=1e-6)


def test_variance_covariance_is_zero_at_its_optimum():
  z = 2 * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)  # whitened, deviation > 1
  np.testing.assert_allclose(variance_covariance(z), [0, 0], atol=1e-7)


def test_sigreg_is_the_mean_epps_pulley_statistic_of_the_projections():
  z, key = embeddings(12), jax.random.key(3)
  # Of the transcription only the directions are JAX's.
  directions = np.asarray(jax.random.normal(key, (5, 8)), np.float64)
  directions /= np.sqrt((directions**2).sum(axis=0))
  expected = np.mean([epps_pulley64(z.astype(np.float64) @ d) for d in directions.T])
  np.testing.assert_allclose(sigreg(z, key, num_directions=8), expected, rtol=1e-4)


def test_sigreg_of_one_dimension_needs_no_direction():
  x = embeddings(12, 1)  # both directions, +1 and -1, give the same statistic
  np.testing.assert_allclose(
    sigreg(x, jax.random.key(0), num_directions=2), epps_pulley64(x[:, 0]), rtol=1e-4
  )


def test_sigreg_is_about_one_on_a_standard_normal_and_grows_with_the_batch_when_collapsed():
  """Expectations: integrals over [-3, 3] of the window times the characteristic functions'."""
  rng = np.random.default_rng(0)
  values = [
    sigreg(rng.normal(size=(256, 16)).astype(np.float32), jax.random.key(i)) for i in range(8)
  ]
  # E |empirical - phi|^2 = (1 - phi^2) / B, phi = exp(-t^2 / 2).
  expected, _ = quad(lambda t: np.exp(-(t**2) / 2) * (1 - np.exp(-(t**2))), -3, 3)
  np.testing.assert_allclose(np.mean(values), expected, rtol=0.1)  # 8 draws: deviation about 2 %
  at_zero, _ = quad(lambda t: np.exp(-(t**2) / 2) * (1 - np.exp(-(t**2) / 2)) ** 2, -3, 3)
  for b in (9, 256):
    collapsed = sigreg(np.zeros((b, 16), np.float32), jax.random.key(0))
    np.testing.assert_allclose(collapsed, b * at_zero, rtol=1e-3)  # 17 points against the integral


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_sigreg_asks_for_unit_variance(wrong):
  z = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
  assert sigreg(wrong * z, jax.random.key(0)) > 10 * sigreg(z, jax.random.key(0))


def tico64(z, earlier):
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  c = 0.9 * earlier + 0.1 * sum(np.outer(row, row) for row in z) / len(z)
  return sum(row @ c @ row for row in z) / len(z)


def past(p):
  x = np.random.default_rng(3).normal(size=(2 * p, p)).astype(np.float32)
  return x.T @ x / np.sum(x**2)


def test_covariance_contrast_by_hand():
  """Of rows that fill P directions alike 1 / P, of equal rows 1, once C is theirs."""
  alike, equal = np.eye(4, dtype=np.float32), np.tile(np.float32([[0, 3, 0, 0]]), (5, 1))
  for z, first, last in ((alike, 0.1 / 4, 1 / 4), (equal, 0.1, 1)):
    value, c = covariance_contrast(z, np.zeros((4, 4), np.float32))
    np.testing.assert_allclose(value, first, rtol=1e-5)
    for _ in range(150):
      value, c = covariance_contrast(z, c)
    np.testing.assert_allclose(value, last, rtol=1e-5)
    np.testing.assert_allclose(np.trace(c), 1, rtol=1e-5)


OBJECTIVES = {
  "coding_rate": (lambda z: distribution.coding_rate(z, eps=0.2), lambda z: coding_rate64(z, 0.2)),
  "variance": (lambda z: distribution.variance_covariance(z)[0], lambda z: vicreg64(z)[0]),
  "covariance": (lambda z: distribution.variance_covariance(z)[1], lambda z: vicreg64(z)[1]),
  # In one dimension every direction gives the same statistic.
  "sigreg": (
    lambda z: distribution.sigreg(z, jax.random.key(0), num_directions=4),
    lambda z: epps_pulley64(z[:, 0]),
  ),
  "covariance_contrast": (
    lambda z: distribution.covariance_contrast(z, past(z.shape[1]), momentum=0.9)[0],
    lambda z: tico64(z, past(z.shape[1])),
  ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_that_of_differences(name):
  objective, objective64 = OBJECTIVES[name]
  z = embeddings(6, 1 if name == "sigreg" else 4)
  gradient = jax.jit(jax.grad(objective))(z)
  expected = differences(objective64, z.astype(np.float64))
  np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_stay_finite(name):
  value_and_grad = jax.jit(jax.value_and_grad(OBJECTIVES[name][0]))
  z = embeddings(9, 5)
  identical = np.tile(z[:1], (9, 1))
  for case in (z, 1e4 * z, 1e-4 * z, 0 * z, identical, 1e4 * identical, 0 * z + 1):
    value, gradient = value_and_grad(case.astype(np.float32))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
  value, gradient = value_and_grad(jnp.asarray(z, jnp.bfloat16))
  assert value.dtype == jnp.float32
  assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_koleo_is_the_official_loop():
  """koleo_loss.py: the neighbour by the largest product, 1e-8 beside difference and distance."""
  z = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)

  def loop(z):
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i, row in enumerate(z):
      nearest = max((row @ other, j) for j, other in enumerate(z) if j != i)[1]
      total -= np.log(np.sqrt(sum((row - z[nearest] + 1e-8) ** 2)) + 1e-8) / len(z)
    return total

  np.testing.assert_allclose(koleo(z), loop(z.astype(np.float64)), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(koleo)(z), differences(loop, z), rtol=2e-3, atol=1e-5)


def test_koleo_by_hand_and_of_equal_rows():
  z = np.array([[3, 0], [0, 1], [-1, 0]], np.float32)  # each sqrt(2) from its nearest
  np.testing.assert_allclose(koleo(z), -np.log(np.sqrt(2)), rtol=1e-6)
  value, gradient = jax.value_and_grad(koleo)(np.ones((4, 3), np.float32))
  assert value > 15  # as far from spread as it can be
  assert np.all(np.isfinite(gradient))
