"""Several processes on this machine as one run; what they join by is gloo over the loopback."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from ssrl_jax import parallel, processes
from ssrl_jax.run_folder import alone_in
from ssrl_jax.watch import RATES
from tests.commands import LIMIT, ROOT, Fork, free_port, together

HERE = "tests.test_processes"
RUN = ("--config=configs/smoke.py:simclr", "--config.encoder.name=resnet6",
       "--config.global_views.jitter=0", "--config.global_views.greyscale=0",
       "--config.steps=8", "--config.log.every_steps=1",
       "--config.evaluate.during.every_steps=6", "--config.evaluate.during.num_train=64",
       "--config.evaluate.evals=knn", "--config.evaluate.controls=False",
       "--config.log.tensorboard=False")  # fmt: skip
QUIET = ("--config.evaluate.evals=", "--config.evaluate.report=False")


def cli(argv):
  """A command without a network: processes that join, and then meet again and again."""
  values = flags.FlagValues()
  processes.define_flags(values)
  flags.DEFINE_string("folder", "", "Of the stacks.", flag_values=values)
  flags.DEFINE_integer("meetings", 1, "How often.", flag_values=values)
  flags.DEFINE_float("pause", 0.0, "Seconds between two.", flag_values=values)
  flags.DEFINE_float("start_minutes", 5.0, "For all to come.", flag_values=values)
  flags.DEFINE_float("minutes", 5.0, "From one meeting to the next.", flag_values=values)
  flags.DEFINE_bool("refuse", False, "Process 0 finds something wrong.", flag_values=values)
  values(argv)

  def program():
    given = values.coordinator, values.num_processes, values.process_id
    print(processes.start(*given, minutes=values.start_minutes), flush=True)
    processes.first_does(lambda: int("what is wrong" if values.refuse else "1"))
    stacks = pathlib.Path(values.folder) / f"stacks-{values.process_id}.txt"
    minutes = values.minutes
    with processes.watchdog(stacks, first_minutes=minutes, minutes=minutes) as moved:
      for _ in range(values.meetings):
        parallel.all_processes(parallel.np.arange(2))
        moved()
        print("met", flush=True)
        time.sleep(values.pause)
    return 0

  return processes.exit_together(program, show_traceback=lambda: False)


def wait_for(line, command):
  for said in command.lines():
    if re.match(line, said):
      return
  raise AssertionError(f"ended without {line!r}: {command.finish()}")


def finish(commands):
  return [command.finish() for command in commands]


def records(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in r.items() if k not in RATES} for r in lines]


def results(folder):
  record = json.loads((folder / "results.json").read_text())
  return record["state_digest"], record["results"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The folder of a run of one process."""
  folder = tmp_path_factory.mktemp("alone")
  code, out, err = Fork(
    *RUN, "--config.evaluate.report=False", f"--workdir={folder}", num_devices=2
  ).finish()
  assert code == 0, err
  assert out.splitlines()[0] == "one process (no cluster detected)"
  return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """The folder of a run of two processes of which one got SIGTERM, while they compiled."""
  folder = tmp_path_factory.mktemp("stopped")
  commands = together(2, *RUN, f"--workdir={folder}")
  wait_for("starting at step 0", commands[0])
  os.kill(commands[1].process.pid, signal.SIGTERM)
  (code, out, err), other = finish(commands)
  assert (code, other[0]) == (143, 143), err + other[2]
  step = int(re.search(r"stopped at step (\d+); the same command goes on", out)[1])
  assert 0 < step < 8
  assert (folder / "checkpoints" / str(step)).is_dir()
  return folder


def go_on(count, stopped, folder, *more, num_devices=1):
  """A copy of the stopped run, brought to its end by `count` processes."""
  shutil.copytree(stopped, folder)
  arguments = (*RUN, f"--workdir={folder}", *more)
  for code, _, err in finish(together(count, *arguments, num_devices=num_devices)):
    assert code == 0, err
  return folder


def test_an_error_without_a_text_is_an_error():
  with pytest.raises(PermissionError):
    processes.first_does(lambda: (_ for _ in ()).throw(PermissionError()))


@pytest.mark.slow
def test_two_processes_stopped_and_continued_are_one_process_of_as_many_devices(
  alone, stopped, tmp_path
):
  """Every figure and every byte: the order of two summands does not matter."""
  folder = go_on(2, stopped, tmp_path / "run")
  assert records(folder) == records(alone)
  assert results(folder) == results(alone)
  assert (folder / "report.html").exists()
  assert (folder / "damaged.jsonl").exists() == (alone / "damaged.jsonl").exists()


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(alone, stopped, tmp_path):
  folder = go_on(1, stopped, tmp_path / "run", *QUIET, num_devices=2)
  assert records(folder) == records(alone)
  assert results(folder)[0] == results(alone)[0]


