"""Memory that is used again: not while anything shows it, and nothing of before is left in it."""

import gc
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data.memory import Recycled
from ssrl_jax.data.pipeline import eval_batches, train_batches
from ssrl_jax.data.sources import open_source


def address(array):
  return array.__array_interface__["data"][0]


@pytest.mark.parametrize(
  "show",
  [
    lambda a: a,
    lambda a: a[1:],
    lambda a: a[0, 0].reshape(-1).view(np.uint16)[::2],
    lambda a: memoryview(a[1]),
    lambda a: jax.numpy.asarray(a),
    lambda a: [a[2]],
  ],
)
def test_memory_is_used_again_only_when_nothing_shows_it(show):
  memory = Recycled()
  first = memory.empty((3, 64, 64, 4))
  first[:] = 7
  held, where = show(first), address(first)
  del first
  second = memory.empty((3, 64, 64, 4))
  second[:] = 8
  values = held[0] if isinstance(held, list) else held
  assert set(np.asarray(values).reshape(-1).tolist()) <= {7, 7 * 257}
  copied = isinstance(held, jax.Array)  # by JAX, or not: either is right
  assert copied or address(second) != where
  del held, values
  gc.collect()
  third = memory.empty((3, 64, 64, 4))
  assert address(third) == where or copied
  assert address(memory.empty((5,))) not in (address(second), where)


def test_no_more_memory_than_arrays_at_once():
  memory, seen = Recycled(), set()
  for _ in range(100):
    pair = [memory.empty((1000,), np.float32) for _ in range(2)]
    seen |= {address(a) for a in pair}
    del pair
  assert len(seen) == 2


def test_threads_never_share_memory():
  memory, wrong = Recycled(), []

  def work(number):
    for _ in range(300):
      mine = memory.empty((4096,))
      mine[:] = number
      if not (mine == number).all():
        wrong.append(number)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert not wrong


@pytest.fixture
def folder(tmp_path):
  """41 pictures of different sizes, each fifth damaged."""
  for i in range(41):
    pixels = np.full((20 - i % 7, 8 + i % 11, 3), 200 + i, np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
  for i in range(0, 41, 5):
    (tmp_path / f"{i:02}.png").write_bytes(b"no picture")
  return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_of_earlier_batches_is_left(folder, workers):
  source = open_source(f"folder:{folder}", split="train")
  options = {"batch_size": 4, "canvas": 24, "workers": workers}
  batches, seen = eval_batches(source, **options), []
  for batch in batches:  # each is gone when the next is made
    for image, (h, w), weight in zip(batch["image"], batch["extent"], batch["weight"]):
      inside = image[:h, :w] if weight else image[:0]
      assert image.sum() == inside.sum()
      seen += [int(inside.max())] if weight else []
  batches.close()
  assert seen == [200 + i for i in range(41) if i % 5]


def test_batches_that_are_kept_stay_as_they_are(folder):
  source = open_source(f"folder:{folder}", split="train")
  batches = train_batches(source, seed=0, batch_size=4, start_step=0, canvas=24)
  kept = [next(batches) for _ in range(12)]
  copies = [b["image"].copy() for b in kept]
  for _ in range(12):
    next(batches)
  batches.close()
  assert len({address(b["image"]) for b in kept}) == 12
  for batch, copy in zip(kept, copies):
    np.testing.assert_array_equal(batch["image"], copy)
