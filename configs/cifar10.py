"""CIFAR-10 with ResNet-18 (3x3 stem), the field's usual small benchmark.

Command   python -m ssrl_jax.main --config=configs/cifar10.py:fusion
          --config.data.source=folder:PATH reads class folders under PATH/train and PATH/test
          instead of tfds:cifar10.
Hardware  one GPU
Expected  simclr 90.7 % linear after 1000 epochs (solo-learn's table, its claim)
Status    not run in full; the small-budget table in README.md is run (`:fusion,small`)
"""

from ml_collections import ConfigDict

from ssrl_jax.config import base_config, view_group

METHODS = {
  "fusion": {},
  "simclr": {"temperature": 0.2, "hidden_dim": 2048, "out_dim": 128},
}


def get_config(method: str = "fusion") -> ConfigDict:
  c = base_config(method)
  c.method.update(METHODS[method])
  return c
