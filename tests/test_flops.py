import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ssrl_jax.flops import count_flops, measured_matmul_flops, peak_flops
from ssrl_jax.models.convolution import conv_general_dilated
from ssrl_jax.models.resnet import make_resnet


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_matmul_by_hand():
  assert count_flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
  assert count_flops(jnp.matmul, shape(4, 3, 5), shape(4, 5, 7)) == 4 * 2 * 3 * 5 * 7
  assert count_flops(lambda x, y: jnp.sum(x * y), shape(9), shape(9)) == 0  # no product of matrices
  assert count_flops(lambda x: (x @ x, x + 1)[1], shape(3, 3)) == 0  # whose result nobody asks for


def test_gradient_of_a_matmul_costs_one_product_for_each_operand():
  def loss(x, y):
    return jnp.sum((x @ y) ** 2)

  forward = 2 * 3 * 5 * 7
  assert count_flops(jax.grad(loss, argnums=0), shape(3, 5), shape(5, 7)) == 2 * forward
  assert count_flops(jax.grad(loss, argnums=(0, 1)), shape(3, 5), shape(5, 7)) == 3 * forward


def test_scan_multiplies_by_its_length_and_jit_and_remat_count_once():
  def scanned(x):
    return jax.lax.scan(lambda c, _: (c @ c, None), x, length=11)[0]

  product = 2 * 4**3
  assert count_flops(scanned, shape(4, 4)) == 11 * product
  assert count_flops(jax.jit(lambda x: x @ x), shape(4, 4)) == product
  assert count_flops(jax.checkpoint(lambda x: x @ x), shape(4, 4)) == product
  assert count_flops(jax.vmap(lambda x: x @ x), shape(6, 4, 4)) == 6 * product


def test_cond_counts_its_most_expensive_branch():
  def either(flag, x):
    return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert count_flops(either, jax.ShapeDtypeStruct((), jnp.bool_), shape(4, 4)) == 2 * 2 * 4**3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
  ("groups", "by_parts", "c", "k"),
  [(1, False, 4, 3), (4, False, 4, 3), (1, True, 4, 3), (1, True, 3, 7)],
)
def test_convolution_and_both_its_gradients_cost_the_same(
  stride, groups, by_parts, c, k, monkeypatch
):
  """b * h * w outputs of k * k * (c / groups) products for each of the d channels; even sides."""
  b, h, w, d = 64, 8, 6, 8
  conv = nn.Conv(
    d, (k, k), (stride, stride), ((k // 2,) * 2,) * 2, feature_group_count=groups, use_bias=False,
    conv_general_dilated=conv_general_dilated if by_parts else None,
  )  # fmt: skip
  monkeypatch.setattr(jax, "device_count", lambda: 1)

  def loss(kernel, x):
    return jnp.sum(conv.apply({"params": {"kernel": kernel}}, x) ** 2)

  kernel, x = shape(k, k, c // groups, d), shape(b, h, w, c)
  forward = 2 * b * (h // stride) * (w // stride) * d * k * k * c // groups
  assert count_flops(loss, kernel, x) == forward
  assert count_flops(jax.grad(loss, argnums=0), kernel, x) == 2 * forward
  assert count_flops(jax.grad(loss, argnums=(0, 1)), kernel, x) == 3 * forward


def resnet50_macs(side):
  """(all convolutions, the first one) by hand; He et al. 2016, table 1, stride on the 3x3."""
  side //= 2
  first = side**2 * 7 * 7 * 3 * 64
  total, channels, side = first, 64, side // 2
  for stage, blocks in enumerate((3, 4, 6, 3)):
    width = 64 * 2**stage
    for block in range(blocks):
      stride = 2 if stage and not block else 1
      total += side**2 * channels * width  # 1x1, before the stride
      side_out = side // stride
      total += side_out**2 * width * width * 9
      total += side_out**2 * width * 4 * width
      if not block:
        total += side_out**2 * channels * 4 * width  # the projected shortcut
      channels, side = 4 * width, side_out
  return total, first


def test_resnet50_is_twice_the_published_multiply_accumulates():
  model = make_resnet(depth=50)
  images = shape(2, 224, 224, 3)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), images)

  def loss(params, stats, x):
    features, _ = model.apply({"params": params, **stats}, x, True, mutable=["batch_stats"])
    return jnp.sum(features.pooled)

  args = variables["params"], {"batch_stats": variables["batch_stats"]}, images
  total, first = resnet50_macs(224)
  # 4.089e9 is the number in use; it has the classifier of 2048 x 1000, which an encoder has not.
  assert math.isclose(total + 2048 * 1000, 4.089e9, rel_tol=1e-4)
  assert count_flops(loss, *args) == 2 * 2 * total
  # Training: three times that, but nobody asks for the gradient of the pixels.
  assert count_flops(jax.grad(loss), *args) == 2 * 2 * (3 * total - first)


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),  # what jax calls a v5p
    ("TPU v6 lite", 918e12),
  ],
)
def test_peak_is_that_of_the_data_sheet(kind, peak):
  value, source = peak_flops(SimpleNamespace(device_kind=kind))
  assert value == peak
  assert "data sheet" in source


def test_unknown_device_is_measured_and_says_so():
  value, source = peak_flops(SimpleNamespace(device_kind="abacus", platform="wood"))
  assert value > 1e6
  assert source.startswith("abacus")
  assert "measured" in source
  assert measured_matmul_flops(64, repeats=1) > 0
