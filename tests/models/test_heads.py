import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.method import Features
from ssrl_jax.models.heads import MLP, JointEmbedding, Prototypes


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


@pytest.mark.parametrize("weight_norm", [True, False])
def test_prototypes_are_products_with_unit_rows(weight_norm):
  model = Prototypes(7, weight_norm=weight_norm)
  rng = np.random.default_rng(0)
  z, kernel = (rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 7))
  scores = model.apply({"params": {"kernel": kernel}}, z, True)
  assert scores.dtype == jnp.float32
  for i, j in np.ndindex(5, 7):
    x, w = z[i].astype(np.float64), kernel[j].astype(np.float64)
    expected = x @ w / np.sqrt(x @ x) / (np.sqrt(w @ w) if weight_norm else 1)
    np.testing.assert_allclose(scores[i, j], expected, rtol=1e-5, atol=1e-6)


def test_prototypes_start_at_unit_length_in_all_directions():
  kernel = init(Prototypes(4000), (2, 3))["params"]["kernel"]
  assert kernel.shape == (4000, 3)
  np.testing.assert_allclose(np.linalg.norm(kernel, axis=1), 1, rtol=1e-5)
  # Uniform on the sphere: each coordinate uniform in [-1, 1], of mean 0 and variance 1/3.
  np.testing.assert_allclose(np.mean(kernel, axis=0), 0, atol=4 * (1 / 3 / 4000) ** 0.5)
  np.testing.assert_allclose(np.asarray(kernel).T @ kernel / 4000, np.eye(3) / 3, atol=0.03)


def test_gradient_with_weight_norm_turns_prototypes_and_keeps_their_length():
  rng = np.random.default_rng(0)
  z, kernel = (rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 7))
  model = Prototypes(7, weight_norm=True)
  gradient = jax.grad(lambda k: jnp.sum(model.apply({"params": {"kernel": k}}, z, True) ** 3))(
    kernel
  )
  assert np.any(gradient)
  np.testing.assert_allclose(np.sum(gradient * kernel, axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_prototypes_and_their_gradient_stay_finite(scale):
  z = np.float32(scale) * np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
  model = Prototypes(7, weight_norm=True)

  def total(kernel, z):
    return jnp.sum(model.apply({"params": {"kernel": kernel}}, z, True) ** 2)

  for kernel in (np.ones((7, 4), np.float32), np.zeros((7, 4), np.float32)):
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(kernel, z)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_crops_of_two_sizes_meet_in_the_heads_batchnorm_alone():
  """As facebookresearch/swav's forward: the backbone size by size, forward_head once."""

  class Encoder(nn.Module):
    @nn.compact
    def __call__(self, images, train):
      h_ND = nn.Dense(6)(jnp.mean(images, axis=(1, 2)))
      return Features(nn.BatchNorm(not train)(h_ND), {})

  rng = np.random.default_rng(0)
  groups = [rng.normal(size=(4, v, s, s, 3)).astype(np.float32) for v, s in ((2, 3), (3, 2))]
  model = JointEmbedding(Encoder(), MLP(5, 4, final_norm=False), Prototypes(3))
  variables = model.init(jax.random.key(0), groups[0][:, 0], True)
  options = {"mutable": ["batch_stats"]}
  (h, z, s), _ = model.apply(variables, groups, True, method="crops", **options)
  assert (h.shape, z.shape, s.shape) == ((4, 5, 6), (4, 5, 4), (4, 5, 3))
  own = {k: v["encoder"] for k, v in variables.items()}
  start = 0
  for x in groups:
    flat = x.reshape(-1, *x.shape[2:])
    alone, _ = Encoder().apply(own, flat, True, **options)
    stop = start + x.shape[1]
    np.testing.assert_allclose(h[:, start:stop].reshape(-1, 6), alone.pooled, rtol=1e-5, atol=1e-6)
    start = stop
  own = {k: v["projector"] for k, v in variables.items() if "projector" in v}
  projector = MLP(5, 4, final_norm=False)
  together, _ = projector.apply(own, h.reshape(-1, 6), True, **options)
  np.testing.assert_allclose(z.reshape(-1, 4), together, rtol=1e-5, atol=1e-6)
  apart, _ = projector.apply(own, h[:, :2].reshape(-1, 6), True, **options)
  assert np.max(np.abs(z[:, :2].reshape(-1, 4) - apart)) > 1e-2


def test_joint_embedding_projects_what_a_target_needs_and_predicts_from_it():
  class Encoder(nn.Module):
    @nn.compact
    def __call__(self, images, train):
      return Features(nn.Dense(6)(images.reshape(images.shape[0], -1)), {})

  images = np.random.default_rng(0).normal(size=(8, 2, 2, 3)).astype(np.float32)
  head = {"norm": False, "final_norm": False}
  model = JointEmbedding(Encoder(), MLP(5, 4, **head), MLP(5, 4, **head))
  variables = model.init(jax.random.key(0), images, True)
  assert set(variables["params"]) == {"encoder", "projector", "predictor"}
  h, z, q = model.apply(variables, images, True)
  assert (h.shape, z.shape, q.shape) == ((8, 6), (8, 4), (8, 4))
  params = {k: v for k, v in variables["params"].items() if k != "predictor"}
  target = model.apply({"params": params}, images, True, method="project")
  np.testing.assert_array_equal(target[0], h)
  np.testing.assert_array_equal(target[1], z)
  plain = JointEmbedding(Encoder(), MLP(5, 4, **head))
  _, z, q = plain.apply({"params": params}, images, True)
  np.testing.assert_array_equal(q, z)
