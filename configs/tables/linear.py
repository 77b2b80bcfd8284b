"""Linear accuracy of frozen features: Zhang 2026's main table."""

from configs.tables import CIFAR_TEXT, IMAGENET_TEXT, cifar, frozen, imagenet
from ssrl_jax.table import Column, Judge, Row, Table


def get_table(budget: str) -> Table:
  evals, figure = frozen(budget)
  local = budget == "local"
  train = cifar if local else imagenet
  seeds = (0, 1, 2) if local else (0,)
  rows = [
    Row("fusion", train("fusion"), seeds, claims={"linear %": 77.8}),
    Row("simclr", train("simclr"), seeds, claims={"linear %": 69.3}),
    Row("swav", train("swav"), seeds, claims={"linear %": 75.3}),
  ]
  if local:  # as many numbers an image as fusion has
    fair = {"encoder.fusion.enabled": True}
    rows += [Row(f"{m}, encoder of fusion", train(m, fair)) for m in ("simclr", "swav")]
  rows += [
    Row("random init", train("simclr"), seeds, encoder="random_init"),
    Row("random init, encoder of fusion", train("fusion"), seeds, encoder="random_init"),
  ]
  return Table(
    title="Linear evaluation",
    text=CIFAR_TEXT if local else IMAGENET_TEXT,
    source="Zhang 2026 (ISTAER2616), ImageNet-1k; of the baselines as its stated leads imply",
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
