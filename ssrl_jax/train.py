"""The one generic train step, and the loop around it."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssrl_jax import parallel
from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.data.pipeline import Batches, train_batches
from ssrl_jax.data.sampling import position
from ssrl_jax.data.sources import Source
from ssrl_jax.experiment import (
  Experiment,
  abstract_batch,
  abstract_state,
  create_state,
  training_sampling,
)
from ssrl_jax.flops import count_flops, peak_flops
from ssrl_jax.method import Array
from ssrl_jax.metrics import Writer, collapse, first_non_finite, global_norm, health
from ssrl_jax.pixels import denormalise
from ssrl_jax.probe import update_probe
from ssrl_jax.state import TrainState, named_leaves
from ssrl_jax.views import abstract_views as views_shapes
from ssrl_jax.views import make_views, strength_at

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
  step = make_train_step(experiment)

  def watched_step(state, batch):
    state, metrics, watched = step(state, batch)
    return state, {**metrics, "first_non_finite": first_non_finite(watched)}

  shardings = jax.tree.map(lambda x: x.sharding, state)
  compiled = jax.jit(
    watched_step,
    donate_argnums=0,
    out_shardings=(shardings, parallel.replicated(experiment.mesh)),
    compiler_options=compiler_options,
  )
  return compiled.lower(state, abstract_batch(experiment)).compile()


def watched_names(experiment: Experiment) -> list[str]:
  """The names of what `first_non_finite` indexes."""
  step = make_train_step(experiment)
  *_, watched = jax.eval_shape(step, abstract_state(experiment), abstract_batch(experiment))
  return [name.split("_", 1)[1] for name, _ in named_leaves(watched)]


def flops_per_step(experiment: Experiment) -> float:
  """Model FLOPs of one step's loss and gradients over the global batch; see ssrl_jax/flops.py."""
  state, gradient = abstract_state(experiment), jax.grad(experiment.method.loss, has_aux=True)
  views = abstract_views(experiment)
  return count_flops(gradient, state.params, state.method_state, views, state.key, state.step)


