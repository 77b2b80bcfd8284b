"""Views per second: the two-view pipelines, and each operation on its own.

Command  python -m benchmarks.views
Output   results/views.json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import measure, write_results
from ssrl_jax import pixels, views
from ssrl_jax.method import ViewSpec

# (canvas, size of the view, batch of images). The canvas of 256 is what a host sends for 224.
SETTINGS = ((32, 32, 256), (256, 224, 64))


def specs(size: int) -> dict[str, ViewSpec]:
  """The augmentations of two papers; every operation is in BYOL's."""
  byol = ViewSpec("global", size=size, saturation=0.2, blur=(1.0, 0.1), solarise=(0.0, 0.2))
  return {
    "two views, BYOL (all operations)": byol,
    "two views, SimCLR for CIFAR (no blur)": byol._replace(
      saturation=0.4, blur=(0.0,), solarise=(0.0,)
    ),
  }


def make_batch(canvas: int, batch: int) -> dict[str, jax.Array]:
  np_rng = np.random.default_rng(0)
  return {
    "image": jnp.asarray(np_rng.integers(0, 256, (batch, canvas, canvas, 3)), jnp.uint8),
    "extent": jnp.full((batch, 2), canvas, jnp.int32),
    "id": jnp.stack([jnp.arange(batch, dtype=jnp.uint32), jnp.zeros(batch, jnp.uint32)], axis=1),
  }


def operations(
  size: int, batch: dict[str, jax.Array]
) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
  """Name -> function of one picture, and its arguments with a batch axis."""
  (spec, *_) = specs(size).values()
  b = batch["image"].shape[0]
  keys = jax.random.split(jax.random.key(0), b)
  draws = jax.vmap(lambda key, extent: views.draw(key, extent, spec, 0))(keys, batch["extent"])
  canvases = batch["image"].astype(jnp.float32) / 255
  pictures = jax.random.uniform(jax.random.key(1), (b, size, size, 3))
  crop = partial(pixels.resized_crop, size=size)
  norm = partial(pixels.normalise, mean=spec.mean, std=spec.std)
  order = jnp.arange(4)
  return {
    "draw (all random numbers)": (lambda k, e: views.draw(k, e, spec, 0), (keys, batch["extent"])),
    "resized_crop and flip": (crop, (canvases, draws.box, draws.flip)),
    "colour_jitter": (
      lambda image, factors: pixels.colour_jitter(image, factors, order),
      (pictures, draws.factors),
    ),
    "adjust_brightness": (pixels.adjust_brightness, (pictures, draws.factors[:, 0])),
    "adjust_contrast": (pixels.adjust_contrast, (pictures, draws.factors[:, 1])),
    "adjust_saturation": (pixels.adjust_saturation, (pictures, draws.factors[:, 2])),
    "adjust_hue": (pixels.adjust_hue, (pictures, draws.factors[:, 3])),
    "greyscale": (pixels.greyscale, (pictures,)),
    "gaussian_blur": (pixels.gaussian_blur, (pictures, draws.sigma)),
    "solarise": (pixels.solarise, (pictures,)),
    "normalise": (norm, (pictures,)),
  }


def main() -> None:
  rows = []

  def add(name: str, size: int, num_views: int, f: Callable, *args: Any) -> None:
    timing = measure(f, *args)
    row = {
      "operation": name,
      "size": size,
      "views_per_second": round(num_views / timing.median, 1),
      "best": round(num_views / timing.best, 1),
      "compile_seconds": round(timing.compile, 2),
    }
    rows.append(row)
    print(f"{name}, {size} px: {row['views_per_second']:,.0f} views/s", flush=True)

  for canvas, size, b in SETTINGS:
    batch = make_batch(canvas, b)
    for name, spec in specs(size).items():
      pipeline = partial(views.make_views, specs=(spec,))
      add(name, size, 2 * b, pipeline, jax.random.key(0), batch)
    mean, std = ViewSpec("global").mean, ViewSpec("global").std
    evaluation = partial(views.eval_view, size=size, crop=0.875, mean=mean, std=std)
    add("eval_view", size, b, evaluation, batch)
    for name, (f, args) in operations(size, batch).items():
      add(name, size, b, jax.vmap(f), *args)
  print()
  write_results("views", rows)


if __name__ == "__main__":
  main()
