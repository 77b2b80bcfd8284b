"""Kills runs at random moments and compares what they end with to runs left alone.

python -m benchmarks.soak [--kills=200] [--tables=10] [--seed=0] [--methods=all] [--name=soak]

A run is killed (SIGKILL) five times and each time started again by the same command, then left to
its end: `state_digest`, the figures of its evaluation and every line of metrics.jsonl must be those
of the run that nobody disturbed. The moments are drawn anew each time: any time since the start,
the first step, the end of an epoch, while a checkpoint is written, the evaluation. Starting is a
fork of a process that has imported everything, and what one has compiled the next ones load. A
table's processes are killed together, as a machine's end does it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import write_results
from ssrl_jax.watch import RATES

KILLS_A_RUN = 5
STEPS, EPOCH, SAVE_EVERY, JUDGE_EVERY = 26, 6, 4, 5
SHARED = (
  f"--config.steps={STEPS}", f"--config.data.num_train={16 * EPOCH}", "--config.data.num_test=16",
  f"--config.checkpoint.every_steps={SAVE_EVERY}", "--config.log.every_steps=1",
  "--config.evaluate.evals=knn", "--config.evaluate.controls=False", "--config.data.threads=1",
  "--config.encoder.name=resnet6", "--config.global_views.size=16", "--config.evaluate.size=16",
  "--config.evaluate.report=False",
)  # fmt: skip
RUNS = {
  "moco_v2": ["moco_v2", "--config.method.queue_size=64"],
  "byol": ["byol"],
  "dino": ["dino"],
  "swav with queue": ["swav", "--config.method.queue_size=64", "--config.method.queue_start=1.0"],
  "fusion": ["fusion"],
  "simclr, bad steps skipped": [  # about every second one after the 20th
    "simclr", "--config.guard.on_bad_step=skip", "--config.guard.spike=0.1",
  ],
  "simclr, cached": ["simclr", "--config.data.cache=device", "--config.data.steps_ahead=3"],
  "simclr, evaluated meanwhile": [
    "simclr", f"--config.evaluate.during.every_steps={JUDGE_EVERY}",
    "--config.evaluate.during.evals=knn,linear",
  ],
}  # fmt: skip
MOMENTS = ("any time", "first step", "end of an epoch", "checkpoint", "evaluation")
TABLE = """
from ssrl_jax.table import Column, Judge, Row, Table, Training

def get_table(budget):
  rows = tuple(
    Row(name, Training(f"configs/smoke.py:{name}", {"data.num_train": 96}), seeds=(0, 1))
    for name in ("simclr", "byol")
  )
  judges = {"frozen": Judge("knn,linear")}
  columns = (Column("k-NN %", "frozen", "knn/accuracy"), Column("%", "frozen", "linear/accuracy"))
  return Table("Soak", "Killed.", "none", rows, columns, judges)
