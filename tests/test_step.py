"""What the one train step hands on: its keys, the step, the strength of its views."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.experiment import init_state
from ssrl_jax.method import Aux
from ssrl_jax.step import loss_views, make_train_step, step_keys
from ssrl_jax.views import make_views
from tests.methods.common import BATCH, make_experiment

PLAIN = {f"global_views.{name}": 0.0 for name in ("flip", "jitter", "greyscale")}


def make_batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
    "extent": np.full((BATCH, 2), 16, np.int32),
    "label": np.zeros(BATCH, np.int32),
    "id": np.stack([np.arange(BATCH), np.zeros(BATCH)], axis=1).astype(np.uint32),
    "substituted": np.zeros(BATCH, np.bool_),
  }


@pytest.fixture(scope="module")
def stepped():
  """Two whole steps, from step 3 on, of a method that writes down which step it is told."""
  experiment = make_experiment("simclr", PLAIN)

  def init(key, views):
    del key, views
    none = jnp.zeros((), jnp.int32)
    return {"encoder": {"w": jnp.ones(2)}}, {"batch_stats": {}, "loss": none, "update": none}

  def loss(params, method_state, views, key, step):
    h_BD = views["global"][:, 0, 0, :, 0]
    draw = jax.random.uniform(key)
    state = method_state | {"loss": step}
    return jnp.sum(params["encoder"]["w"] ** 2), Aux(state, {"draw": draw}, h_BD, h_BD)

  def after_update(params, method_state, step):
    return params, method_state | {"update": step}

  method = experiment.method._replace(init=init, loss=loss, after_update=after_update)
  experiment = replace(experiment, method=method, num_classes=None)
  step = jax.jit(make_train_step(experiment))
  state = init_state(experiment, jax.random.key(0))._replace(step=jnp.int32(3))
  state = jax.device_put(state, jax.devices()[0])
  first = step(state, make_batch())
  return first, step(first[0], make_batch())


def test_every_image_has_other_views_and_the_loss_another_key_in_the_next_step(stepped):
  (_, one, watched), (_, two, watched_after) = stepped
  view_BVHWC, after_BVHWC = (np.asarray(w.views["global"]) for w in (watched, watched_after))
  assert np.all(np.any(view_BVHWC != after_BVHWC, axis=(2, 3, 4)))
  assert one["loss/draw"] != two["loss/draw"]


def test_the_two_keys_of_a_step_differ_and_so_do_those_of_two_steps():
  key = jax.random.key(0)
  keys = [k for step in range(3) for k in step_keys(key, jnp.int32(step))]
  assert len({jax.random.key_data(k).tobytes() for k in keys}) == 6


def test_loss_and_update_are_told_which_step_it_is(stepped):
  for number, (state, _, _) in zip((3, 4), stepped):
    assert int(state.method_state["loss"]) == int(state.method_state["update"]) == number
    assert int(state.step) == number + 1


def test_views_are_as_strong_as_the_ramp_says():
  """An epoch has 16 steps: at step 8 half of the way from 0.2 to 1."""
  ramp = {"views_ramp.start": 0.2, "views_ramp.epochs": 1.0, "global_views.area": (0.1, 1.0)}
  experiment = make_experiment("simclr", PLAIN | ramp)
  key, batch = jax.random.key(0), make_batch()

  @jax.jit
  def boxes(step):
    given = loss_views(experiment, key, batch, step)
    asked = make_views(key, batch, experiment.method.views, 0.2 + 0.8 * step / 16)
    return given["global_box"], asked["global_box"]

  for step in (0, 8):
    given, asked = boxes(jnp.int32(step))
    np.testing.assert_allclose(given, asked, atol=1e-6)


def test_a_learning_rate_that_a_method_keeps_constant_is_constant_in_the_run():
  """SimSiam's predictor; the rest has nearly none in the last step."""
  optim = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0}
  experiment = make_experiment("simsiam", {f"optim.{k}": v for k, v in optim.items()})
  params = {"encoder": jnp.ones(2), "projector": jnp.ones(2), "predictor": jnp.ones(2)}
  state, update = experiment.optimizer.init(params), jax.jit(experiment.optimizer.update)
  for _ in range(experiment.total_steps):
    updates, state = update(params, state, params)
  peak, last = experiment.schedule(0), experiment.schedule(experiment.total_steps - 1)
  assert last < 0.1 * peak
  for name, rate in (("encoder", last), ("projector", last), ("predictor", peak)):
    np.testing.assert_allclose(updates[name], [-rate, -rate], rtol=1e-5, err_msg=name)
