import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.models import vit
from ssrl_jax.models.vit import ViT, enlarge, make_vit, shrink, sincos

TINY = {"dim": 8, "layers": 3, "heads": 2, "patch": 4}


def abstract_init(model, shape):
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), images)


def random_variables(model, shape):
  """Nothing at its initial one or zero. No compiled init: it is slow."""
  np_rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda p: np_rng.normal(0.1, 0.3, p.shape).astype(np.float32), abstract_init(model, shape)
  )


def apply(model, variables, images):
  return jax.jit(lambda v, x: model.apply(v, x, False))(variables, images)


# timm: vit_{tiny,small,base,large}_patch16_224.
@pytest.mark.parametrize(
  ("size", "params"),
  [("ti", 5_717_416), ("s", 22_050_664), ("b", 86_567_656), ("l", 304_326_632)],
)
def test_params_with_1000_classes_equal_timm(size, params):
  model = make_vit(size=size)
  variables = abstract_init(model, (1, 224, 224, 3))
  assert sum(p.size for p in jax.tree.leaves(variables)) + 1000 * (model.dim + 1) == params
  # optim.decay_mask spares what has one axis: biases, norms, class token.
  for path, p in jax.tree.leaves_with_path(variables):
    spared = path[-1].key in ("bias", "scale", "class_token", "class_position")
    assert (p.ndim == 1) == spared, path


def layer_norm64(x, p):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense64(x, p):
  return x @ p["kernel"] + p["bias"]


def block64(x, p, heads):
  """One token, one head at a time."""
  N, D = x.shape
  d = D // heads
  qkv = dense64(layer_norm64(x, p["norm1"]), p["attention"]["qkv"])
  mixed, attention = np.zeros((N, D)), np.zeros((heads, N, N))
  for a in range(heads):
    q, k, v = (qkv[:, part * D + a * d : part * D + (a + 1) * d] for part in range(3))
    for n in range(N):
      weights = np.exp(q[n] @ k.T / math.sqrt(d))
      attention[a, n] = weights / weights.sum()
      mixed[n, a * d : (a + 1) * d] = attention[a, n] @ v
  x = x + dense64(mixed, p["attention"]["out"])
  y = dense64(layer_norm64(x, p["norm2"]), p["mlp_in"])
  y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
  return x + dense64(y, p["mlp_out"]), attention


def vit64(image, params, model):
  """Final-norm output of every layer [N, D], and the last attention, of one image."""
  h, w = image.shape[0] // 4, image.shape[1] // 4
  kernel, bias = params["patches"]["kernel"], params["patches"]["bias"]
  tokens = []
  for i in range(h):
    for j in range(w):
      patch = image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
      position = params["position"] if model.position == "learned" else sincos(h, w, model.dim)
      tokens.append(np.tensordot(patch, kernel, 3) + bias + position[i, j])
  first = params["class_token"]
  if model.position == "learned":
    first = first + params["class_position"]
  registers = list(params["registers"]) if model.registers else []
  x = np.stack([first, *registers, *tokens])
  outputs = []
  for i in range(model.layers):
    x, attention = block64(x, params[f"block{i + 1}"], model.heads)
    outputs.append(layer_norm64(x, params["norm"]))
  return outputs, attention


@pytest.mark.parametrize(
  "model",
  [
    ViT(**TINY, registers=2, pool="class"),
    ViT(**TINY, position="sincos", pool="mean"),
  ],
  ids=["learned-registers-class", "sincos-mean"],
)
def test_forward_equals_numpy(model):
  images = np.random.default_rng(1).normal(size=(2, 12, 8, 3)).astype(np.float32)
  variables = random_variables(model, images.shape)
  features = apply(model, variables, images)
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
  close = {"rtol": 1e-4, "atol": 1e-4}
  for b, image in enumerate(images):
    outputs, attention = vit64(image, params, model)
    np.testing.assert_allclose(features.attention[b], attention, **close)
    last = outputs[-1]
    pooled = last[0] if model.pool == "class" else last[-6:].mean(0)
    np.testing.assert_allclose(features.pooled[b], pooled, **close)
    # Depths ceil(3/4 k) = 1, 2, 3, 3; grid 3 x 2.
    grids = [outputs[i][-6:].reshape(3, 2, 8) for i in (0, 1, 2, 2)]
    np.testing.assert_allclose(features.maps[1][b], np.kron(grids[0], np.ones((4, 4, 1))), **close)
    np.testing.assert_allclose(features.maps[2][b], np.kron(grids[1], np.ones((2, 2, 1))), **close)
    np.testing.assert_allclose(features.maps[4][b], grids[2], **close)
    coarse = np.stack([grids[3][:2].mean((0, 1)), grids[3][2:].mean((0, 1))])[:, None]
    np.testing.assert_allclose(features.maps[8][b], coarse, **close)


