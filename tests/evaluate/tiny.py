"""Small pictures that can be learnt and small encoders, for protocols that train on pictures."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax import parallel
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.method import Features, apply_encoder
from ssrl_jax.models.resnet import batch_norm

SIZE = 8


class Tints:
  """Pictures of noise around a colour of their class, in memory; some may lack a label."""

  class_names = ("a", "b", "c", "d")

  def __init__(self, n, *, seed=0, num_classes=4, unlabelled=(), spread=30):
    np_rng = np.random.default_rng(seed)
    colours = np.random.default_rng(99).integers(60, 196, (num_classes, 3))
    self.num_classes = num_classes
    self.labels = np.arange(n) % num_classes
    noise = spread * np_rng.normal(size=(n, SIZE, SIZE, 3))
    tint = spread / 3 * np_rng.normal(size=(n, 1, 1, 3))
    pixels = colours[self.labels][:, None, None] + noise + tint
    self.images = np.clip(pixels, 0, 255).astype(np.uint8)
    self.labels[list(unlabelled)] = -1

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    return {"image": self.images[i], "label": int(self.labels[i])}

  def __repr__(self):
    return f"Tints({len(self)})"


class Little(nn.Module):
  """Convolution, BatchNorm, ReLU, mean; named like a ResNet's stem and first block."""

  @nn.compact
  def __call__(self, images, train):
    x = nn.Conv(6, (3, 3), (2, 2), use_bias=False, name="stem_conv")(images)
    x = nn.relu(batch_norm(train, dtype=jnp.float32, name="stage1_block1")(x))
    return Features(pooled=jnp.mean(x, axis=(1, 2)), maps={2: x[..., :3]})


@functools.cache
def little():
  """(apply, weights), one object for all tests, so that features are compiled once."""
  network = Little()
  weights = network.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), False)
  return functools.partial(apply_encoder, network), dict(weights)


def evaluation(train=None, test=None, *, num_devices=1, num_classes=4, encoder=None):
  apply, weights = encoder or little()
  return Evaluation(
    apply, weights, train=train or Tints(64), test=test or Tints(40, seed=1),
    num_classes=num_classes, mesh=parallel.make_mesh(num_devices), canvas=SIZE, size=SIZE,
    crop=1.0, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=16,
  )  # fmt: skip
