"""Each test hears of a damaged picture for the first time."""

import pytest

from ssrl_jax.data import batches


@pytest.fixture(autouse=True)
def nothing_named_yet():
  batches._warn_once.cache_clear()
