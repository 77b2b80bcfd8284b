import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.method import Features
from ssrl_jax.models import ENCODERS, make_encoder
from ssrl_jax.models.fusion import MAPS, POOLED, FusionEncoder, Node
from ssrl_jax.models.resnet import ResNet
from ssrl_jax.models.vit import ViT

RESNET = ResNet((1, 1, 1), False, width=4, stem="cifar", zero_init=False)
VIT = ViT(dim=8, layers=4, heads=2, patch=4)
SMALL = [
  ResNet((1, 1), False, width=4, stem="cifar", zero_init=False),
  ViT(dim=8, layers=2, heads=2, patch=1),
]


class Maps(nn.Module):
  """A backbone whose maps are those of a dictionary."""

  values: dict[int, np.ndarray]

  def __call__(self, images, train):
    return Features(
      jnp.ones((images.shape[0], 2)), {s: jnp.asarray(x) for s, x in self.values.items()}
    )


def random_variables(model, shape):
  """As initialised where that is a one or a zero, else random. No compiled init: it is slow."""
  np_rng = np.random.default_rng(0)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), images)

  def fill(path, p):
    if path[-1].key == "kernel":
      return np_rng.normal(0, np.prod(p.shape[:-1]) ** -0.5, p.shape).astype(np.float32)
    return np.full(p.shape, path[-1].key in ("scale", "var", "weights"), np.float32)

  return jax.tree.map_with_path(fill, tree)


def identity_projections(variables, width):
  """Evaluation-mode projections that only divide by sqrt(1 + 1e-5), BatchNorm's epsilon."""
  params = dict(variables["params"])
  for name in params:
    if "project" in name and not name.endswith("_norm"):
      params[name] = {"kernel": np.eye(width, dtype=np.float32)[None, None]}
  return {**variables, "params": params}


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("pooled", POOLED)
def test_features_have_the_shapes_of_the_contract(backbone, pooled):
  model = FusionEncoder(backbone, width=6, pooled=pooled)
  images = jax.ShapeDtypeStruct((2, 20, 20, 3), jnp.float32)
  plain, _ = jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x, True), images)
  fused, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, True), images)
  dim = plain.pooled.shape[1]
  assert {s: m.shape for s, m in fused.maps.items()} == {
    s: (*m.shape[:3], 6) for s, m in plain.maps.items()
  }
  assert list(fused.maps) == sorted(fused.maps)
  scales = 6 * fused.scales.shape[1]
  size = {"backbone": dim, "fused": 6, "scales": scales}
  size |= {"backbone_fused": dim + 6, "backbone_scales": dim + scales}
  assert fused.pooled.shape == (2, size[pooled])
  assert fused.scales.shape == (2, len(plain.maps), 6)
  assert fused.fused.shape == (2, 6)
  assert (fused.attention is None) == (backbone is RESNET)


