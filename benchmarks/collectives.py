"""What the compiled train step of each method sends between 8 devices, beside the least it must.

python -m benchmarks.collectives [--methods=simclr,dino] [--fsdp=1] [--slices=1] [--name=NAME]

Bytes are those that a device sends in a step (ssrl_jax/collectives.py), of the smoke recipe on 8
virtual CPU devices. Nothing is run: the partitioner's result is read. Only ratios mean something.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import jax

from benchmarks.common import write_results
from configs import smoke
from ssrl_jax import parallel
from ssrl_jax.collectives import collectives, summary
from ssrl_jax.experiment import Experiment, abstract_batch, abstract_state, build, view_specs
from ssrl_jax.methods import METHODS
from ssrl_jax.step import compile_step, make_train_step, never_trained

# What a loss needs of the whole batch, as floats of (B images, V global views, M: config.method,
# the features' "dim", E embeddings of a view): gathered or scattered once, and summed. What is not
# here needs nothing.
MOVED = {
  **dict.fromkeys(("simclr", "dcl", "supcon"), lambda b, v, m, e: 4 * b * m["out_dim"]),
  **dict.fromkeys(("moco_v2", "finegrained", "ressl"), lambda b, v, m, e: b * m["out_dim"]),
  "densecl": lambda b, v, m, e: 2 * b * m["out_dim"],  # two queues
  "moco_v3": lambda b, v, m, e: 2 * b * m["out_dim"],  # no gradient into keys
  "nnclr": lambda b, v, m, e: 5 * b * m["out_dim"],  # predictions, their gradient, the queue
  "w_mse": lambda b, v, m, e: 2 * v * b * m["out_dim"],
  "mmcr": lambda b, v, m, e: b * m["out_dim"],  # images' means; each device decomposes all
  "dinov2": lambda b, v, m, e: 2 * v * b * m["dim"],  # KoLeo's class tokens and their gradient
  "swav": lambda b, v, m, e: 2 * b * m["out_dim"] * (m["queue_size"] > 0),
  "hybrid": lambda b, v, m, e: MOVED["simclr"](b, v, m["options"]["simclr"], e),
}
SUMMED = {
  "barlow_twins": lambda b, v, m, e: m["out_dim"] ** 2,
  "tico": lambda b, v, m, e: m["out_dim"] ** 2,
  "vicreg": lambda b, v, m, e: v * m["out_dim"] ** 2,
  # Beside it two covariances for each match, by place and by feature, in both directions.
  "vicregl": lambda b, v, m, e: v * m["out_dim"] ** 2 + 8 * m["num_matches"] * m["maps_dim"] ** 2,
  "swav": lambda b, v, m, e: (
    2 * m["num_prototypes"] * m["iterations"] * (1 + (m["queue_size"] > 0))
  ),
  "lejepa": lambda b, v, m, e: v * m["num_directions"] * 2 * 17,  # cosines and sines at 17 points
  "dino": lambda b, v, m, e: m["num_prototypes"],
  "ibot": lambda b, v, m, e: 2 * m["num_prototypes"],
  "dinov2": lambda b, v, m, e: 2 * 2 * m["num_prototypes"] * 3,  # Sinkhorn of class and patches
  "msn": lambda b, v, m, e: m["num_prototypes"] * (1 + 2 * 3 * m["balance"]),  # mean, Sinkhorn
  "fusion": lambda b, v, m, e: v * e * m["out_dim"] ** 2,  # for batches above out_dim
  "hybrid": lambda b, v, m, e: SUMMED["vicreg"](b, v, m["options"]["vicreg"], e),
}


def least_sent(experiment: Experiment) -> dict[str, float]:
  """Bytes that a device must send in a step, by purpose.

  gradients: each summed once; of an array that is cut, scattered, the array itself gathered once.
  state: what is cut of targets, queues and what is never trained, gathered once.
  moments: of each BatchNorm and pass, two forwards and, where there is a gradient, two backwards.
  loss: see MOVED and SUMMED. health: a covariance, and the cosines of up to 512 embeddings.
  scalars: figures of the step, and a sum of squares of every tensor watched.
  """
  state, config, mesh = abstract_state(experiment), experiment.config, experiment.mesh
  around = lambda n: (n - 1) / n  # noqa: E731
  n, fsdp = mesh.size, mesh.shape[parallel.FSDP]

  def gradient(x):
    size = 4 * x.size
    if x.sharding.is_fully_replicated:
      return 2 * around(n) * size
    return 2 * around(fsdp) * size + 2 * around(n // fsdp) * size / fsdp

  never = jax.tree.leaves(never_trained(experiment.method, state.params))
  params = jax.tree.leaves(state.params)
  still = [x for x, kept in zip(params, never, strict=True) if kept]
  held = [
    x for x in (*jax.tree.leaves(state.method_state), *still) if not x.sharding.is_fully_replicated
  ]
  trained = [x for x, kept in zip(params, never, strict=True) if not kept]
  trained += jax.tree.leaves(state.probe.params if state.probe else ())
  stats = lambda tree: sum(4 * x.size for x in jax.tree.leaves(tree))  # noqa: E731
  online = stats(state.method_state["batch_stats"])
  target = stats(state.method_state.get("target", {}).get("batch_stats", {}))
  passes, b, v = len(view_specs(config)), config.batch_size, config.global_views.count
  _, metrics, watched = jax.eval_shape(
    make_train_step(experiment), state, abstract_batch(experiment)
  )
  p = watched.embeddings.shape[-1]
  name, options = config.method.name, config.method.to_dict() | {"dim": watched.features.shape[-1]}
  e = sum(part.startswith("projector_") for part in state.params) or 1
  moved = MOVED.get(name, lambda *_: 0)(b, v, options, e)
  summed = SUMMED.get(name, lambda *_: 0)(b, v, options, e)
  return {
    "gradients": sum(gradient(x) for x in trained),
    "state": sum(around(fsdp) * 4 * x.size for x in held),
    "moments": 2 * around(n) * (2 * passes * online + target),
    "loss": 4 * around(n) * (moved + 2 * summed),
    "health": 4 * around(n) * (2 * min(b, p) ** 2 + min(b, 512) * p),
    "scalars": 8 * around(n) * (len(metrics) + len(jax.tree.leaves(watched))),
  }


def measure(config) -> dict[str, Any]:
  experiment = build(config, num_examples=config.batch_size * 10, num_classes=10)
  start, least = time.perf_counter(), least_sent(experiment)
  compiled = compile_step(
    experiment, abstract_state(experiment), compiler_options=parallel.quick_compile()
  )
  found = collectives(compiled.as_text())
  sent = summary(found)
  slice_size = experiment.mesh.size // experiment.mesh.shape[parallel.SLICE]
  total = sum(sent.values())
  return {
    "method": config.method.name,
    "mesh": "x".join(str(n) for n in experiment.mesh.devices.shape),
    "sent": total,
    "least": sum(least.values()),
    "ratio": total / sum(least.values()),
    **{f"least_{purpose}": value for purpose, value in least.items()},
    **{kind: sent.get(kind, 0.0) for kind in ("all-reduce", "all-gather", "reduce-scatter")},
    "others": sum(sent.get(kind, 0.0) for kind in ("all-to-all", "collective-permute")),
    "between_slices": sum(c.sent for c in found if c.crosses(slice_size)),
    "one_image_views": 4 * sum(math.prod((s.count, s.size, s.size, 3)) for s in
                               experiment.method.views),
    "compile_s": time.perf_counter() - start,
  }  # fmt: skip


def small_config(method: str):
  """The smoke recipe, without the colours that compile slowly; the batch exceeds every width."""
  c = smoke.get_config(method)
  c.batch_size, c.mesh.devices = 256, 8
  c.global_views.update({"jitter": 0.0, "greyscale": 0.0})
  return c


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--methods", default=",".join(METHODS))
  parser.add_argument("--fsdp", type=int, default=1)
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument("--name", default="collectives")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  rows = []
  for method in options.methods.split(","):
    config = small_config(method)
    config.mesh.update({"fsdp": options.fsdp, "slices": options.slices, "min_size": 256})
    rows.append(measure(config))
    print(rows[-1], flush=True)
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
