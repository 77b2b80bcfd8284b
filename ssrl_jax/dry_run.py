"""What a recipe would run and what it costs, without data and without allocating anything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from ssrl_jax import parallel
from ssrl_jax.collectives import collectives, summary
from ssrl_jax.experiment import Experiment, abstract_batch, abstract_state, build, make_method
from ssrl_jax.flops import PEAK_FLOPS
from ssrl_jax.method import Method, Run
from ssrl_jax.optim import describe_groups
from ssrl_jax.step import abstract_views, compile_step, flops_per_step, num_parameters

ASSUMED_MFU = 0.2  # of the estimated device-hours: good for a ResNet-50; a ViT reaches twice that
REFERENCE_DEVICE = "NVIDIA H200"


def array_bytes(tree: Any, *, per_device: bool) -> int:
  """Bytes of a tree's arrays, in all or on each device."""

  def one(x):
    shape = x.sharding.shard_shape(x.shape) if per_device else x.shape
    return math.prod(shape) * x.dtype.itemsize

  return sum(one(x) for x in jax.tree.leaves(tree))


def compiled_memory(compiled: Any) -> int:
  """Bytes that a compiled step takes on each device: state, batch, results and what is between."""
  memory = compiled.memory_analysis()
  total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  return total - memory.alias_size_in_bytes


def activation_bytes(experiment: Experiment, method: Method | None = None) -> int:
  """Bytes that the backward pass of one step keeps, over all devices, parameters left out.

  Every residual of the traced program, before the compiler fuses: an upper estimate, but for what
  is computed a second time, which `accumulate` and `encoder.remat` do. `method`: another one.
  """
  method, state = method or experiment.method, abstract_state(experiment)

  def residuals(params, method_state, views, key, step):
    _, vjp, _ = jax.vjp(
      lambda p: method.loss(p, method_state, views, key, step), params, has_aux=True
    )
    return jax.tree.leaves(vjp)

  arguments = (state.params, state.method_state, abstract_views(experiment), state.key, state.step)
  kept = jax.eval_shape(residuals, *arguments)
  total = array_bytes(kept, per_device=False) - array_bytes(state.params, per_device=False)
  return max(total, 0)


def part_bytes(experiment: Experiment) -> int:
  """Of `accumulate`: what the part keeps that is computed a second time; 0 without it."""
  config = experiment.config
  if config.accumulate == 1:
    return 0
  steps = experiment.steps_per_epoch, experiment.total_steps
  whole = make_method(config, Run(config.batch_size, *steps, experiment.num_classes))
  return activation_bytes(experiment, whole) // config.accumulate


class Cost(NamedTuple):
  """Of training; model FLOPs, see ssrl_jax/flops.py."""

  steps: int
  flops_per_step: float
  device_hours: float  # of REFERENCE_DEVICE at ASSUMED_MFU: an estimate

  @property
  def flops(self) -> float:
    return self.steps * self.flops_per_step


def assumed_experiment(config: ConfigDict, *, devices: Sequence[Any] | None = None) -> Experiment:
  """The experiment, of a training set whose size is assumed where the config does not say it."""
  data = config.data
  num_examples = data.num_train or data.dry_run_examples
  classes = data.dry_run_classes
  return build(config, num_examples=num_examples, num_classes=classes, devices=devices)


def cost(experiment: Experiment) -> Cost:
  flops = flops_per_step(experiment)
  hours = flops * experiment.total_steps / (PEAK_FLOPS[REFERENCE_DEVICE] * ASSUMED_MFU) / 3600
  return Cost(experiment.total_steps, flops, hours)


def too_much(error: jax.errors.JaxRuntimeError) -> str:
  """ "20.1G of 15.75G", of the compiler's error for what does not fit; others are raised again."""
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  found = re.search(r"Used (\S+) of (\S+) hbm", str(error))
  return f"{found[1]} of {found[2]}" if found else "what the compiler does not say"


def say_compiled(experiment: Experiment, *, say: Callable[[str], None]) -> None:
  """Prints what the compiled step takes on each device, and what it sends from each."""
  try:
    compiled = compile_step(experiment, abstract_state(experiment))
  except jax.errors.JaxRuntimeError as error:
    say(f"compiled memory   does not fit: {too_much(error)}")
    return
  say(f"compiled memory   {compiled_memory(compiled) / 2**20:,.0f} MiB a device, for this backend")
  found = collectives(compiled.as_text())
  slice_size = experiment.mesh.size // experiment.mesh.shape[parallel.SLICE]
  crossing = [c for c in found if c.crosses(slice_size)]
  for name, some in (("sent a step", found), ("between slices", crossing)):
    kinds = ", ".join(f"{kind} {sent / 2**20:,.3g}" for kind, sent in summary(some).items())
    total = sum(c.sent for c in some) / 2**20
    say(f"{name:<17} {total:,.3g} MiB from each device{f': {kinds}' if kinds else ''}")


def dry_run(
  config: ConfigDict, *, say: Callable[[str], None], compile_too: bool = False, tpu: str = ""
) -> None:
  """Prints the parameter table, shapes, shardings, memory, FLOPs and estimated device-hours.

  Args:
    compile_too: also what the compiled step takes and sends.
    tpu: a TPU slice to do it for, of config.mesh.slices such; it need not be there.
  """
  devices = parallel.described_tpus(tpu, config.mesh.slices or 1) if tpu else None
  experiment = assumed_experiment(config, devices=devices)
  state, batch = abstract_state(experiment), abstract_batch(experiment)
  n, mib = experiment.mesh.size, 2**20
  leaves = jax.tree.leaves(state)
  cut = [x for x in leaves if x.sharding.shard_shape(x.shape) != x.shape]
  say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
  say(describe_groups(state.params) + "\n")
  axes = ", ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
  kind = experiment.mesh.devices.flat[0].device_kind
  say(f"mesh              {n} device(s) ({kind}): {axes}")
  for name, x in batch.items():
    shard = x.sharding.shard_shape(x.shape)
    say(f"batch/{name:<11} {x.dtype}{list(x.shape)}, on each device {list(shard)}")
  for name, x in abstract_views(experiment).items():
    say(f"views/{name:<11} {x.dtype}{list(x.shape)}")
  say(f"state             {len(leaves)} arrays, {len(cut)} of them cut over the devices")
  say(f"parameters        {num_parameters(state.params):,}\n")

  say(f"state memory      {array_bytes(state, per_device=True) / mib:,.0f} MiB a device")
  say(f"batch memory      {array_bytes(batch, per_device=True) / mib:,.0f} MiB a device")
  activations = (activation_bytes(experiment) + part_bytes(experiment)) / n / mib
  most = "and one recomputed block" if config.encoder.remat else "at most"
  say(f"activations       {activations:,.0f} MiB a device {most}, before the compiler fuses")
  if compile_too:
    say_compiled(experiment, say=say)
  found = cost(experiment)
  say(f"steps             {experiment.total_steps:,} ({experiment.steps_per_epoch:,} an epoch)")
  each, hours = found.flops_per_step, found.device_hours
  say(f"FLOPs             {each:.4g} a step, {found.flops:.4g} in all (1 MAC = 2 FLOP)")
  say(f"estimated cost    {hours:,.2g} device-hours of {REFERENCE_DEVICE} at {ASSUMED_MFU:.0%} MFU")
  say(f"                  (not measured), {hours / n:,.2g} hours on {n} device(s)")
