"""Random views of pictures, computed on the device inside the compiled step.

`make_views` draws what chance decides for each view of each picture (`draw`), then renders it
(`render`): crop and flip, colour jitter, greyscale, blur, solarisation, noise, normalisation. What
one picture gets is a function of the key, the picture's id, the spec's name and the view's number,
and of nothing else: not of the batch, the picture's place in it, the other specs or the devices.

`ssrl_jax/pixels.py` has the operations themselves.

Shapes: B batch, H W C picture, S side of the canvas, J jitter operations in use, T tries.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax.method import Array, ViewSpec, box_name
from ssrl_jax.pixels import (
  add_noise,
  colour_jitter,
  gaussian_blur,
  greyscale,
  normalise,
  resample,
  resize_weights,
  resized_crop,
  solarise,
)

TRIES = 10  # crops drawn before giving up on the area and aspect asked for, as torchvision


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
  noise: Array | float = 0.0  # float32, the deviation; 0: none
  noise_seed: Array | int = 0  # uint32


def make_views(
  key: Array, batch: dict[str, Array], specs: tuple[ViewSpec, ...], strength: float | Array = 1.0
) -> dict[str, Array]:
  """Every view of every spec, and where in the picture it lies.

  The order of the jitter operations is drawn once for all pictures of a batch, anew for each view
  (torchvision draws it for each picture): an order of its own for each picture would make the
  device compute every operation at every place.

  Args:
    key: of this step; a new one gives new views.
    batch: image uint8 [B, S, S, 3], the picture at the top left of its canvas, or [B, F, S, S, 3],
      of which view number v shows frame v % F; extent int32 [B, 2], height and width of the picture
      or of every frame; id uint32 [B, 2], low and high word of the picture's position.
    specs: see `check_specs`.
    strength: in [0, 1]; see `draw`. The float 1.0 costs nothing.

  Returns:
    {spec.name: float32 [B, spec.count, spec.size, spec.size, 3], normalised} and, for each spec,
    {box_name(spec.name): float32 [B, spec.count, 4]}: the top, left, bottom and right edge of the
    view, in [0, 1] of the picture's extent; in a mirrored view left and right change places.
  """
  check_specs(specs)
  views = {}
  for spec in specs:
    views[spec.name], views[box_name(spec.name)] = _views_of(key, batch, spec, strength)
  return views


def abstract_views(specs: tuple[ViewSpec, ...], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of what `make_views` returns."""
  shapes = {}
  for spec in specs:
    shapes[spec.name] = (batch_size, spec.count, spec.size, spec.size, 3)
    shapes[box_name(spec.name)] = (batch_size, spec.count, 4)
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def strength_at(step: Array, *, start: float, epochs: float, steps_per_epoch: int) -> float | Array:
  """The views' strength after `step` updates: linear from `start` to 1, reached after `epochs`."""
  if start == 1:
    return 1.0
  done = jnp.clip(step / (epochs * steps_per_epoch), 0, 1)
  return (1 - done) * start + done


def _views_of(
  key: Array, batch: dict[str, Array], spec: ViewSpec, strength: float | Array
) -> tuple[Array, Array]:
  """All views of one spec, float32 [B, count, size, size, 3], and their boxes [B, count, 4]."""
  spec_key = jax.random.fold_in(key, np.uint32(zlib.crc32(spec.name.encode())))
  # A loop, not a batch: compiled once for any count, and the order of the jitter stays a scalar.
  views_VBHWC, box_VB4 = jax.lax.map(
    lambda view: _one_view(jax.random.fold_in(spec_key, view), batch, spec, view, strength),
    jnp.arange(spec.count),
  )
  return jnp.swapaxes(views_VBHWC, 0, 1), jnp.swapaxes(box_VB4, 0, 1)


def _one_view(
  key: Array, batch: dict[str, Array], spec: ViewSpec, view: Array, strength: float | Array
) -> tuple[Array, Array]:
  """View number `view` of every picture, float32 [B, size, size, 3], and its box [B, 4]."""
  order_key, picture_key = jax.random.split(key)
  order_J = jax.random.permutation(order_key, len(jitter_operations(spec)))
  image_BSSC = batch["image"]
  if image_BSSC.ndim == 5:  # [B, F, S, S, 3]
    frame = view % image_BSSC.shape[1]
    image_BSSC = jax.lax.dynamic_index_in_dim(image_BSSC, frame, axis=1, keepdims=False)

  def one(image_SSC, extent_2, id_2):
    own_key = jax.random.fold_in(jax.random.fold_in(picture_key, id_2[0]), id_2[1])
    draws = draw(own_key, extent_2, spec, view, strength)
    return render(image_SSC, draws, order_J, spec), relative_box(draws, extent_2)

  return jax.vmap(one)(image_BSSC, batch["extent"], batch["id"])


