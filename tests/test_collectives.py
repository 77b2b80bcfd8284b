"""What the compiled step sends between 8 devices, and that no layout of the state changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.collectives import least_sent
from ssrl_jax import parallel
from ssrl_jax.collectives import collectives, summary
from ssrl_jax.experiment import abstract_state, create_state
from ssrl_jax.losses.contrastive import nt_xent
from ssrl_jax.method import push
from ssrl_jax.models.vit import shrink
from ssrl_jax.step import compile_step
from tests.methods.common import BATCH, CASES, make_experiment

LAYOUTS = {
  "replicated": {},
  "mixed": {"mesh.slices": 2, "mesh.fsdp": 2, "mesh.min_size": 64},
  "cut": {"mesh.fsdp": 0, "mesh.min_size": 64},
}
# A queue, Sinkhorn and BatchNorm; a target, a ViT and negatives; covariances and the fused encoder.
STEPS = {"swav": "mixed", "moco_v3 vit": "cut", "fusion": "mixed"}
QUEUE = {"method.queue_size": 2 * BATCH, "method.queue_start": 0.0}


def layouts(name):
  """{layout: experiment} of a case: on one axis, and otherwise."""
  method, overrides = CASES[name]
  overrides = overrides | (QUEUE if name == "swav" else {})
  plain = {f"global_views.{option}": 0.0 for option in ("jitter", "greyscale")}
  return {
    layout: make_experiment(
      method,
      {**overrides, **plain, "mesh.devices": 8, **LAYOUTS[layout], "optim.warmup_epochs": 0.0},
    )
    for layout in ("replicated", STEPS[name])
  }


def batch(experiment):
  rng = np.random.default_rng(0)
  host = {
    "image": rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
    "extent": np.full((BATCH, 2), 16, np.int32),
    "label": np.arange(BATCH, dtype=np.int32) % 3,
    "id": np.arange(BATCH, dtype=np.int64),
    "substituted": np.zeros(BATCH, bool),
  }
  return parallel.to_device(host, experiment.mesh)


@pytest.fixture(scope="module", params=STEPS)
def steps(request):
  """name, {layout: (experiment, compiled step, losses of three steps)}."""
  found, start = {}, None
  for layout, experiment in layouts(request.param).items():
    start = start or jax.device_get(create_state(experiment)._replace(key=()))
    shapes = abstract_state(experiment)
    compiled = compile_step(experiment, shapes)
    key = jax.device_put(jax.random.key(0), shapes.key.sharding)
    shardings = jax.tree.map(lambda x: x.sharding, shapes._replace(key=()))
    state, losses = jax.device_put(start, shardings)._replace(key=key), []
    for _ in range(3):
      state, metrics = compiled(state, batch(experiment))
      losses.append(float(metrics["loss"]))
    found[layout] = experiment, compiled, losses
  return request.param, found


def test_losses_do_not_depend_on_where_the_state_lives(steps):
  name, found = steps
  (*_, expected), (*_, losses) = found["replicated"], found[STEPS[name]]
  assert len(set(expected)) == 3  # it learns
  np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_step_sends_little_more_than_it_must(steps):
  name, found = steps
  for layout, (experiment, compiled, _) in found.items():
    sent = sum(c.sent for c in collectives(compiled.as_text()))
    least = least_sent(experiment)
    assert 0.9 < sent / sum(least.values()) < 1.1, f"{name}, {layout}: {sent} of {least}"


def test_device_holds_its_part_of_the_state(steps):
  name, found = steps
  whole, part = (c.memory_analysis().argument_size_in_bytes for _, c, _ in found.values())
  experiment, *_ = found[STEPS[name]]
  assert part < (1 / experiment.mesh.shape["fsdp"] + 0.2) * whole  # small arrays are on each


# By hand, in the forms that XLA prints for CPUs, GPUs and TPUs.
PROGRAM = """
HloModule jit_step, num_partitions=8

