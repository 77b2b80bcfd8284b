"""Segmentation on an encoder's maps: Zhang 2026 claims about +2.5 mIoU."""

from configs.tables import IMAGENET_TEXT, PAPER_BATCH, PHOTOS_TEXT, imagenet, photos
from ssrl_jax.table import DATA, Column, Judge, Row, Table

STEPS = {"local": 200, "paper": 5_000}
SEEDS = {"fusion": (0, 1), "simclr": (0, 1), "swav": (0,)}  # of the local budget


def get_table(budget: str) -> Table:
  local = budget == "local"
  train = photos if local else imagenet
  rows = [Row(method, train(method), seeds if local else (0,)) for method, seeds in SEEDS.items()]
  if local:
    rows.append(Row("simclr, encoder of fusion", train("simclr", {"encoder.fusion.enabled": True})))
  rows += [
    Row("random init", train("simclr"), encoder="random_init"),
    Row("random init, encoder of fusion", train("fusion"), encoder="random_init"),
  ]
  options = {
    "evaluate.segmentation.source": f"masks:{DATA}/{'camvid240' if local else 'voc2012'}",
    "evaluate.segmentation.steps": STEPS[budget],
    "evaluate.segmentation.size": 160 if local else 512,
  }
  if not local:
    options["evaluate.segmentation.batch_size"] = PAPER_BATCH
  tuned = {**options, "evaluate.segmentation.head": "light", "evaluate.segmentation.finetune": True}
  return Table(
    title="Segmentation",
    text=f"{PHOTOS_TEXT} CamVid, 11 classes, 200 steps of 16 pictures at 160 px."
    if local
    else f"{IMAGENET_TEXT} VOC 2012 as folders of masks.",
    source="",
    rows=tuple(rows),
    columns=(
      Column("linear head, frozen, mIoU %", "linear", "segmentation/miou"),
      Column("pixels %", "linear", "segmentation/pixel_accuracy"),
      Column("decoder, fine-tuned, mIoU %", "tuned", "segmentation/miou"),
    ),
    judges={"linear": Judge("segmentation", options), "tuned": Judge("segmentation", tuned)},
    subject="fusion",
    baselines=tuple(r.title for r in rows[1:]),
  )
