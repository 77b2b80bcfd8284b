"""The gradient of a convolution's kernel on one CPU: of the whole batch, and by parts of it.

python -m benchmarks.convolution [--batch=256] [--parts=8,16,32,64] [--repeats=9]
  [--name=convolution]

3x3 convolutions of a small ResNet's stages, float32. All ways are timed in turn; figures are
medians in milliseconds. `largest_part` of ssrl_jax/models/convolution.py rests on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax

from benchmarks.common import write_results
from ssrl_jax.models import convolution

SHAPES = (  # side, stride, channels in and out
  (32, 1, 3, 16), (32, 1, 16, 16), (32, 2, 16, 32), (16, 1, 32, 32), (16, 2, 32, 64),
  (8, 1, 64, 64), (56, 1, 64, 64),
)  # fmt: skip


def gradient(part: int, stride: int) -> Any:
  """(pictures, kernel, outer gradient) -> the kernel's gradient."""

  def of_kernel(x_BHWC, kernel, dy_BhwF):
    convolution.PART = part  # read while this is traced
    pads = ((1, 1), (1, 1))
    conv = lambda k: convolution.conv_general_dilated(  # noqa: E731
      x_BHWC, k, (stride, stride), pads, dimension_numbers=convolution.NHWC
    )
    return jax.vjp(conv, kernel)[1](dy_BhwF)[0]

  return jax.jit(of_kernel)


def measure(shape: tuple[int, ...], batch: int, parts: list[int], repeats: int) -> dict[str, Any]:
  side, stride, channels, features = shape
  k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
  values = (
    jax.random.normal(k1, (batch, side, side, channels)),
    jax.random.normal(k2, (3, 3, channels, features)),
    jax.random.normal(k3, (batch, side // stride, side // stride, features)),
  )
  ways = {f"parts of {p}, ms": gradient(p, stride) for p in [batch, *parts]}
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
