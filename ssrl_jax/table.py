"""What a results table is: rows that are trained, columns that are judged, claims beside them.

A table's file, such as configs/tables/linear.py, has `get_table(budget) -> Table`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ssrl_jax.config import change, flatten, load_file
from ssrl_jax.evaluate.suite import TITLES, select
from ssrl_jax.experiment import check_effects
from ssrl_jax.options import nearest, nearest_key

DATA = "{data}"  # in a value of a table: the folder of the data sets, wherever that is
BUDGETS = ("local", "paper")


class Training(NamedTuple):
  """What is trained: a recipe and what a table changes in it."""

  recipe: str  # configs/FILE.py:METHOD
  # {path in the config: value}; DATA in a value stands for --data
  overrides: Mapping[str, Any] = {}

  @property
  def name(self) -> str:
    """Readable, and another one for other overrides."""
    file, _, method = self.recipe.partition(":")
    text = json.dumps([self.recipe, sorted(self.overrides.items())], default=list)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{Path(file).stem}-{method}-{digest}"


class Judge(NamedTuple):
  """How a trained encoder is judged: protocols, and their options where they are not the run's."""

  evals: str  # "knn,linear"
  options: Mapping[str, Any] = {}  # {"evaluate.knn.k": 10, "data.source": ...}
  of: str = ""  # a Training's `name`: another run, for what compares two


class Row(NamedTuple):
  title: str
  training: Training
  seeds: tuple[int, ...] = (0,)
  encoder: str = "trained"  # or random_init, raw_pixels: the controls of that training
  claims: Mapping[str, float] = {}  # {title of a column: what the source claims}


class Column(NamedTuple):
  title: str
  judge: str  # key of Table.judges, or "run": results.json of the run itself
  figure: str  # "linear/accuracy"; of "run": see `run_figures`
  decimals: int = 1


class Table(NamedTuple):
  title: str
  text: str  # what it shows, on which data, at which budget
  source: str  # of the claims: paper, data, encoder
  rows: tuple[Row, ...]
  columns: tuple[Column, ...]
  judges: Mapping[str, Judge]
  subject: str = ""  # title of the row whose gaps to `baselines` are shown
  baselines: tuple[str, ...] = ()


def load_table(spec: str) -> tuple[str, Table]:
  """ "configs/tables/linear.py:local" -> "linear-local", its table.

  Raises:
    ValueError, FileNotFoundError: no such file or budget, or a row, column or option that names
      nothing.
  """
  path, _, budget = spec.partition(":")
  budget = budget or BUDGETS[0]
  if budget not in BUDGETS:
    raise ValueError(nearest(budget, BUDGETS, "budget"))
  table = load_file(path).get_table(budget)
  titles = [row.title for row in table.rows]
  for title in (*table.baselines, *filter(None, [table.subject])):
    if title not in titles:
      raise ValueError(f"{path}: {nearest(title, titles, 'row')}")
  if len(set(titles)) < len(titles):
    raise ValueError(f"{path}: two rows have one title")
  for row in table.rows:
    resolve(row.training)
    if row.encoder not in TITLES:
      raise ValueError(f"{path}: {nearest(row.encoder, TITLES, 'encoder')}")
    for title in row.claims:
      if title not in [c.title for c in table.columns]:
        raise ValueError(f"{path}: {nearest(title, [c.title for c in table.columns], 'column')}")
  for column in table.columns:
    if column.judge not in (*table.judges, "run"):
      raise ValueError(f"{path}: {nearest(column.judge, (*table.judges, 'run'), 'judge')}")
  for judge in table.judges.values():
    select(judge.evals)
    others = [row.training.name for row in table.rows]
    if judge.of and judge.of not in others:
      raise ValueError(f"{path}: {nearest(judge.of, others, 'training')}")
    for row in table.rows:
      _check_options(judge, resolve(row.training))
  return f"{Path(path).stem}-{budget}", table


def load_tables(spec: str) -> list[tuple[str, Table]]:
  """Those of a file, or of all files of a folder: "configs/tables:paper".

  Raises:
    ValueError, FileNotFoundError: as `load_table`; a folder without tables.
  """
  path, _, budget = spec.partition(":")
  if not Path(path).is_dir():
    return [load_table(spec)]
  files = sorted(f for f in Path(path).glob("*.py") if f.name != "__init__.py")
  if not files:
    raise FileNotFoundError(f"{path} holds no table files; tables are in configs/tables/")
  return [load_table(f"{file}:{budget}") for file in files]


def resolve(training: Training) -> ConfigDict:
  """The config of a training."""
  path, _, method = training.recipe.partition(":")
  config = load_file(path).get_config(*filter(None, [method]))
  change(config, dict(training.overrides))
  check_effects(config, training.overrides)
  return config


def _check_options(judge: Judge, config: ConfigDict) -> None:
  known = [key for key in flatten(config) if key.split(".")[0] in ("evaluate", "data")]
  for key in judge.options:
    if key not in known:
      raise ValueError(nearest_key(key, known, "option of an evaluation"))
