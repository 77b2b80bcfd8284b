import colorsys
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ssrl_jax import corruptions, parallel
from ssrl_jax.corruptions import NAMES, SEVERITIES, corrupt, programs, table_for
from ssrl_jax.corruptions.levels import ALEXNET_ERROR, LEVELS

SMALL = 16  # pixels: quick to compile


def pictures(num, size, seed=0):
  """Smooth pictures with an edge, as multiples of 1 / 255."""
  np_rng = np.random.default_rng(seed)
  x = ndimage.gaussian_filter(np_rng.uniform(size=(num, size, size, 3)), (0, 1.5, 1.5, 0))
  x = (x - x.min()) / (x.max() - x.min())
  x[:, :, size // 2 :] = 1 - 0.8 * x[:, :, size // 2 :]
  return np.round(x * 255).astype(np.float32) / 255


def words(ids):
  ids = np.asarray(ids, np.uint64)
  return np.stack([ids & np.uint64(2**32 - 1), ids >> np.uint64(32)], 1).astype(np.uint32)


def apply(x, name, severity=3, *, ids=None, seed=0, **options):
  ids = words(np.arange(len(x)) if ids is None else ids)
  out = corrupt(jnp.asarray(x), jnp.asarray(ids), name=name, severity=severity, seed=seed,
                **options)  # fmt: skip
  return np.asarray(out)


def cut(x):
  """The authors' last step: clipped, scaled, cast."""
  return np.uint8(np.clip(x, 0, 1) * 255 + 1e-6).astype(np.float64) / 255


def on_device(settings):
  return {k: jnp.asarray(v, jnp.float32 if np.asarray(v).dtype.kind == "f" else jnp.int32)
          for k, v in settings.items()}  # fmt: skip


def disk(radius, sigma):
  half = 8 if radius <= 8 else radius
  y, x = np.mgrid[-half : half + 1, -half : half + 1]
  kernel = (x**2 + y**2 <= radius**2).astype(np.float64)
  kernel /= kernel.sum()
  reach = 1 if radius <= 8 else 2
  taps = np.exp(-(np.mgrid[-reach : reach + 1] ** 2) / (2 * sigma**2))
  padded = np.pad(kernel, reach, mode="reflect")  # NumPy's reflect is OpenCV's REFLECT_101
  return sum(
    a * b * padded[i : i + len(kernel), j : j + len(kernel)]
    for i, a in enumerate(taps / taps.sum())
    for j, b in enumerate(taps / taps.sum())
  )


def expect_defocus_blur(x, level):
  kernel = disk(*level)
  half = len(kernel) // 2
  padded = np.pad(x, ((half, half), (half, half), (0, 0)), mode="reflect")
  windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, axis=(0, 1))
  return np.einsum("hwckl,kl->hwc", windows, kernel)


def zoomed(x, factor):
  size = len(x)
  seen = int(np.ceil(size / factor))
  top = (size - seen) // 2
  big = ndimage.zoom(x[top : top + seen, top : top + seen], (factor, factor, 1), order=1)
  trim = (len(big) - size) // 2
  return big[trim : trim + size, trim : trim + size]


def expect_zoom_blur(x, level):
  factors = np.arange(1, *level)
  return (x + sum(zoomed(x, f) for f in factors)) / (len(factors) + 1)


def expect_brightness(x, level):
  out = np.empty_like(x)
  for place in np.ndindex(x.shape[:2]):
    h, s, v = colorsys.rgb_to_hsv(*x[place])
    out[place] = colorsys.hsv_to_rgb(h, s, min(v + level, 1))
  return out


def expect_contrast(x, level):
  mean = np.array([[[x[..., c].mean() for c in range(3)]]])
  return (x - mean) * level + mean


def expect_pixelate(x, level):
  size = len(x)
  image = Image.fromarray(np.uint8(np.round(x * 255)))
  small = image.resize((int(size * level), int(size * level)), Image.Resampling.BOX)
  return (np.asarray(small.resize((size, size), Image.Resampling.BOX)) + 0.5) / 255


def expect_jpeg_compression(x, level):
  file = io.BytesIO()
  Image.fromarray(np.uint8(np.round(x * 255))).save(file, "JPEG", quality=level)
  return (np.asarray(Image.open(file)) + 0.5) / 255


