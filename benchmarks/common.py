"""What the benchmarks share: a table on the screen, and results/NAME.json with how it was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

import ssrl_jax

RESULTS = Path(__file__).resolve().parent.parent / "results"


def write_results(name: str, rows: list[dict[str, Any]]) -> None:
  """Prints the rows, all with the same keys, as a table and writes results/NAME.json."""
  print(table(rows))
  path = RESULTS / f"{name}.json"
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({**circumstances(), "rows": rows}, indent=2) + "\n")
  print(f"written to results/{path.name}")


def table(rows: list[dict[str, Any]]) -> str:
  """Aligned columns: text to the left, numbers to the right."""
  header = list(rows[0])
  cells = [header] + [[_format(row[key]) for key in header] for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
  is_text = [isinstance(rows[0][key], str) for key in header]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if left else cell.rjust(width)
      for cell, width, left in zip(line, widths, is_text)
    ).rstrip()
    for line in cells
  )


def _format(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
  return str(value)


def circumstances() -> dict[str, Any]:
  """Hardware, versions, date, and how busy the machine was."""
  devices = jax.devices()
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "hardware": {
      "device_kind": devices[0].device_kind,
      "device_count": len(devices),
      "cpu_model": cpu_model(),
      "cpu_cores": os.cpu_count(),
      "load_average_1min": round(os.getloadavg()[0], 2),  # above cpu_cores: the figures are noisy
    },
    "versions": {
      "python": platform.python_version(),
      **{p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax")},
      "ssrl_jax": ssrl_jax.__version__,
    },
  }


def cpu_model() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return models[0] if models else platform.processor() or platform.machine()


class Timing(NamedTuple):
  """Seconds."""

  median: float  # of a call
  best: float  # of a call; near the median unless something else ran on the machine
  compile: float


def measure(f: Callable, *args: Any, seconds: float = 2.0) -> Timing:
  """Times jit(f)(*args): at least 3 calls, and as many as fit into `seconds`."""
  start = time.perf_counter()
  compiled = jax.jit(f).lower(*args).compile()
  compile_seconds = time.perf_counter() - start
  jax.block_until_ready(compiled(*args))  # warm-up
  times, end = [], time.perf_counter() + seconds
  while len(times) < 3 or time.perf_counter() < end:
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    times.append(time.perf_counter() - start)
  return Timing(sorted(times)[len(times) // 2], min(times), compile_seconds)
