"""python -m ssrl_jax.extract --workdir=RUN --out=features.npz [--source=folder:PATH]

Writes the frozen features of pictures by a checkpoint of a run, as the evaluations
see them: the centre of each picture, at the size of config.evaluate. For `numpy.load`: an array
[N, D] for each of --kinds, and [N] `labels` (-1: unknown; else they count in `classes`), `names`
and `ids` (positions) of the pictures that can be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from absl import flags

from ssrl_jax.command_line import define_step, print_line, run_command
from ssrl_jax.evaluate.suite import load_run, trained_evaluation
from ssrl_jax.experiment import open_split
from ssrl_jax.files import check_folder, whole
from ssrl_jax.run_folder import load_config


def run(
  folder: Path,
  source: str,
  split: str,
  kinds: str,
  devices: int,
  out: Path,
  *,
  step: int | None = None,
) -> int:
  if out.is_dir():
    raise ValueError(f"--out={out} is a folder; name a file in it")
  check_folder(folder, "--workdir")
  check_folder(out.parent, "--out")
  config = load_config(folder)
  config.mesh.update({"devices": devices, "slices": 0, "fsdp": 1})
  experiment, state = load_run(folder, mesh=config.mesh, step=step)
  config = experiment.config
  config.data.source = source or config.data.source
  if source or split not in (config.data.train, config.data.test):  # all of it
    config.data.update({"num_train": 0, "num_test": 0})
  which = "test" if split == config.data.test else "train"
  config.data[which] = split
  pictures = open_split(config, which)
  evaluation = trained_evaluation(experiment, state, pictures, None)
  known = evaluation.kinds()
  wanted = known if kinds == "all" else tuple(kind.strip() for kind in kinds.split(","))
  for kind in wanted:
    evaluation.check_kind(kind)
  out.parent.mkdir(parents=True, exist_ok=True)
  if any(kind != "pooled" for kind in wanted):
    evaluation.features("train", known[-1])  # all kinds at once
  found = {kind: evaluation.features("train", kind) for kind in wanted}
  rows = found[wanted[0]]
  arrays = {kind: rows.features for kind, rows in found.items()}
  names = np.array([pictures.name(int(i)) for i in rows.ids])
  classes = np.array(pictures.class_names, dtype=str)
  with whole(out) as partial, partial.open("wb") as file:  # np.savez itself would add a suffix
    np.savez(file, **arrays, labels=rows.labels, classes=classes, ids=rows.ids, names=names)
  shapes = ", ".join(f"{kind} {list(x.shape)}" for kind, x in arrays.items())
  print_line(f"{out}: {shapes} of {len(rows.ids)} of {len(pictures)} pictures of {pictures!r}")
  return 0


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", "", "The run's folder.", values)
  flags.DEFINE_string("out", "", "The file to write, NAME.npz.", values)
  flags.DEFINE_string(
    "source", "", "Pictures, as config.data.source names them; default: the run's.", values
  )
  flags.DEFINE_string("split", "train", "Which of the source's.", values)
  define_step(values)
  flags.DEFINE_integer(
    "devices", 1, "That share the work; 0: all. They must divide the run's batches.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    "kinds", "pooled", "Which vectors, e.g. pooled,map8, or all; of `evaluate.features.vectors`.",
    values,
  )  # fmt: skip


def cli(argv: list[str]) -> int:
  def program(values: flags.FlagValues) -> int:
    folder, out = (Path(p).expanduser() for p in (values.workdir, values.out))
    v = values
    return run(folder, v.source, v.split, v.kinds, v.devices, out, step=v.step)

  return run_command(argv, __doc__, define_flags, program, needed=("workdir", "out"))


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
