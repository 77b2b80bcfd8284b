"""Who is served worse: the linear probe's accuracy class by class and group by group."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.evaluate.linear import fit_probe


def run(
  evaluation: Evaluation,
  *,
  groups: str = "",
  min_count: int = 10,
  probe_epochs: int = 50,
  seed: int = 0,
) -> dict[str, float]:
  """Per-class and per-group accuracy of the probe of `linear.run`, and the worst of each.

  The worst group's accuracy is the measure of Sagawa et al. 2020 (distributionally robust neural
  networks). Test pictures without a label are left out.

  Args:
    groups: which group each test picture is in: a .npy of whole numbers, or a .csv with a column
      "group" of any words, a row for each test picture by position; -1 or an empty cell: in none.
    min_count: classes and groups with fewer labelled test pictures are in the table and in none of
      the figures but accuracy: that of a handful is mostly chance.
    probe_epochs: of the linear probe; its other settings are the defaults of `linear.run`.
    seed: of the probe.

  Returns:
    bias/accuracy: percent of all labelled test pictures.
    bias/class_mean, bias/class_std, bias/worst_class, bias/class_gap: mean, standard deviation and
      minimum of the classes' accuracies, and maximum - minimum; percent.
    bias/worst_class_index: the number of that class.
    bias/group_mean, bias/worst_group, bias/group_gap: likewise, with `groups`.
    bias/num_groups: all of them, with `groups`.
    bias/ungrouped: labelled test pictures in no group, with `groups`.
    The whole table is bias.csv in the evaluation's folder.
  """
  if min_count < 1:
    raise ValueError(f"bias: min_count is {min_count}; expected at least 1")
  group_of = read_groups(groups, len(evaluation.test)) if groups else None
  probe = fit_probe(evaluation, epochs=probe_epochs, seed=seed)
  test, _ = evaluation.labelled("test")
  right = probe.logits(test.features).argmax(1) == test.labels
  names = evaluation.test.class_names or range(evaluation.num_classes)
  classes = tally(right, np.array([str(names[label]) for label in test.labels]))
  shown = _reliable(classes, min_count, "class")
  worst = min(shown, key=shown.get)
  values = list(shown.values())
  figures = {
    "bias/accuracy": 100 * float(np.mean(right)),
    "bias/class_mean": float(np.mean(values)),
    "bias/class_std": float(np.std(values)),
    "bias/worst_class": min(values),
    "bias/class_gap": max(values) - min(values),
    "bias/worst_class_index": float([str(n) for n in names].index(worst)),
  }
  tables = {"class": classes}
  if group_of is not None:
    group_N = group_of[test.ids]
    inside = group_N != ""
    tables["group"] = tally(right[inside], group_N[inside])
    values = list(_reliable(tables["group"], min_count, "group").values())
    figures |= {
      "bias/group_mean": float(np.mean(values)),
      "bias/worst_group": min(values),
      "bias/group_gap": max(values) - min(values),
      "bias/num_groups": float(len(tables["group"])),
      "bias/ungrouped": float(np.sum(~inside)),
    }
  if folder := evaluation.own_folder():
    _write(folder / "bias.csv", tables)
  return figures


def tally(right_N: np.ndarray, name_N: np.ndarray) -> dict[str, tuple[int, float]]:
  """{name: (number of rows, percent right)}, in the order of the names."""
  found = {}
  for name in np.unique(name_N):
    rows = right_N[name_N == name]
    found[str(name)] = len(rows), 100 * float(np.mean(rows))
  return found


def _reliable(table: dict[str, tuple[int, float]], least: int, what: str) -> dict[str, float]:
  """{name: percent} of those with enough rows."""
  found = {name: accuracy for name, (n, accuracy) in table.items() if n >= least}
  if not found:
    raise ValueError(
      f"bias: no {what} has {least} labelled test pictures; lower evaluate.bias.min_count"
    )
  return found


def read_groups(path: str, num_test: int) -> np.ndarray:
  """The group of each test picture as a string, "" for none.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not one group for each test picture, or no such column.
  """
  file = Path(path).expanduser()
  if not file.exists():
    raise FileNotFoundError(f"bias.groups: no file {file}; give a .npy or .csv")
  if file.suffix == ".npy":
    found = np.load(file, allow_pickle=False)
    if found.dtype.kind not in "iu" or found.ndim != 1:
      raise ValueError(f"{file} holds {found.dtype} {found.shape}; expected whole numbers [N]")
    groups = np.where(found < 0, "", found.astype(str))
  elif file.suffix == ".csv":
    with file.open(newline="", encoding="utf-8-sig") as opened:
      reader = csv.DictReader(opened)
      if "group" not in (reader.fieldnames or ()):
        raise ValueError(f"{file} has columns {reader.fieldnames}; one must be 'group'")
      groups = np.array([(row["group"] or "").strip() for row in reader], str)
    groups = np.where(groups == "-1", "", groups)
  else:
    raise ValueError(f"bias.groups is {path!r}; expected a .npy or .csv file")
  if len(groups) != num_test:
    raise ValueError(
      f"{file} has {len(groups)} groups, but there are {num_test} test pictures; one row each"
    )
  return groups


def _write(path: Path, tables: dict[str, dict[str, tuple[int, float]]]) -> None:
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["kind", "name", "num_pictures", "accuracy"])
    for kind, table in tables.items():
      for name, (n, accuracy) in table.items():
        writer.writerow([kind, name, n, f"{accuracy:.4f}"])
