import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.method import Features
from ssrl_jax.models import attention
from ssrl_jax.models.attention import (
  POOLED,
  AttentionEncoder,
  cut_parts,
  largest,
  most_attended,
  pool,
)


class Backbone(nn.Module):
  """Maps of three strides that are means of the picture's pixels, mixed by a matrix each."""

  @nn.compact
  def __call__(self, images, train):
    maps = {}
    for s in (4, 8, 16):
      b, h, w, c = images.shape
      x = images.reshape(b, h // s, s, w // s, s, c).mean(axis=(2, 4))
      maps[s] = nn.Dense(6, name=f"stride{s}")(x)
    return Features(jnp.mean(maps[16], axis=(1, 2)), maps)


def pictures(b=2, h=16, w=32):
  return np.random.default_rng(0).normal(size=(b, h, w, 3)).astype(np.float32)


def random_variables(model, images):
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), images)
  np_rng = np.random.default_rng(1)
  return jax.tree.map(lambda p: np_rng.uniform(0.1, 0.8, p.shape).astype(np.float32), shapes)


def apply(model, variables, images):
  return jax.jit(lambda v, x: model.apply(v, x, False))(variables, images)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def level64(x, p, stats, s, heads):
  """One picture's map [h, w, C]: CBAM's gates, the projection, and each head's pooling."""
  h, w, _ = x.shape

  def mlp(v):
    v = v @ p[f"channel{s}_in"]["kernel"] + p[f"channel{s}_in"]["bias"]
    return np.maximum(v, 0) @ p[f"channel{s}_out"]["kernel"] + p[f"channel{s}_out"]["bias"]

  def batch_norm(y, name):
    y = (y - stats[name]["mean"]) / np.sqrt(stats[name]["var"] + 1e-5)
    return y * p[name]["scale"] + p[name]["bias"]

  x = x * sigmoid(mlp(x.mean(axis=(0, 1))) + mlp(x.max(axis=(0, 1))))
  both = np.pad(np.stack([x.max(axis=-1), x.mean(axis=-1)], axis=-1), ((3, 3), (3, 3), (0, 0)))
  gate = np.zeros((h, w, 1))
  for r, c in np.ndindex(h, w):
    gate[r, c] = np.tensordot(both[r : r + 7, c : c + 7], p[f"place{s}"]["kernel"], 3)
  x = x * sigmoid(batch_norm(gate, f"place{s}_norm"))
  x = np.maximum(batch_norm(x @ p[f"project{s}"]["kernel"][0, 0], f"project{s}_norm"), 0)
  logits = (x @ p[f"query{s}"]["kernel"]).reshape(h * w, heads)
  weights = np.exp(logits - logits.max(axis=0))
  weights = (weights / weights.sum(axis=0)).reshape(h, w, heads)
  width = x.shape[-1] // heads
  vector = [
    sum(x[r, c, a * width : (a + 1) * width] * weights[r, c, a] for r, c in np.ndindex(h, w))
    for a in range(heads)
  ]
  return x, np.concatenate(vector), weights


def test_forward_equals_numpy():
  model = AttentionEncoder(Backbone(), width=8, heads=2, levels=2, reduction=3)
  images = pictures(h=32)
  variables = random_variables(model, images)
  features = apply(model, variables, images)
  backbone = Backbone().apply({"params": variables["params"]["backbone"]}, images, False)
  p, stats = (
    jax.tree.map(lambda x: np.asarray(x, np.float64), variables[k])
    for k in ("params", "batch_stats")
  )
  assert set(features.maps) == {8, 16}
  close = {"rtol": 1e-4, "atol": 1e-5}
  for b in range(2):
    vectors, weights = [], []
    for s in (8, 16):
      x, vector, weight = level64(np.asarray(backbone.maps[s][b], np.float64), p, stats, s, 2)
      np.testing.assert_allclose(features.maps[s][b], x, **close)
      vectors.append(vector)
      weights.append(weight)
    np.testing.assert_allclose(features.scales[b], vectors, **close)
    pooled = np.concatenate([backbone.pooled[b], *vectors])
    np.testing.assert_allclose(features.pooled[b], pooled, **close)
    # A coarse place covers 2 x 2 fine ones, which share its weight.
    mean = (weights[0] + np.kron(weights[1], np.ones((2, 2, 1))) / 4) / 2
    np.testing.assert_allclose(features.attention[b, :, 0], mean.reshape(16, 2).T, **close)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("side", [(16, 32), (48, 16)])
