"""The one generic train step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssrl_jax import parallel
from ssrl_jax.data import resident
from ssrl_jax.experiment import Experiment, abstract_batch, abstract_state, plain_method
from ssrl_jax.flops import count_flops
from ssrl_jax.guard import SPIKE, judge, unless
from ssrl_jax.method import NEVER, Array, Method, Params
from ssrl_jax.metrics import first_non_finite, global_norm, health
from ssrl_jax.optim import under_paths
from ssrl_jax.probe import update_probe
from ssrl_jax.state import TrainState, named_leaves
from ssrl_jax.views import abstract_views as views_shapes
from ssrl_jax.views import make_views, strength_at

Batch = dict[str, Array]


class Watched(NamedTuple):
  """What is examined for non-finite values, in the order in which it arises."""

  views: dict[str, Array]
  features: Array
  embeddings: Array
  loss: dict[str, Array]
  gradient: Params
  update: Params


def step_keys(key: Array, step: Array) -> tuple[Array, Array]:
  """The keys of a step's views and of its loss: a pure function of the run's key and the step."""
  key = jax.random.fold_in(key, step)
  return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def views_strength(experiment: Experiment, step: Array) -> float | Array:
  """How strong the views of the update after `step` are, in [0, 1]; 1.0 where the ramp is off."""
  return strength_at(
    step, **experiment.config.views_ramp, steps_per_epoch=experiment.steps_per_epoch
  )


def loss_views(experiment: Experiment, key: Array, batch: Batch, step: Array) -> dict[str, Array]:
  """What `Method.loss` is given of a batch: its views, where they lie, and the labels."""
  strength = views_strength(experiment, step)
  views = make_views(key, batch, experiment.method.views, strength)
  return views | {"label": batch["label"]}


def never_trained(method: Method, params: Params) -> Params:
  """Like `params`: whether an array is one that `Method.frozen` keeps for ever."""
  paths = [path for path, steps in method.frozen.items() if steps == NEVER]
  return under_paths(params, dict.fromkeys(paths, True), False)


def trained_loss(method: Method) -> Callable:
  """`method.loss` without gradients of what is never trained: none is computed, sent or clipped."""

  def loss(params, *inputs):
    stop = lambda p, never: jax.lax.stop_gradient(p) if never else p  # noqa: E731
    return method.loss(jax.tree.map(stop, params, never_trained(method, params)), *inputs)

  return loss


def make_train_step(experiment: Experiment) -> Callable[[TrainState, Batch], tuple]:
  """step(state, batch) -> state, metrics (scalars), `Watched`."""
  method, optimizer = experiment.method, experiment.optimizer
  probe_options = experiment.config.probe.to_dict()
  mesh, min_size = experiment.mesh, experiment.config.mesh.min_size

  def train_step(state, batch):
    view_key, loss_key = step_keys(state.key, state.step)
    views = loss_views(experiment, view_key, batch, state.step)
    whole = parallel.gathered((state.params, state.method_state), mesh)
    (loss, aux), grads = jax.value_and_grad(trained_loss(method), has_aux=True)(
      *whole, views, loss_key, state.step
    )
    grads, method_state = parallel.cut((grads, aux.method_state), mesh, min_size=min_size)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, method_state = method.after_update(params, method_state, state.step)
    probe, probe_metrics = state.probe, {}
    if probe:
      probe, probe_metrics = update_probe(probe, aux.features, batch["label"], **probe_options)
    metrics = {
      "loss": loss,
      **{f"loss/{name}": value for name, value in aux.metrics.items()},
      **probe_metrics,
      **health(aux.embeddings, aux.targets, unit_variance=method.unit_variance),
      "health/grad_norm": global_norm(grads),
      "health/update_norm": global_norm(updates),
      "learning_rate": jnp.asarray(experiment.schedule(state.step), jnp.float32),
    }
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      method_state=method_state,
      opt_state=opt_state,
      probe=probe,
      substituted=state.substituted + jnp.sum(batch["substituted"]),
      key=state.key,
      guard=state.guard,
    )
    metrics["data/substituted"] = new_state.substituted
    strength = views_strength(experiment, state.step)
    if not isinstance(strength, float):  # the ramp is on
      metrics["data/views_strength"] = strength
    watched = Watched(
      views={spec.name: views[spec.name] for spec in method.views},
      features=aux.features,
      embeddings=aux.embeddings,
      loss={"total": loss, **aux.metrics},
      gradient=grads,
      update=updates,
    )
    return new_state, metrics, watched

  return train_step


def make_watched_step(experiment: Experiment) -> Callable[[TrainState, Batch], tuple]:
  """step(state, batch) -> state, metrics, among them `first_bad`, which watched tensor is bad.

  With guard.on_bad_step = "skip" the state after a bad step is the one before it.
  """
  step, options = make_train_step(experiment), experiment.config.guard

  def watched_step(state, batch):
    new, metrics, watched = step(state, batch)
    bad = first_non_finite(watched)
    if state.guard:
      spike_index = len(jax.tree.leaves(watched))
      bad, guard = judge(state.guard, metrics["loss"], bad, spike=options.spike, name=spike_index)
      new = new._replace(guard=guard)
      if options.on_bad_step == "skip":
        new = unless(bad >= 0, new, state)
        updates = state.step - state.guard["skipped"]  # which the optimizer's schedule counts
        metrics["learning_rate"] = jnp.asarray(experiment.schedule(updates), jnp.float32)
        metrics |= {f"guard/{name}": guard[name] for name in ("skipped", "in_a_row")}
    return new, {**metrics, "first_bad": bad}

  return watched_step


def compile_step(
  experiment: Experiment, state: TrainState, *, compiler_options: dict[str, Any] | None = None
) -> Callable:
  """The compiled, donating step: (state, batch) -> state, metrics; `state` may be abstract."""
  step = _donating(make_watched_step(experiment), experiment, state, compiler_options)
  return step.lower(state, abstract_batch(experiment)).compile()


def compile_resident_step(
  experiment: Experiment, state: TrainState, arrays: dict[str, Array]
) -> Callable:
  """As `compile_step`: (state, ids uint32 [B, 2], arrays of `resident.load`) -> state, metrics."""
  watched_step = make_watched_step(experiment)

  def step(state, ids_B2, arrays):
    return watched_step(state, resident.gather(arrays, ids_B2, experiment.mesh))

  ids = abstract_batch(experiment)["id"]
  return _donating(step, experiment, state).lower(state, ids, arrays).compile()


def _donating(
  f: Callable,
  experiment: Experiment,
  state: TrainState,
  compiler_options: dict[str, Any] | None = None,
) -> Any:
  """jit(f), which is given the state to keep and returns the next one, sharded alike."""
  shardings = jax.tree.map(lambda x: x.sharding, state)
  replicated = parallel.replicated(experiment.mesh)
  return jax.jit(
    f,
    donate_argnums=0,
    out_shardings=(shardings, replicated),
    compiler_options=compiler_options,
  )


@functools.lru_cache(maxsize=4)
def watched_tensors(experiment: Experiment) -> tuple[list[str], int]:
  """The names of what `first_bad` indexes; dimensions of what the health figures are of."""
  step = make_train_step(experiment)
  *_, watched = jax.eval_shape(step, abstract_state(experiment), abstract_batch(experiment))
  names = [name for name, _ in named_leaves(watched)]
  return [*names, SPIKE], watched.embeddings.shape[-1]


def flops_per_step(experiment: Experiment) -> float:
  """Model FLOPs of one step's loss and gradients over the global batch; see ssrl_jax/flops.py."""
  loss = trained_loss(plain_method(experiment))
  state, gradient = abstract_state(experiment), jax.grad(loss, has_aux=True)
  views = abstract_views(experiment)
  return count_flops(gradient, state.params, state.method_state, views, state.key, state.step)


def abstract_views(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of what `loss_views` returns for a global batch."""
  b = experiment.config.batch_size
  shapes = views_shapes(experiment.method.views, b)
  return shapes | {"label": jax.ShapeDtypeStruct((b,), jnp.int32)}


def num_parameters(params: Any) -> int:
  return sum(p.size for p in jax.tree.leaves(params))
