import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import contrastive

nt_xent = jax.jit(contrastive.nt_xent)


@jax.jit
def sum_and_gradients(z1, z2, temperature):
  def total(*z):
    return jnp.sum(contrastive.nt_xent(*z, temperature=temperature))

  return jax.value_and_grad(total, argnums=(0, 1))(z1, z2)


def nt_xent64(z1, z2, temperature):
  """SimCLR's equation 1 over the 2B rows of both views, one pair at a time."""
  z = np.concatenate([z1, z2]).astype(np.float64)
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  b = len(z1)

  def one_way(i, j):
    others = [np.exp(z[i] @ z[k] / temperature) for k in range(2 * b) if k != i]
    return -np.log(np.exp(z[i] @ z[j] / temperature) / sum(others))

  return np.array([(one_way(i, i + b) + one_way(i + b, i)) / 2 for i in range(b)])


def differences(f, x, eps=1e-6):
  """Central differences of a scalar function, float64, one element at a time."""
  gradient = np.zeros(x.shape)
  for i in np.ndindex(*x.shape):
    step = np.zeros(x.shape)
    step[i] = eps
    gradient[i] = (f(x + step) - f(x - step)) / (2 * eps)
  return gradient


def pair(b=6, p=4):
  rng = np.random.default_rng(b)
  z1 = rng.normal(size=(b, p))
  return z1.astype(np.float32), (z1 + 0.5 * rng.normal(size=(b, p))).astype(np.float32)


@pytest.mark.parametrize(("b", "p"), [(2, 9), (6, 4)])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_is_equation_1(b, p, temperature):
  z1, z2 = pair(b, p)
  loss = nt_xent(z1, z2, temperature=temperature)
  assert loss.shape == (b,)
  np.testing.assert_allclose(loss, nt_xent64(z1, z2, temperature), rtol=2e-5, atol=2e-6)


def test_nt_xent_by_hand():
  # Two images at right angles, views alike: of the 3 others, one at cosine 1 and two at cosine 0.
  z = np.eye(2, dtype=np.float32)
  np.testing.assert_allclose(nt_xent(z, z, temperature=1.0), np.log(np.e + 2) - 1, rtol=1e-6)
  np.testing.assert_allclose(nt_xent(z, z, temperature=0.5), np.log(np.e**2 + 2) - 2, rtol=1e-5)


def test_nt_xent_limits():
  ones = np.ones((6, 4), np.float32)  # nothing to tell apart: chance among 11 candidates
  np.testing.assert_allclose(nt_xent(ones, ones, temperature=0.1), np.log(11), rtol=1e-6)
  apart = np.eye(6, dtype=np.float32)
  assert np.all(nt_xent(apart, apart, temperature=0.05) < 1e-6)
  z1, z2 = pair(1, 4)  # the only candidate is the right one
  np.testing.assert_allclose(nt_xent(z1, z2, temperature=0.1), [0], atol=1e-6)


def test_nt_xent_follows_the_images_and_not_the_order_of_views_or_the_scale():
  z1, z2 = pair()
  loss = nt_xent(z1, z2, temperature=0.2)
  order = np.array([3, 1, 5, 0, 2, 4])
  np.testing.assert_allclose(nt_xent(z1[order], z2[order], temperature=0.2), loss[order], rtol=1e-5)
  np.testing.assert_allclose(nt_xent(z2, z1, temperature=0.2), loss, rtol=1e-5)
  np.testing.assert_allclose(nt_xent(1e4 * z1, 1e-2 * z2, temperature=0.2), loss, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 0.1])  # 1e-4: logits of +-1e4
@pytest.mark.parametrize("case", ["random", "large", "zero", "identical", "opposite"])
def test_nt_xent_and_its_gradient_stay_finite(case, temperature):
  z1, z2 = pair()
  cases = {
    "random": (z1, z2),
    "large": (1e4 * z1, 1e4 * z2),
    "zero": (0 * z1, 0 * z2),
    "identical": (0 * z1 + 1, 0 * z2 + 1),
    "opposite": (z1, -z1),
  }
  total, gradients = sum_and_gradients(*cases[case], temperature)
  assert np.isfinite(total)
  assert total >= 0
  assert all(np.all(np.isfinite(g)) for g in gradients)


def test_nt_xent_gradient_is_that_of_differences():
  z1, z2 = pair()
  gradients = sum_and_gradients(z1, z2, 0.3)[1]
  z1, z2 = z1.astype(np.float64), z2.astype(np.float64)
  expected1 = differences(lambda z: nt_xent64(z, z2, 0.3).sum(), z1)
  expected2 = differences(lambda z: nt_xent64(z1, z, 0.3).sum(), z2)
  np.testing.assert_allclose(gradients[0], expected1, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(gradients[1], expected2, rtol=1e-4, atol=1e-5)


def test_nt_xent_computes_in_float32():
  z1, z2 = (jnp.asarray(z, jnp.bfloat16) for z in pair())
  loss = nt_xent(z1, z2, temperature=0.1)
  assert loss.dtype == jnp.float32
  exact = nt_xent64(np.asarray(z1, np.float64), np.asarray(z2, np.float64), 0.1)
  np.testing.assert_allclose(loss, exact, rtol=2e-5, atol=2e-6)
