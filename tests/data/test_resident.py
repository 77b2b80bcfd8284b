import logging

import jax
import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.data import resident
from ssrl_jax.data.decode import DamagedImage
from ssrl_jax.data.pipeline import train_batches
from ssrl_jax.data.sampling import Sampling
from ssrl_jax.data.sources import open_source


class Greys:
  """Picture i is grey level i and its label i % 5; number 7 cannot be read."""

  num_classes, class_names = 5, tuple("abcde")

  def __len__(self):
    return 21

  def __getitem__(self, i):
    image = b"<html>" if i == 7 else np.full((6, 4 + i % 3, 3), i, np.uint8)
    return {"image": image, "label": i % 5}

  def __repr__(self):
    return "Greys(21)"


def load(mesh, limit_mib=1.0, **options):
  options = {"canvas": 8, "workers": 0, "threads": 2} | options
  return resident.load(Greys(), mesh=mesh, limit_mib=limit_mib, **options)


@pytest.mark.parametrize("limit_mib", [1.0, 0.002])  # 4.5 KiB: on each device, or cut over them
def test_gathered_batch_is_the_streamed_one(limit_mib):
  mesh = parallel.make_mesh()
  arrays, substituted = load(mesh, limit_mib)
  assert arrays["image"].sharding.is_fully_replicated == (limit_mib == 1.0)
  assert substituted.tolist() == [i == 7 for i in range(21)]
  weights = np.where(np.arange(21) == 7, 9, 1) / 29  # copies of the damaged one
  uneven = Sampling(weights, np.zeros(21, np.int8))
  options = {"seed": 3, "batch_size": 16, "start_step": 2, "canvas": 8, "sampling": uneven}
  streamed = train_batches(Greys(), **options)
  alone = train_batches(Greys(), **options, resident=substituted)
  for _ in range(3):
    host, ids = next(streamed), next(alone)
    assert ids.keys() == {"id", "substituted"}
    want = parallel.to_device(host, mesh)
    got = jax.jit(lambda a, i: resident.gather(a, i, mesh))(arrays, want["id"])
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_array_equal(got[name], want[name])
      assert got[name].dtype == want[name].dtype
      assert got[name].sharding.is_equivalent_to(want[name].sharding, want[name].ndim)
    np.testing.assert_array_equal(ids["id"], host["id"])
    np.testing.assert_array_equal(ids["substituted"], host["substituted"])
  streamed.close()
  alone.close()


def test_damaged_picture_is_named_once(caplog):
  with caplog.at_level(logging.WARNING, logger="absl"):
    _, substituted = load(parallel.make_mesh(1))
    options = {"seed": 0, "batch_size": 16, "start_step": 0, "canvas": 8}
    batches = train_batches(Greys(), **options, resident=substituted)
    drawn = sum(next(batches)["substituted"].sum() for _ in range(5))
    batches.close()
  assert drawn > 1
  assert sum("example 7 of Greys(21) is damaged" in r.getMessage() for r in caplog.records) == 1


def test_first_picture_may_be_one_whose_bytes_cannot_be_had():
  class Holed(Greys):
    def __getitem__(self, i):
      if i == 0:
        raise DamagedImage("gone")
      return super().__getitem__(i)

  options = {"limit_mib": 1.0, "canvas": 8, "workers": 0, "threads": 2}
  _, substituted = resident.load(Holed(), mesh=parallel.make_mesh(1), **options)
  assert np.flatnonzero(substituted).tolist() == [0, 7]


def test_set_that_does_not_fit_is_refused_with_what_it_needs():
  with pytest.raises(ValueError, match=r"needs 96 MiB, 12 MiB on each of 8 .* allows 11; raise"):
    load(parallel.make_mesh(), 11, canvas=1182)
  resident.placement(96 * 2**20, parallel.make_mesh(), 12)


def test_clips_are_refused(tmp_path):
  from PIL import Image

  for clip in ("x", "y"):
    (tmp_path / clip).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / clip / "1.png")
  source = open_source(f"clips:{tmp_path}", split="train")
  with pytest.raises(ValueError, match=r"has clips.*set data.cache to ''"):
    resident.load(source, canvas=8, mesh=parallel.make_mesh(1), limit_mib=1, workers=0, threads=1)