def test_shapes_and_each_head_attends_once(levels, side):
  model = AttentionEncoder(Backbone(), width=8, heads=4, levels=levels)
  images = pictures(3, *side)
  features = apply(model, random_variables(model, images), images)
  finest = {1: 16, 2: 8, 3: 4}[levels]
  num = (side[0] // finest) * (side[1] // finest)
  assert features.attention.shape == (3, 4, 1, num)
  assert features.attention.dtype == jnp.float32
  np.testing.assert_allclose(features.attention.sum(axis=-1), 1, rtol=1e-5)
  assert np.all(features.attention >= 0)
  assert features.scales.shape == (3, levels, 8)
  assert features.pooled.shape == (3, 6 + 8 * levels)


def test_pooled_is_what_was_asked_for():
  images, found = pictures(3), {}
  for pooled in POOLED:
    model = AttentionEncoder(Backbone(), width=8, heads=4, levels=2, pooled=pooled)
    features = apply(model, random_variables(model, images), images)
    found[pooled] = np.asarray(features.pooled)
  scales = np.asarray(features.scales).reshape(3, -1)
  np.testing.assert_array_equal(found["scales"], scales)
  np.testing.assert_array_equal(
    found["backbone_scales"], np.concatenate([found["backbone"], scales], axis=1)
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"levels": 4}, r"levels 4: .*strides \[4, 8, 16\]; 1 to 3"),
    ({"levels": 0}, "levels 0"),
    ({"pooled": "level"}, "pooled 'level': expected one of"),
    ({"width": 9, "heads": 2}, "width 9 is not divisible by heads 2"),
  ],
)
def test_what_does_not_fit_is_named(options, message):
  model = AttentionEncoder(Backbone(), **options)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), pictures())


def test_gradient_reaches_every_parameter():
  model = AttentionEncoder(Backbone(), width=8, heads=2, levels=3)
  images = pictures()
  variables = random_variables(model, images)

  @jax.jit
  def gradients(params):
    def total(params):
      output, _ = model.apply({**variables, "params": params}, images, True, mutable="batch_stats")
      return jnp.sum(output.pooled**2)

    return jax.grad(total)(params)

  for path, g in jax.tree_util.tree_leaves_with_path(gradients(variables["params"])):
    assert np.any(g), path


@pytest.mark.parametrize("axis", [1, -1])
def test_largest_is_the_maximum_with_its_gradient_at_the_first_largest(axis):
  x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  np.testing.assert_array_equal(largest(x, axis=axis), x.max(axis=axis))
  gradient = jax.grad(lambda x: jnp.sum(2 * largest(x, axis=axis)))(x)
  np.testing.assert_array_equal(gradient, 2.0 * (x == x.max(axis=axis, keepdims=True)))
  gradient = jax.grad(lambda x: jnp.sum(largest(x, axis=axis)))(np.zeros((1, 2, 2), np.float32))
  assert gradient.sum() == 2
  assert gradient[0, 0, 0] == 1


def test_pool_gives_each_head_its_own_channels():
  x = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)  # places (0 1 2 3) and (4 5 6 7)
  weights = np.array([[[[1, 0.5], [0, 0.5]]]], np.float32)
  np.testing.assert_allclose(pool(x, weights), [[0, 1, 4, 5]])


# --- Where the parts are.


def most_attended64(attention, window, num):
  attention = attention.astype(np.float64).copy()
  h, w = attention.shape
  corners = []
  for _ in range(num):
    best = (-1.0, None)
    for r, c in np.ndindex(h - window[0] + 1, w - window[1] + 1):
      total = attention[r : r + window[0], c : c + window[1]].sum()
      if total > best[0]:
        best = (total, (r, c))
    r, c = best[1]
    corners.append((r, c))
    attention[r : r + window[0], c : c + window[1]] = 0
  return corners


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 5)])
def test_most_attended_is_the_greedy_choice(window):
  rng = np.random.default_rng(0)
  attention_BHW = rng.random((3, 4, 5)).astype(np.float32)
  got = jax.jit(most_attended, static_argnames=("window", "num"))(
    attention_BHW, window=window, num=3
  )
  assert got.shape == (3, 3, 2)
  for b in range(3):
    np.testing.assert_array_equal(got[b], most_attended64(attention_BHW[b], window, 3))