@pytest.mark.slow
def test_four_processes_of_twice_the_devices_go_on_with_the_same_losses(alone, stopped, tmp_path):
  """To rounding; but for the probe, as Adam makes steps of any size of what is nearly nothing, and
  for what counts neighbours."""
  folder = go_on(4, stopped, tmp_path / "run", *QUIET)
  for record, want in zip(records(folder), records(alone), strict=True):
    assert record.keys() == want.keys()
    for name, value in want.items():
      if not name.startswith(("probe/", "knn/")):
        assert record[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def with_bad_disk(fault, folder, *more):
  """(exit status, complaints) of each of two processes."""
  arguments = (*RUN, *QUIET, "--config.checkpoint.retry_seconds=0.01", f"--workdir={folder}", *more)
  options = {"module": "tests.flaky_disk", "environment": {"FAULT": fault}}
  return [(code, said) for code, _, said in finish(together(2, *arguments, **options))]


@pytest.mark.slow
def test_disk_that_fails_one_process_for_a_while_is_waited_for_by_all(alone, stopped, tmp_path):
  """It does not see the checkpoint, cannot read it, and then has no room for the last one."""
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  (code, said), (other, complains) = with_bad_disk("listing reading room", folder)
  assert (code, other) == (0, 0), said + complains
  assert said.count("this process sees the steps [") == 2
  assert said.count("process 1 cannot use it; all wait") == 4
  assert complains.count("Permission denied") == complains.count("0 MiB free") == 2
  assert results(folder)[0] == results(alone)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("fault", "message"),
  [
    ("listing", "checkpoints is not the same for all processes"),
    ("reading", "cannot be read .*left as it is"),
    (
      "room",
      r"could not save a checkpoint at step \d: .*In .*checkpoints the one of step \d is safe",
    ),
  ],
)
def test_disk_that_fails_one_process_for_longer_ends_all(fault, message, stopped, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  for code, said in with_bad_disk(fault, folder, "--config.checkpoint.retries=1"):
    assert code == 1, said
    assert re.search(message, said), said
  names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (folder, stopped)]
  assert names[0] == names[1]


