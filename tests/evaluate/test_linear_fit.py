import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.evaluate import linear, linear_fit
from ssrl_jax.parallel import make_mesh
from tests.evaluate.test_linear import clusters

RATES, DECAYS = (0.003, 0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3, 1e-2)
GRID = list(itertools.product(RATES, DECAYS))


def held_apart(**options):
  (x, y), (held, label) = clusters(1000, **options), clusters(1000, seed=1, **options)
  return *linear.standardise(x, held), y, label


def test_grid_is_the_same_as_one_by_one():
  x, y = clusters(300)
  x, _ = linear.standardise(x, x)
  pairs = list(itertools.product((0.003, 0.3), (0.0, 1e-2)))
  options = {"num_classes": 5, "epochs": 3, "batch_size": 64, "seed": 1}
  together = linear_fit.unstack(linear_fit.fit_heads(x, y, pairs, **options))
  for pair, head in zip(pairs, together):
    (alone,) = linear_fit.unstack(linear_fit.fit_heads(x, y, [pair], **options))
    np.testing.assert_allclose(head["kernel"], alone["kernel"], atol=1e-5)
    np.testing.assert_allclose(head["bias"], alone["bias"], atol=1e-5)
  assert np.abs(together[2]["kernel"] - together[3]["kernel"]).max() > 1e-4  # decay acts


def test_devices_share_the_grid_and_change_nothing():
  x, y = clusters(300)
  x, _ = linear.standardise(x, x)
  pairs = list(itertools.product((0.003, 0.1, 0.3), (0.0, 1e-4, 1e-2)))  # 9 pairs for 8 devices
  options = {"num_classes": 5, "epochs": 3, "batch_size": 64, "seed": 1}
  alone = linear_fit.fit_heads(x, y, pairs, **options)
  shared = linear_fit.fit_heads(x, y, pairs, mesh=make_mesh(8), **options)
  assert shared["kernel"].shape == alone["kernel"].shape
  for name in alone:
    np.testing.assert_allclose(shared[name], alone[name], atol=1e-5)


def test_fit_of_one_full_batch_is_nesterov_with_cosine_in_float64():
  x, y = clusters(40, dim=3, num_classes=3)
  x, _ = linear.standardise(x, x)
  lr, wd, epochs = 0.1, 0.05, 4
  (head,) = linear_fit.unstack(
    linear_fit.fit_heads(x, y, [(lr, wd)], num_classes=3, epochs=epochs, batch_size=40, seed=0)
  )
  x, w, b = x.astype(np.float64), np.zeros((3, 3)), np.zeros((1, 3))
  m_w, m_b = np.zeros((3, 3)), np.zeros((1, 3))
  for t in range(epochs):
    p = np.exp(x @ w + b)
    error = p / p.sum(1, keepdims=True) - np.eye(3)[y]
    g_w, g_b = x.T @ error / 40 + wd * w, error.mean(0, keepdims=True)
    m_w, m_b = 0.9 * m_w + g_w, 0.9 * m_b + g_b
    rate = lr * (1 + np.cos(np.pi * t / epochs)) / 2
    w, b = w - rate * (g_w + 0.9 * m_w), b - rate * (g_b + 0.9 * m_b)
  np.testing.assert_allclose(head["kernel"], w, atol=1e-5)
  np.testing.assert_allclose(head["bias"], b, atol=1e-5)


def test_ranking_prefers_accuracy_then_loss_and_no_head_that_diverged():
  x, y = np.array([[1.0], [-1.0]], np.float32), np.array([0, 1])
  kernels = jnp.array([[[jnp.nan, 0]], [[-9.0, 0]], [[0.1, 0]], [[5.0, 0]], [[2.0, 0]]])
  heads = {"kernel": kernels, "bias": jnp.zeros((5, 1, 2))}
  assert [i for *_, i in linear_fit.ranking(heads, x, y)] == [3, 4, 2, 1]
  assert linear_fit.ranking(heads, x, y)[0][0] == 100


def test_ranking_of_diverged_heads_is_an_error():
  heads = {"kernel": jnp.full((2, 1, 2), jnp.nan), "bias": jnp.zeros((2, 1, 2))}
  with pytest.raises(FloatingPointError, match="add lower ones"):
    linear_fit.ranking(heads, np.ones((2, 1), np.float32), np.array([0, 1]))