%cut (p0: f32[64], p1: u32[]) -> f32[16] {
  %p0 = f32[64]{0} parameter(0)
  %p1 = u32[] parameter(1)
  ROOT %part = f32[16]{0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={16}
}

%body (arg: (s32[], bf16[32])) -> (s32[], bf16[32]) {
  %arg = (s32[], bf16[32]{0}) parameter(0)
  %x = bf16[32]{0} get-tuple-element(%arg), index=1
  %looped = bf16[32]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[], bf16[32]{0}) tuple(%i, %looped)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %sums = (f32[64]{0}, /*index=1*/f32[10]{0}) all-reduce(%a, /*index=1*/%b), replica_groups=[2,4]<=[4,2]T(1,0), metadata={op_name="gradients"}
  %first = f32[64]{0} get-tuple-element(%sums), index=0
  %second = f32[10]{0} get-tuple-element(%sums), index=1
  %kept = f32[16]{0} fusion(%first, %partition), kind=kLoop, calls=%cut
  %all = (f32[8]{0:T(128)}, f32[64]{0:T(128)}) all-gather-start(%a), replica_groups=mesh['x'=2,'y'=4] {'x','y'}, dimensions={0}
  %scattered = f32[2]{0} reduce-scatter(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %sent = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{3,4}}
  %alone = f32[8]{0} all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add
  %loop = (s32[], bf16[32]{0}) while(%t), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_collectives_are_read_from_the_program():
  found = [(c.kind, c.whole, len(c.groups[0]), c.times, c.sent) for c in collectives(PROGRAM)]
  assert found == [
    ("reduce-scatter", 256, 4, 1, 192.0),  # of this sum each device keeps a part
    ("all-reduce", 40, 4, 1, 60.0),
    ("all-gather", 256, 8, 1, 224.0),
    ("reduce-scatter", 32, 4, 1, 24.0),
    ("collective-permute", 32, 2, 1, 32),
    ("all-reduce", 64, 4, 5, 480.0),
  ]
  assert collectives(PROGRAM)[0].source == "gradients"


def test_collectives_that_begin_and_end_apart_count_what_comes_out():
  text = """HloModule m, num_partitions=8
ENTRY %m (a: f32[64], b: f32[8]) -> f32[16] {
  %r = ((f32[64]{0}, f32[8]{0}), (f32[16]{0}, f32[2]{0}), u32[]) reduce-scatter-start(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}
  %t = ((f32[64]{0}), f32[64]{0}) all-to-all-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %s = (f32[64]{0}, f32[8]{0}) all-reduce-start(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}
}"""  # noqa: E501
  assert [(c.kind, c.whole, c.sent) for c in collectives(text)] == [
    ("reduce-scatter", 256, 192.0),
    ("reduce-scatter", 32, 24.0),
    ("all-to-all", 256, 192.0),
    ("all-reduce", 256, 384.0),
    ("all-reduce", 32, 48.0),
  ]


def test_groups_are_read_in_every_form():
  listed, *_, looped = [c.groups for c in collectives(PROGRAM)]
  assert listed == ((0, 2, 4, 6), (1, 3, 5, 7))
  assert looped == ((0, 1, 2, 3), (4, 5, 6, 7))
  by_axis = "replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}, dimensions={0}"
  part = "replica_groups=mesh['x'=8] {'x':(2)2}"
  for groups, expected in (
    (by_axis, ((0, 1, 2, 3), (4, 5, 6, 7))),
    (part, ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups={}", (tuple(range(8)),)),
  ):
    text = f"ENTRY %m (a: f32[8]) -> f32[8] {{\n  %r = f32[8] all-reduce(%a), {groups}\n}}"
    (one,) = collectives(f"HloModule m, num_partitions=8\n{text}")
    assert one.groups == expected


def test_what_leaves_a_slice_is_told():
  crossing = [c.crosses(4) for c in collectives(PROGRAM)]
  assert crossing == [True, True, True, False, True, False]
  assert not any(c.crosses(8) for c in collectives(PROGRAM))


# As libtpu 0.0.42 prints what goes between two slices of eight, a gather of two parts among it.
BETWEEN_HOSTS = """
HloModule jit_step, num_partitions=8

ENTRY %main (a: f32[8]) -> f32[8] {
  %sum = f32[1,8,128]{2,1,0:T(8,128)} all-reduce(%a), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %send = (f32[1,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%sum, %after), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%send), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv = (f32[1,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.1 = (s32[4]{0}, u32[], token[]) send(%part, %after), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_GATHER"}
}
"""  # noqa: E501


def test_what_hosts_send_between_tpu_slices_is_read_too():
  within, reduced, gathered = collectives(BETWEEN_HOSTS)
  assert (within.kind, within.crosses(8)) == ("all-reduce", False)
  assert (reduced.kind, reduced.whole, reduced.sent) == ("all-reduce", 4096, 4096.0)
  assert (gathered.kind, gathered.whole, gathered.sent) == ("all-gather", 32, 16.0)
  assert reduced.groups == gathered.groups == tuple((i, i + 8) for i in range(8))
  assert reduced.crosses(8)


def sent(f, *shapes, spec, out):
  """What f sends: its first argument cut as the batch, the others as `spec` says."""
  mesh = parallel.make_mesh(8, fsdp=4)
  shardings = [parallel.batch_sharding(mesh)] + [NamedSharding(mesh, spec)] * (len(shapes) - 1)
  arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=h) for s, h in zip(shapes, shardings)]
  jitted = jax.jit(
    f, out_shardings=NamedSharding(mesh, out), compiler_options=parallel.quick_compile()
  )
  return summary(collectives(jitted.lower(*arguments).compile().as_text()))


def test_negatives_are_gathered_once_and_their_gradient_scattered_once():
  batch = parallel.batch_sharding(parallel.make_mesh(8)).spec
  loss = lambda z1, z2: jnp.mean(nt_xent(z1, z2, temperature=0.1))  # noqa: E731
  b, p = 64, 16
  found = sent(jax.grad(loss, argnums=(0, 1)), (b, p), (b, p), spec=batch, out=batch)
  assert found == dict.fromkeys(("all-gather", "reduce-scatter"), 2 * b * p * 4 * 7 / 8)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("fsdp")])
def test_queue_is_pushed_without_sending_it(spec):
  b, q, p = 16, 1024, 8
  found = sent(lambda z, queue: push(queue, z), (b, p), (q, p), spec=spec, out=spec)
  moved = {"collective-permute": b * p * 4} if spec else {}  # to where the older ones now belong
  assert found == {"all-gather": b * p * 4 * 7 / 8} | moved


def test_averaging_pixels_sends_nothing():
  batch = parallel.batch_sharding(parallel.make_mesh(8)).spec
  gradient = jax.grad(lambda x: jnp.sum(shrink(x, 2) ** 2))
  assert sent(gradient, (16, 5, 5, 2), spec=batch, out=batch) == {}
