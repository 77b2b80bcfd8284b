"""`ssrl_jax.main` of whose processes the second has, for a while, a full disk and no access."""

import collections
import os
import pathlib
import shutil

from ssrl_jax import main

TIMES = 2


def cli(argv: list[str]) -> int:
  if "--process_id=1" in argv:
    full = shutil.disk_usage("/")._replace(free=0)
    failing(shutil, "disk_usage", lambda *args: full)
    failing(pathlib.Path, "open", no_access)
  return main.cli(argv)


def no_access(path, *args, **kwargs):
  raise PermissionError(13, "Permission denied", str(path))


def failing(owner, name: str, instead) -> None:
  """The first TIMES that `owner.name` is called within the folder of checkpoints."""
  real, calls = getattr(owner, name), collections.Counter()

  def call(path, *args, **kwargs):
    calls["of a checkpoint"] += "checkpoints" in os.fspath(path)
    if "checkpoints" in os.fspath(path) and calls["of a checkpoint"] <= TIMES:
      return instead(path, *args, **kwargs)
    return real(path, *args, **kwargs)

  setattr(owner, name, call)
