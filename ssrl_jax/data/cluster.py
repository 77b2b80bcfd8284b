"""python -m ssrl_jax.data.cluster --workdir=RUN --num_clusters=K --out=clusters.npy

Clusters the training set of a run by the frozen features of its newest checkpoint, and writes the
cluster of each example: what --config.data.sampling=clusters takes to train the next run on an
evened-out pool. A command on top of everything else; nothing imports it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from absl import flags
from sklearn.cluster import MiniBatchKMeans

from ssrl_jax.command_line import print_line, run_command
from ssrl_jax.evaluate.suite import load_run, trained_evaluation
from ssrl_jax.experiment import open_split


def run(folder: Path, num_clusters: int, out: Path, seed: int) -> int:
  experiment, state = load_run(folder)
  train = open_split(experiment.config, "train")
  if not 2 <= num_clusters <= len(train):
    raise ValueError(f"num_clusters is {num_clusters}; expected 2 to {len(train)}, the examples")
  if not out.parent.is_dir():
    raise FileNotFoundError(f"--out={out}: no folder {out.parent}")
  rows = trained_evaluation(experiment, state, train, train).features("train")
  kmeans = MiniBatchKMeans(num_clusters, random_state=seed, n_init=3, batch_size=4096)
  clusters = np.full(len(train), -1, np.int32)  # -1: damaged, so in no cluster
  clusters[rows.ids] = kmeans.fit_predict(rows.features)
  with out.open("wb") as file:  # np.save itself would add a suffix to another name
    np.save(file, clusters)
  sizes = np.bincount(clusters[rows.ids], minlength=num_clusters)
  print_line(
    f"{out}: {len(rows.ids)} of {len(train)} examples in {num_clusters} clusters of {sizes.min()} "
    f"to {sizes.max()}, median {np.median(sizes):g}; train on them with "
    f"--config.data.sampling=clusters --config.data.sampling_file={out}"
  )
  return 0


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", "", "The run's folder.", values)
  flags.DEFINE_integer("num_clusters", 0, "K of k-means.", flag_values=values)
  flags.DEFINE_string("out", "clusters.npy", "The file to write.", values)
  flags.DEFINE_integer("seed", 0, "Of k-means.", flag_values=values)


def cli(argv: list[str]) -> int:
  def program(values: flags.FlagValues) -> int:
    folder, out = (Path(p).expanduser() for p in (values.workdir, values.out))
    return run(folder, values.num_clusters, out, values.seed)

  return run_command(argv, __doc__, define_flags, program, needed=("workdir",))


if __name__ == "__main__":
  sys.exit(cli(sys.argv))
