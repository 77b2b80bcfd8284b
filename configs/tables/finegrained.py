"""Fine-grained recognition: Lin et al. 2025 claim 89.2 % on CUB-200-2011, 87.5 % on FGVC-Aircraft.

The abstract does not say whether that is linear or fine-tuned, at which size, or from which start;
so linear, retrieval and fine-tuned are shown apart, each beside the random initialisation.
"""

from configs.tables import grocery, imagenet
from ssrl_jax.table import DATA, Column, Judge, Row, Table

METHODS = ("finegrained", "moco_v2", "simclr", "swav", "fusion")


def get_table(budget: str) -> Table:
  return local() if budget == "local" else paper()


def local() -> Table:
  rows = [Row(method, grocery(method)) for method in METHODS]
  attention = {"encoder.attention.enabled": True, "encoder.attention.width": 48}
  rows += [
    Row("moco_v2, encoder of finegrained", grocery("moco_v2", attention)),
    Row("random init", grocery("moco_v2"), encoder="random_init"),
    Row("random init, encoder of finegrained", grocery("finegrained"), encoder="random_init"),
  ]
  return Table(
    title="Fine-grained recognition",
    text="Grocery Store, 81 fine classes, 2,640 training and 969 test photographs; ResNet-10 of "
    "width 24 at 64 px, pretrained for 12 epochs on the training photographs, fine-tuned for 10. "
    "Claims are for CUB-200-2011 and FGVC-Aircraft and cannot be compared with it.",
    source="",
    rows=tuple(rows),
    columns=(
      Column("k-NN %", "frozen", "knn/accuracy"),
      Column("linear %", "frozen", "linear/accuracy"),
      Column("recall@1 %", "frozen", "retrieval/recall_at_1"),
      Column("fine-tuned %", "tuned", "finetune/accuracy"),
      Column("fine-tuned, mean of classes %", "tuned", "finetune/mean_class_accuracy"),
      Column("CPU minutes", "run", "cpu_minutes"),
    ),
    judges={
      "frozen": Judge("knn,linear,retrieval"),
      "tuned": Judge("finetune", {"evaluate.finetune.epochs": 10}),
    },
    subject="finegrained",
    baselines=tuple(r.title for r in rows[1:]),
  )


def paper() -> Table:
  names = {"CUB": "tfds:caltech_birds2011", "Aircraft": f"folder:{DATA}/fgvc_aircraft"}
  claims = {"CUB fine-tuned %": 89.2, "Aircraft fine-tuned %": 87.5}
  columns, judges = [], {}
  for name, source in names.items():
    # A shorter side of 448 / 0.875 pixels also of a picture of 3:2.
    shown = {"data.source": source, "data.canvas": 768, "evaluate.size": 448}
    judges[f"{name} frozen"] = Judge("linear_sgd,retrieval", shown)
    judges[f"{name} tuned"] = Judge("finetune", {**shown, "evaluate.finetune.epochs": 100})
    columns += [
      Column(f"{name} linear %", f"{name} frozen", "linear_sgd/accuracy"),
      Column(f"{name} recall@1 %", f"{name} frozen", "retrieval/recall_at_1"),
      Column(f"{name} fine-tuned %", f"{name} tuned", "finetune/accuracy"),
    ]
  rows = [Row(m, imagenet(m), claims=claims if m == "finegrained" else {}) for m in METHODS]
  rows.append(Row("random init", imagenet("moco_v2"), encoder="random_init"))
  return Table(
    title="Fine-grained recognition",
    text="Pretrained on ImageNet-1k as configs/imagenet.py, judged at 448 px.",
    source="Lin et al. 2025 (zenodo 15232950), whose abstract does not name the protocol",
    rows=tuple(rows),
    columns=tuple(columns),
    judges=judges,
    subject="finegrained",
    baselines=tuple(r.title for r in rows[1:]),
  )