def abstract_views(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of what `loss_views` returns for a global batch."""
  b = experiment.config.batch_size
  shapes = views_shapes(experiment.method.views, b)
  return shapes | {"label": jax.ShapeDtypeStruct((b,), jnp.int32)}


class Stopwatch:
  """Rates since the last reading: images/s, share of time spent waiting for data, MFU."""

  def __init__(self, *, batch_size: int, flops: float, peak: float):
    self._batch_size, self._flops, self._peak = batch_size, flops, peak
    self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

  def waited(self, seconds: float) -> None:
    self._waited += seconds
    self._steps += 1

  def read(self) -> dict[str, float]:
    now = time.perf_counter()
    seconds, steps = max(now - self._start, 1e-9), self._steps
    figures = {
      "images_per_second": self._batch_size * steps / seconds,
      "data_wait_percent": 100 * self._waited / seconds,
      "mfu_percent": 100 * self._flops * steps / seconds / self._peak,
    }
    self._start, self._waited, self._steps = now, 0.0, 0
    return figures


class Guard:
  """What is checked of every step's metrics, one step late: finite, and not collapsed."""

  PATIENCE = 3  # log lines in a row

  def __init__(self, experiment: Experiment, workdir: Path, num_dimensions: int):
    self._names = watched_names(experiment)
    self._workdir, self._num_dimensions = workdir, num_dimensions
    self._quiet_until = max(50, experiment.total_steps // 10)
    self._collapsed = 0

  def check_finite(self, step: int, metrics: dict[str, float], ids: np.ndarray) -> None:
    index = int(metrics["first_non_finite"])
    if index < 0:
      return
    record = {"step": step, "first_bad_tensor": self._names[index], "ids": ids.tolist()}
    (self._workdir / "non_finite.json").write_text(json.dumps(record))
    raise FloatingPointError(
      f"step {step}: NaN or infinity, first in {self._names[index]!r} (loss "
      f"{metrics['loss']:.4g}); images {ids[:8].tolist()}{' ...' if len(ids) > 8 else ''}, all of "
      f"them in {self._workdir / 'non_finite.json'}. Nothing of this step was saved: lower "
      "optim.learning_rate or set optim.clip_norm, and run again"
    )

  def check_collapse(self, step: int, metrics: dict[str, float]) -> None:
    name = collapse(metrics, self._num_dimensions) if step >= self._quiet_until else None
    self._collapsed = self._collapsed + 1 if name else 0
    if self._collapsed == self.PATIENCE:
      logging.warning("step %d: %s", step, name)


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
  """Yields a function that tells whether SIGTERM or Ctrl-C came; a second Ctrl-C interrupts."""
  came: list[int] = []

  def handler(number, frame):
    if came and number == signal.SIGINT:
      raise KeyboardInterrupt
    came.append(number)

  try:
    old = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not the main thread: leave the signals alone
    old = {}
  try:
    yield lambda: bool(came)
  finally:
    for number, previous in old.items():
      signal.signal(number, previous)


def progress_line(step: int, total: int, figures: dict[str, float], batch_size: int) -> str:
  left = (total - step) * batch_size / max(figures["images_per_second"], 1e-9)
  probe = f"probe {figures['probe/accuracy']:5.1f} %  " if "probe/accuracy" in figures else ""
  return (
    f"step {step:>{len(str(total))}}/{total} {100 * step // total:3d} %  "
    f"loss {figures['loss']:8.4f}  {probe}{figures['images_per_second']:6.0f} images/s  "
    f"data wait {figures['data_wait_percent']:.0f} %  MFU {figures['mfu_percent']:.1f} %  "
    f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
  )


def train(
  experiment: Experiment, source: Source, workdir: Path, *, say: Callable[[str], None]
) -> tuple[TrainState, bool]:
  """Trains from the newest checkpoint of `workdir` (or from nothing) to the last step.

  Returns:
    The final state, and whether the last step was reached (False: stopped by SIGTERM or Ctrl-C,
    with a checkpoint of the step it had come to).
  """
  config, total = experiment.config, experiment.total_steps
  checkpoints = Checkpoints(
    workdir, keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best
  )
  abstract = abstract_state(experiment)
  state = checkpoints.restore(abstract)
  say(f"resuming at step {int(state.step)}" if state else "starting at step 0")
  state = state or create_state(experiment)
  first = int(state.step)
  if first >= total:
    checkpoints.close()
    return state, True

  start = time.perf_counter()
  compiled = compile_step(experiment, abstract)
  flops = flops_per_step(experiment)
  peak, peak_name = peak_flops(experiment.mesh.devices.flat[0])
  say(
    f"compiled in {time.perf_counter() - start:.1f} s; {flops / 1e9:,.1f} GFLOP a step (1 MAC = 2 "
    f"FLOP, matrix products and convolutions only), peak {peak / 1e12:.3g} TFLOP/s a device "
    f"({peak_name})"
  )
  writer = Writer(workdir, step=first, tensorboard=config.log.tensorboard)
  guard = Guard(experiment, workdir, embedding_size(experiment))
  watch = Stopwatch(batch_size=config.batch_size, flops=flops, peak=peak * experiment.mesh.size)
  batches = training_batches(experiment, source, start_step=first)
  latest: dict[str, float] = {}

  def settle(pending) -> None:
    """Fetches a step's metrics, which waits for it; checks and logs them."""
    step, metrics, ids = pending
    figures = {k: v.item() for k, v in jax.device_get(metrics).items()}
    guard.check_finite(step, figures, ids)
    del figures["first_non_finite"]
    latest.update(figures)
    if step % config.log.every_steps == 0 or step == total:
      figures |= watch.read()
      writer.write(step, figures)
      guard.check_collapse(step, figures)
      say(progress_line(step, total, figures, config.batch_size))

  pending = None
  with stop_on_sigterm() as stopped:
    try:
      for step in range(first + 1, total + 1):
        before = time.perf_counter()
        batch = next(batches)
        watch.waited(time.perf_counter() - before)
        state, metrics = compiled(state, parallel.to_device(batch, experiment.mesh))
        if pending:  # the step before this one: its metrics come while this one runs
          settle(pending)
        pending = (step, metrics, position(batch["id"]))
        stop = stopped()
        if step % config.checkpoint.every_steps == 0 or step == total or stop:
          settle(pending)
          pending = None
          checkpoints.save(state, step=step, score=latest.get("probe/accuracy", 0.0))
        if stop:
          break
      checkpoints.wait()
    finally:
      batches.close()
      writer.close()
      checkpoints.close()
  return state, int(state.step) >= total


def embedding_size(experiment: Experiment) -> int:
  """Dimensions of what the health figures are computed of."""
  step = make_train_step(experiment)
  *_, watched = jax.eval_shape(step, abstract_state(experiment), abstract_batch(experiment))
  return watched["3_embeddings"].shape[-1]


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
  views = jax.jit(lambda k, b: loss_views(experiment, k, b, step))(view_key, batch)
  first = {spec.name: views[spec.name][:num_images] for spec in specs}
  return {
    name: np.asarray(denormalise(v, config.data.mean, config.data.std)) for name, v in first.items()
  }


def training_batches(experiment: Experiment, source: Source, *, start_step: int) -> Batches:
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
  )


def num_parameters(params: Any) -> int:
  return sum(p.size for p in jax.tree.leaves(params))
