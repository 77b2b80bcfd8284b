"""digit_scenes: real handwritten digits on cluttered scenes, drawn on the spot. Needs no download.

Command   python -m ssrl_jax.main --config=configs/digits.py
Hardware  2 CPU cores
Time      about 4 minutes
Expected  see README.md, "What the first command shows"
Status    run; figures in README.md
"""

from ml_collections import ConfigDict

from ssrl_jax.config import base_config, view_group

METHODS = {
  "fusion": {},
  "simclr": {"temperature": 0.2, "hidden_dim": 128, "out_dim": 64},
}


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.method.update(METHODS[method])
  c.batch_size = 128
  c.epochs = 6.0
  c.encoder.name = "resnet8"
  c.encoder.resnet.update({"width": 16, "stem": "cifar"})
  c.encoder.fusion.enabled = method == "fusion"
  c.data.source = "digit_scenes"
  c.data.num_train = 8192
  c.data.num_test = 2048
  # No flip: a mirrored digit is another sign.
  c.views["global"] = view_group(
    area=(0.3, 1.0), flip=0.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
  )
  c.optim.update({"learning_rate": 2e-3, "warmup_epochs": 0.5, "weight_decay": 1e-4})
  return c
