import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.flops import count_flops
from ssrl_jax.models import resnet
from ssrl_jax.models.resnet import Block, ResNet, make_resnet


def shapes(model, *, side, train=False):
  images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), images)
  return variables, jax.eval_shape(lambda v, x: model.apply(v, x, train), variables, images)


def random_variables(model, images):
  """Nothing at its initial one or zero; variances are positive. No compiled init: it is slow."""
  np_rng = np.random.default_rng(0)
  tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), images)
  return jax.tree.map(
    lambda p: (
      np_rng.normal(0, np.prod(p.shape[:-1]) ** -0.5, p.shape)
      if len(p.shape) > 1
      else np_rng.uniform(0.5, 1.5, p.shape)
    ).astype(np.float32),
    tree,
  )


# Parameters and multiply-accumulates at 224 pixels, of torchvision's weights (num_params, _ops).
TORCHVISION = [
  (18, 11_689_512, 1.814),
  (34, 21_797_672, 3.664),
  (50, 25_557_032, 4.089),
  (101, 44_549_160, 7.801),
]


@pytest.mark.parametrize(("depth", "params", "giga_macs"), TORCHVISION)
def test_params_and_macs_with_1000_classes_equal_torchvision(depth, params, giga_macs):
  model = make_resnet(depth=depth)
  variables, features = shapes(model, side=224)
  dim = features.pooled.shape[-1]
  assert sum(p.size for p in jax.tree.leaves(variables["params"])) + 1000 * (dim + 1) == params
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  flops = count_flops(lambda v, x: model.apply(v, x, False).pooled, variables, images)
  # Version 1, with the stride on the 1x1, has 3.86 at depth 50.
  assert round((flops / 2 + 1000 * dim) / 1e9, 3) == giga_macs


@pytest.mark.parametrize("depth", [8, 10, 50])
@pytest.mark.parametrize(("stem", "first"), [("imagenet", 4), ("cifar", 1)])
@pytest.mark.parametrize("side", [64, 33, 8])
def test_maps_have_ceil_of_side_over_stride_rows(depth, stem, first, side):
  variables, features = shapes(make_resnet(depth=depth, width=8, stem=stem), side=side)
  num_stages = 3 if depth == 8 else 4
  expansion = 4 if depth == 50 else 1
  assert list(features.maps) == [first * 2**i for i in range(num_stages)]
  for i, (stride, x) in enumerate(features.maps.items()):
    rows = -(-side // stride)
    assert x.shape == (2, rows, rows, 8 * expansion * 2**i)
  assert features.pooled.shape == (2, 8 * expansion * 2 ** (num_stages - 1))
  assert features.attention is None
  assert variables["params"]["stem_conv"]["kernel"].shape[0] == (7 if stem == "imagenet" else 3)


def conv64(x, kernel, stride):
  pad = kernel.shape[0] // 2
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
  return np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)


def max_pool64(x):
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
  return windows[:, ::2, ::2].max((-2, -1))


def norm64(x, name, params, stats, train, updated):
  mean, var = stats[name]["mean"], stats[name]["var"]
  if train:
    batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    updated[name] = {
      "mean": 0.9 * mean + 0.1 * batch_mean,
      "var": 0.9 * var + 0.1 * batch_var,
    }
    mean, var = batch_mean, batch_var
  return (x - mean) / np.sqrt(var + 1e-5) * params[name]["scale"] + params[name]["bias"]


def block64(x, stride, params, stats, train, updated):
  num_convs = sum(name.startswith("Conv_") for name in params)
  y = x
  for i in range(num_convs):
    at_3x3 = i == (1 if num_convs == 3 else 0)
    y = conv64(y, params[f"Conv_{i}"]["kernel"], stride if at_3x3 else 1)
    y = norm64(y, f"BatchNorm_{i}", params, stats, train, updated)
    y = np.maximum(y, 0) if i < num_convs - 1 else y
  if "shortcut_conv" in params:
    x = conv64(x, params["shortcut_conv"]["kernel"], stride)
    x = norm64(x, "shortcut_norm", params, stats, train, updated)
  return np.maximum(x + y, 0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("stem", "bottleneck"), [("imagenet", False), ("cifar", True)])
