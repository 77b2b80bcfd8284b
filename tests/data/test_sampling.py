"""Uneven sampling: what is drawn, counted against the weights; and what is refused."""

import pickle

import jax
import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.data.sampling import (
  COPY_BIT,
  EpochOrder,
  Sampling,
  draw_frames,
  make_sampling,
  position,
)
from ssrl_jax.method import ViewSpec
from ssrl_jax.views import make_views

SIZES = (60, 30, 9, 1)  # of four groups


class Labelled:
  """100 examples without pictures; example i has `labels[i]`."""

  num_classes, class_names = 4, tuple("abcd")

  def __init__(self, labels):
    self._labels = labels

  def __len__(self):
    return len(self._labels)

  def __getitem__(self, i):
    return {"image": b"", "label": int(self._labels[i])}

  def __repr__(self):
    return f"Labelled({len(self)})"


def groups():
  return np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))


def saved(tmp_path, values):
  np.save(tmp_path / "values.npy", values)
  return str(tmp_path / "values.npy")


def counts(order, epoch, n):
  return np.bincount(position(order.epoch(epoch)), minlength=n)


def random_sampling(n, seed=0):
  np_rng = np.random.default_rng(seed)
  weights = np_rng.pareto(1.0, n) * (np_rng.random(n) > 0.1)
  return Sampling(weights / weights.sum(), np_rng.integers(0, 7, n))


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 4099])
def test_every_epoch_draws_the_floor_or_the_ceiling_of_what_is_expected(n):
  sampling = random_sampling(n, seed=n) if n > 2 else Sampling(np.full(n, 1 / n), np.zeros(n, int))
  order, drawn = EpochOrder(sampling, seed=3), np.zeros(n)
  expected = n * sampling.weights
  for epoch in range(50):
    found = counts(order, epoch, n)
    assert found.sum() == n
    assert (np.floor(expected + 1e-9) <= found + 1e-9).all()
    assert (found <= np.ceil(expected - 1e-9)).all()
    of_group = np.bincount(sampling.groups, found)
    expected_of_group = np.bincount(sampling.groups, expected)
    assert (np.abs(of_group - expected_of_group) < 1 + 1e-9).all()
    drawn += found
  # A count is a Bernoulli of the fraction beside the floor: 50 of them, where both are likely.
  fraction = expected - np.floor(expected)
  error = np.abs(drawn / 50 - expected) / np.sqrt(np.maximum(fraction * (1 - fraction), 0.01) / 50)
  assert error[(fraction > 0.1) & (fraction < 0.9)].max(initial=0) < 5


@pytest.mark.parametrize("n", [3, 10, 49, 1000, 65536])
def test_equal_weights_draw_each_example_exactly_once(n):
  order = EpochOrder(Sampling(np.full(n, 1 / n), np.zeros(n, int)), seed=0)
  for epoch in range(3):
    np.testing.assert_array_equal(np.sort(order.epoch(epoch)), np.arange(n))


def test_order_is_a_function_of_seed_and_epoch_and_shuffled():
  order, n = EpochOrder(random_sampling(1000), seed=1), 1000
  first = order.epoch(5)
  np.testing.assert_array_equal(EpochOrder(random_sampling(1000), seed=1).epoch(5), first)
  for other in (order.epoch(6), EpochOrder(random_sampling(1000), seed=2).epoch(5)):
    assert (other != first).mean() > 0.5
  assert abs(np.corrcoef(np.arange(n), position(first))[0, 1]) < 0.15
  assert [order(5, k) for k in (0, 999)] == [first[0], first[999]]
  assert order(6, 0) == order.epoch(6)[0]
  assert [pickle.loads(pickle.dumps(order))(5, k) for k in range(9)] == first[:9].tolist()


def test_copies_of_an_example_count_from_0():
  ids = EpochOrder(random_sampling(200), seed=0).epoch(0)
  assert ids.dtype == np.int64
  for i in np.unique(position(ids)):
    copies = np.sort(ids[position(ids) == i] >> COPY_BIT)
    np.testing.assert_array_equal(copies, np.arange(len(copies)))


def test_two_copies_in_a_batch_get_different_views():
  ids = np.array([7, 7 | 1 << COPY_BIT, 7 | 2 << COPY_BIT, *[7] * 5])
  image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
  batch = {
    "image": np.repeat(image, 8, axis=0), "extent": np.full((8, 2), 16, np.int32), "id": ids
  }  # fmt: skip
  batch = parallel.to_device(batch, parallel.make_mesh(1))
  spec = ViewSpec("global", size=8, jitter=0.0, greyscale=0.0)
  views = make_views(jax.random.key(0), batch, (spec,))["global"]
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert np.abs(views[i] - views[j]).max() > 0.05
  np.testing.assert_array_equal(views[0], views[3])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["class", "clusters"])
