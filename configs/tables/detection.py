"""Detection on an encoder's maps: Zhang 2026 claims about +2.5 mAP."""

from configs.tables import IMAGENET_TEXT, PAPER_BATCH, PHOTOS_TEXT, imagenet, photos
from ssrl_jax.table import DATA, Column, Judge, Row, Table

STEPS = {"local": 200, "paper": 6_000}


def get_table(budget: str) -> Table:
  local = budget == "local"
  train = photos if local else imagenet
  rows = [Row(method, train(method)) for method in ("fusion", "simclr", "swav")]
  rows += [
    Row("random init", train("simclr"), encoder="random_init"),
    Row("random init, encoder of fusion", train("fusion"), encoder="random_init"),
  ]
  names = (
    {"blood cells": "bccd240", "nuclei": "nuclei"} if local else {"COCO": "coco", "VOC": "voc"}
  )
  options = {
    **({} if local else {"evaluate.detection.batch_size": PAPER_BATCH}),
    "evaluate.detection.steps": STEPS[budget],
    "evaluate.detection.size": 160 if local else 800,
    "evaluate.detection.stride": 8 if local else 4,
    "evaluate.detection.levels": 3 if local else 4,
  }
  columns, judges = [], {}
  for name, folder in names.items():
    judged = {"evaluate.detection.source": f"coco:{DATA}/{folder}", **options}
    judges[name] = Judge("detection", judged | {"evaluate.detection.finetune": True})
    judges[f"{name}, frozen"] = Judge("detection", judged)
    for figure in ("AP", "AP50", "AP75"):
      columns.append(Column(f"{name} {figure}", name, f"detection/{figure}"))
    columns.append(Column(f"{name}, frozen AP", f"{name}, frozen", "detection/AP"))
  return Table(
    title="Detection",
    text=f"{PHOTOS_TEXT} An FCOS head on strides 8 to 32, trained for 200 steps of 16 pictures at "
    "160 px, the encoder with it or frozen."
    if local
    else f"{IMAGENET_TEXT} COCO and VOC in COCO's format.",
    source="",
    rows=tuple(rows),
    columns=tuple(columns),
    judges=judges,
    subject="fusion",
    baselines=tuple(r.title for r in rows[1:]),
  )