def test_constant_maps_by_hand():
  # Sides 5, 3, 2 are those of strides 1, 2, 4 of a picture of 5 x 5 pixels.
  constants = {1: 1.0, 2: 4.0, 4: 16.0}
  values = {s: np.full((1, -(-5 // s), -(-5 // s), 1), c, np.float32) for s, c in constants.items()}
  model = FusionEncoder(Maps(values), width=1)
  variables = identity_projections(random_variables(model, (1, 5, 5, 3)), 1)
  features = jax.jit(lambda v, x: model.apply(v, x, False))(variables, jnp.zeros((1, 5, 5, 3)))
  # Top-down: (4 + 16)/2 = 10, (1 + 10)/2 = 5.5; bottom-up: (4 + 10 + 5.5)/3 = 6.5, (16 + 6.5)/2.
  expected = {1: 5.5, 2: 6.5, 4: 11.25}
  for s, value in expected.items():
    np.testing.assert_allclose(features.maps[s], np.full(values[s].shape, value), rtol=3e-4)
  np.testing.assert_allclose(features.scales[0, :, 0], list(expected.values()), rtol=3e-4)
  np.testing.assert_allclose(features.fused, [[23.25 / 3]], rtol=3e-4)
  np.testing.assert_allclose(features.pooled, [[1, 1, 5.5, 6.5, 11.25]], rtol=3e-4)


def up64(x, shape):
  return np.kron(x, np.ones((1, 2, 2, 1)))[:, : shape[1], : shape[2]]


def down64(x):
  B, H, W, C = x.shape
  y = np.zeros((B, -(-H // 2), -(-W // 2), C))
  for i in range(y.shape[1]):
    for j in range(y.shape[2]):
      y[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
  return y


def test_fusion_of_random_maps_equals_numpy():
  np_rng = np.random.default_rng(0)
  sizes = {4: (2, 3), 1: (7, 9), 2: (4, 5)}  # in no order, odd
  values = {s: np_rng.normal(size=(2, *hw, 3)).astype(np.float32) for s, hw in sizes.items()}
  model = FusionEncoder(Maps(values), width=3)
  variables = identity_projections(random_variables(model, (2, 7, 9, 3)), 3)
  params = variables["params"]
  weights = {
    "top_down1": [0.2, 1.5],
    "top_down2": [-1.0, 0.5],  # below zero: left out
    "bottom_up2": [0.3, 0.9, 2.0],
    "bottom_up4": [1.2, 0.4],
  }
  for name, w in weights.items():
    params[name] = {"weights": np.asarray(w, np.float32)}
  query = np.asarray([2.0, -1.0, 3.0])
  params["scale_query"] = query.astype(np.float32)
  apply = jax.jit(lambda v, x: model.apply(v, x, False, mutable=["intermediates"]))
  features, sown = apply(variables, jnp.zeros((2, 7, 9, 3)))

  w = {name: np.maximum(v, 0) / (np.maximum(v, 0).sum() + 1e-4) for name, v in weights.items()}
  p1, p2, p4 = (values[s].astype(np.float64) / np.sqrt(1 + 1e-5) for s in (1, 2, 4))

  def node(name, *inputs):
    return np.maximum(sum(a * x for a, x in zip(w[name], inputs, strict=True)), 0)

  t2 = node("top_down2", p2, up64(p4, p2.shape))
  o1 = node("top_down1", p1, up64(t2, p1.shape))
  o2 = node("bottom_up2", p2, down64(o1), t2)
  o4 = node("bottom_up4", p4, down64(o2))
  for s, expected in {1: o1, 2: o2, 4: o4}.items():
    np.testing.assert_allclose(features.maps[s], expected, rtol=1e-4, atol=1e-5)
  scales = np.stack([o.mean((1, 2)) for o in (o1, o2, o4)], axis=1)
  np.testing.assert_allclose(features.scales, scales, rtol=1e-4, atol=1e-5)
  centred = scales - scales.mean(-1, keepdims=True)
  keys = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
  attention = np.exp(keys @ query / np.sqrt(3))
  attention /= attention.sum(-1, keepdims=True)
  fused = np.einsum("bs,bsf->bf", attention, scales)
  np.testing.assert_allclose(features.fused, fused, rtol=1e-4, atol=1e-5)
  logged = sown["intermediates"]
  np.testing.assert_allclose(logged["scale_attention"][0], attention, rtol=1e-4)
  for name, expected in w.items():
    np.testing.assert_allclose(logged[name]["weights"][0], expected, rtol=1e-5)
    assert 0.999 < logged[name]["weights"][0].sum() <= 1


def test_all_weights_below_zero_give_zero_not_nan():
  inputs = [jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))]
  variables = {"params": {"weights": jnp.asarray([-1.0, -2.0])}}
  y = Node("none", jnp.float32).apply(variables, inputs, False)
  np.testing.assert_array_equal(y, np.zeros((1, 2, 2, 3)))


@pytest.mark.parametrize("backbone", SMALL, ids=["resnet", "vit"])
def test_gradient_of_the_fused_vector_reaches_every_parameter(backbone):
  model = FusionEncoder(backbone, width=6)
  images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  variables = random_variables(model, images.shape)
  rest = {name: x for name, x in variables.items() if name != "params"}

  def loss(params):
    features, _ = model.apply({"params": params, **rest}, images, True, mutable=["batch_stats"])
    # The norm of a BatchNorm's output is nearly constant: a fixed projection is not.
    return jnp.mean(jnp.sin(features.fused + jnp.arange(6.0)[None]) ** 2)

  grads = jax.jit(jax.grad(loss))(variables["params"])
  for path, g in jax.tree.leaves_with_path(grads):
    assert np.isfinite(g).all(), path
    assert np.abs(g).max() > 0, path


@pytest.mark.parametrize("conv", ["none", "pointwise", "depthwise"])
def test_node_convolution_has_the_named_parameters(conv):
  model = FusionEncoder(RESNET, width=6, conv=conv)
  images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), images)
  node = variables["params"]["top_down1"]
  kernel = {"pointwise": (1, 1, 6, 6), "depthwise": (3, 3, 1, 6)}
  assert ("Conv_0" in node) == (conv != "none")
  if conv != "none":
    assert node["Conv_0"]["kernel"].shape == kernel[conv]


def test_coarsen_averages_the_finest_map_and_keeps_its_scale():
  model = FusionEncoder(RESNET, width=6, coarsen=1, pooled="scales")
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  features, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, True), images)
  assert {s: m.shape for s, m in features.maps.items()} == {2: (2, 8, 8, 6), 4: (2, 4, 4, 6)}
  assert features.scales.shape == (2, 3, 6)
  assert features.pooled.shape == (2, 18)


def test_maps_are_the_fused_ones_behind_those_of_the_backbone():
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  fused, both = (FusionEncoder(RESNET, width=6, coarsen=1, maps=m) for m in MAPS)
  variables = random_variables(fused, images.shape)
  bare = {k: v["backbone"] for k, v in variables.items()}
  fused, both = (m.apply(variables, images, False).maps for m in (fused, both))
  plain = RESNET.apply(bare, images, False).maps
  assert list(fused) == list(both) == [2, 4]
  for s, map_BHWC in both.items():
    expected = np.concatenate([plain[s], fused[s]], axis=-1)
    np.testing.assert_allclose(map_BHWC, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pooled": "all"}, "pooled 'all'.*backbone.*fused.*backbone_scales"),
    ({"maps": "all"}, "maps 'all'.*fused.*backbone_fused"),
    ({"conv": "3x3"}, "conv '3x3'.*none.*pointwise.*depthwise"),
    ({"coarsen": 3}, "coarsen 3: the backbone has maps of strides .*0 to 2 can be averaged"),
  ],
)
def test_bad_option_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda x: FusionEncoder(RESNET, **options).init(jax.random.key(0), x, True),
      jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),
    )


