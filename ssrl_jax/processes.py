"""Many processes as one run: how they start together, stop together and never wait for ever.

Exit statuses of a run, for the scheduler that starts it again: 0 finished, 1 something that a user
must put right, STOPPED saved and stopped by a signal, LOST others are gone or nothing moves. JAX
itself ends a process with SIGABRT (134) when process 0 or a heartbeat is missing: as LOST.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from ssrl_jax.command_line import exit_with_one_line

STOPPED = 143  # what a shell says of a process that SIGTERM ended
LOST = 75  # EX_TEMPFAIL of sysexits.h
GRACE = 10.0  # seconds that a failing process waits for others that fail alike
MESSAGE = 1024  # bytes of an error that process 0 tells the others

# What begins the errors of a collective whose other end is gone, of whatever Python type.
_GONE = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ")


class StartAgain(OSError):
  """Ends a process with LOST: nothing for a user to put right."""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """--coordinator, --num_processes and --process_id: what `start` is given."""
  flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where no scheduler is detected.", flag_values=values
  )
  flags.DEFINE_integer("num_processes", 0, "Processes of this job; 1: alone.", flag_values=values)
  flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0 on.", flag_values=values)


def start(
  coordinator: str = "", num_processes: int = 0, process_id: int = -1, *, minutes: float = 5.0
) -> str:
  """Joins the other processes of the job, if it has any; call once, before jax is used.

  Given are all three or none: then JAX detects a TPU pod, Slurm, Open MPI or a Kubernetes job. One
  process alone, given or detected, joins nothing.

  Args:
    coordinator: HOST:PORT, where process 0 listens.
    minutes: to wait for the others; after them the process ends with LOST.

  Returns:
    What was found, in a line.

  Raises:
    ValueError: some of the three are missing or impossible, or process 0 counts otherwise.
  """
  if num_processes == 1 or not (coordinator or num_processes or process_id >= 0):
    cluster = None if num_processes == 1 else _detected()
    found = f"{cluster.__name__} detected" if cluster else "no cluster detected"
    if cluster is None or cluster.get_process_count() == 1:
      return f"one process ({'as --num_processes says' if num_processes == 1 else found})"
    num_processes, process_id = cluster.get_process_count(), cluster.get_process_id()
    options = {} if _shares_host() else {"local_device_ids": []}
  else:
    _check_given(coordinator, num_processes, process_id)
    found, options = f"coordinator {coordinator} given", {
      "coordinator_address": coordinator, "num_processes": num_processes,
      "process_id": process_id, "cluster_detection_method": "deactivate",
    }  # fmt: skip
  line = f"process {process_id} of {num_processes} ({found})"
  with _at_most(minutes, f"{line}: not all of them came"):
    # JAX's own limit ends the process without a line.
    jax.distributed.initialize(initialization_timeout=int(60 * minutes) + 600, **options)
    _check_count(num_processes, process_id)
    # Here all are at one point: gloo gives the first meeting 30 seconds, and a busy CPU may not.
    multihost_utils.sync_global_devices("start")
  return f"{line}; {len(jax.devices())} devices"


def _detected() -> type[clusters.ClusterEnv] | None:
  """The job's scheduler, by JAX's own rules."""
  for cluster in clusters.ClusterEnv._cluster_types:
    # Any pod has what JAX knows Kubernetes by, and without the package `kubernetes` it warns.
    alone = cluster is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ
    if not cluster.opt_in_only_method and not alone and cluster.is_env_present():
      return cluster
  return None


def _shares_host() -> bool:
  """Whether a process should have one device of its host, JAX's choice for Slurm and Open MPI.

  With one process on each host it would leave all but the first device of it idle.
  """
  env = os.environ
  if "SLURM_STEP_NUM_NODES" in env:
    return env["SLURM_NTASKS"] != env["SLURM_STEP_NUM_NODES"]
  return env.get("OMPI_COMM_WORLD_LOCAL_SIZE") != "1"


def _check_given(coordinator: str, num_processes: int, process_id: int) -> None:
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes or "",
    "process_id": "" if process_id < 0 else process_id,
  }
  missing = [f"--{name}" for name, value in given.items() if value == ""]
  if missing:
    present = " ".join(f"--{name}={value}" for name, value in given.items() if value != "")
    raise ValueError(
      f"{present} is given without {' and '.join(missing)}; give all of --coordinator=HOST:PORT, "
      "--num_processes and --process_id, or none where a scheduler is detected"
    )
  if not re.fullmatch(r".+:\d+", coordinator):
    raise ValueError(f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0")
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id is {process_id}; expected 0 to {num_processes - 1}, below --num_processes"
    )


def _check_count(num_processes: int, process_id: int) -> None:
  """All must have been started as parts of the same job; JAX would wait for what does not exist."""
  key, client = "ssrl_jax/num_processes/{}".format, distributed.global_state.client
  client.key_value_set(key(process_id), str(num_processes))
  for other in range(1, num_processes) if process_id == 0 else [0]:
    theirs = int(client.blocking_key_value_get(key(other), 600_000))
    if theirs != num_processes:
      raise ValueError(
        f"process {process_id} was started as one of {num_processes}, and process {other} as one "
        f"of {theirs}; start all with the same number, or give the job a port of its own"
      )


@contextlib.contextmanager
def _at_most(minutes: float, what: str) -> Iterator[None]:
  """Ends the process with a line if what is inside takes longer."""

  def end() -> None:
    at = distributed.global_state.coordinator_address
    _end(f"{what} within {minutes:g} minutes (watchdog.start_minutes); coordinator {at}: see that "
         "it can be reached, that each process was started, and each but once")  # fmt: skip

  timer = _after(60 * minutes, end)
  try:
    yield
  finally:
    timer.cancel()


def _after(seconds: float, action: Callable[[], None]) -> threading.Timer:
  timer = threading.Timer(seconds, action)
  timer.daemon = True
  timer.start()
  return timer


def _end(message: str, linger: float = 0.0) -> None:
  """Ends this process from any thread; process 0 after the others, for JAX ends them with it."""
  print(f"error: {message}; exit status {LOST}: start again", file=sys.stderr, flush=True)
  if distributed.global_state.service is not None:
    time.sleep(linger)
  os._exit(LOST)


def exit_together(program: Callable[[], int], *, show_traceback: Callable[[], bool]) -> int:
  """As `exit_with_one_line`; a collective whose other end is gone gives a line and LOST.

  A process that fails waits GRACE seconds for others that fail alike, and then leaves them to
  notice: it must not wait for those that wait for it.
  """

  def guarded() -> int:
    try:
      return program()
    except Exception as error:
      if isinstance(error, StartAgain):
        what = str(error)
      elif others_are_gone(error):
        what = f"another process is gone ({' '.join(str(error).split())[:200]})"
      else:
        raise
      print(f"error: {what}; exit status {LOST}: start again", file=sys.stderr, flush=True)
      return LOST

  try:
    status = exit_with_one_line(guarded, show_traceback=show_traceback)
  except Exception:
    traceback.print_exc()
    status = 1
  state = distributed.global_state
  if state.client is not None:
    sys.stderr.flush()
    if status not in (0, STOPPED):
      _after(GRACE if state.service is None else 1.5 * GRACE, lambda: os._exit(status))
    with contextlib.suppress(Exception):  # here all wait for all: with process 0 JAX ends the rest
      jax.distributed.shutdown()
  return status


def others_are_gone(error: BaseException | None) -> bool:
  """Whether an error, or what it arose from, is that of a collective without its other end."""
  if error is None or distributed.global_state.client is None:
    return False
  return bool(_GONE.match(str(error))) or others_are_gone(error.__cause__ or error.__context__)


def first_does(action: Callable[[], object]) -> None:
  """Process 0 does it, and the others wait; what it raises is raised in all."""
  error, text = None, b""
  if jax.process_index() == 0:
    try:
      action()
    except (ValueError, OSError) as caught:
      error, text = caught, (str(caught) or type(caught).__name__).encode()[:MESSAGE]
  if jax.process_count() > 1:
    letters = np.frombuffer(text.ljust(MESSAGE), np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(letters)).tobytes().rstrip()
  if text:
    raise error or ValueError(text.decode(errors="replace"))


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
  """Yields a function of the step: whether to stop there, because SIGTERM or Ctrl-C came.

  With many processes a signal to one stops all, at the step that JAX's preemption service agrees
  on: each must ask at every step. A second Ctrl-C interrupts.
  """
  came: list[int] = []
  together = jax.process_count() > 1

  def handler(number, frame):
    if came and number == signal.SIGINT:
      raise KeyboardInterrupt
    came.append(number)
    if together:
      signal.raise_signal(signal.SIGTERM)  # JAX handles that one, and tells the others

  caught = (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT)
  try:
    old = {s: signal.signal(s, handler) for s in caught}
  except ValueError:  # not the main thread: leave the signals alone
    old = {}
  try:
    yield multihost_utils.reached_preemption_sync_point if together else lambda step: bool(came)
  finally:
    if together:  # all is saved: what comes now need not be agreed on
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, previous in old.items():
      signal.signal(number, previous)


@contextlib.contextmanager
def watchdog(
  file: Path, *, first_minutes: float, minutes: float, of: str = "step"
) -> Iterator[Callable[..., None]]:
  """Yields what to call after each step; too long without, and the process ends with LOST.

  moved(within) lets so many minutes pass until it is called again, moved() the usual ones. At the
  end the stacks of all threads are written to `file`; so are those of a process that JAX ends. What
  is counted is this thread's own short waits: neither a clock that jumps nor the time for which the
  process was stopped.

  Args:
    file: of this process alone; there afterwards only if something was written.
    first_minutes: until the first step, which is compiled before; 0: for ever.
    minutes: from one step to the next; 0: no limits at all.
    of: what is waited for, in the message.
  """
  if not minutes:
    yield lambda within=minutes: None
    return
  signs, done = queue.SimpleQueue(), threading.Event()

  def watch(stacks) -> None:
    limit, waited = 60 * first_minutes, 0.0
    while not done.wait(tick := min(1.0, limit / 10 or 1.0)):
      waited += tick
      if not signs.empty():
        waited = 0.0
        while not signs.empty():
          limit = 60 * signs.get()
      elif limit and waited >= limit:
        print(f"no {of} in {limit:g} seconds, {time.ctime()}", file=stacks, flush=True)
        faulthandler.dump_traceback(stacks)
        what = f"process {jax.process_index()}: no {of} was finished in {limit / 60:g} minutes"
        _end(f"{what} (watchdog); the stacks of all threads are in {file}", linger=GRACE)

  with file.open("a") as stacks:
    enable = jax.process_count() > 1 and not faulthandler.is_enabled()
    if enable:
      faulthandler.enable(stacks)
    thread = threading.Thread(target=watch, args=(stacks,), daemon=True)
    thread.start()
    try:
      yield lambda within=minutes: signs.put(within)
    finally:
      done.set()
      thread.join()
      if enable:
        faulthandler.disable()
      if not stacks.tell():
        file.unlink(missing_ok=True)
