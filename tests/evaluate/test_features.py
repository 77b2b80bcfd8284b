import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.evaluate import EVALS, features
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, raw_pixels
from ssrl_jax.evaluate.suite import select
from ssrl_jax.method import Features

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SIZE = 8


class Noise:
  """In-memory pictures of noise; one of them may be damaged."""

  num_classes = 3
  class_names = ("a", "b", "c")

  def __init__(self, n, *, damaged=()):
    self.images = np.random.default_rng(n).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
    self.damaged = damaged

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    image = b"no picture" if i in self.damaged else self.images[i]
    return {"image": image, "label": i % 3}

  def __repr__(self):
    return f"Noise({len(self)})"


def project(weights, images, train, key):
  pooled = jnp.tanh(images.reshape(images.shape[0], -1) @ weights["w"])
  return Features(pooled=pooled.astype(jnp.bfloat16), maps={}), weights


def test_vectors_of_bfloat16_maps_are_averaged_in_float32():
  map_BhwC = np.random.default_rng(0).normal(size=(4, 6, 6, 8)).astype(jnp.bfloat16)
  tokens = map_BhwC.reshape(4, 36, 8)
  found = features.vectors(Features(jnp.zeros((4, 8)), {8: map_BhwC}, tokens=tokens))
  want = np.mean(map_BhwC.astype(np.float64), axis=(1, 2))
  for name in ("map8", "tokens"):
    assert found[name].dtype == jnp.float32
    np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6)


WEIGHTS = {"w": jnp.asarray(np.random.default_rng(9).normal(size=(SIZE * SIZE * 3, 5)) / 10)}


def make(*, apply=raw_pixels, weights=(), num_devices=8, batch_size=8, train=None, test=None):
  return Evaluation(
    apply,
    weights,
    train=train or Noise(21),
    test=test or Noise(13),
    num_classes=3,
    mesh=parallel.make_mesh(num_devices),
    canvas=SIZE,
    size=SIZE,
    crop=1.0,
    mean=MEAN,
    std=STD,
    batch_size=batch_size,
  )


def expected_pixels(images):
  mean, std = np.array(MEAN).reshape(1, 1, 1, 3), np.array(STD).reshape(1, 1, 1, 3)
  return ((images / 255 - mean) / std).reshape(len(images), -1)


@pytest.mark.parametrize("n", [13, 16, 3])
def test_features_hold_each_example_once_in_order(n):
  rows = make(test=Noise(n)).features("test")
  np.testing.assert_array_equal(rows.ids, np.arange(n))
  np.testing.assert_array_equal(rows.labels, np.arange(n) % 3)
  np.testing.assert_allclose(rows.features, expected_pixels(Noise(n).images), atol=2e-5)
  assert (rows.features.dtype, rows.labels.dtype, rows.ids.dtype) == ("f4", "i4", "i8")


def test_features_agree_on_1_and_8_devices():
  one, eight = (
    make(apply=project, weights=WEIGHTS, num_devices=n).features("train") for n in (1, 8)
  )
  np.testing.assert_allclose(one.features, eight.features, atol=1e-2)  # bfloat16 features
  np.testing.assert_array_equal(one.ids, eight.ids)


def test_features_are_extracted_once():
  evaluation = make()
  assert evaluation.features("test") is evaluation.features("test")


def test_features_of_another_encoder_are_not_carried_over():
  pixels = make()
  pixels.features("test")
  other = pixels.with_encoder(project, WEIGHTS)
  assert other.features("test").features.shape == (13, 5)
  assert pixels.features("test").features.shape == (13, SIZE * SIZE * 3)


def test_damaged_pictures_are_left_out_and_counted(caplog):
  rows = make(test=Noise(13, damaged=(4,))).features("test")
  np.testing.assert_array_equal(rows.ids, np.delete(np.arange(13), 4))
  assert "1 of 13 test pictures" in caplog.text


def test_no_readable_picture_is_an_error():
  with pytest.raises(ValueError, match="none of the 2 test pictures"):
    make(test=Noise(2, damaged=(0, 1))).features("test")


def test_features_that_are_not_finite_are_an_error():
  evaluation = make(apply=project, weights={"w": WEIGHTS["w"].at[0, 0].set(jnp.nan)})
  with pytest.raises(FloatingPointError, match="13 of 13 test pictures"):
    evaluation.features("test")


