"""A recipe, several methods, several seeds -> one table of mean and standard deviation.

python -m benchmarks.repeat --recipe=configs/cifar10_cpu.py --methods=fusion,simclr --seeds=0,1,2
  --name=cifar10_cpu [--runs=runs] [-- --config.data.source=folder:PATH ...]

Each row is `python -m ssrl_jax.main` in a folder of its own; what is finished is not run again and
what was stopped goes on. Arguments after `--` go to every run. Writes results/NAME.json and .md.
CPU minutes are those of the process that finished the run, evaluation included.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

COLUMNS = {"knn/accuracy": "k-NN %", "linear/accuracy": "linear %"}
CONTROLS = {"random_init": "random initialisation", "raw_pixels": "raw pixels"}


def run(recipe: str, method: str, seed: int, folder: pathlib.Path, extra: list[str]) -> dict:
  if not (folder / "results.json").exists():
    command = [
      *(sys.executable, "-m", "ssrl_jax.main", f"--config={recipe}:{method}"),
      *(f"--config.seed={seed}", f"--workdir={folder}", *extra),
    ]
    subprocess.run(command, check=True)
  return json.loads((folder / "results.json").read_text())


def spread(values: list[float]) -> str:
  if len(values) < 2:
    return f"{values[0]:.1f}"
  return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def row(name: str, records: list[dict], encoder: str) -> str:
  cells = [spread([r["results"][encoder][key] for r in records]) for key in COLUMNS]
  if encoder == "trained":
    cells.append(f"{statistics.mean([r['cpu_seconds'] for r in records]) / 60:.1f}")
  else:
    cells.append("-")
  return f"| {name} | {len(records)} | {' | '.join(cells)} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipe", required=True)
  parser.add_argument("--methods", default="fusion,simclr")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--name", required=True)
  parser.add_argument("--runs", default="runs")
  parser.add_argument("extra", nargs="*", help="arguments for every run, after --")
  options = parser.parse_args()
  methods, seeds = options.methods.split(","), [int(s) for s in options.seeds.split(",")]
  found: dict[str, list[dict]] = {m: [] for m in methods}
  for seed in seeds:
    for method in methods:
      folder = pathlib.Path(options.runs) / f"{options.name}-{method}-{seed}"
      found[method].append(run(options.recipe, method, seed, folder, options.extra))

  lines = [
    f"| method | seeds | {' | '.join(COLUMNS.values())} | CPU minutes a run |",
    "| --- | --- | --- | --- | --- |",
    *(row(method, records, "trained") for method, records in found.items()),
    *(
      row(title if control == "raw_pixels" else f"{title}, encoder of {method}", records, control)
      for control, title in CONTROLS.items()
      for method, records in found.items()
      if control == "random_init" or method == methods[0]
    ),
  ]
  folder = pathlib.Path("results")
  folder.mkdir(exist_ok=True)
  (folder / f"{options.name}.md").write_text("\n".join(lines) + "\n")
  (folder / f"{options.name}.json").write_text(json.dumps(found, indent=1) + "\n")
  print("\n".join(lines))


if __name__ == "__main__":
  main()
