"""What the tests of all methods share: a method is tested by its line in METHODS, options in CASES.

Tiny everywhere: ResNet-6 of width 4, 16 pixels, 8 images, so that 8 devices hold one image each.
"""

import os

import jax
import numpy as np

from configs import smoke
from ssrl_jax.config import view_group
from ssrl_jax.experiment import abstract_state, build, init_state
from ssrl_jax.method import box_name
from ssrl_jax.methods import METHODS
from ssrl_jax.state import TrainState, named_leaves
from ssrl_jax.step import abstract_views

LOCAL = {"local_views": view_group(count=2, size=8)}
VIT = {"encoder.name": "vit_pico", "encoder.vit.patch": 4, "encoder.vit.position": "sincos"}
PLAIN = {"encoder.fusion.enabled": False}
# id -> method, overrides of the config. Together they meet every branch of every method.
CASES = {name: (name, {}) for name in METHODS} | {
  "simclr block": ("simclr", {"method.block": 3}),
  "byol local": ("byol", LOCAL),
  "lejepa local": ("lejepa", LOCAL),
  "mmcr momentum": ("mmcr", {"method.momentum": True, "method.within_weight": 0.1}),
  "swav": ("swav", {"method.queue_size": 0}),
  "swav queue local": ("swav", {"method.queue_size": 16, "method.queue_start": 0.0, **LOCAL}),
  "ressl local": ("ressl", {"global_views.count": 2, **LOCAL}),
  "dinov2": ("dinov2", LOCAL),
  "simmim": ("simmim", {"method.mask_ratio": 0.25}),  # of noise only what it remembers is predicted
  "msn": ("msn", LOCAL),
  "dino sinkhorn local": ("dino", {"method.centring": "sinkhorn", **LOCAL}),
  "moco_v3 vit": ("moco_v3", {**VIT, "method.predictor_norm": True}),
  "hybrid byol mae": (
    "hybrid",
    {
      **VIT,
      "method.terms": ("byol", "mae"),
      "method.options": {
        "byol": {"hidden_dim": 12, "out_dim": 6},
        "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
      },
    },
  ),
  "fusion momentum variance_covariance plain-encoder": (
    "fusion",
    {
      "method.target": "momentum",
      "method.constraint": "variance_covariance",
      "encoder.fusion.enabled": False,
    },
  ),
  "fusion views sigreg plain-encoder local": (
    "fusion",
    {
      "method.constraint": "sigreg",
      "method.place_weight": 0.0,
      "encoder.fusion.enabled": False,
      **LOCAL,
    },
  ),
  "fusion views coding_rate plain-encoder local": (
    "fusion",
    {"encoder.fusion.enabled": False, **LOCAL},
  ),
  "fusion momentum none local": (
    "fusion",
    {"method.target": "momentum", "method.constraint": "none", **LOCAL},
  ),
}
SLOW = {"fusion momentum none local"}
# What the loss reads as data. A queue of the same batch again and again would raise the loss, and
# so would the covariance that begins at 0.
DATA = ("queue", "centre", "covariance")
READS_LABELS = {"supcon", "supervised"}
# How much a target keeps, where it is not BYOL's cosine: step / total steps, base -> tau.
TAU = {
  "ijepa": lambda share, base: base + (1 - base) * share,
  "msn": lambda share, base: base + (1 - base) * share / 1.25,
  **dict.fromkeys(("moco_v2", "densecl", "finegrained", "ressl", "mmcr"), lambda share, base: base),
}
# Options that make a method small, where it has them.
TINY = {
  "hidden_dim": 12,
  "out_dim": 6,
  "maps_dim": 6,
  "tile_dim": 6,
  "predictor_dim": 16,
  "predictor_depth": 1,
  "predictor_heads": 2,
  "decoder_dim": 16,
  "decoder_depth": 1,
  "decoder_heads": 2,
  "num_prototypes": 12,
  "num_directions": 16,
  "num_matches": 3,
  "num_permutations": 5,
  "freeze_epochs": 0.0,
  "queue_size": 16,
  "slice_size": 8,
}
TINY_OPTIONS = {name: {"hidden_dim": 12, "out_dim": 6} for name in ("simclr", "vicreg")}
BATCH = 8
# What conftest.py turns down of it, as users have it.
DEFAULT_EFFORT = {
  name: value
  for name, value in {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
    "xla_cpu_use_fusion_emitters": True,
  }.items()
  if name in os.environ["XLA_FLAGS"]
}


