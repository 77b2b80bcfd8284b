import os

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data.sources import FolderSource
from ssrl_jax.evaluate.labels import choose_ids, draw, read_list, symmetric_noise
from tests.evaluate.tiny import Tints

LABELS = np.repeat([0, 1, 2, -1], [40, 20, 60, 30])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("pictures")
  for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/7.png"):
    os.makedirs(root / "train" / os.path.dirname(name), exist_ok=True)
    Image.new("RGB", (2, 2)).save(root / "train" / name)
  return FolderSource(str(root), split="train")


def listed(tmp_path, text):
  path = tmp_path / "list.txt"
  path.write_text(text, encoding="utf-8")
  return str(path)


def test_fraction_takes_its_share_of_each_class_and_no_unknown_label():
  rows = draw(LABELS, 3, fraction=0.1)
  assert np.bincount(LABELS[rows]).tolist() == [4, 2, 6]
  assert np.all(np.diff(rows) > 0)


def test_number_per_class_is_balanced():
  assert np.bincount(LABELS[draw(LABELS, 3, num_per_class=20)]).tolist() == [20, 20, 20]


def test_draw_is_seeded_and_nested():
  few, again, other, more = (
    draw(LABELS, 3, num_per_class=n, seed=s) for n, s in ((5, 0), (5, 0), (5, 1), (9, 0))
  )
  np.testing.assert_array_equal(few, again)
  assert not np.array_equal(few, other)
  assert set(few) < set(more)


def test_every_row_is_as_likely():
  counts = np.zeros(len(LABELS))
  for seed in range(400):
    counts[draw(LABELS, 3, num_per_class=5, seed=seed)] += 1
  assert counts[LABELS < 0].sum() == 0
  for label, size in ((0, 40), (1, 20), (2, 60)):
    mine, share = counts[label == LABELS], 5 / size
    assert mine.sum() == 2000
    assert np.abs(mine - 400 * share).max() < 5 * np.sqrt(400 * share * (1 - share))


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"fraction": 0.02}, "fraction 0.02 leaves class 1 of 20 pictures without a label; .*0.05,"),
    ({"fraction": 0.0}, "label fraction is 0.0"),
    ({"fraction": 1.1}, "label fraction is 1.1"),
    ({"num_per_class": 21}, "num_per_class is 21, but class 1 has 20 .*; ask for at most 20"),
    ({"num_per_class": -1}, "num_per_class is -1"),
  ],
)
def test_draw_that_cannot_be_is_an_error_of_one_line(options, match):
  with pytest.raises(ValueError, match=match) as error:
    draw(LABELS, 3, **options)
  assert "\n" not in str(error.value)


def test_class_without_pictures_is_an_error():
  with pytest.raises(ValueError, match="class 3 of 0 pictures without a label"):
    draw(LABELS, 4, fraction=0.5)


def test_list_of_names_finds_the_pictures(folder, tmp_path):
  file = listed(tmp_path, "dog/1.png\n\n2.png\n7.png\n")
  np.testing.assert_array_equal(read_list(file, folder), [1, 2, 3])
  np.testing.assert_array_equal(choose_ids(folder, labels_file=file), [1, 2, 3])


def test_list_of_positions_is_taken(folder, tmp_path):
  np.testing.assert_array_equal(read_list(listed(tmp_path, "3\n0"), folder), [0, 3])


def test_list_may_begin_with_the_mark_of_an_editor(folder, tmp_path):
  np.testing.assert_array_equal(read_list(listed(tmp_path, "\ufeff3\n0"), folder), [0, 3])


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("", "is empty"),
    ("8.png", "0 pictures of .* are named 8.png; correct the list"),
    ("1.png", "2 pictures of .* are named 1.png; add its folder"),
    ("at/1.png", "0 pictures of .* are named at/1.png"),
    ("0\n4", "lists number 4, but .* ends at 3"),
    ("2\n2", "lists picture 2 more than once"),
  ],
)
def test_list_that_does_not_fit_is_an_error_of_one_line(folder, tmp_path, text, match):
  with pytest.raises(ValueError, match=match) as error:
    read_list(listed(tmp_path, text), folder)
  assert "\n" not in str(error.value)


def test_list_that_is_missing_is_an_error(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="labels_file names a text file"):
    read_list(str(tmp_path / "none.txt"), folder)


def test_list_of_names_for_a_source_without_them_is_an_error(tmp_path):
  with pytest.raises(
    ValueError, match=r"lists file names, and Tints\(8\) has none; list positions"
  ):
    read_list(listed(tmp_path, "a.png"), Tints(8))


def test_list_of_a_picture_without_label_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"lists 1 pictures without a label, e\.g\. number 5"):
    choose_ids(Tints(8, unlabelled=(5,)), labels_file=listed(tmp_path, "1\n5"))


def test_unlabelled_source_is_an_error():
  with pytest.raises(ValueError, match=r"Tints\(3\) has no labels to choose from"):
    choose_ids(Tints(3, unlabelled=(0, 1, 2)), label_fraction=0.5)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.437])
def test_noise_changes_exactly_its_share_to_other_classes(rate):
  labels = np.random.default_rng(0).integers(0, 5, 1000)
  kept = labels.copy()
  noisy = symmetric_noise(labels, 5, rate=rate, seed=3)
  np.testing.assert_array_equal(labels, kept)
  assert np.sum(noisy != labels) == round(1000 * rate)
  assert noisy.min() >= 0
  assert noisy.max() < 5


def test_noise_is_uniform_over_the_other_classes_and_seeded():
  labels = np.zeros(4000, np.int64)
  noisy = symmetric_noise(labels, 5, rate=0.5, seed=0)
  counts = np.bincount(noisy, minlength=5)
  assert np.abs(counts[1:] - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)
  np.testing.assert_array_equal(noisy, symmetric_noise(labels, 5, rate=0.5, seed=0))
  assert not np.array_equal(noisy, symmetric_noise(labels, 5, rate=0.5, seed=1))


def test_noise_out_of_range_is_an_error():
  with pytest.raises(ValueError, match=r"label_noise is 1\.0"):
    symmetric_noise(np.zeros(4, np.int64), 5, rate=1.0, seed=0)
