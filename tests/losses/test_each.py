import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses.correlation import whiten
from ssrl_jax.losses.distribution import coding_rate
from ssrl_jax.losses.each import each
from tests.numeric import lapack_shapes


def compiled(function, *arguments) -> str:
  return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
  "loss",
  [lambda z_BP: coding_rate(z_BP, eps=0.5), lambda z_BP: jnp.sum(whiten(z_BP, eps=0.1) ** 4)],
  ids=["coding_rate", "whiten"],
)
def test_lapack_is_given_single_matrices(loss):
  """Of a batch its threads may wait for each other for ever (ssrl_jax/losses/each.py)."""
  z = np.random.default_rng(0).normal(size=(6, 16, 8)).astype(np.float32)
  total = lambda z: jnp.sum(each(loss, z))  # noqa: E731
  shapes = lapack_shapes(compiled(jax.grad(total), z))
  assert len(shapes) >= 2
  assert all(len(s) <= 2 for s in shapes)
  assert any(
    len(s) == 3 for s in lapack_shapes(compiled(jax.vmap(jax.grad(loss)), z))
  )  # what is avoided
  values, gradient = jax.jit(lambda z: each(loss, z))(z), jax.jit(jax.grad(total))(z)
  for i in range(6):
    value, d = jax.jit(jax.value_and_grad(loss))(z[i])
    np.testing.assert_allclose(values[i], value, rtol=1e-5)
    np.testing.assert_allclose(gradient[i], d, rtol=1e-4, atol=1e-6)
