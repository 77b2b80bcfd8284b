"""Few labels: 1 % and 10 % of them, linear on frozen features and fine-tuned."""

from configs.tables import CIFAR_TEXT, IMAGENET_TEXT, PAPER_BATCH, cifar, imagenet
from ssrl_jax.table import Column, Judge, Row, Table


def get_table(budget: str) -> Table:
  local = budget == "local"
  train = cifar if local else imagenet
  rows = [Row(method, train(method)) for method in ("fusion", "simclr", "swav")]
  rows += [
    Row("random init", train("simclr"), encoder="random_init"),
    Row("random init, encoder of fusion", train("fusion"), encoder="random_init"),
  ]
  frozen = {"evaluate.low_label.draws": 5 if local else 1}
  tuned = {
    **frozen, "evaluate.low_label.draws": 1, "evaluate.low_label.finetuned": True,
    "evaluate.low_label.finetune_epochs": 40,
    "evaluate.low_label.finetune_batch_size": 32 if local else PAPER_BATCH,
  }  # fmt: skip
  return Table(
    title="Few labels",
    text=f"{CIFAR_TEXT} 5 and about 50 labels of each class. Linear: mean of 5 draws; fine-tuned: "
    "one draw, 40 epochs of batches of 32."
    if local
    else IMAGENET_TEXT,
    source="",
    rows=tuple(rows),
    columns=(
      Column("1 %, linear", "frozen", "low_label/1pct/accuracy"),
      Column("10 %, linear", "frozen", "low_label/10pct/accuracy"),
      Column("1 %, fine-tuned", "tuned", "low_label/1pct/finetuned"),
      Column("10 %, fine-tuned", "tuned", "low_label/10pct/finetuned"),
    ),
    judges={"frozen": Judge("low_label", frozen), "tuned": Judge("low_label", tuned)},
    subject="fusion",
    baselines=tuple(r.title for r in rows[1:]),
  )
