"""What stays in float32 where the encoder computes in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
