"""CIFAR-10 at a budget for two CPU cores: ResNet-8 of width 16, 5,000 images, 20 epochs.

Command   python -m ssrl_jax.main --config=configs/cifar10_cpu.py:METHOD --config.seed=S
            --config.data.source=folder:PATH     (class folders under PATH/train and PATH/test)
Hardware  2 CPU cores
Time      see README.md
Expected  README.md, "Measured"
Status    run
"""

from ml_collections import ConfigDict

from configs import cifar10
from ssrl_jax.config import view_group

METHODS = {
  "fusion": {"hidden_dim": 128, "out_dim": 64},
  "simclr": {"temperature": 0.2, "hidden_dim": 128, "out_dim": 64},
}


def get_config(method: str = "fusion") -> ConfigDict:
  c = cifar10.get_config(method)
  c.method.update(METHODS[method])
  c.batch_size = 128
  c.epochs = 20.0
  c.encoder.name = "resnet8"
  c.encoder.dtype = "float32"
  c.encoder.resnet.width = 16
  c.encoder.fusion.update({"width": 64, "coarsen": 1})
  c.data.num_train = 5000
  c.data.threads = 2
  c.global_views = view_group(
    size=32, area=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
  )
  c.optim.update({"name": "adamw", "learning_rate": 2e-3, "scale_by_batch": False})
  c.optim.update({"weight_decay": 1e-3, "warmup_epochs": 2.0})
  c.checkpoint.every_steps = 200
  c.log.every_steps = 20
  c.evaluate.batch_size = 256
  return c
