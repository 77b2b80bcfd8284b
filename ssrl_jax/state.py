"""The whole state of a run: arrays only, so it shards, donates and checkpoints as it is."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ssrl_jax import parallel
from ssrl_jax.method import Array


class TrainState(NamedTuple):
  step: Array  # int32: updates done
  params: Any
  method_state: Any
  opt_state: Any
  probe: Any  # the online probe; an empty tuple for unlabelled data
  substituted: Array  # int32: damaged pictures replaced so far
  key: Array  # never changes: randomness of a step is fold_in(key, step)
  guard: Any = ()  # losses so far and updates skipped; empty where neither is asked for


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """(path, array) in the tree's fixed order, paths like `params/encoder/stem/kernel`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def _plain(x: Array) -> Array:
  return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def checksums(state: Any) -> list[Array]:
  """uint32 [2] for each array, computed where the array lives.

  Sums of the array's words, each times an odd number that depends on its place, modulo 2^32:
  independent of the sharding (integer addition has no rounding), and no change within one word
  can leave it as it was. Costs one pass over the state on the device and no transfer.
  """
  return [_checksum(x) for x in jax.tree.leaves(state)]


@jax.jit  # traced once for all arrays of a shape
def _checksum(x: Array) -> Array:
  x = _plain(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  # Not flattened: an array that is cut along another axis than the first would be gathered.
  place = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
  mixed = (place ^ (place >> 16)) * np.uint32(0x7FEB352D)
  mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
  words = words + np.uint32(1)  # so that a run of zeros counts too
  return jnp.stack([jnp.sum(words * (mixed | 1)), jnp.sum(words * (place * 2 + 1))])


@functools.cache
def _compiled_checksums():
  return jax.jit(checksums, compiler_options=parallel.quick_compile())


def checksum_table(state: Any) -> dict[str, list[int]]:
  """{path: two unsigned integers}: what a checkpoint keeps to be checked on restore."""
  sums = jax.device_get(_compiled_checksums()(state))
  return {name: [int(v) for v in s] for (name, _), s in zip(named_leaves(state), sums)}


def state_digest(state: Any) -> str:
  """SHA-256 over path, type, shape and bytes of every array, in the tree's order.

  Equal digests mean byte-equal states. On many hosts every one must call it.
  """
  sha = hashlib.sha256()
  for name, leaf in named_leaves(state):
    leaf = _plain(leaf)
    if not leaf.is_fully_addressable:
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    value = np.asarray(leaf)
    sha.update(f"{name} {value.dtype} {value.shape}\n".encode())
    sha.update(np.ascontiguousarray(value).tobytes())
  return sha.hexdigest()
