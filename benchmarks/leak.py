"""Memory, open files and threads over many steps of the whole loop, which should not grow.

python -m benchmarks.leak [--steps=100000] [--cache=device] [--name=leak]

A network of one layer on digit_scenes, so that a step costs little and all of the loop around it
runs: reading, metrics, a line every 50 steps, TensorBoard, a checkpoint every 1,000. Linux only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from benchmarks.common import write_results
from configs import digits
from ssrl_jax.config import view_group
from ssrl_jax.experiment import build, open_split
from ssrl_jax.method import Features
from ssrl_jax.methods import simclr
from ssrl_jax.train import train

ROWS = 20


class Linear(nn.Module):
  """One layer over the pixels."""

  @nn.compact
  def __call__(self, images, train):
    del train
    return Features(pooled=nn.Dense(8)(images.reshape(len(images), -1)), maps={})


def resident_mib() -> float:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(*, steps: int, cache: str, workdir: Path) -> list[dict[str, Any]]:
  config = digits.get_config("simclr")
  config.global_views = view_group(size=8, jitter=0.0, greyscale=0.0, blur=(0.0,))
  config.batch_size, config.steps, config.evaluate.size = 8, steps, 8
  config.data.update({"num_train": 64, "cache": cache, "threads": 1})
  config.checkpoint.every_steps, config.log.every_steps = max(steps // 100, 50), 50
  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
  views = experiment.method.views
  method = simclr.make(encoder=Linear(), views=views, run=None, hidden_dim=8, out_dim=8)
  seen, rows, every = [], [], max(steps // ROWS, 1)

  def say(line: str) -> None:
    step = int(line.split("/")[0].removeprefix("step ")) if line.startswith("step ") else 0
    if step:
      seen.append((step, resident_mib()))
    if step and step // every > len(rows):
      late = np.array([s for s in seen if s[0] > step / 2])
      slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] if len(late) > 2 else 0.0
      rows.append(
        {
          "step": step,
          "resident_mib": resident_mib(),
          "mib_per_10k_steps": 1e4 * slope,  # over the later half until here
          "open_files": len(os.listdir("/proc/self/fd")),
          "threads": threading.active_count(),
        }
      )
      print(rows[-1], flush=True)

  train(replace(experiment, method=method), source, workdir, say=say)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=100_000)
  parser.add_argument("--cache", default="", choices=("", "device"))
  parser.add_argument("--name", default="leak")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="ssrl_jax_leak_") as workdir:
    rows = measure(steps=options.steps, cache=options.cache, workdir=Path(workdir))
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
