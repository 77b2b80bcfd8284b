import csv
import dataclasses

import jax
import numpy as np
import pytest

from ssrl_jax.data.dense import Boxes
from ssrl_jax.evaluate import dense
from ssrl_jax.evaluate.detection import Found, average_precision, run
from tests.dense_sets import write_coco
from tests.evaluate.dense_common import make_evaluation

FIT = {"size": 32, "stride": 2, "levels": 2, "width": 16, "depth": 1, "batch_size": 8,
       "scales": (1.0, 1.0), "candidates": 100}  # fmt: skip

THRESHOLDS = [0.5 + 0.05 * k for k in range(10)]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
  return write_coco(tmp_path_factory.mktemp("coco"), n=8)


def boxes(*rows, crowd=()):
  """Rows of left, top, right, bottom, label."""
  rows = np.array(rows, np.float64).reshape(-1, 5)
  is_crowd = np.isin(np.arange(len(rows)), crowd)
  return Boxes(rows[:, :4], rows[:, 4].astype(np.int32), is_crowd)


def found(*rows):
  """Rows of left, top, right, bottom, label, score."""
  rows = np.array(rows, np.float64).reshape(-1, 6)
  return Found(rows[:, :4], rows[:, 5], rows[:, 4].astype(int))


def iou(a, b):
  shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
  area = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
  return shared / (area - shared)


def reference(truth, detected, label, threshold):
  """Average precision of one class: best first, each box once, 101 levels of recall."""
  total = sum(np.sum(t.labels == label) for t in truth)
  rows = [
    (score, i, box)
    for i, d in enumerate(detected)
    for box, score, own in zip(*d)
    if own == label
  ]  # fmt: skip
  taken, hits = set(), []
  for _, i, box in sorted(rows, key=lambda row: -row[0]):
    free = [
      (iou(box, other), j)
      for j, (other, own) in enumerate(zip(truth[i].corners, truth[i].labels))
      if own == label and (i, j) not in taken
    ]
    best, j = max(free, default=(0, -1))
    hits.append(best >= threshold)
    if hits[-1]:
      taken.add((i, j))
  recall = np.cumsum(hits) / total
  precision = np.cumsum(hits) / (np.arange(len(hits)) + 1)
  levels = np.linspace(0, 1, 101)  # as COCO rounds them: a recall of 0.07 misses the level 0.07
  return 100 * np.mean([max(precision[recall >= r], default=0) for r in levels])


A, B = (0, 0, 10, 10), (20, 20, 40, 30)
TRUTH = [boxes((*A, 0), (*B, 1)), boxes((*B, 0))]


@pytest.mark.parametrize(
  ("truth", "detected", "expected"),
  [
    pytest.param(
      TRUTH, [found((*A, 0, 0.9), (*B, 1, 0.8)), found((*B, 0, 0.7))], (100, 100, 100), id="perfect"
    ),
    pytest.param(TRUTH, [found(), found()], (0, 0, 0), id="nothing found"),
    pytest.param(  # IoU 0.7: right at 0.5 to 0.7, 5 of 10 thresholds
      [boxes((*A, 0))], [found((0, 0, 10, 7, 0, 0.9))], (50, 100, 0), id="shifted"
    ),
    pytest.param(  # recall 0 to 0.5, 51 of 101 levels
      [boxes((*A, 0), (*B, 0))], [found((*A, 0, 0.9))], (5100 / 101,) * 3, id="missed"
    ),
    pytest.param(  # the second is wrong, but after all recall
      [boxes((*A, 0))], [found((*A, 0, 0.9), (*A, 0, 0.8))], (100, 100, 100), id="duplicate after"
    ),
    pytest.param(  # precision 1 up to recall 1/2 (51 levels), then 2/3
      [boxes((*A, 0), (*B, 0))], [found((*A, 0, 0.9), (*A, 0, 0.8), (*B, 0, 0.7))],
      (100 * (51 + 50 * 2 / 3) / 101,) * 3, id="duplicate between",
    ),
    pytest.param([boxes((*A, 0))], [found((*A, 1, 0.9))], (0, 0, 0), id="wrong class"),
    pytest.param(
      [boxes((*A, 0)), boxes()], [found((*A, 0, 0.9)), found()], (100,) * 3, id="empty picture"
    ),
    pytest.param(  # a false one with a higher score: precision 1/2 everywhere
      [boxes((*A, 0)), boxes()], [found((*A, 0, 0.8)), found((*A, 0, 0.9))], (50,) * 3,
      id="found in an empty picture",
    ),
    pytest.param(  # inside a crowd: neither right nor wrong
      [boxes((*A, 0), (20, 20, 60, 60, 0), crowd=[1])],
      [found((30, 30, 40, 40, 0, 0.9), (*A, 0, 0.8))], (100,) * 3, id="crowd",
    ),
  ],
)  # fmt: skip
def test_average_precision_of_hand_made_cases(truth, detected, expected):
  figures, _ = average_precision(truth, detected, 2)
  np.testing.assert_allclose([figures[k] for k in ("AP", "AP50", "AP75")], expected, atol=1e-6)


