"""Small photographs (shorter side 128) at a budget for two CPU cores: ResNet-10 of width 24, 64 px.

Command   python -m ssrl_jax.main --config=configs/imagenette_cpu.py:METHOD
            --config.data.source=folder:PATH     (class folders under PATH/train and PATH/val)
Hardware  2 CPU cores
Time      3 to 8 CPU minutes on 2,800 photographs of shorter side 128 (516 steps)
Expected  fusion: online probe 45 % after 12 epochs; docs/results.md, "Segmentation"
Status    run for fusion, simclr, swav, moco_v2 and finegrained
"""

from ml_collections import ConfigDict

from configs import SMALL
from ssrl_jax.config import base_config, change, view_group


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.batch_size = 64
  c.epochs = 12.0
  c.encoder.name = "resnet10"
  c.encoder.resnet.update({"stem": "imagenet", "width": 24})
  c.encoder.fusion.width = 64
  c.data.source = "tfds:imagenette/160px-v2"
  c.data.update({"canvas": 160, "dry_run_examples": 9469, "dry_run_classes": 10})
  c.global_views = view_group(
    size=64, area=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
  )
  c.evaluate.update({"size": 64, "crop": 0.875, "batch_size": 128})
  c.optim.update({"learning_rate": 2e-3, "weight_decay": 1e-3, "warmup_epochs": 2.0})
  c.checkpoint.every_steps = 200
  change(c, SMALL.get(method, {}))
  c.encoder.fusion.coarsen = 1
  c.encoder.vit.patch = 8
  if method == "simmim":
    c.method.mask_size = 16  # 2 x 2 patches, as in the others
  return c
