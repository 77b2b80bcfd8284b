import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssrl_jax.state import checksum_table, checksums, named_leaves, state_digest

RNG = np.random.default_rng(0)
LEAVES = {
  "bfloat16": RNG.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
  "bool": RNG.integers(0, 2, (7,)).astype(np.bool_),
  "float16": RNG.normal(size=(6,)).astype(np.float16),
  "float32": RNG.normal(size=(4, 3)).astype(np.float32),
  "int32": RNG.integers(-9, 9, (5,)).astype(np.int32),
  "int8": RNG.integers(-9, 9, (5,)).astype(np.int8),
  "scalar": np.float32(0.5),
  "uint8": RNG.integers(0, 255, (9,)).astype(np.uint8),
  "zeros": np.zeros((2, 3), np.float32),
  "empty": np.zeros((0, 3), np.float32),
}
KEY_WORDS = np.array([123, 456], np.uint32)


def device_state(leaves=LEAVES, key_words=KEY_WORDS):
  return {**jax.tree.map(jnp.asarray, leaves), "key": jax.random.wrap_key_data(key_words)}


def checksum64(value):
  """The documented sums, one word at a time, in Python integers."""
  value = np.asarray(value)
  words = value.reshape(-1).view(f"uint{8 * value.dtype.itemsize}")
  first = second = 0
  for place, word in enumerate(int(w) for w in words):
    mixed = (place ^ (place >> 16)) * 0x7FEB352D % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B % 2**32
    first += (word + 1) * (mixed | 1)
    second += (word + 1) * (2 * place + 1)
  return [first % 2**32, second % 2**32]


def test_checksums_are_the_documented_sums():
  table = checksum_table(device_state())
  assert table == {k: checksum64(v) for k, v in (LEAVES | {"key": KEY_WORDS}).items()}


def test_any_flipped_byte_changes_the_checksum_and_digest_of_its_leaf_alone():
  leaves = {k: np.array(v) for k, v in (LEAVES | {"key": KEY_WORDS}).items()}
  before = checksum_table(device_state()), state_digest(device_state())
  seen = {before[1]}
  for name in sorted(leaves):
    for i in range(leaves[name].nbytes):
      flipped = {k: v.copy() for k, v in leaves.items()}
      data = flipped[name].reshape(-1).view(np.uint8)
      data[i] ^= 1 if name == "bool" else 1 << i % 8
      state = device_state({k: v for k, v in flipped.items() if k != "key"}, flipped["key"])
      table = checksum_table(state)
      assert [k for k in table if table[k] != before[0][k]] == [name], (name, i)
      seen.add(state_digest(state))
  assert len(seen) == 1 + sum(v.nbytes for v in leaves.values())  # every one a digest of its own


def test_swapped_elements_change_the_checksum():
  x = jnp.arange(6.0)
  assert checksum_table({"x": x}) != checksum_table({"x": x[jnp.array([1, 0, 2, 3, 4, 5])]})


def test_longer_run_of_zeros_changes_the_checksum():
  assert checksum_table({"x": jnp.zeros(6)}) != checksum_table({"x": jnp.zeros(7)})


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None)])
def test_checksums_and_digest_do_not_depend_on_the_sharding(spec):
  x = RNG.normal(size=(16, 24)).astype(np.float32)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharded = {"x": jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))}
  assert checksum_table(sharded) == checksum_table({"x": jnp.asarray(x)})
  assert state_digest(sharded) == state_digest({"x": jnp.asarray(x)})


@pytest.mark.parametrize("spec", [("data",), (None, "data")])
def test_checksums_gather_no_array(spec):
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  x = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=sharding)
  compiled = jax.jit(checksums).lower({"x": x}).compile().as_text()
  assert "all-reduce" in compiled
  assert "all-gather" not in compiled


def test_digest_is_sha256_over_path_type_shape_and_bytes():
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  sha = hashlib.sha256(
    b"a/b float32 (2, 3)\n" + x.tobytes() + b"a/c int32 ()\n" + bytes([7, 0, 0, 0])
  )
  state = {"a": {"c": jnp.asarray(7, jnp.int32), "b": jnp.asarray(x)}}
  assert state_digest(state) == sha.hexdigest()


def test_digest_tells_path_type_and_shape_apart():
  x = np.zeros((2, 3), np.float32)
  states = [
    {"a": x},
    {"b": x},
    {"a": {"a": x}},
    {"a": x.view(np.int32)},
    {"a": x.reshape(3, 2)},
    {"a": x.reshape(6)},
    {"a": x, "b": x},
  ]
  assert len({state_digest(jax.tree.map(jnp.asarray, s)) for s in states}) == len(states)


def test_named_leaves_are_paths_in_the_tree_s_order():
  tree = {"params": {"stem": {"kernel": 1, "bias": 2}}, "opt": (3, [4])}
  assert named_leaves(tree) == [
    ("opt/0", 3),
    ("opt/1/0", 4),
    ("params/stem/bias", 2),
    ("params/stem/kernel", 1),
  ]
