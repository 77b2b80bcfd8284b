"""python -m ssrl_jax.tables --table=configs/tables/NAME.py[:BUDGET] --workdir=DIR [--data=DIR]

One command for one results table, or with --table=configs/tables[:BUDGET] for all of that folder.
It trains what is missing (and goes on with what was stopped), evaluates what is missing, and writes
DIR/NAME-BUDGET.md, .csv, .tex, .png and .json. What was not run is shown as not run. Tables that
share a folder share its runs. BUDGET: local (the default, for two CPU cores and the sets below
--data, laid out as configs/tables/__init__.py says) or paper (the publications' settings, for
pods).
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from ssrl_jax.command_line import print_line, run_command
from ssrl_jax.config import HARMLESS, flatten
from ssrl_jax.dry_run import ASSUMED_MFU, REFERENCE_DEVICE, assumed_experiment, cost
from ssrl_jax.evaluate.suite import select
from ssrl_jax.files import check_folder, read_json, write_json
from ssrl_jax.flops import measured_matmul_flops
from ssrl_jax.run_folder import load_config, wait_until_free
from ssrl_jax.table import DATA, Column, Judge, Row, Table, Training, load_tables, resolve
from ssrl_jax.table_text import write_table
from ssrl_jax.watch import costs_file

# Of a run's config, what says nothing about the trained encoder, or differs from run to run.
NO_MATTER = (*(key for key in HARMLESS if key not in ("epochs", "steps")), "data.source", "seed")
Execute = Callable[[list[str], Path], int]  # (command, log) -> exit status


class Run(NamedTuple):
  """One training with one seed, and which of its encoders are asked for."""

  training: Training
  seed: int
  encoders: tuple[str, ...]

  def folder(self, workdirs: Sequence[Path]) -> Path:
    """Where it is; if it is nowhere, where it will be: in the first of `workdirs`."""
    return self.copies(workdirs)[0]

  def copies(self, workdirs: Sequence[Path]) -> list[Path]:
    """`folder`, and those with the same trained bytes in others of `workdirs`."""
    name = f"{self.training.name}-{self.seed}"
    folders = [w / "runs" / name for w in workdirs]
    done = [f for f in folders if (f / "results.json").exists()]
    if not done:
      return [next(filter(finished, folders), folders[0])]
    digest = lambda f: read_json(f / "results.json").get("state_digest", f)  # noqa: E731
    return [done[0], *(f for f in done[1:] if digest(f) == digest(done[0]))]


def runs_of(*tables: Table) -> list[Run]:
  """Every training and seed once, in the order of the rows."""
  encoders: dict[tuple[str, int], list[str]] = {}
  trainings: dict[str, Training] = {}
  for row in (row for table in tables for row in table.rows):
    trainings[row.training.name] = row.training
    for seed in row.seeds:
      wanted = encoders.setdefault((row.training.name, seed), [])
      if row.encoder not in wanted:
        wanted.append(row.encoder)
  return [Run(trainings[name], seed, tuple(e)) for (name, seed), e in encoders.items()]


def share_of(tables: Sequence[Table], text: str) -> set[tuple[str, int]]:
  """Name and seed of the trainings that are for one of several machines: "2/3" -> every third.

  Raises:
    ValueError: not i/n with i from 1 to n.
  """
  i, _, n = text.partition("/")
  if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
    raise ValueError(f"--rows is {text!r}; expected i/n with i from 1 to n, e.g. 2/3")
  return {(r.training.name, r.seed) for r in runs_of(*tables)[int(i) - 1 :: int(n)]}


def train_command(run: Run, folder: Path, data: str) -> list[str]:
  overrides = {"seed": run.seed, **run.training.overrides, "evaluate.evals": ""}
  changes = [f"--config.{key}={_as_flag(value, data)}" for key, value in overrides.items()]
  start = [sys.executable, "-m", "ssrl_jax.main", f"--config={run.training.recipe}"]
  # The pictures may have moved since it began; `refuse_outdated` has looked at the rest.
  moved = ["--config.evaluate.report=False", "--allow_config_change=True"]
  return [*start, f"--workdir={folder}", *changes, *moved]


def judge_command(
  judge: Judge, run: Run, folder: Path, out: Path, encoders: Sequence[str], other: Path | None,
  data: str,
) -> list[str]:  # fmt: skip
  own = {k: v for k, v in run.training.overrides.items() if k == "data.source"}
  if own:  # wherever they lie now, as many of them
    data_group = resolve(run.training).data
    own |= {f"data.{key}": data_group[key] for key in ("num_train", "num_test")}
  options = [f"--{key}={_as_flag(value, data)}" for key, value in (own | judge.options).items()]
  start = [sys.executable, "-m", "ssrl_jax.evaluate", f"--workdir={folder}", f"--out={out}"]
  compared = [f"--other={other}"] if other else []
  return [*start, f"--evals={judge.evals}", f"--encoders={','.join(encoders)}", *options, *compared]


def _as_flag(value: Any, data: str) -> str:
  text = str(tuple(value)) if isinstance(value, (list, tuple)) else str(value)
  return text.replace(DATA, data)


def finished(folder: Path) -> bool:
  """Whether a run was trained to its end, or to a loss that is not finite."""
  return (folder / "results.json").exists() or diverged(folder)


def diverged(folder: Path) -> bool:
  """Whether a run ended in a loss that is not finite, and was not brought to its end after all."""
  return (folder / "non_finite.json").exists() and not (folder / "results.json").exists()


def judged_file(run: Run, key: str, judge: Judge, workdirs: Sequence[Path]) -> Path:
  """Where a judge's figures of a run are, or will be: another file for other options."""
  text = json.dumps([judge.evals, sorted(judge.options.items()), judge.of], default=list)
  name = f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
  files = [folder / "judged" / name for folder in run.copies(workdirs)]
  return next((file for file in files if file.exists()), files[0])


