"""What the loop costs on top of the bare compiled step: reading, logging, saving, all of `train`.

python -m benchmarks.loop [--recipe=configs/digits.py] [--method=simclr] [--encoder=resnet6]
  [--batch=64] [--steps=10] [--rounds=30] [--evaluate_every=0] [--name=loop]

At each log line, every `steps` steps, `train` is held up for as many bare steps: machines drift.
Checkpoints are as frequent as the recipe's; what comes before the first (which compiles) is left
out. Sums over the rounds; the median is of their ratios, so without most of a checkpoint's cost.
Processor time is that of all threads for a step; wall time also has what else ran on the machine.
k-NN every `evaluate_every` steps (0: never) is timed by itself: is a step slower for it, or the
second evaluation than the others? Pictures are streamed: with `data.cache` lines come in bursts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import write_results
from ssrl_jax import parallel
from ssrl_jax.config import load_file
from ssrl_jax.evaluate.during import evaluate_during
from ssrl_jax.experiment import Experiment, build, create_state, open_split
from ssrl_jax.step import compile_step
from ssrl_jax.train import train, training_batches


def bare(experiment: Experiment, batch: dict[str, Any]) -> Callable[[int], None]:
  """The compiled step over one batch that stays on the devices."""
  state = [create_state(experiment)]
  step, batch = compile_step(experiment, state[0]), parallel.to_device(batch, experiment.mesh)

  def run(num_steps: int) -> None:
    for _ in range(num_steps):
      state[0], _ = step(state[0], batch)
    jax.block_until_ready(state[0])

  return run


class Turns:
  """`train`'s `say`: takes the time since its last line, then that of as many bare steps."""

  def __init__(self, run: Callable[[int], None], steps: int):
    self._run, self._steps, self._last, self.laps = run, steps, None, []
    self.evaluations = []

  def __call__(self, line: str) -> None:
    if not line.startswith("step "):
      return
    jax.block_until_ready(jax.live_arrays())  # a step that is under way is `train`'s
    looped = self._now()
    self._run(self._steps)
    end = self._now()
    if self._last is not None:
      self.laps.append((looped - self._last, end - looped))
    self._last = end

  def evaluating(self, evaluate: Callable) -> Callable:
    """`evaluate`, whose time is left out of the laps."""

    def timed(*given: Any) -> Any:
      start = self._now()
      figures = evaluate(*given)
      self.evaluations.append(self._now() - start)
      self._last = None if self._last is None else self._last + self.evaluations[-1]
      return figures

    return timed

  def _now(self) -> np.ndarray:
    """Seconds on the wall, and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def measure(config: Any, *, steps: int, rounds: int, evaluate_every: int) -> dict[str, Any]:
  config.steps, config.log.every_steps = steps * rounds, steps
  config.checkpoint.every_steps = min(config.checkpoint.every_steps, steps * rounds // 2)
  config.optim.warmup_epochs = 0.0
  config.evaluate.during.update({"every_steps": evaluate_every, "num_train": 1024})
  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
  batches = training_batches(experiment, source, start_step=0)
  turns = Turns(bare(experiment, next(batches)), steps)
  batches.close()
  with tempfile.TemporaryDirectory(prefix="ssrl_jax_loop_") as workdir:
    evaluate = None
    if evaluate_every:
      test = open_split(config, "test")
      evaluate = turns.evaluating(evaluate_during(experiment, source, test))
    train(experiment, source, Path(workdir), say=turns, evaluate=evaluate)
  laps = turns.laps[config.checkpoint.every_steps // steps :]
  loop, alone = 1e3 * np.sum(laps, axis=0) / (steps * len(laps))
  return {
    "batch": config.batch_size,
    "steps": steps * len(laps),
    "loop_wall_ms": loop[0],
    "bare_wall_ms": alone[0],
    "rate_percent": 100 * alone[0] / loop[0],
    "loop_processor_ms": loop[1],
    "bare_processor_ms": alone[1],
    "rate_by_processor_percent": 100 * alone[1] / loop[1],
    "median_percent": 100 * np.median([own[1] / whole[1] for whole, own in laps]),
    "evaluation_wall_s": [round(float(wall), 2) for wall, _ in turns.evaluations],
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipe", default="configs/digits.py")
  parser.add_argument("--method", default="simclr")
  parser.add_argument("--encoder", default="resnet6")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--rounds", type=int, default=30)
  parser.add_argument("--evaluate_every", type=int, default=0)
  parser.add_argument("--name", default="loop")
  options = parser.parse_args()
  config = load_file(options.recipe).get_config(options.method)
  config.encoder.name, config.batch_size = options.encoder, options.batch
  row = measure(
    config, steps=options.steps, rounds=options.rounds, evaluate_every=options.evaluate_every
  )
  write_results(options.name, [row])


if __name__ == "__main__":
  main()
