"""Convolutions and max pooling as XLA's CPU compiler (jaxlib 0.10) is quick with.

What it is slow with, of what our networks ask for (benchmarks/convolution.py has the figures):

  forward     3 channels under a large kernel, as a ResNet's stem has: with a fourth channel of
              zeros it takes a twelfth. A map of at most 2x2: as little, as one matrix product.
  gradient    The same small maps; 1x1 kernels; strides, for which it spreads the outer gradient
  of x        out with zeros. As a product whose columns are added where they belong.
  gradient    Small maps and 1x1 kernels: as a product. Of the others it lays the pictures side by
  of kernel   side as channels, and a whole batch does not fit the caches: by parts of PART.
  max pool    The gradient, which it scatters: as four maps that interleave, a sixth.

Within a loop, as gradients are accumulated in, it is slow (4 to 26 times) with whatever is not laid
out as [B, H, W, C], which is what differentiation makes. So on one CPU all of it is written out in
that form. TPUs, GPUs and several devices have JAX's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

PART = 16  # pictures
SMALL = 2  # rows and columns of a small map

Array = jax.Array
NHWC = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
  x_BHWC: Array, kernel: Array, strides: Any, padding: Any, **options: Any
) -> Array:
  """As `lax.conv_general_dilated`, for `nn.Conv`; on one device no forward-mode derivatives.

  What is not plain (other forms than [B, H, W, C] and a kernel [h, w, C, F], padding by name,
  groups, dilation) is JAX's own everywhere.
  """
  plain = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
  if jax.device_count() > 1 or not _is_usual(x_BHWC, kernel, padding, **options):
    return plain(x_BHWC, kernel)
  form = (tuple(strides), tuple(padding), options.get("precision"))

  @jax.custom_vjp
  def convolve(x_BHWC: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x_BHWC, kernel, cpu=partial(_forward, *form), default=plain)

  def forward(x_BHWC: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x_BHWC, kernel), (x_BHWC, kernel)

  def backward(saved: tuple[Array, Array], dy_BhwF: Array) -> tuple[Array, Array]:
    x_BHWC, kernel = saved
    of_x = lambda dy: jax.linear_transpose(lambda x: plain(x, kernel), x_BHWC)(dy)[0]  # noqa: E731
    of_kernel = lambda dy: jax.linear_transpose(lambda k: plain(x_BHWC, k), kernel)(dy)[0]  # noqa: E731
    on_cpu_x = partial(_gradient_of_x, *form, x_BHWC, kernel)
    on_cpu_kernel = partial(_gradient_of_kernel, *form, x_BHWC, kernel)
    return (
      lax.platform_dependent(dy_BhwF, cpu=on_cpu_x, default=of_x),
      lax.platform_dependent(dy_BhwF, cpu=on_cpu_kernel, default=of_kernel),
    )

  convolve.defvjp(forward, backward)
  return convolve(x_BHWC, kernel)


def max_pool(x_BHWC: Array) -> Array:
  """Largest of each 3x3, stride 2, padding 1: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C].

  The gradient goes to the largest; to the first of equals, row by row. On one device no
  forward-mode derivatives.
  """
  plain = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
  if jax.device_count() > 1 or not x_BHWC.size:
    return plain(x_BHWC)

  @jax.custom_vjp
  def pool(x_BHWC: Array) -> Array:
    return lax.platform_dependent(x_BHWC, cpu=lambda x: _largest(x)[0], default=plain)

  def backward(x_BHWC: Array, dy_BhwC: Array) -> tuple[Array]:
    of_x = lambda x, dy: jax.vjp(plain, x)[1](dy)[0]  # noqa: E731
    return (lax.platform_dependent(x_BHWC, dy_BhwC, cpu=_gradient_of_pool, default=of_x),)

  pool.defvjp(lambda x_BHWC: (pool(x_BHWC), x_BHWC), backward)
  return pool(x_BHWC)


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
  if x.ndim != 4 or any(n + sum(p) < k for n, p, k in zip(x.shape[1:3], padding, kernel.shape)):
    return False
  if max(*(lhs_dilation or (1,)), *(rhs_dilation or (1,)), 1) > 1:
    return False
  nhwc = lax.conv_dimension_numbers(x.shape, kernel.shape, NHWC)
  return lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers) == nhwc


def largest_part(batch: int) -> int:
  """Pictures of the equal parts of a batch, at most PART; all of it if they would be tiny."""
  part = next(p for p in range(min(PART, batch), 0, -1) if batch % p == 0)
  return part if part >= PART // 4 else batch


def _forward(strides: Any, padding: Any, precision: Any, x_BHWC: Array, kernel: Array) -> Array:
  h, w, C, F = kernel.shape
  columns = _columns(strides, padding, (h, w))
  grid = jax.eval_shape(columns, x_BHWC).shape[1:3]
  if max(grid) <= SMALL:
    return jnp.matmul(columns(x_BHWC), kernel.reshape(-1, F), precision=precision)
  if C < 4 and h * w > 9:
    x_BHWC, kernel = (_pad(v, axis, (0, 4 - C)) for v, axis in ((x_BHWC, 3), (kernel, 2)))
  return lax.conv_general_dilated(
    x_BHWC, kernel, strides, padding, dimension_numbers=NHWC, precision=precision
  )


def _gradient_of_x(
  strides: Any, padding: Any, precision: Any, x_BHWC: Array, kernel: Array, dy_BhwF: Array
) -> Array:
  """[B, H, W, C]."""
  h, w, _, F = kernel.shape
  part = largest_part(len(dy_BhwF))
  # Else columns of all pictures, which are as many times as large as the kernel has places.
  whole = (h, w) == (1, 1) or len(dy_BhwF) <= PART or max(dy_BhwF.shape[1:3]) <= 2 * SMALL
  small = max(dy_BhwF.shape[1:3]) <= SMALL
  if (h, w) == (1, 1) or small or (max(strides) > 1 and (whole or part < len(dy_BhwF))):

    def of_part(dy_bhwF: Array) -> Array:
      dtype = jnp.promote_types(dy_bhwF.dtype, jnp.float32)  # of sums
      x = jax.ShapeDtypeStruct((len(dy_bhwF), *x_BHWC.shape[1:]), dtype)
      d_columns = jnp.matmul(
        dy_bhwF, kernel.reshape(-1, F).T, precision=precision, preferred_element_type=dtype
      )
      d_x = jax.linear_transpose(_columns(strides, padding, (h, w)), x)(d_columns)[0]
      return d_x.astype(x_BHWC.dtype)

    if whole:
      return of_part(dy_BhwF)
    return lax.map(of_part, dy_BhwF.reshape(-1, part, *dy_BhwF.shape[1:])).reshape(x_BHWC.shape)
  # The outer gradient, spread out by the strides, with the kernel turned round.
  sizes = zip((h, w), x_BHWC.shape[1:3], dy_BhwF.shape[1:3], strides, padding)
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
  """[h, w, C, F]."""
  h, w, C, F = kernel.shape
  dtype = jnp.promote_types(kernel.dtype, jnp.float32)  # of sums
  if (h, w) == (1, 1) or max(dy_BhwF.shape[1:3]) <= SMALL:
    columns = _columns(strides, padding, (h, w))(x_BHWC)
    total = jnp.matmul(
      columns.reshape(-1, h * w * C).T, dy_BhwF.reshape(-1, F), precision=precision,
      preferred_element_type=dtype,
    )  # fmt: skip
    return total.reshape(kernel.shape).astype(kernel.dtype)
  # Pictures and outer gradient convolved, batch and channels exchanged.
  sizes = zip((h, w), x_BHWC.shape[1:3], dy_BhwF.shape[1:3], strides, padding)
  pads = [(low, (n - 1) * stride + k - size - low) for k, size, n, stride, (low, _) in sizes]
  part = largest_part(len(x_BHWC))

  def add(i: Array, total_hwCF: Array) -> Array:
    x_bHWC, dy_bhwF = (lax.dynamic_slice_in_dim(v, i * part, part) for v in (x_BHWC, dy_BhwF))
    part_ChwF = lax.conv_general_dilated(
      x_bHWC.transpose(3, 1, 2, 0), dy_bhwF.transpose(1, 2, 0, 3), (1, 1), pads,
      rhs_dilation=strides, dimension_numbers=NHWC, precision=precision,
      preferred_element_type=dtype,
    )  # fmt: skip
    return total_hwCF + part_ChwF.transpose(1, 2, 0, 3)

  total = jnp.zeros(kernel.shape, dtype)
  return lax.fori_loop(0, len(x_BHWC) // part, add, total).astype(kernel.dtype)


def _columns(strides: Any, padding: Any, window: tuple[int, int]) -> Callable[[Array], Array]:
  """Pictures [B, H, W, C] -> what a window shows at each of its places, [B, h, w, rows * cols * C].

  A linear function: its transpose adds what belongs to one pixel.
  """

  def columns(x_BHWC: Array) -> Array:
    shown = _shown(x_BHWC, strides, padding, window, fill=0)
    return jnp.concatenate(shown, axis=-1)

  return columns


def _shown(
  x_BHWC: Array, strides: Any, padding: Any, window: tuple[int, int], *, fill: float
) -> list[Array]:
  """Each place of a window, row by row, at all places of the window: [B, h, w, C] each."""
  for axis in (1, 2):
    x_BHWC = _pad(x_BHWC, axis, padding[axis - 1], fill)
  B, H, W, C = x_BHWC.shape
  (down, right), (rows, cols) = strides, window
  h, w = ((size - k) // stride + 1 for size, k, stride in zip((H, W), window, strides))
  end = lambda i, j: (B, i + (h - 1) * down + 1, j + (w - 1) * right + 1, C)  # noqa: E731
  return [
    lax.slice(x_BHWC, (0, i, j, 0), end(i, j), (1, down, right, 1))
    for i in range(rows)
    for j in range(cols)
  ]  # fmt: skip


def _pad(x: Array, axis: int, amount: tuple[int, int], fill: float = 0) -> Array:
  return lax.pad(
    x, jnp.array(fill, x.dtype), [(*amount, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
  )


def _largest(x_BHWC: Array) -> tuple[Array, Array]:
  """Of each 3x3: its largest value [B, h, w, C], NaN if one is, and where it is, uint8 0 to 8."""
  shown = _shown(x_BHWC, (2, 2), ((1, 1), (1, 1)), (3, 3), fill=-jnp.inf)
  best, at = shown[0], jnp.zeros(shown[0].shape, jnp.uint8)
  for place, value in enumerate(shown[1:], start=1):
    at = jnp.where(value > best, jnp.uint8(place), at)
    best = jnp.maximum(best, value)
  return best, at


def _gradient_of_pool(x_BHWC: Array, dy_BhwC: Array) -> Array:
  """A pixel of an even row is in the middle row of one window, of an odd one in the last and first
  of two; columns alike. So there are four kinds of pixels, each a map of the pooled size.
  """
  _, at = _largest(x_BHWC)
  d = [[jnp.where(at == 3 * i + j, dy_BhwC, 0) for j in range(3)] for i in range(3)]
  below = lambda v: _pad(v, 1, (-1, 1))  # noqa: E731
  right = lambda v: _pad(v, 2, (-1, 1))  # noqa: E731
  even = [d[1][1], d[1][2] + right(d[1][0])]
  odd = [d[2][1] + below(d[0][1]), d[2][2] + below(d[0][2]) + right(d[2][0] + below(d[0][0]))]
  rows = jnp.stack([jnp.stack(kinds, axis=3) for kinds in (even, odd)], axis=2)
  B, h, w, C = dy_BhwC.shape
  _, H, W, _ = x_BHWC.shape
  return rows.reshape(B, 2 * h, 2 * w, C)[:, :H, :W]
