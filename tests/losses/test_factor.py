import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses.correlation import whiten
from ssrl_jax.losses.distribution import coding_rate
from ssrl_jax.losses.factor import inverse_cholesky, nuclear_norm
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
  [
    lambda z_BP: coding_rate(z_BP, eps=0.5),
    lambda z_BP: jnp.sum(whiten(z_BP, eps=0.1) ** 4),
    lambda z_BP: nuclear_norm(z_BP) ** 2,
  ],
  ids=["coding_rate", "whiten", "nuclear_norm"],
)
def test_lapack_is_given_single_matrices(loss):
  """Of a batch its threads may wait for each other for ever."""
  z = np.random.default_rng(0).normal(size=(3, 2, 16, 8)).astype(np.float32)
  total = lambda z: jnp.sum(jax.vmap(jax.vmap(loss))(z))  # noqa: E731
  for function in (jax.grad(total), jax.vmap(jax.vmap(jax.grad(loss)))):
    shapes = lapack_shapes(jax.jit(function).lower(z).compile().as_text())
    assert len(shapes) >= 2
    assert all(len(s) <= 2 for s in shapes)


def nuclear_norm64(x):
  """By the eigenvalues of the smaller product."""
  gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
  return sum(np.sqrt(max(e, 0)) for e in np.linalg.eigvalsh(gram))


normal = np.random.default_rng(0).normal
integers = lambda *shape: np.random.default_rng(0).integers(-2, 3, shape)  # noqa: E731
MATRICES = {
  "tall": normal(size=(9, 5)),
  "wide": normal(size=(4, 7)),
  "one row": normal(size=(1, 4)),
  "values that coincide": np.eye(4, 6),
  "the same, tall": np.tile(np.eye(3), (2, 1)),
  "rank 2": integers(6, 2) @ integers(2, 5),
  "collapsed": np.ones((6, 4)),
  "collapsed and wide": np.ones((3, 8)),
  "zeros": np.zeros((4, 3)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_nuclear_norm_and_its_gradient_are_those_of_singular_values_and_differences(name):
  x = MATRICES[name].astype(np.float32)
  value_and_gradient = jax.jit(jax.value_and_grad(nuclear_norm))
  value, gradient = value_and_gradient(x)
  by_svd = lambda x: np.linalg.svd(x, compute_uv=False).sum()  # noqa: E731
  np.testing.assert_allclose(value, nuclear_norm64(x.astype(np.float64)), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(gradient, differences(by_svd, x), atol=1e-5)
  for scale in (1e-6, 1e6):  # a norm: its gradient knows no scale
    np.testing.assert_allclose(value_and_gradient(np.float32(scale) * x)[1], gradient, atol=1e-5)


def test_nuclear_norm_is_largest_for_orthogonal_rows():
  rows = np.random.default_rng(1).normal(size=(4, 6))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  assert 2 < nuclear_norm(rows.astype(np.float32)) < nuclear_norm(np.eye(4, 6)) == 4
  np.testing.assert_allclose(nuclear_norm(np.ones((4, 6)) / np.sqrt(6)), 2, rtol=1e-6)


def test_gradients_of_each_matrix_of_a_batch_are_its_own():
  x = normal(size=(3, 2, 5)).astype(np.float32)
  together = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(nuclear_norm)(x))))(x)
  np.testing.assert_allclose(together, [jax.grad(nuclear_norm)(one) for one in x], atol=1e-6)
