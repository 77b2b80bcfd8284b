"""What each part of the fusion system is worth: one row without it, all else equal."""

from collections.abc import Mapping
from typing import Any

from configs.tables import CIFAR_TEXT, IMAGENET_TEXT, NOTHING, cifar, frozen, imagenet
from ssrl_jax.table import Column, Judge, Row, Table, Training

LOCAL = {"local_views.count": 2, "local_views.area": (0.05, 0.2)}


def get_table(budget: str) -> Table:
  evals, figure = frozen(budget)
  local = budget == "local"

  def train(changes: Mapping[str, Any] = NOTHING) -> Training:
    return cifar("fusion", changes) if local else imagenet("fusion", changes)

  small = {**LOCAL, "local_views.size": 16 if local else 96}
  parts = {
    "without fusion": {"encoder.fusion.enabled": False},
    "without supervision of each scale": {"method.scale_weight": 0.0},
    "without supervision of each place": {"method.place_weight": 0.0},
    "without constraint": {"method.constraint": "none"},
    "without consistency": {"method.consistency_weight": 0.0},
    "moving-average branch instead of the views' mean": {"method.target": "momentum"},
    "variance-covariance instead of coding rate": {"method.constraint": "variance_covariance"},
    "with local views": small,
  }
  seeds = (0, 1, 2) if local else (0,)  # of the whole: how much chance is in a figure
  rows = [Row("fusion", train(), seeds)]
  rows += [Row(title, train(changes), (0,)) for title, changes in parts.items()]
  rows.append(Row("random init", train(), seeds, encoder="random_init"))
  return Table(
    title="Ablation of fusion",
    text=CIFAR_TEXT if local else IMAGENET_TEXT,
    source="",
    rows=tuple(rows),
    columns=(
      Column("k-NN %", "frozen", "knn/accuracy"),
      Column("linear %", "frozen", figure),
      Column("CPU minutes", "run", "cpu_minutes"),
    ),
    judges={"frozen": Judge(evals)},
    subject="fusion",
    baselines=tuple(r.title for r in rows[1:]),
  )
