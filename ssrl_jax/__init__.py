"""Self-supervised image representation learning in JAX."""

import os
import signal
import sys

__version__ = "0.1.0"


def _interrupted(number, frame):
  os.write(2, b"interrupted\n")
  os._exit(130)


# A command (python -m ssrl_jax.X) that still imports; later `command_line` catches it.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, _interrupted)
