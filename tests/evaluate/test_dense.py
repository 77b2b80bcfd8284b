"""The view of annotated pictures, and the training that detection and segmentation share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.data.dense import IGNORE, open_masks
from ssrl_jax.evaluate import dense
from ssrl_jax.evaluate.features import raw_pixels
from ssrl_jax.method import Features
from ssrl_jax.models.dense import LinearSegmenter
from tests.dense_sets import write_masks
from tests.evaluate.dense_common import MEAN, STD, make_evaluation

SIZE = 32
view_images = jax.jit(
  functools.partial(dense.view_images, size=SIZE, mean=MEAN, std=STD),
  compiler_options=parallel.quick_compile(),
)


def canvas(n=4, h=16, w=32, seed=0):
  """Smooth pictures whose mask is 1 in a rectangle, and the rectangle as a box."""
  rng = np.random.default_rng(seed)
  image = np.zeros((n, SIZE, SIZE, 3), np.uint8)
  mask = np.full((n, SIZE, SIZE), IGNORE, np.uint8)
  boxes = np.zeros((n, 2, 4), np.float32)
  for i in range(n):
    left, top = rng.integers(0, w - 9), rng.integers(0, h - 6)
    right, bottom = left + rng.integers(6, 9), top + rng.integers(5, 7)
    image[i, :h, :w], mask[i, :h, :w] = 20, 0
    image[i, top:bottom, left:right], mask[i, top:bottom, left:right] = 220, 1
    boxes[i, 0] = left, top, right, bottom
  return {
    "image": image, "extent": np.full((n, 2), (h, w), np.int32), "mask": mask, "boxes": boxes,
    "box_valid": np.array([[True, False]] * n), "weight": np.ones(n, np.float32),
    "id": np.stack([np.arange(n), np.zeros(n, int)], 1).astype(np.uint32),
  }  # fmt: skip


def look(batch, places):
  pixels = np.asarray(view_images(batch, places)) * STD + MEAN
  mask = dense.view_masks(batch["mask"], batch["extent"], places, size=SIZE)
  return (
    pixels,
    np.asarray(mask),
    dense.view_boxes(batch["boxes"], batch["box_valid"], places, size=SIZE),
  )


def test_the_evaluation_view_of_a_picture_of_its_size_is_the_picture():
  batch = canvas()
  pixels, mask, (boxes, valid) = look(
    batch, dense.draw_places(None, batch, size=SIZE, scales=(1, 1))
  )
  np.testing.assert_allclose(pixels[:, :16], batch["image"][:, :16] / 255, atol=1e-5)
  np.testing.assert_allclose(pixels[:, 16:], np.broadcast_to(MEAN, (4, 16, 32, 3)), atol=1e-6)
  np.testing.assert_array_equal(mask, batch["mask"])
  np.testing.assert_array_equal(boxes, batch["boxes"])
  np.testing.assert_array_equal(valid, batch["box_valid"])


def test_a_smaller_picture_is_enlarged_until_its_longer_side_fits():
  batch = canvas(h=8, w=16)
  batch["boxes"][:, 0] = 4, 2, 12, 6
  places = dense.draw_places(None, batch, size=SIZE, scales=(1, 1))
  _, mask, (boxes, _) = look(batch, places)
  np.testing.assert_array_equal(boxes[:, 0], [[8, 4, 24, 12]] * 4)
  expected = batch["mask"][:, :8, :16].repeat(2, axis=1).repeat(2, axis=2)
  np.testing.assert_array_equal(mask[:, :16], expected)
  assert np.all(mask[:, 16:] == IGNORE)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.6, 1.0), (1.0, 1.8)])
def test_picture_mask_and_boxes_move_together(scales):
  batch = canvas(n=8)
  places = dense.draw_places(jax.random.key(4), batch, size=SIZE, scales=scales)
  assert 0 < np.sum(places.flip_B) < 8
  low, high = scales
  assert np.all((places.scale_B >= low - 1e-6) & (places.scale_B <= high + 1e-6))
  pixels, mask, (boxes, valid) = look(batch, places)
  for i in range(8):
    bright = pixels[i, ..., 0] > 0.55
    assert np.mean(bright == (mask[i] == 1)) > 0.97  # all but the blurred border
    if not valid[i, 0]:
      continue
    rows, columns = np.nonzero(mask[i] == 1)
    edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    np.testing.assert_allclose(boxes[i, 0], edges, atol=1.01)


def test_the_place_of_a_picture_depends_on_key_and_id_only():
  batch, scales = canvas(n=4), (0.5, 2.0)
  draw = functools.partial(dense.draw_places, size=SIZE, scales=scales)
  whole = draw(jax.random.key(0), batch)
  part = draw(jax.random.key(0), {k: v[2:] for k, v in batch.items()})
  for a, b in zip(whole, part):
    np.testing.assert_array_equal(a[2:], b)
  assert len(np.unique(np.asarray(whole.scale_B))) == 4
  assert np.all(draw(jax.random.key(1), batch).scale_B != whole.scale_B)


def test_a_box_cut_to_less_than_a_pixel_is_no_longer_valid():
  batch = canvas(n=2)
  batch["boxes"][:, 0] = [[0, 0, 3.5, 8], [0, 0, 4.5, 8]]
  places = dense.Places(jnp.ones(2), jnp.array([[0, 3.0]] * 2), jnp.zeros(2, bool))
  boxes, valid = dense.view_boxes(batch["boxes"], batch["box_valid"], places, size=SIZE)
  np.testing.assert_allclose(boxes[:, 0], [[0, 0, 0.5, 8], [0, 0, 1.5, 8]])
  np.testing.assert_array_equal(valid[:, 0], [False, True])


class Fixed(nn.Module):
  """A head of one number, for the contract of the training."""

  @nn.compact
  def __call__(self, maps, train):
    (x_BhwC,) = maps.values()
    return jnp.mean(x_BhwC, axis=(1, 2, 3)) * self.param("w", nn.initializers.ones, ())


OPTIONS = {
  "name": "demo", "size": 16, "scales": (1.0, 1.0), "steps": 2, "batch_size": 8,
  "learning_rate": 0.1, "weight_decay": 0.0, "finetune": False, "encoder_rate": 1.0, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
  ("finetune", "encoder_rate"), [(False, 1.0), (True, 0.0), (True, 0.5), (True, 1.0)]
)
def test_an_encoder_moves_only_when_it_is_fine_tuned(tmp_path, finetune, encoder_rate):
  modes = []

  def apply(weights, images, train, key):
    modes.append((train, key is not None))
    maps = {1: images[..., :1] * weights["params"]["w"]}
    stats = {"seen": weights["batch_stats"]["seen"] + 1} if train else weights["batch_stats"]
    return Features(pooled=images[:, 0, 0], maps=maps), stats

  weights = {"params": {"w": jnp.ones(())}, "batch_stats": {"seen": jnp.zeros(())}}
  evaluation = make_evaluation(num_devices=1).with_encoder(apply, weights)
  source = open_masks(write_masks(tmp_path, n=8), split="train")
  loss = lambda outputs, places, batch: jnp.mean((outputs - 3) ** 2)  # noqa: E731
  options = OPTIONS | {"steps": 1, "finetune": finetune, "encoder_rate": encoder_rate}
  trained = dense.train_head(evaluation, Fixed(), loss, source, **options)
  assert modes[0] == (False, False)  # for the shapes
  assert set(modes[1:]) == {(finetune, finetune)}
  head, encoder = float(trained.head["params"]["w"]), float(trained.encoder["params"]["w"])
  np.testing.assert_allclose(abs(head - 1), 0.1, rtol=1e-3)  # one step of Adam
  np.testing.assert_allclose(abs(encoder - 1), 0.1 * encoder_rate * finetune, rtol=1e-3)
  assert float(trained.encoder["batch_stats"]["seen"]) == finetune


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"steps": 0}, "demo: steps is 0"),
    ({"learning_rate": 0.0}, "learning_rate 0.0"),
    ({"scales": (1.2, 0.8)}, r"scales is \(1.2, 0.8\); expected 0 < low <= high"),
    ({"batch_size": 6}, "batch_size 6 is not divisible by 8 devices; nearest: 8"),
  ],
)
def test_options_that_make_no_sense_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dense.train_head(make_evaluation(), Fixed(), None, None, **(OPTIONS | change))


def test_an_encoder_that_does_not_fit_is_refused():
  evaluation = make_evaluation()
  assert dense.map_strides(evaluation, 32, "demo") == [1, 2]
  with pytest.raises(ValueError, match=r"demo: size 33 is not a multiple .* stride 2; nearest: 32"):
    dense.map_strides(evaluation, 33, "demo")
  with pytest.raises(ValueError, match="reads an encoder's maps, and this encoder has none"):
    dense.map_strides(evaluation.with_encoder(raw_pixels, ()), 32, "demo")


def test_linear_head_normalises_what_it_reads():
  head = LinearSegmenter(num_classes=3, stride=2)
  rng = np.random.default_rng(0)
  maps = {2: rng.normal(5, 3, (2, 4, 4, 6)).astype(np.float32)}
  variables = head.init(jax.random.key(0), maps, False)
  _, moved = head.apply(variables, maps, True, mutable=["batch_stats"])
  mean = moved["batch_stats"]["norm"]["mean"]
  np.testing.assert_allclose(mean, 0.1 * maps[2].mean(axis=(0, 1, 2)), rtol=1e-4)
