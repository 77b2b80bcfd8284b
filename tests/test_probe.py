import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssrl_jax import probe as probe_lib
from ssrl_jax.probe import SMOOTHING, init_probe

update_probe = jax.jit(probe_lib.update_probe)


def separable(b=50, seed=0):
  """Three classes of 4-dimensional features, far from the origin and of unequal scales."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 3, b).astype(np.int32)
  features = 3 * np.eye(4)[label] + 0.3 * rng.normal(size=(b, 4))
  return (100 + features * [1, 10, 0.1, 1]).astype(np.float32), label


def train(batches, learning_rate=0.05):
  probe = init_probe(4, 3, learning_rate=learning_rate)
  history = []
  for features, label in batches:
    probe, metrics = update_probe(probe, features, label, learning_rate=learning_rate)
    history.append({k: float(v) for k, v in metrics.items()})
  return probe, history


def test_probe_learns_a_separable_toy():
  _, history = train([separable(seed=i) for i in range(60)])
  np.testing.assert_allclose(history[0]["probe/loss"], np.log(3), rtol=1e-5)  # zero weights
  assert history[-1]["probe/loss"] < 0.1
  assert history[-1]["probe/accuracy"] > 95


def test_probe_does_not_learn_labels_that_are_noise():
  rng = np.random.default_rng(0)
  noise = [(separable(seed=i)[0], rng.integers(0, 3, 50).astype(np.int32)) for i in range(60)]
  assert train(noise)[1][-1]["probe/accuracy"] < 45


def test_first_update_is_adam_on_standardised_features():
  features, label = separable()
  probe, _ = train([(features, label)])
  h = features.astype(np.float64)
  h = (h - h.mean(axis=0)) / (h.std(axis=0) + 1e-6)
  error = np.full((50, 3), 1 / 3) - np.eye(3)[label]  # softmax of zeros minus the label
  for name, gradient in (("kernel", h.T @ error / 50), ("bias", error.mean(axis=0)[None])):
    # Adam's first step is the learning rate times the sign, but for its epsilon.
    expected = -0.05 * gradient / (np.abs(gradient) + 1e-8)
    np.testing.assert_allclose(probe.params[name], expected, rtol=1e-3, atol=1e-5)


def test_accuracy_is_that_of_recent_labelled_examples_before_each_update():
  batches = [separable(seed=i) for i in range(5)]
  _, history = train(batches)
  probe, correct, count = init_probe(4, 3, learning_rate=0.05), 0.0, 0.0
  for (features, label), metrics in zip(batches, history):
    h = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)
    guess = np.argmax(h @ np.asarray(probe.params["kernel"]) + probe.params["bias"], axis=1)
    correct, count = SMOOTHING * correct + np.sum(guess == label), SMOOTHING * count + 50
    np.testing.assert_allclose(metrics["probe/accuracy"], 100 * correct / count, rtol=1e-5)
    probe, _ = update_probe(probe, features, label, learning_rate=0.05)


def test_unknown_labels_count_for_nothing():
  features, label = separable()
  hidden = np.where(np.arange(50) % 2, label, -1).astype(np.int32)
  probe, metrics = update_probe(init_probe(4, 3, learning_rate=0.05), features, hidden,
                                learning_rate=0.05)  # fmt: skip
  known = features[1::2].astype(np.float64)
  h = (known - features.mean(axis=0)) / features.std(axis=0)  # standardised by all of them
  gradient = h.T @ (1 / 3 - np.eye(3)[label[1::2]]) / 25
  np.testing.assert_allclose(probe.params["kernel"], -0.05 * np.sign(gradient), atol=1e-4)
  np.testing.assert_allclose(metrics["probe/loss"], np.log(3), rtol=1e-5)
  np.testing.assert_allclose(metrics["probe/accuracy"], 100 * np.mean(label[1::2] == 0), rtol=1e-5)


def test_batches_without_labels_leave_the_accuracy_alone():
  known = [separable(seed=i) for i in range(30)]
  probe, history = train(known)
  features, label = separable(seed=99)
  for _ in range(5):
    probe, metrics = update_probe(probe, features, np.full_like(label, -1), learning_rate=0.05)
  np.testing.assert_allclose(metrics["probe/accuracy"], history[-1]["probe/accuracy"], rtol=1e-5)
  assert metrics["probe/loss"] == 0


def test_without_any_label_accuracy_is_zero_and_finite():
  features, label = separable()
  probe, history = train([(features, np.full_like(label, -1))])
  assert history[0] == {"probe/loss": 0.0, "probe/accuracy": 0.0}
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, jnp.zeros_like(x)), probe.params)


@pytest.mark.parametrize("features", [np.zeros((8, 4)), np.full((8, 4), 1e4)])
def test_constant_features_stay_finite(features):
  label = np.arange(8, dtype=np.int32) % 3
  probe, history = train([(features.astype(np.float32), label)] * 3)
  assert np.isfinite(history[-1]["probe/loss"])
  assert np.isfinite(optax.tree.norm(probe.params))


def test_probe_sends_no_gradient_to_the_features():
  features, label = separable()
  probe = init_probe(4, 3, learning_rate=0.05)._replace(
    params={"kernel": jnp.ones((4, 3)), "bias": jnp.zeros((1, 3))}
  )

  def loss(features):
    return probe_lib.update_probe(probe, features, label, learning_rate=0.05)[1]["probe/loss"]

  np.testing.assert_array_equal(jax.grad(loss)(features), np.zeros_like(features))
