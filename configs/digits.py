"""digit_scenes: real handwritten digits on cluttered scenes, drawn on the spot. Needs no download.

Command   python -m ssrl_jax.main --config=configs/digits.py[:METHOD]
Hardware  2 CPU cores
Time      3 to 6 minutes
Expected  README.md, "What the first command shows"
Status    run
"""

from ml_collections import ConfigDict

from configs import SMALL
from ssrl_jax.config import base_config, change, view_group


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.batch_size = 128
  c.epochs = 4.0
  c.encoder.name = "resnet8"
  c.encoder.resnet.update({"width": 12, "stem": "cifar"})
  c.encoder.fusion.width = 48
  c.data.source = "digit_scenes"
  c.data.num_train = 8192
  c.data.num_test = 2048
  # A mirrored digit is another sign, so no flip. Most views grey, jitter mild: colour tells scenes
  # apart too easily, and strong jitter takes the digit away with it.
  c.global_views = view_group(
    area=(0.4, 1.0),
    flip=0.0,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.05,
    greyscale=0.8,
  )
  c.optim.update({"learning_rate": 4e-3, "warmup_epochs": 0.5, "weight_decay": 1e-4})
  c.checkpoint.every_steps = 100
  c.log.every_steps = 10
  c.evaluate.linear.epochs = 25
  change(c, SMALL.get(method, {}))
  return c
