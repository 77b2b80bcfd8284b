"""What a method cannot use is refused when the run is built, with the fix."""

import pytest

from configs import smoke
from ssrl_jax.config import change, view_group
from ssrl_jax.experiment import abstract_state, build
from ssrl_jax.methods import METHODS

WITH_LOCAL_VIEWS = {"fusion", "byol", "lejepa", "swav", "ressl", "dino", "ibot", "dinov2", "msn"}
MASKED = ("mae", "simmim", "ijepa", "ibot", "dinov2", "msn")
QUEUES = ("moco_v2", "nnclr", "densecl", "finegrained", "swav", "ressl")


def make(method, changes, *, num_classes=10):
  c = smoke.get_config(method)
  c.mesh.devices = 1
  change(c, changes)
  return build(c, num_examples=128, num_classes=num_classes)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - WITH_LOCAL_VIEWS))
def test_local_views_are_refused_where_nothing_looks_at_them(name):
  with pytest.raises(ValueError, match=r"takes .*no others, but views are: .* 2 local"):
    make(name, {"local_views": view_group(count=2, size=16)})


@pytest.mark.parametrize("name", sorted(WITH_LOCAL_VIEWS))
def test_local_views_are_taken_where_something_does(name):
  views = make(name, {"local_views": view_group(count=2, size=16)}).method.views
  assert [v.name for v in views][:2] == ["global", "local"]


@pytest.mark.parametrize("name", QUEUES)
@pytest.mark.parametrize(("size", "nearest"), [(8, 16), (40, "(32|48)")])
def test_queue_must_be_a_multiple_of_the_batch(name, size, nearest):
  expected = rf"{name}: queue_size {size} is not a multiple of batch_size 16; nearest: {nearest}"
  with pytest.raises(ValueError, match=expected):
    make(name, {"method.queue_size": size})


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.25])
def test_mask_ratio_is_a_fraction(ratio):
  with pytest.raises(
    ValueError, match=rf"mask_ratio is {ratio}; (it must be above 0|expected 0 or)"
  ):
    make("mae", {"method.mask_ratio": ratio})
  with pytest.raises(ValueError, match=r"ibot: mask_ratio is .*; expected the lower number"):
    make("ibot", {"method.mask_ratio": (0.1, ratio)})


@pytest.mark.parametrize("name", MASKED)
def test_masked_methods_need_a_vit(name):
  with pytest.raises(ValueError, match=rf"{name} hides patches .* encoder is a ResNet; set enc"):
    make(name, {"encoder.name": "resnet8"})
  with pytest.raises(ValueError, match=rf"{name} .* FusionEncoder"):
    make(name, {"encoder.fusion.enabled": True})


@pytest.mark.parametrize("name", MASKED)
def test_image_must_be_whole_patches(name):
  with pytest.raises(ValueError, match=r"30 is not divisible by patch 4; nearest: 28 or 32"):
    abstract_state(make(name, {"global_views.size": 30}))


@pytest.mark.parametrize("size", [2, 6, 12, 64])
def test_masked_squares_must_fit(size):
  with pytest.raises(ValueError, match=rf"mask_size {size} does not .*; these do: 4, 8, 16$"):
    make("simmim", {"method.mask_size": size})


@pytest.mark.parametrize("name", ["supcon", "supervised"])
def test_upper_controls_need_labels(name):
  with pytest.raises(ValueError, match=rf"{name} learns from labels, and the training data have"):
    make(name, {}, num_classes=None)


def test_finegrained_needs_attention():
  with pytest.raises(ValueError, match=r"finegrained needs .* set encoder.attention.enabled"):
    make("finegrained", {"encoder.attention.enabled": False})


