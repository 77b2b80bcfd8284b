"""A batch in parts, and blocks computed again: memory and time of loss and gradient.

python -m benchmarks.accumulate [--recipe=configs/digits.py] [--methods=simclr,mae] [--batch=128]
  [--parts=1,2,4,8] [--rounds=5] [--name=accumulate]

Encoders have group norm (a ViT has layer norm). temporary_mib is what the compiler reserves beside
arguments and results; kept_mib what the backward pass keeps of the traced program, before the
compiler fuses, parameters left out. All programs of a method are compiled first, then run in turn:
seconds are medians over the rounds, relative_time is over the first row of the method.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import write_results
from benchmarks.step import encoder_name
from ssrl_jax.config import load_file
from ssrl_jax.dry_run import activation_bytes
from ssrl_jax.experiment import Experiment, build, create_state
from ssrl_jax.step import abstract_views


def random_views(experiment: Experiment) -> dict[str, np.ndarray]:
  """Noise, with the shapes of a batch's views."""
  np_rng = np.random.default_rng(0)
  return {
    name: np_rng.normal(size=x.shape).astype(x.dtype)
    if x.dtype == np.float32
    else np_rng.integers(0, experiment.num_classes, x.shape).astype(x.dtype)
    for name, x in abstract_views(experiment).items()
  }


def measure(config, settings: list[tuple[int, bool]], *, rounds: int) -> list[dict[str, Any]]:
  """A row for each (parts, remat)."""
  config.encoder.norm = "group"
  config.mesh.devices = 1
  rows, programs, seconds = [], [], [[] for _ in settings]
  for parts, remat in settings:
    config.accumulate, config.encoder.remat = parts, remat
    experiment = build(config, num_examples=config.batch_size * 1000, num_classes=10)
    if not programs:
      state, views = create_state(experiment), random_views(experiment)
      arguments = (state.params, state.method_state, views, jax.random.key(0), state.step)
    gradient = jax.jit(jax.value_and_grad(experiment.method.loss, has_aux=True))
    programs.append(gradient.lower(*arguments).compile())
    (loss, _), _ = programs[-1](*arguments)
    rows.append({
      "method": config.method.name,
      "encoder": encoder_name(config),
      "batch": config.batch_size,
      "parts": parts,
      "remat": str(remat),
      "temporary_mib": programs[-1].memory_analysis().temp_size_in_bytes / 2**20,
      "kept_mib": activation_bytes(experiment) / 2**20,
      "loss": f"{float(loss):.6f}",
    })  # fmt: skip
  for _ in range(rounds):
    for program, measured in zip(programs, seconds):
      start = time.perf_counter()
      jax.block_until_ready(program(*arguments))
      measured.append(time.perf_counter() - start)
  medians = [statistics.median(measured) for measured in seconds]
  return [
    row | {"seconds": median, "relative_time": median / medians[0]}
    for row, median in zip(rows, medians)
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipe", default="configs/digits.py")
  parser.add_argument("--methods", default="simclr,mae")
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--parts", default="1,2,4,8")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--name", default="accumulate")
  options = parser.parse_args()
  parts = [int(n) for n in options.parts.split(",")]
  settings = [(n, False) for n in parts] + [(parts[0], True), (parts[-1], True)]
  rows = []
  for method in options.methods.split(","):
    config = load_file(options.recipe).get_config(method)
    config.batch_size = options.batch
    rows += measure(config, settings, rounds=options.rounds)
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
