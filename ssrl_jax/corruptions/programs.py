"""Each of the 14 corruptions that the device computes: a program for one picture, and its settings.

`ssrl_jax.corruptions` says what they are and where they depart from the published ones. A
program is a pure function of a picture (multiples of 1 / 255), a key and settings; its result is
clipped and cut to 8 bits by the caller. Settings are made on the host, of the same shapes for all
levels of a picture's side.

Shapes: H W C picture, S its side, N side of a fractal, T taps, Z zooms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy import ndimage

from ssrl_jax.corruptions.levels import Level
from ssrl_jax.method import Array
from ssrl_jax.pixels import greyscale

Settings = dict[str, np.ndarray]

MAX_TAPS = 41  # of a motion blur: 2 * 20 + 1
MAX_ZOOMS = 32
DISK = 21  # side of the largest defocus kernel


def to_8_bits(image: Array) -> Array:
  """Cut to 8 bits, as a cast does. 0.001 of a level is added: k / 255 * 255 may fall below k."""
  return jnp.floor(jnp.clip(image, 0, 1) * 255 + 1e-3) / 255


def _number(level: float, size: int) -> Settings:
  del size
  return {"level": float(level)}


def _gaussian_noise(image_HWC: Array, key: Array, settings: Settings) -> Array:
  """Level: standard deviation."""
  return image_HWC + settings["level"] * jax.random.normal(key, image_HWC.shape)


def _shot_noise(image_HWC: Array, key: Array, settings: Settings) -> Array:
  """Level: photons of a white value."""
  photons = settings["level"]
  return jax.random.poisson(key, image_HWC * photons).astype(jnp.float32) / photons


def _impulse_noise(image_HWC: Array, key: Array, settings: Settings) -> Array:
  """Level: share of the values, each channel for itself, that become 0 or 1, half of them each."""
  u_HWC = jax.random.uniform(key, image_HWC.shape)
  amount = settings["level"]
  return jnp.where(u_HWC < amount, (u_HWC < amount / 2).astype(jnp.float32), image_HWC)


def _blur_matrix(sigma: float, size: int, *, mode: str, truncate: float) -> np.ndarray:
  """[S, S]: SciPy's Gaussian filter of one axis as a matrix; scikit-image's filter is the same."""
  identity = np.eye(size)
  if sigma <= 0:
    return identity
  return ndimage.gaussian_filter1d(identity, sigma, axis=0, mode=mode, truncate=truncate)


def _both_axes(image_HWC: Array, matrix_OH: Array) -> Array:
  """A linear map along rows and columns; exact, not rounded to bfloat16 on an accelerator."""
  exact = jax.lax.Precision.HIGHEST
  rows_OWC = jnp.einsum("oh,hwc->owc", matrix_OH, image_HWC, precision=exact)
  return jnp.einsum("pw,owc->opc", matrix_OH, rows_OWC, precision=exact)


def _defocus_settings(level: Level, size: int) -> Settings:
  """Level: radius of a disk, sigma of the Gaussian (3x3, above radius 8 5x5) that smooths it."""
  del size
  radius, sigma = level
  half, reach = (8, 1) if radius <= 8 else (int(radius), 2)
  square = np.arange(-half, half + 1) ** 2
  disk = (square.reshape(-1, 1) + square.reshape(1, -1) <= radius**2).astype(np.float64)
  taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
  for axis in (0, 1):  # OpenCV mirrors the disk at the border of its grid
    disk = ndimage.correlate1d(disk / disk.sum() if axis == 0 else disk, taps / taps.sum(), axis,
                               mode="mirror")  # fmt: skip
  return {"kernel": np.pad(disk, DISK // 2 - half)}


def _defocus_blur(image_HWC: Array, key: Array, settings: Settings) -> Array:
  del key
  half = DISK // 2
  padded_HWC = jnp.pad(image_HWC, ((half, half), (half, half), (0, 0)), mode="reflect")
  # The channels as a batch: an ordinary convolution, which CPUs do faster than a depthwise one.
  return jax.lax.conv_general_dilated(
    padded_HWC.transpose(2, 0, 1)[:, None], settings["kernel"][None, None], (1, 1), "VALID",
    precision=jax.lax.Precision.HIGHEST,
  )[:, 0].transpose(1, 2, 0)  # fmt: skip


def _glass_settings(level: Level, size: int) -> Settings:
  """Level: sigma of the blur before and after, largest step of a pixel, sweeps."""
  sigma, step, sweeps = level
  return {
    "blur": _blur_matrix(sigma, size, mode="nearest", truncate=4),
    "step": step,
    "sweeps": sweeps,
  }


def _glass_blur(image_HWC: Array, key: Array, settings: Settings) -> Array:
  step, side = settings["step"], image_HWC.shape[0]
  image_HWC = to_8_bits(_both_axes(image_HWC, settings["blur"]))
  swept = side - 2 * step  # rows and columns side - step, down to step + 1

  def sweep(number, image_HWC):
    bits_HW2 = jax.random.bits(jax.random.fold_in(key, number), (side, side, 2), jnp.uint16)
    offset_HW2 = bits_HW2.astype(jnp.int32) % (2 * step) - step

    def copy(place, image_HWC):
      h, w = side - step - place // swept, side - step - place % swept
      from_h, from_w = h + offset_HW2[h, w, 0], w + offset_HW2[h, w, 1]
      return image_HWC.at[h, w].set(image_HWC[from_h, from_w])

    return jax.lax.fori_loop(0, swept * swept, copy, image_HWC)

  image_HWC = jax.lax.fori_loop(0, settings["sweeps"], sweep, image_HWC)
  return _both_axes(image_HWC, settings["blur"])


def _streak(radius: float, sigma: float) -> Settings:
  """ImageMagick's one-sided kernel of a motion blur: 2 * radius + 1 taps."""
  num = int(2 * radius + 1)
  taps = np.exp(-(np.arange(num) ** 2) / (2 * sigma**2))
  return {"taps": np.pad(taps / taps.sum(), (0, MAX_TAPS - num)), "num_taps": num}


