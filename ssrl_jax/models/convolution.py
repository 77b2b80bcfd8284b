"""The gradient of a convolution's kernel, by parts of the batch where a lone CPU does the work.

XLA's CPU compiler (jaxlib 0.10) lays the pictures side by side as channels for it, and a whole
batch of those does not fit the caches: parts of PART take 0.3 to 0.7 of the time (measured by
benchmarks/convolution.py). Nothing else is changed: not the value, not the gradient of the input,
and on TPUs, GPUs and several devices not the kernel's either.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PART = 16  # pictures

Array = jax.Array
NHWC = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
  x_BHWC: Array, kernel: Array, strides: Any, padding: Any, **options: Any
) -> Array:
  """As `lax.conv_general_dilated`, for `nn.Conv`: [B, H, W, C] and a kernel [h, w, C, F]."""
  plain = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
  part = largest_part(len(x_BHWC))
  usual = options.get("feature_group_count", 1) == 1 and not any(
    max(options.get(name) or (1,)) > 1 for name in ("lhs_dilation", "rhs_dilation")
  )
  if jax.device_count() > 1 or part == len(x_BHWC) or not usual:
    return plain(x_BHWC, kernel)

  @jax.custom_vjp
  def convolve(x_BHWC: Array, kernel: Array) -> Array:
    return plain(x_BHWC, kernel)

  def forward(x_BHWC: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return plain(x_BHWC, kernel), (x_BHWC, kernel)

  def backward(saved: tuple[Array, Array], dy_BhwF: Array) -> tuple[Array, Array]:
    x_BHWC, kernel = saved
    (dx_BHWC,) = jax.linear_transpose(lambda x: plain(x, kernel), x_BHWC)(dy_BhwF)
    whole = lambda x, dy: jax.linear_transpose(lambda k: plain(x, k), kernel)(dy)[0]  # noqa: E731
    by_parts = partial(_by_parts, kernel, strides, padding, part, options.get("precision"))
    return dx_BHWC, lax.platform_dependent(x_BHWC, dy_BhwF, cpu=by_parts, default=whole)

  convolve.defvjp(forward, backward)
  return convolve(x_BHWC, kernel)


def largest_part(batch: int) -> int:
  """Pictures of the equal parts of a batch, at most PART; all of it if they would be tiny."""
  part = next(p for p in range(min(PART, batch), 0, -1) if batch % p == 0)
  return part if part >= PART // 4 else batch


def _by_parts(
  kernel: Array,
  strides: Any,
  padding: Any,
  part: int,
  precision: Any,
  x_BHWC: Array,
  dy_BhwF: Array,
) -> Array:
  """The kernel's gradient [h, w, C, F]: a convolution of the pictures with the outer gradient.

  Written out with its transpositions: within a loop XLA's CPU compiler knows only NHWC.
  """
  sizes = zip(kernel.shape, x_BHWC.shape[1:3], dy_BhwF.shape[1:3], strides, padding)
  pads = [(low, (n - 1) * stride + k - size - low) for k, size, n, stride, (low, _) in sizes]

  def add(i: Array, total_hwCF: Array) -> Array:
    x_bHWC, dy_bhwF = (lax.dynamic_slice_in_dim(v, i * part, part) for v in (x_BHWC, dy_BhwF))
    part_ChwF = lax.conv_general_dilated(
      x_bHWC.transpose(3, 1, 2, 0), dy_bhwF.transpose(1, 2, 0, 3), (1, 1), pads,
      rhs_dilation=strides, dimension_numbers=NHWC, precision=precision,
      preferred_element_type=total_hwCF.dtype,
    )  # fmt: skip
    return total_hwCF + part_ChwF.transpose(1, 2, 0, 3)

  total = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
  return lax.fori_loop(0, len(x_BHWC) // part, add, total).astype(kernel.dtype)
