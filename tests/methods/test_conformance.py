"""What every method must do with its loss, state and encoder."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssrl_jax import parallel
from ssrl_jax.config import view_group
from ssrl_jax.experiment import abstract_state
from ssrl_jax.method import Method
from ssrl_jax.methods import METHODS
from ssrl_jax.state import named_leaves, state_digest
from ssrl_jax.step import abstract_views
from tests.methods.common import (
  BATCH,
  CASES,
  DATA,
  DEFAULT_EFFORT,
  LOCAL,
  SLOW,
  TAU,
  assert_close,
  assert_equal,
  make_experiment,
  make_state,
  make_views,
  random_state,
)
from tests.numeric import lapack_shapes


def placed(inputs, *, num_devices):
  """The arguments of `method.loss` on this many devices, the views cut along the batch."""
  mesh = parallel.make_mesh(num_devices)
  whole, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
  return jax.device_put(inputs, (whole, whole, cut, whole, whole))


def loss_and_gradients(method, inputs, **options):
  """Compiled for the devices of `inputs`; the gradients are those of the first two of them."""
  gradients = jax.value_and_grad(method.loss, argnums=(0, 1), has_aux=True, allow_int=True)
  whole = inputs[-1].sharding  # of the step
  return jax.jit(gradients, out_shardings=whole, **options)


class Case(NamedTuple):
  name: str  # of the method
  tau: float  # of its config, if it has one
  method: Method
  after_update: Callable  # the method's, compiled
  inputs: tuple  # of method.loss, on one device
  output: tuple  # on one device
  again: tuple  # the same once more
  losses: list[float]  # of steps on this one batch
  trained: tuple  # params, method_state after them


@pytest.fixture(
  scope="module",
  params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def case(request) -> Case:
  name, overrides = CASES[request.param]
  experiment = make_experiment(name, overrides)
  method, state = experiment.method, make_state(experiment)
  # Everything on its device for good: what changes its place is traced and compiled again.
  inputs = (state.params, state.method_state, make_views(experiment), jax.random.key(7), state.step)
  inputs = params, method_state, views, key, step = placed(inputs, num_devices=1)
  compiled = loss_and_gradients(method, inputs)
  output = compiled(*inputs)

  optimizer = optax.adam(3e-3)

  @jax.jit
  def update(params, method_state, gradients, opt_state, step):
    updates, opt_state = optimizer.update(gradients, opt_state)
    params = optax.apply_updates(params, updates)
    return *method.after_update(params, method_state, step), opt_state

  opt_state, losses = jax.device_put(optimizer.init(params), step.sharding), []
  for i in range(15):
    step = jax.device_put(np.int32(i), step.sharding)
    (loss, aux), (gradients, _) = compiled(params, method_state, views, key, step)
    losses.append(float(loss))
    new_state = aux.method_state | {k: v for k, v in method_state.items() if k in DATA}
    params, method_state, opt_state = update(params, new_state, gradients, opt_state, step)
  tau = experiment.config.method.get("tau", 0.99)  # of hybrid's byol
  again, trained = compiled(*inputs), (params, method_state)
  after_update = jax.jit(method.after_update)
  return Case(name, tau, method, after_update, inputs, output, again, losses, trained)


def assert_same_output(got, expected):
  """Loss, what it returns beside, and gradients, all to 1e-4.

  A small array's gradient is a sum of large terms that cancel: 4e-6 of the whole gradient may be
  missing (nnclr on an Intel Xeon: 1.6e-6).
  """
  (loss, aux), (gradients, _) = got
  (expected_loss, expected_aux), (expected_gradients, _) = expected
  norm = np.sqrt(
    sum(np.sum(np.square(x)) for _, x in named_leaves(jax.device_get(expected_gradients)))
  )
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
  assert_close(gradients, expected_gradients, scale=4 * norm)
  assert_close(aux, expected_aux, scale=1.0)


RANDOM_DEPTH = {
  "encoder.name": "vit_pico",
  "encoder.vit.patch": 4,
  "encoder.vit.drop_path": 0.1,
  "encoder.fusion.enabled": False,
}


@pytest.mark.parametrize("name", METHODS)
def test_encoder_may_need_randomness(name):
  experiment = make_experiment(name, RANDOM_DEPTH)
  state = abstract_state(experiment)
  arguments = state.params, state.method_state, abstract_views(experiment), state.key, state.step
  assert jax.eval_shape(experiment.method.loss, *arguments)[0].shape == ()


DISTILLED = ("dino", "ibot", "dinov2", "msn", "ijepa")  # judged is the target
CONTRASTED = ("moco_v2", "moco_v3", "ressl", "densecl", "finegrained")
TARGETS = ("byol", "tico", *CONTRASTED, *DISTILLED)


@pytest.mark.parametrize("name", TARGETS)
def test_target_s_blocks_are_not_dropped(name):
  """As of the teachers of DINO and iBOT, which are built without drop path."""
  experiment = make_experiment(name, RANDOM_DEPTH | {"encoder.vit.drop_path": 0.5})
  state, views = random_state(experiment), make_views(experiment)

  @jax.jit
  def outputs(key):
    loss, aux = experiment.method.loss(state.params, state.method_state, views, key, state.step)
    return loss, aux.targets

  (one, target), (other, again) = (outputs(jax.random.key(seed)) for seed in (0, 1))
  assert one != other
  np.testing.assert_array_equal(target, again)


@pytest.mark.parametrize("name", METHODS)
def test_papers_that_judge_the_target_are_followed_and_the_others_judge_what_was_trained(name):
  experiment = make_experiment(name, {})
  state = abstract_state(experiment)
  judged = experiment.method.encoder.weights(state.params, state.method_state)
  trained = {"params": state.params, "batch_stats": state.method_state["batch_stats"]}
  source = state.method_state["target"] if name in DISTILLED else trained
  assert judged["params"] is source["params"]["encoder"]
  assert judged["batch_stats"] == source["batch_stats"].get("encoder", {})


def test_output_has_the_shapes_of_the_contract(case):
  params, method_state, _, _, step = case.inputs
  (loss, aux), _ = case.output
  assert loss.shape == ()
  assert {v.shape for v in aux.metrics.values()} <= {()}
  assert aux.features.shape[0] == aux.embeddings.shape[0] == BATCH
  assert aux.targets is None or aux.targets.shape == aux.embeddings.shape
  # Nothing changes its shape or type in a step: the state can be donated and the step repeated.
  after = case.after_update(params, aux.method_state, step)
  plain = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert plain(after) == plain((params, method_state))


def test_loss_falls_on_a_fixed_batch(case):
  assert np.all(np.isfinite(case.losses))
  assert np.mean(case.losses[-3:]) < case.losses[0] - 0.05 * abs(case.losses[0])


def test_one_device_and_eight_agree_on_loss_gradients_and_state(case):
  inputs = placed(case.inputs, num_devices=8)
  program = loss_and_gradients(case.method, inputs).lower(*inputs).compile()
  assert_same_output(program(*inputs), case.output)
  assert all(len(shape) <= 2 for shape in lapack_shapes(program.as_text())), "losses/factor.py"


# Negatives, a decomposition, Sinkhorn; the next test has the encoders.
NOT_COMPILED = ("simclr", "w_mse", "swav")


@pytest.mark.slow
@pytest.mark.parametrize("case", NOT_COMPILED, indirect=True)
def test_compiled_and_plain_loss_agree(case):
  with jax.disable_jit():
    plain = case.method.loss(*case.inputs)
  assert_close(plain, case.output[0], scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fusion", "ijepa"])
def test_as_users_compile_it_the_loss_is_what_it_is_here(name):
  """conftest.py turns the compiler's effort down; here a ResNet's and a ViT's have it in full."""
  experiment = make_experiment(*CASES[name])
  state, views = random_state(experiment), make_views(experiment)
  inputs = state.params, state.method_state, views, jax.random.key(7), state.step
  inputs = placed(inputs, num_devices=8)
  by_default = loss_and_gradients(experiment.method, inputs, compiler_options=DEFAULT_EFFORT)
  quick = loss_and_gradients(experiment.method, inputs)
  assert_same_output(by_default(*inputs), quick(*inputs))


