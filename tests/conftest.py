"""The house rules of the suite: 8 virtual devices, strict ranks, warnings are errors.

Nearly all of its time is compilation, so the compiler's effort is turned down, here and in the
processes that tests start; test_conformance.py and test_main.py also run it as users have it.
"""

import gc
import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PJRT_NPROC"] = "2"  # threads, on one core too: with one alone some sums run otherwise
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # a compiled program need not name our lines
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # for `configs`

import jax
import pytest
from absl import flags

EFFORT = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later ones have no other emitters, and do not know the flag
  EFFORT.append("--xla_cpu_use_fusion_emitters=false")  # by far the most: a quarter of the time
# Read when a device is first asked for.
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *EFFORT])
# Set after the import, so for processes that tests start: what one has compiled, others load.
CACHE = tempfile.TemporaryDirectory(prefix="ssrl_jax_tests_")
os.environ |= {
  "JAX_COMPILATION_CACHE_DIR": CACHE.name,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

gc.set_threshold(200_000, 20, 50)  # tracing makes many objects that live on
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The folder of real photographs named by SSRL_DATA; tests that need it are skipped without."""
  path = os.environ.get("SSRL_DATA")
  if not path:
    pytest.skip("SSRL_DATA, the folder of real image sets, is not set")
  return pathlib.Path(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The files that take longest first, so that no worker has one of them left when others end."""
  longest = ("test_main.py", "test_processes.py")
  items.sort(key=lambda item: item.path.name not in longest)
