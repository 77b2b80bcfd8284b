"""Views against Pillow, colorsys, SciPy and float64 NumPy; their randomness against simulations."""

import colorsys
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from ssrl_jax import pixels, views
from ssrl_jax.method import ViewSpec

MEAN, STD = ViewSpec("global").mean, ViewSpec("global").std
LEVEL = 1 / 255  # one step of an 8-bit picture
FULL = ViewSpec("global", size=16, blur=(1.0, 0.1), solarise=(0.0, 0.2))  # every operation in use
PLAIN = ViewSpec("plain", size=16, jitter=0.0, greyscale=0.0)  # crop and flip only

full_views = jax.jit(partial(views.make_views, specs=(FULL,)))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
  """uint8 [height, width, 3] with slopes, edges and noise."""
  np_rng = np.random.default_rng(seed)
  coarse = np_rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
  smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
  noisy = smooth + np_rng.integers(-15, 16, smooth.shape)
  noisy[height // 3 : height // 2, width // 4 : width // 2] = np_rng.integers(0, 256, 3)
  return np.clip(noisy, 0, 255).astype(np.uint8)


def make_batch(size: int = 8, *, canvas: int = 24, padding: int = 0, first_id: int = 0) -> dict:
  """Pictures of many shapes at the top left of canvases that are `padding` elsewhere."""
  np_rng = np.random.default_rng(1)
  extent = np_rng.integers(canvas // 3, canvas + 1, (size, 2)).astype(np.int32)
  image = np.full((size, canvas, canvas, 3), padding, np.uint8)
  for i, (h, w) in enumerate(extent):
    image[i, :h, :w] = picture(h, w, seed=i)
  ids = np.arange(first_id, first_id + size, dtype=np.uint64)
  words = np.stack([ids & np.uint64(0xFFFFFFFF), ids >> np.uint64(32)], axis=1)
  return {"image": image, "extent": extent, "id": words.astype(np.uint32)}


def pillow_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Pillow's BICUBIC of uint8 [H, W, 3] in its floating-point mode: [height, width, 3] in [0, 1].

  On 8-bit pictures Pillow rounds and clips after each of the two passes, which makes up to 4 levels
  of difference beside hard edges.
  """
  channels = [Image.fromarray(channel) for channel in np.moveaxis(np.float32(image / 255), -1, 0)]
  resized = [np.asarray(c.resize((width, height), Image.Resampling.BICUBIC)) for c in channels]
  return np.clip(np.stack(resized, axis=-1), 0, 1)


# Each operation against an independent one.


@pytest.mark.parametrize("size", [13, 32])
def test_resized_crop_matches_pillow(size):
  image = picture(40, 48)
  crop = jax.jit(partial(pixels.resized_crop, size=size))
  boxes = [(0, 0, 40, 48), (3, 7, 9, 30), (31, 2, 9, 5), (10, 20, 28, 28), (39, 47, 1, 1)]
  for (top, left, height, width), flip in itertools.product(boxes, (False, True)):
    expected = pillow_resize(image[top : top + height, left : left + width], size, size)
    expected = expected[:, ::-1] if flip else expected
    got = crop(image / np.float32(255), jnp.float32([top, left, height, width]), flip)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_resized_crop_of_everything_at_its_own_size_is_identity():
  image = picture(16, 16) / np.float32(255)
  got = pixels.resized_crop(image, jnp.float32([0, 0, 16, 16]), False, size=16)
  np.testing.assert_array_equal(got, image)


def test_adjust_hue_matches_colorsys():
  edge_cases = [(0, 0, 0), (1, 1, 1), (0.3, 0.3, 0.3), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
  random = np.random.default_rng(0).random((93, 3))
  image = np.concatenate([edge_cases, random]).reshape(10, 10, 3)
  for shift in (-0.5, -0.1, 0.0, 0.07, 0.5):
    expected = np.empty_like(image)
    for at in np.ndindex(10, 10):
      hue, saturation, value = colorsys.rgb_to_hsv(*image[at])
      expected[at] = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    got = pixels.adjust_hue(jnp.float32(image), shift)
    np.testing.assert_allclose(got, expected, atol=5e-6)


def luma(image: np.ndarray) -> np.ndarray:
  return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


# float64 transcriptions of torchvision.transforms.functional, and Pillow's, which rounds.
ADJUSTMENTS = {
  "brightness": (
    pixels.adjust_brightness,
    lambda x, f: np.clip(f * x, 0, 1),
    ImageEnhance.Brightness,
  ),
  "contrast": (
    pixels.adjust_contrast,
    lambda x, f: np.clip(f * x + (1 - f) * luma(x).mean(), 0, 1),
    ImageEnhance.Contrast,
  ),
  "saturation": (
    pixels.adjust_saturation,
    lambda x, f: np.clip(f * x + (1 - f) * luma(x), 0, 1),
    ImageEnhance.Color,
  ),
}


@pytest.mark.parametrize("name", ADJUSTMENTS)
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.8])
def test_adjustments_match_float64_and_pillow(name, factor):
  adjust, reference, enhance = ADJUSTMENTS[name]
  image = picture(20, 30)
  got = adjust(jnp.float32(image / 255), factor)
  np.testing.assert_allclose(got, reference(image / 255, factor), atol=1e-6)
  pillow = np.asarray(enhance(Image.fromarray(image)).enhance(factor)) / 255
  np.testing.assert_allclose(got, pillow, atol=1.6 * LEVEL)


def test_greyscale_matches_float64_and_pillow():
  image = picture(20, 30)
  got = pixels.greyscale(jnp.float32(image / 255))
  expected = np.broadcast_to(luma(image / 255), image.shape)
  np.testing.assert_allclose(got, expected, atol=1e-6)
  pillow = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255
  np.testing.assert_allclose(got[..., :1], pillow, atol=0.51 * LEVEL)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_colour_jitter_applies_the_operations_in_order(order):
  image = picture(9, 9) / 255
  factors = (1.3, 0.6, 1.4, 0.1)
  expected = image
  for i in order:
    if i == 3:
      expected = pixels.adjust_hue(jnp.float32(expected), factors[3])
    else:
      reference = list(ADJUSTMENTS.values())[i][1]
      expected = reference(np.asarray(expected, np.float64), factors[i])
  got = pixels.colour_jitter(jnp.float32(image), jnp.float32(factors), jnp.array(order))
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_colour_jitter_leaves_out_what_is_not_asked_for():
  image, factors = jnp.float32(picture(9, 9) / 255), jnp.float32([1.3, 0.6, 1.4, 0.1])
  got = pixels.colour_jitter(image, factors, jnp.array([1, 0]), operations=(0, 2))
  expected = pixels.adjust_brightness(pixels.adjust_saturation(image, 1.4), 1.3)
  np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_gaussian_blur_matches_scipy(size, sigma):
  image = picture(size, size) / 255
  radius = {8: 1, 64: 3}[size]
  taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
  expected = image
  for axis in (0, 1):
    expected = scipy.ndimage.correlate1d(expected, taps / taps.sum(), axis=axis, mode="nearest")
  got = pixels.gaussian_blur(jnp.float32(image), sigma)
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_blur_radius_gives_the_kernels_of_simclr():
  lengths = {size: 2 * pixels.blur_radius(size) + 1 for size in (8, 32, 96, 224)}
  assert lengths == {8: 3, 32: 3, 96: 9, 224: 23}


def test_solarise_matches_pillow_at_every_level():
  image = np.arange(256 * 3).astype(np.uint8).reshape(16, 16, 3)
  expected = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
  got = np.rint(np.asarray(pixels.solarise(jnp.float32(image / 255))) * 255)
  np.testing.assert_array_equal(got, expected)


def test_normalise_matches_float64_and_denormalise_undoes_it():
  image = picture(20, 30)
  got = pixels.normalise(jnp.float32(image / 255), MEAN, STD)
  np.testing.assert_allclose(got, (image / 255 - np.array(MEAN)) / np.array(STD), atol=2e-6)
  np.testing.assert_array_equal(pixels.denormalise(got[None], MEAN, STD)[0], image)


def test_render_applies_what_was_drawn():
  image, order = picture(24, 24), (2, 0, 3, 1)
  draws = views.Draws(
    box=jnp.float32([2, 3, 15, 18]),
    flip=jnp.bool_(True),
    jitter=jnp.bool_(True),
    factors=jnp.float32([1.3, 0.6, 1.4, 0.1]),
    greyscale=jnp.bool_(False),
    blur=jnp.bool_(True),
    sigma=jnp.float32(1.1),
    solarise=jnp.bool_(True),
  )
  render = jax.jit(partial(views.render, spec=FULL))
  cropped = pixels.resized_crop(jnp.float32(image / 255), draws.box, True, size=16)
  jittered = pixels.colour_jitter(cropped, draws.factors, jnp.array(order))
  solarised = pixels.solarise(pixels.gaussian_blur(jittered, 1.1))
  np.testing.assert_allclose(
    render(image, draws, jnp.array(order)), pixels.normalise(solarised, MEAN, STD), atol=1e-4
  )
  grey = render(image, draws._replace(greyscale=jnp.bool_(True)), jnp.array(order))
  levels = grey * np.float32(STD).reshape(1, 1, 3) + np.float32(MEAN).reshape(1, 1, 3)
  np.testing.assert_allclose(np.ptp(levels, axis=-1), 0, atol=1e-6)
  nothing = {k: jnp.bool_(False) for k in ("jitter", "blur", "solarise")}
  np.testing.assert_allclose(
    render(image, draws._replace(**nothing), jnp.array(order)),
    pixels.normalise(cropped, MEAN, STD),
    atol=1e-6,
  )


# What chance decides.


def torchvision_crop(np_rng, height, width, area, aspect):
  """RandomResizedCrop.get_params, transcribed; top, left, height, width."""
  for _ in range(10):
    target = height * width * np_rng.uniform(*area)
    ratio = np.exp(np_rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
    w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      return np_rng.integers(0, height - h + 1), np_rng.integers(0, width - w + 1), h, w
  if width / height < aspect[0]:
    w, h = width, round(width / aspect[0])
  elif width / height > aspect[1]:
    w, h = round(height * aspect[1]), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


def ks_distance(x: np.ndarray, y: np.ndarray) -> float:
  """Largest distance between two samples' distribution functions, in units of its deviation.

  Above 1.95 once in a thousand for samples of one continuous distribution; rarer for a discrete.
  """
  at = np.union1d(x, y)
  cdf_x = np.searchsorted(np.sort(x), at, side="right") / len(x)
  cdf_y = np.searchsorted(np.sort(y), at, side="right") / len(y)
  return np.abs(cdf_x - cdf_y).max() * np.sqrt(len(x) * len(y) / (len(x) + len(y)))


@pytest.mark.parametrize("extent", [(64, 64), (40, 64), (64, 20)])
def test_crop_box_has_the_distribution_of_torchvision(extent):
  n, area, aspect = 4000, (0.2, 1.0), (3 / 4, 4 / 3)
  u = jax.random.uniform(jax.random.key(0), (n, 2 * views.TRIES + 2))
  box = jax.vmap(lambda u: views.crop_box(u, jnp.int32(extent), area=area, aspect=aspect))(u)
  top, left, height, width = np.asarray(box, np.float64).T
  np_rng = np.random.default_rng(0)
  expected = np.array([torchvision_crop(np_rng, *extent, area, aspect) for _ in range(n)]).T
  for got_and_expected in (
    (height * width, expected[2] * expected[3]),
    (width / height, expected[3] / expected[2]),
    (top, expected[0]),
    (left, expected[1]),
  ):
    assert ks_distance(*got_and_expected) < 1.95
  assert (np.minimum(top, left) >= 0).all()
  assert (top + height <= extent[0]).all()
  assert (left + width <= extent[1]).all()
  assert (np.minimum(height, width) >= 1).all()


@pytest.mark.parametrize("extent", [(1, 300), (300, 1), (1, 1), (30, 31)])
def test_crop_box_falls_back_as_torchvision_where_nothing_fits(extent):
  class Largest:  # asks for the whole area with an aspect that never fits
    def uniform(self, low, high):
      return high

  aspect = (3 / 4, 4 / 3)
  u = jnp.full((2 * views.TRIES + 2,), 1 - 2.0**-23)
  box = views.crop_box(u, jnp.int32(extent), area=(1.0, 1.0), aspect=aspect)
  expected = (
    (0, 0, 1, 1)  # rounds to a crop that fits
    if extent == (1, 1)
    else torchvision_crop(Largest(), *extent, (1.0, 1.0), aspect)
  )
  np.testing.assert_array_equal(box, expected)


@pytest.fixture(scope="module")
def draws():
  """Both views' draws of 20,000 pictures, by a spec that has every choice."""
  spec = FULL._replace(flip=0.3, jitter=0.7, greyscale=0.2, blur=(0.9, 0.1), blur_sigma=(0.5, 3.0))
  keys = jax.random.split(jax.random.key(0), (2, 20_000))
  draw = jax.vmap(lambda key, view: views.draw(key, jnp.int32([32, 32]), spec, view), (0, None))
  return jax.device_get(jax.jit(jax.vmap(draw))(keys, jnp.arange(2)))


@pytest.mark.parametrize(
  ("choice", "probabilities"),
  [
    ("flip", (0.3, 0.3)),
    ("jitter", (0.7, 0.7)),
    ("greyscale", (0.2, 0.2)),
    ("blur", (0.9, 0.1)),
    ("solarise", (0.0, 0.2)),
  ],
)
def test_draw_rates_are_as_specified(draws, choice, probabilities):
  drawn = getattr(draws, choice)
  for view, p in enumerate(probabilities):
    sigma = np.sqrt(p * (1 - p) / drawn.shape[1])
    assert abs(drawn[view].mean() - p) <= 4 * sigma


def test_draw_factors_are_uniform_over_their_ranges(draws):
  ranges = [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]
  columns = [draws.factors[0, :, i] for i in range(4)] + [draws.sigma[0]]
  for column, (low, high) in zip(columns, ranges + [(0.5, 3.0)]):
    uniform = (column - low) / (high - low)
    assert -1e-6 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() <= 1 + 1e-6
    assert ks_distance(uniform, np.linspace(0, 1, 20_001)) < 1.95
  strong = ViewSpec("global", brightness=1.5)  # a factor is never negative
  low = views.draw(jax.random.key(0), jnp.int32([9, 9]), strong, 0).factors[0]
  assert 0 <= low <= 2.5


def test_draw_choices_are_independent_of_each_other_and_of_the_other_view(draws):
  names = ("flip", "jitter", "greyscale", "blur", "sigma")
  columns = [draws.solarise[1]]
  for view in (0, 1):
    columns += [getattr(draws, name)[view] for name in names]
    columns += [*draws.factors[view].T, *draws.box[view].T[:2]]
  correlation = np.corrcoef(np.stack(columns).astype(np.float64))
  pairs = np.sort(np.abs(correlation[np.triu_indices_from(correlation, k=1)]))
  # A crop's top and left both depend on its size: one pair in each view.
  assert pairs[:-2].max() < 4.5 / np.sqrt(20_000)


# Whole batches.


def test_make_views_has_the_contract_s_shapes_and_finite_values():
  local = PLAIN._replace(name="local", count=3, size=8)
  got = jax.jit(partial(views.make_views, specs=(FULL, local)))(jax.random.key(0), make_batch())
  shapes = {name: (x.shape, x.dtype) for name, x in got.items()}
  assert shapes == {
    "global": ((8, 2, 16, 16, 3), jnp.float32),
    "global_box": ((8, 2, 4), jnp.float32),
    "local": ((8, 3, 8, 8, 3), jnp.float32),
    "local_box": ((8, 3, 4), jnp.float32),
  }
  abstract = views.abstract_views((FULL, local), 8)
  assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == shapes
  for name in ("global", "local"):
    levels = pixels.channels(STD, 5) * got[name] + pixels.channels(MEAN, 5)
    assert np.isfinite(levels).all()
    assert -1e-5 <= levels.min() <= levels.max() <= 1 + 1e-5
  alone = full_views(jax.random.key(0), make_batch())
  np.testing.assert_allclose(alone["global"], got["global"], atol=1e-5)


def test_make_views_depends_on_key_and_id_and_not_on_place_or_batch():
  batch, key = make_batch(), jax.random.key(0)
  expected = np.asarray(full_views(key, batch)["global"])
  np.testing.assert_array_equal(full_views(key, batch)["global"], expected)
  place = np.random.default_rng(0).permutation(8)
  moved = full_views(key, {k: v[place] for k, v in batch.items()})["global"]
  np.testing.assert_allclose(moved, expected[place], atol=1e-5)
  part = full_views(key, {k: v[2:5] for k, v in batch.items()})["global"]
  np.testing.assert_allclose(part, expected[2:5], atol=1e-5)
  other_step = np.asarray(full_views(jax.random.key(1), batch)["global"])
  assert (np.abs(other_step - expected).max(axis=(2, 3, 4)) > 0.05).all()
  assert (np.abs(expected[:, 0] - expected[:, 1]).max(axis=(1, 2, 3)) > 0.05).all()


def test_make_views_of_one_picture_differ_by_every_bit_of_its_id():
  batch, bits = make_batch(), (0, 1, 31, 32, 33, 62)
  batch = {k: np.repeat(v[:1], 8, axis=0) for k, v in batch.items()}
  ids = np.array([5, 5, *(5 ^ (1 << bit) for bit in bits)], np.uint64)
  words = np.stack([ids & np.uint64(0xFFFFFFFF), ids >> np.uint64(32)], axis=1)
  got = np.asarray(full_views(jax.random.key(0), batch | {"id": words.astype(np.uint32)})["global"])
  np.testing.assert_array_equal(got[0], got[1])
  for i, j in itertools.combinations(range(1, 8), 2):
    assert np.abs(got[i] - got[j]).max() > 0.05


def test_make_views_agrees_on_1_and_8_devices():
  batch, key = make_batch(), jax.random.key(0)
  sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
  cut = jax.device_put(batch, sharding)
  compiled = full_views.lower(key, cut).compile()
  got = compiled(key, cut)["global"]
  assert {s.data.shape[0] for s in got.addressable_shards} == {1}
  assert not re.search("all-gather|all-reduce|all-to-all|collective", compiled.as_text())
  np.testing.assert_allclose(got, full_views(key, batch)["global"], atol=1e-5)


def test_padding_of_the_canvas_never_shows():
  dark, bright = make_batch(padding=0), make_batch(padding=255)
  key = jax.random.key(0)
  np.testing.assert_array_equal(full_views(key, dark)["global"], full_views(key, bright)["global"])
  evaluate = jax.jit(partial(views.eval_view, size=16, crop=0.875, mean=MEAN, std=STD))
  np.testing.assert_array_equal(evaluate(dark), evaluate(bright))


def test_what_a_spec_leaves_out_is_not_compiled():
  def count(spec):
    program = str(jax.make_jaxpr(partial(views.make_views, specs=(spec,)))(key, batch))
    return program.count(" dot_general["), program.count(" cond[")

  key, batch = jax.random.key(0), make_batch()
  assert count(FULL) == (4, 4)  # crop and blur take two products each; four places in the jitter
  assert count(FULL._replace(blur=(0.0,))) == (2, 4)
  assert count(FULL._replace(hue=0.0)) == (4, 3)
  assert count(PLAIN) == (2, 0)


def test_jitter_order_is_shared_by_a_batch_and_uniform_over_views(monkeypatch):
  monkeypatch.setattr(views, "render", lambda image, draws, order_J, spec: order_J)
  n = 24 * 40
  got = views.make_views(
    jax.random.key(0), make_batch(2), (FULL._replace(count=n, blur=(0.5,), solarise=(0.0,)),)
  )
  orders = np.asarray(got["global"])  # [B, count, J]
  np.testing.assert_array_equal(orders[0], orders[1])
  seen, counts = np.unique(orders[0], axis=0, return_counts=True)
  assert sorted(map(tuple, seen)) == list(itertools.permutations(range(4)))
  chi_square = np.sum((counts - 40) ** 2 / 40)
  assert chi_square < 49.7  # 23 degrees of freedom: above it once in a thousand


def test_box_is_where_the_view_was_cut_also_when_mirrored():
  """A picture of two slopes tells which part of it is seen: red from left to right, green down."""
  size, spec = 96, PLAIN._replace(size=24, count=4, mean=(0.0,) * 3, std=(1.0,) * 3)
  batch = make_batch(8, canvas=size)
  batch["extent"] = np.stack([np.arange(40, 96, 7), np.arange(95, 39, -7)], axis=1).astype(np.int32)
  for image, (h, w) in zip(batch["image"], batch["extent"]):
    image[:h, :w] = 0
    image[:h, :w, 0] = np.round(255 * (np.arange(w) + 0.5) / w)
    image[:h, :w, 1] = np.round(255 * (np.arange(h) + 0.5) / h)[:, None]
  got = jax.jit(partial(views.make_views, specs=(spec,)))(jax.random.key(0), batch)
  top, left, bottom, right = np.moveaxis(np.asarray(got["plain_box"]), -1, 0)
  assert (got["plain_box"] >= 0).all()
  assert (got["plain_box"] <= 1).all()
  assert (top < bottom).all()
  assert 0.2 < (left > right).mean() < 0.8  # mirrored
  at = (np.arange(24) + 0.5) / 24
  columns = left[..., None] + at * (right - left)[..., None]
  rows = top[..., None] + at * (bottom - top)[..., None]
  inner = slice(4, -4)  # beside the edge the kernel sees one side only
  seen = np.asarray(got["plain"])
  np.testing.assert_allclose(seen[..., 12, inner, 0], columns[..., inner], atol=0.01)
  np.testing.assert_allclose(seen[..., inner, 12, 1], rows[..., inner], atol=0.01)


# Frames.


def test_view_v_shows_frame_v_modulo_their_number():
  batch, key = make_batch(), jax.random.key(0)
  spec = FULL._replace(count=5, blur=(0.5,), solarise=(0.0,))
  make = jax.jit(partial(views.make_views, specs=(spec,)))
  frames = [batch["image"], 255 - batch["image"], batch["image"] // 2]
  got = make(key, batch | {"image": np.stack(frames, axis=1)})
  for view in range(5):
    expected = make(key, batch | {"image": frames[view % 3]})
    np.testing.assert_allclose(
      got["global"][:, view], expected["global"][:, view], atol=1e-5, err_msg=str(view)
    )
    np.testing.assert_array_equal(got["global_box"][:, view], expected["global_box"][:, view])


def test_views_of_one_frame_are_those_of_the_picture():
  batch, key = make_batch(), jax.random.key(0)
  one = full_views(key, batch | {"image": batch["image"][:, None]})
  np.testing.assert_array_equal(one["global"], full_views(key, batch)["global"])


# Noise.


def test_noise_has_the_deviation_drawn_and_leaves_every_other_draw_alone():
  """On grey pictures, for half of the second views and none of the first."""
  batch = make_batch(256) | {"image": np.full((256, 32, 32, 3), 128, np.uint8)}
  quiet = PLAIN._replace(count=2)
  spec = quiet._replace(noise=(0.0, 0.5), noise_sigma=(0.05, 0.1))
  make = jax.jit(views.make_views, static_argnums=2)
  got, plain = (make(jax.random.key(4), batch, (x,)) for x in (spec, quiet))
  np.testing.assert_array_equal(got["plain_box"], plain["plain_box"])
  np.testing.assert_allclose(got["plain"][:, 0], plain["plain"][:, 0], atol=1e-5)
  difference_BHWC = np.asarray(got["plain"][:, 1] - plain["plain"][:, 1])
  noise_BHWC = difference_BHWC * np.reshape(STD, (1, 1, 1, 3))
  deviation_B = noise_BHWC.std((1, 2, 3))
  noisy = deviation_B > 1e-4
  assert abs(noisy.mean() - 0.5) < 4 * np.sqrt(0.25 / 256)
  assert 0.04 < deviation_B[noisy].min() < 0.06 < 0.09 < deviation_B[noisy].max() < 0.11
  assert abs(np.corrcoef(noise_BHWC[noisy][:2].reshape(2, -1))[0, 1]) < 0.2  # own noise each
  assert abs(noise_BHWC[noisy].mean()) < 0.001


# Strength.


def test_draws_at_full_strength_are_those_before_there_was_a_strength():
  """Printed at commit 068e263: the same key must go on giving the same views."""
  keys = jax.vmap(jax.random.key)(np.arange(6))
  got = jax.vmap(lambda key: views.draw(key, jnp.int32([30, 40]), FULL, 1))(keys)
  boxes = [(0, 1, 29, 39), (2, 1, 26, 22), (2, 3, 25, 32), (12, 4, 12, 14), (9, 24, 18, 14)]
  np.testing.assert_array_equal(got.box[:5], boxes)
  assert got.flip.tolist() == [False, True, True, True, False, True]
  assert got.jitter.tolist() == [True, True, True, False, True, True]
  assert got.greyscale.tolist() == [False, False, True, False, False, True]
  assert got.blur.tolist() == [False] * 5 + [True]
  assert got.solarise.tolist() == [False] * 4 + [True] * 2
  factors = [1.0417935848236084, 1.0890823602676392, 1.3145403861999512, 0.05099818855524063]
  np.testing.assert_allclose(got.factors[0], factors, rtol=1e-6)


def test_computed_strength_of_1_changes_no_bit():
  local = PLAIN._replace(name="local", area=(0.07, 0.45), aspect=(0.5, 2.0), greyscale=0.3)
  key, batch, specs = jax.random.key(3), make_batch(64), (FULL, local)
  plain = jax.jit(partial(views.make_views, specs=specs))(key, batch)
  ramped = jax.jit(partial(views.make_views, specs=specs))(key, batch, strength=jnp.float32(1))
  for name, x in plain.items():
    np.testing.assert_array_equal(ramped[name], x, err_msg=name)


def test_full_strength_is_not_computed():
  def num_operations(strength):
    make = partial(views.make_views, specs=(FULL,), strength=strength)
    return str(jax.make_jaxpr(make)(jax.random.key(0), make_batch())).count(" = ")

  assert num_operations(1.0) < num_operations(np.float32(1))


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7])
def test_strength_scales_probabilities_jitter_and_the_smallest_crop(strength):
  spec = FULL._replace(
    flip=0.5, jitter=0.8, greyscale=0.4, blur=(0.9,), solarise=(0.6,), area=(0.1, 0.8)
  )
  keys = jax.random.split(jax.random.key(0), 8000)

  @jax.jit
  def draw(strength):
    extent = jnp.int32([1000, 1000])
    return jax.vmap(lambda key: views.draw(key, extent, spec, 0, strength))(keys)

  got, full = draw(jnp.float32(strength)), draw(jnp.float32(1))
  np.testing.assert_array_equal(got.flip, full.flip)
  rates = {"jitter": 0.8, "greyscale": 0.4, "blur": 0.9, "solarise": 0.6}
  for name, p in rates.items():
    p *= strength
    assert abs(getattr(got, name).mean() - p) <= 4 * np.sqrt(p * (1 - p) / 8000), name
    assert not np.any(getattr(got, name) & ~getattr(full, name)), name  # harder, never other
  low, high = 1 - 0.4 * strength, 1 + 0.4 * strength
  for column in got.factors[:, :3].T:
    assert low - 1e-6 <= column.min() < low + 0.01
    assert high - 0.01 < column.max() <= high + 1e-6
  assert abs(np.abs(got.factors[:, 3]).max() - 0.1 * strength) < 1e-3
  area = np.asarray(got.box[:, 2] * got.box[:, 3]) / 1e6
  lowest = 0.8 - strength * 0.7
  assert lowest - 0.002 < area.min() < lowest + 0.01
  assert 0.79 < area.max() < 0.802


def test_strength_grows_linearly_to_exactly_1():
  at = partial(views.strength_at, start=0.2, epochs=2.0, steps_per_epoch=50)
  np.testing.assert_allclose([at(jnp.int32(s)) for s in (0, 25, 50)], [0.2, 0.4, 0.6], rtol=1e-6)
  assert [float(at(jnp.int32(s))) for s in (100, 101, 10**6)] == [1.0] * 3
  assert views.strength_at(jnp.int32(0), start=1.0, epochs=2.0, steps_per_epoch=50) == 1.0


@pytest.mark.parametrize(
  ("ramp", "message"),
  [
    ({"start": 1.5, "epochs": 1.0}, r"start is 1\.5; expected a strength from 0 to 1"),
    ({"start": 0.5, "epochs": -1.0}, r"epochs is -1\.0; expected 0 or more"),
    ({"start": 0.5, "epochs": 0.0}, r"start is 0\.5, but views_ramp\.epochs is 0"),
  ],
)
def test_check_ramp_names_the_value_and_the_fix(ramp, message):
  with pytest.raises(ValueError, match=message):
    views.check_ramp(**ramp)


# Evaluation.


def pillow_eval(image: np.ndarray, size: int, crop: float) -> np.ndarray:
  """torchvision's Resize(round(size / crop), BICUBIC) and CenterCrop(size) on a PIL image."""
  height, width = image.shape[:2]
  shorter = round(size / crop)
  h, w = shorter * height // min(height, width), shorter * width // min(height, width)
  resized = pillow_resize(image, h, w)
  top, left = round((h - size) / 2), round((w - size) / 2)
  return resized[top : top + size, left : left + size]


@pytest.mark.parametrize(("size", "crop"), [(28, 0.875), (16, 1.0), (48, 0.75)])
def test_eval_view_matches_pillow(size, crop):
  batch = make_batch(canvas=40)
  evaluate = partial(views.eval_view, size=size, crop=crop, mean=(0.0,) * 3, std=(1.0,) * 3)
  got = jax.jit(evaluate)(batch)
  for i, (h, w) in enumerate(batch["extent"]):
    expected = pillow_eval(batch["image"][i, :h, :w], size, crop)
    np.testing.assert_allclose(got[i], expected, atol=2e-5)


def test_eval_view_of_a_square_picture_of_its_size_is_the_picture():
  image = np.zeros((1, 24, 24, 3), np.uint8)
  image[0, :16, :16] = picture(16, 16)
  batch = {"image": image, "extent": np.array([[16, 16]], np.int32)}
  got = views.eval_view(batch, size=16, crop=1.0, mean=MEAN, std=STD)
  expected = pixels.normalise(jnp.float32(image[0, :16, :16]) / 255, MEAN, STD)
  np.testing.assert_array_equal(got[0], expected)


@pytest.mark.parametrize(
  ("size", "crop", "message"), [(0, 1.0, "size is 0"), (8, 1.5, "crop is 1.5")]
)
def test_eval_view_refuses_nonsense(size, crop, message):
  with pytest.raises(ValueError, match=message):
    views.eval_view(make_batch(), size=size, crop=crop, mean=MEAN, std=STD)


# Specs.


@pytest.mark.parametrize(
  "wrong",
  [
    {"count": 0},
    {"size": 0},
    {"area": (0.0, 1.0)},
    {"area": (0.5, 0.2)},
    {"area": (0.5, 1.1)},
    {"aspect": (2.0, 1.0)},
    {"flip": 1.5},
    {"jitter": -0.1},
    {"greyscale": float("nan")},
    {"brightness": -0.4},
    {"hue": 0.6},
    {"blur": 0.5},
    {"blur": (0.5, 0.5, 0.5)},
    {"blur_sigma": (0.0, 2.0)},
    {"solarise": (0.0, 2.0)},
    {"noise": 0.5},
    {"noise_sigma": (0.1, 0.0)},
    {"std": (0.2, 0.0, 0.2)},
  ],
)
def test_check_specs_names_the_view_the_field_and_the_value(wrong):
  ((field, value),) = wrong.items()
  message = re.escape(f"view 'global': {field} is {value!r}; expected ")
  with pytest.raises(ValueError, match=message):
    views.check_specs((ViewSpec("global")._replace(**wrong),))


def test_check_specs_refuses_two_of_one_name_and_accepts_the_usual():
  views.check_specs((FULL, PLAIN, ViewSpec("local", count=6, blur=(0.5,))))
  for other in (FULL, PLAIN._replace(name="global_box")):
    with pytest.raises(ValueError, match="same name"):
      views.check_specs((FULL, other))