def test_bfloat16_keeps_float32_vectors():
  images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
  exact, half = (
    FusionEncoder(ResNet((1, 1), False, 8, "cifar", dtype=dtype), width=8, dtype=dtype)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  variables = random_variables(half, images.shape)
  exact, half = (
    jax.jit(lambda v, x, m=m: m.apply(v, x, False))(variables, images) for m in (exact, half)
  )
  assert {m.dtype for m in half.maps.values()} == {jnp.dtype("bfloat16")}
  for a, b in [(half.pooled, exact.pooled), (half.scales, exact.scales), (half.fused, exact.fused)]:
    assert a.dtype == jnp.float32
    assert 0 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.02


@pytest.mark.parametrize(("enabled", "norm"), [(False, "batch"), (True, "group")])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_builds_abstractly(name, enabled, norm):
  encoder = make_encoder(
    name=name,
    dtype="bfloat16",
    norm=norm,
    remat=True,
    resnet={"width": 8, "stem": "cifar", "zero_init": True},
    vit={"patch": 8, "registers": 1, "position": "sincos", "drop_path": 0.1, "pool": "mean"},
    fusion={
      "enabled": enabled,
      "width": 16,
      "pooled": "backbone_fused",
      "coarsen": 0,
      "conv": "none",
    },
    attention={"enabled": enabled, "width": 16, "levels": 2},
  )
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  features, variables = jax.eval_shape(
    lambda x: encoder.init_with_output(jax.random.key(0), x, True), images
  )
  assert features.pooled.dtype == jnp.float32
  assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  # Each image by itself, unless a norm is over the batch.
  assert ("batch_stats" in variables) == (norm == "batch" and name.startswith("resnet"))
  few = {"resnet6": 2, "resnet8": 3}
  assert len(features.maps) == (2 if enabled else few.get(name, 4))  # attention has `levels`
  for stride, x in features.maps.items():
    assert x.shape[:3] == (2, 32 // stride, 32 // stride)
  assert (features.scales is not None) == enabled


def test_make_encoder_names_what_is_wrong():
  good = {
    "name": "resnet18",
    "dtype": "float32",
    "norm": "batch",
    "remat": False,
    "resnet": {},
    "vit": {},
    "fusion": {"enabled": False},
    "attention": {"enabled": False},
  }
  with pytest.raises(ValueError, match=r"unknown encoder 'resnet19'; did you mean 'resnet1[08]'"):
    make_encoder(**good | {"name": "resnet19"})
  with pytest.raises(ValueError, match="dtype 'bf16'"):
    make_encoder(**good | {"dtype": "bf16"})
  with pytest.raises(ValueError, match=r"norm 'layer'.*batch.*group"):
    make_encoder(**good | {"norm": "layer"})
  with pytest.raises(TypeError, match="widht"):
    make_encoder(**good | {"resnet": {"widht": 8}})
  with pytest.raises(TypeError, match="widht"):
    make_encoder(**good | {"fusion": {"enabled": False, "widht": 8}})
  with pytest.raises(TypeError, match="widht"):
    make_encoder(**good | {"attention": {"enabled": False, "widht": 8}})
