"""The 15 common corruptions of Hendrycks & Dietterich (ICLR 2019), five severities each.

The constants are those of ImageNet-C (224 px) and CIFAR-10-C (32 px), from hendrycks/robustness. A
corruption is a program for one picture and a function that makes its settings of a severity
(`programs.py`): arrays of the same shapes for all severities, computed with SciPy and
Pillow where those define the result, so that the device compiles 14 programs and not 70. JPEG is
encoded and decoded on the host, by Pillow.

Departures from the published sets:
* frost: its photographs are not free to take along; a fractal texture of ice stands for them.
* ImageNet-C's pictures were stored as JPEG (quality 85) after the corruption; these are not.
* The results of motion blur are cut to 8 bits like all others, where ImageMagick rounds.
* glass blur: its authors' exchange of two pixels copies in one direction only, since both sides are
  views of one array. The published pictures are made so, and these are too.
* elastic transform: lengths grow with the side, for pictures of another size than 224 or 32.

Shapes: B batch, H W C picture, S its side.
"""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ssrl_jax.corruptions.levels import LEVELS, Level
from ssrl_jax.corruptions.programs import PROGRAMS, Settings, to_8_bits
from ssrl_jax.method import Array

SEVERITIES = (1, 2, 3, 4, 5)
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")
LARGEST_SMALL = 64  # pixels: up to here the constants of CIFAR-10-C, beyond those of ImageNet-C

NAMES = tuple(LEVELS["imagenet_c"])


def table_for(size: int) -> str:
  """Which constants a picture of this side gets: a key of LEVELS."""
  return "imagenet_c" if size > LARGEST_SMALL else "cifar10_c"


def corrupt(
  pixels_BHWC: Array,
  id_B2: Array,
  *,
  name: str,
  severity: int,
  seed: int,
  level: Level | None = None,
) -> Array:
  """Corrupts square pictures; of chance, a picture gets what (seed, name, severity, id) say.

  Args:
    pixels_BHWC: float32 [B, S, S, 3] in [0, 1]; rounded to 8 bits first.
    id_B2: uint32, low and high word of each picture's position in its source.
    name: one of NAMES.
    severity: 1 to 5.
    seed: of the chance.
    level: constants of one's own instead of those of the severity.

  Returns:
    float32 [B, S, S, 3] in [0, 1], whole multiples of 1 / 255.
  """
  if name not in NAMES:
    raise ValueError(f"unknown corruption {name!r}; expected one of {', '.join(NAMES)}")
  if level is None:
    if severity not in SEVERITIES:
      raise ValueError(f"severity is {severity} of {name}; expected 1 to 5")
    level = LEVELS[table_for(pixels_BHWC.shape[1])][name][severity - 1]
  if name == "jpeg_compression":
    return _on_host(functools.partial(_jpeg_compression, quality=level), pixels_BHWC)
  chance = np.array([seed, severity], np.uint32)
  settings = _settings(name, level, pixels_BHWC.shape[1])
  return _corrupt(pixels_BHWC, id_B2, chance, settings, name=name)


@functools.partial(jax.jit, static_argnames="name")
def _corrupt(pixels_BHWC, id_B2, chance_2, settings, *, name):
  key = jax.random.fold_in(jax.random.key(chance_2[0]), np.uint32(zlib.crc32(name.encode())))
  key = jax.random.fold_in(key, chance_2[1])

  def one(image_HWC, id_2):
    own_key = jax.random.fold_in(jax.random.fold_in(key, id_2[0]), id_2[1])
    return to_8_bits(PROGRAMS[name].apply(jnp.round(image_HWC * 255) / 255, own_key, settings))

  return jax.vmap(one)(pixels_BHWC, id_B2)


@functools.lru_cache(maxsize=256)
def _settings(name: str, level: Level, size: int) -> Settings:
  found = PROGRAMS[name].settings(level, size)
  return {k: np.asarray(v, np.float32 if np.asarray(v).dtype.kind == "f" else np.int32)
          for k, v in found.items()}  # fmt: skip


def _on_host(change: Callable[[np.ndarray], np.ndarray], pixels_BHWC: Array) -> Array:
  """uint8 -> uint8 by NumPy, on each process's own pictures."""
  shards = {s.index[0].start or 0: s.data for s in pixels_BHWC.addressable_shards}
  local_BHWC = np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
  out_BHWC = change(np.round(local_BHWC * 255).astype(np.uint8)).astype(np.float32) / 255
  return jax.make_array_from_process_local_data(pixels_BHWC.sharding, out_BHWC)


def _jpeg_compression(images_BHWC: np.ndarray, *, quality: int) -> np.ndarray:
  out_BHWC = np.empty_like(images_BHWC)
  for i, image_HWC in enumerate(images_BHWC):
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
      out_BHWC[i] = np.asarray(decoded)
  return out_BHWC