def test_every_parameter_of_the_encoder_gets_a_gradient(case):
  _, (gradients, _) = case.output
  assert not [name for name, g in named_leaves(gradients) if not np.any(np.asarray(g))]


def test_no_gradient_reaches_what_is_not_trained(case):
  _, (_, gradients) = case.output
  for name, gradient in named_leaves(gradients):
    if gradient.dtype != jax.dtypes.float0 and not name.startswith(DATA):
      assert not np.any(np.asarray(gradient)), name


def target_params(method_state):
  return [(n, x) for n, x in named_leaves(method_state) if "target/params/" in n]


def online_name(name):
  """Where the parameter that a target's follows is; a term of hybrid has its own heads."""
  term, _, rest = name.partition("target/params/")
  return rest if rest.startswith("encoder/") else term + rest


def test_target_moves_by_its_average_and_by_nothing_else(case):
  """tau = 1 - (1 - base) (cos(pi k / K) + 1) / 2 of BYOL, K = 20 steps, or as in TAU."""
  _, method_state, *_ = case.inputs
  aux = case.output[0][1]
  before, after_loss = target_params(method_state), target_params(aux.method_state)
  assert_equal(dict(after_loss), dict(before))
  params, _ = case.trained  # another network than the target
  for step in (0, 7, 20):
    _, after = case.after_update(params, method_state, jnp.int32(step))
    moved = target_params(after)
    base = case.tau
    cosine = 1 - (1 - base) * (np.cos(np.pi * step / 20) + 1) / 2
    tau = TAU[case.name](step / 20, base) if case.name in TAU else cosine
    online = dict(named_leaves(params))
    for (name, new), (_, old) in zip(moved, before, strict=True):
      online_64 = np.asarray(online[online_name(name)], np.float64)
      expected = tau * np.asarray(old, np.float64) + (1 - tau) * online_64
      np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_target_s_batch_statistics_follow_what_it_sees(case):
  before, after = (dict(named_leaves(s)) for s in (case.inputs[1], case.output[0][1].method_state))
  running = [name for name in before if "target/batch_stats/" in name]
  assert not [name for name in running if np.array_equal(after[name], before[name])]


