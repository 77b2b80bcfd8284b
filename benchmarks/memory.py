"""What fits: compiled memory of a training step on each device, replicated and cut (FSDP).

python -m benchmarks.memory [--recipe=configs/imagenet.py] [--method=dino] [--encoder=vit_l]
  [--batches=16,64] [--fsdp=1,0] [--devices=8 | --topology=v5e:2x4] [--name=memory]

Nothing is run or allocated: the whole step is compiled for virtual CPU devices or, with --topology,
by the TPU's own compiler for TPUs that are not there (needs the extra `tpu`), which refuses what
does not fit. MiB are those of one device.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax

from benchmarks.common import write_results
from ssrl_jax import parallel
from ssrl_jax.collectives import collectives, summary
from ssrl_jax.config import load_file
from ssrl_jax.dry_run import array_bytes, compiled_memory, too_much
from ssrl_jax.experiment import abstract_state, build
from ssrl_jax.step import compile_step


def measure(config, *, topology: str) -> dict[str, Any]:
  devices = parallel.described_tpus(topology, config.mesh.slices or 1) if topology else None
  num_examples = config.batch_size * 1000
  experiment = build(config, num_examples=num_examples, num_classes=10, devices=devices)
  state = abstract_state(experiment)
  row = {
    "method": config.method.name,
    "encoder": config.encoder.name,
    "devices": f"{experiment.mesh.size} x {experiment.mesh.devices.flat[0].device_kind}",
    "batch": config.batch_size,
    "fsdp": experiment.mesh.shape[parallel.FSDP],
    "state_mib": array_bytes(state, per_device=True) / 2**20,
  }
  start = time.perf_counter()
  try:
    compiled = compile_step(experiment, state)
    memory = compiled_memory(compiled) / 2**20
    sent = sum(summary(collectives(compiled.as_text())).values()) / 2**20
  except jax.errors.JaxRuntimeError as error:
    memory, sent = f"does not fit: {too_much(error)}", "-"
  seconds = time.perf_counter() - start
  return row | {"memory_mib": memory, "sent_mib": sent, "compile_s": seconds}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipe", default="configs/imagenet.py")
  parser.add_argument("--method", default="dino")
  parser.add_argument("--encoder", default="vit_l")
  parser.add_argument("--batches", default="16,64")
  parser.add_argument("--fsdp", default="1,0")
  parser.add_argument("--slices", type=int, default=0)
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument("--topology", default="")
  parser.add_argument("--name", default="memory")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  config, rows = load_file(options.recipe).get_config(options.method), []
  config.encoder.name = options.encoder
  config.mesh.slices = options.slices
  for batch in map(int, options.batches.split(",")):
    for fsdp in map(int, options.fsdp.split(",")):
      config.batch_size, config.mesh.fsdp = batch, fsdp
      rows.append(measure(config, topology=options.topology))
      print(rows[-1], flush=True)
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
