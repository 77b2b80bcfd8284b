"""digit_scenes against scikit-learn's file, and against what a scene says of itself."""

import functools
import hashlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ssrl_jax.data.digits import FIRST_TEST_DIGIT, DigitScenes, backdrop, scene


@functools.lru_cache
def scenes(split, count, size):
  return [scene(0, i, split=split, size=size) for i in range(count)]


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b))


# Pure functions of (seed, split, index)


def test_scene_depends_on_seed_split_and_index_alone():
  first = scene(3, 5, split="train")
  others = [scene(4, 5, split="train"), scene(3, 6, split="train"), scene(3, 5, split="test")]
  assert same(first, scene(3, 5, split="train"))
  for other in others:
    assert (first.image != other.image).mean() > 0.5


def test_scene_is_the_same_in_another_process():
  code = (
    "import hashlib; from ssrl_jax.data.digits import scene;"
    "print(hashlib.sha256(scene(1, 2**63, split='test', size=48).image).hexdigest())"
  )
  digest = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  here = hashlib.sha256(scene(1, 2**63, split="test", size=48).image).hexdigest()
  assert digest.stdout.strip() == here


def test_neighbouring_scenes_share_no_random_numbers():
  # Streams that overlap would show as noise of one scene that is found, shifted, in the next.
  images = np.stack([s.image for s in scenes("train", 100, 32)]).astype(np.float64)
  grain = (images[:, :, 1:] - images[:, :, :-1]).reshape(100, -1)
  grain = np.clip(grain, -20, 20)  # tames the edges
  for shift in range(33):
    one, other = grain[:-1, shift:], grain[1:, : grain.shape[1] - shift]
    assert abs((one * other).mean()) < 0.03 * (grain**2).mean(), shift


@pytest.mark.parametrize("index", [0, np.int64(7), 2**32 + 1, 2**63 - 1, 2**64 - 1])
def test_any_index_has_a_scene(index):
  assert 0 <= scene(2**64 - 1, index, split="train").label <= 9


# What a scene says of itself


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("split", ["train", "test"])
def test_scene_has_the_documented_shapes_and_types(split, size):
  for s in scenes(split, 40, size):
    assert (s.image.shape, s.image.dtype) == ((size, size, 3), np.uint8)
    assert (s.mask.shape, s.mask.dtype) == ((size, size), bool)
    assert (s.box.shape, s.box.dtype) == ((4,), np.float32)
    assert type(s.label) is int


@pytest.mark.parametrize("size", [32, 64])
def test_box_holds_exactly_the_mask(size):
  for s in scenes("train", 200, size):
    rows, columns = np.nonzero(s.mask)
    assert s.box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("size", [32, 64])
def test_digit_touches_its_mask_and_nothing_else(size):
  hits = total = 0
  for i, s in enumerate(scenes("test", 200, size)):
    changed = (s.image != backdrop(0, i, split="test", size=size)).any(-1)
    assert not (changed & ~s.mask).any()
    hits, total = hits + changed.sum(), total + s.mask.sum()
  assert hits > 0.999 * total


def test_digit_stands_out_from_its_ground():
  gaps = []
  for s in scenes("test", 400, 32):
    grey = s.image @ np.array([0.299, 0.587, 0.114])
    inside, outside = np.median(grey[s.mask]), np.median(grey[~s.mask])
    gaps.append(inside - outside)
  assert np.percentile(gaps, 2) > 40


def test_layout_does_not_depend_on_the_size():
  for small, large in zip(scenes("train", 100, 32), scenes("train", 100, 64)):
    assert small.label == large.label
    np.testing.assert_allclose(small.box, large.box / 2, atol=1.01)


