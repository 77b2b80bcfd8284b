"""The house rules of the suite: 8 virtual devices, strict ranks, warnings are errors."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # for `configs`

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The folder of real photographs named by SSRL_DATA; tests that need it are skipped without."""
  path = os.environ.get("SSRL_DATA")
  if not path:
    pytest.skip("SSRL_DATA, the folder of real image sets, is not set")
  return pathlib.Path(path)
