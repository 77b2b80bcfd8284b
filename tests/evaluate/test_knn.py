import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.evaluate import knn
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, raw_pixels
from ssrl_jax.parallel import make_mesh

UNUSED_VIEW = {"canvas": 1, "size": 1, "crop": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}


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


def brute_force(train, test, num_classes, *, k, temperature):
  """Percent right, in float64, one query and one neighbour at a time."""
  (bank, bank_label), (query, query_label) = train, test
  right = 0
  for x, label in zip(query.astype(np.float64), query_label):
    similarity = [x @ y / np.sqrt((x @ x) * (y @ y)) for y in bank.astype(np.float64)]
    votes = np.zeros(num_classes)
    for i in sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]:
      votes[bank_label[i]] += np.exp(similarity[i] / temperature)
    right += votes.argmax() == label
  return 100 * right / len(query)


def clusters(n, *, num_classes=4, dim=6, spread=1.2, seed=0):
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(99).normal(size=(num_classes, dim))
  label = rng.integers(0, num_classes, n)
  return (centres[label] + spread * rng.normal(size=(n, dim))).astype(np.float32), label


@pytest.mark.parametrize(
  ("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (20, 0.005), (61, 0.5)]
)
def test_accuracy_is_that_of_brute_force(k, temperature):
  train, test = clusters(61), clusters(150, seed=1)
  figures = knn.run(judge(train, test, 4), k=k, temperature=temperature)
  expected = brute_force(train, test, 4, k=k, temperature=temperature)
  assert figures["knn/accuracy"] == pytest.approx(expected)
  assert 30 < expected < 95  # so that it can be wrong


def test_accuracy_of_a_hand_case():
  # The query has cosine 1 with a picture of class 0, and 0.8 with two of class 1: at temperature
  # 0.1 exp(10) > 2 exp(8), at temperature 1 e < 2 exp(0.8).
  train = [[2.0, 0], [4, 3], [8, -6]], [0, 1, 1]
  evaluation = judge(train, ([[5.0, 0]], [0]), 2)
  assert knn.run(evaluation, k=3, temperature=0.1)["knn/accuracy"] == 100
  assert knn.run(evaluation, k=3, temperature=1.0)["knn/accuracy"] == 0


def test_k_is_capped_at_the_bank_with_a_notice(caplog):
  train, test = clusters(7), clusters(30, seed=1)
  figures = knn.run(judge(train, test, 4), k=20)
  assert figures["knn/k"] == 7
  assert figures["knn/accuracy"] == pytest.approx(
    brute_force(train, test, 4, k=7, temperature=0.07)
  )
  assert "k 20 is capped at the bank's 7 pictures" in caplog.text


def test_pictures_without_label_neither_vote_nor_count():
  train, test = clusters(60), clusters(40, seed=1)
  alone = knn.run(judge(train, test, 4))
  unknown = np.full(10, -1)
  train = np.concatenate([test[0][:10], train[0]]), np.concatenate([unknown, train[1]])
  test = np.concatenate([test[0], test[0][:10]]), np.concatenate([test[1], unknown])
  figures = knn.run(judge(train, test, 4))
  assert figures == alone | {"knn/unlabelled": 20.0}


def test_top5_appears_with_many_classes_and_is_right():
  train, test = clusters(300, num_classes=25), clusters(100, num_classes=25, seed=1)
  figures = knn.run(judge(train, test, 25), k=20)
  similarity, index = knn.nearest(test[0], train[0], k=20)
  hits = 0
  for s, neighbours, label in zip(similarity.astype(np.float64), train[1][index], test[1]):
    votes = {c: np.exp(s / 0.07)[neighbours == c].sum() for c in range(25)}
    hits += label in sorted(votes, key=lambda c: -votes[c])[:5]
  assert figures["knn/top5"] == pytest.approx(hits)
  assert figures["knn/accuracy"] < figures["knn/top5"] < 100
  assert "knn/top5" not in knn.run(judge(clusters(30), clusters(30), 4))


@pytest.mark.parametrize(("query_block", "bank_block"), [(7, 13), (100, 5), (40, 61), (1, 200)])
def test_nearest_does_not_depend_on_blocks(query_block, bank_block):
  (bank, _), (query, _) = clusters(61), clusters(40, seed=1)
  similarity, index = knn.nearest(query, bank, k=10, query_block=query_block, bank_block=bank_block)
  q, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query * 1.0, bank * 1.0))
  expected = np.argsort(-(q @ b.T), axis=1, kind="stable")[:, :10]
  np.testing.assert_array_equal(index, expected)
  np.testing.assert_allclose(similarity, np.take_along_axis(q @ b.T, expected, 1), atol=1e-6)


@pytest.mark.parametrize("query_block", [16, 40, 7])  # in which 8, 8 and 7 devices have a share
def test_devices_share_the_queries_and_change_nothing(query_block):
  (bank, _), (query, _) = clusters(61), clusters(40, seed=1)
  options = {"k": 10, "query_block": query_block, "bank_block": 13}
  similarity, index = knn.nearest(query, bank, mesh=make_mesh(8), **options)
  expected, expected_index = knn.nearest(query, bank, **options)
  np.testing.assert_array_equal(index, expected_index)
  np.testing.assert_allclose(similarity, expected, atol=1e-6)


def test_nearest_of_equals_is_the_first_in_the_bank():
  bank = np.ones((50, 3), np.float32)
  _, index = knn.nearest(bank[:2], bank, k=12, bank_block=8)
  np.testing.assert_array_equal(index, np.tile(np.arange(12), (2, 1)))


def test_nearest_of_opposite_vectors_is_never_the_padding():
  similarity, index = knn.nearest(
    np.array([[1.0, 0]], np.float32), np.array([[-1.0, 0]] * 5, np.float32), k=5, bank_block=4
  )
  np.testing.assert_array_equal(index, [[0, 1, 2, 3, 4]])
  np.testing.assert_allclose(similarity, -1)


@pytest.mark.parametrize(
  ("options", "match"), [({"k": 0}, "k is 0"), ({"temperature": 0.0}, "temperature 0.0")]
)
def test_options_out_of_range_are_errors(options, match):
  with pytest.raises(ValueError, match=match):
    knn.run(judge(clusters(10), clusters(10), 4), **options)


def test_top_accuracy_of_what_is_no_number_is_0():
  scores = np.array([[np.nan, np.nan], [np.nan, 1.0], [0.0, np.nan], [0.0, 1.0]])
  assert knn.top_accuracy(scores, np.array([0, 0, 0, 1]), 1) == 25


def test_top_accuracy_gives_ties_to_the_lowest_class():
  scores, label = np.array([[1.0, 1, 0], [0, 2, 2]]), np.array([1, 1])
  assert knn.top_accuracy(scores, label, 1) == 50
  assert knn.top_accuracy(scores, label, 2) == 100
