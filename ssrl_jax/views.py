"""Random views of pictures, computed on the device inside the compiled step.

`make_views` draws what chance decides for each view of each picture (`draw`), then renders it
(`render`): crop and flip, colour jitter, greyscale, blur, solarisation, normalisation. What one
picture gets is a function of the key, the picture's id, the spec's name and the view's number, and
of nothing else: not of the batch, the picture's place in it, the other specs or the devices.

Where libraries differ, torchvision's definitions are followed: brightness multiplies, contrast
blends with the mean grey level, saturation blends with the greyscale picture, hue turns the HSV
colour circle. Nothing is rounded to 8 bits on the way.

Shapes: B batch, H W C picture, S side of the canvas, J jitter operations in use, T tries.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax.method import Array, ViewSpec

TRIES = 10  # crops drawn before giving up on the area and aspect asked for, as torchvision
GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma of red, green, blue; what PIL and torchvision use


class Draws(NamedTuple):
  """What chance decides for one view of one picture."""

  box: Array  # float32 [4]: top, left, height, width of the crop, whole pixels of the canvas
  flip: Array  # bool, as the other choices
  jitter: Array
  factors: Array  # float32 [4]: brightness, contrast, saturation, hue
  greyscale: Array
  blur: Array
  sigma: Array  # float32, pixels
  solarise: Array


def make_views(
  key: Array, batch: dict[str, Array], specs: tuple[ViewSpec, ...]
) -> dict[str, Array]:
  """Every view of every spec.

  The order of the jitter operations is drawn once for all pictures of a batch, anew for each view
  (torchvision draws it for each picture): an order of its own for each picture would make the
  device compute every operation at every place.

  Args:
    key: of this step; a new one gives new views.
    batch: image uint8 [B, S, S, 3], the picture at the top left of its canvas; extent int32 [B, 2],
      the picture's height and width; id uint32 [B, 2], low and high word of the picture's position.
    specs: see `check_specs`.

  Returns:
    {spec.name: float32 [B, spec.count, spec.size, spec.size, 3]}, normalised.
  """
  check_specs(specs)
  return {spec.name: _views_of(key, batch, spec) for spec in specs}


def _views_of(key: Array, batch: dict[str, Array], spec: ViewSpec) -> Array:
  """All views of one spec, float32 [B, count, size, size, 3]."""
  spec_key = jax.random.fold_in(key, np.uint32(zlib.crc32(spec.name.encode())))
  # A loop, not a batch: compiled once for any count, and the order of the jitter stays a scalar.
  views_VBHWC = jax.lax.map(
    lambda view: _one_view(jax.random.fold_in(spec_key, view), batch, spec, view),
    jnp.arange(spec.count),
  )
  return jnp.swapaxes(views_VBHWC, 0, 1)


def _one_view(key: Array, batch: dict[str, Array], spec: ViewSpec, view: Array) -> Array:
  """View number `view` of every picture, float32 [B, size, size, 3]."""
  order_key, picture_key = jax.random.split(key)
  order_J = jax.random.permutation(order_key, len(jitter_operations(spec)))

  def one(image_SSC, extent_2, id_2):
    own_key = jax.random.fold_in(jax.random.fold_in(picture_key, id_2[0]), id_2[1])
    draws = draw(own_key, extent_2, spec, view)
    return render(image_SSC, draws, order_J, spec)

  return jax.vmap(one)(batch["image"], batch["extent"], batch["id"])


def eval_view(
  batch: dict[str, Array],
  *,
  size: int,
  crop: float,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> Array:
  """The deterministic view for evaluation: torchvision's Resize and CenterCrop, then normalised.

  The shorter side of the picture becomes round(size / crop), of which the central `size` are kept:
  size 224 and crop 0.875 are the usual Resize(256), CenterCrop(224). With crop 1 a square picture
  is resized as it is, and one that already has `size` is returned unchanged.

  Args:
    batch: image and extent as in `make_views`.
    size: side of the view, pixels.
    crop: fraction of the resized picture's shorter side that is kept, in (0, 1].
    mean, std: see `normalise`.

  Returns:
    float32 [B, size, size, 3], normalised.
  """
  if size < 1:
    raise ValueError(f"size is {size}; the evaluation view needs at least 1 pixel")
  if not 0 < crop <= 1:
    raise ValueError(f"crop is {crop}; expected 0 < crop <= 1, e.g. 0.875, or 1.0 for no crop")
  shorter = round(size / crop)

  def one(image_SSC, extent_2):
    resized_2 = shorter * extent_2 // jnp.min(extent_2)
    scale_2 = extent_2 / resized_2  # pixels of the picture for one of the view
    start_2 = jnp.round((resized_2 - size) / 2) * scale_2
    rows_OH, cols_OW = (
      _resize_weights(image_SSC.shape[i], size, start_2[i], size * scale_2[i], 0, extent_2[i])
      for i in range(2)
    )
    canvas_SSC = image_SSC.astype(jnp.float32) / 255
    return normalise(_resample(canvas_SSC, rows_OH, cols_OW), mean, std)

  return jax.vmap(one)(batch["image"], batch["extent"])


def denormalise(views: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
  """Undoes `normalise` for looking at: float [..., 3] -> uint8 [..., 3], clipped and rounded."""
  pixels = views * _channels(std, views.ndim) + _channels(mean, views.ndim)
  return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)


def draw(key: Array, extent_2: Array, spec: ViewSpec, view: Array | int) -> Draws:
  """Draws view number `view` of one picture of height and width `extent_2`."""
  # One call for all the numbers: compiling a call costs far more than drawing a few too many.
  u = jax.random.uniform(key, (2 * TRIES + 12,))
  flip, jitter, *u_factors, greyscale, blur, sigma, solarise = u[2 * TRIES + 2 :]
  strengths = (spec.brightness, spec.contrast, spec.saturation)
  ranges = [(max(0.0, 1 - x), 1 + x) for x in strengths] + [(-spec.hue, spec.hue)]
  return Draws(
    box=crop_box(u[: 2 * TRIES + 2], extent_2, area=spec.area, aspect=spec.aspect),
    flip=flip < spec.flip,
    jitter=jitter < spec.jitter,
    factors=jnp.stack([_between(x, *low_high) for x, low_high in zip(u_factors, ranges)]),
    greyscale=greyscale < spec.greyscale,
    blur=blur < _of_view(spec.blur, spec.count)[view],
    sigma=_between(sigma, *spec.blur_sigma),
    solarise=solarise < _of_view(spec.solarise, spec.count)[view],
  )


def crop_box(
  u: Array, extent_2: Array, *, area: tuple[float, float], aspect: tuple[float, float]
) -> Array:
  """torchvision's RandomResizedCrop.get_params.

  The first of ten draws that fits into the picture; if none does, the largest central crop whose
  aspect ratio is within `aspect`.

  Args:
    u: float32 [2 * TRIES + 2], uniform in [0, 1): areas, aspect ratios, then top and left.
    extent_2: height and width of the picture.
    area, aspect: ranges as in `ViewSpec`.

  Returns:
    float32 [4]: top, left, height, width, whole numbers inside the picture.
  """
  h, w = extent_2[0].astype(jnp.float32), extent_2[1].astype(jnp.float32)
  area_T = h * w * _between(u[:TRIES], *area)
  aspect_T = jnp.exp(_between(u[TRIES : 2 * TRIES], np.log(aspect[0]), np.log(aspect[1])))
  width_T = jnp.round(jnp.sqrt(area_T * aspect_T))
  height_T = jnp.round(jnp.sqrt(area_T / aspect_T))
  fits_T = (width_T > 0) & (width_T <= w) & (height_T > 0) & (height_T <= h)
  first, any_fits = jnp.argmax(fits_T), jnp.any(fits_T)

  widest, highest = jnp.round(h * aspect[1]), jnp.round(w / aspect[0])
  height = jnp.where(any_fits, height_T[first], jnp.clip(highest, 1, h))
  width = jnp.where(any_fits, width_T[first], jnp.clip(widest, 1, w))
  top = jnp.floor(jnp.where(any_fits, u[-2] * (h - height + 1), (h - height) / 2))
  left = jnp.floor(jnp.where(any_fits, u[-1] * (w - width + 1), (w - width) / 2))
  return jnp.stack([top, left, height, width])


# What is done with it. Each operation takes and gives one picture, float32 [H, W, 3] in [0, 1].


def render(image_SSC: Array, draws: Draws, order_J: Array, spec: ViewSpec) -> Array:
  """One view of one picture: uint8 [S, S, 3] -> float32 [size, size, 3], normalised.

  An operation whose probability or strength is 0 in the spec is left out of the program.
  """
  canvas_SSC = image_SSC.astype(jnp.float32) / 255
  image_HWC = resized_crop(canvas_SSC, draws.box, draws.flip, size=spec.size)
  if jitter_operations(spec):
    jittered_HWC = colour_jitter(image_HWC, draws.factors, order_J, jitter_operations(spec))
    image_HWC = jnp.where(draws.jitter, jittered_HWC, image_HWC)
  if spec.greyscale > 0:
    image_HWC = jnp.where(draws.greyscale, greyscale(image_HWC), image_HWC)
  if max(spec.blur) > 0:
    image_HWC = jnp.where(draws.blur, gaussian_blur(image_HWC, draws.sigma), image_HWC)
  if max(spec.solarise) > 0:
    image_HWC = jnp.where(draws.solarise, solarise(image_HWC), image_HWC)
  return normalise(image_HWC, spec.mean, spec.std)


def resized_crop(image_HWC: Array, box: Array, flip: Array, *, size: int) -> Array:
  """Crops, resizes to [size, size, 3] (bicubic, antialiased, as PIL) and mirrors where `flip`.

  Args:
    box: float32 [4]: top, left, height, width. Nothing outside it is read.
    flip: bool, left to right; mirroring the weights costs nothing.
  """
  top, left, height, width = box
  rows_OH = _resize_weights(image_HWC.shape[0], size, top, height, top, top + height)
  cols_OW = _resize_weights(image_HWC.shape[1], size, left, width, left, left + width)
  return _resample(image_HWC, rows_OH, jnp.where(flip, cols_OW[::-1], cols_OW))


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
  mean = jnp.sum(image_HWC * _channels(GREY, 3)) / (h * w)
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
  return _resample(padded_HWC, weights_OI, weights_OI)


def solarise(image_HWC: Array) -> Array:
  """Inverts what is at least 0.5, as PIL and torchvision with threshold 128."""
  return jnp.where(image_HWC < 0.5, image_HWC, 1 - image_HWC)


def normalise(image_HWC: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
  """Subtracts the mean of each channel and divides by its standard deviation."""
  return (image_HWC - _channels(mean, 3)) / _channels(std, 3)


def _resample(image_HWC: Array, rows_OH: Array, cols_PW: Array) -> Array:
  """Weighs rows and columns, clips to [0, 1] (bicubic overshoots): [H, W, C] -> [O, P, C].

  Two dense products: as fast as `jax.image.scale_and_translate` on CPU, and what accelerators like.
  """
  exact = jax.lax.Precision.HIGHEST  # else an accelerator rounds to bfloat16 or TensorFloat-32
  image_OWC = jnp.einsum("oh,hwc->owc", rows_OH, image_HWC, precision=exact)
  return jnp.clip(jnp.einsum("pw,owc->opc", cols_PW, image_OWC, precision=exact), 0, 1)


def _resize_weights(
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


def jitter_operations(spec: ViewSpec) -> tuple[int, ...]:
  """Indices of the jitter operations that the spec uses; none where its probability is 0."""
  strengths = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
  return tuple(i for i, strength in enumerate(strengths) if strength and spec.jitter)


def _of_view(probabilities: tuple[float, ...], count: int) -> Array:
  """The probability for each of `count` views, of which a single one is given for all."""
  return jnp.asarray(np.resize(probabilities, count), jnp.float32)


def _between(u: Array, low: float, high: float) -> Array:
  return low + (high - low) * u


def _channels(values: tuple[float, ...], rank: int) -> np.ndarray:
  """One value a channel, float32 [1, ..., 1, 3] of the given rank."""
  return np.asarray(values, np.float32).reshape((1,) * (rank - 1) + (-1,))


def check_specs(specs: tuple[ViewSpec, ...]) -> None:
  """Raises ValueError, with the value and what was expected, for a spec that makes no sense."""
  if len({spec.name for spec in specs}) < len(specs):
    names = [spec.name for spec in specs]
    raise ValueError(f"two views have the same name: {names}; give each spec a name of its own")
  for spec in specs:
    checks = {
      ("count", "size"): (lambda x: isinstance(x, int) and x >= 1, "a whole number, at least 1"),
      ("area",): (lambda x: _is_range(x, 1), "0 < low <= high <= 1, e.g. (0.08, 1.0)"),
      ("aspect", "blur_sigma"): (_is_range, "0 < low <= high, e.g. (0.75, 1.33)"),
      ("flip", "jitter", "greyscale"): (_is_probability, "a probability from 0 to 1"),
      ("brightness", "contrast", "saturation"): (lambda x: 0 <= x < np.inf, "0 or more"),
      ("hue",): (lambda x: 0 <= x <= 0.5, "a share of the colour circle from 0 to 0.5, e.g. 0.1"),
      ("blur", "solarise"): (
        lambda x, n=spec.count: isinstance(x, tuple) and len(x) in (1, n) and _is_probability(*x),
        f"a tuple of 1 or {spec.count} (count) probabilities from 0 to 1, e.g. (0.5,)",
      ),
      ("mean",): (lambda x: len(x) == 3, "3 values, one a channel"),
      ("std",): (lambda x: len(x) == 3 and min(x) > 0, "3 positive values, one a channel"),
    }
    for fields, (is_valid, expected) in checks.items():
      for field in fields:
        if not is_valid(value := getattr(spec, field)):
          raise ValueError(f"view {spec.name!r}: {field} is {value!r}; expected {expected}")


def _is_range(values: tuple[float, float], maximum: float = np.inf) -> bool:
  return isinstance(values, tuple) and len(values) == 2 and 0 < values[0] <= values[1] <= maximum


def _is_probability(*values: float) -> bool:
  return all(0 <= value <= 1 for value in values)