@pytest.mark.slow
def test_disk_that_fails_one_process_while_it_saves_asks_to_be_started_again(tmp_path):
  (code, said), (other, complains) = with_bad_disk("saving", tmp_path)
  assert other == processes.LOST, complains
  assert "Permission denied" in complains
  assert "exit status 75: start again" in complains
  assert code in (processes.LOST, -signal.SIGABRT), said


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("host:1", 0, -1), "--coordinator=host:1 is given without --num_processes and --process_id;"),
    (("", 2, 0), "--num_processes=2 --process_id=0 is given without --coordinator; give all of"),
    (("", 0, 1), "--process_id=1 is given without --coordinator and --num_processes"),
    (("host", 2, 0), "--coordinator is 'host'; expected HOST:PORT"),
    (("host:1", 2, 2), "--process_id is 2; expected 0 to 1"),
    (("host:1", -2, 0), "--process_id is 0; expected 0 to -3"),
  ],
)
def test_flags_that_are_incomplete_or_impossible_are_refused(given, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    processes.start(*given)


def test_one_process_alone_joins_nothing(monkeypatch):
  monkeypatch.setattr(processes.jax.distributed, "initialize", None)
  assert processes.start() == "one process (no cluster detected)"
  assert processes.start(num_processes=1) == "one process (as --num_processes says)"
  slurm = {"JOB_ID": "7", "STEP_NODELIST": "a", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
  for name, value in slurm.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  assert processes.start() == "one process (SlurmCluster detected)"


@pytest.mark.parametrize(
  ("flags_of", "message"),
  [
    ({1: (2, 1)}, "process 1 of 2 (coordinator 127.0.0.1:{port} given): not all of them came"),
    ({0: (2, 0)}, "process 0 of 2 (coordinator 127.0.0.1:{port} given): not all of them came"),
    ({0: (2, 0), 1: (3, 1)}, "process 1 was started as one of 3, and process 0 as one of 2"),
  ],
  ids=["no coordinator", "too few", "another count"],
)
def test_job_that_does_not_come_together_says_so_in_a_stated_time(flags_of, message, tmp_path):
  port, minutes = free_port(), 5 if "started as" in message else 0.05
  commands = {
    i: Fork(f"--coordinator=127.0.0.1:{port}", f"--num_processes={n}", f"--process_id={p}",
            f"--start_minutes={minutes}", f"--folder={tmp_path}", module=HERE)
    for i, (n, p) in flags_of.items()
  }  # fmt: skip
  code, _, err = finish(commands.values())[-1]
  assert code == (1 if "started as" in message else processes.LOST), err
  assert f"error: {message.format(port=port)}" in err
  assert code == 1 or "within 0.05 minutes" in err


def test_what_the_first_process_refuses_ends_all_alike():
  for code, out, err in finish(together(2, "--refuse", module=HERE)):
    assert code == 1
    assert "error: invalid literal for int() with base 10: 'what is wrong'" in err
    assert "met" not in out


def slurm_environment(i, port, *, nodes):
  return {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % (2 // nodes)),
    "SLURM_STEP_NUM_NODES": str(nodes), "JAX_COORDINATOR_PORT": str(port),
  }  # fmt: skip


def test_slurm_tasks_join_by_themselves(tmp_path):
  port = free_port()
  commands = [
    Fork(f"--folder={tmp_path}", module=HERE, environment=slurm_environment(i, port, nodes=2))
    for i in range(2)
  ]
  for i, (code, out, err) in enumerate(finish(commands)):
    assert code == 0, err
    assert f"process {i} of 2 (SlurmCluster detected); 2 devices" in out
  assert not list(tmp_path.iterdir())  # no stacks of what went well


@pytest.mark.parametrize(("nodes", "shares"), [(1, True), (2, False)])
def test_a_task_has_one_device_only_where_it_shares_its_host(nodes, shares, monkeypatch):
  for name, value in slurm_environment(0, 1, nodes=nodes).items():
    monkeypatch.setenv(name, value)
  assert processes._shares_host() == shares


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_process_that_hangs_or_dies_does_not_leave_the_other_waiting(number, tmp_path):
  shared = ("--meetings=1000", "--pause=0.1", "--minutes=0.1", f"--folder={tmp_path}")
  commands = together(2, *shared, module=HERE)
  wait_for("met", commands[0])
  os.kill(commands[1].process.pid, number)
  try:
    code, _, err = commands[0].finish()
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(commands[1].process.pid, signal.SIGCONT)
    other, *_ = commands[1].finish()
  assert code == processes.LOST, err
  if number == signal.SIGKILL:
    assert "error: another process is gone" in err
    return
  assert "process 0: no step was finished in 0.1 minutes" in err
  stacks = (tmp_path / "stacks-0.txt").read_text()
  assert "in all_processes" in stacks
  assert "in watch" in stacks
  assert other in (processes.LOST, -signal.SIGABRT)


def test_watchdog_waits_as_long_as_the_last_sign_said(monkeypatch, tmp_path):
  ended = []
  monkeypatch.setattr(processes, "_end", lambda *args, **kwargs: ended.append(args))
  stacks = tmp_path / "stacks"
  with processes.watchdog(stacks, first_minutes=0, minutes=0.01) as moved:
    time.sleep(1.0)  # for ever until the first
    moved(1.0)
    time.sleep(1.0)
    assert not ended
    moved()
    time.sleep(2.0)
    assert ended
    stacks.unlink()  # as another process might
  assert "no step was finished in 0.01 minutes" in ended[0][0]


def test_last_evaluation_that_hangs_ends_with_its_stack(tmp_path):
  limit = ("--config.steps=2", "--config.evaluate.during.every_steps=0",
           "--config.watchdog.evaluation_minutes=0.05")  # fmt: skip
  code, _, err = Fork(*RUN, *limit, f"--workdir={tmp_path}", module="tests.hanging").finish()
  assert code == processes.LOST, err
  assert "no batch of the evaluation was finished in 0.05 minutes" in err
  assert "in evaluate_run" in (tmp_path / "stacks-0.txt").read_text()


def test_watchdog_looks_at_no_clock(monkeypatch, tmp_path):
  """Nor so at the time for which a process is stopped, or its machine asleep."""
  ended = []
  monkeypatch.setattr(processes, "_end", lambda *args, **kwargs: ended.append(args))
  with processes.watchdog(tmp_path / "stacks", first_minutes=0.1, minutes=0.1):
    for name in ("time", "monotonic", "perf_counter"):
      real = getattr(time, name)
      monkeypatch.setattr(time, name, lambda real=real: real() + 3600)
    time.sleep(1.5)  # some of its ticks
  assert not ended
  assert not list(tmp_path.iterdir())


def test_folder_is_held_until_the_process_has_ended_however_it_did(tmp_path):
  code = f"import sys, ssrl_jax.run_folder as r\nwith r.alone_in(r.Path({str(tmp_path)!r})):\n"
  code += "  print('holds', flush=True)\n  sys.stdin.read()"
  first = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  assert first.stdout.readline() == b"holds\n"
  held = pytest.raises(ValueError, match=rf"another process \({first.pid} on ")
  with held, alone_in(tmp_path):
    pass
  first.kill()  # which frees it
  first.communicate(timeout=LIMIT)
  with alone_in(tmp_path):
    pass