def move(image_HWC: Array, angle: Array, settings: Settings) -> Array:
  """ImageMagick's MotionBlur: each pixel is a weighted mean of those on a ray from it.

  Args:
    angle: of the ray, radians, clockwise from the right.
    settings: of `_streak`. Beyond the border its nearest pixel is repeated.
  """
  far = MAX_TAPS
  padded_HWC = jnp.pad(image_HWC, ((far, far), (far, far), (0, 0)), mode="edge")
  cos, sin = jnp.cos(angle), jnp.sin(angle)

  def add(i, out_HWC):
    down, right = (jnp.ceil(i * x - 0.5).astype(jnp.int32) + far for x in (sin, cos))
    seen_HWC = jax.lax.dynamic_slice(padded_HWC, (down, right, 0), image_HWC.shape)
    return out_HWC + settings["taps"][i] * seen_HWC

  return jax.lax.fori_loop(0, settings["num_taps"], add, jnp.zeros_like(image_HWC))


def _motion_settings(level: Level, size: int) -> Settings:
  """Level: radius and sigma of `_streak`."""
  del size
  return _streak(*level)


def _motion_blur(image_HWC: Array, key: Array, settings: Settings) -> Array:
  angle = jax.random.uniform(key, (), minval=-np.pi / 4, maxval=np.pi / 4)
  return move(image_HWC, angle, settings)


def _zoom_matrix(factor: float, size: int) -> np.ndarray:
  """[S, S]: SciPy's linear zoom into the middle, along one axis."""
  seen = int(np.ceil(size / factor))
  top = (size - seen) // 2
  zoomed = ndimage.zoom(np.eye(seen), (factor, 1), order=1)
  trim = (len(zoomed) - size) // 2
  return np.pad(zoomed[trim : trim + size], ((0, 0), (top, size - seen - top)))


def _zoom_settings(level: Level, size: int) -> Settings:
  """Level: end (left out) and step of the zoom factors, which begin at 1."""
  factors = np.arange(1, *level)
  zooms_ZOH = np.zeros((MAX_ZOOMS, size, size), np.float32)
  zooms_ZOH[: len(factors)] = [_zoom_matrix(f, size) for f in factors]
  return {"zooms": zooms_ZOH, "num_zooms": len(factors)}


def _zoom_blur(image_HWC: Array, key: Array, settings: Settings) -> Array:
  del key
  zooms_ZOH, num = settings["zooms"], settings["num_zooms"]
  add = lambda i, sum_HWC: sum_HWC + _both_axes(image_HWC, zooms_ZOH[i])  # noqa: E731
  return jax.lax.fori_loop(0, num, add, image_HWC) / (num + 1)


def _snow_settings(level: Level, size: int) -> Settings:
  """Level: mean and deviation of the flakes, their zoom, threshold, radius and sigma, keep."""
  mean, std, zoom, threshold, radius, sigma, keep = level
  numbers = {"mean": mean, "std": std, "threshold": threshold, "keep": keep}
  numbers = {k: float(v) for k, v in numbers.items()}
  return numbers | _streak(radius, sigma) | {"zoom": _zoom_matrix(zoom, size)}


