"""Self-supervised image representation learning in JAX."""

import os
import signal
import sys

__version__ = "0.1.0"


def _interrupted(number, frame):
  os.write(2, b"interrupted\n")
  os._exit(130)


def _is_command() -> bool:
  """Whether this is the import by python -m ssrl_jax.X, and not by a program that uses us."""
  given = sys.orig_argv[1:]
  module = given[given.index("-m") + 1] if "-m" in given[:-1] else ""
  return sys.argv[:1] == ["-m"] and module.partition(".")[0] == __name__


# While a command imports; later `command_line` catches it.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, _interrupted)