def make_config(method, overrides):
  c = smoke.get_config(method)
  c.update({"batch_size": BATCH, "steps": 20})
  c.data.canvas = c.evaluate.size = 16
  c.global_views.update({"size": 16})
  c.encoder.resnet.update({"width": 4, "zero_init": False})  # else many gradients start at zero
  c.encoder.fusion.width = 6
  c.encoder.attention.update({"width": 8, "levels": 2})
  c.encoder.name = {"resnet8": "resnet6", "vit_nano": "vit_pico"}[c.encoder.name]
  c.method.update({k: v for k, v in TINY.items() if k in c.method})
  if method == "w_mse":
    c.method.eps = 0.1  # 8 examples in 6 dimensions: nearly singular without
  if method == "hybrid":
    c.method.options = TINY_OPTIONS
  c.mesh.devices = 1
  for key, value in overrides.items():
    *groups, last = key.split(".")
    group = c
    for name in groups:
      group = group[name]
    group[last] = value
  return c


def make_experiment(method, overrides):
  return build(make_config(method, overrides), num_examples=128, num_classes=10)


def make_state(experiment) -> TrainState:
  return jax.jit(lambda key: init_state(experiment, key))(jax.random.key(0))


def make_views(experiment):
  """Noise pictures; the views of one differ by less than two pictures do."""
  rng, views = np.random.default_rng(0), {}
  for name, shape in abstract_views(experiment).items():
    if name == "label":
      views[name] = rng.integers(0, 3, shape.shape).astype(np.int32)
      continue
    if name.endswith("_box"):  # quarters of the picture, one in four of them mirrored
      corner = np.random.default_rng(1).integers(0, 2, (*shape.shape[:2], 2)) / 2
      box = np.concatenate([corner, corner + 0.5], axis=-1).astype(np.float32)
      box[::4] = box[::4][..., [0, 3, 2, 1]]
      views[name] = box
      continue
    pictures = rng.normal(size=(shape.shape[0], 1, *shape.shape[2:]))
    views[name] = (pictures + 0.5 * rng.normal(size=shape.shape)).astype(np.float32)
  return views


def random_like(tree):
  """Arrays of these shapes: kernels keep the scale of what they get, variances are positive."""
  rng = np.random.default_rng(1)

  def draw(x):
    fan_in = np.prod(x.shape[:-1])
    many = rng.normal(0, fan_in**-0.5, x.shape) if x.ndim > 1 else rng.uniform(0.5, 1.5, x.shape)
    return many.astype(np.float32)

  return jax.tree.map(draw, tree)


def random_state(experiment) -> TrainState:
  """As `make_state`, but drawn at random: a compiled init takes a second."""
  shapes = abstract_state(experiment)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes._replace(key=()))
  trees = zeros.params, zeros.method_state
  choose = lambda x, zero: x if zero.dtype == np.float32 else zero  # noqa: E731
  params, method_state = jax.tree.map(choose, random_like(trees), trees)
  return zeros._replace(params=params, method_state=method_state, key=jax.random.key(0))


def random_inputs(method, batch_size=BATCH):
  """Arguments of `method.loss`, all at random: a compiled init takes longer than a small loss."""
  rng = np.random.default_rng(0)
  views = {"label": rng.integers(0, 3, batch_size).astype(np.int32)}
  for spec in method.views:
    shape = (batch_size, spec.count, spec.size, spec.size, 3)
    pictures = rng.normal(size=(batch_size, 1, *shape[2:]))
    views[spec.name] = (pictures + rng.normal(size=shape)).astype(np.float32)
    corner = rng.uniform(0, 0.5, (batch_size, spec.count, 2))
    views[box_name(spec.name)] = np.concatenate([corner, corner + 0.5], axis=-1).astype(np.float32)
  params, state = random_like(jax.eval_shape(method.init, jax.random.key(0), views))
  return params, state, views, jax.random.key(1), np.int32(3)


def assert_close(got, expected, *, scale=0.0):
  """Arrays of both trees agree to 1e-4 of the array's own norm, or 1e-6 of `scale`."""
  for (name, x), (_, y) in zip(named_leaves(got), named_leaves(expected), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    error, norm = np.linalg.norm(x - y), np.linalg.norm(y)
    assert error <= 1e-4 * norm + 1e-6 * scale, (name, error, norm)


def assert_equal(got, expected):
  for (name, x), (_, y) in zip(named_leaves(got), named_leaves(expected), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)
