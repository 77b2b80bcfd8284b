"""Blocks that are computed again: the same numbers, less memory."""

import jax
import numpy as np
import optax
import pytest

from ssrl_jax.models.resnet import ResNet
from ssrl_jax.models.vit import ViT
from tests.methods.common import FAST, assert_close, random_like

ENCODERS = {
  "vit": lambda remat: ViT(dim=16, layers=4, heads=2, patch=4, remat=remat),
  "resnet": lambda remat: ResNet((4,), False, width=8, stem="cifar", remat=remat),
}


def gradient(encoder, images):
  """Of the pooled features' squares, with the batch statistics after; and the bytes it needs."""
  shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, True), images)
  variables = random_like(shapes)

  def loss(params):
    variables_ = variables | {"params": params}
    features, mutated = encoder.apply(variables_, images, True, mutable=["batch_stats"])
    return (features.pooled**2).sum(), mutated

  compiled = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)
  compiled = compiled.lower(variables["params"]).compile()
  return compiled(variables["params"]), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ENCODERS)
def test_remat_gives_the_same_gradient_and_statistics_with_less_memory(name):
  images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
  (plain, size), (again, size_again) = (
    gradient(ENCODERS[name](remat), images) for remat in (False, True)
  )
  assert_close(again, plain, scale=float(optax.tree.norm(plain[0])))
  assert size_again < 0.7 * size