def test_legs_go_on_as_one_training_and_their_mean_is_that_of_its_heads():
  x, y = clusters(150)
  x, _ = linear.standardise(x, x)
  pairs, epochs, batch = [(0.3, 1e-2), (0.03, 0.0)], 2, 50
  options = {"num_classes": 5, "epochs": epochs, "batch_size": batch, "seed": 3}
  keys = jax.random.split(jax.random.key(3), epochs)
  rows = np.concatenate([jax.random.permutation(key, len(y)).reshape(-1, batch) for key in keys])
  rates = np.asarray(pairs, np.float32).T
  state, heads = linear_fit._start(linear_fit._zeros(2, x.shape[1], 5), *rates), []
  for row_1B in rows[:, None]:
    state, mean = linear_fit._leg(state, *rates, x, y, row_1B, total=len(rows))
    heads.append(mean)  # of one step: the head itself
  whole = linear_fit.fit_heads(x, y, pairs, **options)
  start = linear_fit._start(linear_fit._zeros(2, x.shape[1], 5), *rates)
  _, mean = linear_fit._leg(start, *rates, x, y, rows, total=len(rows))
  for name in whole:
    np.testing.assert_allclose(heads[-1][name], whole[name], atol=1e-6)
    np.testing.assert_allclose(mean[name], np.mean([h[name] for h in heads], axis=0), atol=1e-6)


@pytest.mark.parametrize(("count", "legs"), [(20, [20, 5, 2]), (50, [50, 13, 4]), (2, [2, 2, 2])])
def test_the_better_quarter_goes_on(monkeypatch, count, legs):
  x, held, y, label = held_apart()
  seen, leg = [], linear_fit._leg

  def record(state, *arguments, total):
    seen.append((len(state[0]["kernel"]), len(arguments[-1])))
    after, means = leg(state, *arguments, total=total)
    # Only the last setting knows something, and only by its mean; afterwards it comes first.
    best = len(means["bias"]) - 1 if len(seen) == 1 else 0
    return after, jax.tree.map(lambda x: jnp.zeros_like(x).at[best].set(x[best]), means)

  monkeypatch.setattr(linear_fit, "_leg", record)
  pairs = [(0.3 * 0.9**i, 0.0) for i in range(count)]
  options = {"num_classes": 5, "epochs": 10, "batch_size": 60, "seed": 0}
  best, accuracy = linear_fit.race(x, y, held, label, pairs, **options)
  assert [n for n, _ in seen] == legs
  assert [t for _, t in seen] == [3, 7, 30]  # of 160 steps: 1/64, 1/16 and 1/4, rounded up
  assert best == count - 1
  assert 30 < accuracy <= 100  # chance is 20


def test_winner_is_nearly_as_good_as_that_of_a_whole_search():
  for seed in range(3):
    x, held, y, label = held_apart()
    options = {"num_classes": 5, "epochs": 20, "batch_size": 64, "seed": seed}
    whole = linear_fit.fit_heads(x, y, GRID, **options)
    accuracy = {i: a for a, _, i in linear_fit.ranking(whole, held, label)}
    best, _ = linear_fit.race(x, y, held, label, GRID, **options)
    assert accuracy[best] > max(accuracy.values()) - 2 > min(accuracy.values()) + 5


def test_settings_that_diverge_drop_out():
  x, held, y, label = held_apart()
  pairs = [(1e30, 1.0), (1e30, 0.5), (0.1, 0.0), (1e30, 0.9)]
  options = {"num_classes": 5, "epochs": 5, "batch_size": 64, "seed": 0}
  assert linear_fit.race(x, y, held, label, pairs, **options)[0] == 2
  with pytest.raises(FloatingPointError, match="add lower ones"):
    linear_fit.race(x, y, held, label, pairs[:2], **options)


def test_devices_share_a_race_and_a_single_step_is_one():
  x, held, y, label = held_apart()
  options = {"num_classes": 5, "epochs": 4, "batch_size": 64, "seed": 0}
  alone = linear_fit.race(x, y, held, label, GRID, **options)
  assert linear_fit.race(x, y, held, label, GRID, mesh=make_mesh(8), **options) == alone
  one = options | {"epochs": 1, "batch_size": len(y)}
  assert linear_fit.race(x, y, held, label, GRID, **one)[1] > 20
