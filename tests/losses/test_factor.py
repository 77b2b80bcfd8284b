import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses.correlation import whiten
from ssrl_jax.losses.distribution import coding_rate
from ssrl_jax.losses.factor import inverse_cholesky
from tests.numeric import differences, lapack_shapes


def matrices(p=4):
  z = np.random.default_rng(0).normal(size=(3, 2, 2 * p, p))
  return np.swapaxes(z, -1, -2) @ z


def test_inverse_factor_of_each_matrix():
  a = matrices()
  w = jax.jit(jax.vmap(jax.vmap(inverse_cholesky)))(a.astype(np.float32))
  for i in np.ndindex(3, 2):
    np.testing.assert_allclose(w[i], np.linalg.inv(np.linalg.cholesky(a[i])), rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_differences():
  (a, *_), weights = matrices()[0], np.random.default_rng(1).normal(size=(4, 4))

  def weighted(a):  # as a function of any matrix: of its symmetric part
    return np.sum(weights * np.linalg.inv(np.linalg.cholesky((a + a.T) / 2)))

  gradient = jax.jit(jax.grad(lambda a: jnp.sum(weights.astype(np.float32) * inverse_cholesky(a))))
  expected = differences(weighted, a)
  np.testing.assert_allclose(gradient(a.astype(np.float32)), expected, rtol=1e-3, atol=1e-6)


def test_matrix_that_is_not_positive_definite_gives_nan():
  assert np.isnan(jax.jit(inverse_cholesky)(-np.eye(3, dtype=np.float32))).any()


@pytest.mark.parametrize(
  "loss",
  [lambda z_BP: coding_rate(z_BP, eps=0.5), lambda z_BP: jnp.sum(whiten(z_BP, eps=0.1) ** 4)],
  ids=["coding_rate", "whiten"],
)
def test_lapack_is_given_single_matrices(loss):
  """Of a batch its threads may wait for each other for ever."""
  z = np.random.default_rng(0).normal(size=(3, 2, 16, 8)).astype(np.float32)
  total = lambda z: jnp.sum(jax.vmap(jax.vmap(loss))(z))  # noqa: E731
  for function in (jax.grad(total), jax.vmap(jax.vmap(jax.grad(loss)))):
    shapes = lapack_shapes(jax.jit(function).lower(z).compile().as_text())
    assert len(shapes) >= 2
    assert all(len(s) <= 2 for s in shapes)
