import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from ssrl_jax import parallel
from ssrl_jax.evaluate import linear
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, raw_pixels
from ssrl_jax.method import Features

UNUSED_VIEW = {"canvas": 1, "size": 1, "crop": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
QUICK = {"learning_rates": (0.003, 0.03, 0.3), "weight_decays": (0.0, 1e-2), "epochs": 15,
         "batch_size": 64}  # fmt: skip


def judge(train, test, num_classes):
  """An Evaluation of (features, labels) that are there already."""
  sets = {
    split: FeatureSet(np.asarray(x, np.float32), np.asarray(y, np.int32), np.arange(len(y)))
    for split, (x, y) in {"train": train, "test": test}.items()
  }
  return Evaluation(
    raw_pixels, (), train=None, test=None, num_classes=num_classes, mesh=parallel.make_mesh(1),
    batch_size=1, cache={(k, "pooled"): v for k, v in sets.items()}, **UNUSED_VIEW,
  )  # fmt: skip


def clusters(n, *, num_classes=5, dim=16, spread=4.0, seed=0):
  """Classes of a common, skewed covariance around centres; scales and offset of real features."""
  rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
  centres = fixed.normal(size=(num_classes, dim))
  skew = fixed.normal(size=(dim, dim)) / np.sqrt(dim)
  scale, offset = 10 ** fixed.uniform(-2, 2, (1, dim)), 5 * fixed.normal(size=(1, dim))
  label = rng.integers(0, num_classes, n)
  x = centres[label] + spread * rng.normal(size=(n, dim)) @ skew
  return (x * scale + offset).astype(np.float32), label


@pytest.fixture(scope="module")
def noisy():
  train, test = clusters(2000), clusters(2000, seed=1)
  return train, test, linear.run(judge(train, test, 5), **QUICK)


def test_accuracy_is_near_that_of_logistic_regression(noisy):
  (x, y), (test_x, test_y), figures = noisy
  mean, std = x.mean(0, keepdims=True), x.std(0, keepdims=True)
  reference = LogisticRegression(max_iter=1000).fit((x - mean) / std, y)
  expected = 100 * reference.score((test_x - mean) / std, test_y)
  assert 60 < expected < 95  # so that it can be wrong
  assert figures["linear/accuracy"] == pytest.approx(expected, abs=1.5)
  assert figures["linear/held_out_accuracy"] == pytest.approx(expected, abs=8)


def test_separable_classes_are_separated():
  train, test = clusters(400, spread=0.1), clusters(100, spread=0.1, seed=1)
  figures = linear.run(judge(train, test, 5), **QUICK)
  assert figures["linear/accuracy"] == figures["linear/held_out_accuracy"] == 100


def test_shuffled_labels_give_chance(noisy):
  (x, y), (test_x, test_y), _ = noisy
  np_rng = np.random.default_rng(3)
  shuffled = (x, np_rng.permutation(y)), (test_x, np_rng.permutation(test_y))
  figures = linear.run(judge(*shuffled, 5), **QUICK)
  assert figures["linear/accuracy"] == pytest.approx(20, abs=4.5)  # 5 deviations of 2,000 guesses
  assert figures["linear/held_out_accuracy"] < 35  # 200 pictures, and the best of six


def test_choice_does_not_see_the_test_pictures(noisy):
  train, (test_x, test_y), figures = noisy
  wrong = linear.run(judge(train, (-test_x, (test_y + 1) % 5), 5), **QUICK)
  assert wrong["linear/accuracy"] < figures["linear/accuracy"] - 30
  for name in ("linear/learning_rate", "linear/weight_decay", "linear/held_out_accuracy"):
    assert wrong[name] == figures[name]


def test_rate_at_the_edge_of_the_grid_is_said(caplog):
  train = clusters(200, spread=0.1)
  options = QUICK | {"learning_rates": (1e-6, 1e-5), "weight_decays": (0.0,)}
  linear.run(judge(train, train, 5), **options)
  assert "learning_rates (1e-06, 1e-05) is at its edge: 1e-05" in caplog.text
  assert "weight_decays" not in caplog.text


def test_split_holds_out_the_share_of_each_class():
  label = np.repeat([3, 0, 7], [40, 20, 1])
  kept, held = linear.split_held_out(label, 0.1, seed=0)
  assert sorted([*kept, *held]) == list(range(61))
  assert np.bincount(label[held], minlength=8).tolist() == [2, 0, 0, 4, 0, 0, 0, 0]
  again, other = (linear.split_held_out(label, 0.1, seed=s)[1] for s in (0, 1))
  assert np.array_equal(held, again)
  assert not np.array_equal(held, other)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_split_fraction_out_of_range_is_an_error(fraction):
  with pytest.raises(ValueError, match=f"held_out is {fraction}"):
    linear.split_held_out(np.zeros(9, np.int32), fraction, seed=0)


def test_split_of_single_pictures_is_an_error():
  with pytest.raises(ValueError, match="at least two pictures of one class"):
    linear.split_held_out(np.arange(5), 0.1, seed=0)


def test_standardise_uses_the_training_statistics_and_zeroes_constants():
  train = np.array([[1.0, 7, 1e-3], [3, 7, 3e-3]], np.float32)
  ours, other = linear.standardise(train, np.array([[5.0, 9, 5e-3]], np.float32))
  np.testing.assert_allclose(ours, [[-1, 0, -1], [1, 0, 1]], atol=1e-5)
  np.testing.assert_allclose(other, [[3, 0, 3]], atol=1e-5)


def test_pictures_without_label_are_left_out():
  (x, y), test = clusters(200), clusters(100, seed=1)
  alone = linear.run(judge((x, y), test, 5), **QUICK)
  poisoned = np.concatenate([x, 1e6 * x[:20]]), np.concatenate([y, np.full(20, -1)])
  figures = linear.run(judge(poisoned, test, 5), **QUICK)
  assert figures == alone | {"linear/unlabelled": 20.0}


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"learning_rates": ()}, "learning_rates"),
    ({"learning_rates": (0.0,)}, "learning_rates"),
    ({"weight_decays": (-1.0,)}, "weight_decays"),
    ({"epochs": 0}, "epochs is 0"),
  ],
)
def test_options_out_of_range_are_errors(options, match):
  train = clusters(20)
  with pytest.raises(ValueError, match=match):
    linear.run(judge(train, train, 5), **options)


