"""Stability of training: spread over seeds, and what another learning rate does."""

from configs.tables import CIFAR_TEXT, IMAGENET_TEXT, cifar, frozen, imagenet
from ssrl_jax.table import Column, Judge, Row, Table, resolve

# The seeds of each factor of the learning rate.
SEEDS = {0.1: (0,), 1.0: (0, 1, 2), 3.0: (0,)}


def get_table(budget: str) -> Table:
  evals, figure = frozen(budget)
  local = budget == "local"
  train = cifar if local else imagenet
  rows = []
  for method in ("fusion", "simclr", "swav"):
    base = resolve(train(method)).optim.learning_rate
    for factor, seeds in SEEDS.items():
      changes = {} if factor == 1 else {"optim.learning_rate": base * factor}
      title = f"{method}, learning rate x {factor:g}"
      rows.append(Row(title, train(method, changes), seeds))
  return Table(
    title="Stability",
    text=CIFAR_TEXT if local else IMAGENET_TEXT,
    source="",
    rows=tuple(rows),
    columns=(
      Column("k-NN %", "frozen", "knn/accuracy"),
      Column("linear %", "frozen", figure),
      Column("diverged", "run", "diverged", decimals=2),
    ),
    judges={"frozen": Judge(evals)},
  )