def _snow(image_HWC: Array, key: Array, settings: Settings) -> Array:
  flakes_key, angle_key = jax.random.split(key)
  noise_HW1 = jax.random.normal(flakes_key, (*image_HWC.shape[:2], 1))
  flakes_HW1 = _both_axes(settings["mean"] + settings["std"] * noise_HW1, settings["zoom"])
  flakes_HW1 = to_8_bits(jnp.where(flakes_HW1 < settings["threshold"], 0, flakes_HW1))
  angle = jax.random.uniform(angle_key, (), minval=-3 * np.pi / 4, maxval=-np.pi / 4)
  flakes_HW1 = to_8_bits(move(flakes_HW1, angle, settings))
  pale_HWC = jnp.maximum(image_HWC, 1.5 * greyscale(image_HWC) + 0.5)
  keep = settings["keep"]
  return keep * image_HWC + (1 - keep) * pale_HWC + flakes_HW1 + flakes_HW1[::-1, ::-1]


def plasma(key: Array, size: int, decay: Array | float) -> Array:
  """A diamond-square fractal, float32 [size, size] from 0 to 1: smoother for a larger `decay`.

  Its grid is the next power of two and wraps around. The chance added to a middle of four points is
  uniform, its range divided by decay^2 at each halving of their distance.
  """
  n = 1 << (size - 1).bit_length()
  u_NN = jax.random.uniform(key, (n, n), minval=-1.0, maxval=1.0)
  field, reach = jnp.zeros((1, 1)), 1.0
  while field.shape[0] < n:
    m = field.shape[0]
    u = reach * u_NN[:: n // (2 * m), :: n // (2 * m)]
    down, right = jnp.roll(field, -1, axis=0), jnp.roll(field, -1, axis=1)
    middle = (field + down + right + jnp.roll(down, -1, axis=1)) / 4 + u[1::2, 1::2]
    above, left = jnp.roll(middle, 1, axis=0), jnp.roll(middle, 1, axis=1)
    between_columns = (middle + above + field + right) / 4 + u[0::2, 1::2]
    between_rows = (middle + left + field + down) / 4 + u[1::2, 0::2]
    even = jnp.stack([field, between_columns], axis=-1).reshape(m, 2 * m)
    odd = jnp.stack([between_rows, middle], axis=-1).reshape(m, 2 * m)
    field, reach = jnp.stack([even, odd], axis=1).reshape(2 * m, 2 * m), reach / decay**2
  field -= jnp.min(field)
  return (field / jnp.max(field))[:size, :size]


def _pair(level: Level, size: int) -> Settings:
  del size
  return {"first": float(level[0]), "second": float(level[1])}


def _frost(image_HWC: Array, key: Array, settings: Settings) -> Array:
  """Level: weights of the picture and of the ice."""
  return settings["first"] * image_HWC + settings["second"] * ice(key, image_HWC.shape[0])


def ice(key: Array, size: int) -> Array:
  """float32 [S, S, 3] in [0, 1]: bright veins and grains on a dim, bluish ground."""
  decays = np.float32([1.35, 1.6, 1.1])
  fields = jax.vmap(lambda key, decay: plasma(key, size, decay))
  veins, ground, grain = fields(jax.random.split(key, 3), decays)
  crest = (1 - jnp.abs(2 * veins - 1)) ** 4  # sharp where the fractal crosses its middle
  light = jnp.clip(0.15 + 0.35 * ground + 0.45 * crest + 0.4 * (grain - 0.5), 0, 1)[..., None]
  return light ** np.float32([1.25, 1.05, 0.95]).reshape(1, 1, 3)


def _fog(image_HWC: Array, key: Array, settings: Settings) -> Array:
  """Level: strength, and decay of the fractal."""
  strength, most = settings["first"], jnp.max(image_HWC)
  fog_HW1 = plasma(key, image_HWC.shape[0], settings["second"])[..., None]
  return (image_HWC + strength * fog_HW1) * most / (most + strength)


def _brightness(image_HWC: Array, key: Array, settings: Settings) -> Array:
  """Level: added to the value of HSV. Hue and saturation stay, so all channels grow alike."""
  del key
  value_HW1 = jnp.max(image_HWC, axis=-1, keepdims=True)
  brighter_HW1 = jnp.clip(value_HW1 + settings["level"], 0, 1)
  grown_HWC = image_HWC * (brighter_HW1 / jnp.maximum(value_HW1, 1 / 255))
  return jnp.where(value_HW1 > 0, grown_HWC, brighter_HW1)


def _contrast(image_HWC: Array, key: Array, settings: Settings) -> Array:
  """Level: factor of the distance to each channel's mean."""
  del key
  mean_11C = jnp.mean(image_HWC, axis=(0, 1), keepdims=True)
  return (image_HWC - mean_11C) * settings["level"] + mean_11C


def _elastic_settings(level: Level, size: int) -> Settings:
  """Level: scale and smoothness of the displacement, jitter of the affine map; in sides."""
  scale, sigma, jitter = (x * size for x in level)
  blur = _blur_matrix(sigma, size, mode="reflect", truncate=3)
  return {"blur": scale * blur, "blur_columns": blur, "jitter": float(jitter)}


def _elastic_transform(image_HWC: Array, key: Array, settings: Settings) -> Array:
  affine_key, field_key = jax.random.split(key)
  side = image_HWC.shape[0]
  middle, arm = side // 2, side // 3
  from_32 = middle + arm * jnp.float32([[1, 1], [1, -1], [-1, -1]])
  jitter_32 = jax.random.uniform(affine_key, (3, 2), minval=-1.0, maxval=1.0)
  to_32 = from_32 + settings["jitter"] * jitter_32
  image_HWC = warp(image_HWC, *affine_places(to_32, from_32, side), mode="mirror")
  noise_2HW = jax.random.uniform(field_key, (2, side, side), minval=-1.0, maxval=1.0)
  exact = jax.lax.Precision.HIGHEST
  field_2HW = jnp.einsum(
    "oh,nhw,pw->nop", settings["blur"], noise_2HW, settings["blur_columns"], precision=exact
  )
  column_HW, row_HW = jnp.meshgrid(jnp.arange(side), jnp.arange(side))
  return warp(image_HWC, row_HW + field_2HW[0], column_HW + field_2HW[1], mode="reflect")


def affine_places(to_32: Array, from_32: Array, side: int) -> tuple[Array, Array]:
  """Row and column [S, S] that each pixel is read from, when points (x, y) go `from` -> `to`.

  A pixel has the same barycentric coordinates in both triangles.
  """
  column_HW, row_HW = jnp.meshgrid(jnp.arange(side), jnp.arange(side))
  (ax, ay), (bx, by), (cx, cy) = to_32
  area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
  beta_HW = ((column_HW - ax) * (cy - ay) - (cx - ax) * (row_HW - ay)) / area
  gamma_HW = ((bx - ax) * (row_HW - ay) - (column_HW - ax) * (by - ay)) / area
  x_HW, y_HW = (
    from_32[0, i]
    + beta_HW * (from_32[1, i] - from_32[0, i])
    + gamma_HW * (from_32[2, i] - from_32[0, i])
    for i in (0, 1)
  )
  return y_HW, x_HW


def warp(image_HWC: Array, row_HW: Array, column_HW: Array, *, mode: str) -> Array:
  """The picture read at these places, linearly; beyond the border by SciPy's `mode`."""
  read = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode=mode)
  return jax.vmap(lambda x_HW: read(x_HW, (row_HW, column_HW)), in_axes=2, out_axes=2)(image_HWC)