def test_option_of_another_method_is_refused_with_the_nearest():
  with pytest.raises(ValueError, match=r"unknown config key 'method.tau'"):
    make("simclr", {"method.tau": 0.9})


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("w_mse", {"method.slice_size": 6}, "slice_size is 6; it must exceed out_dim 8"),
    ("jigsaw", {"method.gap": 1.0}, "gap is 1.0; expected 0 <= gap < 1"),
    ("jigsaw", {"method.num_permutations": 1}, "num_permutations is 1; expected 2 to"),
    ("lejepa", {"method.sigreg_weight": 2.0}, "sigreg_weight is 2.0; expected 0 to 1"),
    ("dino", {"method.centring": "center"}, "centring 'center'; expected one of"),
    ("simclr", {"method.temperature": 0.0}, "temperature is 0.0; it must be positive"),
    ("ressl", {"method.temperature": 0.0}, "temperature is 0.0; it must be positive"),
    ("ressl", {"method.teacher_temperature": 0.0}, "teacher_temperature is 0.0; it must be pos"),
    ("ressl", {"method.tau": 1.0}, "tau is 1.0; it must be above 0 and below 1"),
    ("tico", {"method.covariance_weight": -1.0}, "covariance_weight is -1.0; expected 0 or more"),
    ("tico", {"method.covariance_momentum": 1.0}, "covariance_momentum is 1.0; it must be above 0"),
    ("tico", {"method.tau": 1.0}, "tau is 1.0; it must be above 0 and below 1"),
    ("byol", {"method.tau": 1.5}, "tau is 1.5; it must be above 0 and below 1"),
    ("fusion", {"method.place_grid": 0}, "place_grid is 0; expected 1 or more"),
    ("fusion", {"method.place_weight": -1.0}, "place_weight is -1.0; expected 0 or more"),
    ("fusion", {"method.eps": 0.0}, "eps is 0.0; it must be positive"),
    ("fusion", {"method.tau": 1.5}, "tau is 1.5; it must be above 0 and below 1"),
    ("densecl", {"method.dense_weight": 3.0}, "dense_weight is 3.0; it must be between 0 and 1"),
    ("vicregl", {"method.global_weight": 3.0}, "global_weight is 3.0; it must be between 0 and 1"),
    ("vicreg", {"method.variance_weight": -25.0}, "variance_weight is -25.0; expected 0 or more"),
    ("dino", {"method.warmup_epochs": -3.0}, "warmup_epochs is -3.0; expected 0 or more"),
    ("swav", {"method.iterations": 0}, "iterations is 0; expected 1 or more"),
    ("simclr", {"method.block": -4}, "block is -4; expected 0 or more"),
    ("ibot", {"method.mask_probability": 50.0}, "mask_probability is 50.0; it must be between"),
    ("ibot", {"method.mask_ratio": (0.5, 0.1)}, r"mask_ratio is \(0.5, 0.1\); expected the lower"),
    ("ijepa", {"method.target_area": (15.0, 20.0)}, "target_area is .*at most 1"),
    ("ijepa", {"method.target_aspect": (0.0, 1.5)}, "target_aspect is .*above 0"),
    ("msn", {"method.mask_ratio": 1.0}, "mask_ratio is 1.0; it must be above 0 and below 1"),
    ("msn", {"method.sharpen": 0.0}, "sharpen is 0.0; it must be positive"),
    ("msn", {"method.entropy_weight": -1.0}, "entropy_weight is -1.0; expected 0 or more"),
    ("mmcr", {"method.tau": 1.0}, "tau is 1.0; it must be above 0 and below 1"),
    ("mmcr", {"method.within_weight": -0.5}, "within_weight is -0.5; expected 0 or more"),
    ("w_mse", {"method.eps": 2.0}, "eps is 2.0; it must be between 0 and 1"),
    ("fusion", {"method.constraint": "sigreg"}, "'sigreg' with place_weight 1.0; set place_weight"),
    ("vicregl", {"method.num_matches": 0}, "num_matches is 0; expected 1 or more"),
    ("hybrid", {"method.terms": ("simclr",), "method.weights": (1.0,)}, "two or more different"),
    ("hybrid", {"method.terms": ("simclr", "vicrg")}, "did you mean 'vicreg'"),
    ("hybrid", {"method.weights": (1.0, -1.0)}, "they must be positive"),
    ("hybrid", {"method.options": {"simclr": {"temprature": 1.0}}}, "did you mean 'temperature'"),
    ("hybrid", {"method.options": {"byol": {}}}, r"'byol', which is not among .*options='\{\}'"),
    ("hybrid", {"method.options": {"vicreg": {"variance_weight": -1.0}}}, "vicreg.variance_weight"),
  ],
)
def test_bad_option_is_named_with_what_was_expected(name, changes, message):
  with pytest.raises(ValueError, match=rf"({name}: |method\.).*{message}"):
    make(name, changes)