def test_forward_and_statistics_equal_numpy(stem, bottleneck, train):
  model = ResNet((1, 2), bottleneck, width=2, stem=stem)
  # The stem's map is 8 x 7: SAME would pad the max pool on one side only.
  images = np.random.default_rng(1).normal(size=(3, 16, 13, 3)).astype(np.float32)
  variables = random_variables(model, images)
  apply = jax.jit(lambda v, x: model.apply(v, x, train, mutable=["batch_stats"]))
  features, mutated = apply(variables, images)

  wide = jax.tree.map(lambda p: np.asarray(p, np.float64), variables)
  params, stats, updated = wide["params"], wide["batch_stats"], {}
  x = conv64(
    images.astype(np.float64), params["stem_conv"]["kernel"], 2 if bottleneck is False else 1
  )
  x = np.maximum(norm64(x, "stem_norm", params, stats, train, updated), 0)
  if stem == "imagenet":
    x = max_pool64(x)
  for stage, name in enumerate(["stage1_block1", "stage2_block1", "stage2_block2"]):
    updated[name] = {}
    stride = 2 if stage == 1 else 1
    x = block64(x, stride, params[name], stats[name], train, updated[name])
    if stage == 0:
      first = x
  low, high = features.maps.values()
  np.testing.assert_allclose(low, first, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(high, x, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(features.pooled, x.mean((1, 2)), rtol=1e-4, atol=1e-4)
  expected = updated if train else stats
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    dict(mutated["batch_stats"]),
    expected,
  )


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("zero_init", [False, True])
def test_zero_init_makes_a_block_its_shortcut(bottleneck, zero_init):
  block = Block(2, 1, bottleneck, zero_init, jnp.float32)
  x = jax.random.uniform(jax.random.key(1), (2, 5, 5, 8 if bottleneck else 2))  # at least 0: relu
  y, variables = jax.jit(lambda x: block.init_with_output(jax.random.key(0), x, True))(x)
  assert "shortcut_conv" not in variables["params"]
  assert np.array_equal(x, y) == zero_init


def test_convolutions_start_with_he_fan_out_deviation():
  kernel = resnet.conv(64, 3, dtype=jnp.float32).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))
  kernel = kernel["params"]["kernel"]  # [3, 3, 32, 64]: fan out 9 * 64, fan in 9 * 32
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.03)


def test_bfloat16_keeps_float32_parameters_statistics_and_pooled():
  models = [ResNet((1, 1), False, 8, "cifar", dtype=d) for d in (jnp.float32, jnp.bfloat16)]
  x = np.random.default_rng(1).normal(size=(8, 8, 8, 3)).astype(np.float32)
  variables, _ = shapes(models[1], side=8)
  assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  variables = random_variables(models[1], x)
  exact, half = (jax.jit(lambda v, x, m=m: m.apply(v, x, False))(variables, x) for m in models)
  assert {m.dtype for m in half.maps.values()} == {jnp.dtype("bfloat16")}
  assert half.pooled.dtype == jnp.float32
  error = np.linalg.norm(half.pooled - exact.pooled) / np.linalg.norm(exact.pooled)
  assert 0 < error < 0.02


def test_batch_norm_reduces_bfloat16_in_float32():
  # In bfloat16 a sum of ones stops at 256; the true mean is 1.
  x = jnp.ones((64, 8, 8, 2), jnp.bfloat16)
  norm = resnet.batch_norm(True, dtype=jnp.bfloat16)
  _, variables = norm.init_with_output(jax.random.key(0), x)
  _, mutated = norm.apply(variables, x, mutable=["batch_stats"])
  mean = mutated["batch_stats"]["mean"]
  assert mean.dtype == jnp.float32
  np.testing.assert_allclose(mean, 0.1, rtol=1e-6)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (24, 3), (32, 2)])
def test_group_norm_equals_numpy_on_each_image_and_group(channels, groups):
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return resnet.normalised(x, kind="group", train=True, dtype=jnp.float32, name="n")

  np_rng = np.random.default_rng(0)
  x = np_rng.normal(1.0, 2.0, size=(3, 5, 4, channels)).astype(np.float32)
  scale, bias = np_rng.normal(size=(2, channels)).astype(np.float32)
  y = Normed().apply({"params": {"n": {"scale": scale, "bias": bias}}}, x)
  z = x.astype(np.float64).reshape(3, 20, groups, -1)
  z = z - z.mean((1, 3), keepdims=True)
  z = (z / np.sqrt((z**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)
  np.testing.assert_allclose(y, z * scale + bias, rtol=1e-4, atol=1e-4)


def test_unknown_stem_is_named():
  with pytest.raises(ValueError, match=r"stem 'cifr'.*imagenet.*cifar"):
    shapes(make_resnet(depth=8, stem="cifr"), side=8)
