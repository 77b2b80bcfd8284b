"""What a run makes of the metrics of its steps: checked, kept in its folder, shown in lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssrl_jax.data.batches import Damage
from ssrl_jax.data.damaged import DamagedList
from ssrl_jax.data.pipeline import PADDING
from ssrl_jax.data.sampling import position
from ssrl_jax.experiment import Experiment
from ssrl_jax.guard import Guard
from ssrl_jax.metrics import Writer
from ssrl_jax.step import watched_tensors
from ssrl_jax.watch import Stopwatch, progress_line

HostBatch = dict[str, np.ndarray]


class Record:
  """Of one run, from `step` on. Only process 0 writes.

  Args:
    damaged: the run's list of what cannot be read.
    damage: example -> why it cannot be read.
    seen: batch -> the whole batch that the step was given, on the host.
    flops: of a step. peak: FLOP/s of all devices together.
    keep_costs: is called when a line was written.
    say: shows a line.
    moved: is called when a step was finished.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: Path,
    *,
    step: int,
    damaged: DamagedList,
    damage: Callable[[int], Damage],
    seen: Callable[[HostBatch], HostBatch],
    flops: float,
    peak: float,
    keep_costs: Callable[[], None],
    say: Callable[[str], None],
    moved: Callable[[], None],
  ):
    config = experiment.config
    self._total, self._every = experiment.total_steps, config.log.every_steps
    self._batch_size = config.batch_size
    self._damaged, self._damage, self._seen = damaged, damage, seen
    self._keep_costs, self._say, self._moved = keep_costs, say, moved
    writes = jax.process_index() == 0
    self._writer = Writer(workdir, step=step, tensorboard=config.log.tensorboard, writes=writes)
    self._guard = Guard(
      config.guard,
      workdir,
      total_steps=self._total,
      watched=watched_tensors(experiment),
      writes=writes,
    )
    self.watch = Stopwatch(step=step, batch_size=config.batch_size, flops=flops, peak=peak)
    self.latest: dict[str, float] = {}  # figures of the last good step

  def settle(self, pending: Sequence[tuple[int, Any, HostBatch]]) -> None:
    """Fetches the metrics of some steps, which waits for them: (step, metrics, batch) each.

    Raises:
      FloatingPointError: a step was bad, and the run is to stop at it.
      ValueError: more examples are damaged than the run allows.
    """
    for step, metrics, batch in pending:
      figures = {k: v.item() for k, v in jax.device_get(metrics).items()}
      self._moved()
      good = self._guard.check(step, figures, lambda batch=batch: self._seen(batch))
      del figures["first_bad"]
      unread_B = np.where(batch["substituted"], position(batch["id"]), PADDING)
      self._damaged.settle(step, figures["data/substituted"], unread_B, self._damage)
      self.latest.update(figures if good else {})
      if step % self._every == 0 or step == self._total:
        figures |= self.watch.read(step)
        self._writer.write(step, figures)
        self._keep_costs()
        self._guard.check_collapse(step, figures)
        self._say(progress_line(step, self._total, figures, self._batch_size))

  def evaluated(self, step: int, figures: dict[str, float], seconds: float) -> None:
    """Keeps what was evaluated at `step`, which took so long."""
    self._writer.write(step, figures)
    self.watch.paused(seconds)
    listed = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
    self._say(f"evaluated at step {step}: {listed}")

  def close(self) -> None:
    self._writer.close()
