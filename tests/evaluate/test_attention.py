import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssrl_jax import parallel
from ssrl_jax.evaluate import attention
from ssrl_jax.evaluate.features import Evaluation, raw_pixels
from ssrl_jax.method import Features
from ssrl_jax.models.vit import make_vit

SIZE = 16


def features(attention_BAQN, *grids):
  maps = {2**i: jnp.zeros((attention_BAQN.shape[0], *grid, 3)) for i, grid in enumerate(grids)}
  return Features(pooled=jnp.zeros((1, 3)), maps=maps, attention=jnp.asarray(attention_BAQN))


def test_attention_map_is_the_class_token_s_on_the_patches():
  a = np.random.default_rng(0).uniform(size=(2, 3, 8, 8)).astype(np.float32)  # class, register, 2x3
  found = attention.attention_map(features(a, (4, 6), (2, 3), (1, 2)))
  np.testing.assert_allclose(found, a.mean(1)[:, 0, 2:].reshape(2, 2, 3), rtol=1e-6)


def test_attention_map_of_a_pooling_query_and_without_class_token():
  a = np.random.default_rng(0).uniform(size=(2, 3, 6, 6)).astype(np.float32)
  found = attention.attention_map(features(a[:, :, :1], (2, 3)))
  np.testing.assert_allclose(found, a.mean(1)[:, 0].reshape(2, 2, 3), rtol=1e-6)
  found = attention.attention_map(features(a, (2, 3)))
  np.testing.assert_allclose(found, a.mean((1, 2)).reshape(2, 2, 3), rtol=1e-6)


def test_attention_map_of_a_vit_fits_its_grid():
  model = make_vit(size="pico", patch=8, registers=2)
  images = jnp.zeros((2, SIZE, SIZE, 3))

  def run(key, images):
    weights = model.init(key, images, False)
    return attention.attention_map(model.apply(weights, images, False))

  found = jax.eval_shape(run, jax.random.key(0), images)
  assert found.shape == (2, 2, 2)