def eval_view(
  batch: dict[str, Array],
  *,
  size: int,
  crop: float,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> Array:
  """The deterministic view for evaluation: `eval_pixels`, normalised.

  Args:
    batch, size, crop: see `eval_pixels`.
    mean, std: see `normalise`.

  Returns:
    float32 [B, size, size, 3], normalised.
  """
  views_BHWC = eval_pixels(batch, size=size, crop=crop)
  return jax.vmap(partial(normalise, mean=mean, std=std))(views_BHWC)


def eval_pixels(batch: dict[str, Array], *, size: int, crop: float) -> Array:
  """torchvision's Resize and CenterCrop.

  The shorter side of the picture becomes round(size / crop), of which the central `size` are kept:
  size 224 and crop 0.875 are the usual Resize(256), CenterCrop(224). With crop 1 a square picture
  is resized as it is, and one that already has `size` is returned unchanged.

  Args:
    batch: image and extent as in `make_views`.
    size: side of the view, pixels.
    crop: fraction of the resized picture's shorter side that is kept, in (0, 1].

  Returns:
    float32 [B, size, size, 3] in [0, 1].
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
      resize_weights(image_SSC.shape[i], size, start_2[i], size * scale_2[i], 0, extent_2[i])
      for i in range(2)
    )
    canvas_SSC = image_SSC.astype(jnp.float32) / 255
    return resample(canvas_SSC, rows_OH, cols_OW)

  return jax.vmap(one)(batch["image"], batch["extent"])


def draw(
  key: Array, extent_2: Array, spec: ViewSpec, view: Array | int, strength: float | Array = 1.0
) -> Draws:
  """Draws view number `view` of one picture of height and width `extent_2`.

  `strength` in [0, 1] multiplies every probability but that of the flip, moves the jitter's factors
  towards doing nothing and the smallest crop towards the largest. At 1 it changes no bit.
  """
  # One call for all the numbers: compiling a call costs far more than drawing a few too many.
  u = jax.random.uniform(key, (2 * TRIES + 12,))
  flip, jitter, *u_factors, greyscale, blur, sigma, solarise = u[2 * TRIES + 2 :]
  strengths = (spec.brightness, spec.contrast, spec.saturation)
  ranges = [(max(0.0, 1 - x), 1 + x) for x in strengths] + [(-spec.hue, spec.hue)]
  factors = jnp.stack([_between(x, *low_high) for x, low_high in zip(u_factors, ranges)])
  u_crop, ease = u[: 2 * TRIES + 2], partial(_ease, strength=strength)
  noise = {}
  if max(spec.noise) > 0:  # numbers of its own, so that other specs' views stay what they were
    noise_key = jax.random.fold_in(key, np.uint32(zlib.crc32(b"noise")))
    chance, sigma_noise = jax.random.uniform(noise_key, (2,))
    noisy = chance < ease(_of_view(spec.noise, spec.count)[view])
    deviation = jnp.where(noisy, _between(sigma_noise, *spec.noise_sigma), 0)
    noise = {"noise": deviation, "noise_seed": jax.random.bits(noise_key)}
  return Draws(
    box=crop_box(u_crop, extent_2, area=spec.area, aspect=spec.aspect, strength=strength),
    flip=flip < spec.flip,
    jitter=jitter < ease(spec.jitter),
    factors=ease(factors, np.float32([1, 1, 1, 0])),
    greyscale=greyscale < ease(spec.greyscale),
    blur=blur < ease(_of_view(spec.blur, spec.count)[view]),
    sigma=_between(sigma, *spec.blur_sigma),
    solarise=solarise < ease(_of_view(spec.solarise, spec.count)[view]),
    **noise,
  )


def relative_box(draws: Draws, extent_2: Array) -> Array:
  """Top, left, bottom, right in [0, 1] of the extent; float32 [4]. See `make_views`."""
  top, left, height, width = draws.box
  h, w = extent_2[0].astype(jnp.float32), extent_2[1].astype(jnp.float32)
  near, far = left / w, (left + width) / w
  left, right = jnp.where(draws.flip, far, near), jnp.where(draws.flip, near, far)
  return jnp.stack([top / h, left, (top + height) / h, right])


def crop_box(
  u: Array,
  extent_2: Array,
  *,
  area: tuple[float, float],
  aspect: tuple[float, float],
  strength: float | Array = 1.0,
) -> Array:
  """torchvision's RandomResizedCrop.get_params.

  The first of ten draws that fits into the picture; if none does, the largest central crop whose
  aspect ratio is within `aspect`.

  Args:
    u: float32 [2 * TRIES + 2], uniform in [0, 1): areas, aspect ratios, then top and left.
    extent_2: height and width of the picture.
    area, aspect: ranges as in `ViewSpec`.
    strength: the smallest area is high - strength * (high - low).

  Returns:
    float32 [4]: top, left, height, width, whole numbers inside the picture.
  """
  h, w = extent_2[0].astype(jnp.float32), extent_2[1].astype(jnp.float32)
  area_T = h * w * _ease(_between(u[:TRIES], *area), area[1], strength=strength)
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
  if max(spec.noise) > 0:
    image_HWC = add_noise(image_HWC, draws.noise, draws.noise_seed)
  return normalise(image_HWC, spec.mean, spec.std)


def jitter_operations(spec: ViewSpec) -> tuple[int, ...]:
  """Indices of the jitter operations that the spec uses; none where its probability is 0."""
  strengths = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
  return tuple(i for i, strength in enumerate(strengths) if strength and spec.jitter)


def _of_view(probabilities: tuple[float, ...], count: int) -> Array:
  """The probability for each of `count` views, of which a single one is given for all."""
  return jnp.asarray(np.resize(probabilities, count), jnp.float32)


def _between(u: Array, low: float, high: float) -> Array:
  return low + (high - low) * u


def _ease(full: Array | float, nothing: Array | float = 0.0, *, strength: float | Array) -> Array:
  """From `nothing` to `full` by strength; exactly `full` at 1, without a computation at 1.0."""
  if isinstance(strength, float) and strength == 1:
    return full
  return (1 - strength) * nothing + strength * full


def check_specs(specs: tuple[ViewSpec, ...]) -> None:
  """Raises ValueError, with the value and what was expected, for a spec that makes no sense."""
  names = [spec.name for spec in specs]
  if len({*names, *map(box_name, names)}) < 2 * len(names):
    raise ValueError(f"two views have the same name, or a box's: {names}; give each its own name")
  for spec in specs:
    checks = {
      ("count", "size"): (lambda x: isinstance(x, int) and x >= 1, "a whole number, at least 1"),
      ("area",): (lambda x: _is_range(x, 1), "0 < low <= high <= 1, e.g. (0.08, 1.0)"),
      ("aspect", "blur_sigma", "noise_sigma"): (_is_range, "0 < low <= high, e.g. (0.75, 1.33)"),
      ("flip", "jitter", "greyscale"): (_is_probability, "a probability from 0 to 1"),
      ("brightness", "contrast", "saturation"): (lambda x: 0 <= x < np.inf, "0 or more"),
      ("hue",): (lambda x: 0 <= x <= 0.5, "a share of the colour circle from 0 to 0.5, e.g. 0.1"),
      ("blur", "solarise", "noise"): (
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


def check_ramp(*, start: float, epochs: float) -> None:
  """Raises ValueError for a ramp of the views' strength that makes no sense."""
  if not 0 <= start <= 1:
    raise ValueError(f"views_ramp.start is {start}; expected a strength from 0 to 1 (1 = off)")
  if not 0 <= epochs < np.inf:
    raise ValueError(f"views_ramp.epochs is {epochs}; expected 0 or more")
  if start < 1 and not epochs:
    raise ValueError(
      f"views_ramp.start is {start}, but views_ramp.epochs is 0: give the epochs over which the "
      "strength grows to 1, or start = 1 for views of full strength from the first step on"
    )


def _is_range(values: tuple[float, float], maximum: float = np.inf) -> bool:
  return isinstance(values, tuple) and len(values) == 2 and 0 < values[0] <= values[1] <= maximum


def _is_probability(*values: float) -> bool:
  return all(0 <= value <= 1 for value in values)
