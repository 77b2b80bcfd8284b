"""Names, layouts and outputs are torchvision's and timm's, as make_torch_outputs.py saw them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from ssrl_jax.models.fusion import FusionEncoder
from ssrl_jax.models.resnet import ResNet
from ssrl_jax.models.torch_names import from_torch, to_torch, torch_name
from ssrl_jax.models.vit import ViT, sincos
from ssrl_jax.state import named_leaves
from tests.numeric import drawn

THERE = json.loads(Path(__file__).with_name("torch_outputs.json").read_text())["models"]
ENCODERS = {
  "basic": ResNet((2, 1, 1, 1), False),
  "bottleneck": ResNet((1, 2, 1, 1), True),
  "vit": ViT(24, 2, 2, 8),
  "vit_scaled": ViT(24, 2, 2, 8),
  "vit_registers": ViT(24, 2, 2, 8, registers=3),
}


def tensors_of(name):
  return {k: drawn(k, tuple(shape)) for k, shape in THERE[name]["shapes"].items()}


def tree_of(encoder, side):
  images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  return jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False), images)


def filled(tree, found):
  return jax.tree.unflatten(jax.tree.structure(tree), [found[k] for k, _ in named_leaves(tree)])


def wanted_of(encoder, side=32):
  return {k: x.shape for k, x in named_leaves(tree_of(encoder, side))}


@pytest.mark.parametrize("name", THERE)
def test_outputs_are_theirs(name):
  encoder, side = ENCODERS[name], THERE[name]["side"]
  found = from_torch(tensors_of(name), wanted_of(encoder, side))
  tree = tree_of(encoder, side)
  features = encoder.apply(filled(tree, found), drawn("images", (2, side, side, 3)), False)
  out = features.pooled[:, ::64]
  if features.tokens is not None:
    out = features.tokens[:, [0, -1]].reshape(2, -1)
  expected = np.asarray(THERE[name]["outputs"])
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", THERE)
def test_there_and_back_is_the_same_file(name):
  tensors = tensors_of(name)
  back = to_torch(from_torch(tensors, wanted_of(ENCODERS[name])), (4, 4))
  beside = [k for k in tensors if re.match(r"fc|head|.*num_batches|.*gamma", k)]
  assert sorted([*back, *beside]) == sorted(tensors)
  for k, x in back.items():
    assert x.shape == tensors[k].shape
    if "vit_scaled" not in name or not re.search("attn.proj|mlp.fc2", k):
      np.testing.assert_array_equal(x, tensors[k], err_msg=k)


def test_what_stands_before_the_names_and_beside_the_encoder_is_passed_by():
  tensors = tensors_of("basic")
  around = {f"module.encoder_q.{k}": x for k, x in tensors.items()}
  heads = ("head.0", "projection_head.2", "projector", "predictor.0", "prototypes")
  around |= {f"module.encoder_q.{head}.weight": np.zeros(3) for head in heads}
  around |= {"module.queue": np.zeros(3, np.int64)}
  wanted = wanted_of(ENCODERS["basic"])
  found, plain = from_torch(around, wanted), from_torch(tensors, wanted)
  assert found.keys() == plain.keys() == wanted.keys()
  for k, x in found.items():
    np.testing.assert_array_equal(x, plain[k])


def test_only_the_backbone_of_a_wrapped_encoder_is_meant():
  inner = ENCODERS["basic"]
  wanted = wanted_of(FusionEncoder(inner, width=8))
  found, plain = (
    from_torch(tensors_of("basic"), wanted),
    from_torch(tensors_of("basic"), wanted_of(inner)),
  )
  assert {k.replace("backbone/", ""): x.shape for k, x in found.items()} == wanted_of(inner)
  whole = {k: found.get(k, np.zeros(shape)) for k, shape in wanted.items()}
  back, alone = to_torch(whole, (4, 4)), to_torch(plain, (4, 4))
  assert back.keys() == alone.keys()
  for k, x in back.items():
    np.testing.assert_array_equal(x, alone[k])


def test_positions_of_another_grid_are_resized_as_the_encoder_does():
  encoder, tensors = ENCODERS["vit"], tensors_of("vit")
  small, large = (from_torch(tensors, wanted_of(encoder, side)) for side in (32, 48))
  tree = tree_of(encoder, 48)
  images = drawn("images", (1, 48, 48, 3))

  def tokens(found):
    weights = jax.tree.unflatten(
      jax.tree.structure(tree), [found[k] for k, _ in named_leaves(tree)]
    )
    return encoder.apply(weights, images, False).tokens

  assert large["params/position"].shape == (6, 6, 24)
  np.testing.assert_allclose(tokens(small), tokens(large), rtol=1e-5, atol=1e-5)


def test_places_need_no_square_where_they_are_the_encoder_s():
  encoder, tensors = ENCODERS["vit"], tensors_of("vit")
  tensors["pos_embed"] = drawn("pos_embed", (1, 9, 24))
  images = jax.ShapeDtypeStruct((1, 16, 32, 3), np.float32)
  tree = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False), images)
  found = from_torch(tensors, {k: x.shape for k, x in named_leaves(tree)})
  expected = tensors["pos_embed"][0, 1:].reshape(2, 4, 24)
  np.testing.assert_array_equal(found["params/position"], expected)
  tensors["pos_embed"] = drawn("pos_embed", (1, 8, 24))
  with pytest.raises(ValueError, match="pos_embed has 8 places, neither a square nor 2 x 2"):
    from_torch(tensors, wanted_of(encoder, 16))


def test_sincos_takes_and_writes_the_positions_that_it_computes():
  encoder = ViT(24, 2, 2, 8, position="sincos")
  tensors = tensors_of("vit")
  places = np.concatenate([np.zeros((1, 24)), sincos(7, 7, 24).reshape(-1, 24)])
  found = from_torch(tensors | {"pos_embed": places[None]}, wanted_of(encoder))
  assert found.keys() == wanted_of(encoder).keys()
  expected = np.concatenate([np.zeros((1, 24)), sincos(4, 4, 24).reshape(-1, 24)])
  np.testing.assert_allclose(to_torch(found, (4, 4))["pos_embed"], expected[None], atol=1e-6)
  with pytest.raises(ValueError, match=r"not sincos: set encoder.vit.position to learned"):
    from_torch(tensors, wanted_of(encoder))


def without(tensors, part):
  return {k: x for k, x in tensors.items() if part not in k}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: without(t, "downsample"), r"another encoder: 15 arrays differ, e.g. .* is missing"),
    (lambda t: without(t, "layer1.1"), r"10 arrays differ, e.g. layer1.1.bn1.bias is missing"),
    (lambda t: t | {"layer1.2.bn1.bias": np.zeros(3)}, r"e.g. layer1.2.bn1.bias is not in this"),
    (lambda t: t | {"conv1.weight": np.zeros((64, 3, 3, 3))}, r"conv1.weight is \[64, 3, 3, 3\]"),
    (lambda t: t | {"conv1.weight": np.zeros(3)}, r"is \[3\], which is no \[7, 7, 3, 64\]"),
    (lambda t: t | {f"k.{k}": x for k, x in t.items()}, r"several encoders, .* with '', 'k.'"),
    (lambda t: {f"net{k}": x for k, x in t.items()}, r"has no bn1.bias, .* e.g. netbn1.bias"),
    (lambda t: {}, r"it has e.g. nothing"),
    (lambda t: t | {"bn1.bias": np.zeros(64, np.int8)}, r"bn1.bias is int8, expected floating"),
    (lambda t: t | {"bn1.bias": np.full(64, np.nan)}, r"1 arrays hold NaN or .* bn1.bias"),
  ],
)
def test_what_is_not_the_encoder_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    from_torch(change(tensors_of("basic")), wanted_of(ENCODERS["basic"]))


def test_a_name_without_counterpart():
  with pytest.raises(ValueError, match="params/project4/kernel has no counterpart"):
    torch_name("params/project4/kernel")


def test_what_a_file_cannot_say_is_refused():
  grouped = ResNet((2, 1, 1, 1), False, norm="group")  # timm's have other groups
  with pytest.raises(ValueError, match=r"GroupNorm_0/bias has no counterpart"):
    from_torch(tensors_of("basic"), wanted_of(grouped))
  tensors = tensors_of("vit_registers") | {"pos_embed": drawn("p", (1, 1 + 3 + 1, 24))}
  with pytest.raises(ValueError, match=r"5 places, maybe some for 3 registers"):
    from_torch(tensors, wanted_of(ENCODERS["vit_registers"], 8))
  tensors = tensors_of("vit_scaled") | {"blocks.0.ls1.gamma": np.ones(7)}
  with pytest.raises(ValueError, match=r"ls1.gamma is \[7\], blocks.0.attn.proj.\w+ another"):
    from_torch(tensors, wanted_of(ENCODERS["vit_scaled"]))
