"""What stays in float32 where the encoder computes in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import (
  consistency,
  contrastive,
  correlation,
  dense,
  distribution,
  factor,
  prototypes,
)
from tests.methods.common import make_experiment, random_inputs

# Sums, and what is steep: in bfloat16 a sum of ones stops at 256. Maxima and sigmoids are not.
SENSITIVE = {"reduce_sum", "cumsum", "exp", "log", "log1p", "sqrt", "rsqrt", "div", "cholesky"}
BF16 = {"encoder.dtype": "bfloat16"}


def equations(jaxpr):
  """All of a traced function, those inside loops, branches and calls included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def half_precision(jaxpr):
  """Names of the sensitive operations that have a bfloat16 operand."""
  return {
    e.primitive.name
    for e in equations(jaxpr)
    if e.primitive.name in SENSITIVE and any(v.aval.dtype == jnp.bfloat16 for v in e.invars)
  }


@pytest.mark.parametrize(
  ("name", "overrides"),
  [
    ("fusion", {"encoder.norm": "group"}),
    ("finegrained", {}),
    ("vicregl", {}),
    ("swav", {}),
    ("ijepa", {}),
  ],
)
def test_norms_softmaxes_losses_and_statistics_are_float32(name, overrides):
  method = make_experiment(name, BF16 | overrides).method
  traced = jax.make_jaxpr(method.loss)(*random_inputs(method))
  assert not half_precision(traced.jaxpr)


def test_a_bfloat16_sum_would_be_found():
  x = jnp.ones(4, jnp.bfloat16)
  traced = jax.make_jaxpr(jax.jit(lambda x: jax.lax.reduce_sum(jnp.exp(x), axes=[0])))(x)
  assert half_precision(traced.jaxpr) == {"exp", "reduce_sum"}


@pytest.mark.parametrize(
  ("name", "overrides"),
  [("simclr", {}), ("fusion", {})],
)
def test_bfloat16_loss_is_near_the_float32_one(name, overrides):
  losses = []
  for options in ({}, BF16):
    method = make_experiment(name, overrides | options).method
    loss = jax.jit(method.loss)
    losses.append(float(loss(*random_inputs(method))[0]))
  assert losses[0] != losses[1]
  np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)


ROWS = jnp.ones((8, 4))
MAPS = jnp.ones((2, 3, 4))
PRODUCTS = {
  "nt_xent": lambda x: contrastive.nt_xent(x, ROWS, temperature=0.1),
  "info_nce_queue": lambda x: contrastive.info_nce_queue(x, ROWS, ROWS, temperature=0.1),
  "relation_entropy": lambda x: consistency.relation_entropy(
    x[:, None], ROWS, ROWS, temperature=0.1, teacher_temperature=0.1
  ),
  "barlow_twins": lambda x: correlation.barlow_twins(x, ROWS, off_diagonal_weight=0.1),
  "whiten": lambda x: correlation.whiten(x, eps=0.1),
  "coding_rate": lambda x: distribution.coding_rate(x, eps=0.5),
  "coding_rate of few": lambda x: distribution.coding_rate(x[:3], eps=0.5),
  "nuclear_norm": factor.nuclear_norm,
  "variance_covariance": distribution.variance_covariance,
  "covariance_contrast": lambda x: distribution.covariance_contrast(
    x, jnp.ones((4, 4)), momentum=0.9
  )[0],
  "sigreg": lambda x: distribution.sigreg(x, jax.random.key(0), num_directions=4),
  "cross_view_entropy": lambda x: prototypes.cross_view_entropy(
    MAPS, x.reshape(2, 4, 4)[:, :3], temperature=0.1
  ),
  "match_features": lambda x: dense.match_features(x.reshape(2, 4, 4), MAPS) * jnp.sum(x),
}


@pytest.mark.parametrize("loss", PRODUCTS.values(), ids=PRODUCTS)
def test_products_in_losses_are_not_rounded_on_accelerators(loss):
  """Nor in their gradients: by default a TPU multiplies float32 as bfloat16, a GPU as TF32."""
  total = lambda x: sum(jnp.sum(y) for y in jax.tree.leaves(loss(x)))  # noqa: E731
  traced = jax.make_jaxpr(jax.value_and_grad(total))(ROWS)
  products = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
  assert products
  assert {e.params["precision"] for e in products} == {(jax.lax.Precision.HIGHEST,) * 2}
