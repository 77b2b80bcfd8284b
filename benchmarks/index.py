"""Seconds to index a folder of a million files, beside a plain os.walk.

Command  python -m benchmarks.index [--files=1000000] [--classes=1000] [--folder=DIR] [--cold]
Output   results/index.json

The files are empty, in a temporary folder within DIR, and removed afterwards. "kept" is
with the listing of a run before. With --cold each is also measured after the kernel's caches have
been dropped: this needs root and slows everything else on the machine down, so it is asked for.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import write_results
from ssrl_jax.data import index_cache
from ssrl_jax.data.folders import FolderSource

REPEATS = 3


def make_files(root: str, files: int, classes: int) -> None:
  for k in range(classes):
    os.mkdir(f"{root}/class{k:05d}")
  for i in range(files):
    os.close(os.open(f"{root}/class{i % classes:05d}/picture{i:08d}.jpg", os.O_CREAT))


def walk(root: str) -> int:
  """The paths of all files, as a list: the least that an index needs."""
  return len([os.path.join(folder, f) for folder, _, names in os.walk(root) for f in names])


def index(root: str) -> int:
  return len(FolderSource(root, split="train"))


def drop_caches() -> None:
  os.sync()
  Path("/proc/sys/vm/drop_caches").write_text("3")


def seconds(f: Callable[[str], int], root: str, files: int) -> tuple[float, float]:
  """Of the clock, and of the processor."""
  wall, cpu = time.perf_counter(), time.process_time()
  found = f(root)
  if found != files:
    raise RuntimeError(f"{f.__name__} found {found} of {files} files")
  return time.perf_counter() - wall, time.process_time() - cpu


def row(what: str, times: list[tuple[float, float]]) -> dict[str, Any]:
  """Medians; "not run" where there are none."""
  columns = [sorted(column) for column in zip(*times)] or [["not run"], ["not run"]]
  wall, cpu = (column[len(column) // 2] for column in columns)
  return {"what": what, "wall_seconds": wall, "cpu_seconds": cpu, "runs": len(times)}


def measure(root: str, files: int, classes: int, cache: Path, cold: bool) -> list[dict[str, Any]]:
  """Runs each way in turn, so that what else the machine does meets all of them."""
  make_files(root, files, classes)
  time.sleep(index_cache.SETTLED_NS / 1e9)
  names = ("os.walk", "index, nothing kept", "index, kept")
  times = {f"{name}, {state}": [] for state in ("cold", "warm") for name in names}
  walk(root)  # warms the kernel's cache, whatever making the files has left of it
  for state in ("warm", "cold") if cold else ("warm",):
    for _ in range(REPEATS):
      for name, f in zip(names, (walk, index, index)):
        if name == "index, nothing kept":
          for file in cache.glob("ssrl_jax/*"):
            file.unlink()
        if state == "cold":
          drop_caches()
        times[f"{name}, {state}"].append(seconds(f, root, files))
  return [{"files": files, "folders": classes, **row(what, t)} for what, t in times.items()]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--files", type=int, default=1_000_000)
  parser.add_argument("--classes", type=int, default=1000)
  parser.add_argument("--folder", default=None, help="default: that for temporary files")
  parser.add_argument("--cold", action="store_true", help="drop the kernel's caches; needs root")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    cache = Path(folder) / "cache"
    os.environ["XDG_CACHE_HOME"] = str(cache)
    root = Path(folder) / "set"
    root.mkdir()
    rows = measure(str(root), args.files, args.classes, cache, args.cold)
  write_results("index", rows)


if __name__ == "__main__":
  main()
