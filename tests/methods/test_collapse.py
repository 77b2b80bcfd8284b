"""Where theory says that a method collapses without one of its parts, it does, and is named.

A ResNet-6 on 512 digit_scenes of 16 px, batch 64, AdamW 5e-3; seconds a run.
"""

import functools

import jax
import numpy as np
import pytest

from configs import digits
from ssrl_jax.config import change
from ssrl_jax.data.pipeline import train_batches
from ssrl_jax.experiment import build, init_state, open_split
from ssrl_jax.metrics import collapse
from ssrl_jax.step import make_train_step

SIZE, BATCH = 16, 64
TINY = {
  "batch_size": BATCH,
  "data.num_train": 512,
  "data.canvas": SIZE,
  "mesh.devices": 1,
  "evaluate.size": SIZE,
  "encoder.name": "resnet6",
  "encoder.resnet.width": 8,
  "global_views.size": SIZE,
  "global_views.greyscale": 0.2,
  "global_views.hue": 0.1,
  "global_views.brightness": 0.4,
  "global_views.saturation": 0.4,
  "optim.warmup_epochs": 0.0,
  "optim.learning_rate": 5e-3,
}
# method -> steps, options of both runs, what is taken away, the collapse that follows
CASES = {
  "byol": (100, {"method.tau": 0.9}, {"method.predictor": False}, "complete"),
  "simsiam": (150, {}, {"method.stop_gradient": False}, "dimensional"),
  "tico": (100, {"method.tau": 0.9}, {"method.covariance_weight": 0.0}, "complete"),
  "vicreg": (75, {}, {"method.variance_weight": 0.0}, "complete"),
  "dino": (75, {"method.tau": 0.9}, {"method.centring": "none"}, "complete"),
}


@functools.cache
def batches(steps):
  config = digits.get_config("byol")
  change(config, TINY)
  reader = train_batches(
    open_split(config, "train"), seed=0, batch_size=BATCH, start_step=0, canvas=SIZE
  )
  made = [next(reader) for _ in range(steps)]
  reader.close()
  low = lambda i: np.stack([i, np.zeros_like(i)], axis=1).astype(np.uint32)  # noqa: E731
  return [batch | {"id": low(batch["id"])} for batch in made]


def named_collapse(method, steps, changes):
  """What the health panel says after the last step."""
  config = digits.get_config(method)
  change(config, {**TINY, "steps": steps, **changes})
  experiment = build(config, num_examples=512, num_classes=10)
  step = jax.jit(make_train_step(experiment), donate_argnums=0)
  state = jax.jit(lambda key: init_state(experiment, key))(jax.random.key(0))
  for batch in batches(150)[:steps]:
    state, metrics, watched = step(state, batch)
  dimensions = watched.embeddings.shape[-1]
  figures = {name: float(value) for name, value in metrics.items()}
  return collapse(figures, dimensions)


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_method_collapses_without_what_holds_it_up_and_not_with_it(method):
  steps, both, removed, kind = CASES[method]
  assert named_collapse(method, steps, both) is None
  assert named_collapse(method, steps, both | removed).startswith(kind)
