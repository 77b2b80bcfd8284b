"""What the training loop watches: its rates, and the line that it shows."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from ssrl_jax.files import write_json

# The figures in metrics.jsonl that differ when a run is made again.
RATES = ("images_per_second", "data_wait_percent", "mfu_percent")
COSTS = ("wall_seconds", "cpu_seconds")


def costs_file(figures: Path) -> Path:
  """Where the costs of an evaluation are whose figures are in the file `figures`."""
  return figures.with_name(f"{figures.stem}-costs.json")


class Costs:
  """What a run, or an evaluation, has cost over all its starts, in seconds, kept in a file.

  wall_seconds: from `started` (of `time.monotonic`) on. cpu_seconds: processor time of all threads,
  imports included; of the first process alone, and not of its readers (`data.workers`). What a
  killed start did after it had last been kept, which every line of metrics.jsonl and every protocol
  does, is missing.
  """

  def __init__(self, path: Path, *, started: float, writes: bool = True):
    self._path, self._started, self._writes = path, started, writes
    self._before = dict.fromkeys(COSTS, 0.0)
    if path.exists():
      self._before |= json.loads(path.read_text())

  def read(self) -> dict[str, float]:
    wall, cpu = time.monotonic() - self._started, time.process_time()
    return {k: v + self._before[k] for k, v in zip(COSTS, (wall, cpu), strict=True)}

  def keep(self) -> None:
    if self._writes:
      with contextlib.suppress(OSError):  # no run should end for it
        write_json(self._path, self.read())


class Stopwatch:
  """Rates since the last reading: images/s, share of time spent waiting for data, MFU."""

  def __init__(self, *, step: int, batch_size: int, flops: float, peak: float):
    self._batch_size, self._flops, self._peak = batch_size, flops, peak
    self._start, self._waited, self._step = time.perf_counter(), 0.0, step

  def waited(self, seconds: float) -> None:
    self._waited += seconds

  def paused(self, seconds: float) -> None:
    """Leaves out what was no training."""
    self._start += seconds

  def read(self, step: int) -> dict[str, float]:
    """Those until now, when `step` is known to be finished."""
    now = time.perf_counter()
    seconds, steps = max(now - self._start, 1e-9), step - self._step
    images = self._batch_size * steps / seconds
    mfu = self._flops * steps / seconds / self._peak
    figures = (images, 100 * self._waited / seconds, 100 * mfu)
    self._start, self._waited, self._step = now, 0.0, step
    return dict(zip(RATES, figures, strict=True))


def progress_line(step: int, total: int, figures: dict[str, float], batch_size: int) -> str:
  left = (total - step) * batch_size / max(figures["images_per_second"], 1e-9)
  probe = f"probe {figures['probe/accuracy']:5.1f} %  " if "probe/accuracy" in figures else ""
  return (
    f"step {step:>{len(str(total))}}/{total} {100 * step // total:3d} %  "
    f"loss {figures['loss']:8.4f}  {probe}{figures['images_per_second']:6.0f} images/s  "
    f"data wait {figures['data_wait_percent']:.0f} %  MFU {figures['mfu_percent']:.1f} %  "
    f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
  )
