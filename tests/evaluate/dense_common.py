"""A tiny encoder and its evaluation, for the tests of detection and segmentation."""

import functools

import jax
import jax.numpy as jnp

from ssrl_jax import parallel
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.method import apply_encoder
from ssrl_jax.models.resnet import ResNet

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

ENCODER = ResNet((1, 1), False, width=8, stem="cifar", zero_init=False)  # strides 1 and 2
APPLY = functools.partial(apply_encoder, ENCODER)


@functools.cache
def weights():
  init = jax.jit(
    functools.partial(ENCODER.init, train=False), compiler_options=parallel.quick_compile()
  )
  return dict(init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))


def make_evaluation(*, num_devices=8, folder=None):
  """Without data of its own: these protocols bring theirs."""
  mesh = parallel.make_mesh(num_devices)
  return Evaluation(
    APPLY, jax.device_put(weights(), parallel.replicated(mesh)), train=None, test=None,
    num_classes=None, mesh=mesh, canvas=8, size=8, crop=1.0, mean=MEAN, std=STD, batch_size=8,
    folder=folder,
  )  # fmt: skip