def two_kinds(train, test, other_train, other_test, num_classes=5):
  """As `judge`, of an encoder that gives "pooled" and "map2"."""

  def apply(weights, images, is_training, key):
    rows = images.reshape(images.shape[0], -1)
    return Features(pooled=rows, maps={2: images}), weights

  judged = dataclasses.replace(judge(train, test, num_classes), apply=apply)
  for split, rows in (("train", other_train), ("test", other_test)):
    pooled = judged.cache[split, "pooled"]
    judged.cache[split, "map2"] = pooled._replace(features=np.asarray(rows, np.float32))
  return judged


@pytest.mark.parametrize("kinds", [("pooled", "map2"), ("map2", "pooled"), ("all",), "all"])
def test_held_out_pictures_choose_the_kind(kinds, caplog):
  (x, y), (test_x, test_y) = clusters(300), clusters(200, seed=1)
  noise = np.random.default_rng(5).normal(size=(500, 7))
  judged = two_kinds((noise[:300], y), (noise[300:], test_y), x, test_x)
  with caplog.at_level("INFO"):
    figures = linear.run(judged, kinds=kinds, **QUICK)
  alone = linear.run(judge((x, y), (test_x, test_y), 5), **QUICK)
  assert figures == alone | {"linear/kind": 1.0}
  assert "chose 'map2'" in caplog.text


def test_unknown_kind_is_an_error_unless_there_is_only_one():
  train = clusters(60)
  judged = two_kinds(train, train, train[0], train[0])
  with pytest.raises(ValueError, match=r"unknown kind of vector 'map8'; .* has: pooled, map2"):
    linear.run(judged, kinds=("map8",), **QUICK)
  with pytest.raises(ValueError, match="kinds is empty"):
    linear.run(judged, kinds=(), **QUICK)
  assert linear.run(judge(train, train, 5), kinds=("map8",), **QUICK)["linear/kind"] == 0


def test_probe_gives_the_logits_that_are_judged(noisy):
  train, (test_x, test_y), figures = noisy
  probe = linear.fit_probe(judge(train, (test_x, test_y), 5), **QUICK)
  assert probe.kind == "pooled"
  right = probe.logits(test_x).argmax(1) == test_y
  assert figures["linear/accuracy"] == pytest.approx(100 * right.mean())
  assert probe.figures["held_out_accuracy"] == figures["linear/held_out_accuracy"]


def test_probe_of_one_setting_holds_nothing_out():
  x, y = clusters(5, num_classes=5)
  probe = linear.fit_probe(
    judge((x, np.arange(5)), (x, y), 5), learning_rates=(0.1,), weight_decays=(0.0,), epochs=3
  )
  assert probe.figures == {"learning_rate": 0.1, "weight_decay": 0.0, "kind": 0.0}


def test_probe_of_some_ids_is_that_of_these_pictures_alone():
  (x, y), ids = clusters(200), np.arange(0, 200, 2)
  some = linear.fit_probe(judge((x, y), (x, y), 5), ids=ids, **QUICK)
  alone = linear.fit_probe(judge((x[ids], y[ids]), (x, y), 5), **QUICK)
  np.testing.assert_array_equal(some.head["kernel"], alone.head["kernel"])


def test_one_setting_that_diverged_is_an_error_and_no_accuracy():
  train, test = clusters(200), clusters(50, seed=1)
  with pytest.raises(FloatingPointError, match="rate 1000 and weight decay 1; lower them"):
    linear.run(judge(train, test, 5), learning_rates=(1000.0,), weight_decays=(1.0,), epochs=50)


def test_a_long_search_is_a_race_and_the_winner_is_trained_in_full(noisy, monkeypatch):
  train, test, figures = noisy
  fits, fit_heads = [], linear.fit_heads

  def record(x, y, pairs, *, epochs, **options):
    fits.append((len(x), len(pairs), epochs))
    return fit_heads(x, y, pairs, epochs=epochs, **options)

  monkeypatch.setattr(linear, "fit_heads", record)
  steps = 15 * (1798 // 64)
  raced = linear.run(judge(train, test, 5), **QUICK, race_above=steps - 1)
  assert fits == [(2000, 1, 15)]
  assert raced["linear/accuracy"] == pytest.approx(figures["linear/accuracy"], abs=3)
  assert linear.run(judge(train, test, 5), **QUICK, race_above=steps) == figures
