import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.evaluate import linear_sgd
from ssrl_jax.method import Features, apply_encoder
from tests.evaluate.tiny import SIZE, Tints, evaluation, little

QUICK = {"learning_rates": (0.03, 1.0, 10.0), "epochs": 8, "batch_size": 16}
FIT = {"epochs": 2, "batch_size": 16, "momentum": 0.9, "weight_decay": 0.01, "smallest_crop": 0.5,
       "seed": 0}  # fmt: skip


class Pool(nn.Module):
  """The mean colour: no crop or flip of a picture of one colour changes it."""

  @nn.compact
  def __call__(self, images, train):
    return Features(pooled=jnp.mean(images, axis=(1, 2)), maps={})


@pytest.fixture(scope="module")
def judged():
  return evaluation()


@pytest.fixture(scope="module")
def figures(judged):
  return linear_sgd.run(judged, **QUICK)


def test_probe_learns(figures):
  assert 60 < figures["linear_sgd/accuracy"] <= 100
  assert figures["linear_sgd/unlabelled"] == 0
  assert figures["linear_sgd/learning_rate"] in QUICK["learning_rates"]


def test_encoder_is_frozen_to_the_byte(judged, figures):
  _, untouched = little()
  for ours, theirs in zip(jax.tree.leaves(judged.weights), jax.tree.leaves(untouched)):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_choice_does_not_see_the_test_pictures(judged, figures):
  rows = judged.features("test")
  wrong = dataclasses.replace(judged, cache=dict(judged.cache))
  wrong.cache["test", "pooled"] = rows._replace(labels=(rows.labels + 1) % 4)
  found = linear_sgd.run(wrong, **QUICK)
  assert found["linear_sgd/accuracy"] < 40
  for name in ("learning_rate", "held_out_accuracy"):
    assert found[f"linear_sgd/{name}"] == figures[f"linear_sgd/{name}"]


def test_held_out_pictures_are_not_trained_on(judged, monkeypatch):
  real, seen = linear_sgd.fit_heads, []
  monkeypatch.setattr(linear_sgd, "fit_heads", lambda e, ids, *a, **k: seen.append(ids) or real(
    e, ids, *a, **k))  # fmt: skip
  linear_sgd.run(judged, **QUICK | {"epochs": 1, "held_out": 0.25})
  assert len(seen[0]) == 48
  linear_sgd.run(judged, **QUICK | {"epochs": 1, "learning_rates": (1.0,)})
  assert len(seen[1]) == 64


def test_heads_of_a_grid_are_those_trained_alone(judged):
  ids = np.arange(64)
  together = linear_sgd.fit_heads(judged, ids, 6, learning_rates=(0.1, 1.0), **FIT)
  for i, rate in enumerate((0.1, 1.0)):
    alone = linear_sgd.fit_heads(judged, ids, 6, learning_rates=(rate,), **FIT)
    for name, value in alone.items():
      np.testing.assert_allclose(together[name][i], value[0], rtol=1e-4, atol=1e-6)


def test_heads_agree_on_1_and_8_devices(judged):
  one, eight = (
    linear_sgd.fit_heads(evaluation(num_devices=n), np.arange(64), 6, learning_rates=(1.0,), **FIT)
    for n in (1, 8)
  )
  for name, value in one.items():
    np.testing.assert_allclose(eight[name], value, rtol=1e-4, atol=1e-6)


def test_one_full_batch_is_sgd_with_cosine_in_float64():
  train = Tints(16, spread=0)
  ours = evaluation(train, encoder=(functools.partial(apply_encoder, Pool()), {"batch_stats": {}}))
  x = ours.features("train").features.astype(np.float64)
  assert x.shape == (16, 3)
  rate, decay, epochs = 0.5, 0.05, 4
  options = FIT | {"epochs": epochs, "weight_decay": decay, "batch_size": 16}
  head = linear_sgd.fit_heads(ours, np.arange(16), 3, learning_rates=(rate,), **options)
  w, b, m_w, m_b = np.zeros((3, 4)), np.zeros((1, 4)), 0, 0
  for t in range(epochs):
    p = np.exp(x @ w + b)
    error = p / p.sum(1, keepdims=True) - np.eye(4)[train.labels]
    m_w = 0.9 * m_w + x.T @ error / 16 + decay * w
    m_b = 0.9 * m_b + error.mean(0, keepdims=True)
    lr = rate * 16 / 256 * (1 + np.cos(np.pi * t / epochs)) / 2
    w, b = w - lr * m_w, b - lr * m_b
  np.testing.assert_allclose(head["kernel"][0], w, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(head["bias"][0], b, rtol=1e-3, atol=1e-5)


def test_batch_norm_uses_its_running_moments():
  apply, weights = little()
  trains = []

  def spy(weights, images, train, key):
    trains.append(train)
    return apply(weights, images, train, key)

  linear_sgd.run(evaluation(encoder=(spy, weights)), **QUICK | {"epochs": 1})
  assert trains
  assert not any(trains)


def test_pictures_without_label_are_left_out():
  unknown = evaluation(Tints(64, unlabelled=(3, 9)), Tints(40, seed=1, unlabelled=(0,)))
  found = linear_sgd.run(unknown, **QUICK | {"epochs": 1})
  assert found["linear_sgd/unlabelled"] == 3


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"learning_rates": ()}, r"learning_rates is \(\)"),
    ({"epochs": 0}, "epochs is 0"),
    ({"momentum": 1.0}, "momentum 1.0"),
    ({"smallest_crop": 0.0}, r"area is \(0.0, 1.0\)"),
    ({"batch_size": 0}, "batch_size 0 is not divisible by 1 devices; nearest: 1"),
  ],
)
def test_options_out_of_range_are_errors(judged, options, match):
  with pytest.raises(ValueError, match=match):
    linear_sgd.run(judged, **QUICK | options)


def test_size_of_the_pictures_is_that_of_the_evaluation(judged):
  assert judged.features("train").features.shape == (64, 6)
  assert judged.size == SIZE