def refuse_outdated(table: Table, workdirs: Sequence[Path]) -> None:
  """Refuses runs of a recipe that was changed since: their figures are not the table's.

  Where the pictures lie may differ. A knob that did not exist then has its default. How a run is
  judged is taken from its own config, so that counts too, for what the table asks.

  Raises:
    ValueError: names the runs and what was changed.
  """
  judged = ["evaluate.size", "evaluate.crop"]
  judged += [f"evaluate.{name}." for j in table.judges.values() for name in select(j.evals)]
  judged, given = tuple(judged), {key for j in table.judges.values() for key in j.options}
  for run in runs_of(table):
    path = run.folder(workdirs) / "config.json"
    if path.exists():
      old, new = flatten(load_config(path.parent)), flatten(resolve(run.training))
      counts = lambda k: not k.startswith(NO_MATTER) or k.startswith(judged)  # noqa: E731
      both = {k: (old[k], new[k]) for k in old.keys() & new.keys() - given if counts(k)}
      changed = [
        f"{k} {a} -> {b}" for k, (a, b) in sorted(both.items()) if a != b and DATA not in str(b)
      ]
      if changed:
        raise ValueError(
          f"{path.parent} was trained by an older form of its recipe ({'; '.join(changed)}): move "
          "it away to train it again, or give another --workdir"
        )


def figures_of(path: Path) -> dict[str, dict[str, float]]:
  return json.loads(path.read_text())["results"] if path.exists() else {}


def has_all(figures: Mapping[str, float], judge: Judge, encoder: str) -> bool:
  """Whether every protocol of a judge that can judge this encoder has given its figures."""
  asked = {n for n, p in select(judge.evals).items() if p.pixels or encoder != "raw_pixels"}
  return asked <= {figure.split("/")[0] for figure in figures}


def missing(
  table: Table, workdirs: Sequence[Path]
) -> tuple[list[Run], list[tuple[Run, str, tuple[str, ...]]]]:
  """The runs to train, and of each run the judges and the encoders that they have not seen."""
  to_train, to_judge = [], []
  for run in runs_of(table):
    folder = run.folder(workdirs)
    if not finished(folder):
      to_train.append(run)
    for key, judge in table.judges.items():
      done = figures_of(judged_file(run, key, judge, workdirs))
      left = tuple(e for e in run.encoders if not has_all(done.get(e, {}), judge, e))
      if left and not diverged(folder):
        to_judge.append((run, key, left))
  return to_train, to_judge


