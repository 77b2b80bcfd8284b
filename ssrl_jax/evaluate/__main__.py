"""python -m ssrl_jax.evaluate --workdir=DIR [--evals=knn,linear] [--evaluate.PROTOCOL.KEY=VALUE]

Evaluates the newest whole checkpoint of a finished or running run, adds the figures to
DIR/evaluation.json (and what that cost to DIR/evaluation-costs.json), and writes pictures and
tables to DIR/evaluation/. Nothing else is touched.
With --step=N the checkpoint of that step, into DIR/evaluation-N.json.
`--data.source=folder:PATH` and the other keys of `data` judge it on other pictures. Keys may also
be written as training has them, --config.evaluate.PROTOCOL.KEY=VALUE.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from ssrl_jax import processes
from ssrl_jax.command_line import check_no_more, define_step, help_asked, print_line
from ssrl_jax.config import flatten
from ssrl_jax.data.sources import NoPictures
from ssrl_jax.evaluate import EVALS
from ssrl_jax.evaluate.suite import (
  Results,
  asked,
  check_encoders,
  evaluate_run,
  load_run,
  open_test,
  results_table,
  select,
)
from ssrl_jax.experiment import open_split
from ssrl_jax.files import check_folder
from ssrl_jax.knobs import help_lines
from ssrl_jax.options import nearest_key
from ssrl_jax.run_folder import load_config, merge_evaluation
from ssrl_jax.state import state_digest
from ssrl_jax.watch import Costs, costs_file

GROUPS = ("evaluate", "data", "mesh")  # of a run's config, that an evaluation may change


def run(values: flags.FlagValues, config: ConfigDict) -> int:
  started = time.monotonic()
  folder = Path(values.workdir).expanduser()
  name = "evaluation" if values.step is None else f"evaluation-{values.step}"
  out = Path(values.out).expanduser() if values.out else folder / f"{name}.json"
  config.evaluate.evals = values.evals
  print_line(processes.start(
    values.coordinator, values.num_processes, values.process_id,
    minutes=config.watchdog.start_minutes,
  ))  # fmt: skip
  say = print_line if jax.process_index() == 0 else lambda line: None
  experiment, state = load_run(folder, mesh=config.mesh, step=values.step)
  other = load_run(Path(values.other).expanduser(), mesh=config.mesh) if values.other else None
  say(f"step {int(state.step)} of {experiment.total_steps} of {folder}")
  experiment = replace(experiment, config=config)
  own = {protocol.needs for protocol in asked(values.evals, config).values()} <= {"nothing"}
  train = NoPictures() if own else open_split(config, "train")
  test = open_test(experiment, train, values.evals)
  encoders = check_encoders(values.encoders)
  facts = {
    "options": {name: config[name].to_dict() for name in GROUPS},
    "step": int(state.step),
    "state_digest": state_digest(state),
    "num_pictures": () if own else (len(train), len(test or ())),
  }
  if other:
    facts["options"]["evaluate"]["geometry"]["other"] = state_digest(other.state)
  quiet = config.watchdog.evaluation_minutes
  out.parent.mkdir(parents=True, exist_ok=True)
  costs = Costs(costs_file(out), started=started, writes=jax.process_index() == 0)

  def keep(results: Results) -> None:
    merge_evaluation(out, results, **facts)
    costs.keep()

  stacks = out.with_name(f"{out.stem}-stacks-{jax.process_index()}-{os.getpid()}.txt")
  with processes.watchdog(
    stacks, first_minutes=quiet, minutes=quiet, of="batch of the evaluation"
  ) as moved:
    evaluated = evaluate_run(
      experiment, state, train, test, evals=values.evals, say=say,
      folder=out.with_suffix(""), other=other, encoders=encoders,
      keep=keep, moved=moved,
    )  # fmt: skip
  say(results_table(evaluated.results))
  evaluated.check()
  if values.evals and not evaluated.results:
    raise ValueError(f"none of {values.evals} could be run on these pictures")
  return 0


def cli(argv: list[str]) -> int:
  logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)

  def program() -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "The run's folder.", values)
    flags.DEFINE_string("evals", "knn,linear", f"Some of {','.join(EVALS)}.", values)
    flags.DEFINE_string(
      "encoders", "", "Some of trained,random_init,raw_pixels; default: all, or the first alone "
      "without evaluate.controls.", values,
    )  # fmt: skip
    flags.DEFINE_string("other", "", "A second run's folder, for CKA in geometry.", values)
    flags.DEFINE_string("out", "", "NAME.json for the figures; default: as above", values)
    define_step(values)
    processes.define_flags(values)
    flags.DEFINE_bool("traceback", False, "On an error, show where it arose.", values)
    if help_asked(argv, __doc__, values):
      told = [a for a in argv if a.startswith("--workdir=")]
      folder = Path(told[0].removeprefix("--workdir=")).expanduser() if told else None
      keys = {
        "GROUP.KEY": "evaluate, data, mesh of a run's config: --workdir=DIR --help lists them"
      }
      method = ""
      if folder:
        keys = flatten(load_config(folder))
        method = keys["method.name"]
        keys = {key: value for key, value in keys.items() if key.split(".")[0] in GROUPS}
      for line in help_lines("", keys, method):
        print_line(line)
      return 0
    values(argv, known_only=True)
    if not values.workdir:
      raise ValueError("--workdir=DIR, the folder of a run, is missing")
    if values.out and not values.out.endswith(".json"):
      raise ValueError(f"--out={values.out}: expected a file NAME.json; pictures go into NAME")
    select(values.evals)  # an unknown one is said before a checkpoint is read
    check_encoders(values.encoders)
    for flag in ("workdir", "other"):
      check_folder(Path(values[flag].value).expanduser(), f"--{flag}")
    check_folder(Path(values.out).expanduser().parent, "--out")
    config = load_config(Path(values.workdir).expanduser())
    own = config.data.source
    known = [key for key in flatten(config) if key.split(".")[0] in GROUPS]
    given = [re.sub(r"^--?config\.", "--", a) for a in argv]  # as training has it
    for said, argument in zip(argv, given):
      key = argument.lstrip("-").split("=")[0]
      ours = key.split(".")[0] in GROUPS
      if said != argument and not ours:
        raise ValueError(f"{said}: an evaluation can change {', '.join(GROUPS)}, the rest is fixed")
      if argument.startswith("-") and ours and key not in known:
        raise ValueError(nearest_key(key, known, "option"))
    groups = {
      name: config_flags.DEFINE_config_dict(name, config[name], flag_values=values, sys_argv=given)
      for name in GROUPS
    }
    values.unparse_flags()
    check_no_more(values(given)[1:])
    keys = {a.lstrip("-").split("=")[0] for a in given}
    config.update({name: group.value for name, group in groups.items()})
    if config.data.source != own:  # other pictures: all of them
      rest = {"num_train", "num_test"} - {key.removeprefix("data.") for key in keys}
      config.data.update(dict.fromkeys(rest, 0))
    return run(values, config)

  return processes.exit_together(program, show_traceback=lambda: "--traceback" in argv)


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
