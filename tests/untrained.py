"""A run's folder with one checkpoint of an encoder that was never trained."""

from pathlib import Path

from ml_collections import ConfigDict

from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.experiment import build, create_state
from ssrl_jax.run_folder import Facts, open_run_folder


def save_untrained(folder: Path, config: ConfigDict, facts: Facts) -> None:
  open_run_folder(folder, config, facts, allow_change=False)
  checkpoints = Checkpoints(folder, keep=1, keep_best=0)
  checkpoints.save(create_state(build(config, **facts._asdict())), step=0, score=0.0)
  checkpoints.close()
