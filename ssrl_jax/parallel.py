"""Process start-up, the mesh, and where each array lives on it.

The program is written for one big device: `jax.jit` over one mesh with automatic axes, a global
view of every array. Means over the batch are means over the global batch.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA = "data"  # the mesh's only axis: examples, and with fsdp also parameters


def start(multihost: bool) -> None:
  """Joins the other processes of a pod or cluster; call once, before any other use of jax."""
  if multihost:
    jax.distributed.initialize()


def make_mesh(num_devices: int = 0) -> Mesh:
  """A mesh over the first `num_devices` devices of all processes (0: over all)."""
  devices = jax.devices()
  if not 0 <= num_devices <= len(devices):
    raise ValueError(
      f"mesh.devices is {num_devices}, but {len(devices)} devices are present; 0 = all"
    )
  return Mesh(np.array(devices[: num_devices or None]), (DATA,))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  n = mesh.size
  if batch_size < 1 or batch_size % n:
    below, above = max(batch_size // n, 1) * n, max(batch_size // n + 1, 1) * n
    nearest = f"{below} or {above}" if below != above else f"{above}"
    raise ValueError(f"batch_size {batch_size} is not divisible by {n} devices; nearest: {nearest}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(DATA))


def cut_rows(x: Any, mesh: Mesh | None) -> jax.Array:
  """An array on this process's devices of the mesh, its first axis cut over as many as divide it.

  For work that every process does alike, such as judging features that all of them hold.
  """
  if mesh is None:
    return jax.numpy.asarray(x)
  devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  while x.shape[0] % len(devices):
    devices.pop()
  return jax.device_put(x, NamedSharding(Mesh(np.array(devices), (DATA,)), PartitionSpec(DATA)))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state: Any, mesh: Mesh, *, fsdp: bool, min_size: int = 2**16) -> Any:
  """A sharding for each array: replicated, or with `fsdp` cut along its longest divisible axis.

  Arrays of fewer than `min_size` elements stay replicated: gathering them costs more than they do.
  """

  def rule(x):
    axes = [i for i, n in enumerate(x.shape) if n % mesh.size == 0]
    if not fsdp or mesh.size == 1 or x.size < min_size or not axes:
      return replicated(mesh)
    longest = max(axes, key=lambda i: x.shape[i])
    return NamedSharding(
      mesh, PartitionSpec(*[DATA if i == longest else None for i in range(x.ndim)])
    )

  return jax.tree.map(rule, abstract_state)


def quick_compile() -> dict[str, int] | None:
  """Options of jax.jit for a program that runs once: on a CPU, compile it without optimising.

  There an optimised initialisation takes ten times as long to compile as it takes to run.
  """
  return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's share of a batch -> global arrays, cut along the examples.

  `id` int64 [b] becomes uint32 [B, 2] (low word, high word): JAX has no 64-bit integers by default,
  and cutting the position to 32 bits would give two images of a large set the same randomness.
  """
  ids = batch["id"].astype(np.uint64)
  words = np.stack([ids & np.uint64(0xFFFFFFFF), ids >> np.uint64(32)], axis=1).astype(np.uint32)
  arrays = {k: v for k, v in batch.items() if k != "id"} | {"id": words}
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}


def all_processes(values: np.ndarray) -> np.ndarray:
  """int64 [n] of each process, n the same in all -> those of all of them, [n * processes].

  Every process must call it, at the same point of the program.
  """
  words = values.astype(np.int64).view(np.uint32)  # JAX has no 64-bit integers by default
  return np.asarray(multihost_utils.process_allgather(words, tiled=True)).view(np.int64)
