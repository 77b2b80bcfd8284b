"""The gradients of a convolution on one CPU: as we write them out, and as JAX makes them.

python -m benchmarks.convolution [--batch=256] [--parts=8,16,32,64] [--repeats=9]
  [--name=convolution]

3x3 convolutions of a small ResNet's stages, float32: the kernel's gradient of the whole batch and
by parts of it, on which `PART` of ssrl_jax/models/convolution.py rests; then both gradients of 32
pictures in a loop over two halves, as accumulation makes them. All ways are timed in turn; figures
are medians in milliseconds.
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

SHAPES = (  # side, stride, channels in and out
  (32, 1, 3, 16), (32, 1, 16, 16), (32, 2, 16, 32), (16, 1, 32, 32), (16, 2, 32, 64),
  (8, 1, 64, 64),
)  # fmt: skip


def convolve(how: Callable, stride: int) -> Callable:
  """A function of pictures and kernel."""
  pads = ((1, 1), (1, 1))
  return lambda x, k: how(x, k, (stride, stride), pads, dimension_numbers=convolution.NHWC)


def kernel_gradient(part: int, stride: int) -> Callable:
  """(pictures, kernel, outer gradient) -> the kernel's gradient."""

  def of_kernel(x_BHWC, kernel, dy_BhwF):
    convolution.PART = part  # read while this is traced
    conv = convolve(convolution.conv_general_dilated, stride)
    return jax.vjp(lambda k: conv(x_BHWC, k), kernel)[1](dy_BhwF)[0]

  return jax.jit(of_kernel)


def both_in_a_loop(how: Callable, stride: int) -> Callable:
  """(pictures, kernel, outer gradient) -> both gradients, of one half after the other."""

  def of_both(x_BHWC, kernel, dy_BhwF):
    halves = [v[:32].reshape(2, -1, *v.shape[1:]) for v in (x_BHWC, dy_BhwF)]
    return jax.lax.map(lambda h: jax.vjp(convolve(how, stride), h[0], kernel)[1](h[1]), halves)

  return jax.jit(of_both)


def measure(shape: tuple[int, ...], batch: int, parts: list[int], repeats: int) -> dict[str, Any]:
  side, stride, channels, features = shape
  k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
  values = (
    jax.random.normal(k1, (batch, side, side, channels)),
    jax.random.normal(k2, (3, 3, channels, features)),
    jax.random.normal(k3, (batch, side // stride, side // stride, features)),
  )
  ways = {f"kernel, parts of {p}": kernel_gradient(p, stride) for p in [batch, *parts]}
  ways["both in a loop, JAX's"] = both_in_a_loop(jax.lax.conv_general_dilated, stride)
  ways["both in a loop, ours"] = both_in_a_loop(convolution.conv_general_dilated, stride)
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
  parts = [int(p) for p in args.parts.split(",")]
  write_results(args.name, [measure(s, args.batch, parts, args.repeats) for s in SHAPES])


if __name__ == "__main__":
  main()
