"""python -m ssrl_jax.evaluate --workdir=DIR [--evals=knn,linear]

Evaluates the newest whole checkpoint of a finished or running run, and writes the figures to
DIR/evaluation.json. Nothing else in DIR is touched.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from absl import flags

from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.evaluate.suite import evaluate_run, open_test, results_table
from ssrl_jax.experiment import abstract_state, build, open_split
from ssrl_jax.main import exit_with_one_line, print_line
from ssrl_jax.run_folder import load_config, write_json
from ssrl_jax.state import state_digest


def run(folder: Path, evals: str) -> int:
  config = load_config(folder)
  train = open_split(config, "train")
  experiment = build(config, num_examples=len(train), num_classes=train.num_classes)
  checkpoints = Checkpoints(folder, keep=1, keep_best=0, read_only=True)
  state = checkpoints.restore(abstract_state(experiment))
  if state is None:
    raise FileNotFoundError(f"{folder} has no complete checkpoint yet")
  step = int(state.step)
  print_line(f"step {step} of {experiment.total_steps} of {folder}")
  test = open_test(experiment, train)
  results = evaluate_run(experiment, state, train, test, evals=evals, say=print_line).results
  record = {"step": step, "state_digest": state_digest(state), "results": results}
  write_json(folder / "evaluation.json", record)
  print_line(results_table(results))
  return 0


def cli(argv: list[str]) -> int:
  logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)

  def program() -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "The run's folder.", values)
    flags.DEFINE_string("evals", "knn,linear", "Which, separated by commas.", values)
    flags.DEFINE_bool("traceback", False, "On an error, show where it arose.", values)
    values(argv)
    if not values.workdir:
      raise ValueError("--workdir=DIR, the folder of a run, is missing")
    return run(Path(values.workdir), values.evals)

  return exit_with_one_line(program, show_traceback=lambda: "--traceback" in argv)


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
