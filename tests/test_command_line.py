"""What the commands with flags of their own share."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from ssrl_jax.command_line import run_command
from tests.commands import ROOT, hears_ctrl_c


def define(values):
  flags.DEFINE_string("out", "", "The file.", values)
  flags.DEFINE_integer("seed", 0, "Of the draw.", flag_values=values)


def command(*arguments, program=lambda values: values.seed) -> int:
  return run_command(["name", *arguments], "What it does.", define, program, needed=("out",))


def test_program_gets_the_flags_and_its_status_is_the_command_s():
  assert command("--out=x", "--seed=3") == 3


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "error: --out is missing; --help says what it is"),
    (["--out=x", "more"], "error: unknown argument 'more'"),
    (["--out=x", "--sed=3"], "Unknown command line flag 'sed'"),
    (["--out=x", "--seed=three"], "seed"),
  ],
)
def test_what_cannot_be_is_one_line_before_anything_runs(arguments, message, capsys):
  assert command(*arguments, program=lambda _: pytest.fail("ran")) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


def test_traceback_is_shown_where_it_is_asked_for(capsys):
  def program(values):
    raise ValueError("no such thing")

  assert command("--out=x", program=program) == 1
  assert capsys.readouterr().err == "error: no such thing  (--traceback shows where)\n"
  assert command("--out=x", "--traceback", program=program) == 1
  assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_no_error_of_the_program(capsys):
  def program(values):
    raise KeyboardInterrupt

  assert command("--out=x", program=program) == 130
  assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_is_not_lost_where_jax_collects_garbage(capsys):
  def _xla_gc_callback():  # what is raised here is dropped
    with contextlib.suppress(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)

  def program(values):
    _xla_gc_callback()
    time.sleep(60)

  start = time.monotonic()
  with hears_ctrl_c():
    assert command("--out=x", program=program) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert time.monotonic() - start < 30  # the sleep was cut short
  assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_while_a_command_imports_is_one_line():
  arguments = [sys.executable, "-X", "importtime", "-m", "ssrl_jax.extract", "--help"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with hears_ctrl_c(), subprocess.Popen(arguments, cwd=ROOT, **pipes) as process:
    seen = []
    for line in process.stderr:  # a line for each module that is imported
      seen.append(line)
      if line.rstrip().endswith("| ssrl_jax"):
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
  assert [line for line in seen if not line.startswith("import time:")] == ["interrupted\n"]


def test_program_that_uses_the_package_keeps_its_own_ctrl_c(tmp_path):
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "__init__.py").write_text("import ssrl_jax")
  main = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
  (tmp_path / "theirs" / "__main__.py").write_text(main)
  paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
  with hears_ctrl_c():
    done = subprocess.run(
      [sys.executable, "-m", "theirs"], env=os.environ | paths, capture_output=True, text=True,
      check=True,
    )  # fmt: skip
  assert done.stdout == "True\n"


def test_reader_of_the_output_that_goes_away_is_no_error():
  code = "import sys; from tests.test_command_line import command; sys.exit(command('--help'))"
  arguments = [sys.executable, "-c", code]
  with subprocess.Popen(
    arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.close()  # long before it prints
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_another_pipe_that_breaks_is_an_error(capsys):
  def program(values):
    raise BrokenPipeError("worker 3 has gone")

  assert command("--out=x", program=program) == 1
  assert "worker 3 has gone" in capsys.readouterr().err
