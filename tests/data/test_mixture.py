"""Several sources as one: positions, labels, and each one's share of the draws."""

import pickle

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.config import base_config
from ssrl_jax.data.pipeline import train_batches
from ssrl_jax.data.sampling import EpochOrder, make_sampling, position
from ssrl_jax.data.sources import check_frames, labels_of, open_source
from ssrl_jax.experiment import open_split, training_sampling


@pytest.fixture
def sets(tmp_path):
  """Folders a (12 pictures), b (4; both of classes x and y) and plain (3, without classes)."""
  for name, count, value in (("a", 12, 0), ("b", 4, 100), ("plain", 3, 200)):
    for i in range(count):
      folder = tmp_path / name / ("" if name == "plain" else "xy"[i % 4 == 3])
      folder.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (4, 4), (value + i,) * 3).save(folder / f"{i:02d}.png")
  return {name: f"folder:{tmp_path / name}" for name in ("a", "b", "plain")}


def opened(sets, *names, **options):
  return open_source("mixture", split="train", mixture=[sets[n] for n in names], **options)


def share(source, sampling, epochs=1):
  ids = np.concatenate([EpochOrder(sampling, seed=0).epoch(e) for e in range(epochs)])
  return np.bincount(source.origins[position(ids)], minlength=2), ids


def test_a_mixture_has_every_example_of_its_sources_once(sets):
  source = opened(sets, "a", "b")
  assert (len(source), source.class_names) == (16, ("x", "y"))
  parts = [open_source(sets[n], split="train") for n in "ab"]
  everything = [part[i] for part in parts for i in range(len(part))]
  assert [source[i] for i in range(16)] == everything
  assert labels_of(source).tolist() == [e["label"] for e in everything]
  assert source.origins.tolist() == [0] * 12 + [1] * 4
  assert source.name(12) == parts[1].name(0)
  copy = pickle.loads(pickle.dumps(source))
  assert ([copy[i] for i in range(16)], repr(copy)) == (everything, repr(source))


def test_labels_are_kept_only_where_all_have_the_same_classes(sets, caplog):
  source = opened(sets, "a", "plain")
  assert (source.num_classes, source.class_names) == (None, ())
  assert {source[i]["label"] for i in range(len(source))} == {-1} == set(labels_of(source).tolist())
  assert "the classes of its sources differ" in caplog.text


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (9.5, 0.5)])
@pytest.mark.parametrize("sampling", ["uniform", "class"])
def test_each_source_has_its_share_of_every_epoch(sets, weights, sampling):
  source = opened(sets, "a", "b")
  drawn = make_sampling(source, sampling=sampling, file="", power=1.0, mixture_weights=weights)
  expected = 16 * np.array(weights) / sum(weights)
  for epoch in range(4):
    found = np.bincount(source.origins[position(EpochOrder(drawn, 0).epoch(epoch))], minlength=2)
    assert (np.abs(found - expected) < 1).all()
  counts = np.bincount(position(share(source, drawn, epochs=40)[1]), minlength=16)
  assert counts.all()  # none is left out for good
  if sampling == "class":  # balanced within each source
    for origin, weight in enumerate(weights):
      of_class = np.bincount(source.labels, drawn.weights * (source.origins == origin))
      np.testing.assert_allclose(of_class, weight / sum(weights) / 2)


def test_without_weights_every_example_comes_once(sets):
  source = opened(sets, "a", "b")
  assert make_sampling(source, sampling="uniform", file="", power=1.0) is None


def test_a_limit_keeps_the_shares(sets):
  source = opened(sets, "a", "b", limit=8, seed=1)
  drawn = make_sampling(source, sampling="uniform", file="", power=1.0, mixture_weights=(1, 3))
  assert np.abs(share(source, drawn)[0] - [2, 6]).max() < 1


@pytest.mark.parametrize("start", [0, 3])
def test_the_order_is_that_of_seed_and_step(sets, start):
  source = opened(sets, "a", "b")
  drawn = make_sampling(source, sampling="uniform", file="", power=1.0, mixture_weights=(1, 1))
  ids = {}
  for first, workers in ((0, 1), (start, 2)):
    batches = train_batches(
      source, seed=5, batch_size=5, start_step=first, canvas=4, threads=workers, sampling=drawn
    )
    ids[workers] = [next(batches)["id"].tolist() for _ in range(first, 7)]
    batches.close()
  assert ids[2] == ids[1][start:]


@pytest.mark.parametrize(
  ("weights", "message"),
  [
    ((1,), r"mixture_weights is \(1,\); expected 2 positive"),
    ((1, 0), "expected 2 positive numbers"),
    ((1, float("nan")), "expected 2 positive numbers"),
    ((1, 1, 1), "favours source 2 of Mixture"),
  ],
)
def test_bad_weights_are_named(sets, weights, message):
  with pytest.raises(ValueError, match=message):
    make_sampling(
      opened(sets, "a", "b"), sampling="uniform", file="", power=1.0, mixture_weights=weights
    )


def test_an_empty_mixture_and_still_pictures_are_named(sets):
  with pytest.raises(ValueError, match=r"data\.mixture is empty"):
    opened(sets)
  with pytest.raises(ValueError, match=r"FolderSource.*still pictures"):
    check_frames(opened(sets, "a", limit=3), 2, 0)


def test_a_config_opens_its_mixture_and_another_source_in_its_place(sets):
  config = base_config("simclr")
  config.data.source, config.data.mixture = "mixture", (sets["a"], sets["b"])
  config.data.mixture_weights = (0.25, 0.75)
  source = open_split(config, "train")
  sampling = training_sampling(config, source)
  np.testing.assert_allclose(np.bincount(source.origins, sampling.weights), [0.25, 0.75])
  config.data.source = sets["a"]
  assert training_sampling(config, open_split(config, "train")) is None
