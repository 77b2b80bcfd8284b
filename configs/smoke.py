"""Everything once, in seconds: a few steps of a tiny encoder on digit_scenes.

Command   python -m ssrl_jax.main --config=configs/smoke.py
Hardware  1 CPU core
Time      under a minute
Expected  it ends; the accuracies mean nothing
Status    run in every test
"""

from ml_collections import ConfigDict

from configs import digits
from ssrl_jax.config import change


def get_config(method: str = "fusion") -> ConfigDict:
  c = digits.get_config(method)
  c.batch_size = 16
  c.steps = 8
  c.encoder.resnet.width = 4
  c.data.num_train = 128
  c.data.num_test = 50
  c.optim.warmup_epochs = 0.1
  c.checkpoint.every_steps = 4
  c.log.every_steps = 2
  if method == "w_mse":
    change(c, {"method.slice_size": 16, "method.out_dim": 8})
  c.evaluate.linear.update({"learning_rates": (0.1,), "weight_decays": (0.0,), "epochs": 2})
  return c
