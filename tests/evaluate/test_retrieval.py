import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ssrl_jax.evaluate import retrieval
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, raw_pixels
from ssrl_jax.method import Features
from ssrl_jax.parallel import make_mesh

UNUSED_VIEW = {"canvas": 1, "size": 1, "crop": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def judge(train, test, num_classes=4):
  """An Evaluation of (features, labels) that are there already."""
  sets = {
    split: FeatureSet(np.asarray(x, np.float32), np.asarray(y, np.int32), np.arange(len(y)))
    for split, (x, y) in {"train": train, "test": test}.items()
  }
  return Evaluation(
    raw_pixels, (), train=None, test=None, num_classes=num_classes, mesh=make_mesh(1),
    batch_size=1, cache={(k, "pooled"): v for k, v in sets.items()}, **UNUSED_VIEW,
  )  # fmt: skip


def clusters(n, *, seed=0, num_classes=4, dim=6, spread=1.5):
  np_rng = np.random.default_rng(seed)
  centres = np.random.default_rng(99).normal(size=(num_classes, dim))
  label = np_rng.integers(0, num_classes, n)
  return (centres[label] + spread * np_rng.normal(size=(n, dim))).astype(np.float32), label


def brute_force(query, bank, *, own):
  """Percent, in float64, one query and one neighbour at a time, from the definitions."""
  hits, ap, ap_r = {1: [], 5: [], 10: []}, [], []
  for i, (x, label) in enumerate(zip(query[0].astype(np.float64), query[1])):
    rest = [j for j in range(len(bank[1])) if not (own and j == i)]
    y = bank[0].astype(np.float64)[rest]
    s = [x @ v / np.sqrt((x @ x) * (v @ v)) for v in y]
    right = [bank[1][rest[j]] == label for j in sorted(range(len(s)), key=lambda j: -s[j])]
    total = sum(right)
    if not total:
      continue
    for k, found in hits.items():
      found.append(any(right[:k]))
    precision = [sum(right[: r + 1]) / (r + 1) for r in range(len(right)) if right[r]]
    early = [sum(right[: r + 1]) / (r + 1) for r in range(total) if right[r]]
    ap.append(sum(precision) / total)
    ap_r.append(sum(early) / total)
  figures = {f"retrieval/recall_at_{k}": 100 * np.mean(found) for k, found in hits.items()}
  return figures | {"retrieval/map": 100 * np.mean(ap), "retrieval/map_at_r": 100 * np.mean(ap_r)}


@pytest.mark.parametrize("bank", ["test", "train"])
def test_figures_are_those_of_brute_force(bank):
  train, test = clusters(80), clusters(61, seed=1)
  figures = retrieval.run(judge(train, test), bank=bank)
  expected = brute_force(test, test if bank == "test" else train, own=bank == "test")
  for name, value in expected.items():
    assert figures[name] == pytest.approx(value, abs=1e-4)
  assert 30 < figures["retrieval/recall_at_1"] < 95  # so that it can be wrong
  assert figures["retrieval/queries"] == 61


def test_map_is_scikit_learns_average_precision():
  train, test = clusters(80), clusters(30, seed=1)
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x, _ in (test, train)]
  s = unit[0] @ unit[1].T
  expected = np.mean([average_precision_score(train[1] == y, r) for y, r in zip(test[1], s)])
  figures = retrieval.run(judge(train, test), bank="train")
  assert figures["retrieval/map"] == pytest.approx(100 * expected, abs=1e-4)


def test_figures_of_a_hand_case():
  # Seen from the query: right, wrong, right, right; R = 3. Precisions 1, 2/3, 3/4.
  angle = np.array([0.1, 0.2, 0.3, 0.4])
  train = np.stack([np.cos(angle), np.sin(angle)], 1), np.array([0, 1, 0, 0])
  figures = retrieval.run(judge(train, ([[3.0, 0]], [0])), bank="train")
  assert figures["retrieval/recall_at_1"] == 100
  assert figures["retrieval/map"] == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 3)
  assert figures["retrieval/map_at_r"] == pytest.approx(100 * (1 + 2 / 3) / 3)


def test_of_equals_the_first_in_the_bank_is_first():
  train = np.ones((3, 2)), np.array([1, 0, 1])
  figures = retrieval.run(judge(train, ([[1.0, 1]], [0])), bank="train")
  assert figures["retrieval/recall_at_1"] == 0
  assert figures["retrieval/map"] == pytest.approx(50)


@pytest.mark.parametrize(("query_block", "num_devices"), [(7, 1), (16, 8), (61, 8), (0, 8)])
def test_blocks_and_devices_change_nothing(query_block, num_devices):
  x, y = clusters(61)
  expected = retrieval.rank(x, y, x, y, own=True)
  options = {"own": True, "query_block": query_block, "mesh": make_mesh(num_devices)}
  for ours, theirs in zip(retrieval.rank(x, y, x, y, **options), expected):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_queries_alone_in_their_class_are_left_out_and_said(caplog):
  (x, y), lonely = clusters(30, num_classes=3), np.ones((1, 6), np.float32)
  test = np.concatenate([x, lonely]), np.concatenate([y, [3]])
  figures = retrieval.run(judge(test, test))
  assert figures["retrieval/queries"] == 30
  assert figures["retrieval/map"] == pytest.approx(
    brute_force(test, test, own=True)["retrieval/map"], abs=1e-4
  )
  assert "1 of 31 queries" in caplog.text


def test_pictures_without_label_are_neither_query_nor_bank():
  x, y = clusters(50)
  alone = retrieval.run(judge((x, y), (x[:40], y[:40])))
  unknown = np.concatenate([y[:40], np.full(10, -1)])
  assert retrieval.run(judge((x, y), (x, unknown))) == alone | {"retrieval/unlabelled": 10.0}


def test_no_pair_of_a_class_is_an_error():
  test = np.eye(3), np.arange(3)
  with pytest.raises(ValueError, match="none of the 3 test pictures has another of its class"):
    retrieval.run(judge(test, test))


def test_unknown_bank_is_an_error():
  with pytest.raises(ValueError, match="retrieval's bank is 'val'; expected one of test, train"):
    retrieval.run(judge(clusters(9), clusters(9)), bank="val")


def test_kind_is_chosen_and_an_unknown_one_is_an_error_unless_there_is_only_one():
  def apply(weights, images, train, key):
    return Features(pooled=images.reshape(images.shape[0], -1), maps={2: images}), weights

  (x, y), noise = clusters(50), np.random.default_rng(0).normal(size=(50, 3))
  alone = judge((x, y), (x, y))
  both = dataclasses.replace(judge((noise, y), (noise, y)), apply=apply)
  both.cache["test", "map2"] = alone.cache["test", "pooled"]
  assert retrieval.run(both, kind="map2") == retrieval.run(alone, kind="map2")
  with pytest.raises(ValueError, match=r"unknown kind of vector 'map4'; .* has: pooled, map2"):
    retrieval.run(both, kind="map4")


def test_table_of_similarities_is_cut_to_its_limit(monkeypatch):
  monkeypatch.setattr(retrieval, "TABLE", 61 * 5)
  seen, real = [], retrieval._rank
  monkeypatch.setattr(retrieval, "_rank", lambda *a: seen.append(a[0].shape) or real(*a))
  x, y = clusters(61)
  retrieval.rank(jnp.asarray(x), y, x, y, own=True)
  assert set(seen) == {(5, 6)}
  assert len(seen) == 13
