"""A small training set on the devices: decoded once, its batches gathered in the compiled step.

The pictures are those that `pipeline.train_batches` would send, substitutes included, and the ids
of a step are the same: only where a batch is put together changes. The host sends the ids.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ssrl_jax import parallel
from ssrl_jax.data.pipeline import each_as_trained
from ssrl_jax.data.sampling import Sampling
from ssrl_jax.data.sources import Source, has_frames


def load(
  source: Source,
  *,
  canvas: int,
  mesh: Mesh,
  limit_mib: float,
  workers: int,
  threads: int,
  sampling: Sampling | None = None,
) -> tuple[dict[str, jax.Array], np.ndarray]:
  """Decodes every example and puts it on the devices.

  Every process reads the whole set. Each device has all of it if that fits into `limit_mib`, else
  the examples are cut over the devices.

  Returns:
    {"image" uint8 [N', S, S, 3], "extent" int32 [N', 2], "label" int32 [N'], "substituted" bool
    [N']}, N' being N rounded up to a multiple of the devices; and bool [N], what was substituted.

  Raises:
    ValueError: too large, or clips, whose frames are drawn anew in each epoch.
  """
  if has_frames(source):
    raise ValueError(
      f"data.cache is 'device', but {source!r} has clips, of which each epoch draws other frames; "
      "set data.cache to ''"
    )
  n, rows = len(source), -(-len(source) // mesh.size) * mesh.size
  sharding = placement(rows * canvas * canvas * 3, mesh, limit_mib)
  host: dict[str, np.ndarray] = {}
  options = {"workers": workers, "threads": threads, "sampling": sampling}
  for batch in each_as_trained(source, canvas=canvas, **options):
    ids = batch.pop("id")
    for name, values in batch.items():
      host.setdefault(name, np.zeros((rows, *values.shape[1:]), values.dtype))[ids] = values
  arrays = {
    k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in host.items()
  }
  return arrays, host["substituted"][:n]


def placement(num_bytes: int, mesh: Mesh, limit_mib: float) -> NamedSharding:
  """Replicated where that fits, else cut along the examples."""
  whole, cut = num_bytes / 2**20, num_bytes / mesh.size / 2**20
  if whole <= limit_mib:
    return parallel.replicated(mesh)
  if cut <= limit_mib:
    return parallel.batch_sharding(mesh)
  raise ValueError(
    f"data.cache is 'device' and needs {whole:,.0f} MiB, {cut:,.0f} MiB on each of {mesh.size} "
    f"devices, where data.cache_mib allows {limit_mib:,g}; raise it, lower data.canvas or "
    "data.num_train, or set data.cache to ''"
  )


def gather(arrays: dict[str, jax.Array], ids_B2: jax.Array, mesh: Mesh) -> dict[str, jax.Array]:
  """The global batch of these ids (uint32: low word, high word), as the host would have sent it."""
  at_B = ids_B2[:, 0]  # positions are below 2^32; what is above in an id numbers its copies
  batch = {name: rows[at_B] for name, rows in arrays.items()} | {"id": ids_B2}
  batch = jax.lax.with_sharding_constraint(batch, parallel.batch_sharding(mesh))
  # Fused with the gather, the step could round differently from one that is given its batch.
  return jax.lax.optimization_barrier(batch)
