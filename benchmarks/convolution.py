"""The gradients of a convolution on one CPU: as we write them out, and as JAX makes them.

python -m benchmarks.convolution [--batch=256] [--parts=8,16,32,64] [--repeats=9]
  [--name=convolution]

3x3 convolutions of a small ResNet's stages, float32: both gradients, JAX's and ours, the kernel's
by parts of so many pictures, on which `PART` of ssrl_jax/models/convolution.py rests; and both of
32 pictures in a loop over two halves, as accumulation makes them. All ways are timed in turn;
figures are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.common import write_results
from ssrl_jax.models import convolution

PART = convolution.PART
SHAPES = (  # side, stride, channels in and out
  (32, 1, 3, 16), (32, 1, 16, 16), (32, 2, 16, 32), (16, 1, 32, 32), (16, 2, 32, 64),
  (8, 1, 64, 64),
)  # fmt: skip


def convolve(how: Callable, stride: int) -> Callable:
  """A function of pictures and kernel."""
  pads = ((1, 1), (1, 1))
  return lambda x, k: how(x, k, (stride, stride), pads, dimension_numbers=convolution.NHWC)


def gradients(how: Callable, stride: int, part: int) -> Callable:
  """(pictures, kernel, outer gradient) -> both gradients."""

  def of_both(x_BHWC, kernel, dy_BhwF):
    convolution.PART = part  # read while this is traced
    return jax.vjp(convolve(how, stride), x_BHWC, kernel)[1](dy_BhwF)

  return jax.jit(of_both)


def in_a_loop(how: Callable, stride: int) -> Callable:
  """As `gradients`, of one half of 32 pictures after the other."""

  def of_both(x_BHWC, kernel, dy_BhwF):
    halves = [v[:32].reshape(2, -1, *v.shape[1:]) for v in (x_BHWC, dy_BhwF)]
    both = gradients(how, stride, PART)
    return jax.lax.map(lambda half: both(half[0], kernel, half[1]), halves)

  return jax.jit(of_both)


def measure(shape: tuple[int, ...], batch: int, parts: list[int], repeats: int) -> dict[str, Any]:
  side, stride, channels, features = shape
  k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
  values = (
    jax.random.normal(k1, (batch, side, side, channels)),
    jax.random.normal(k2, (3, 3, channels, features)),
    jax.random.normal(k3, (batch, side // stride, side // stride, features)),
  )
  jax_s, ours = jax.lax.conv_general_dilated, convolution.conv_general_dilated
  ways = {"JAX's": gradients(jax_s, stride, batch)}
  ways |= {f"parts of {p}": gradients(ours, stride, p) for p in [batch, *parts]}
  ways |= {"JAX's, in a loop": in_a_loop(jax_s, stride), "ours, in a loop": in_a_loop(ours, stride)}
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(repeats + 1):  # the first compiles
    for name, way in ways.items():
      start = time.perf_counter()
      jax.block_until_ready(way(*values))
      seconds[name].append(time.perf_counter() - start)
  medians = {name: 1e3 * statistics.median(s[1:]) for name, s in seconds.items()}
  where = {"side": side, "stride": stride, "channels": channels, "features": features}
  return where | {"batch": batch} | medians


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--parts", default="8,16,32,64")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--name", default="convolution")
  args = parser.parse_args()
  if jax.default_backend() != "cpu" or jax.device_count() > 1:
    parser.error("one CPU device is needed: elsewhere the gradients are JAX's own")
  parts = [int(p) for p in args.parts.split(",")]
  write_results(args.name, [measure(s, args.batch, parts, args.repeats) for s in SHAPES])


if __name__ == "__main__":
  main()