def cropped(mask):
  """A 12x12 picture of a mask's content, whatever its place and proportions."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
  return np.asarray(Image.fromarray(part).resize((12, 12), Image.Resampling.BOX)).ravel()


@pytest.mark.parametrize("split", ["train", "test"])
def test_masks_show_the_label_in_the_handwriting_of_the_split(split):
  digits = load_digits()
  enlarged = [
    np.asarray(Image.fromarray(d.astype(np.float32)).resize((64, 64), Image.Resampling.BICUBIC))
    for d in digits.images
  ]
  file_ND = np.stack([cropped(picture > 8) for picture in enlarged])
  found = [
    int(np.argmin(((file_ND - cropped(s.mask).reshape(1, -1)) ** 2).sum(1)))
    for s in scenes(split, 200, 64)
  ]
  labels = [s.label for s in scenes(split, 200, 64)]
  assert np.mean(digits.target[found] == labels) > 0.9  # measured 0.97
  share_of_test_part = np.mean(np.array(found) >= FIRST_TEST_DIGIT)  # measured 0.08 and 0.74
  assert share_of_test_part < 0.25 if split == "train" else share_of_test_part > 0.55


def test_split_is_cut_where_a_writer_begins():
  target = load_digits().target
  form = "0123456789" * 3  # every writer's form begins so
  starts = [m.start() for m in re.finditer(form, "".join(map(str, target)))]
  assert {1157, FIRST_TEST_DIGIT, 1415} <= set(starts)
  assert all(np.bincount(target[:FIRST_TEST_DIGIT]) > 120)
  assert all(np.bincount(target[FIRST_TEST_DIGIT:]) > 40)


# Statistics

ENDS = (slice(0, 16), slice(16, 32))


def test_labels_and_places_are_spread_evenly():
  drawn = scenes("train", 2000, 32)
  counts = np.bincount([s.label for s in drawn], minlength=10)
  assert np.all(np.abs(counts - 200) < 4 * np.sqrt(200 * 0.9))
  cover = np.mean([s.mask for s in drawn], 0)
  quarters = [cover[rows, columns] for rows in ENDS for columns in ENDS]
  assert cover.max() < 0.5  # no place shows the digit in most scenes
  assert all(0.8 < quarter.mean() / cover.mean() < 1.25 for quarter in quarters)
  centres = np.array([(s.box[:2] + s.box[2:]) / 64 for s in drawn])
  assert np.all(np.abs(centres.mean(0) - 0.5) < 0.02)
  assert np.all(np.ptp(centres, 0) > 0.45)


def test_raw_pixels_do_not_tell_the_digits():
  bank, queries = scenes("train", 2000, 32), scenes("test", 300, 32)
  bank_ND = np.stack([s.image.ravel() for s in bank]).astype(np.float32)
  query_ND = np.stack([s.image.ravel() for s in queries]).astype(np.float32)
  distance_QN = (bank_ND**2).sum(1).reshape(1, -1) - 2 * query_ND @ bank_ND.T
  nearest = distance_QN.argmin(1)
  right = np.mean([bank[n].label == s.label for n, s in zip(nearest, queries)])
  assert right < 0.3


# The source


def test_source_gives_its_scenes():
  source = DigitScenes(split="test", size=48, num_examples=20, seed=5)
  assert len(source) == 20
  assert len(list(source)) == 20
  assert (source.num_classes, source.class_names) == (10, tuple("0123456789"))
  for i in (3, np.int32(19), 3):
    expected = scene(5, i, split="test", size=48)
    assert same(source.scene(i), expected)
    np.testing.assert_array_equal(source[i]["image"], expected.image)
    assert source[i]["label"] == expected.label
    assert type(source[i]["label"]) is int


def test_source_renders_once_and_hands_out_copies(monkeypatch):
  source = DigitScenes(split="train", num_examples=3)
  first = source[1]["image"].copy()
  source[1]["image"][:] = 0
  monkeypatch.setattr("ssrl_jax.data.digits.scene", None)
  np.testing.assert_array_equal(source[1]["image"], first)


def test_source_pickles_without_its_pictures():
  source = DigitScenes(split="train", size=64, num_examples=1000, seed=2)
  images = [source[i]["image"] for i in range(3)]
  frozen = pickle.dumps(source)
  thawed = pickle.loads(frozen)
  assert len(frozen) < 500
  assert repr(thawed) == repr(source)
  assert repr(source) == "DigitScenes(split='train', size=64, num_examples=1000, seed=2)"
  assert all(np.array_equal(thawed[i]["image"], images[i]) for i in range(3))


def test_source_too_large_to_keep_still_gives_every_scene():
  source = DigitScenes(split="train", num_examples=2**62)
  last = source[2**62 - 1]
  np.testing.assert_array_equal(last["image"], scene(0, 2**62 - 1, split="train").image)


@pytest.mark.parametrize("index", [-1, 4, 2**70])
def test_source_refuses_positions_outside(index):
  with pytest.raises(IndexError, match="num_examples=4"):
    DigitScenes(split="train", num_examples=4)[index]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"split": "val"}, "'val'.*train and test"),
    ({"size": 8}, "size is 8.*16 to 128"),
    ({"size": 256}, "size is 256.*16 to 128"),
    ({"num_examples": 0}, "num_examples is 0"),
    ({"seed": -1}, "seed is -1"),
  ],
)
def test_wrong_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    DigitScenes(**{"split": "train", "num_examples": 4, **options})
