import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import smoke
from ssrl_jax import parallel
from ssrl_jax.checkpoint import Checkpoints, abstract
from ssrl_jax.dry_run import array_bytes
from ssrl_jax.experiment import abstract_state, build
from ssrl_jax.state import TrainState, state_digest


def test_mesh_takes_the_first_devices_or_all():
  assert parallel.make_mesh().size == 8
  assert list(parallel.make_mesh(3).devices.flat) == jax.devices()[:3]
  assert parallel.make_mesh().axis_names == ("slice", "data", "fsdp")


@pytest.mark.parametrize(
  ("options", "shape"),
  [
    ({}, (1, 8, 1)),
    ({"fsdp": 0}, (1, 1, 8)),
    ({"fsdp": 4}, (1, 2, 4)),
    ({"slices": 2, "fsdp": 2}, (2, 2, 2)),
    ({"slices": 4, "fsdp": 0}, (4, 1, 2)),
  ],
)
def test_config_chooses_slices_and_how_far_the_state_is_cut(options, shape):
  assert parallel.make_mesh(**options).devices.shape == shape


@dataclasses.dataclass(frozen=True)
class Named:
  """A device that says which slice it is in."""

  id: int
  slice_index: int
  platform: str = "cpu"
  process_index: int = 0
  device_kind: str = "cpu"


def test_slices_are_those_that_the_devices_name():
  devices = [Named(i, slice_index=i % 2) for i in range(6)]
  mesh = parallel.make_mesh(devices=devices)
  assert mesh.devices.shape == (2, 3, 1)
  assert [[d.id for d in row.flat] for row in mesh.devices] == [[0, 2, 4], [1, 3, 5]]
  assert parallel.make_mesh(devices=devices, slices=1).devices.shape == (1, 6, 1)
  with pytest.raises(ValueError, match=r"mesh.slices is 0, but the 5 devices are in slices of"):
    parallel.make_mesh(5, devices=devices)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"slices": 3}, r"mesh.slices is 3, but the 8 devices .* divides them, or 0"),
    ({"slices": -1}, r"mesh.slices is -1"),
    ({"fsdp": 3}, r"mesh.fsdp is 3, .* 8 devices of a slice; expected one of \[1, 2, 4, 8\], or 0"),
    ({"fsdp": 8, "slices": 2}, r"mesh.fsdp is 8, .* 4 devices of a slice"),
    ({"fsdp": -1}, r"mesh.fsdp is -1"),
  ],
)
def test_mesh_that_devices_cannot_form_is_an_error(options, message):
  with pytest.raises(ValueError, match=message):
    parallel.make_mesh(**options)


def test_mesh_of_devices_that_processes_hold_unevenly_is_an_error():
  devices = [Named(i, slice_index=0, process_index=i // 2) for i in range(4)]
  assert parallel.make_mesh(devices=devices).size == 4
  for n, held in ((2, r"\[2, 0\]"), (3, r"\[2, 1\]")):
    with pytest.raises(ValueError, match=rf"mesh.devices is {n}, of which the 2 .* hold {held}"):
      parallel.make_mesh(n, devices=devices)


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
  mesh = parallel.make_mesh(num_devices, fsdp=fsdp)
  shardings = parallel.state_shardings(tree, mesh, min_size=2**15)
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


@pytest.mark.parametrize("fsdp", [0, 8])
def test_longest_divisible_axis_of_large_arrays_is_cut(fsdp):
  assert specs(SHAPES, fsdp=fsdp) == {
    "kernel": PartitionSpec(None, "fsdp"),
    "square": PartitionSpec("fsdp"),
    "conv": PartitionSpec(None, None, "fsdp"),
    "odd": PartitionSpec(),
    "small": PartitionSpec(),
    "longest_odd": PartitionSpec("fsdp"),
    "scalar": PartitionSpec(),
  }


def test_axes_need_to_divide_among_those_that_cut_alone():
  assert specs({"conv": (3, 3, 100, 130)}, fsdp=4) == {"conv": PartitionSpec(None, None, "fsdp")}


@pytest.mark.parametrize("options", [{"fsdp": 1}, {"fsdp": 0, "num_devices": 1}])
def test_everything_is_replicated_where_one_device_cuts(options):
  assert set(specs(SHAPES, **options).values()) == {PartitionSpec()}


def test_key_arrays_are_replicated():
  key = jax.eval_shape(lambda: jax.random.key(0))
  mesh = parallel.make_mesh(fsdp=0)
  sharding = parallel.state_shardings({"key": key}, mesh, min_size=0)["key"]
  assert sharding.spec == PartitionSpec()


def test_cut_state_of_a_vit_takes_its_share_of_each_device():
  """Parameters, target and moments alike; what stays whole is small."""
  config = smoke.get_config("dino")
  config.encoder.name, config.global_views.size = "vit_ti", 32
  config.mesh.update({"fsdp": 0, "min_size": 2**12})
  state = abstract_state(build(config, num_examples=128, num_classes=10))
  whole, each = (array_bytes(state, per_device=d) for d in (False, True))
  assert whole / 8 < each < 1.1 * whole / 8


def test_checkpoint_goes_from_one_layout_to_another(tmp_path):
  key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
  w = jax.random.normal(key, (16, 64))
  whole = TrainState(step, {"w": w}, {"queue": w.T}, (w,), (), step, key)

  def laid_out(slices, fsdp):
    mesh = parallel.make_mesh(slices=slices, fsdp=fsdp)
    return jax.device_put(whole, parallel.state_shardings(whole, mesh, min_size=8))

  layouts = {shape: laid_out(*shape) for shape in ((1, 1), (2, 2), (1, 0))}
  specs = {layout.params["w"].sharding.spec for layout in layouts.values()}
  assert specs == {PartitionSpec(), PartitionSpec(None, "fsdp")}
  for step, (name, state) in enumerate(layouts.items()):
    checkpoints = Checkpoints(tmp_path / str(step), keep=1, keep_best=0)
    checkpoints.finish(state, step=step, score=0.0)
    for target in layouts.values():
      restored = checkpoints.restore(abstract(target))
      assert restored.params["w"].sharding == target.params["w"].sharding
      assert state_digest(restored) == state_digest(whole), name
    checkpoints.close()


def test_to_device_cuts_the_examples_in_order():
  batch = {
    "image": np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3),
    "label": np.arange(16, dtype=np.int32),
    "id": np.arange(16, dtype=np.int64),
  }
  arrays = parallel.to_device(batch, parallel.make_mesh(8, slices=2, fsdp=2))
  assert arrays.keys() == batch.keys()
  for name in ("image", "label"):
    np.testing.assert_array_equal(arrays[name], batch[name])
    assert arrays[name].dtype == batch[name].dtype
    assert arrays[name].sharding.spec == PartitionSpec(("slice", "data", "fsdp"))
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