def data_lacking(
  tables: Sequence[Table], workdirs: Sequence[Path], *, data: str, share: Set[tuple[str, int]]
) -> list[str]:
  """What is not there of the paths below `data` that the missing ones of `share` read, sorted."""
  asked: list[tuple[Run, Mapping[str, Any]]] = []
  for table in tables:
    to_train, to_judge = missing(table, workdirs)
    asked += [(run, run.training.overrides) for run in to_train]
    for run, key, _ in to_judge:
      judge, source = table.judges[key], run.training.overrides.get("data.source", "")
      own = {p.needs for p in select(judge.evals).values()} <= {"nothing"}  # pictures of its own
      asked.append((run, ({} if own else {"data.source": source}) | dict(judge.options)))
  values = [v for run, o in asked if (run.training.name, run.seed) in share for v in o.values()]
  texts = [str(t) for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]
  paths = {data + text.partition(DATA)[2] for text in texts if DATA in text}
  there = lambda p: os.path.exists(p) or glob.glob(p, recursive=True)  # noqa: E731
  return sorted(p for p in paths if not there(os.path.expanduser(p)))


def execute(command: list[str], log: Path) -> int:
  """Runs a command; what it prints goes to `log`, behind what is there.

  Ctrl-C waits for it to save what it has come to; a second one does not.
  """
  log.parent.mkdir(parents=True, exist_ok=True)
  with (
    log.open("a") as file,
    subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process,
  ):
    try:
      return process.wait()
    except KeyboardInterrupt:
      print("interrupted: waiting for what runs to save", file=sys.stderr)
      process.terminate()  # a terminal has told it already, kill has not
      process.wait()
      raise


def make(
  table: Table,
  workdirs: Sequence[Path],
  *,
  data: str = "data",
  share: Set[tuple[str, int]] | None = None,
  run_command: Execute = execute,
  say: Callable[[str], None] = print_line,
) -> list[str]:
  """Trains and evaluates what is missing (of `share_of`, if given); returns a line a failure."""
  mine = share_of([table], "1/1") if share is None else share
  failed: list[str] = []

  def do(command: list[str], run: Run, what: str) -> None:
    folder = run.folder(workdirs)
    say(f"{folder.name}: {what}")
    log, last = folder / "table.log", ""
    try:
      status: int | str = run_command(command, log)
    except OSError as error:  # of the log: a folder that cannot be written
      status, last = "no start", str(error)
    if what == "train" and status:  # another table may have begun the same run just before
      wait_until_free(folder, say)
      status = 0 if finished(folder) else status
    if status and not diverged(folder):
      if not last and log.exists():
        last = " ".join(log.read_text().strip().splitlines()[-1:])
      failed.append(f"{folder.name}: {what} failed with {status}: {last}")
      say(failed[-1])

  to_train, _ = missing(table, workdirs)
  for run in to_train:
    folder = run.folder(workdirs)
    if (run.training.name, run.seed) in mine:
      wait_until_free(folder, say)  # of a table's process that was killed, and its training not
      if not finished(folder):
        do(train_command(run, folder, data), run, "train")
  _, to_judge = missing(table, workdirs)
  by_name = {r.training.name: r for r in reversed(runs_of(table))}
  for run, key, encoders in to_judge:
    folder, judge = run.folder(workdirs), table.judges[key]
    if (run.training.name, run.seed) in mine and finished(folder):
      other = by_name[judge.of].folder(workdirs) if judge.of else None
      if other and not (other / "results.json").exists():
        continue  # of another share, and not trained to its end yet
      out = judged_file(run, key, judge, workdirs)
      do(
        judge_command(judge, run, folder, out, encoders, other, data),
        run,
        f"{key} of {', '.join(encoders)}",
      )
  return failed