def test_average_precision_is_that_of_an_independent_computation():
  rng, truth, detected = np.random.default_rng(0), [], []
  for _ in range(12):
    near = rng.uniform(0, 80, (rng.integers(0, 6), 2))
    corners = np.concatenate([near, near + rng.uniform(10, 30, near.shape)], axis=1)
    labels = rng.integers(0, 3, len(near)).astype(np.int32)
    truth.append(Boxes(corners, labels, np.zeros(len(near), bool)))
    shaken = np.concatenate([corners + rng.normal(0, 2, corners.shape), corners[:1] + 1])
    own = np.concatenate([labels, labels[:1]])
    detected.append(Found(shaken, rng.random(len(own)), own))
  figures, table = average_precision(truth, detected, 4)
  expected = np.array([[reference(truth, detected, k, t) for t in THRESHOLDS] for k in range(3)])
  assert expected[:, 0].min() > 20
  assert expected.mean() < 80
  np.testing.assert_allclose(table[:3, 0], expected.mean(axis=1), atol=1e-6)
  np.testing.assert_allclose(table[:3, 1:], expected[:, [0, 5]], atol=1e-6)
  assert np.all(np.isnan(table[3]))  # no box of the fourth class
  np.testing.assert_allclose(figures["AP"], expected.mean(), atol=1e-6)


def test_a_limit_of_detections_keeps_the_best():
  truth, detected = [boxes((*A, 0), (*B, 0))], [found((*A, 0, 0.3), (*B, 0, 0.9))]
  figures, _ = average_precision(truth, detected, 1, max_detections=1)
  np.testing.assert_allclose(figures["AP"], 5100 / 101)


def test_a_frozen_encoder_keeps_every_byte_and_8_devices_agree(coco, monkeypatch):
  trained, whole = [], dense.train_head
  monkeypatch.setattr(
    dense, "train_head", lambda *a, **k: trained.append(whole(*a, **k)) or trained[-1]
  )
  signs = []
  evaluations = [
    dataclasses.replace(make_evaluation(num_devices=n), moved=lambda: signs.append(1))
    for n in (1, 8)
  ]
  before = jax.tree.map(lambda x: np.asarray(x).tobytes(), evaluations[0].weights)
  options = FIT | {"levels": 1, "candidates": 20}  # compiles faster
  figures = [run(e, source=coco, test_split="train", steps=2, **options) for e in evaluations]
  assert len(signs) > 2 * 2  # of life, in the test pass too
  for one, evaluation in zip(trained, evaluations):
    for tree in (one.encoder, evaluation.weights):
      assert jax.tree.map(lambda x: np.asarray(x).tobytes(), tree) == before
  for a, b in zip(*(jax.tree.leaves(t.head) for t in trained)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  for key in figures[0]:
    np.testing.assert_allclose(figures[0][key], figures[1][key], atol=0.2, err_msg=key)


def test_a_tiny_encoder_learns_a_handful_of_pictures_by_heart(tmp_path):
  """Pictures of twice the view's size; one is damaged, one has no box, one box reaches out."""

  def change(content):
    content["annotations"][0]["bbox"] = [-5, 0, 20, 20]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 12]

  source = write_coco(tmp_path, n=9, size=(48, 64), change=change)
  file = tmp_path / "images" / "train" / "1.png"
  file.write_bytes(file.read_bytes()[:-500])
  figures = run(
    make_evaluation(num_devices=1, folder=tmp_path), source=source, test_split="train", steps=200,
    learning_rate=0.01, finetune=True, encoder_rate=1.0, **FIT,
  )  # fmt: skip
  assert figures["detection/AP50"] > 95
  assert figures["detection/AP"] > 60
  assert figures["detection/damaged"] == 1
  assert figures["detection/clipped_boxes"] == 2  # in both splits, which here are one
  with open(tmp_path / "detection.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["class"] for row in rows] == ["red", "green", "blue"]
  assert sum(int(row["boxes"]) for row in rows) == 14  # without those of the damaged picture
  ap = [float(row["AP50"]) for row in rows]
  np.testing.assert_allclose(np.mean(ap), figures["detection/AP50"], atol=0.01)


def test_sets_and_options_that_make_no_sense_are_refused(coco, tmp_path):
  evaluation = make_evaluation()
  with pytest.raises(ValueError, match=r"nms is 1.5; expected an IoU"):
    run(evaluation, source=coco, nms=1.5)
  with pytest.raises(ValueError, match="levels is 0; expected at least 1"):
    run(evaluation, source=coco, levels=0)
  with pytest.raises(ValueError, match="source is ''; expected 'coco:PATH'"):
    run(evaluation)
  bare = write_coco(tmp_path, n=2, change=lambda c: c.update(annotations=[]))
  with pytest.raises(ValueError, match="has no box at all; annotate some"):
    run(evaluation, source=bare, test_split="train")
  write_coco(tmp_path, n=2)
  write_coco(tmp_path, n=2, split="val", change=lambda c: c["categories"][0].update(name="pink"))
  with pytest.raises(ValueError, match="labels differ between"):
    run(evaluation, source=bare)
