"""python -m ssrl_jax.main --config=configs/NAME.py[:METHOD] [--workdir=DIR] [--config.KEY=VALUE]

Trains (from the newest checkpoint of the folder, if it has one), evaluates, and writes results.json
and report.html. `--config=FILE --help` lists every knob of a recipe with its value and meaning,
`--dry_run` says what it would cost. More about a knob than the line here: ssrl_jax/config.py, or
the docstring of what it belongs to: methods/METHOD.py, models/, method.py (views),
evaluate/PROTOCOL.py.

  python -m ssrl_jax.main --config=configs/digits.py:simclr --config.epochs=20
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from ssrl_jax import processes
from ssrl_jax.command_line import check_no_more, help_asked, print_line
from ssrl_jax.config import check_file, flatten
from ssrl_jax.data.sources import Source
from ssrl_jax.dry_run import dry_run
from ssrl_jax.evaluate.during import evaluate_during
from ssrl_jax.evaluate.suite import Results, evaluate_run, open_test, results_table
from ssrl_jax.experiment import (
  Experiment,
  abstract_state,
  build,
  check_effects,
  open_split,
  training_sampling,
  view_specs,
)
from ssrl_jax.files import check_folder
from ssrl_jax.knobs import help_lines
from ssrl_jax.optim import describe_groups
from ssrl_jax.options import nearest_key
from ssrl_jax.report import Figures, gather, write_report
from ssrl_jax.run_folder import Facts, alone_in, check_run_folder, write_results, write_run
from ssrl_jax.state import TrainState
from ssrl_jax.step import num_parameters, watched_tensors
from ssrl_jax.train import train, views_fed
from ssrl_jax.watch import Costs

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe, FILE or FILE:METHOD.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir", "", "The run's folder; default: runs/RECIPE-METHOD. A run in it is continued."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would run and what it costs; no data.")
DEVICES = flags.DEFINE_integer("devices", 0, "With --dry_run: pretend to have this many devices.")
COMPILE = flags.DEFINE_bool(
  "compile", False, "With --dry_run: compile the step too; print its memory and what it sends."
)
TPU = flags.DEFINE_string(
  "tpu", "", "With --dry_run: for this TPU slice, e.g. v5e:4x4, which need not be there; needs the "
  "extra tpu. With --compile its own compiler says what fits.",
)  # fmt: skip
ALLOW_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Continue a run although its config has changed."
)
processes.define_flags()
TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, show where it arose.")


def run(argv: list[str]) -> int:
  """Returns the exit status; those of processes.py."""
  config, given, started = CONFIG.value, flags.FLAGS, time.monotonic()
  if not DRY_RUN.value and (DEVICES.value or COMPILE.value or TPU.value):
    raise ValueError("--devices, --compile and --tpu are for --dry_run, which is not given")
  if DEVICES.value and TPU.value:
    raise ValueError("--devices and --tpu both say how many devices there are; give one of them")
  if TPU.value:
    jax.config.update("jax_platforms", "cpu")
  if DEVICES.value:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
  if own := [a for a in argv if a.startswith("--config.method.name")]:
    raise ValueError(
      f"{own[0]}: a recipe is made for its method; choose it by --config=FILE:METHOD"
    )
  check_effects(config, given_keys(argv))
  largest = max((view.size for view in view_specs(config)), default=0)
  if largest > config.data.canvas:
    logging.warning("pictures are kept at %d px (data.canvas), and views of them enlarged to %d: a "
                    "larger canvas shows more", config.data.canvas, largest)  # fmt: skip
  print_line(processes.start(
    given.coordinator, given.num_processes, given.process_id, minutes=config.watchdog.start_minutes
  ))  # fmt: skip
  say = print_line if jax.process_index() == 0 else lambda line: None
  if DRY_RUN.value:
    dry_run(config, say=say, compile_too=COMPILE.value, tpu=TPU.value)
    return 0

  recipe = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
  folder = Path(WORKDIR.value or f"runs/{recipe}-{config.method.name}").expanduser()
  check_folder(folder, "--workdir")
  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
  training_sampling(config, source)  # what is wrong with it is said before there is a folder
  during = config.evaluate.during
  evals = f"{config.evaluate.evals},{during.evals if during.every_steps else ''}"
  params, test = abstract_state(experiment).params, open_test(experiment, source, evals)
  evaluate = evaluate_during(experiment, source, test)
  facts, limits = Facts(len(source), source.num_classes), config.watchdog
  with contextlib.ExitStack() as held:
    processes.first_does(lambda: held.enter_context(alone_in(folder)))
    processes.first_does(
      lambda: check_run_folder(folder, config, facts, allow_change=ALLOW_CHANGE.value)
    )
    say(f"{config.method.name} with {config.encoder.name} on {source!r}")
    say(f"{num_parameters(params):,} parameters; {experiment.mesh.size} device(s) "
        f"({experiment.mesh.devices.flat[0].device_kind}); folder {folder}")  # fmt: skip
    say(describe_groups(params))
    costs = Costs(folder / "costs.json", started=started, writes=jax.process_index() == 0)
    stacks = folder / f"stacks-{jax.process_index()}.txt"
    with processes.watchdog(
      stacks, first_minutes=limits.first_minutes, minutes=limits.minutes
    ) as moved:
      state, finished = train(
        experiment,
        source,
        folder,
        say=say,
        moved=moved,
        begin=lambda: processes.first_does(lambda: write_run(folder, config, facts)),
        evaluate=evaluate,
        keep_costs=costs.keep,
      )
    if not finished:
      say(f"stopped at step {int(state.step)}; the same command goes on from there")
      return processes.STOPPED
    command = shlex.join(["python", "-m", "ssrl_jax.main", *argv[1:]])
    quiet = limits.evaluation_minutes
    with processes.watchdog(
      stacks, first_minutes=quiet, minutes=quiet, of="batch of the evaluation"
    ) as moved:
      judge(
        experiment, state, source, test, folder, say=say, moved=moved, command=command,
        costs=costs,
      )  # fmt: skip
  return 0


def judge(
  experiment: Experiment,
  state: TrainState,
  source: Source,
  test: Source | None,
  folder: Path,
  *,
  say: Callable[[str], None],
  moved: Callable[[], None],
  command: str,
  costs: Costs,
) -> None:
  """Evaluates what was trained; writes results.json and report.html."""
  config = experiment.config
  evals = config.evaluate.evals
  found: Results = {}

  def keep(results: Results) -> None:
    for name, figures in results.items():
      found[name] = found.get(name, {}) | figures

  def write() -> None:
    write_results(folder, experiment, state, found, command=command, costs=costs.read())

  try:
    evaluated = evaluate_run(
      experiment, state, source, test, evals=evals, say=say, moved=moved, keep=keep
    )
  except BaseException:
    if found:  # what stops one protocol costs no figure of another
      write()
    raise
  write()
  costs.keep()
  if config.evaluate.report:
    views, (_, size) = views_fed(experiment, state.key, source), watched_tensors(experiment)
    if evaluated.evaluation:
      figures = gather(evaluated.evaluation, views=views, embedding_size=size)
    else:
      figures = Figures(views=views, embedding_size=size)
    say(f"report: {write_report(folder, figures=figures)}")
  say(results_table(evaluated.results))
  evaluated.check()


def recipe_given(argv: list[str]) -> list[str]:
  """The --config=FILE among the arguments, or --config FILE as such."""
  given = [a if "=" in a else f"{a}={b}" for a, b in zip(argv, [*argv[1:], ""])]
  return [a for a in given if re.match("--?config=", a)]


def recipe_alone(argv: list[str]) -> dict[str, Any]:
  """Every key of the --config=FILE among the arguments, as the file has it; {} without one."""
  alone, without = flags.FlagValues(), [argv[0], *recipe_given(argv)]
  recipe = config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=without)
  alone(without)
  return {} if recipe.value is None else flatten(recipe.value)


def given_keys(argv: list[str]) -> list[str]:
  """The KEYs of the arguments --config.KEY."""
  return [a.removeprefix("--config.").split("=")[0] for a in argv if a.startswith("--config.")]


def unknown_key(argv: list[str]) -> str | None:
  """The message for the first --config.KEY of the command line that the recipe does not have."""
  known = recipe_alone(argv)
  for key in given_keys(argv):
    if key not in known and not any(k.startswith(f"{key}.") for k in known):
      return nearest_key(key, known, "config key")
  return None


def cli(argv: list[str]) -> int:
  logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)

  def program() -> int:
    for path in [a.partition("=")[2].split(":")[0] for a in recipe_given(argv)]:
      if path:
        check_file(path, folders=("configs",))
    if help_asked(argv, __doc__, flags.FLAGS):
      keys = recipe_alone(argv) or {"KEY": "any key of the recipe; --config=FILE --help lists them"}
      for line in help_lines("config.", keys, keys.get("method.name", "")):
        print_line(line)
      return 0
    try:
      rest = flags.FLAGS(argv)[1:]
    except AttributeError as error:
      raise ValueError(unknown_key(argv) or str(error)) from error
    check_no_more(rest)
    if CONFIG.value is None:
      raise ValueError("--config=configs/NAME.py is missing; see README.md for the recipes")
    return run(argv)

  return processes.exit_together(program, show_traceback=lambda: "--traceback" in argv)


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
