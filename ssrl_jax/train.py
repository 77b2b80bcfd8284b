"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssrl_jax import parallel, processes
from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.data import resident
from ssrl_jax.data.batches import Batches
from ssrl_jax.data.damaged import DamagedList
from ssrl_jax.data.pipeline import train_batches
from ssrl_jax.data.sampling import position
from ssrl_jax.data.sources import Source
from ssrl_jax.evaluate.during import Evaluate, Evaluations, Moved
from ssrl_jax.experiment import (
  Experiment,
  abstract_state,
  training_sampling,
  with_guard,
)
from ssrl_jax.flops import peak_flops
from ssrl_jax.init_from import first_state
from ssrl_jax.method import Array
from ssrl_jax.metrics import read_metrics
from ssrl_jax.pixels import denormalise
from ssrl_jax.record import Record
from ssrl_jax.state import TrainState
from ssrl_jax.step import compile_resident_step, compile_step, flops_per_step, loss_views, step_keys


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
    sampling=training_sampling(experiment.config, source),
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


def train(
  experiment: Experiment,
  source: Source,
  workdir: Path,
  *,
  say: Callable[[str], None],
  moved: Moved = lambda within=0: None,
  begin: Callable[[], None] = lambda: None,
  evaluate: Evaluate | None = None,
  keep_costs: Callable[[], None] = lambda: None,
) -> tuple[TrainState, bool]:
  """Trains from the newest checkpoint of `workdir` (or from nothing) to the last step.

  Args:
    moved: is called when a step was finished.
    begin: is called when it is known that what is in `workdir` is of this experiment.
    evaluate: of evaluate.during; None: nothing is evaluated meanwhile.
    keep_costs: is called when a line of metrics was written.

  Returns:
    The final state, and whether the run is over: the last step, or early stopping (False: SIGTERM
    or Ctrl-C, with a checkpoint of the step it had come to).
  """
  config, total = experiment.config, experiment.total_steps
  options = config.checkpoint.to_dict()
  save_every = options.pop("every_steps")
  checkpoints = Checkpoints(workdir, moved=moved, **options)
  state = checkpoints.restore(abstract_state(experiment))
  if state is None and (workdir / "results.json").exists():
    raise ValueError(
      f"{workdir} holds the results of a run whose checkpoints are gone: choose another --workdir, "
      "or remove it"
    )
  source_of = f", with the encoder of {config.init_from}" if config.init_from else ""
  say(f"resuming at step {int(state.step)}" if state else f"starting at step 0{source_of}")
  state = with_guard(experiment, state) if state else first_state(experiment)
  step = int(state.step)
  if step and not total:
    raise ValueError(
      f"{workdir} has trained {step} steps, and epochs=0 is for an encoder as it came; choose "
      "another --workdir"
    )
  begin()
  known = [r for r in read_metrics(workdir) if r["step"] <= step]
  evaluations = Evaluations(config.evaluate.during, evaluate, known, step=step, total=total)
  reason = evaluations.reason()
  if step >= total or reason:
    if reason:
      say(f"stopped early: {reason}")
    if not total and not checkpoints.steps():
      checkpoints.finish(state, step=0, score=0.0)  # where the other commands find it
    checkpoints.close()
    return state, True

  start = time.perf_counter()
  steps = make_steps(experiment, source, start_step=step)
  flops = flops_per_step(experiment)
  peak, peak_name = peak_flops(experiment.mesh.devices.flat[0])
  say(
    f"compiled in {time.perf_counter() - start:.1f} s; {flops / 1e9:,.1f} GFLOP a step (1 MAC = 2 "
    f"FLOP, matrix products and convolutions only), peak {peak / 1e12:.3g} TFLOP/s a device "
    f"({peak_name})"
  )
  record = Record(
    experiment,
    workdir,
    step=step,
    damaged=damaged_list(experiment, source, workdir, state),
    damage=steps.batches.damage,
    seen=steps.seen,
    flops=flops,
    peak=peak * experiment.mesh.size,
    keep_costs=keep_costs,
    say=say,
    moved=moved,
  )

  pending, stop = [], False  # what was given to the devices and not yet looked at

  def save(how: Callable) -> None:
    nonlocal pending
    record.settle(pending)
    pending = []
    how(state, step=step, score=record.latest.get("probe/accuracy", 0.0))

  edges = (config.log.every_steps, save_every, evaluations.every)
  with (
    processes.stop_on_signal() as stopped,
    closing(checkpoints),
    closing(record),
    closing(steps.batches),
  ):
    while step < total and not stop:
      if evaluations.due(step):
        save(checkpoints.save)  # nothing is lost if the run is stopped meanwhile
        record.evaluated(step, *evaluations.make(state, moved))
        if reason := evaluations.reason():
          say(f"stopped early: {reason}")
          save(checkpoints.finish)
          break
      before, pending = pending, []
      for _ in range(steps_to_edge(step, total, steps.most, *edges)):
        start = time.perf_counter()
        batch = next(steps.batches)
        record.watch.waited(time.perf_counter() - start)
        state, metrics = steps.run(state, batch)
        step += 1
        pending.append((step, metrics, batch))
        if stop := stopped(step):
          break
      record.settle(before)  # while those given just now run
      last = step == total or stop
      if step % save_every == 0 or last or checkpoints.due():
        save(checkpoints.finish if last else checkpoints.save)
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
