"""What the commands share: lines on the screen, and errors in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import flags

STDOUT = 1  # file descriptor
INTERRUPTED = 130  # what a shell says of a process that Ctrl-C ended


def print_line(line: str) -> None:
  print(line, flush=True)


def help_asked(argv: list[str], text: str, values: flags.FlagValues) -> bool:
  """Whether --help is among the arguments; then prints `text` and the flags of this package."""
  if not {"--help", "-help", "-h"}.intersection(argv[1:]):
    return False
  print_line(f"{text.strip()}\n\nFlags:")
  for name in values:
    flag, module = values[name], values.find_module_defining_flag(name) or ""
    if module in ("__main__", sys.argv[0]) or module.startswith("ssrl_jax"):  # not a library's
      default = "" if flag.default in (None, "", False, -1) else f" [{flag.default}]"
      print_line(f"  --{name:<20} {flag.help}{default}")
  return True


def define_step(values: flags.FlagValues) -> None:
  flags.DEFINE_integer(
    "step", None, "Whose checkpoint to take; default: the newest.", flag_values=values
  )


def run_command(
  argv: list[str],
  text: str,
  define: Callable[[flags.FlagValues], None],
  program: Callable[[flags.FlagValues], int],
  *,
  needed: Sequence[str],
) -> int:
  """A command with flags of its own, --help and --traceback; returns its exit status.

  Args:
    argv: the command line, with the command's name.
    text: what --help says before the flags.
    define: defines the flags.
    program: gets their values, and returns the exit status.
    needed: names of flags that must be given.
  """
  logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)

  def with_flags() -> int:
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_bool("traceback", False, "On an error, show where it arose.", values)
    if help_asked(argv, text, values):
      return 0
    check_no_more(values(argv)[1:])
    for name in needed:
      if not values[name].value:
        raise ValueError(f"--{name} is missing; --help says what it is")
    return program(values)

  return exit_with_one_line(with_flags, show_traceback=lambda: "--traceback" in argv)


def check_no_more(rest: Sequence[str]) -> None:
  """Refuses what is left of a command line when its flags are read."""
  if rest:
    raise ValueError(f"unknown argument {rest[0]!r}; flags begin with --, and --help lists them")


def exit_with_one_line(program: Callable[[], int], *, show_traceback: Callable[[], bool]) -> int:
  """Runs `program`; what a user can put right becomes one line on stderr and status 1.

  So does Ctrl-C, with status INTERRUPTED.
  """
  try:
    with ctrl_c_that_arrives():
      return program()
  except KeyboardInterrupt:
    if show_traceback():
      traceback.print_exc()
    print("interrupted", file=sys.stderr)
    return INTERRUPTED
  except ModuleNotFoundError as error:
    if error.name != "configs":
      raise
    fix = "run this in the folder that holds configs/"
    print(f"error: recipes import one another as configs.NAME: {fix}", file=sys.stderr)
    return 1
  except (ValueError, TypeError, AttributeError, KeyError, OSError, EOFError, ArithmeticError,
          flags.Error) as error:  # fmt: skip
    if isinstance(error, BrokenPipeError) and _reader_gone():
      os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # else the exit complains
      return 1
    if show_traceback():
      traceback.print_exc()
    else:
      # What a recipe raises comes wrapped with its traceback: its last line is the message.
      lines = str(error).strip().splitlines() or [type(error).__name__]
      lines = lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines
      message = " ".join(" ".join(lines).split())
      print(f"error: {message}  (--traceback shows where)", file=sys.stderr)
    return 1


@contextlib.contextmanager
def ctrl_c_that_arrives() -> Iterator[None]:
  """Ctrl-C raises KeyboardInterrupt; where JAX collects garbage, and it would be lost, later."""

  def handler(number, frame):
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
      # To this thread, which may wait for something: raise_signal would tell the timer's.
      threading.Timer(0.05, signal.pthread_kill, [threading.get_ident(), number]).start()
    else:
      raise KeyboardInterrupt

  before = signal.getsignal(signal.SIGINT)
  try:
    if callable(before):  # not where who started this one ignores it
      signal.signal(signal.SIGINT, handler)
  except ValueError:  # not the main thread
    before = None
  try:
    yield
  finally:
    if callable(before):
      signal.signal(signal.SIGINT, before)


def _reader_gone() -> bool:
  """Whether whoever read what is printed has gone, as `head` does; another pipe may have broken."""
  poll = select.poll()
  poll.register(STDOUT, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))
