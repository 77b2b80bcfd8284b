import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from ssrl_jax import corruptions, parallel
from ssrl_jax.corruptions import NAMES, NOISES, SEVERITIES
from ssrl_jax.corruptions.levels import ALEXNET_ERROR
from ssrl_jax.data.sources import Part
from ssrl_jax.evaluate import linear, robustness
from ssrl_jax.evaluate.features import Evaluation, raw_pixels

SIZE = 8
CLASSES = ("a", "b", "c")


class Stripes:
  """Class c has its bright third in another place; grey noise besides."""

  num_classes = 3
  class_names = CLASSES

  def __init__(self, n, *, seed=0, unlabelled=()):
    np_rng = np.random.default_rng(seed)
    self.images = np_rng.integers(60, 140, (n, SIZE, SIZE, 3), np.uint8)
    for i, image in enumerate(self.images):
      image[3 * (i % 3) : 3 * (i % 3) + 2] += 70
    self.unlabelled = unlabelled

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    return {"image": self.images[i], "label": -1 if i in self.unlabelled else i % 3}

  def __repr__(self):
    return f"Stripes({len(self)})"


def make(num_devices=8, folder=None, **options):
  options = {"train": Stripes(30), "test": Stripes(21, seed=1)} | options
  return Evaluation(
    raw_pixels, (), num_classes=3, mesh=parallel.make_mesh(num_devices), canvas=SIZE, size=SIZE,
    crop=1.0, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=8, folder=folder, **options,
  )  # fmt: skip


@pytest.fixture
def few(monkeypatch):
  """Only corruptions that compile at once; the names stay those of three groups."""
  names = ("gaussian_noise", "impulse_noise", "contrast", "jpeg_compression")
  monkeypatch.setattr(robustness, "NAMES", names)
  monkeypatch.setattr(robustness, "NOISES", names[:2])
  return names


QUICK = {"probe_epochs": 10, "sigmas": (0.001, 2.0)}


def table(folder):
  with (folder / "robustness.csv").open(newline="") as file:
    return {(r["corruption"], r["severity"]): r for r in csv.DictReader(file)}


def test_figures_are_means_of_the_table_and_the_table_that_of_the_probe(few, tmp_path):
  test = Stripes(21, seed=1, unlabelled=(3,))
  evaluation = make(folder=tmp_path / "run" / "evaluation" / "trained", test=test)
  figures = robustness.run(evaluation, **QUICK)
  rows = table(evaluation.folder)
  assert len(rows) == 1 + 5 * len(few) + 2
  assert {int(r["num_pictures"]) for r in rows.values()} == {20}
  mean = {n: np.mean([float(rows[n, str(s)]["accuracy"]) for s in SEVERITIES]) for n in few}
  for name in few:
    assert figures[f"robustness/{name}"] == pytest.approx(mean[name], abs=1e-3)
  assert figures["robustness/mean"] == pytest.approx(np.mean(list(mean.values())), abs=1e-3)
  assert figures["robustness/noise"] == pytest.approx(np.mean([mean[n] for n in few[:2]]), abs=1e-3)
  assert figures["robustness/num_test"] == 20
  clean = linear.run(evaluation, epochs=10)["linear/accuracy"]
  assert figures["robustness/clean"] == clean == figures["robustness/sigma_0.001"] > 90
  assert figures["robustness/sigma_2"] < 70

  probe = linear.fit_probe(evaluation, epochs=10)
  labelled = [i for i in range(21) if i != 3]
  x = test.images[labelled].astype(np.float32) / 255
  ids = np.stack([labelled, np.zeros(20)], 1).astype(np.uint32)
  seen = np.asarray(corruptions.corrupt(x, ids, name="impulse_noise", severity=5, seed=0))
  right = probe.logits(((seen - 0.5) / 0.25).reshape(20, -1)).argmax(1) == np.array(labelled) % 3
  accuracy = float(rows["impulse_noise", "5"]["accuracy"])
  assert accuracy == pytest.approx(100 * right.mean(), abs=1e-3)
  with Image.open(evaluation.folder / "robustness.png") as picture:
    assert picture.size[0] > 300


def test_1_device_and_other_batches_give_the_same(few):
  expected = robustness.run(make(), judge="knn", k=3, **QUICK)
  other = dataclasses.replace(make(1), batch_size=4)
  assert robustness.run(other, judge="knn", k=3, **QUICK) == expected


def test_num_test_takes_pictures_spread_evenly(few):
  assert robustness.run(make(), num_test=7, **QUICK)["robustness/num_test"] == 7


def test_mce_divides_by_the_baseline_s_errors(monkeypatch):
  accuracy = {n: 100 - 50 * ALEXNET_ERROR[n] for n in NAMES}  # half of AlexNet's errors
  alexnet = {n: 100 * e for n, e in ALEXNET_ERROR.items()}
  assert robustness.mce(accuracy, alexnet) == pytest.approx(50)
  monkeypatch.setattr(robustness, "NAMES", ("fog", "snow"))
  found = robustness.mce({"fog": 90, "snow": 70}, {"fog": 40, "snow": 20})
  assert found == pytest.approx(100 * (10 / 40 + 30 / 20) / 2)