def run_figures(folder: Path) -> dict[str, float]:
  """Of the run itself: cost, and whether it diverged.

  minutes: wall clock. cpu_minutes: processor time over all threads; less where an earlier run of
  the folder had compiled the same program. Both of the first process, over all starts of the run
  (watch.Costs).
  images_per_second: median over the log. diverged: 1 where the loss was not finite.
  """
  if diverged(folder):
    return {"diverged": 1.0}
  record = json.loads((folder / "results.json").read_text())
  return {
    "diverged": 0.0,
    "minutes": record["wall_seconds"] / 60,
    "cpu_minutes": record["cpu_seconds"] / 60,
    "images_per_second": record["images_per_second"],
    "step": record["step"],
  }


def values(table: Table, row: Row, column: Column, workdirs: Sequence[Path]) -> dict[int, float]:
  """{seed: figure} of what there is."""
  found = {}
  for seed in row.seeds:
    run = Run(row.training, seed, (row.encoder,))
    folder = run.folder(workdirs)
    if not finished(folder):
      continue
    if column.judge == "run":
      figures = run_figures(folder) if row.encoder == "trained" else {}
    else:
      path = judged_file(run, column.judge, table.judges[column.judge], workdirs)
      figures = figures_of(path).get(row.encoder, {})
    if figures.get(column.figure) is not None:
      found[seed] = float(figures[column.figure])
  return found


def spent(tables: Sequence[Table], workdirs: Sequence[Path]) -> str:
  """A line: what the trainings and evaluations that there are have cost, shared ones once."""
  trained: set[Path] = set()
  judged: set[Path] = set()
  for table in tables:
    for run in runs_of(table):
      folder = run.folder(workdirs)
      trained |= {folder / "costs.json"} if finished(folder) else set()
      files = (judged_file(run, k, judge, workdirs) for k, judge in table.judges.items())
      judged |= {costs_file(file) for file in files if file.exists()}

  def told(paths: Set[Path], what: str) -> str:
    """Of how many the costs are known is said where some, of before they were kept, have none."""
    costs = [json.loads(path.read_text())["cpu_seconds"] for path in paths if path.exists()]
    known = f"known of {len(costs)}, " if len(costs) < len(paths) else ""
    return f"{what} {sum(costs) / 3600:.2g} CPU hours ({known}of {len(paths)})"

  return f"{told(trained, 'trainings')}, {told(judged, 'evaluations')}"


def machines(table: Table, workdirs: Sequence[Path]) -> list[str]:
  """What the trainings that there are were made on, and with."""
  found = set()
  for folder in (run.folder(workdirs) for run in runs_of(table)):
    record = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    if "devices" in record and "versions" in record:
      on, using = record["devices"], record["versions"]
      found.add(
        f"{on['count']} x {on['kind']}, {on['host_cores']} cores of {on['host']}, jax "
        f"{using['jax']}, Python {using['python']}"
      )
  return sorted(found)


def plan(
  tables: Sequence[Table],
  workdirs: Sequence[Path],
  *,
  share: Set[tuple[str, int]],
  say: Callable[[str], None],
) -> None:
  """Prints what is missing (of `share_of`) and what training it would cost."""
  to_train: dict[tuple[str, int], Run] = {}
  to_judge: set[Path] = set()
  for table in tables:
    runs, judged = missing(table, workdirs)
    to_train |= {(r.training.name, r.seed): r for r in runs if (r.training.name, r.seed) in share}
    for run, key, _ in [j for j in judged if (j[0].training.name, j[0].seed) in share]:
      to_judge.add(judged_file(run, key, table.judges[key], workdirs))
  here = measured_matmul_flops() * ASSUMED_MFU * 3600
  total_reference = total_here = 0.0
  say(f"{'run':<44}{'steps':>9}{'FLOP a step':>13}{'FLOPs':>10}{'H200 h':>9}{'here h':>9}")
  costs: dict[str, Any] = {}
  for run in to_train.values():
    name = run.training.name
    if name not in costs:
      costs[name] = cost(assumed_experiment(resolve(run.training)))
    c = costs[name]
    total_reference, total_here = total_reference + c.device_hours, total_here + c.flops / here
    say(
      f"{name + '-' + str(run.seed):<44}{c.steps:>9,}{c.flops_per_step:>13.3g}{c.flops:>10.2g}"
      f"{c.device_hours:>9.2g}{c.flops / here:>9.2g}"
    )
  say(
    f"{len(to_train)} trainings, {len(to_judge)} evaluations missing; training: "
    f"{total_reference:.2g} device-hours of {REFERENCE_DEVICE} (data sheet), {total_here:.2g} "
    f"hours here (matrix product measured now), both at an assumed {ASSUMED_MFU:.0%} MFU; "
    "evaluations are not in it"
  )


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string("table", "", "configs/tables/NAME.py[:BUDGET], or their folder.", values)
  flags.DEFINE_string("workdir", "", "Folder of runs and tables.", values)
  flags.DEFINE_string("data", "data", "Folder of the data sets of the local budget.", values)
  flags.DEFINE_string(
    "rows",
    "1/1",
    "i/n: of all trainings every n-th from the i-th on, to spread them over machines or cores.",
    values,
  )
  flags.DEFINE_string(
    "merge",
    "",
    "Other folders with runs, separated by commas; evaluations that these lack are written there.",
    values,
  )
  flags.DEFINE_bool(
    "plan", False, "Print steps, FLOPs and estimated hours of what is missing; run nothing.", values
  )
  flags.DEFINE_bool("report", False, "Write the table of what there is; run nothing.", values)