def _box_matrix(num_in: int, num_out: int) -> np.ndarray:
  """[num_out, num_in]: Pillow's BOX resize of one axis."""
  identity = Image.fromarray(np.eye(num_in, dtype=np.float32))
  return np.asarray(identity.resize((num_in, num_out), Image.Resampling.BOX))


def _pixelate_settings(level: Level, size: int) -> Settings:
  """Level: factor of the side, from which the picture comes back."""
  small = int(size * level)
  shrink, grow = np.zeros((2, size, size), np.float32)
  shrink[:small] = _box_matrix(size, small)
  grow[:, :small] = _box_matrix(small, size)
  return {"shrink": shrink, "grow": grow}


def _pixelate(image_HWC: Array, key: Array, settings: Settings) -> Array:
  del key
  exact = jax.lax.Precision.HIGHEST
  round_8_bits = lambda x: jnp.floor(x * 255 + 0.5 + 1e-3) / 255  # noqa: E731
  for matrix_OH in (settings["shrink"], settings["grow"]):  # Pillow rounds after each axis
    image_HWC = round_8_bits(jnp.einsum("pw,hwc->hpc", matrix_OH, image_HWC, precision=exact))
    image_HWC = round_8_bits(jnp.einsum("oh,hwc->owc", matrix_OH, image_HWC, precision=exact))
  return image_HWC


class Program(NamedTuple):
  apply: Callable[[Array, Array, Settings], Array]  # picture [H, W, 3], key, settings -> picture
  settings: Callable[[Level, int], Settings]  # level, side of the picture


PROGRAMS = {
  "gaussian_noise": Program(_gaussian_noise, _number),
  "shot_noise": Program(_shot_noise, _number),
  "impulse_noise": Program(_impulse_noise, _number),
  "defocus_blur": Program(_defocus_blur, _defocus_settings),
  "glass_blur": Program(_glass_blur, _glass_settings),
  "motion_blur": Program(_motion_blur, _motion_settings),
  "zoom_blur": Program(_zoom_blur, _zoom_settings),
  "snow": Program(_snow, _snow_settings),
  "frost": Program(_frost, _pair),
  "fog": Program(_fog, _pair),
  "brightness": Program(_brightness, _number),
  "contrast": Program(_contrast, _number),
  "elastic_transform": Program(_elastic_transform, _elastic_settings),
  "pixelate": Program(_pixelate, _pixelate_settings),
}
