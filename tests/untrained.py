"""A run's folder with one checkpoint of an encoder that was never trained."""

from pathlib import Path

from ml_collections import ConfigDict

from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.experiment import build, create_state
from ssrl_jax.run_folder import Facts, write_run


def save_untrained(folder: Path, config: ConfigDict, facts: Facts) -> None:
  write_run(folder, config, facts)
  checkpoints = Checkpoints(folder, keep=1, keep_best=0)
  checkpoints.save(create_state(build(config, **facts._asdict())), step=0, score=0.0)
  checkpoints.close()
