"""What the training loop watches: its rates, and the line that it shows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

RATES = ("images_per_second", "data_wait_percent", "mfu_percent")
COSTS = ("wall_seconds", "cpu_seconds")
TIMED = (*RATES, *COSTS)  # the figures in metrics.jsonl that differ when a run is made again


class Costs:
  """What a run has cost until now, in seconds: wall clock, and processor time over all threads.

  Of the first process of each start of the run, from `started` (of `time.monotonic`) on; what a
  killed one did after its last line in metrics.jsonl is not in it.

  Args:
    records: the lines of metrics.jsonl that there are.
  """

  def __init__(self, records: Iterable[Mapping[str, float]], *, started: float):
    self._before = dict.fromkeys(COSTS, 0.0)
    for record in records:
      self._before |= {name: record[name] for name in COSTS if name in record}
    self._started = started

  def read(self) -> dict[str, float]:
    wall, cpu = time.monotonic() - self._started, time.process_time()
    return {k: v + self._before[k] for k, v in zip(COSTS, (wall, cpu), strict=True)}


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
