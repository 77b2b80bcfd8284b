"""What the training loop watches: its rates, and the health of every step."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import jax
import numpy as np

from ssrl_jax import parallel
from ssrl_jax.experiment import Experiment
from ssrl_jax.metrics import collapse


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

  def __init__(
    self, experiment: Experiment, workdir: Path, watched: list[str], num_dimensions: int
  ):
    self._names = watched
    self._workdir, self._num_dimensions = workdir, num_dimensions
    self._quiet_until = max(50, experiment.total_steps // 10)
    self._collapsed = 0

  def check_finite(self, step: int, metrics: dict[str, float], ids: np.ndarray) -> None:
    index = int(metrics["first_non_finite"])
    if index < 0:
      return
    ids = parallel.all_processes(ids)
    record = {"step": step, "first_bad_tensor": self._names[index], "ids": ids.tolist()}
    if jax.process_index() == 0:
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


def progress_line(step: int, total: int, figures: dict[str, float], batch_size: int) -> str:
  left = (total - step) * batch_size / max(figures["images_per_second"], 1e-9)
  probe = f"probe {figures['probe/accuracy']:5.1f} %  " if "probe/accuracy" in figures else ""
  return (
    f"step {step:>{len(str(total))}}/{total} {100 * step // total:3d} %  "
    f"loss {figures['loss']:8.4f}  {probe}{figures['images_per_second']:6.0f} images/s  "
    f"data wait {figures['data_wait_percent']:.0f} %  MFU {figures['mfu_percent']:.1f} %  "
    f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
  )