def test_block_equals_numpy_to_float32_precision():
  # Tight: GELU's usual tanh approximation is off by up to 5e-4.
  block = vit.Block(heads=2, drop_path=0.0, dtype=jnp.float32)
  x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
  variables = random_variables(block, x.shape)
  y, attention = apply(block, variables, x)
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
  for b in range(2):
    expected, weights = block64(x[b].astype(np.float64), params, heads=2)
    np.testing.assert_allclose(y[b], expected, rtol=0, atol=3e-5)
    np.testing.assert_allclose(attention[b], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ("patch", "side", "rows"),
  [
    (16, 64, {4: 16, 8: 8, 16: 4, 32: 2}),
    (14, 98, {7: 14, 14: 7, 28: 4}),
    (2, 8, {1: 8, 2: 4, 4: 2}),
    (1, 4, {1: 4, 2: 2}),
  ],
)
def test_map_strides_and_shapes(patch, side, rows):
  model = make_vit(size="nano", patch=patch, registers=3)
  images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  features, _ = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x, False), images
  )
  assert {s: m.shape for s, m in features.maps.items()} == {
    s: (2, n, n, 96) for s, n in rows.items()
  }
  num_tokens = 1 + 3 + (side // patch) ** 2
  assert features.attention.shape == (2, 3, num_tokens, num_tokens)


def test_unused_attention_and_maps_cost_nothing_under_jit():
  model = ViT(**TINY)
  images = jnp.zeros((2, 16, 16, 3))
  variables = abstract_init(model, images.shape)

  def cost(f):
    return jax.jit(f).lower(variables, images).compile().cost_analysis()["flops"]

  pooled = cost(lambda v, x: model.apply(v, x, False).pooled)
  everything = cost(lambda v, x: model.apply(v, x, False))
  assert pooled < everything


def test_sincos_equals_formula():
  table = sincos(3, 5, 8)
  assert table.shape == (3, 5, 8)
  for row in range(3):
    for column in range(5):
      angles = [(c, 10000 ** (-i / 2)) for c in (column, row) for i in range(2)]
      x, y = angles[:2], angles[2:]
      expected = [f(c * w) for part in (x, y) for f in (math.sin, math.cos) for c, w in part]
      np.testing.assert_allclose(table[row, column], expected, rtol=1e-6, atol=1e-7)
  with pytest.raises(ValueError, match="dim 6 is not divisible by 4"):
    sincos(2, 2, 6)


class Positions(ViT):
  @nn.compact
  def __call__(self, h, w):
    return self._positions(h, w)


def test_learned_positions_follow_another_grid():
  model = ViT(**TINY)
  variables = random_variables(model, (1, 16, 16, 3))
  variables["params"]["position"] = np.full((4, 4, 8), 0.7, np.float32)
  other = {"params": {**variables["params"], "position": np.full((2, 6, 8), 0.7, np.float32)}}
  images = np.random.default_rng(1).normal(size=(2, 8, 24, 3)).astype(np.float32)
  resized, own = apply(model, variables, images), apply(model, other, images)
  np.testing.assert_allclose(resized.pooled, own.pooled, rtol=1e-5, atol=1e-5)
  # The resized grid keeps its orientation: a ramp along columns stays one along columns.
  ramp = np.zeros((4, 4, 8), np.float32) + np.arange(4, dtype=np.float32)[None, :, None]
  variables["params"]["position"] = ramp
  position = Positions(**TINY).apply(variables, 2, 6)[0]
  np.testing.assert_allclose(position[0], position[1], atol=1e-6)
  assert (np.diff(position[0, :, 0]) > 0).all()


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((34, 32), "34 is not divisible by patch 4; nearest: 32 or 36"),
    ((32, 3), "3 is not divisible by patch 4; nearest: 4\n"),
  ],
)
def test_indivisible_image_names_nearest_sizes(shape, message):
  with pytest.raises(ValueError, match=message):
    ViT(**TINY).init(jax.random.key(0), jnp.zeros((1, *shape, 3)), False)


