"""Accuracy under noise and the other corruptions: Zhang 2026 claims 7.5 points under noise."""

from configs.tables import CIFAR_TEXT, IMAGENET_TEXT, cifar, imagenet
from ssrl_jax.table import Column, Judge, Row, Table


def get_table(budget: str) -> Table:
  local = budget == "local"
  train = cifar if local else imagenet
  seeds = (0, 1) if local else (0,)
  rows = [Row(method, train(method), seeds) for method in ("fusion", "simclr", "swav")]
  noise = {"global_views.noise": (0.5,)}
  rows += [
    *(Row(f"{m}, noise in the views", train(m, noise)) for m in ("fusion", "simclr")),
    Row("supervised", train("supervised"), (0,)),
    Row("random init", train("simclr"), seeds, encoder="random_init"),
    Row("random init, encoder of fusion", train("fusion"), seeds, encoder="random_init"),
  ]
  options = {"evaluate.robustness.num_test": 500} if local else {}
  figures = {
    "clean %": "clean",
    "mean of 75 %": "mean",
    "noise %": "noise",
    "sigma 0.1 %": "sigma_0.1",
  }
  return Table(
    title="Robustness",
    text=f"{CIFAR_TEXT} Linear probe on clean pictures, judged on 500 test pictures at the "
    "severities of CIFAR-10-C. The abstract of Zhang 2026 claims +7.5 points under noise, without "
    "naming noise, data or baseline."
    if local
    else f"{IMAGENET_TEXT} ImageNet-C's severities.",
    source="",
    rows=tuple(rows),
    columns=tuple(Column(t, "robustness", f"robustness/{f}") for t, f in figures.items()),
    judges={"robustness": Judge("robustness", options)},
    subject="fusion",
    baselines=tuple(r.title for r in rows[1:]),
  )
