"""One results table a file: `get_table(budget) -> Table`, for `python -m ssrl_jax.tables`.

The `local` budget is for two CPU cores and the data sets below under --data, each in the usual
folders; the `paper` budget is that of the publications, for pods and large GPUs. What is judged is
the last checkpoint of a run. Claims are those of the abstracts of Zhang 2026 (ISTAER2616) and
Lin et al. 2025 (zenodo 15232950), baselines as implied by the stated differences.

  cifar10        train/CLASS/*.png, test/CLASS/*.png
  imagenette128  train/CLASS/*.jpg, val/CLASS/*.jpg
  grocery128     train/CLASS/*.jpg, test/CLASS/*.jpg       (Grocery Store, 81 fine classes)
  camvid240      images/SPLIT/*.jpg, masks/SPLIT/*.png     (255 = ignore)
  bccd240        images/SPLIT/*.jpg, annotations/SPLIT.json (COCO)
  nuclei         images/SPLIT/*.jpg, annotations/SPLIT.json
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ssrl_jax.table import DATA, Training

NOTHING: Mapping[str, Any] = MappingProxyType({})

PAPER_BATCH = 64  # of what is trained on maps or few labels: a multiple of the devices

# What the rows of a budget have in common, for the text above a table.
CIFAR_TEXT = "CIFAR-10: ResNet-8 of width 16, 5,000 training images, 6 epochs."
PHOTOS_TEXT = "Pretrained on 2,800 photographs: ResNet-10 of width 24, 64 px, 12 epochs."
IMAGENET_TEXT = "ImageNet-1k: ResNet-50, as configs/imagenet.py has it."

CIFAR = {"data.source": f"folder:{DATA}/cifar10", "epochs": 6.0}
PHOTOS = {"data.source": f"folder:{DATA}/imagenette128", "data.dry_run_examples": 2800}
GROCERY = {"data.source": f"folder:{DATA}/grocery128", "data.dry_run_examples": 2640}


def cifar(method: str, changes: Mapping[str, Any] = NOTHING) -> Training:
  """ResNet-8 of width 16 on 5,000 CIFAR-10 images for 6 epochs."""
  return Training(f"configs/cifar10_cpu.py:{method}", {**CIFAR, **changes})


def photos(method: str, changes: Mapping[str, Any] = NOTHING) -> Training:
  """ResNet-10 of width 24 on 2,800 photographs of ten classes at 64 px."""
  return Training(f"configs/imagenette_cpu.py:{method}", {**PHOTOS, **changes})


def grocery(method: str, changes: Mapping[str, Any] = NOTHING) -> Training:
  """The same on 2,640 photographs of 81 kinds of groceries."""
  return Training(f"configs/imagenette_cpu.py:{method}", {**GROCERY, **changes})


def imagenet(method: str, changes: Mapping[str, Any] = NOTHING) -> Training:
  """ResNet-50 on ImageNet-1k, as the recipe has it."""
  return Training(f"configs/imagenet.py:{method}", changes)


def frozen(budget: str) -> tuple[str, str]:
  """What judges frozen features, and its linear figure: papers' is of random crops and flips."""
  linear = "linear" if budget == "local" else "linear_sgd"
  return f"knn,{linear}", f"{linear}/accuracy"
