"""CIFAR-10 with ResNet-18 (3x3 stem): the field's usual small benchmark, for one GPU.

Command   python -m ssrl_jax.main --config=configs/cifar10.py:METHOD
          (python -m ssrl_jax.data.prepare_tfds cifar10 once before; or with
          --config.data.source=folder:PATH, class folders under PATH/train and PATH/test)
Hardware  one GPU
Expected  simclr about 91 % linear after 1000 epochs (google-research/simclr README, their claim)
Status    not run on a GPU; configs/cifar10_cpu.py is this data at a budget for two CPU cores, run
"""

from ml_collections import ConfigDict

from ssrl_jax.config import base_config, view_group

METHODS = {
  "fusion": {"hidden_dim": 2048, "out_dim": 256},
  "simclr": {"temperature": 0.5, "hidden_dim": 512, "out_dim": 128},
}


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.method.update(METHODS[method])
  c.batch_size = 512
  c.epochs = 200.0
  c.encoder.name = "resnet18"
  c.encoder.dtype = "bfloat16"
  c.encoder.resnet.stem = "cifar"
  c.encoder.fusion.enabled = method == "fusion"
  c.data.source = "tfds:cifar10"
  c.data.canvas = 32
  c.data.threads = 8
  c.data.mean = (0.4914, 0.4822, 0.4465)
  c.data.std = (0.2470, 0.2435, 0.2616)
  # SimCLR's CIFAR views: jitter of strength 0.5, no blur.
  c.global_views = view_group(
    size=32, area=(0.08, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
  )
  # google-research/simclr, CIFAR-10: LARS, learning rate 1.0, weight decay 1e-4, 10 epochs warm-up.
  c.optim.update(
    {"name": "lars", "learning_rate": 1.0, "scale_by_batch": False, "weight_decay": 1e-4}
  )
  c.optim.warmup_epochs = 10.0
  c.checkpoint.every_steps = 1000
  c.log.every_steps = 50
  c.evaluate.update({"size": 32, "crop": 1.0, "batch_size": 512})
  return c
