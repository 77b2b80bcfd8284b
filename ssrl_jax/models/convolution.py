"""The gradients of a convolution as XLA's CPU compiler (jaxlib 0.10) is quick with.

For the kernel's gradient it lays the pictures side by side as channels, and a whole batch of them
does not fit the caches: with parts of PART both gradients take 0.4 to 0.9 of the time. Within a
loop, as gradients are accumulated in, it is slow (6 to 50 times) with whatever is not laid out as
[B, H, W, C], which is what differentiation makes. So on one CPU both gradients are written out in
that form, the kernel's by parts: benchmarks/convolution.py. TPUs, GPUs and several devices have
JAX's own.
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
  """As `lax.conv_general_dilated`, for `nn.Conv`; on one device no forward-mode derivatives.

  What is not plain (other forms than [B, H, W, C] and a kernel [h, w, C, F], padding by name,
  groups, dilation) has JAX's own gradients everywhere.
  """
  plain = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
  if jax.device_count() > 1 or not _is_usual(x_BHWC, kernel, padding, **options):
    return plain(x_BHWC, kernel)

  @jax.custom_vjp
  def convolve(x_BHWC: Array, kernel: Array) -> Array:
    return plain(x_BHWC, kernel)

  def forward(x_BHWC: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return plain(x_BHWC, kernel), (x_BHWC, kernel)

  def backward(saved: tuple[Array, Array], dy_BhwF: Array) -> tuple[Array, Array]:
    x_BHWC, kernel = saved
    form = (strides, padding, options.get("precision"), x_BHWC, kernel)
    of_x = lambda dy: jax.linear_transpose(lambda x: plain(x, kernel), x_BHWC)(dy)[0]  # noqa: E731
    of_kernel = lambda dy: jax.linear_transpose(lambda k: plain(x_BHWC, k), kernel)(dy)[0]  # noqa: E731
    return (
      lax.platform_dependent(dy_BhwF, cpu=partial(_gradient_of_x, *form), default=of_x),
      lax.platform_dependent(dy_BhwF, cpu=partial(_gradient_of_kernel, *form), default=of_kernel),
    )

  convolve.defvjp(forward, backward)
  return convolve(x_BHWC, kernel)


def _is_usual(
  x: Array,
  kernel: Array,
  padding: Any,
  *,
  dimension_numbers: Any = None,
  precision: Any = None,
  feature_group_count: int = 1,
  lhs_dilation: Any = None,
  rhs_dilation: Any = None,
  **others: Any,
) -> bool:
  del precision
  if others or feature_group_count > 1 or isinstance(padding, str) or not x.size:
    return False
  if x.ndim != 4 or max(*(lhs_dilation or (1,)), *(rhs_dilation or (1,)), 1) > 1:
    return False
  nhwc = lax.conv_dimension_numbers(x.shape, kernel.shape, NHWC)
  return lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers) == nhwc


def largest_part(batch: int) -> int:
  """Pictures of the equal parts of a batch, at most PART; all of it if they would be tiny."""
  part = next(p for p in range(min(PART, batch), 0, -1) if batch % p == 0)
  return part if part >= PART // 4 else batch


def _gradient_of_x(
  strides: Any, padding: Any, precision: Any, x_BHWC: Array, kernel: Array, dy_BhwF: Array
) -> Array:
  """[B, H, W, C]: the outer gradient, spread out by the strides, with the kernel turned round."""
  sizes = zip(kernel.shape, x_BHWC.shape[1:3], dy_BhwF.shape[1:3], strides, padding)
  pads = [
    (k - 1 - low, size + low - (n - 1) * stride - 1) for k, size, n, stride, (low, _) in sizes
  ]
  return lax.conv_general_dilated(
    dy_BhwF, kernel[::-1, ::-1].transpose(0, 1, 3, 2), (1, 1), pads,
    lhs_dilation=strides, dimension_numbers=NHWC, precision=precision,
  )  # fmt: skip


def _gradient_of_kernel(
  strides: Any, padding: Any, precision: Any, x_BHWC: Array, kernel: Array, dy_BhwF: Array
) -> Array:
  """[h, w, C, F]: pictures and outer gradient convolved, batch and channels exchanged."""
  sizes = zip(kernel.shape, x_BHWC.shape[1:3], dy_BhwF.shape[1:3], strides, padding)
  pads = [(low, (n - 1) * stride + k - size - low) for k, size, n, stride, (low, _) in sizes]
  part = largest_part(len(x_BHWC))

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
