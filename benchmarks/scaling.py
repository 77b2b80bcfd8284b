"""A cost model of a training step on 1 to 4,096 chips: a model, not a measurement.

python -m benchmarks.scaling [--name=scaling]

Time of a step = max(compute, memory) + latency of synchronised BatchNorm + what the loss gathers +
the part of the gradients' exchange that the backward pass does not hide. FLOPs are counted from
the traced loss, bytes are those of `benchmarks.collectives.least_sent`, peaks are the makers', and
the EFFICIENCY is assumed: none was measured on such chips. Draws docs/scaling.png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib

from benchmarks.collectives import least_sent
from benchmarks.common import write_results
from configs import imagenet
from ssrl_jax.dry_run import activation_bytes, array_bytes
from ssrl_jax.experiment import abstract_state, build
from ssrl_jax.flops import PEAK_FLOPS
from ssrl_jax.step import flops_per_step, num_parameters

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"


class Chip(NamedTuple):
  """Per chip, each bandwidth in one direction, in bytes/s."""

  flops: float  # dense bfloat16
  memory: float
  near: float  # within a slice: ICI, NVLink
  far: float  # between slices: data-centre network, InfiniBand
  slice_size: int  # most chips that one fast network joins
  hop: float  # seconds that a collective takes whatever its size, within a slice: assumed
  far_hop: float  # the same between slices: assumed


CHIPS = {
  # docs.cloud.google.com/tpu/docs/v5p: 2,765 GB/s, ICI 1,200 GB/s both ways, 50 Gbit/s a chip
  "TPU v5p": Chip(PEAK_FLOPS["TPU v5"], 2765e9, 600e9, 6.25e9, 4096, 10e-6, 100e-6),
  # docs.cloud.google.com/tpu/docs/v6e: 1,600 GB/s, ICI 800 GB/s both ways, 25.6 Tbit/s a pod of 256
  "TPU v6e": Chip(PEAK_FLOPS["TPU v6 lite"], 1600e9, 400e9, 12.5e9, 256, 10e-6, 100e-6),
  # NVIDIA's H200 and DGX H200 data sheets: 4.8 TB/s, NVLink 900 GB/s both ways, 400 Gbit/s a GPU
  "H200": Chip(PEAK_FLOPS["NVIDIA H200"], 4800e9, 450e9, 50e9, 8, 15e-6, 40e-6),
}
# Assumed shares of the peaks that a good program reaches, and of the gradients' exchange that may
# run beside the backward pass.
EFFICIENCY = {"flops": 0.6, "memory": 0.8, "network": 0.7, "overlap": 0.8}

# Name -> method, encoder, images a chip in weak scaling, global batch in strong scaling.
CASES = {
  "simclr, ResNet-50": ("simclr", "resnet50", 64, 4096),
  "fusion, ResNet-50": ("fusion", "resnet50", 64, 4096),
  "dino, ViT-L/16": ("dino", "vit_l", 16, 1024),
}
CHIP_COUNTS = [2**i for i in range(13)]
BATCHES = 512, 1024  # of the two traces from which the counts are interpolated


class Work(NamedTuple):
  """Of one step; a pair is what is linear and quadratic in the batch, or fixed and linear."""

  flops: tuple[float, float]
  activations: float  # bytes an image that the backward pass keeps: an upper estimate
  state: float  # bytes
  gradients: float  # bytes that are summed
  moments: float  # bytes of BatchNorm's moments that are summed
  num_norms: int  # BatchNorms, of all passes
  loss: tuple[float, float]  # bytes that the loss gathers, scatters or sums (these twice)


def trace(method: str, encoder: str) -> Work:
  """Counted from the traced program at two batch sizes; nothing is computed."""
  (b1, b2), found = BATCHES, []
  for batch in BATCHES:
    config = imagenet.get_config(method)
    config.encoder.name, config.batch_size, config.mesh.devices = encoder, batch, 8
    experiment = build(config, num_examples=batch * 1000, num_classes=1000)
    whole = {k: v / (7 / 8) for k, v in least_sent(experiment).items()}  # of 8 devices
    found.append((flops_per_step(experiment), activation_bytes(experiment), whole))
  (f1, a1, w1), (f2, a2, w2) = found
  square = max((f2 / b2 - f1 / b1) / (b2 - b1), 0)
  gathered = (w2["loss"] - w1["loss"]) / (b2 - b1)
  state = abstract_state(experiment)
  stats = state.method_state["batch_stats"]
  return Work(
    flops=(f1 / b1 - square * b1, square),
    activations=(a2 - a1) / (b2 - b1),
    state=array_bytes(state._replace(key=()), per_device=False),
    gradients=4 * num_parameters(state.params),
    moments=w1["moments"] / 2,
    num_norms=len(jax.tree.leaves(stats)) // 2 * len(experiment.method.views),
    loss=(w1["loss"] - gathered * b1, gathered),
  )


def step_time(work: Work, chip: Chip, chips: int, batch: int) -> dict[str, float]:
  """Seconds of each part of a step of `batch` images on `chips` chips, and of the whole step."""
  slices = math.ceil(chips / chip.slice_size)
  near = chips // slices

  def carry(sent: float) -> float:
    """Of what a device sends in a large ring: within its slice, then its part between slices."""
    seconds = sent * (near - 1) / near / chip.near + sent / near * (slices - 1) / slices / chip.far
    return seconds / EFFICIENCY["network"]

  hop = (chip.hop if near > 1 else 0) + (chip.far_hop if slices > 1 else 0)
  linear, square = work.flops
  compute = (linear * batch + square * batch**2) / chips / chip.flops / EFFICIENCY["flops"]
  # The state is read and written about twice; activations are written once and read twice.
  moved = 4 * work.state + 3 * work.activations * batch / chips
  memory = moved / chip.memory / EFFICIENCY["memory"]
  local = max(compute, memory)
  hidden = EFFICIENCY["overlap"] * 2 / 3 * local  # two thirds of a step are its backward pass
  parts = {
    "compute": compute,
    "memory": memory,
    "gradients": max(0.0, carry(2 * work.gradients) + hop - hidden),
    "norms": carry(2 * work.moments) + 2 * work.num_norms * hop,
    "loss": carry(work.loss[0] + work.loss[1] * batch) + 2 * hop,
  }
  return parts | {"step": local + parts["gradients"] + parts["norms"] + parts["loss"]}


def measure(case: str, work: Work, name: str, scaling: str) -> list[dict[str, Any]]:
  """A row for each number of chips that the batch can be shared by."""
  *_, a_chip, whole = CASES[case]
  rows = []
  for chips in CHIP_COUNTS:
    batch = a_chip * chips if scaling == "weak" else whole
    if batch < chips:
      break
    parts = step_time(work, CHIPS[name], chips, batch)
    rate = batch / parts["step"]
    limit = max((k for k in parts if k != "step"), key=parts.get)
    alone = rows[0]["images_per_s"] if rows else rate
    rows.append(
      {"case": case, "chip": name, "scaling": scaling, "chips": chips, "batch": batch}
      | {"images_per_s": rate, "efficiency": rate / chips / alone, "limit": limit}
      | {f"{k}_ms": 1e3 * v for k, v in parts.items()}
    )
  return rows


def draw(rows: list[dict[str, Any]]) -> None:
  """docs/scaling.png: efficiency over chips, a panel for each case and kind of scaling."""
  figure, axes = plt.subplots(2, len(CASES), figsize=(11, 6), sharex=True, sharey=True)
  for line, scaling in zip(axes, ("strong", "weak")):
    for axis, case in zip(line, CASES):
      for name in CHIPS:
        chosen = [r for r in rows if (r["case"], r["chip"], r["scaling"]) == (case, name, scaling)]
        axis.plot([r["chips"] for r in chosen], [100 * r["efficiency"] for r in chosen], label=name)
      a_chip, whole = CASES[case][2:]
      size = f"batch {whole:,}" if scaling == "strong" else f"{a_chip} images a chip"
      axis.set_title(f"{case}: {scaling}, {size}", fontsize=9)
      axis.set_xscale("log", base=2)
      axis.set_ylim(0, 105)
      axis.grid(alpha=0.3)
  for axis in axes[-1]:
    axis.set_xlabel("chips")
  for line in axes:
    line[0].set_ylabel("% of one chip's rate, a chip")
  axes[0, 0].legend(fontsize=8)
  figure.suptitle("Model, not measured: efficiency of scaling")
  figure.tight_layout()
  figure.savefig(DOCS / "scaling.png", dpi=100)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--name", default="scaling")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  rows = []
  for case, (method, encoder, *_) in CASES.items():
    work = trace(method, encoder)
    print(case, work, flush=True)
    for name in CHIPS:
      rows += measure(case, work, name, "strong") + measure(case, work, name, "weak")
  draw(rows)
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
