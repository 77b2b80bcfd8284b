"""python -m ssrl_jax.replay --workdir=DIR --step=STEP

Makes a bad step of a run again, on its own: from the newest checkpoint before it (else from the
start), over the steps between, with the batch of DIR/bad_steps/STEP.npz, and says whether the same
tensor is the first that is bad. Writes nothing. For runs of one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from ssrl_jax import parallel
from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.command_line import print_line, run_command
from ssrl_jax.data.sources import Source
from ssrl_jax.experiment import (
  Experiment,
  abstract_state,
  build,
  open_split,
  with_guard,
)
from ssrl_jax.guard import read_bad_step
from ssrl_jax.init_from import first_state
from ssrl_jax.run_folder import load_config
from ssrl_jax.step import compile_step, watched_tensors
from ssrl_jax.train import training_batches


def replay(
  experiment: Experiment, source: Source, folder: Path, step: int, *, say: Callable[[str], None]
) -> bool:
  """Whether the update that made `step` is bad again, and in the same tensor.

  Raises:
    FileNotFoundError, ValueError: its batch was not kept, or not by a single process.
  """
  saved = read_bad_step(folder / "bad_steps" / f"{step}.npz")
  batch_size = experiment.config.batch_size
  if len(saved["id"]) != batch_size:
    raise ValueError(
      f"the batch of step {step} has {len(saved['id'])} of {batch_size} images: it is one "
      "process's share, and only runs of one process can be replayed"
    )
  checkpoints = Checkpoints(folder, keep=1, keep_best=0, read_only=True)
  state = checkpoints.restore(abstract_state(experiment), at_most=step - 1)
  checkpoints.close()
  state = with_guard(experiment, state) if state else first_state(experiment)
  first = int(state.step)
  say(f"from step {first}, {step - 1 - first} steps to go before step {step}")
  run, (names, _) = compile_step(experiment, state), watched_tensors(experiment)
  if first < step - 1:
    batches = training_batches(experiment, source, start_step=first)
    for _ in range(first, step - 1):
      state, _ = run(state, parallel.to_device(next(batches), experiment.mesh))
    batches.close()
  batch = {k: saved[k] for k in ("image", "extent", "label", "id", "substituted")}
  _, metrics = run(state, parallel.to_device(batch, experiment.mesh))
  figures = {k: v.item() for k, v in jax.device_get(metrics).items()}
  for name, value in figures.items():
    say(f"  {name} {value:g}")
  then, index = str(saved["first_bad"]), int(figures["first_bad"])
  now = names[index] if index >= 0 else "nothing"
  say(f"step {step}: first bad is {now!r}, {'as it was then' if now == then else f'not {then!r}'}")
  return now == then


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", "", "The run's folder.", values)
  flags.DEFINE_integer(
    "step", 0, "Which: NUMBER of a file bad_steps/NUMBER.npz.", lower_bound=0, flag_values=values
  )


def cli(argv: list[str]) -> int:
  def program(values: flags.FlagValues) -> int:
    folder = Path(values.workdir).expanduser()
    config = load_config(folder)
    source = open_split(config, "train")
    experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
    same = replay(experiment, source, folder, values.step, say=print_line)
    return 0 if same else 1

  return run_command(argv, __doc__, define_flags, program, needed=("workdir", "step"))


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
