"""The order of training: a pure function of (seed, step), and as random as a true shuffle."""

import contextlib
import itertools

import grain
import numpy as np
import pytest

from ssrl_jax.data import batches as module
from ssrl_jax.data.pipeline import epochs_and_ids, train_batches
from ssrl_jax.data.sampling import Sampling


class Numbers:
  """Picture i is grey level i; some cannot be read."""

  num_classes, class_names = None, ()

  def __init__(self, n, damaged=()):
    self._n, self._damaged = n, damaged

  def __len__(self):
    return self._n

  def __getitem__(self, i):
    image = b"" if i in self._damaged else np.full((2, 2, 3), i, np.uint8)
    return {"image": image, "label": -1}

  def __repr__(self):
    return f"Numbers({self._n})"


def uneven(n, np_rng):
  weights = np_rng.random(n) ** 3
  return Sampling(weights / weights.sum(), np_rng.integers(0, 3, n))


def streams(source, steps, *, processes=1, **options):
  """{"id", "image", "substituted"} of the global batches, put together from all processes."""
  parts = []
  for p in range(processes):
    batches = train_batches(source, canvas=2, process_index=p, process_count=processes, **options)
    with contextlib.closing(batches):
      parts.append([next(batches) for _ in range(steps)])
  return {
    key: np.concatenate([np.stack([b[key] for b in part]) for part in parts], axis=1)
    for key in ("id", "image", "substituted")
  }


@pytest.mark.parametrize("trial", range(8))
def test_what_a_step_sees_is_a_function_of_seed_and_step_alone(trial, monkeypatch):
  np_rng = np.random.default_rng(trial)
  n, batch_size, seed = int(np_rng.integers(16, 60)), int(np_rng.choice([4, 8, 16])), trial
  source = Numbers(n, damaged=np_rng.integers(0, n, 2).tolist())
  sampling = uneven(n, np_rng) if trial % 2 else None
  order = epochs_and_ids(source, seed, batch_size, sampling)
  whole = n // batch_size
  start = int(np_rng.integers(0, 3 * whole))  # then over at least one end of an epoch
  steps = whole + 1
  want = [[order[k][1] for k in range(s * batch_size, (s + 1) * batch_size)]
          for s in range(start, start + steps)]  # fmt: skip

  shared = {"seed": seed, "batch_size": batch_size, "start_step": start, "sampling": sampling}
  alone = streams(source, steps, **shared)
  np.testing.assert_array_equal(alone["id"], want)
  options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=int(np_rng.integers(3, 9)))
  monkeypatch.setattr(module.grain, "ReadOptions", lambda **kwargs: options)
  for processes, threads in ((2, 1), (4, 3)):
    again = streams(source, steps, processes=processes, threads=threads, **shared)
    for key, values in alone.items():
      np.testing.assert_array_equal(again[key], values)


def test_an_epoch_that_batches_fill_has_each_example_exactly_once():
  order = epochs_and_ids(Numbers(48), 3, 8)
  epochs = np.array([order[k] for k in range(5 * 48)]).reshape(5, 48, 2)
  assert (epochs[:, :, 0] == np.arange(5).reshape(5, 1)).all()
  assert (np.sort(epochs[:, :, 1]) == np.arange(48).reshape(1, 48)).all()
  assert len({tuple(e) for e in epochs[:, :, 1].tolist()}) == 5


N, SHARD, DRAWS = 96, 12, 50


def statistics(order, before):
  """Figures of a shuffle of N that a poor one gets wrong; `before` is the epoch's before it."""
  centred, previous = order - order.mean(), before - before.mean()
  table, _, _ = np.histogram2d(np.arange(N), order, bins=6)
  return [
    np.mean(centred[1:] * centred[:-1]) / centred.var(),  # serial correlation
    np.abs(np.diff(order)).mean(),  # how far apart neighbours lie
    np.mean(np.diff(order) > 0),  # runs upwards
    np.sum((table - N / 36) ** 2) / (N / 36),  # chi-squared of places against positions
    np.mean(centred * np.arange(-N // 2, N // 2)) / centred.var(),  # a drift
    np.mean(centred * previous) / centred.var(),  # with the epoch before
    np.mean([len(set(batch // SHARD)) for batch in order.reshape(-1, SHARD)]),  # shards a batch
    np.mean(order[:: SHARD] // SHARD),  # the shard of each first place
  ]  # fmt: skip


@pytest.mark.parametrize("sampled", [False, True])
def test_shuffling_is_as_random_as_a_true_shuffle(sampled):
  """Also of a set in shards: the figures of 50 epochs against those of NumPy's permutations."""
  sampling = Sampling(np.full(N, 1 / N), np.zeros(N, np.int8)) if sampled else None
  source, np_rng = Numbers(N), np.random.default_rng(0)
  ours, true = [], []
  for seed in range(DRAWS // 5):
    order = epochs_and_ids(source, seed, SHARD, sampling)
    epochs = np.array([order[k][1] for k in range(6 * N)]).reshape(6, N)
    ours += [statistics(epoch, before) for before, epoch in itertools.pairwise(epochs)]
    true += [statistics(*np_rng.permuted(np.tile(np.arange(N), (2, 1)), axis=1)) for _ in range(20)]
  ours, true = np.array(ours), np.array(true)
  error = np.sqrt(ours.var(0) / len(ours) + true.var(0) / len(true))
  distances = (ours.mean(0) - true.mean(0)) / error
  assert np.abs(distances).max() < 4, distances
  spread = ours.std(0) / true.std(0)
  assert (np.abs(spread - 1) < 0.3).all(), spread


def test_the_figures_tell_a_shuffle_within_a_window_from_a_true_one():
  """What a loader with a buffer of a third of the set does."""
  np_rng = np.random.default_rng(0)
  poor, true = [], []
  for _ in range(DRAWS):
    order = np.argsort(np.arange(N) + np_rng.uniform(0, N / 3, N))
    poor.append(statistics(order, np_rng.permutation(N)))
    true.append(statistics(np_rng.permutation(N), np_rng.permutation(N)))
  poor, true = np.array(poor), np.array(true)
  distances = (poor.mean(0) - true.mean(0)) / np.sqrt((poor.var(0) + true.var(0)) / DRAWS)
  assert (np.abs(distances[[0, 1, 3, 4, 6]]) > 10).all()