EXPECT = {k.removeprefix("expect_"): f for k, f in globals().items() if k.startswith("expect_")}


@pytest.mark.parametrize("size", [SMALL, 72])
@pytest.mark.parametrize("name", sorted(EXPECT))
def test_corruption_without_chance_is_its_transcription(name, size):
  x = pictures(8, size)[:2] if size > SMALL else pictures(8, size)
  x[0, 0, 0] = 0  # black has no hue
  for severity in SEVERITIES:
    level = LEVELS[table_for(size)][name][severity - 1]
    found = np.round(apply(x, name, severity) * 255)
    expected = np.stack([EXPECT[name](image.astype(np.float64), level) for image in x])
    expected = np.clip(expected, 0, 1) * 255
    # Cut to whole levels; what lies on the edge between two may fall to either.
    assert np.all(found >= np.floor(expected - 2e-3)), severity
    assert np.all(found <= np.floor(expected + 2e-3)), severity


def test_constants_are_the_published(data_dir):
  facts = json.loads((data_dir / "corruptions" / "severity_constants.json").read_text())
  for table in ("imagenet_c", "cifar10_c"):
    size = facts[table]["image_size"]
    published = {n: facts[table]["benchmark"][n]["severity"] for n in NAMES}
    published["zoom_blur"] = [row[1:] for row in published["zoom_blur"]]
    for name in NAMES:
      ours = np.array(LEVELS[table][name], float)
      if name == "elastic_transform":
        ours = ours * size
      np.testing.assert_allclose(ours, published[name], err_msg=name)
  assert facts["alexnet_imagenet_c_error"] == ALEXNET_ERROR
  assert len(NAMES) == 15


def test_sizes_choose_the_table():
  assert (table_for(32), table_for(64), table_for(65)) == ("cifar10_c",) * 2 + ("imagenet_c",)


@pytest.mark.parametrize("name", NAMES)
def test_result_is_8_bits_and_a_function_of_seed_severity_and_id_alone(name):
  x = pictures(8, SMALL)
  ids = np.array([3, 2**32 + 3, 5, 6, 7, 8, 9, 10])
  x[1] = x[0]
  whole = apply(x, name, ids=ids)
  assert whole.min() >= 0
  assert whole.max() <= 1
  np.testing.assert_allclose(whole * 255, np.round(whole * 255), atol=1e-4)
  np.testing.assert_array_equal(apply(x[::-1], name, ids=ids[::-1])[::-1], whole)
  if name in EXPECT:
    np.testing.assert_array_equal(apply(x, name, ids=ids, seed=1), whole)
    np.testing.assert_array_equal(whole[0], whole[1])
  else:
    assert np.any(apply(x, name, ids=ids, seed=1) != whole)
    assert np.any(whole[0] != whole[1])  # only the high words of their ids differ


@pytest.mark.parametrize(
  "name", ["gaussian_noise", "glass_blur", "motion_blur", "fog", "jpeg_compression"]
)
def test_8_devices_corrupt_as_1(name):
  x = pictures(8, SMALL)
  sharding = parallel.batch_sharding(parallel.make_mesh(8))
  shared = corrupt(
    jax.device_put(x, sharding), jax.device_put(words(np.arange(8)), sharding),
    name=name, severity=3, seed=0,
  )  # fmt: skip
  difference = np.abs(np.asarray(shared) - apply(x, name)) * 255
  assert difference.max() < 1.01
  assert np.mean(difference > 0.5) < 0.001


# The published levels of three of these trade one constant for another, and the coarser grid of
# pixelate may fit a small picture better.
UNORDERED = ("glass_blur", "elastic_transform", "frost", "pixelate")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in UNORDERED])
def test_pictures_are_further_from_clean_at_each_severity(name):
  x = pictures(8, SMALL)
  error = np.array([np.sqrt(np.mean((apply(x, name, s) - x) ** 2)) for s in SEVERITIES])
  assert np.all(error[1:] > 0.75 * error[:-1])  # the angle of motion blur is drawn anew
  assert error[4] > 1.2 * error[0] > 0


def on_grey(name):
  """Corrupted at severity 5: 49,152 values of 128 / 255."""
  grey = np.full((8, SMALL, SMALL, 3), 128 / 255, np.float32)
  return np.concatenate([apply(grey, name, 5, ids=np.arange(8) + 8 * i) for i in range(8)])


