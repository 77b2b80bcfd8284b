"""The one generic train step, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssrl_jax import parallel, processes
from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.data import resident
from ssrl_jax.data.batches import Batches
from ssrl_jax.data.damaged import DamagedList
from ssrl_jax.data.pipeline import PADDING, train_batches
from ssrl_jax.data.sampling import position
from ssrl_jax.data.sources import Source
from ssrl_jax.early_stop import EarlyStop
from ssrl_jax.experiment import (
  Experiment,
  abstract_batch,
  abstract_state,
  create_state,
  plain_method,
  training_sampling,
)
from ssrl_jax.flops import count_flops, peak_flops
from ssrl_jax.guard import SPIKE, Guard, judge, unless
from ssrl_jax.method import Array
from ssrl_jax.metrics import Writer, first_non_finite, global_norm, health, read_metrics
from ssrl_jax.pixels import denormalise
from ssrl_jax.probe import update_probe
from ssrl_jax.state import TrainState, named_leaves
from ssrl_jax.views import abstract_views as views_shapes
from ssrl_jax.views import make_views, strength_at
from ssrl_jax.watch import Stopwatch, progress_line

Batch = dict[str, Array]


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


def make_train_step(experiment: Experiment) -> Callable[[TrainState, Batch], tuple]:
  """step(state, batch) -> state, metrics, watched.

  `metrics` are scalars; `watched` is every tensor that is examined for non-finite values, in the
  order in which they arise.
  """
  method, optimizer = experiment.method, experiment.optimizer
  probe_options = experiment.config.probe.to_dict()
  mesh, min_size = experiment.mesh, experiment.config.mesh.min_size

  def train_step(state, batch):
    view_key, loss_key = step_keys(state.key, state.step)
    views = loss_views(experiment, view_key, batch, state.step)
    whole = parallel.gathered((state.params, state.method_state), mesh)
    (loss, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(
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
    watched = {
      "1_views": {spec.name: views[spec.name] for spec in method.views},
      "2_features": aux.features,
      "3_embeddings": aux.embeddings,
      "4_loss": {"total": loss, **aux.metrics},
      "5_gradient": grads,
      "6_update": updates,
    }
    return new_state, metrics, watched

  return train_step


def compile_step(
  experiment: Experiment, state: TrainState, *, compiler_options: dict[str, Any] | None = None
) -> Callable:
  """The compiled, donating step: (state, batch) -> state, metrics; `state` may be abstract."""
  step = _donating(make_watched_step(experiment), experiment, state, compiler_options)
  return step.lower(state, abstract_batch(experiment)).compile()


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
        metrics |= {f"guard/{name}": guard[name] for name in ("skipped", "in_a_row")}
    return new, {**metrics, "first_bad": bad}

  return watched_step


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


class Steps(NamedTuple):
  """How a run makes its steps: from batches of the host, or from pictures on the devices."""

  run: Callable  # (state, host batch) -> state, metrics
  seen: Callable  # host batch -> the whole batch that the step was given, on the host
  batches: Batches
  most: int  # steps that are given to the devices before any metrics are waited for


def make_steps(experiment: Experiment, source: Source, *, start_step: int) -> Steps:
  """Compiles, and with `data.cache` loads the pictures."""
  data, mesh, state = experiment.config.data, experiment.mesh, abstract_state(experiment)
  if not data.cache:
    step = compile_step(experiment, state)
    batches = training_batches(experiment, source, start_step=start_step)
    run = lambda state, batch: step(state, parallel.to_device(batch, mesh))  # noqa: E731
    return Steps(run, lambda batch: batch, batches, 1)

  arrays, substituted = resident.load(
    source,
    canvas=data.canvas,
    mesh=mesh,
    limit_mib=data.cache_mib,
    workers=data.workers,
    threads=data.threads,
  )
  step = compile_resident_step(experiment, state, arrays)

  def run(state, batch):
    return step(state, parallel.to_device({"id": batch["id"]}, mesh)["id"], arrays)

  def seen(batch):
    if jax.process_count() > 1:  # their arrays are not here
      return batch
    at_B = position(batch["id"])
    return {k: np.stack([np.asarray(v[i]) for i in at_B]) for k, v in arrays.items()} | batch

  batches = training_batches(experiment, source, start_step=start_step, resident=substituted)
  return Steps(run, seen, batches, data.steps_ahead)


def steps_to_edge(step: int, total: int, most: int, *every: int) -> int:
  """How many steps to give to the devices after `step`: up to the next line or checkpoint."""
  return min(most, total - step, *(n - step % n for n in every))


def compile_resident_step(
  experiment: Experiment, state: TrainState, arrays: dict[str, Array]
) -> Callable:
  """As `compile_step`: (state, ids uint32 [B, 2], arrays of `resident.load`) -> state, metrics."""
  watched_step = make_watched_step(experiment)

  def step(state, ids_B2, arrays):
    return watched_step(state, resident.gather(arrays, ids_B2, experiment.mesh))

  ids = abstract_batch(experiment)["id"]
  return _donating(step, experiment, state).lower(state, ids, arrays).compile()


def watched_tensors(experiment: Experiment) -> tuple[list[str], int]:
  """The names of what `first_bad` indexes; dimensions of what the health figures are of."""
  step = make_train_step(experiment)
  *_, watched = jax.eval_shape(step, abstract_state(experiment), abstract_batch(experiment))
  names = [name.split("_", 1)[1] for name, _ in named_leaves(watched)]
  return [*names, SPIKE], watched["3_embeddings"].shape[-1]


def flops_per_step(experiment: Experiment) -> float:
  """Model FLOPs of one step's loss and gradients over the global batch; see ssrl_jax/flops.py."""
  loss = plain_method(experiment).loss
  state, gradient = abstract_state(experiment), jax.grad(loss, has_aux=True)
  views = abstract_views(experiment)
  return count_flops(gradient, state.params, state.method_state, views, state.key, state.step)


