import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.models.heads import MLP


def init(model, shape):
  return jax.jit(model.init, static_argnums=2)(jax.random.key(0), jnp.zeros(shape), True)


def apply(model, variables, x, train):
  return jax.jit(lambda v, x: model.apply(v, x, train, mutable=["batch_stats"]))(variables, x)


def num_params(model, dim):
  variables = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, True), jax.ShapeDtypeStruct((2, dim), jnp.float32)
  )
  return sum(p.size for p in jax.tree.leaves(variables["params"]))


# Counted by hand for ResNet-50's 2048 features, from each official code's layers.
@pytest.mark.parametrize(
  ("model", "expected"),
  [
    (MLP(2048, 128), 2048 * 2048 + 2 * 2048 + 2048 * 128),
    (
      MLP(2048, 128, norm=False, final_norm=False, final_bias=True),
      2048 * 2048 + 2048 + 2048 * 128 + 128,
    ),
    (MLP(8192, 8192, 3, final_norm=False), 2048 * 8192 + 2 * 8192**2 + 2 * 2 * 8192),
    (
      MLP(512, 2048, final_norm=False, final_bias=True),
      2048 * 512 + 2 * 512 + 512 * 2048 + 2048,
    ),
  ],
  ids=["simclr", "moco_v2", "barlow", "simsiam_predictor"],
)
def test_params_equal_the_papers_head(model, expected):
  assert num_params(model, 2048) == expected


@pytest.mark.parametrize("train", [True, False])
def test_forward_and_statistics_equal_numpy(train):
  model = MLP(5, 3, layers=3)
  x = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)
  np_rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda p: np.asarray(p) + np_rng.uniform(0.1, 0.5, p.shape).astype(np.float32),
    init(model, x.shape),
  )
  y, mutated = apply(model, variables, x, train)
  params, stats = variables["params"], variables["batch_stats"]
  z = x.astype(np.float64)
  for i in range(3):
    z = z @ params[f"Dense_{i}"]["kernel"]
    mean, var = stats[f"BatchNorm_{i}"]["mean"], stats[f"BatchNorm_{i}"]["var"]
    if train:
      old, (mean, var) = (mean, var), (z.mean(0), z.var(0))
      new = mutated["batch_stats"][f"BatchNorm_{i}"]
      np.testing.assert_allclose(new["mean"], 0.9 * old[0] + 0.1 * mean, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(new["var"], 0.9 * old[1] + 0.1 * var, rtol=1e-4, atol=1e-5)
    z = (z - mean) / np.sqrt(var + 1e-5)
    if i < 2:
      z = np.maximum(z * params[f"BatchNorm_{i}"]["scale"] + params[f"BatchNorm_{i}"]["bias"], 0)
  assert "BatchNorm_2" not in params
  np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)


def test_without_norm_is_a_plain_mlp_of_any_rank():
  model = MLP(5, 3, norm=False, final_norm=False, final_bias=True, activation=nn.gelu)
  x = jax.random.normal(jax.random.key(1), (2, 7, 4))
  variables = init(model, x.shape)
  y, _ = apply(model, variables, x, True)
  assert set(variables) == {"params"}
  params = variables["params"]
  hidden = nn.gelu(np.einsum("bnd,dp->bnp", x, params["Dense_0"]["kernel"]))  # bias 0 at init
  expected = np.einsum("bnd,dp->bnp", hidden, params["Dense_1"]["kernel"])
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_returns_float32():
  model = MLP(8, 4, dtype=jnp.bfloat16)
  x = jax.random.normal(jax.random.key(1), (16, 8))
  variables = init(model, x.shape)
  y, _ = apply(model, variables, x, True)
  exact, _ = apply(MLP(8, 4), variables, x, True)
  assert y.dtype == jnp.float32
  assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  assert 0 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.05


def test_layers_below_one_are_refused():
  assert num_params(MLP(9, 3, layers=1, final_norm=False), 4) == 12
  with pytest.raises(ValueError, match="layers 0"):
    num_params(MLP(9, 3, layers=0), 4)
