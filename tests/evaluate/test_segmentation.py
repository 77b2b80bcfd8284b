import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data.dense import IGNORE
from ssrl_jax.evaluate import dense, segmentation
from ssrl_jax.evaluate.segmentation import class_iou, count_pixels, pixel_loss, run, scores
from tests.dense_sets import write_masks
from tests.evaluate.dense_common import make_evaluation

FIT = {"size": 32, "stride": 1, "scales": (1.0, 1.0), "batch_size": 8}


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
  return write_masks(tmp_path_factory.mktemp("masks"), n=8)


def test_miou_of_a_hand_case_with_ignored_pixels_and_an_absent_class():
  truth = jnp.array([[[0, 0, 0, 1], [1, 1, IGNORE, IGNORE]]])
  label = jnp.array([[[0, 0, 1, 1], [1, 3, 0, 3]]])
  table = np.asarray(count_pixels(truth, label, 4))
  np.testing.assert_array_equal(table[:2], [[2, 1, 0, 0], [0, 2, 0, 1]])
  assert table.sum() == 6
  # 0: 2 of 3. 1: 2 of 3 true and 1 false: 2 of 4. 2: nowhere. 3: 1 predicted, 0 true: 0 of 1.
  np.testing.assert_allclose(class_iou(table), [2 / 3, 2 / 4, np.nan, 0])
  found = scores(table)
  np.testing.assert_allclose(found["miou"], 100 * (2 / 3 + 1 / 2) / 3)
  np.testing.assert_allclose(found["pixel_accuracy"], 100 * 4 / 6)
  assert found["classes"] == 3


def test_iou_of_random_masks_is_that_of_sets_of_pixels():
  rng = np.random.default_rng(0)
  truth, label = rng.integers(0, 5, (3, 9, 7)), rng.integers(0, 5, (3, 9, 7))
  truth[rng.random(truth.shape) < 0.2] = IGNORE
  table = np.asarray(count_pixels(jnp.asarray(truth), jnp.asarray(label), 5))
  for k, iou in enumerate(class_iou(table)):
    ours, theirs = (set(np.flatnonzero((x == k) & (truth != IGNORE))) for x in (truth, label))
    np.testing.assert_allclose(iou, len(ours & theirs) / len(ours | theirs))


def test_loss_is_the_mean_over_pixels_that_have_a_class():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(3, 4, 4, 3)).astype(np.float32)
  mask = rng.integers(0, 3, (3, 4, 4)).astype(np.uint8)
  mask[0, :2] = IGNORE
  weight = np.array([1, 1, 0], np.float32)  # the third picture could not be read
  batch = {"mask": mask, "extent": np.full((3, 2), 4, np.int32), "weight": weight}
  places = dense.Places(jnp.ones(3), jnp.zeros((3, 2)), jnp.zeros(3, bool))
  each = []
  for i, y, x in np.ndindex(2, 4, 4):
    if mask[i, y, x] != IGNORE:
      one = logits[i, y, x].astype(np.float64)
      each.append(np.log(np.exp(one).sum()) - one[mask[i, y, x]])
  assert len(each) == 24
  found = jax.jit(pixel_loss, static_argnames="size")(logits, places, batch, size=4)
  np.testing.assert_allclose(found, np.mean(each), rtol=1e-6)


@pytest.mark.parametrize(("head", "steps"), [("linear", 60), ("light", 120)])
def test_a_tiny_encoder_learns_a_handful_of_pictures_by_heart(masks, tmp_path, head, steps):
  folder = tmp_path / "trained"
  figures = run(
    make_evaluation(num_devices=1, folder=folder), source=masks, test_split="train", head=head,
    levels=2, width=16, steps=steps, learning_rate=0.02, finetune=True, encoder_rate=1.0,
    num_pictures=3, **FIT,
  )  # fmt: skip
  assert figures["segmentation/miou"] > 95
  assert figures["segmentation/pixel_accuracy"] > 97
  assert figures["segmentation/classes"] == 4
  assert figures["segmentation/damaged"] == figures["segmentation/missing_masks"] == 0
  with open(folder / "segmentation.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["class"] for row in rows] == ["ground", "red", "green", "blue"]
  ious = [float(row["iou"]) for row in rows]
  np.testing.assert_allclose(np.mean(ious), figures["segmentation/miou"], atol=0.01)
  assert sum(int(row["true_pixels"]) for row in rows) == 8 * 32 * 32
  shown = np.asarray(Image.open(folder / "segmentation.png"))
  assert shown.shape == (3 * 32, 3 * 32, 3)
  same = np.all(shown[:, 32:64] == shown[:, 64:], axis=-1)
  assert same.mean() > 0.95


def test_a_frozen_encoder_keeps_every_byte_and_8_devices_agree(masks, monkeypatch):
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
  figures = [run(e, source=masks, test_split="train", steps=4, **FIT) for e in evaluations]
  assert len(signs) > 2 * 4  # of life, in the test pass too
  for one, evaluation in zip(trained, evaluations):
    for tree in (one.encoder, evaluation.weights):
      assert jax.tree.map(lambda x: np.asarray(x).tobytes(), tree) == before
  one, eight = (jax.tree.leaves(t.head) for t in trained)
  assert any(np.any(x != 0) for x in one)
  for a, b in zip(one, eight):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  for key in figures[0]:
    np.testing.assert_allclose(figures[0][key], figures[1][key], atol=0.2, err_msg=key)


def test_every_pixel_of_an_uneven_set_counts_once(tmp_path):
  source = write_masks(tmp_path, n=5, size=(24, 32))
  file = tmp_path / "images" / "train" / "3.png"
  write_masks(tmp_path, n=8, first=20, split="more")
  file.write_bytes(file.read_bytes()[:-300])  # its header is whole, its pixels are not
  figures = run(
    make_evaluation(folder=tmp_path), source=source, train_split="more", test_split="train",
    steps=1, **FIT,
  )  # fmt: skip
  assert figures["segmentation/damaged"] == 1
  with open(tmp_path / "segmentation.csv", newline="") as file:
    assert sum(int(row["true_pixels"]) for row in csv.DictReader(file)) == 4 * 24 * 32


def test_a_head_that_is_not_known_and_a_source_that_is_not_given_are_refused(masks):
  with pytest.raises(ValueError, match="head is 'linaer'; expected one of linear, light"):
    run(make_evaluation(), source=masks, head="linaer")
  with pytest.raises(ValueError, match="source is ''; expected 'masks:PATH'"):
    run(make_evaluation())


def test_a_grid_that_does_not_divide_the_view_is_refused(masks):
  with pytest.raises(ValueError, match="stride 3 makes a grid of 4 pixels, which does not divide"):
    run(make_evaluation(), source=masks, size=30, stride=3, test_split="train")


def test_colours_of_classes_differ():
  for n in (2, 11, 40):
    assert len({tuple(c) for c in segmentation.palette(n)}) == n