def abstract_views(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of what `loss_views` returns for a global batch."""
  b = experiment.config.batch_size
  shapes = views_shapes(experiment.method.views, b)
  return shapes | {"label": jax.ShapeDtypeStruct((b,), jnp.int32)}


def train(
  experiment: Experiment,
  source: Source,
  workdir: Path,
  *,
  say: Callable[[str], None],
  moved: Callable[[], None] = lambda: None,
  evaluate: Callable[[TrainState, Callable[[], None]], dict[str, float]] | None = None,
) -> tuple[TrainState, bool]:
  """Trains from the newest checkpoint of `workdir` (or from nothing) to the last step.

  Args:
    moved: is called when a step was finished.
    evaluate: of suite.evaluate_during; None: nothing is evaluated meanwhile.

  Returns:
    The final state, and whether the run is over: the last step, or early stopping (False: SIGTERM
    or Ctrl-C, with a checkpoint of the step it had come to).
  """
  config, total = experiment.config, experiment.total_steps
  save_every = config.checkpoint.every_steps
  checkpoints = Checkpoints(workdir, **{k: v for k, v in config.checkpoint.items()
                                        if k != "every_steps"})  # fmt: skip
  abstract = abstract_state(experiment)
  state = checkpoints.restore(abstract)
  say(f"resuming at step {int(state.step)}" if state else "starting at step 0")
  state = state or create_state(experiment)
  first = int(state.step)
  during = config.evaluate.during
  evaluate_every = during.every_steps if evaluate else total
  known = [r for r in read_metrics(workdir) if r["step"] <= first]
  # A checkpoint comes before the evaluation of its step.
  missing = parallel.all_processes(
    np.array([all("loss" in r for r in known if r["step"] == first)])
  )
  evaluated = () if first and missing[0] else (first,)
  early_stop = EarlyStop(during.figure, during.patience if evaluate else 0, known)
  reason = early_stop.reason()
  if first >= total or reason:
    if reason:
      say(f"stopped early: {reason}")
    checkpoints.close()
    return state, True

  start = time.perf_counter()
  steps = make_steps(experiment, source, start_step=first)
  flops = flops_per_step(experiment)
  peak, peak_name = peak_flops(experiment.mesh.devices.flat[0])
  say(
    f"compiled in {time.perf_counter() - start:.1f} s; {flops / 1e9:,.1f} GFLOP a step (1 MAC = 2 "
    f"FLOP, matrix products and convolutions only), peak {peak / 1e12:.3g} TFLOP/s a device "
    f"({peak_name})"
  )
  writes = jax.process_index() == 0
  writer = Writer(workdir, step=first, tensorboard=config.log.tensorboard, writes=writes)
  guard = Guard(
    config.guard,
    workdir,
    total_steps=total,
    watched=watched_tensors(experiment),
    writes=writes,
  )
  watch = Stopwatch(
    step=first, batch_size=config.batch_size, flops=flops, peak=peak * experiment.mesh.size
  )
  damaged = damaged_list(experiment, source, workdir, state)
  latest: dict[str, float] = {}

  def settle(pending) -> None:
    """Fetches the metrics of some steps, which waits for them; checks and logs them."""
    for step, metrics, batch in pending:
      figures = {k: v.item() for k, v in jax.device_get(metrics).items()}
      moved()
      good = guard.check(step, figures, lambda batch=batch: steps.seen(batch))
      del figures["first_bad"]
      unread_B = np.where(batch["substituted"], position(batch["id"]), PADDING)
      damaged.settle(step, figures["data/substituted"], unread_B, steps.batches.damage)
      latest.update(figures if good else {})
      if step % config.log.every_steps == 0 or step == total:
        figures |= watch.read(step)
        writer.write(step, figures)
        guard.check_collapse(step, figures)
        say(progress_line(step, total, figures, config.batch_size))

  def judge_state(state, step) -> str | None:
    """Evaluates and logs it; why the run ends here, if it does."""
    start = time.perf_counter()
    figures = evaluate(state, moved)
    writer.write(step, figures)
    early_stop.add(figures)
    watch.paused(time.perf_counter() - start)
    listed = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
    say(f"evaluated at step {step}: {listed}")
    return early_stop.reason()

  def save(how: Callable) -> None:
    how(state, step=step, score=latest.get("probe/accuracy", 0.0))

  pending, step, stop = [], first, False
  with (
    processes.stop_on_signal() as stopped,
    closing(checkpoints),
    closing(writer),
    closing(steps.batches),
  ):
    while step < total:
      if step % evaluate_every == 0 and step not in evaluated:
        settle(pending)
        save(checkpoints.save)  # nothing is lost if the run is stopped meanwhile
        pending, reason = [], judge_state(state, step)
        if reason:
          say(f"stopped early: {reason}")
          save(checkpoints.finish)
          break
      before, pending = pending, []
      for _ in range(steps_to_edge(step, total, steps.most, config.log.every_steps, save_every,
                                   evaluate_every)):  # fmt: skip
        start = time.perf_counter()
        batch = next(steps.batches)
        watch.waited(time.perf_counter() - start)
        state, metrics = steps.run(state, batch)
        step += 1
        pending.append((step, metrics, batch))
        if stop := stopped(step):
          break
      settle(before)  # while those given just now run
      last = step == total or stop
      if step % save_every == 0 or last or checkpoints.due():
        settle(pending)
        pending = []
        save(checkpoints.finish if last else checkpoints.save)
      if stop:
        break
  return state, step == total or bool(reason)


def views_fed(
  experiment: Experiment, key: Array, source: Source, *, num_images: int = 8
) -> dict[str, np.ndarray]:
  """What the run's first images were fed in its first step: {name: uint8 [n, V, h, w, 3]}."""
  config, specs = experiment.config, experiment.method.views
  batches = training_batches(experiment, source, start_step=0)
  batch = parallel.to_device(next(batches), experiment.mesh)
  batches.close()
  step = jnp.zeros((), jnp.int32)
  view_key, _ = step_keys(key, step)

  def first_views(key, batch):
    views = loss_views(experiment, key, batch, step)
    first = {spec.name: views[spec.name][:num_images] for spec in specs}
    return {n: denormalise(v, config.data.mean, config.data.std) for n, v in first.items()}

  whole = parallel.replicated(experiment.mesh)  # on every host
  return jax.device_get(jax.jit(first_views, out_shardings=whole)(view_key, batch))


def training_batches(
  experiment: Experiment,
  source: Source,
  *,
  start_step: int,
  resident: np.ndarray | None = None,
) -> Batches:
  """This process's share of the batches from the update after `start_step` on."""
  config = experiment.config
  return train_batches(
    source,
    seed=config.seed,
    batch_size=config.batch_size,
    start_step=start_step,
    canvas=config.data.canvas,
    workers=config.data.workers,
    threads=config.data.threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    sampling=training_sampling(config, source),
    frames=config.data.frames,
    frame_span=config.data.frame_span,
    resident=resident,
  )


def damaged_list(
  experiment: Experiment, source: Source, workdir: Path, state: TrainState
) -> DamagedList:
  """What the run could not read so far, and when it is too much."""
  config, sampling = experiment.config, training_sampling(experiment.config, source)
  return DamagedList(
    workdir,
    step=int(state.step),
    batch_size=config.batch_size,
    num_examples=np.count_nonzero(sampling.weights) if sampling else len(source),
    max_fraction=config.data.max_bad_fraction,
    substituted=int(state.substituted),
    gather=parallel.all_processes,
    writes=jax.process_index() == 0,
  )


def num_parameters(params: Any) -> int:
  return sum(p.size for p in jax.tree.leaves(params))
