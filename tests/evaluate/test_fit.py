import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssrl_jax import parallel
from ssrl_jax.evaluate.fit import fit

X = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
TRUE = np.array([1.0, -2.0, 0.5], np.float32)


def batches():
  for number in range(1000):
    rows = (np.arange(8) + 8 * number) % 64
    yield {"x": X[rows], "y": X[rows] @ TRUE, "id": rows.astype(np.int64)}


def loss(params, stats, batch, key):
  error = batch["x"] @ params["w"] - batch["y"]
  return jnp.mean(error**2), stats + 1


def run(num_devices=1, rate=0.1, num_steps=200):
  return fit(
    loss, {"w": jnp.zeros(3)}, jnp.zeros(()), batches(), optimizer=optax.sgd(rate),
    num_steps=num_steps, seed=0, mesh=parallel.make_mesh(num_devices), name="line",
  )  # fmt: skip


def test_fit_finds_the_least_squares_solution_and_counts_its_steps():
  params, stats = run()
  np.testing.assert_allclose(params["w"], TRUE, atol=1e-4)
  assert stats == 200


def test_fit_is_the_same_on_8_devices():
  np.testing.assert_allclose(run(8, num_steps=3)[0]["w"], run(1, num_steps=3)[0]["w"], rtol=1e-6)


def test_fit_names_the_protocol_that_diverges():
  with pytest.raises(FloatingPointError, match=r"line: the loss is .* lower its learning rate"):
    run(rate=100.0)


def test_fit_leaves_its_arguments_alive():
  params = {"w": jax.device_put(jnp.zeros(3), parallel.replicated(parallel.make_mesh(1)))}
  fit(
    loss, params, jnp.zeros(()), batches(), optimizer=optax.sgd(0.1), num_steps=2, seed=0,
    mesh=parallel.make_mesh(1), name="line",
  )  # fmt: skip
  np.testing.assert_array_equal(params["w"], np.zeros(3))