def test_update_leaves_the_rest_of_the_state_alone(case):
  params, method_state = case.trained
  new_params, after = case.after_update(params, method_state, jnp.int32(3))
  if case.name != "swav":  # whose prototypes are brought to unit length
    assert_equal(new_params, params)
  moving = dict(target_params(method_state)).keys()
  rest = [(n, x) for n, x in named_leaves(method_state) if n not in moving]
  assert_equal({n: x for n, x in named_leaves(after) if n not in moving}, dict(rest))


def test_encode_is_pure_and_sees_each_image_alone(case):
  params, method_state = case.trained
  before = state_digest((params, method_state))
  images = case.inputs[2]["global"][:, 0]
  encode = jax.jit(case.method.encode)
  features = encode(params, method_state, images)
  assert_equal(encode(params, method_state, images), features)
  assert state_digest((params, method_state)) == before
  assert features.pooled.dtype == jnp.float32
  for i in (0, 5):
    among_others = encode(params, method_state, images[::-1].at[i].set(images[i]))
    for (name, x), (_, y) in zip(named_leaves(among_others), named_leaves(features), strict=True):
      np.testing.assert_allclose(x[i], y[i], rtol=1e-4, atol=1e-5, err_msg=name)


def test_loss_is_a_function_of_its_arguments(case):
  assert_equal(case.again[0], case.output[0])


@pytest.mark.parametrize("name", METHODS)
def test_views_that_a_method_cannot_use_are_refused(name):
  takes_one = ("ressl", "mae", "simmim", "ijepa", "jigsaw", "supervised")
  few = [] if name in takes_one else [{"global_views.count": 1}]
  for overrides in (
    *few,
    {"global_views": view_group(count=0)},
    {"global_views": view_group(count=0), **LOCAL},
  ):
    who = "simclr" if name == "hybrid" else name
    with pytest.raises(ValueError, match=rf"{who}.* global views"):
      make_experiment(name, overrides)


@pytest.mark.parametrize(
  ("name", "option", "value", "known"),
  [("fusion", "constraint", "coding_rates", "sigreg"), ("fusion", "target", "moment", "momentum")],
)
def test_unknown_option_is_refused_with_the_known_ones(name, option, value, known):
  with pytest.raises(ValueError, match=rf"{value}.*{known}"):
    make_experiment(name, {f"method.{option}": value})


def test_simclr_takes_no_local_views():
  with pytest.raises(ValueError, match=r"simclr takes 2 global views and no others.*2 local"):
    make_experiment("simclr", LOCAL)