def test_a_group_is_drawn_by_its_size_to_the_power(kind, power, tmp_path):
  group = groups()
  file = "" if kind == "class" else saved(tmp_path, group)
  sampling = make_sampling(Labelled(group), sampling=kind, file=file, power=power)
  share = np.array(SIZES) ** (1 - power) / np.sum(np.array(SIZES) ** (1 - power))
  np.testing.assert_allclose(np.bincount(group, sampling.weights), share, rtol=1e-12)
  drawn = np.bincount(group, counts(EpochOrder(sampling, seed=0), 0, 100))
  assert (np.abs(drawn - 100 * share) < 1).all()


def test_weights_are_raised_to_the_power_and_zero_is_never_drawn(tmp_path):
  values = np.array([0.0, 1, 4, 0, 16])
  for power, share in ((1.0, [0, 1, 4, 0, 16]), (0.5, [0, 1, 2, 0, 4]), (0.0, [0, 1, 1, 0, 1])):
    sampling = make_sampling(
      Labelled([0] * 5), sampling="weights", file=saved(tmp_path, values), power=power
    )
    np.testing.assert_allclose(sampling.weights, np.array(share) / np.sum(share), rtol=1e-12)
    assert not set(position(EpochOrder(sampling, 0).epoch(1)).tolist()) & {0, 3}


def test_examples_in_no_cluster_are_not_drawn_and_counted(tmp_path, caplog):
  file = saved(tmp_path, np.array([-1, 0, 0, 1, -1]))
  sampling = make_sampling(Labelled([0] * 5), sampling="clusters", file=file, power=1.0)
  np.testing.assert_allclose(sampling.weights, [0, 0.25, 0.25, 0.5, 0])
  assert "2 examples are in no cluster" in caplog.text


def test_uniform_needs_nothing():
  assert make_sampling(Labelled([-1]), sampling="uniform", file="", power=1.0) is None


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"sampling": "classes"}, "unknown data.sampling 'classes'; known: uniform, class,"),
    ({"sampling": "class", "power": 1.5}, "sampling_power is 1.5; expected 0"),
    ({"sampling": "class", "file": "a.npy"}, "sampling_file is 'a.npy'; leave it empty"),
    ({"sampling": "weights"}, "sampling_file is ''; name the .npy file"),
    (
      {"sampling": "class", "labels": [0, -1, 1]},
      "1 of 3 .*Labelled.*sort them into class folders",
    ),
    ({"sampling": "weights", "values": np.ones(4)}, r"shape \(4,\); expected \(3,\)"),
    ({"sampling": "weights", "values": np.array([1, -2.0, 1])}, "example 1 the weight -2.0"),
    ({"sampling": "weights", "values": np.array([1, 1, np.nan])}, "example 2 the weight nan"),
    ({"sampling": "weights", "values": np.zeros(3)}, "only weights of 0"),
    ({"sampling": "clusters", "values": np.ones(3)}, "holds float64; clusters are whole numbers"),
    ({"sampling": "clusters", "values": np.array([0, -2, 1])}, "clusters from -2 to 1"),
    ({"sampling": "clusters", "values": np.array([-1, -1, -1])}, "clusters from -1 to -1"),
  ],
)
def test_bad_sampling_names_the_value_and_the_fix(options, message, tmp_path):
  values, labels = options.pop("values", None), options.pop("labels", [0, 1, 1])
  if values is not None:
    options["file"] = saved(tmp_path, values)
  with pytest.raises(ValueError, match=message):
    make_sampling(Labelled(labels), **({"file": "", "power": 1.0} | options))


def test_missing_file_is_named():
  with pytest.raises(FileNotFoundError, match=r"no file /nowhere/w\.npy"):
    make_sampling(Labelled([0]), sampling="weights", file="/nowhere/w.npy", power=1.0)


def test_draw_frames_is_a_permutation_within_a_window():
  def draw(epoch, **changes):
    options = {"count": 4, "span": 5, "seed": 0, "example_id": 3} | changes
    return draw_frames(10, epoch=epoch, **options)

  drawn = np.array([draw(epoch) for epoch in range(300)])
  assert (np.ptp(drawn, axis=1) <= 4).all()
  assert all(len(set(row)) == 4 for row in drawn.tolist())
  assert set(np.unique(drawn)) == set(range(10))
  assert sorted(draw(0, count=7)) == sorted([*set(draw(0, count=5)), *draw(0, count=2)])
  np.testing.assert_array_equal(draw(9), drawn[9])
  for other in ({"seed": 1}, {"example_id": 4}, {"example_id": 3 | 1 << COPY_BIT}):
    assert any((draw(epoch, **other) != drawn[epoch]).any() for epoch in range(5))