def test_most_attended_by_hand():
  a = np.zeros((1, 4, 6), np.float32)
  a[0, 2, 1], a[0, 0, 4], a[0, 1, 4] = 0.5, 0.2, 0.3
  got = most_attended(a, window=(2, 2), num=3)
  # (0, 3) and (0, 4) both hold all of the right blob, four windows the left one: the first.
  np.testing.assert_array_equal(got[0, :2], [[0, 3], [1, 0]])
  np.testing.assert_array_equal(got[0, 2], [0, 0])  # nothing is left: the first


def test_parts_are_where_the_attention_is():
  images, attention_BHW = pictures(2, 16, 32), np.full((2, 4, 8), 0.01, np.float32)
  attention_BHW[0, 1:3, 5:7] = 1  # pixels 4 to 12, 20 to 28
  attention_BHW[0, 0:2, 0:2] = 0.5
  attention_BHW[1, 2:4, 6:8] = 1  # the lower right corner
  attention_BHW[1, 0, 0] = 0.5
  parts = jax.jit(cut_parts, static_argnames=("size", "num"))(images, attention_BHW, size=8, num=2)
  assert parts.shape == (2, 2, 8, 8, 3)
  np.testing.assert_array_equal(parts[0, 0], images[0, 4:12, 20:28])
  np.testing.assert_array_equal(parts[0, 1], images[0, :8, :8])
  np.testing.assert_array_equal(parts[1, 0], images[1, 8:, 24:])
  np.testing.assert_array_equal(parts[1, 1], images[1, :8, :8])


def test_parts_are_where_the_attention_is_on_a_grid_of_another_shape():
  images, attention_BHW = pictures(1, 16, 32), np.zeros((1, 8, 4), np.float32)  # places of 2 x 8
  attention_BHW[0, 1:5, 2] = 1  # pixels 2 to 10, 16 to 24
  part = cut_parts(images, attention_BHW, size=8, num=1)
  np.testing.assert_array_equal(part[0, 0], images[0, 2:10, 16:24])


@pytest.mark.parametrize("size", [1, 5, 7, 16])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (16, 16)])
def test_parts_stay_inside_the_picture_on_any_grid(size, grid):
  images = pictures(2, 16, 16)
  rng = np.random.default_rng(size)
  for corner in (0, -1):
    attention_BHW = rng.random((2, *grid)).astype(np.float32)
    attention_BHW[:, corner, corner] = 50
    parts = np.asarray(cut_parts(images, attention_BHW, size=size, num=1))
    assert parts.shape == (2, 1, size, size, 3)
    # A piece of the picture as it is, and the one in the corner that all attention is in.
    places = [
      (r, c)
      for r, c in np.ndindex(17 - size, 17 - size)
      if np.array_equal(images[0, r : r + size, c : c + size], parts[0, 0])
    ]
    assert len(places) == 1
    if grid == (16, 16) and size == 1:
      assert places == [(0, 0) if corner == 0 else (15, 15)]


def test_no_gradient_through_the_choice_of_parts():
  images, rng = pictures(2, 8, 8), np.random.default_rng(0)
  attention_BHW = rng.random((2, 4, 4)).astype(np.float32)

  def total(images, attention_BHW):
    return jnp.sum(attention.cut_parts(images, attention_BHW, size=4, num=1) ** 2)

  to_images, to_attention = jax.grad(total, argnums=(0, 1))(images, attention_BHW)
  assert not np.any(to_attention)
  for b in range(2):
    (r, c), inside = most_attended64(attention_BHW[b], (2, 2), 1)[0], np.zeros((8, 8, 1), bool)
    inside[2 * r : 2 * r + 4, 2 * c : 2 * c + 4] = True
    np.testing.assert_allclose(to_images[b], 2 * images[b] * inside, rtol=1e-6)