@pytest.mark.parametrize(("field", "value"), [("position", "rope"), ("pool", "max")])
def test_unknown_option_is_named(field, value):
  with pytest.raises(ValueError, match=f"{field} '{value}'"):
    ViT(**TINY, **{field: value}).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False)


def test_drop_path_drops_whole_residuals_and_only_in_training():
  block = vit.Block(heads=2, drop_path=0.5, dtype=jnp.float32)
  x = jax.random.normal(jax.random.key(1), (32, 3, 8))
  variables = random_variables(block, x.shape)
  variables["params"]["mlp_out"] = jax.tree.map(np.zeros_like, variables["params"]["mlp_out"])
  rngs = {"dropout": jax.random.key(2)}
  train = jax.jit(lambda v, x: block.apply(v, x, True, rngs=rngs)[0])(variables, x)
  evaluate = apply(block, variables, x)[0]
  residual, kept = np.asarray(evaluate - x), np.asarray(train - x)
  dropped = np.abs(kept).max((1, 2)) < 1e-5
  assert 8 < dropped.sum() < 24
  np.testing.assert_allclose(kept[~dropped], 2 * residual[~dropped], rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_float32_parameters_attention_and_pooled():
  models = [ViT(**TINY, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
  images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  variables = abstract_init(models[1], images.shape)
  assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  variables = random_variables(models[1], images.shape)
  exact, half = (apply(model, variables, images) for model in models)
  assert {m.dtype for m in half.maps.values()} == {jnp.dtype("bfloat16")}
  assert half.pooled.dtype == half.attention.dtype == jnp.float32
  np.testing.assert_allclose(half.attention.sum(-1), 1, rtol=1e-5)
  error = np.linalg.norm(half.pooled - exact.pooled) / np.linalg.norm(exact.pooled)
  assert 0 < error < 0.03


def test_shrink_is_the_mean_of_the_pixels_that_exist_and_undoes_enlarge():
  x = np.arange(15, dtype=np.float32).reshape(1, 3, 5, 1)
  expected = [[3, 5, 6.5], [10.5, 12.5, 14]]
  np.testing.assert_allclose(shrink(jnp.asarray(x), 2)[0, :, :, 0], expected)
  np.testing.assert_array_equal(shrink(enlarge(jnp.asarray(x), 4), 4), x)


# --- A part of the patches only.

MASKED = [
  pytest.param(ViT(**TINY, registers=2, pool="class"), id="learned-registers-class"),
  pytest.param(ViT(**TINY, position="sincos", pool="mean"), id="sincos-mean"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def masked_setting(model):
  """Pictures of 3 x 2 patches, variables, and a function of pictures and a choice of patches."""
  images = np.random.default_rng(1).normal(size=(2, 12, 8, 3)).astype(np.float32)
  shapes = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, False, mask_BN=jnp.zeros((2, 6), bool)), images
  )
  np_rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda p: np_rng.normal(0.1, 0.3, p.shape).astype(np.float32), shapes)
  return images, jax.jit(lambda x, options: model.apply(variables, x, False, **options))


def test_forward_does_not_change_a_callers_arrays():
  model = ViT(**TINY, registers=2)
  images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
  variables = random_variables(model, images.shape)
  before = jax.tree.map(np.copy, (variables, images))
  model.apply(variables, images, False)
  jax.tree.map(np.testing.assert_array_equal, (variables, images), before)


def other_pixels(images, n):
  """The same pictures but for patch n."""
  row, column = divmod(n, 2)
  images = images.copy()
  images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 3
  return images


@pytest.mark.parametrize("model", MASKED)
def test_keeping_all_patches_is_the_plain_network_in_another_order(model):
  images, apply_to = masked_setting(model)
  order = np.array([[3, 0, 5, 1, 4, 2], [0, 1, 2, 3, 5, 4]])
  plain, kept = apply_to(images, {}), apply_to(images, {"keep_BK": order})
  assert kept.maps == {}
  np.testing.assert_allclose(kept.pooled, plain.pooled, **CLOSE)
  first = model.num_prefix
  np.testing.assert_allclose(kept.tokens[:, :first], plain.tokens[:, :first], **CLOSE)
  for b in range(2):
    np.testing.assert_allclose(kept.tokens[b, first:], plain.tokens[b, first + order[b]], **CLOSE)


@pytest.mark.parametrize("model", MASKED)
def test_hiding_patches_is_keeping_the_rest(model):
  images, apply_to = masked_setting(model)
  keep = np.array([[0, 2, 3], [1, 4, 5]])
  hide = np.ones((2, 6), bool)
  np.put_along_axis(hide, keep, False, axis=1)
  kept, hidden = apply_to(images, {"keep_BK": keep}), apply_to(images, {"hide_BN": hide})
  first = model.num_prefix
  for b in range(2):
    visible = np.concatenate([np.arange(first), first + keep[b]])
    np.testing.assert_allclose(hidden.tokens[b, visible], kept.tokens[b], **CLOSE)
    np.testing.assert_array_equal(hidden.attention[b][:, :, first:][..., hide[b]], 0)
  np.testing.assert_allclose(hidden.pooled, kept.pooled, **CLOSE)


@pytest.mark.parametrize("model", MASKED)
def test_nothing_depends_on_the_pixels_of_a_hidden_or_a_masked_patch(model):
  images, apply_to = masked_setting(model)
  changed, first = other_pixels(images, 2), model.num_prefix
  chosen = np.zeros((2, 6), bool)
  chosen[:, [2, 5]] = True
  others = [n for n in range(first + 6) if n != first + 2]
  for how in ("hide_BN", "mask_BN"):
    before, after = (apply_to(x, {how: chosen}) for x in (images, changed))
    np.testing.assert_array_equal(after.tokens[:, others], before.tokens[:, others], err_msg=how)
    np.testing.assert_array_equal(after.pooled, before.pooled, err_msg=how)
    # The hidden patch itself still has an output, which is its own affair; a masked one is blank.
    same = np.array_equal(after.tokens[:, first + 2], before.tokens[:, first + 2])
    assert same == (how == "mask_BN")
    assert np.any(np.asarray(after.tokens) != apply_to(images, {}).tokens)


@pytest.mark.parametrize("model", MASKED)
def test_masking_puts_one_token_for_the_patch_and_keeps_its_position(model):
  images, apply_to = masked_setting(model)
  plain = apply_to(images, {})
  nothing = apply_to(images, {"mask_BN": np.zeros((2, 6), bool)})
  np.testing.assert_allclose(nothing.tokens, plain.tokens, **CLOSE)
  # Everything masked: the picture does not matter, the positions still tell the tokens apart.
  blank = apply_to(images, {"mask_BN": np.ones((2, 6), bool)})
  np.testing.assert_array_equal(blank.tokens[0], blank.tokens[1])
  patches = np.asarray(blank.tokens[0, model.num_prefix :])
  assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(patches) for b in patches[:i])


def test_hiding_every_patch_leaves_numbers():
  for model in (param.values[0] for param in MASKED):
    images, apply_to = masked_setting(model)
    features = apply_to(images, {"hide_BN": np.ones((2, 6), bool)})
    assert np.all(np.isfinite(features.pooled))
    assert np.all(np.isfinite(features.tokens))


def test_only_a_masked_network_has_a_mask_token():
  model = ViT(**TINY)
  images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  hide = jnp.zeros((2, 4), bool)
  for options, has in (({}, False), ({"hide_BN": hide}, False), ({"mask_BN": hide}, True)):
    shapes = jax.eval_shape(
      lambda x, o=options: model.init(jax.random.key(0), x, False, **o), images
    )
    assert ("mask_token" in shapes["params"]) == has


def test_heads_are_the_size_s_unless_given():
  assert [make_vit(size="s", heads=h).heads for h in (0, 12)] == [6, 12]
  with pytest.raises(ValueError, match=r"encoder.vit.heads is 5, which does not divide the width"):
    make_vit(size="s", heads=5)
