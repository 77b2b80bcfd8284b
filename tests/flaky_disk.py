"""`ssrl_jax.main` of whose processes the second has a bad disk.

FAULT says for what the disk of checkpoints fails it, the first TIMES that it is asked: "listing",
"reading" (and what else opens a file), "room", "saving"; or some of them.
"""

import collections
import os
import pathlib
import shutil

import orbax.checkpoint as ocp

from ssrl_jax import main
from ssrl_jax.checkpoint import Checkpoints

TIMES = 2


def cli(argv: list[str]) -> int:
  if "--process_id=1" in argv:
    full = shutil.disk_usage("/")._replace(free=0)
    faults = {
      "listing": (Checkpoints, "steps", lambda *args: []),
      "reading": (pathlib.Path, "open", no_access),
      "room": (shutil, "disk_usage", lambda *args: full),
      "saving": (ocp.CheckpointManager, "save", no_access),
    }
    for name in os.environ["FAULT"].split():
      failing(*faults[name])
  return main.cli(argv)


def no_access(where, *args, **kwargs):
  raise PermissionError(13, "Permission denied", str(where))


def failing(owner, name: str, instead) -> None:
  """The first TIMES that `owner.name` is called, with a path within the folder of checkpoints."""
  real, calls = getattr(owner, name), collections.Counter()

  def call(where, *args, **kwargs):
    meant = not isinstance(where, str | os.PathLike) or "checkpoints" in os.fspath(where)
    calls[name] += meant
    if meant and calls[name] <= TIMES:
      return instead(where, *args, **kwargs)
    return real(where, *args, **kwargs)

  setattr(owner, name, call)