def test_labels_beyond_the_classes_are_an_error():
  evaluation = dataclasses.replace(make(), num_classes=2)  # the source has labels 0 to 2
  with pytest.raises(ValueError, match="label 2, but there are 2 classes"):
    evaluation.features("test")


def test_ids_beyond_32_bits_survive(monkeypatch):
  ids = 2**33 + np.arange(8)
  batch = {
    "image": np.zeros((8, SIZE, SIZE, 3), np.uint8),
    "extent": np.full((8, 2), SIZE, np.int32),
    "label": np.zeros(8, np.int32),
    "id": ids,
    "weight": np.ones(8, np.float32),
  }

  def batches(source, **options):
    yield batch

  monkeypatch.setattr(features, "eval_batches", batches)
  np.testing.assert_array_equal(make(test=Noise(8)).features("test").ids, ids)


def test_batch_size_that_devices_cannot_share_is_an_error():
  with pytest.raises(ValueError, match="12 is not divisible by 8 devices; nearest: 8 or 16"):
    make(batch_size=12).features("test")


def test_unknown_split_is_an_error():
  with pytest.raises(ValueError, match="'val'; known: train, test"):
    make().features("val")


def test_labelled_leaves_out_and_counts_unknown_labels():
  evaluation = make()
  labels = np.array([0, -1, 2, -1], np.int32)
  evaluation.cache["test", "pooled"] = FeatureSet(np.eye(4, dtype=np.float32), labels, np.arange(4))
  rows, left_out = evaluation.labelled("test")
  assert rows.ids.tolist() == [0, 2]
  assert rows.features.argmax(1).tolist() == [0, 2]
  assert left_out == 2


def test_labelled_without_any_label_is_an_error():
  evaluation = make()
  evaluation.cache["train", "pooled"] = FeatureSet(
    np.zeros((4, 2), np.float32), np.full(4, -1, np.int32), np.arange(4)
  )
  with pytest.raises(ValueError, match="no labels"):
    evaluation.labelled("train")


def test_pictures_are_those_of_the_source():
  ids = [3, 0, 12]
  np.testing.assert_array_equal(make().pictures("test", ids), Noise(13).images[ids])


def test_select_keeps_the_order_and_takes_nothing_for_nothing():
  assert list(select("linear, knn")) == ["linear", "knn"]
  assert select("knn")["knn"] is EVALS["knn"]
  assert select("") == {}


def test_select_names_the_nearest_evaluation():
  with pytest.raises(ValueError, match="unknown evaluation 'kn'; did you mean 'knn'"):
    select("kn")


@pytest.fixture
def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


TWO_PROCESSES = """
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, index, folder, tests = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index))
sys.path.insert(0, tests)
import test_features as t
assert len(jax.devices()) == 4
rows = t.make(apply=t.project, weights=t.WEIGHTS, num_devices=0).features("test")
np.savez(f"{folder}/{index}.npz", *rows)
"""


@pytest.mark.slow
def test_features_on_two_processes_are_those_of_one(tmp_path, free_port):
  here = str(Path(__file__).parent)
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  children = [
    subprocess.Popen(
      [sys.executable, "-c", TWO_PROCESSES, f"127.0.0.1:{free_port}", str(i), str(tmp_path), here],
      env=environment,
    )
    for i in range(2)
  ]
  assert [child.wait(timeout=120) for child in children] == [0, 0]
  alone = make(apply=project, weights=WEIGHTS).features("test")
  for i in range(2):
    with np.load(tmp_path / f"{i}.npz") as found:
      np.testing.assert_allclose(found["arr_0"], alone.features, atol=1e-2)
      np.testing.assert_array_equal(found["arr_1"], alone.labels)
      np.testing.assert_array_equal(found["arr_2"], alone.ids)


def test_raw_pixels_of_large_pictures_are_shrunk():
  """As they are 1,281,167 pictures of 224 px would take 771 GB."""
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 96, 64, 3)), jnp.float32)
  pooled = raw_pixels((), images, False, None)[0].pooled
  assert pooled.shape == (2, 32 * 32 * 3)
  np.testing.assert_allclose(pooled.mean(), images.mean(), atol=1e-2)
  small = images[:, :32, :16]
  np.testing.assert_array_equal(raw_pixels((), small, False, None)[0].pooled, small.reshape(2, -1))
