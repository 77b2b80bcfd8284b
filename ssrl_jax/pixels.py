"""Operations on one picture, float32 [H, W, 3] in [0, 1]: pure, no chance in them.

Where libraries differ, torchvision's definitions are followed: brightness multiplies, contrast
blends with the mean grey level, saturation blends with the greyscale picture, hue turns the HSV
colour circle. Nothing is rounded to 8 bits on the way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax.method import Array

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma of red, green, blue; what PIL and torchvision use


def resized_crop(image_HWC: Array, box: Array, flip: Array, *, size: int) -> Array:
  """Crops, resizes to [size, size, 3] (bicubic, antialiased, as PIL) and mirrors where `flip`.

  Args:
    box: float32 [4]: top, left, height, width. Nothing outside it is read.
    flip: bool, left to right; mirroring the weights costs nothing.
  """
  top, left, height, width = box
  rows_OH = resize_weights(image_HWC.shape[0], size, top, height, top, top + height)
  cols_OW = resize_weights(image_HWC.shape[1], size, left, width, left, left + width)
  return resample(image_HWC, rows_OH, jnp.where(flip, cols_OW[::-1], cols_OW))


def colour_jitter(
  image_HWC: Array, factors: Array, order_J: Array, operations: tuple[int, ...] = (0, 1, 2, 3)
) -> Array:
  """Brightness, contrast, saturation and hue, one after the other.

  Args:
    factors: float32 [4], one for each of the four.
    order_J: int32, a permutation of range(J). Under `vmap` it should be shared by all pictures.
    operations: which of the four there are, J of them.
  """
  adjust = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
  branches = [lambda image, factors, i=i: adjust[i](image, factors[i]) for i in operations]
  for place in range(len(operations)):
    image_HWC = jax.lax.switch(order_J[place], branches, image_HWC, factors)
  return image_HWC


def adjust_brightness(image_HWC: Array, factor: Array) -> Array:
  """Multiplies, and clips to [0, 1]. (DeepMind's BYOL adds instead.)"""
  return jnp.clip(image_HWC * factor, 0, 1)


def adjust_contrast(image_HWC: Array, factor: Array) -> Array:
  """Blends with the picture's mean grey level. (TensorFlow: with the mean of each channel.)"""
  h, w, _ = image_HWC.shape
  mean = jnp.sum(image_HWC * channels(GREY, 3)) / (h * w)
  return jnp.clip(image_HWC * factor + mean * (1 - factor), 0, 1)


def adjust_saturation(image_HWC: Array, factor: Array) -> Array:
  """Blends with the greyscale picture. (TensorFlow: multiplies the saturation of HSV.)"""
  return jnp.clip(image_HWC * factor + greyscale(image_HWC) * (1 - factor), 0, 1)


def adjust_hue(image_HWC: Array, shift: Array) -> Array:
  """Turns the hue of HSV by `shift` of the circle; keeps value and saturation."""
  r, g, b = image_HWC[..., 0], image_HWC[..., 1], image_HWC[..., 2]
  high = jnp.maximum(jnp.maximum(r, g), b)
  low = jnp.minimum(jnp.minimum(r, g), b)
  chroma = high - low
  inverse = 1 / jnp.where(chroma > 0, chroma, 1)
  hue_of_g_or_b = jnp.where(high == g, 2 + (b - r) * inverse, 4 + (r - g) * inverse)
  hue = jnp.where(high == r, (g - b) * inverse, hue_of_g_or_b) / 6 + shift

  def channel(phase):  # x - floor(x), since a remainder is ten times slower on CPU
    angle = hue + phase
    return low + chroma * jnp.clip(jnp.abs(6 * (angle - jnp.floor(angle)) - 3) - 1, 0, 1)

  return jnp.stack([channel(phase) for phase in (0.0, 2 / 3, 1 / 3)], axis=-1)


def greyscale(image_HWC: Array) -> Array:
  """The luma (`GREY`) in all three channels."""
  r, g, b = image_HWC[..., :1], image_HWC[..., 1:2], image_HWC[..., 2:]
  luma = GREY[0] * r + GREY[1] * g + GREY[2] * b
  return jnp.broadcast_to(luma, image_HWC.shape)


def blur_radius(size: int) -> int:
  """Taps on each side of the centre: SimCLR's kernel of a tenth of the side, made odd, at least 3.

  224 pixels have 23 taps, 32 pixels 3 (so that there a large sigma comes near a 3x3 mean).
  """
  return max(1, size // 10 // 2)


def gaussian_blur(image_HWC: Array, sigma: Array) -> Array:
  """Blurs a square picture; `sigma` in pixels, length of the kernel by `blur_radius`.

  Beyond the border the nearest pixel is repeated, as PIL does. (TensorFlow and SimCLR pad with
  zeros, which darkens borders; torchvision reflects.)
  """
  size = image_HWC.shape[0]
  r = blur_radius(size)
  offset_OI = np.arange(size + 2 * r)[None, :] - np.arange(size)[:, None] - r
  weights_OI = jnp.where(np.abs(offset_OI) <= r, jnp.exp(-(offset_OI**2) / (2 * sigma**2)), 0)
  weights_OI /= jnp.sum(weights_OI, axis=1, keepdims=True)
  padded_HWC = jnp.pad(image_HWC, ((r, r), (r, r), (0, 0)), mode="edge")
  return resample(padded_HWC, weights_OI, weights_OI)


def solarise(image_HWC: Array) -> Array:
  """Inverts what is at least 0.5, as PIL and torchvision with threshold 128."""
  return jnp.where(image_HWC < 0.5, image_HWC, 1 - image_HWC)


def add_noise(image_HWC: Array, sigma: Array, seed: Array) -> Array:
  """Adds Gaussian noise of deviation `sigma`, drawn with the uint32 `seed`; clips to [0, 1]."""
  noise_HWC = jax.random.normal(jax.random.key(seed), image_HWC.shape)
  return jnp.clip(image_HWC + sigma * noise_HWC, 0, 1)


def normalise(image_HWC: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
  """Subtracts the mean of each channel and divides by its standard deviation."""
  return (image_HWC - channels(mean, 3)) / channels(std, 3)


def denormalise(views: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
  """Undoes `normalise` for looking at: float [..., 3] -> uint8 [..., 3], clipped and rounded."""
  pixels = views * channels(std, views.ndim) + channels(mean, views.ndim)
  return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)


def resample(image_HWC: Array, rows_OH: Array, cols_PW: Array) -> Array:
  """Weighs rows and columns, clips to [0, 1] (bicubic overshoots): [H, W, C] -> [O, P, C].

  Two dense products: as fast as `jax.image.scale_and_translate` on CPU, and what accelerators like.
  """
  exact = jax.lax.Precision.HIGHEST  # else an accelerator rounds to bfloat16 or TensorFloat-32
  image_OWC = jnp.einsum("oh,hwc->owc", rows_OH, image_HWC, precision=exact)
  return jnp.clip(jnp.einsum("pw,owc->opc", cols_PW, image_OWC, precision=exact), 0, 1)


def resize_weights(
  num_in: int, num_out: int, start: Array, length: Array, low: Array | int, high: Array
) -> Array:
  """Bicubic antialiased weights [num_out, num_in] that resize [start, start + length).

  The rows sum to 1 and give weight only to pixels inside [low, high), as PIL's resize does inside
  the picture. When shrinking, the kernel widens with the scale.
  """
  scale = length / num_out
  centre_O1 = start + (np.arange(num_out, dtype=np.float32)[:, None] + 0.5) * scale
  pixel_1I = np.arange(num_in, dtype=np.float32)[None, :] + 0.5
  weights_OI = _cubic((pixel_1I - centre_O1) / jnp.maximum(scale, 1))
  weights_OI = jnp.where((low < pixel_1I) & (pixel_1I < high), weights_OI, 0)
  return weights_OI / jnp.sum(weights_OI, axis=1, keepdims=True)


def _cubic(x: Array) -> Array:
  """Keys' cubic kernel with a = -0.5, PIL's BICUBIC; exactly 0 at whole numbers but 0."""
  x = jnp.abs(x)
  inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
  return jnp.where(x < 1, inner, jnp.where(x < 2, outer, 0))


def channels(values: tuple[float, ...], rank: int) -> np.ndarray:
  """One value a channel, float32 [1, ..., 1, 3] of the given rank."""
  return np.asarray(values, np.float32).reshape((1,) * (rank - 1) + (-1,))
