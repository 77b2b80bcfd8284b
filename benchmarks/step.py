"""What a training step costs: views/s, MFU, memory, compile time, and where the time goes.

python -m benchmarks.step [--recipe=configs/digits.py] [--methods=fusion,simclr]
  [--encoders=resnet8] [--batches=128] [--precisions=float32] [--steps=20] [--name=step]

Prints a table and writes results/NAME.json. Every figure is the median over the steps of one run on
an otherwise idle device; parts are timed apart, each compiled on its own, so they need not add up.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.common import write_results
from ssrl_jax import parallel
from ssrl_jax.config import load_file
from ssrl_jax.experiment import Experiment, abstract_batch, build, create_state
from ssrl_jax.flops import peak_flops
from ssrl_jax.step import compile_step, flops_per_step, loss_views, step_keys


def random_batch(experiment: Experiment) -> dict[str, jax.Array]:
  """A batch of noise with the shapes of the real one."""
  rng, config = np.random.default_rng(0), experiment.config
  b, s = config.batch_size, config.data.canvas
  host = {
    "image": rng.integers(0, 256, (b, s, s, 3), np.uint8),
    "extent": np.full((b, 2), s, np.int32),
    "label": rng.integers(0, experiment.num_classes, b).astype(np.int32),
    "id": np.arange(b, dtype=np.int64),
    "substituted": np.zeros(b, bool),
  }
  return parallel.to_device(host, experiment.mesh)


def median_seconds(f, *args: Any, steps: int) -> float:
  jax.block_until_ready(f(*args))
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def part_seconds(experiment: Experiment, state, batch, *, steps: int) -> dict[str, float]:
  """Views, loss, and loss with gradient, each compiled and timed on its own."""
  method = experiment.method
  view_key, loss_key = step_keys(state.key, state.step)
  make = jax.jit(lambda k, b: loss_views(experiment, k, b, state.step))
  views = make(view_key, batch)
  arguments = (state.params, state.method_state, views, loss_key, state.step)
  gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  return {
    "views_ms": 1e3 * median_seconds(make, view_key, batch, steps=steps),
    "forward_ms": 1e3 * median_seconds(jax.jit(method.loss), *arguments, steps=steps),
    "forward_backward_ms": 1e3 * median_seconds(gradient, *arguments, steps=steps),
  }


def peak_memory(compiled) -> float:
  """MiB on one device: what the allocator saw, or on a CPU what the compiler reserved."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"] / 2**20
  memory = compiled.memory_analysis()
  total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  return (total - memory.alias_size_in_bytes) / 2**20


def measure(config, *, steps: int) -> dict[str, Any]:
  experiment = build(config, num_examples=config.batch_size * 1000, num_classes=10)
  state, batch = create_state(experiment), random_batch(experiment)
  assert {k: v.shape for k, v in batch.items()} == {
    k: v.shape for k, v in abstract_batch(experiment).items()
  }
  parts = part_seconds(experiment, state, batch, steps=max(steps // 2, 3))
  start = time.perf_counter()
  compiled = compile_step(experiment, state)
  compile_seconds = time.perf_counter() - start
  seconds = []
  for _ in range(steps + 2):
    start = time.perf_counter()
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - start)
  step_seconds = statistics.median(seconds[2:])
  num_views = sum(spec.count for spec in experiment.method.views)
  peak, _ = peak_flops(experiment.mesh.devices.flat[0])
  flops = flops_per_step(experiment)
  return {
    "method": config.method.name,
    "encoder": encoder_name(config),
    "size": config.global_views.size,
    "batch": config.batch_size,
    "precision": config.encoder.dtype,
    "step_ms": 1e3 * step_seconds,
    "images_per_s": config.batch_size / step_seconds,
    "views_per_s": num_views * config.batch_size / step_seconds,
    "gflop_per_step": flops / 1e9,
    "mfu_percent": 100 * flops / step_seconds / peak / experiment.mesh.size,
    "peak_mib": peak_memory(compiled),
    "compile_s": compile_seconds,
    **parts,
  }


def encoder_name(config: ConfigDict) -> str:
  name = config.encoder.name
  return f"{name} w{config.encoder.resnet.width}" if name.startswith("resnet") else name


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipe", default="configs/digits.py")
  parser.add_argument("--methods", default="fusion,simclr")
  parser.add_argument("--encoders", default="")
  parser.add_argument("--batches", default="")
  parser.add_argument("--precisions", default="")
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--name", default="step")
  options = parser.parse_args()
  recipe, rows = load_file(options.recipe), []
  for method, encoder, batch, precision in itertools.product(
    options.methods.split(","),
    options.encoders.split(","),
    options.batches.split(","),
    options.precisions.split(","),
  ):
    config = recipe.get_config(method)
    config.encoder.name = encoder or config.encoder.name
    config.batch_size = int(batch or config.batch_size)
    config.encoder.dtype = precision or config.encoder.dtype
    rows.append(measure(config, steps=options.steps))
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