def test_similarity_is_the_cosine_with_the_mean_place():
  x = np.random.default_rng(0).normal(size=(2, 3, 3, 5)).astype(np.float32)
  found = attention.similarity_map(Features(jnp.zeros((2, 5)), {4: jnp.zeros((2, 6, 6, 5)),
                                                                8: jnp.asarray(x)}))  # fmt: skip
  mean = x.mean((1, 2), keepdims=True)
  expected = (x * mean).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(mean, axis=-1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def watch(weights, images, train, key):
  """Sees the upper left quarter's brightness, and how bright the rest of the world is: 1."""
  del train, key
  seen = jnp.mean(images[:, : SIZE // 2, : SIZE // 2], axis=(1, 2, 3))
  return Features(pooled=jnp.stack([seen, jnp.ones_like(seen)], 1), maps={}), weights


def test_occlusion_finds_what_the_encoder_watches():
  images = jnp.full((3, SIZE, SIZE, 3), 2.0)
  pooled = lambda x: watch((), x, False, None)[0].pooled  # noqa: E731
  found = np.asarray(attention.occlusion_map(pooled, images, window=0.25))
  assert found.shape == (3, 8, 8)
  np.testing.assert_allclose(found[:, 5:], 0, atol=1e-6)
  np.testing.assert_allclose(found[:, :, 5:], 0, atol=1e-6)
  # A square of 4x4 of the 64 watched pixels falls to 0: brightness 2 -> 1.5.
  expected = 1 - (2 * 1.5 + 1) / np.sqrt(5 * (1.5**2 + 1))
  np.testing.assert_allclose(found[:, 1, 1], expected, rtol=1e-4)


@pytest.mark.parametrize(("size", "window"), [(100, 0.4), (90, 0.25), (32, 0.9), (16, 1.0)])
def test_occlusion_hides_every_pixel_and_is_highest_where_it_is_watched(size, window):
  """Also where half a window does not divide the picture."""
  images = jnp.ones((1, size, size, 3))
  corner = slice(int(0.7 * size), int(0.9 * size))
  watched = lambda x: jnp.stack([jnp.mean(x[:, corner, corner], (1, 2, 3)), jnp.ones(1)], 1)  # noqa: E731
  map_nn = attention.occlusion_map(watched, images, window=window)
  fine = np.asarray(jax.image.resize(map_nn, (1, size, size), "bilinear"))[0]
  row, column = np.unravel_index(np.argmax(fine), fine.shape)
  if map_nn.size > 1:
    assert corner.start <= row < corner.stop
    assert corner.start <= column < corner.stop
  edge = lambda x: jnp.stack([jnp.mean(x[:, -1, -1], 1), jnp.ones(1)], 1)  # noqa: E731
  assert np.asarray(attention.occlusion_map(edge, images, window=window)).max() > 0.1


def test_entropy_of_hand_cases():
  assert attention.entropy(np.ones((3, 4))) == pytest.approx(1)
  assert attention.entropy(np.eye(1, 9).reshape(3, 3)) == 0
  assert attention.entropy(np.array([[1.0, 1], [-5, 0]])) == pytest.approx(0.5)
  assert attention.entropy(np.zeros((2, 2))) == 1


def test_iou_at_area_of_hand_cases():
  mask = np.array([[1, 1, 0], [0, 0, 0]], bool)
  assert attention.iou_at_area(np.array([[9.0, 8, 1], [0, 0, 0]]), mask) == 1
  assert attention.iou_at_area(np.array([[9.0, 0, 1], [0, 0, 0]]), mask) == pytest.approx(1 / 3)
  assert attention.iou_at_area(np.array([[0.0, 0, 9], [0, 0, 8]]), mask) == 0


def make(num_devices=8, folder=None, apply=watch):
  return Evaluation(
    apply, (), train=None, test=None, num_classes=None, mesh=parallel.make_mesh(num_devices),
    canvas=SIZE, size=SIZE, crop=1.0, mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=8, folder=folder,
  )  # fmt: skip


@pytest.fixture
def masked(tmp_path):
  """White pictures: objects of value 7 upper left (4), lower right (2), none (1); 3 elsewhere."""
  places = ["left", "right", "left", "left", "right", "none", "left"]
  for part in ("images", "masks"):
    (tmp_path / part / "val").mkdir(parents=True)
  for i, place in enumerate(places):
    image = np.full((2 * SIZE, 2 * SIZE, 3), 255, np.uint8)
    mask = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    mask[-4:, :4] = 3
    corner = slice(0, SIZE) if place == "left" else slice(SIZE, None)
    if place != "none":
      mask[corner, corner] = 7
    Image.fromarray(image).save(tmp_path / "images" / "val" / f"p{i}.jpg")
    Image.fromarray(mask).save(tmp_path / "masks" / "val" / f"p{i}.png")
  return tmp_path


def test_overlap_with_masks_of_a_hand_case(masked):
  evaluation = make(folder=masked / "out")
  figures = attention.run(evaluation, source=f"masks:{masked}", target=7, num_shown=3)
  assert figures["attention/masked"] == 6
  assert figures["attention/unmasked"] == 1
  assert figures["attention/num_test"] == 7
  assert figures["attention/pointing"] == pytest.approx(100 * 4 / 6)  # the watched quarter
  assert figures["attention/area"] == pytest.approx(25)
  assert figures["attention/centre_pointing"] == pytest.approx(100 * 2 / 6)  # pixel 8 of 16
  assert 100 * 4 / 6 * 0.7 < figures["attention/iou"] < 100 * 4 / 6 + 1e-9
  with Image.open(masked / "out" / "attention.png") as picture:
    assert picture.size == (4 * (2 * SIZE + 4) * 6, (SIZE + 2) * 6)
  assert attention.run(make(1), source=f"masks:{masked}", target=7) == pytest.approx(figures)


def test_any_value_but_0_is_the_target_by_default(masked):
  figures = attention.run(make(), source=f"masks:{masked}")
  assert figures["attention/masked"] == 7
  with pytest.raises(ValueError, match="none of 7 masks has the target"):
    attention.run(make(), source=f"masks:{masked}", target=9)


def test_masks_are_read_as_for_segmentation(tmp_path):
  """A picture on its side in a folder of its own; left half object, right half of no class."""
  for part in ("images", "masks"):
    (tmp_path / part / "val" / "sub").mkdir(parents=True)
  exif = Image.Exif()
  exif[0x0112] = 6
  sideways = Image.new("RGB", (3 * SIZE, 2 * SIZE), "white")
  sideways.save(tmp_path / "images" / "val" / "sub" / "p.jpg", exif=exif)
  mask = np.full((3 * SIZE, 2 * SIZE), 255, np.uint8)
  mask[:, :SIZE] = 7
  Image.fromarray(mask).save(tmp_path / "masks" / "val" / "sub" / "p.png")
  Image.new("RGB", (4, 4)).save(tmp_path / "images" / "val" / "bare.jpg")
  figures = attention.run(make(1), source=f"masks:{tmp_path}")
  assert (figures["attention/num_test"], figures["attention/masked"]) == (1, 1)
  assert figures["attention/area"] == pytest.approx(50)


def test_masks_that_do_not_fit_are_errors(masked):
  mask = masked / "masks" / "val" / "p3.png"
  Image.fromarray(np.ones((SIZE, SIZE), np.uint8)).save(mask)
  with pytest.raises(ValueError, match=r"1 of 7 masks .*p3\.png has 16x16 pixels, its .* 32x32"):
    attention.run(make(), source=f"masks:{masked}")
  Image.new("RGB", (4, 4)).save(masked / "images" / "val" / "p4.png")
  with pytest.raises(ValueError, match=r"val has p4\.jpg and p4\.png"):
    attention.run(make(), source=f"masks:{masked}")
  with pytest.raises(ValueError, match="expected 'masks:PATH'"):
    attention.run(make(), source="folder:x")


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"kind": "attention"}, "has no attention"),
    ({"kind": "similarity"}, "has no maps"),
    ({"kind": "gradient"}, "kind is 'gradient'"),
    ({"window": 0.0}, "window is 0"),
  ],
)
def test_options_out_of_range_are_errors(masked, options, match):
  with pytest.raises(ValueError, match=match):
    attention.run(make(apply=raw_pixels), source=f"masks:{masked}", **options)
