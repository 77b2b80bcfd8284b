"""Convolutions, pooling and their gradients as a lone CPU makes them, against JAX's own."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.models import convolution
from ssrl_jax.models.resnet import make_resnet

CPU = jax.devices("cpu")[0]


@pytest.fixture
def alone(monkeypatch):
  """The tests have eight devices."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)


def pads(pad):
  return pad if isinstance(pad, tuple) else ((pad, pad), (pad, pad))


def arguments(kernel, stride, pad, *, batch=64, side=(9, 8), dtype=jnp.float32):
  x, k, weight = (jax.random.key(i) for i in range(3))
  height, width = ((n + sum(p) - kernel) // stride + 1 for n, p in zip(side, pads(pad)))
  return (
    jax.random.normal(x, (batch, *side, 3), dtype),
    jax.random.normal(k, (kernel, kernel, 3, 4), dtype),
    jax.random.normal(weight, (batch, height, width, 4), dtype),
  )


def gradients(stride, pad, x, kernel, weight):
  return loss_and_gradients(stride, pad, x, kernel, weight)[1]


def loss_and_gradients(stride, pad, x, kernel, weight):
  with jax.default_device(CPU):
    return compiled(stride, pad)(x, kernel, weight)


def compiled(stride, pad):
  def loss(x, kernel, weight):
    y = convolution.conv_general_dilated(
      x, kernel, (stride, stride), pads(pad), lhs_dilation=(1, 1),
      rhs_dilation=(1, 1), dimension_numbers=convolution.NHWC, feature_group_count=1,
    )  # fmt: skip
    return jnp.sum(weight * y**2)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("batch", [1, 64, 100])
@pytest.mark.parametrize(
  ("kernel", "stride", "pad", "side"),
  [
    (3, 1, 1, (9, 8)), (3, 2, 1, (9, 8)), (7, 2, 3, (9, 8)), (2, 3, 0, (9, 8)), (8, 1, 0, (9, 8)),
    (1, 1, 0, (9, 8)), (1, 2, 0, (9, 8)), (2, 2, ((0, 1), (5, 3)), (9, 8)),
    (3, 1, 1, (2, 2)), (3, 1, 1, (1, 2)), (3, 2, 1, (4, 3)), (3, 2, 1, (1, 1)),  # small maps
    (7, 2, 3, (2, 2)), (1, 2, 0, (2, 2)),
  ],
)  # fmt: skip
def test_value_and_gradients_are_jax_s(kernel, stride, pad, side, batch, monkeypatch):
  values = arguments(kernel, stride, pad, batch=batch, side=side)
  want = jax.tree.leaves(loss_and_gradients(stride, pad, *values))
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  got = jax.tree.leaves(loss_and_gradients(stride, pad, *values))
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_gradients_in_a_loop_that_computes_again_are_the_same(monkeypatch):
  x, kernel, weight = arguments(3, 2, 1)
  want = gradients(2, 1, x, kernel, weight)[1]
  monkeypatch.setattr(jax, "device_count", lambda: 1)

  def add(total, part):
    return total + jax.checkpoint(compiled(2, 1))(part[0], kernel, part[1])[1][1], None

  halves = [v.reshape(2, 32, *v.shape[1:]) for v in (x, weight)]
  with jax.default_device(CPU):
    got, _ = jax.lax.scan(add, jnp.zeros_like(kernel), halves)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
  "options",
  [
    {"padding": "SAME"}, {"feature_group_count": 3}, {"rhs_dilation": (2, 2)},
    {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}, {"preferred_element_type": jnp.float32},
  ],
)  # fmt: skip
def test_what_is_not_plain_has_the_gradients_of_jax(options, alone):
  options = {"padding": ((1, 1), (1, 1)), "dimension_numbers": convolution.NHWC} | options
  groups = options.get("feature_group_count", 1)
  x = jax.random.normal(jax.random.key(0), (64, 6, 6, 6), jnp.bfloat16)
  kernel = jax.random.normal(jax.random.key(1), (6, 6, 6 // groups, 6), jnp.bfloat16)

  def loss(how, kernel):
    return jnp.sum(how(x, kernel, window_strides=(1, 1), **options).astype(jnp.float32))

  ours = lambda x, k, window_strides, padding, **more: (  # noqa: E731
    convolution.conv_general_dilated(x, k, window_strides, padding, **more)
  )
  got, want = (jax.grad(partial(loss, how))(kernel) for how in (ours, jax.lax.conv_general_dilated))
  assert (got == want).all()


def test_parts_of_bfloat16_are_summed_in_float32(alone):
  """All parts alike, of which a sum in bfloat16 would soon be no more."""
  x, kernel, weight = arguments(3, 1, 1, batch=convolution.PART, dtype=jnp.bfloat16)
  one = gradients(1, 1, x, kernel, weight)[1].astype(jnp.float32)
  x, weight = (jnp.tile(v, (300, 1, 1, 1)) for v in (x, weight))
  many = gradients(1, 1, x, kernel, weight)[1]
  np.testing.assert_allclose(many.astype(jnp.float32) / 300, one, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("kernel", "stride", "side"), [(7, 2, (9, 8)), (3, 2, (4, 4))])
def test_gradient_of_bfloat16_pictures_is_rounded_once(kernel, stride, side, monkeypatch):
  values = arguments(kernel, stride, kernel // 2, side=side, dtype=jnp.bfloat16)
  exact = gradients(stride, kernel // 2, *(v.astype(jnp.float32) for v in values))[0]
  error = lambda got: np.linalg.norm(got.astype(jnp.float32) - exact)  # noqa: E731
  of_jax = error(gradients(stride, kernel // 2, *values)[0])
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert error(gradients(stride, kernel // 2, *values)[0]) < 1.1 * of_jax


def test_kernel_that_is_larger_than_the_padded_picture_has_no_place(alone):
  x, kernel = jnp.ones((2, 1, 1, 3)), jnp.ones((4, 4, 3, 4))
  y = convolution.conv_general_dilated(
    x, kernel, (2, 2), pads(0), dimension_numbers=convolution.NHWC
  )
  assert y.shape == (2, 0, 0, 4)


@pytest.mark.parametrize(
  ("kernel", "stride", "side"), [(3, 1, (9, 8)), (3, 2, (9, 8)), (7, 2, (9, 8)), (3, 1, (2, 2))]
)
def test_only_a_lone_cpu_is_given_the_form_that_its_compiler_is_quick_with(
  kernel, stride, side, monkeypatch
):
  values = arguments(kernel, stride, kernel // 2, side=side)

  def lowered(platform):
    traced = compiled(stride, kernel // 2).trace(*values)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  def forms(platform):
    return set(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", lowered(platform)))

  quick = {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
  own = {platform: lowered(platform) for platform in ("cpu", "tpu", "cuda")}
  assert forms("cpu") > quick
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert forms("cpu") == (set() if side == (2, 2) else quick)
  for platform in ("tpu", "cuda"):
    layouts = [
      sorted(re.findall(r"dim_numbers = .*", t)) for t in (lowered(platform), own[platform])
    ]
    assert layouts[0] == layouts[1], platform
    for operation in ("convolution", "dot_general", "pad"):
      count = lowered(platform).count(f"stablehlo.{operation}")
      assert count == own[platform].count(f"stablehlo.{operation}"), (platform, operation)


@pytest.mark.parametrize("side", [(8, 8), (9, 7), (1, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pooling_and_its_gradient_are_jax_s(side, dtype, monkeypatch):
  """In float32 all values are different, so there is one largest."""
  count = 4 * side[0] * side[1] * 3
  x = np.random.default_rng(0).permutation(count).reshape(4, *side, 3) - count / 2
  x = jnp.asarray(x, dtype)  # bfloat16 has equals beyond 256
  x = x if dtype == jnp.float32 else x % 128
  weight = jax.random.normal(jax.random.key(0), (4, -(-side[0] // 2), -(-side[1] // 2), 3), dtype)

  def of_both(x):
    y, pull = jax.vjp(convolution.max_pool, x)
    return y, pull(weight)[0]

  want = jax.jit(of_both)(x)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  got = jax.jit(of_both)(x)
  np.testing.assert_array_equal(got[0], want[0])
  assert got[1].dtype == dtype
  if dtype == jnp.float32:
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-6)
  else:  # of equals another may be chosen; nothing is lost
    total = [np.sum(np.asarray(d, np.float32)) for d in (got[1], want[1])]
    np.testing.assert_allclose(*total, atol=0.1)


def test_pooling_gives_the_gradient_to_the_first_of_equals_and_passes_nan_on(alone):
  x = jnp.zeros((1, 4, 4, 1))
  gradient = jax.grad(lambda x: jnp.sum(convolution.max_pool(x)))(x)[0, :, :, 0]
  # Windows begin at rows and columns -1 and 1; what is outside the picture is never largest.
  np.testing.assert_array_equal(gradient, [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4])
  for place in ((1, 1), (3, 2)):
    y = convolution.max_pool(x.at[0, *place, 0].set(jnp.nan))
    assert np.isnan(y[0, -1, -1, 0]), place


def test_pooling_of_other_devices_is_jax_s(monkeypatch):
  x = jnp.ones((2, 8, 8, 3))
  lower = lambda platform: (  # noqa: E731
    jax.jit(jax.grad(lambda x: jnp.sum(convolution.max_pool(x) ** 2)))
    .trace(x).lower(lowering_platforms=(platform,)).as_text()
  )  # fmt: skip
  assert "select_and_scatter" in lower("cpu")  # eight of them
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert "select_and_scatter" not in lower("cpu")
  assert "select_and_scatter" in lower("tpu")
  assert "select_and_scatter" in lower("cuda")


@pytest.mark.parametrize(
  ("batch", "part"), [(256, 16), (100, 10), (36, 12), (32, 16), (16, 16), (7, 7), (74, 74)]
)
def test_parts_are_equal_and_neither_large_nor_tiny(batch, part):
  assert convolution.largest_part(batch) == part


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_encoder_has_the_same_gradient(stem, monkeypatch):
  encoder = make_resnet(depth=6, width=4, stem=stem, zero_init=False)
  images = jax.random.normal(jax.random.key(0), (64, 16, 16, 3))
  variables = encoder.init(jax.random.key(1), images, train=True)

  def gradient():
    def loss(params):
      out, _ = encoder.apply(
        variables | {"params": params}, images, train=True, mutable=["batch_stats"]
      )
      return jnp.sum(jnp.sin(out.pooled))

    with jax.default_device(CPU):
      return jax.jit(jax.grad(loss))(variables["params"])

  want = gradient()
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  for a, b in zip(jax.tree.leaves(gradient()), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
