"""What a race of the linear probe's settings loses to a whole search, on encoders of trained runs.

python -m benchmarks.linear_search --runs='runs/a,runs/tables/runs/*-byol-*' [--data=folder:DIR]
  [--num_train=0] [--epochs=20,50] [--name=linear_search]

For each run and number of epochs: test accuracy by the setting that a race chose, and by the one
that a search to the end chose, of the default grid. `cpu_s` is the processor time of all threads in
the whole probe, features excepted, and in it of the compiler where a shape is new.
"""

from __future__ import annotations

import argparse
import glob
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import write_results
from ssrl_jax.evaluate import linear, suite
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.experiment import open_split

SEARCHES = {"race": 0, "whole": 10**9}  # race_above


def open_run(folder: Path, *, data: str, num_train: int) -> Evaluation:
  """Of its trained encoder, with this many of its training pictures (0: all)."""
  loaded = suite.load_run(folder)
  config = loaded.experiment.config
  config.data.num_train = num_train
  config.data.source = data or config.data.source
  splits = (open_split(config, split) for split in ("train", "test"))
  return suite.trained_evaluation(loaded.experiment, loaded.state, *splits)


def measure(name: str, evaluation: Evaluation, *, epochs: int) -> list[dict[str, Any]]:
  rows = []
  for search, race_above in SEARCHES.items():
    start = time.process_time()
    figures = linear.run(evaluation, epochs=epochs, race_above=race_above)
    rows.append(
      {
        "run": name, "epochs": epochs, "search": search, "accuracy": figures["linear/accuracy"],
        "learning_rate": figures["linear/learning_rate"],
        "weight_decay": figures["linear/weight_decay"], "cpu_s": time.process_time() - start,
      }
    )  # fmt: skip
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", required=True, help="folders of runs or globs of them")
  parser.add_argument("--data", default="", help="their data.source now, if it has moved")
  parser.add_argument("--num_train", type=int, default=0)
  parser.add_argument("--epochs", default="20,50")
  parser.add_argument("--name", default="linear_search")
  options = parser.parse_args()
  rows = []
  for folder in sorted(f for pattern in options.runs.split(",") for f in glob.glob(pattern)):
    evaluation = open_run(Path(folder), data=options.data, num_train=options.num_train)
    for split in ("train", "test"):
      evaluation.labelled(split, "pooled")
    for epochs in map(int, options.epochs.split(",")):
      rows += measure(Path(folder).name, evaluation, epochs=epochs)
      print(*rows[-len(SEARCHES) :], sep="\n", flush=True)
  write_results(options.name, rows)
  for epochs in map(int, options.epochs.split(",")):
    means = {
      s: fmean(r["accuracy"] for r in rows if (r["search"], r["epochs"]) == (s, epochs))
      for s in SEARCHES
    }
    print(f"{epochs} epochs, mean accuracy:", ", ".join(f"{s} {m:.2f}" for s, m in means.items()))


if __name__ == "__main__":
  main()
