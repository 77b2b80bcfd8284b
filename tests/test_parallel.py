import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ssrl_jax import parallel


def test_mesh_takes_the_first_devices_or_all():
  assert parallel.make_mesh().size == 8
  assert list(parallel.make_mesh(3).devices) == jax.devices()[:3]
  assert parallel.make_mesh().axis_names == ("data",)


@pytest.mark.parametrize("num_devices", [-1, 9])
def test_mesh_of_absent_devices_is_an_error(num_devices):
  with pytest.raises(ValueError, match=rf"mesh.devices is {num_devices}, but 8 .* 0 = all"):
    parallel.make_mesh(num_devices)


@pytest.mark.parametrize("batch_size", [8, 16, 512])
def test_batch_size_that_divides_is_accepted(batch_size):
  parallel.check_batch_size(batch_size, parallel.make_mesh(8))


@pytest.mark.parametrize(
  ("batch_size", "nearest"),
  [(100, "96 or 104"), (9, "8 or 16"), (7, "8"), (1, "8"), (0, "8"), (-1, "8"), (-20, "8")],
)
def test_batch_size_that_does_not_divide_names_the_nearest(batch_size, nearest):
  with pytest.raises(
    ValueError, match=rf"batch_size {batch_size} .* 8 devices; nearest: {nearest}$"
  ):
    parallel.check_batch_size(batch_size, parallel.make_mesh(8))


def specs(shapes, *, fsdp, num_devices=8):
  tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  shardings = parallel.state_shardings(tree, parallel.make_mesh(num_devices), fsdp=fsdp)
  return {k: s.spec for k, s in shardings.items()}


SHAPES = {
  "kernel": (256, 512),  # the longer axis
  "square": (256, 256),  # the first of equals
  "conv": (3, 3, 128, 100),  # the only divisible axis
  "odd": (257, 511),  # none is divisible
  "small": (8, 8),  # not worth it
  "longest_odd": (512, 1001),  # not the longest, which is not divisible
  "scalar": (),
}


def test_fsdp_cuts_the_longest_divisible_axis_of_large_arrays():
  assert specs(SHAPES, fsdp=True) == {
    "kernel": PartitionSpec(None, "data"),
    "square": PartitionSpec("data", None),
    "conv": PartitionSpec(None, None, "data", None),
    "odd": PartitionSpec(),
    "small": PartitionSpec(),
    "longest_odd": PartitionSpec("data", None),
    "scalar": PartitionSpec(),
  }


@pytest.mark.parametrize("options", [{"fsdp": False}, {"fsdp": True, "num_devices": 1}])
def test_everything_is_replicated_without_fsdp_or_on_one_device(options):
  assert set(specs(SHAPES, **options).values()) == {PartitionSpec()}


def test_key_arrays_are_replicated():
  key = jax.eval_shape(lambda: jax.random.key(0))
  sharding = parallel.state_shardings({"key": key}, parallel.make_mesh(), fsdp=True)["key"]
  assert sharding.spec == PartitionSpec()


def test_to_device_cuts_the_examples_in_order():
  batch = {
    "image": np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3),
    "label": np.arange(16, dtype=np.int32),
    "id": np.arange(16, dtype=np.int64),
  }
  arrays = parallel.to_device(batch, parallel.make_mesh(8))
  assert arrays.keys() == batch.keys()
  for name in ("image", "label"):
    np.testing.assert_array_equal(arrays[name], batch[name])
    assert arrays[name].dtype == batch[name].dtype
    assert arrays[name].sharding.spec == PartitionSpec("data")
  np.testing.assert_array_equal(arrays["label"].addressable_shards[3].data, [6, 7])


def test_ids_beyond_32_bits_keep_both_words():
  ids = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32 + 5, 2**40 + 2**31 + 7]
  words = parallel.to_device({"id": np.array(ids, np.int64)}, parallel.make_mesh(8))["id"]
  assert words.dtype == jnp.uint32
  assert words.shape == (8, 2)
  low_high = np.asarray(words).astype(object)  # Python's integers
  assert [low + high * 2**32 for low, high in low_high] == ids


@pytest.mark.parametrize(("rows", "devices"), [(16, 8), (12, 6), (7, 7), (1, 1), (11, 1)])
def test_rows_are_cut_over_as_many_devices_as_divide_them(rows, devices):
  x = np.arange(2.0 * rows).reshape(rows, 2)
  cut = parallel.cut_rows(x, parallel.make_mesh(8))
  assert len(cut.addressable_shards) == devices
  assert {s.data.shape for s in cut.addressable_shards} == {(rows // devices, 2)}
  np.testing.assert_array_equal(cut, x)


def test_rows_without_a_mesh_stay_on_one_device():
  assert len(parallel.cut_rows(np.zeros((8, 2)), None).addressable_shards) == 1
