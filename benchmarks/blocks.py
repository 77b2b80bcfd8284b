"""Contrastive losses in blocks of keys and in plain form: memory, time of value and gradient.

python -m benchmarks.blocks [--batches=1024,4096,32768] [--block=1024] [--dim=128] [--name=blocks]

Memory is what the compiler reserves beside arguments and results. A form that would reserve more
than --limit_gib is compiled, not run: its time is "not run".
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks.common import write_results
from ssrl_jax.losses.contrastive import info_nce, nt_xent

LOSSES = {"nt_xent": nt_xent, "info_nce": info_nce}


def measure(name: str, batch: int, dim: int, block: int, *, limit_gib: float) -> dict:
  def value_and_gradient(z1, z2):
    loss = lambda *z: jnp.mean(LOSSES[name](*z, temperature=0.1, block=block))  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1))(z1, z2)

  shape = jax.ShapeDtypeStruct((batch, dim), jnp.float32)
  compiled = jax.jit(value_and_gradient).lower(shape, shape).compile()
  gib = compiled.memory_analysis().temp_size_in_bytes / 2**30
  row = {"loss": name, "batch": batch, "block": block or "plain", "temporary_mib": gib * 2**10}
  if gib > limit_gib:
    return row | {"seconds": "not run", "value": "not run"}
  z = [jax.random.normal(jax.random.key(i), (batch, dim)) for i in range(2)]
  seconds = []
  while len(seconds) < 4 and sum(seconds) < 10:  # what takes long needs no repetition
    start = time.perf_counter()
    value, _ = jax.block_until_ready(compiled(*z))
    seconds.append(time.perf_counter() - start)
  return row | {"seconds": statistics.median(seconds), "value": f"{float(value):.6f}"}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batches", default="1024,2048,4096,8192,16384,32768")
  parser.add_argument("--losses", default="nt_xent,info_nce")
  parser.add_argument("--block", type=int, default=1024)
  parser.add_argument("--dim", type=int, default=128)
  parser.add_argument("--limit_gib", type=float, default=8.0)
  parser.add_argument("--name", default="blocks")
  options = parser.parse_args()
  rows = []
  for name in options.losses.split(","):
    for batch in map(int, options.batches.split(",")):
      for block in (0, options.block):
        rows.append(measure(name, batch, options.dim, block, limit_gib=options.limit_gib))
        print(rows[-1], flush=True)
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
