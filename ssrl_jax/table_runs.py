"""What folders of runs hold of a table: its figures, what they cost, and what is missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from ssrl_jax.evaluate.suite import select
from ssrl_jax.files import read_json
from ssrl_jax.table import Column, Judge, Row, Table, Training
from ssrl_jax.watch import costs_file


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


def figures_of(path: Path) -> dict[str, dict[str, float]]:
  return read_json(path)["results"] if path.exists() else {}


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


def run_figures(folder: Path) -> dict[str, float]:
  """Of the run itself: cost, and whether it diverged.

  minutes: wall clock. cpu_minutes: processor time over all threads; less where an earlier run of
  the folder had compiled the same program. Both of the first process, over all starts of the run
  (watch.Costs).
  images_per_second: median over the log. diverged: 1 where the loss was not finite.
  """
  if diverged(folder):
    return {"diverged": 1.0}
  record = read_json(folder / "results.json")
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
    costs = [read_json(path)["cpu_seconds"] for path in paths if path.exists()]
    known = f"known of {len(costs)}, " if len(costs) < len(paths) else ""
    return f"{what} {sum(costs) / 3600:.2g} CPU hours ({known}of {len(paths)})"

  return f"{told(trained, 'trainings')}, {told(judged, 'evaluations')}"
