"""What the loop costs on top of the bare compiled step: pictures streamed, or kept on the devices.

python -m benchmarks.loop [--recipe=configs/digits.py] [--method=simclr] [--encoder=resnet6]
  [--batch=64] [--steps=8] [--rounds=5] [--name=loop]

The three take turns of `steps` steps, since machines drift; medians over the rounds. Processor time
is that of all threads of the process for a step, wall time also has what else ran on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.common import write_results
from ssrl_jax import parallel
from ssrl_jax.config import load_file
from ssrl_jax.experiment import build, create_state, open_split
from ssrl_jax.train import Steps, compile_step, make_steps


class Loop:
  """`train`'s way through its steps, without what is written."""

  def __init__(self, steps: Steps, state: Any):
    self.steps, self._state, self._pending, self.waited = steps, state, [], 0.0

  def __call__(self, num_steps: int) -> None:
    for done in range(0, num_steps, self.steps.most):
      before, self._pending = self._pending, []
      for _ in range(min(self.steps.most, num_steps - done)):
        start = time.perf_counter()
        batch = next(self.steps.batches)
        self.waited += time.perf_counter() - start
        self._state, metrics = self.steps.run(self._state, batch)
        self._pending.append(metrics)
      jax.device_get(before)
    jax.block_until_ready(self._state)


def bare(experiment: Any, batch: dict[str, Any]) -> Callable[[int], None]:
  """The compiled step over one batch that stays on the devices."""
  state = [create_state(experiment)]
  step, batch = compile_step(experiment, state[0]), parallel.to_device(batch, experiment.mesh)

  def run(num_steps: int) -> None:
    for _ in range(num_steps):
      state[0], _ = step(state[0], batch)
    jax.block_until_ready(state[0])

  return run


def measure(config: Any, *, steps: int, rounds: int) -> list[dict[str, Any]]:
  source = open_split(config, "train")
  kinds: dict[str, Callable[[int], None]] = {}
  for name, cache in (("streamed", ""), ("kept on the devices", "device")):
    config.data.cache = cache
    experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
    made = make_steps(experiment, source, start_step=0)
    if not cache:
      kinds["bare step"] = bare(experiment, next(made.batches))
    kinds[name] = Loop(made, create_state(experiment))
  wall: dict[str, list[float]] = {name: [] for name in kinds}
  processor: dict[str, list[float]] = {name: [] for name in kinds}
  for f in kinds.values():
    f(1)
  for _ in range(rounds):
    for name, f in kinds.items():
      start, cpu = time.perf_counter(), time.process_time()
      f(steps)
      wall[name].append((time.perf_counter() - start) / steps)
      processor[name].append((time.process_time() - cpu) / steps)
  rows = []
  for name, f in kinds.items():
    used, first = statistics.median(processor[name]), statistics.median(processor["bare step"])
    looped = isinstance(f, Loop)
    rows.append(
      {
        "loop": name,
        "batch": config.batch_size,
        "wall_ms": 1e3 * statistics.median(wall[name]),
        "processor_ms": 1e3 * used,
        "processor_over_bare": used / first,
        "waited_percent": 100 * f.waited / (sum(wall[name]) * steps) if looped else 0.0,
      }
    )
    if looped:
      f.steps.batches.close()
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipe", default="configs/digits.py")
  parser.add_argument("--method", default="simclr")
  parser.add_argument("--encoder", default="resnet6")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--steps", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--name", default="loop")
  options = parser.parse_args()
  config = load_file(options.recipe).get_config(options.method)
  config.encoder.name, config.batch_size = options.encoder, options.batch
  write_results(options.name, measure(config, steps=options.steps, rounds=options.rounds))


if __name__ == "__main__":
  main()