def test_baseline_of_another_run_is_named_and_must_be_alike(few, tmp_path):
  folder = tmp_path / "first" / "evaluation" / "random_init"
  evaluation = make(folder=folder)
  robustness.run(evaluation, judge="knn", k=3, **QUICK)
  path = folder / "robustness.json"
  found = json.loads(path.read_text())
  found["errors"] = dict.fromkeys(few, 50.0)
  path.write_text(json.dumps(found))
  options = {"judge": "knn", "k": 3, "baseline": str(path)} | QUICK
  figures = robustness.run(dataclasses.replace(evaluation, folder=None), **options)
  expected = 100 * (100 - figures["robustness/mean"]) / 50
  assert figures["robustness/mce_vs_first-random_init"] == pytest.approx(expected)
  with pytest.raises(ValueError, match=r"'num_test': 21.*'num_test': 9.*must be alike"):
    robustness.run(evaluation, num_test=9, **options)
  fewer = dataclasses.replace(evaluation, test=Part(evaluation.test, np.arange(20)))
  with pytest.raises(ValueError, match=r"'num_test': 21.*'num_test': 20.*must be alike"):
    robustness.run(fewer, **options)
  with pytest.raises(ValueError, match=r"'judge': 'knn'.*'judge': 'linear'.*must be alike"):
    robustness.run(evaluation, **options | {"judge": "linear"})


def test_baseline_that_is_another_file_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  path = tmp_path / "robustness.json"
  alike = {"crop": 1.0, "judge": "linear", "num_classes": 3, "num_test": 0}
  whole = {"name": "x", "table": "cifar10_c", "size": SIZE, **alike, "errors": {"fog": 50}}
  for text in ("no JSON", "[1]", '{"linear/top1": 3}', json.dumps(whole)):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is not the robustness.json that") as error:
      robustness.run(make(1), baseline="~/robustness.json")
    assert "\n" not in str(error.value)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=f"baseline: no file {path}"):
    robustness.run(make(1), baseline="~/robustness.json")


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"judge": "svm"}, "judge is 'svm'; expected 'linear' or 'knn'"),
    ({"source": "imagenet"}, "source is 'imagenet'; expected"),
    ({"sigmas": (0.0,)}, "expected positive deviations"),
  ],
)
def test_options_out_of_range_are_errors(options, match):
  with pytest.raises(ValueError, match=match):
    robustness.run(make(), **options)


def publish(write):
  """Five pictures a condition; at severity s, s - 1 of them are those of another class."""
  clean = Stripes(10)  # of the training pictures, so that 1-NN knows them
  for place, name in enumerate(NAMES):
    for s in SEVERITIES:
      for i in range(5):
        wrong = name != "fog" and i < s - 1
        write(place, name, s, i, clean.images[i + 1 if wrong else i], i % 3)


def check_published(folder, source):
  figures = robustness.run(make(folder=folder), judge="knn", k=1, sigmas=(), source=source)
  rows = table(folder)
  for s in SEVERITIES:
    assert float(rows["snow", str(s)]["accuracy"]) == pytest.approx(100 * (6 - s) / 5)
  assert figures["robustness/fog"] == 100
  for name in set(NAMES) - {"fog"}:
    assert figures[f"robustness/{name}"] == pytest.approx(60)
  assert figures["robustness/noise"] == pytest.approx(60)
  assert len(NOISES) == 3


def test_published_cifar10_c_is_read(tmp_path):
  arrays = np.zeros((15, 25, SIZE, SIZE, 3), np.uint8)
  labels = np.zeros(25, np.uint8)

  def write(place, name, s, i, image, label):
    arrays[place, 5 * (s - 1) + i], labels[5 * (s - 1) + i] = image, label

  publish(write)
  for name, array in zip(NAMES, arrays):
    np.save(tmp_path / f"{name}.npy", array)
  np.save(tmp_path / "labels.npy", labels)
  check_published(tmp_path / "out", f"cifar10_c:{tmp_path}")
  np.save(tmp_path / "labels.npy", labels + 1)
  with pytest.raises(ValueError, match=r"the labels of \d classes, and the run's pictures \d;"):
    check_published(tmp_path / "out", f"cifar10_c:{tmp_path}")
  np.save(tmp_path / "labels.npy", labels[:20])
  with pytest.raises(ValueError, match=r"expected \[5 N, H, W, 3\] and \[5 N\]"):
    check_published(tmp_path / "out", f"cifar10_c:{tmp_path}")
  (tmp_path / "snow.npy").unlink()
  with pytest.raises(FileNotFoundError, match=r"1 of 16 are missing, the first snow\.npy"):
    check_published(tmp_path / "out", f"cifar10_c:{tmp_path}")


def test_published_imagenet_c_is_read(tmp_path):
  def write(place, name, s, i, image, label):
    folder = tmp_path / name / str(s) / CLASSES[label]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{i}.png")

  publish(write)
  check_published(tmp_path / "out", f"imagenet_c:{tmp_path}")
  for path in (tmp_path / "fog" / "2" / "c").iterdir():
    path.unlink()
  with pytest.raises(ValueError, match="classes only in the first: \\['c'\\]"):
    check_published(tmp_path / "out", f"imagenet_c:{tmp_path}")


def test_alexnet_s_errors_are_of_the_published_pictures_only():
  evaluation = dataclasses.replace(make(), size=224, num_classes=1000)
  assert robustness._baseline(evaluation, "", {"table": "imagenet_c"}) is None
  published = {"table": "published imagenet_c"}
  assert robustness._baseline(evaluation, "", published)[0] == "alexnet"
  smaller = dataclasses.replace(evaluation, size=160)
  assert robustness._baseline(smaller, "", published) is None