def test_noises_have_their_moments():
  gaussian = on_grey("gaussian_noise")
  assert np.std(gaussian) == pytest.approx(0.1, rel=0.02)
  assert np.mean(gaussian) == pytest.approx(127.5 / 255, abs=5 * 0.1 / np.sqrt(gaussian.size))
  assert np.var(on_grey("shot_noise")) == pytest.approx(128 / 255 / 50, rel=0.04)
  impulse = on_grey("impulse_noise")
  assert np.mean(impulse == 0) == pytest.approx(0.035, rel=0.1)
  assert np.mean(impulse == 1) == pytest.approx(0.035, rel=0.1)
  assert np.mean((impulse == 0).all(-1)) < 0.001  # each channel for itself


def test_level_takes_the_place_of_the_severity():
  grey = np.full((8, SMALL, SMALL, 3), 128 / 255, np.float32)
  assert np.std(apply(grey, "gaussian_noise", 0, level=0.03)) == pytest.approx(0.03, rel=0.05)


def test_glass_blur_copies_one_pixel_after_another():
  level, size, key = (1.0, 2, 2), 12, jax.random.key(5)
  x = pictures(1, size)[0]
  settings = programs.PROGRAMS["glass_blur"].settings(level, size)
  found = programs.PROGRAMS["glass_blur"].apply(jnp.asarray(x), key, on_device(settings))
  blur = lambda z: ndimage.gaussian_filter(z, (1, 1, 0), mode="nearest")  # noqa: E731
  y = np.uint8(blur(x.astype(np.float64)) * 255 + 1e-3)
  for sweep in range(2):
    bits = jax.random.bits(jax.random.fold_in(key, sweep), (size, size, 2), jnp.uint16)
    offset = np.asarray(bits).astype(int) % 4 - 2
    for h in range(size - 2, 2, -1):
      for w in range(size - 2, 2, -1):
        down, right = offset[h, w]
        y[h, w] = y[h + down, w + right]
  expected = blur(y / 255)
  np.testing.assert_allclose(found, expected, atol=2 / 255)
  assert np.mean(np.abs(found - expected) > 1e-5) < 0.05  # where the first cut fell elsewhere


@pytest.mark.parametrize("degrees", [0, 25, -45, -135, -90])
def test_move_is_a_ray_of_image_magick(degrees):
  x = pictures(1, 12)[0].astype(np.float64)
  settings = on_device(programs._streak(3, 2.0))
  found = programs.move(jnp.asarray(x, jnp.float32), jnp.float32(np.radians(degrees)), settings)
  weight = np.exp(-(np.arange(7) ** 2) / 8)
  weight /= weight.sum()
  expected = np.zeros_like(x)
  for h, w in np.ndindex(12, 12):
    for i in range(7):
      down, right = (
        int(np.ceil(i * f(np.radians(degrees)) - 0.5 - 1e-9)) for f in (np.sin, np.cos)
      )
      expected[h, w] += weight[i] * x[np.clip(h + down, 0, 11), np.clip(w + right, 0, 11)]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_snow_is_its_transcription():
  level, size, key = LEVELS["cifar10_c"]["snow"][3], 32, jax.random.key(2)
  mean, std, zoom, threshold, radius, sigma, keep = level
  x = pictures(1, size)[0]
  settings = on_device(corruptions._settings("snow", level, size))
  found = programs.PROGRAMS["snow"].apply(jnp.asarray(x), key, settings)
  flakes_key, angle_key = jax.random.split(key)
  layer = mean + std * np.asarray(jax.random.normal(flakes_key, (size, size, 1)), np.float64)
  layer = zoomed(layer, zoom)
  layer[layer < threshold] = 0
  layer = cut(layer)
  angle = jax.random.uniform(angle_key, (), minval=-3 * np.pi / 4, maxval=-np.pi / 4)
  streak = on_device(programs._streak(radius, sigma))
  layer = cut(np.asarray(programs.move(jnp.asarray(layer, jnp.float32), angle, streak)))
  grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
  expected = keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5) + layer
  expected = expected + np.rot90(layer, k=2)
  difference = np.abs(found - expected)
  assert difference.max() < 2.1 / 255
  assert np.mean(difference > 1e-5) < 0.02
  assert 0.02 < np.mean(layer > 0) < 0.9


