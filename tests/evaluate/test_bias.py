import csv

import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.evaluate import bias
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, raw_pixels

UNUSED_VIEW = {"canvas": 1, "size": 1, "crop": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}


class Names:
  num_classes, class_names = 3, ("ant", "bee", "cat")

  def __len__(self):
    return 60


def judge(folder=None):
  """Separable; of 60 test pictures the first 4 bees look like cats, and the last has no label."""
  label = np.repeat([0, 1, 2], 20).astype(np.int32)
  x = np.eye(3, dtype=np.float32)[label] + 0.01 * np.random.default_rng(0).normal(size=(60, 3))
  test = x.astype(np.float32).copy()
  test[20:24] = test[40]
  test_label = label.copy()
  test_label[59] = -1
  sets = {"train": (x, label), "test": (test, test_label)}
  cache = {
    (k, "pooled"): FeatureSet(x.astype(np.float32), y, np.arange(60)) for k, (x, y) in sets.items()
  }
  return Evaluation(
    raw_pixels, (), train=Names(), test=Names(), num_classes=3, mesh=parallel.make_mesh(1),
    batch_size=1, cache=cache, folder=folder, **UNUSED_VIEW,
  )  # fmt: skip


def test_worst_class_and_gap_of_a_hand_case(tmp_path):
  figures = bias.run(judge(tmp_path), probe_epochs=20)
  assert figures["bias/accuracy"] == pytest.approx(100 * 55 / 59)
  assert figures["bias/worst_class"] == pytest.approx(80)
  assert figures["bias/worst_class_index"] == 1
  assert figures["bias/class_gap"] == pytest.approx(20)
  assert figures["bias/class_mean"] == pytest.approx(280 / 3)
  assert "bias/worst_group" not in figures
  with (tmp_path / "bias.csv").open(newline="") as file:
    rows = {r["name"]: r for r in csv.DictReader(file)}
  assert [rows[n]["num_pictures"] for n in ("ant", "bee", "cat")] == ["20", "20", "19"]
  assert float(rows["bee"]["accuracy"]) == 80


def groups_of(path):
  """Group 0: 9 ants and a wrong bee; 2: the other 3 wrong bees; 1: the 27 others but for cats."""
  group = np.full(60, -1)
  group[:40], group[:9], group[20], group[21:24] = 1, 0, 0, 2
  np.save(path, group)
  return group


def test_groups_are_counted_and_the_worst_is_found(tmp_path):
  group = groups_of(tmp_path / "g.npy")
  figures = bias.run(judge(), groups=str(tmp_path / "g.npy"), probe_epochs=20)
  assert figures["bias/worst_group"] == pytest.approx(
    90
  )  # group 2 has 0, and is too small to count
  assert figures["bias/group_gap"] == pytest.approx(10)
  assert figures["bias/num_groups"] == 3
  assert figures["bias/ungrouped"] == 19  # one of the 20 cats has no label
  lines = ["position,group", *(f"{i},{'' if g < 0 else f'site {g}'}" for i, g in enumerate(group))]
  (tmp_path / "g.csv").write_text("\n".join(lines) + "\n")
  assert bias.run(judge(), groups=str(tmp_path / "g.csv"), probe_epochs=20) == figures


def test_groups_saved_by_excel_are_read(tmp_path):
  (tmp_path / "g.csv").write_text("group\r\nnorth\r\n-1\r\n", encoding="utf-8-sig")
  assert bias.read_groups(str(tmp_path / "g.csv"), 2).tolist() == ["north", ""]


def test_groups_that_do_not_fit_are_errors(tmp_path):
  path = tmp_path / "g.npy"
  np.save(path, np.zeros(59, int))
  with pytest.raises(ValueError, match="59 groups, but there are 60 test pictures"):
    bias.run(judge(), groups=str(path))
  np.save(path, np.zeros(60))
  with pytest.raises(ValueError, match="expected whole numbers"):
    bias.run(judge(), groups=str(path))
  (tmp_path / "g.csv").write_text("a,b\n1,2\n")
  with pytest.raises(ValueError, match="one must be 'group'"):
    bias.run(judge(), groups=str(tmp_path / "g.csv"))
  with pytest.raises(FileNotFoundError, match="no file"):
    bias.run(judge(), groups=str(tmp_path / "absent.npy"))


def test_classes_too_small_for_the_worst_are_an_error():
  with pytest.raises(ValueError, match="no class has 30 labelled test pictures"):
    bias.run(judge(), min_count=30, probe_epochs=1)
