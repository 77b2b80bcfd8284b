"""The project's commands in processes of their own, as `python -m` starts them or by a fork.

A fork of a process that has imported everything starts in no time; importing takes seconds. What it
cannot show is what `python -m` itself does, and that nothing hangs on Python's random hashes.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAIN, EVALUATE = "ssrl_jax.main", "ssrl_jax.evaluate.__main__"
LIMIT = 600  # seconds until a command counts as hanging, on however busy a machine
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([MAIN, EVALUATE])


def xla_flags(num_devices: int) -> str:
  """conftest's, for another number of devices."""
  return re.sub(r"(device_count)=\d+", rf"\1={num_devices}", os.environ["XLA_FLAGS"])


class Fork:
  """A command that runs: `process`, and the files that it prints to."""

  def __init__(
    self,
    *arguments: str,
    module: str = MAIN,
    num_devices: int = 1,
    environment: dict[str, str] | None = None,
  ):
    self._folder = tempfile.TemporaryDirectory(prefix="ssrl_jax_tests_")
    self._out, self._err = (pathlib.Path(self._folder.name, name) for name in ("out", "err"))
    files = str(self._out), str(self._err)
    environment = {"XLA_FLAGS": xla_flags(num_devices), **(environment or {})}
    self.process = FORKS.Process(target=_command, args=(module, arguments, files, environment))
    self._out.touch()
    self.process.start()

  def lines(self) -> Iterator[str]:
    """What it prints, as it prints it, until it ends."""
    with self._out.open() as file:
      while self.process.is_alive():
        yield from file
        time.sleep(0.005)

  def finish(self) -> tuple[int, str, str]:
    """Waits for the end: exit status, what it printed, what it complained about.

    One that hangs leaves its stacks among the latter, and is ended.
    """
    self.process.join(LIMIT + 30)
    self.process.kill()
    self.process.join()
    with self._folder:
      return self.process.exitcode, self._out.read_text(), self._err.read_text()


def together(count: int, *arguments: str, **options) -> list[Fork]:
  """The processes of one job."""
  port = free_port()
  given = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
  return [Fork(*arguments, *given, f"--process_id={i}", **options) for i in range(count)]


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _command(
  module: str, arguments: tuple[str, ...], files: tuple[str, str], environment: dict[str, str]
):
  for number, path in enumerate(files, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
  faulthandler.dump_traceback_later(LIMIT, exit=True, file=2)
  os.chdir(ROOT)
  os.environ |= environment  # XLA_FLAGS is read when JAX is first used
  sys.argv = [module, *arguments]
  sys.exit(importlib.import_module(module).cli(sys.argv))


@contextlib.contextmanager
def hears_ctrl_c() -> Iterator[None]:
  """What is started in the background ignores SIGINT, and so would what it starts in turn."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def start(*arguments: str, module: str = MAIN) -> subprocess.Popen:
  """`python -m module arguments`, on one device."""
  return subprocess.Popen(
    [sys.executable, "-m", module.removesuffix(".__main__"), *arguments],
    cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags(1)},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
