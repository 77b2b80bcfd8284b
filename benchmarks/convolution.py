"""Convolutions and max pooling on one CPU: as we write them out, and as JAX makes them.

python -m benchmarks.convolution [--batch=256] [--parts=8,32,64] [--repeats=9]
  [--name=convolution]

What a small ResNet asks for, float32: forwards; both gradients, JAX's and ours, the kernel's by
parts of so many pictures, on which `PART` of ssrl_jax/models/convolution.py rests (as on what else
it writes out); both of 32 pictures in a loop over two halves, as accumulation makes them. The last
row is the max pooling of a stem. All ways are timed in turn; figures are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from benchmarks.common import write_results
from ssrl_jax.models import convolution

PART = convolution.PART


class Shape(NamedTuple):
  side: int
  kernel: int
  stride: int
  channels: int  # in
  features: int  # channels out


SHAPES = (
  Shape(32, 3, 1, 3, 16), Shape(32, 3, 1, 16, 16), Shape(32, 3, 2, 16, 32), Shape(16, 3, 1, 32, 32),
  Shape(16, 3, 2, 32, 64), Shape(8, 3, 1, 64, 64), Shape(64, 7, 2, 3, 24), Shape(2, 3, 1, 192, 192),
  Shape(32, 1, 1, 16, 64), Shape(32, 1, 2, 16, 32),
)  # fmt: skip
POOLED = (32, 24)  # side, channels


def convolve(how: Callable, shape: Shape) -> Callable:
  """A function of pictures and kernel."""
  strides, pads = (shape.stride,) * 2, ((shape.kernel // 2,) * 2,) * 2
  return lambda x, k: how(x, k, strides, pads, dimension_numbers=convolution.NHWC)


def gradients(how: Callable, shape: Shape, part: int) -> Callable:
  """(pictures, kernel, outer gradient) -> both gradients."""

  def of_both(x_BHWC, kernel, dy_BhwF):
    convolution.PART = part  # read while this is traced
    return jax.vjp(convolve(how, shape), x_BHWC, kernel)[1](dy_BhwF)

  return jax.jit(of_both)


def in_a_loop(how: Callable, shape: Shape) -> Callable:
  """As `gradients`, of one half of 32 pictures after the other."""

  def of_both(x_BHWC, kernel, dy_BhwF):
    halves = [v[:32].reshape(2, -1, *v.shape[1:]) for v in (x_BHWC, dy_BhwF)]
    both = gradients(how, shape, PART)
    return jax.lax.map(lambda half: both(half[0], kernel, half[1]), halves)

  return jax.jit(of_both)


def time_in_turn(ways: dict[str, Callable], values: tuple, repeats: int) -> dict[str, float]:
  """Median milliseconds of each."""
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(repeats + 1):  # the first compiles
    for name, way in ways.items():
      start = time.perf_counter()
      jax.block_until_ready(way(*values))
      seconds[name].append(time.perf_counter() - start)
  return {name: 1e3 * statistics.median(s[1:]) for name, s in seconds.items()}


def measure(shape: Shape, batch: int, parts: list[int], repeats: int) -> dict[str, Any]:
  k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
  side = -(-shape.side // shape.stride)
  values = (
    jax.random.normal(k1, (batch, shape.side, shape.side, shape.channels)),
    jax.random.normal(k2, (shape.kernel, shape.kernel, shape.channels, shape.features)),
    jax.random.normal(k3, (batch, side, side, shape.features)),
  )
  jax_s, ours = jax.lax.conv_general_dilated, convolution.conv_general_dilated
  forward = lambda how: jax.jit(lambda x, k, dy: convolve(how, shape)(x, k))  # noqa: E731
  ways = {"forward, JAX's": forward(jax_s), "forward, ours": forward(ours)}
  ways |= {"gradients, JAX's": gradients(jax_s, shape, batch)}
  ways |= {"gradients, ours": gradients(ours, shape, PART)}
  ways |= {f"parts of {p}": gradients(ours, shape, p) for p in [batch, *parts]}
  ways |= {"in a loop, JAX's": in_a_loop(jax_s, shape), "in a loop, ours": in_a_loop(ours, shape)}
  what = f"{shape.kernel}x{shape.kernel} / {shape.stride}"
  about = {"what": what, "side": shape.side, "channels": shape.channels, "features": shape.features}
  return about | {"batch": batch} | time_in_turn(ways, values, repeats)


def measure_pooling(batch: int, repeats: int) -> dict[str, Any]:
  side, channels = POOLED
  k1, k2 = jax.random.split(jax.random.key(0))
  values = (
    jax.random.normal(k1, (batch, side, side, channels)),
    jax.random.normal(k2, (batch, side // 2, side // 2, channels)),
  )
  plain = functools.partial(
    nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))
  )
  forward = lambda how: jax.jit(lambda x, dy: how(x))  # noqa: E731
  gradient = lambda how: jax.jit(lambda x, dy: jax.vjp(how, x)[1](dy))  # noqa: E731
  ours = convolution.max_pool
  ways = {"forward, JAX's": forward(plain), "forward, ours": forward(ours)}
  ways |= {"gradients, JAX's": gradient(plain), "gradients, ours": gradient(ours)}
  about = {"what": "max pooling", "side": side, "channels": channels, "features": channels}
  return about | {"batch": batch} | time_in_turn(ways, values, repeats)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--parts", default="8,32,64")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--name", default="convolution")
  args = parser.parse_args()
  if jax.default_backend() != "cpu" or jax.device_count() > 1:
    parser.error("one CPU device is needed: elsewhere all of it is JAX's own")
  parts = [int(p) for p in args.parts.split(",")]
  rows = [measure(s, args.batch, parts, args.repeats) for s in SHAPES]
  pooling = dict.fromkeys(rows[0], "-") | measure_pooling(args.batch, args.repeats)
  write_results(args.name, [*rows, pooling])


if __name__ == "__main__":
  main()
