import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses.classification import (
  cross_entropy,
  generalised_cross_entropy,
  symmetric_cross_entropy,
)
from tests.numeric import differences, softmax64

LOGITS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 2
LABEL = np.array([0, 3, 1, 1, 2, 0])
SYMMETRIC = {"alpha": 0.3, "beta": 0.8, "log_zero": -4.0}


def ce64(logits, label, smoothing=0.0):
  p, k = softmax64(logits), len(logits)
  target = np.full(k, smoothing / k)
  target[label] += 1 - smoothing
  return -sum(t * np.log(x) for t, x in zip(target, p))


def gce64(logits, label, q):
  return (1 - softmax64(logits)[label] ** q) / q


def sce64(logits, label, alpha, beta, log_zero):
  p = softmax64(logits)
  reverse = -sum(x * (0.0 if k == label else log_zero) for k, x in enumerate(p))
  return alpha * ce64(logits, label) + beta * reverse


CASES = [
  (cross_entropy, ce64, {}),
  (cross_entropy, ce64, {"smoothing": 0.2}),
  (generalised_cross_entropy, gce64, {"q": 0.7}),
  (symmetric_cross_entropy, sce64, SYMMETRIC),
]


@pytest.mark.parametrize(("ours", "reference", "options"), CASES)
def test_loss_is_its_equation_in_float64(ours, reference, options):
  expected = [reference(x, y, **options) for x, y in zip(LOGITS, LABEL)]
  np.testing.assert_allclose(ours(LOGITS, LABEL, **options), expected, rtol=1e-5)


@pytest.mark.parametrize(("ours", "reference", "options"), CASES)
def test_gradient_is_that_of_the_equation(ours, reference, options):
  gradient = jax.grad(lambda x: jnp.sum(ours(x, LABEL, **options)))(LOGITS)
  expected = differences(
    lambda x: sum(reference(row, y, **options) for row, y in zip(x, LABEL)), LOGITS
  )
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_generalised_is_cross_entropy_as_q_goes_to_zero_and_half_mae_at_one():
  ce = np.array([ce64(x, y) for x, y in zip(LOGITS, LABEL)])
  np.testing.assert_allclose(generalised_cross_entropy(LOGITS, LABEL, q=1e-6), ce, rtol=1e-4)
  mae = [np.abs(softmax64(x) - np.eye(4)[y]).sum() for x, y in zip(LOGITS, LABEL)]
  ours = generalised_cross_entropy(LOGITS, LABEL, q=1.0)
  np.testing.assert_allclose(2 * ours, mae, rtol=1e-5)


def test_symmetric_without_its_second_term_is_cross_entropy():
  ours = symmetric_cross_entropy(LOGITS, LABEL, alpha=1.0, beta=0.0, log_zero=-4.0)
  np.testing.assert_allclose(ours, cross_entropy(LOGITS, LABEL), rtol=1e-6)


@pytest.mark.parametrize(("ours", "reference", "options"), CASES)
def test_large_logits_are_finite_with_their_gradient(ours, reference, options):
  logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], np.float32)
  value, gradient = jax.value_and_grad(lambda x: jnp.sum(ours(x, np.array([0, 0]), **options)))(
    logits
  )
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


def test_tolerant_losses_are_bounded_where_cross_entropy_is_not():
  wrong = np.array([[0.0, 50.0]], np.float32), np.array([0])
  assert cross_entropy(*wrong)[0] == pytest.approx(50)
  assert generalised_cross_entropy(*wrong, q=0.7)[0] == pytest.approx(1 / 0.7)
  assert symmetric_cross_entropy(*wrong, alpha=0, beta=1, log_zero=-4)[0] == pytest.approx(4)


@pytest.mark.parametrize("q", [0.0, 1.5])
def test_q_out_of_range_is_an_error(q):
  with pytest.raises(ValueError, match=f"q is {q}; it must be above 0 and at most 1"):
    generalised_cross_entropy(LOGITS, LABEL, q=q)


@pytest.mark.parametrize("change", [{"alpha": -1.0}, {"alpha": 0.0, "beta": 0.0}, {"log_zero": 0}])
def test_weights_out_of_range_are_an_error(change):
  with pytest.raises(ValueError, match="expected alpha and beta of 0 or more, not both 0"):
    symmetric_cross_entropy(LOGITS, LABEL, **(SYMMETRIC | change))
