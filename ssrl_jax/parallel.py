"""The mesh, and where each array lives on it.

The program is written for one big device: `jax.jit` over one mesh with automatic axes, a global
view of every array. Means over the batch are means over the global batch.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils, topologies
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SLICE, DATA, FSDP = AXES = ("slice", "data", "fsdp")  # the mesh's axes, the slowest network first


def make_mesh(
  num_devices: int = 0,
  *,
  slices: int = 0,
  fsdp: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh [slices, data, fsdp] over the first `num_devices` devices of all processes (0: all).

  A slice is what one fast network joins: the devices of a TPU slice, of a GPU host or NVLink
  domain. The axis `fsdp` lies within a slice, so that gathering parameters never leaves it.

  Args:
    slices: how many; 0: as many as the devices say that they belong to.
    fsdp: devices over which an array of the state is cut; 1: none is, 0: all of a slice.
    devices: to choose from; None: those that are there.
  """
  devices = jax.devices() if devices is None else devices
  if not 0 <= num_devices <= len(devices):
    raise ValueError(
      f"mesh.devices is {num_devices}, but {len(devices)} devices are present; 0 = all"
    )
  chosen = devices[: num_devices or None]
  held = dict.fromkeys(sorted({d.process_index for d in devices}), 0)
  for device in chosen:
    held[device.process_index] += 1
  if len(set(held.values())) > 1:
    raise ValueError(
      f"mesh.devices is {num_devices}, of which the {len(held)} processes hold "
      f"{list(held.values())}; all must hold as many: give 0 = all, or start fewer processes"
    )
  groups = _slices(chosen, slices)
  size = len(groups[0])
  if fsdp < 0 or size % (fsdp or size):
    raise ValueError(
      f"mesh.fsdp is {fsdp}, which does not divide the {size} devices of a slice; expected one of "
      f"{[n for n in range(1, size + 1) if size % n == 0]}, or 0 = all of them"
    )
  shape = size // (fsdp or size), fsdp or size
  # Neighbours of the mesh are neighbours of the network, whatever its form.
  order = [create_device_mesh(shape, group, allow_split_physical_axes=True) for group in groups]
  return Mesh(np.array(order), AXES)


def described_tpus(topology: str, num_slices: int = 1) -> list[Any]:
  """The devices of `num_slices` TPU slices such as "v5e:2x4" that are not there.

  A program can be compiled for them and not run. Needs the extra `tpu` (libtpu), and no TPU.
  """
  for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no machine in the cloud to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is held
  }.items():
    os.environ.setdefault(name, value)
  options = {"num_slices": num_slices} if num_slices > 1 else {}
  try:
    return topologies.get_topology_desc(topology, platform="tpu", **options).devices
  except RuntimeError as error:
    raise ValueError(
      f"no TPU slice {topology!r} can be described; expected GENERATION:SHAPE, e.g. v5e:4x4, "
      "v5p:2x2x4 or v6e:16x16, and libtpu installed (pip install -e '.[tpu]'): "
      f"{' '.join(str(error).split())[:200]}"
    ) from error


def _slices(devices: Sequence[Any], num_slices: int) -> list[list[Any]]:
  """The devices of each slice, equally many; 0 slices: those that the devices name."""
  index = lambda device: getattr(device, "slice_index", None) or 0  # noqa: E731
  sizes = sorted(collections.Counter(map(index, devices)).values())
  n, count = len(devices), num_slices or len(sizes)
  if num_slices < 0 or n % count or (not num_slices and sizes[0] != sizes[-1]):
    raise ValueError(
      f"mesh.slices is {num_slices}, but the {n} devices are in slices of {sizes}; expected a "
      "number that divides them, or 0 = as many as the devices name, all of one size"
    )
  devices, size = sorted(devices, key=index), n // count
  return [devices[i : i + size] for i in range(0, n, size)]


class Indivisible(ValueError):
  """A batch that cannot be cut evenly over the devices."""


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  n = mesh.size
  if batch_size < 1 or batch_size % n:
    below, above = max(batch_size // n, 1) * n, max(batch_size // n + 1, 1) * n
    nearest = f"{below} or {above}" if below != above else f"{above}"
    raise Indivisible(
      f"batch_size {batch_size} is not divisible by {n} devices; nearest: {nearest}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(AXES))


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


def state_shardings(abstract_state: Any, mesh: Mesh, *, min_size: int) -> Any:
  """A sharding for each array of the state: parameters, moments, targets and queues alike.

  The rule: an array of at least `min_size` elements is cut along its longest axis that the mesh's
  `fsdp` divides; any other is replicated (to gather a small one costs more than it takes).
  """
  cuts = mesh.shape[FSDP]

  def rule(x):
    axes = [i for i, n in enumerate(x.shape) if n % cuts == 0]
    if cuts == 1 or x.size < min_size or not axes:
      return replicated(mesh)
    longest = max(axes, key=lambda i: x.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, FSDP))

  return jax.tree.map(rule, abstract_state)


def gathered(tree: Any, mesh: Mesh) -> Any:
  """Inside a compiled program: what is cut of the state, whole on every device.

  Left to itself the compiler gathers a parameter for each of its uses, or gathers activations.
  """
  if mesh.shape[FSDP] == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def cut(tree: Any, mesh: Mesh, *, min_size: int) -> Any:
  """Inside a compiled program: arrays of the state where they live, the inverse of `gathered`."""
  if mesh.shape[FSDP] == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, state_shardings(tree, mesh, min_size=min_size))


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
