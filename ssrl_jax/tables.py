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
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from absl import flags

from ssrl_jax.command_line import print_line, run_command
from ssrl_jax.config import HARMLESS, flatten
from ssrl_jax.dry_run import ASSUMED_MFU, REFERENCE_DEVICE, assumed_experiment, cost
from ssrl_jax.evaluate.suite import select
from ssrl_jax.files import check_folder, write_json
from ssrl_jax.flops import measured_matmul_flops
from ssrl_jax.run_folder import load_config, wait_until_free
from ssrl_jax.table import DATA, Judge, Table, load_tables, resolve
from ssrl_jax.table_runs import (
  Run,
  diverged,
  finished,
  judged_file,
  measured,
  missing,
  runs_of,
  spent,
)
from ssrl_jax.table_text import write_table

# Of a run's config, what says nothing about the trained encoder, or differs from run to run.
NO_MATTER = (*(key for key in HARMLESS if key not in ("epochs", "steps")), "data.source", "seed")
Execute = Callable[[list[str], Path], int]  # (command, log) -> exit status


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


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