"""
QUICK = {  # compilation is nearly all of a start
  "JAX_PLATFORMS": "cpu",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def _command(module: str, arguments: list[str], out: str) -> None:
  file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.argv = [module, *arguments]
  sys.exit(importlib.import_module(module).cli(sys.argv))


class Command:
  """A run that is going on: its process, and what it has printed so far."""

  def __init__(self, forks: Any, arguments: list[str], folder: Path):
    self.folder, self._out = folder, folder.with_suffix(".out")
    self._meanwhile = any("during" in argument for argument in arguments)
    self._out.write_text("")
    self.process = forks.Process(target=_command, args=("ssrl_jax.main", arguments, str(self._out)))
    self.process.start()

  def printed(self) -> str:
    return self._out.read_text()

  def step(self) -> int:
    """The last step that it told of; -1 before the first."""
    return max(map(int, re.findall(r"^step +(\d+)/", self.printed(), re.MULTILINE)), default=-1)

  def unfinished_checkpoints(self) -> set[str]:
    return {path.name for path in (self.folder / "checkpoints").glob("*-tmp*")}

  def wait_for(self, moment: str, draw: random.Random, seconds: float) -> bool:
    """Returns at the moment, or False if the run came to its end before it."""
    last = JUDGE_EVERY * draw.randint(1, STEPS // JUDGE_EVERY)
    before, end = self.unfinished_checkpoints(), time.monotonic() + draw.uniform(0, seconds)
    nth, edge = draw.randint(1, 3), 0
    seen: set[str] = set()
    while self.process.is_alive():
      step = self.step()
      edge = edge or (step // EPOCH + draw.randint(1, 3)) * EPOCH
      seen |= self.unfinished_checkpoints() - before
      if {
        "any time": time.monotonic() >= end,
        "first step": "compiled in" in self.printed(),
        "end of an epoch": step >= edge,
        "checkpoint": len(seen) >= nth,
        "evaluation": step == STEPS or (self._meanwhile and step == last),
      }[moment]:
        pause = {"first step": 0.3, "checkpoint": 0.05, "evaluation": 1.0}
        time.sleep(draw.uniform(0, pause.get(moment, 0)))
        return self.process.is_alive()
      time.sleep(0.002)
    return False

  def kill(self) -> str:
    """Where the kill hit."""
    self.process.kill()
    self.process.join()
    step, writing = self.step(), bool(self.unfinished_checkpoints())
    judged = f"evaluated at step {step}:" in self.printed()
    if writing:
      return "writing a checkpoint"
    if step < 0:
      return "first step" if "compiled in" in self.printed() else "starting"
    if step == STEPS or (self._meanwhile and step % JUDGE_EVERY == 0 and not judged):
      return "evaluating"
    return "end of an epoch" if step % EPOCH == 0 else "mid-epoch"

  def finish(self) -> None:
    self.process.join()
    if self.process.exitcode:
      raise RuntimeError(f"{self.folder}: exit status {self.process.exitcode}\n{self.printed()}")


def outcome(folder: Path) -> dict[str, Any]:
  """What must not depend on kills."""
  record = json.loads((folder / "results.json").read_text())
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return {
    "digest": record["state_digest"],
    "metrics": [{k: v for k, v in line.items() if k not in RATES} for line in lines],
    "evaluation": record["results"],
  }


def soak(
  forks: Any, name: str, *, kills: int, root: Path, draw: random.Random
) -> dict[str, int | str]:
  """Kills runs of one kind until there were `kills`."""
  arguments = [f"--config=configs/smoke.py:{RUNS[name][0]}", *RUNS[name][1:], *SHARED]
  label = re.sub(r"\W+", "-", name)

  def start(folder: Path) -> Command:
    return Command(forks, [*arguments, f"--workdir={folder}"], folder)

  whole = start(root / f"{label}-whole")
  whole.finish()  # compiles
  again, began = start(root / f"{label}-again"), time.monotonic()
  again.finish()
  seconds, want = time.monotonic() - began, outcome(whole.folder)
  equal = Counter({k: outcome(again.folder)[k] == v for k, v in want.items()})
  hits, runs = Counter(), 1
  while hits.total() < kills:
    folder = root / f"{label}-{runs}"
    for _ in range(min(KILLS_A_RUN, kills - hits.total())):
      command = start(folder)
      if not command.wait_for(draw.choice(MOMENTS), draw, seconds):
        break
      hits[command.kill()] += 1
    command.finish() if not command.process.exitcode else start(folder).finish()
    got = outcome(folder)
    equal.update({k: got[k] == v for k, v in want.items()})
    runs += 1
    print(f"{name}: {hits.total()} kills, {runs} runs, equal: {dict(equal)}", flush=True)
  places = ("starting", "first step", "mid-epoch", "end of an epoch", "writing a checkpoint",
            "evaluating")  # fmt: skip
  return {"what": name, "kills": hits.total(), **{p: hits[p] for p in places}, "runs": runs} | {
    f"equal {k}": f"{equal[k]} of {runs}" for k in want
  }


def soak_table(*, kills: int, root: Path, draw: random.Random) -> dict[str, Any]:
  """Kills ssrl_jax.tables with its children, then lets it end: the cells of one left alone."""
  spec = root / "soak.py"
  spec.write_text(TABLE)

  def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ssrl_jax.tables", f"--table={spec}", f"--workdir={folder}"]
    log = folder.with_suffix(".out").open("a")
    return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)

  def cells(folder: Path) -> list[Any]:
    record = json.loads((folder / "soak-local.json").read_text())
    digests = [outcome(f)["digest"] for f in sorted((folder / "runs").iterdir())]
    return [[row["cells"] for row in record["rows"]], digests]

  began = time.monotonic()
  if start(root / "table-whole").wait():
    raise RuntimeError((root / "table-whole.out").read_text())
  seconds, done = time.monotonic() - began, 0
  while done < kills:
    process = start(root / "table-killed")
    try:
      process.wait(draw.uniform(0, seconds / 2))
      break
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      done += 1
      print(f"table: {done} kills", flush=True)
  start(root / "table-killed").wait()
  same = cells(root / "table-killed") == cells(root / "table-whole")
  return {"what": "table of 4 runs", "kills": done, "equal evaluation": str(same)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=200)
  parser.add_argument("--tables", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--methods", default="all", help="of RUNS, separated by semicolons")
  parser.add_argument("--name", default="soak")
  options = parser.parse_args()
  names = list(RUNS) if options.methods == "all" else options.methods.split(";")
  draw, rows = random.Random(options.seed), []
  with tempfile.TemporaryDirectory(prefix="ssrl_jax_soak_") as root:
    os.environ |= QUICK | {"JAX_COMPILATION_CACHE_DIR": f"{root}/compiled"}
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["ssrl_jax.main"])
    for i, name in enumerate(names):
      kills = options.kills * (i + 1) // len(names) - options.kills * i // len(names)
      rows.append(soak(forks, name, kills=kills, root=Path(root), draw=draw))
      write_results(options.name, rows)
    if options.tables:
      row = soak_table(kills=options.tables, root=Path(root), draw=draw)
      write_results(options.name, [*rows, dict.fromkeys(rows[0], "") | row])
  if any(row[key] != f"{row['runs']} of {row['runs']}" for row in rows for key in row
         if key.startswith("equal")):  # fmt: skip
    sys.exit("not all are equal")


if __name__ == "__main__":
  main()