def cli(argv: list[str]) -> int:
  def program(v: flags.FlagValues) -> int:
    tables = load_tables(v.table)
    others = [Path(w).expanduser() for w in v.merge.split(",") if w]
    workdirs = [Path(v.workdir).expanduser(), *others]
    check_folder(workdirs[0], "--workdir")
    for folder in others:
      if not (folder / "runs").is_dir():
        raise ValueError(f"--merge: {folder} holds no runs of tables")
    for _, table in tables:
      refuse_outdated(table, workdirs)
    share = share_of([table for _, table in tables], v.rows)
    lacking = data_lacking([t for _, t in tables], workdirs, data=v.data, share=share)
    message = (
      f"no {', '.join(lacking)}, which the tables still need: lay out --data as "
      "configs/tables/__init__.py says, or name another --data or --table"
    )
    if lacking and not (v.plan or v.report):
      raise FileNotFoundError(message)
    if v.plan:
      if lacking:
        logging.warning(message)
      plan([table for _, table in tables], workdirs, share=share, say=print_line)
      return 0
    # What one command compiles, others load: seeds of a row, evaluations of an encoder.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((workdirs[0] / "compiled").resolve()))
    # On a CPU XLA's buffers are made anew each step: with glibc's large pages, not page by page.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    command = shlex.join(["python", "-m", "ssrl_jax.tables", *argv[1:]])
    workdirs[0].mkdir(parents=True, exist_ok=True)
    failed = []
    for name, table in tables:
      failed += [] if v.report else make(table, workdirs, data=v.data, share=share)
      record = measured(table, workdirs)
      write_json(workdirs[0] / f"{name}.json", record | {"command": command})
      print_line(write_table(workdirs[0] / name, record, command=command))
    print_line(f"cost: {spent([table for _, table in tables], workdirs)}")
    for line in failed:
      print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0

  return run_command(argv, __doc__, define_flags, program, needed=("table", "workdir"))


def measured(table: Table, workdirs: Sequence[Path]) -> dict[str, Any]:
  """Everything that a table shows, as what JSON gives back: a seed in `cells` is a string."""
  rows = []
  for row in table.rows:
    found = {c.title: values(table, row, c, workdirs) for c in table.columns}
    cells = {title: {str(s): v for s, v in cell.items()} for title, cell in found.items()}
    rows.append(
      {
        "title": row.title, "recipe": row.training.recipe, "encoder": row.encoder,
        "overrides": dict(row.training.overrides), "seeds": list(row.seeds),
        "claims": dict(row.claims), "cells": cells,
      }
    )  # fmt: skip
  return {
    "title": table.title, "text": table.text, "source": table.source, "rows": rows,
    "columns": [c._asdict() for c in table.columns], "subject": table.subject,
    "baselines": list(table.baselines), "machines": machines(table, workdirs),
    "cost": spent([table], workdirs),
    "judges": {k: {"evals": j.evals, "options": dict(j.options)} for k, j in table.judges.items()},
  }  # fmt: skip


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
