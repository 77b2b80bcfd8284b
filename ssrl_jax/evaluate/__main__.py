"""python -m ssrl_jax.evaluate --workdir=DIR [--evals=knn,linear] [--evaluate.PROTOCOL.KEY=VALUE]

Evaluates the newest whole checkpoint of a finished or running run, adds the figures to
DIR/evaluation.json, and writes pictures and tables to DIR/evaluation/. Nothing else is touched.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from ssrl_jax.config import flatten, nearest
from ssrl_jax.evaluate.suite import evaluate_run, load_run, open_test, results_table
from ssrl_jax.main import exit_with_one_line, print_line
from ssrl_jax.run_folder import load_config, merge_evaluation
from ssrl_jax.state import state_digest


def run(folder: Path, config: ConfigDict, evals: str, other: Path | None) -> int:
  config.evaluate.evals = evals
  loaded = load_run(folder, config)
  print_line(f"step {int(loaded.state.step)} of {loaded.experiment.total_steps} of {folder}")
  test = open_test(loaded.experiment, loaded.train)
  evaluated = evaluate_run(
    *loaded, test, evals=evals, say=print_line, folder=folder / "evaluation",
    other=load_run(other, load_config(other)) if other else None,
  )  # fmt: skip
  merge_evaluation(
    folder / "evaluation.json", evaluated.results, options=config.evaluate.to_dict(),
    step=int(loaded.state.step), state_digest=state_digest(loaded.state),
  )  # fmt: skip
  print_line(results_table(evaluated.results))
  return 0


def cli(argv: list[str]) -> int:
  logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)

  def program() -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "The run's folder.", values)
    flags.DEFINE_string("evals", "knn,linear", "Which, separated by commas.", values)
    flags.DEFINE_string("other", "", "A second run's folder, for what compares two.", values)
    flags.DEFINE_bool("traceback", False, "On an error, show where it arose.", values)
    values(argv, known_only=True)
    if not values.workdir:
      raise ValueError("--workdir=DIR, the folder of a run, is missing")
    config = load_config(Path(values.workdir))
    known = [f"evaluate.{key}" for key in flatten(config.evaluate)]
    for key in [a.removeprefix("--").split("=")[0] for a in argv if a.startswith("--evaluate.")]:
      if key not in known:
        raise ValueError(nearest(key, known, "option"))
    evaluate = config_flags.DEFINE_config_dict(
      "evaluate", config.evaluate, flag_values=values, lock_config=True
    )
    values.unparse_flags()
    values(argv)
    config.evaluate = evaluate.value
    other = Path(values.other) if values.other else None
    return run(Path(values.workdir), config, values.evals, other)

  return exit_with_one_line(program, show_traceback=lambda: "--traceback" in argv)


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