def test_plasma_is_diamond_square():
  n, decay, key = 16, 1.7, jax.random.key(4)
  u = np.asarray(jax.random.uniform(key, (n, n), minval=-1.0, maxval=1.0), np.float64)
  field, step, wibble = np.zeros((n, n)), n, 1.0
  while step >= 2:
    half = step // 2
    mid, top = np.arange(half, n, step), np.arange(0, n, step)
    for y in mid:
      for x in mid:
        corners = [field[(y + a) % n, (x + b) % n] for a in (-half, half) for b in (-half, half)]
        field[y, x] = np.mean(corners) + wibble**2 * u[y, x]
    filled = field.copy()
    for rows, columns in ((top, mid), (mid, top)):
      for y in rows:
        for x in columns:
          around = [filled[(y + a) % n, (x + b) % n]
                    for a, b in ((-half, 0), (half, 0), (0, -half), (0, half))]  # fmt: skip
          field[y, x] = np.mean(around) + wibble**2 * u[y, x]
    step, wibble = half, wibble / decay
  field -= field.min()
  found = programs.plasma(key, n, decay)
  np.testing.assert_allclose(found, field / field.max(), atol=1e-5)
  assert programs.plasma(key, 11, decay).shape == (11, 11)


def test_fog_dims_towards_its_fractal():
  key, x = jax.random.key(0), pictures(1, 16)[0]
  found = programs.PROGRAMS["fog"].apply(jnp.asarray(x), key, {"first": 0.5, "second": 2.0})
  fog = np.asarray(programs.plasma(key, 16, 2.0))[..., None]
  np.testing.assert_allclose(found, (x + 0.5 * fog) * x.max() / (x.max() + 0.5), atol=1e-5)


@pytest.mark.parametrize("mode", ["mirror", "reflect"])
def test_warp_is_scipy_s(mode):
  x = pictures(1, 9)[0]
  np_rng = np.random.default_rng(1)
  row, column = np_rng.uniform(-5, 14, (2, 9, 9)).astype(np.float32)
  found = programs.warp(jnp.asarray(x), row, column, mode=mode)
  for c in range(3):
    expected = ndimage.map_coordinates(x[..., c], (row, column), order=1, mode=mode)
    np.testing.assert_allclose(found[..., c], expected, atol=1e-4)


def test_affine_map_takes_its_points_along():
  source = np.float32([[5, 5], [5, 1], [1, 1]])
  to = np.float32([[6, 5], [5, 2], [0, 1]])
  row, column = programs.affine_places(jnp.asarray(to), jnp.asarray(source), 8)
  for (x, y), (from_x, from_y) in zip(to.astype(int), source):
    np.testing.assert_allclose((column[y, x], row[y, x]), (from_x, from_y), atol=1e-4)


def test_elastic_transform_moves_as_far_as_its_level_says():
  size = 32
  x = np.tile(np.arange(size, dtype=np.float32).reshape(1, size, 1) / 255, (size, 1, 3))
  still = on_device(corruptions._settings("elastic_transform", (0.05, 0.06, 0.0), size))
  keys = jax.random.split(jax.random.key(0), 64)
  apply_all = jax.vmap(programs.PROGRAMS["elastic_transform"].apply, (None, 0, None))
  moved = np.asarray(apply_all(jnp.asarray(x), keys, still))
  shift = (moved - x)[:, :, 8:-8, 0] * 255  # pixels to the right, away from the border
  # uniform(-1, 1) has variance 1/3; a Gaussian of sigma s leaves 1 / (4 pi s^2) of it
  expected = 0.05 * size * np.sqrt(1 / 3 / (4 * np.pi * (0.06 * size) ** 2))
  assert np.std(shift) == pytest.approx(expected, rel=0.1)
  nothing = on_device(corruptions._settings("elastic_transform", (0.0, 0.0, 0.0), size))
  same = programs.PROGRAMS["elastic_transform"].apply(jnp.asarray(x), keys[0], nothing)
  np.testing.assert_allclose(same, x, atol=1e-5)


def test_unknown_names_and_severities_are_errors():
  x = pictures(1, SMALL)
  with pytest.raises(ValueError, match="unknown corruption 'rain'; expected one of gaussian_noise"):
    apply(x, "rain")
  with pytest.raises(ValueError, match="severity is 6 of fog; expected 1 to 5"):
    apply(x, "fog", 6)
