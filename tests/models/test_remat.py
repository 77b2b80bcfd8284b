"""Blocks that are computed again: the same numbers, and less is kept for the backward pass."""

import jax
import numpy as np
import optax
import pytest

from ssrl_jax.dry_run import activation_bytes, part_bytes
from ssrl_jax.models.resnet import ResNet
from ssrl_jax.models.vit import ViT
from tests.methods.common import assert_close, make_experiment, random_like

ENCODERS = {
  "vit": lambda remat: ViT(dim=8, layers=2, heads=2, patch=8, remat=remat),
  "resnet": lambda remat: ResNet((1, 1), False, width=4, stem="cifar", remat=remat),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_remat_gives_the_same_gradient_and_statistics(name):
  images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)

  def gradient(encoder):
    shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, True), images)
    variables = random_like(shapes)

    def loss(params):
      variables_ = variables | {"params": params}
      features, mutated = encoder.apply(variables_, images, True, mutable=["batch_stats"])
      return (features.pooled**2).sum(), mutated

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

  plain, again = (gradient(ENCODERS[name](remat)) for remat in (False, True))
  assert_close(again, plain, scale=float(optax.tree.norm(plain[0])))


@pytest.mark.parametrize(
  ("name", "overrides"), [("simclr", {}), ("mae", {"method.decoder_depth": 4})]
)
def test_remat_keeps_less_for_the_backward_pass(name, overrides):
  """What is traced: a CPU's compiler computes the blocks again, but early, and saves nothing."""
  plain, again = (
    activation_bytes(make_experiment(name, overrides | {"encoder.remat": remat}))
    for remat in (False, True)
  )
  assert again < 0.6 * plain


def test_parts_that_are_computed_again_count_as_one_of_them():
  """All is kept of one part at a time, beside what joins the parts."""
  group = {"encoder.norm": "group"}
  alone = activation_bytes(make_experiment("simclr", group))
  experiment = make_experiment("simclr", {**group, "accumulate": 4})
  assert part_bytes(experiment) == alone // 4
  assert part_bytes(make_experiment("simclr", group)) == 0
  assert activation_bytes(experiment) + part_bytes(experiment) < alone
