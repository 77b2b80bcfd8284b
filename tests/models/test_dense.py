import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.evaluate.fcos import make_points
from ssrl_jax.models.dense import (
  Detector,
  LightSegmenter,
  LinearSegmenter,
  Pyramid,
  pyramid_strides,
  stack_at,
)

CASES = {  # an encoder's strides and widths; the levels asked for
  "resnet": ({4: 8, 8: 16, 16: 32, 32: 64}, (8, 16, 32)),
  "cifar stem": ({1: 4, 2: 8, 4: 16}, (4, 8, 16)),
  "one width": ({2: 6, 4: 6, 8: 6}, (4, 8, 16)),
  "vit of patch 14": ({7: 6, 14: 6, 28: 6}, (7, 14, 28, 56)),
}
SIZE = {"vit of patch 14": 84}


def maps_of(channels, size, batch=1):
  shape = lambda s, c: (batch, -(-size // s), -(-size // s), c)  # noqa: E731
  rng = np.random.default_rng(0)
  return {s: jnp.asarray(rng.normal(size=shape(s, c)), jnp.float32) for s, c in channels.items()}


@pytest.mark.parametrize(
  ("strides", "stride", "expected"),
  [
    ([4, 8, 16, 32], 8, (8, 16, 32)),
    ([1, 2, 4], 4, (4, 8, 16)),
    ([1, 2], 4, (4, 8, 16)),
    ([7, 14, 28], 4, (7, 14, 28)),
    ([16], 4, (16, 32, 64)),
  ],
)
def test_levels_begin_at_the_encoders_own_stride(strides, stride, expected):
  assert pyramid_strides(strides, stride=stride, levels=3) == expected


@pytest.mark.parametrize("case", CASES)
def test_heads_take_maps_of_any_strides(case):
  """Abstractly: shapes, and as many points as the assignment has."""
  channels, strides = CASES[case]
  size = SIZE.get(case, 64)
  maps = maps_of(channels, size)
  shape = lambda module: jax.eval_shape(  # noqa: E731
    lambda m: module.init_with_output(jax.random.key(0), m, False)[0], maps
  )
  n = len(make_points(strides, size).stride_P)
  logits, distance, centre = shape(Detector(5, strides, width=8))
  assert (logits.shape, distance.shape, centre.shape) == ((1, n, 5), (1, n, 4), (1, n))
  grid = strides[0]
  for head in (LinearSegmenter(5, grid), LightSegmenter(5, grid, strides, width=8)):
    assert shape(head).shape == (1, size // grid, size // grid, 5)


def test_every_map_of_the_encoder_moves_the_finest_level_of_a_pyramid():
  channels, strides = CASES["resnet"]
  maps, pyramid = maps_of(channels, 64), Pyramid(strides, 8)
  variables = pyramid.init(jax.random.key(0), maps, False)
  finest = jax.jit(lambda maps: pyramid.apply(variables, maps, False)[8])
  for s in maps:
    assert np.any(finest(maps | {s: 2 * maps[s]}) != finest(maps)), s


def test_maps_of_one_width_are_not_added_to_one_another():
  channels, strides = CASES["one width"]
  maps, pyramid = maps_of(channels, 32), Pyramid(strides, 8)
  variables = pyramid.init(jax.random.key(0), maps, False)
  finest = jax.jit(lambda maps: pyramid.apply(variables, maps, False)[4])
  assert np.all(finest(maps | {8: 2 * maps[8]}) == finest(maps))
  assert np.any(finest(maps | {2: 2 * maps[2]}) != finest(maps))


def test_stacked_maps_are_means_of_the_finer_and_bilinear_of_the_coarser():
  ramp = jnp.arange(4.0).reshape(1, 1, 4, 1).repeat(4, axis=1)
  stacked = stack_at({1: ramp, 2: ramp[:, :2, :2], 4: jnp.ones((1, 1, 1, 1))}, 2)
  np.testing.assert_allclose(stacked[0, 0], [[0.5, 0, 1], [2.5, 1, 1]])
  fine = stack_at({1: ramp, 2: ramp[:, :2, :2]}, 1)
  np.testing.assert_allclose(fine[0, 0, :, 1], [0, 0.25, 0.75, 1])


def test_points_and_a_detectors_outputs_are_in_one_order():
  """A bright spot on the map moves the centreness most at the point that lies there."""
  head, maps = Detector(2, (4, 8), width=8, depth=1), maps_of({4: 3, 8: 5}, 32)
  variables = head.init(jax.random.key(0), maps, False)
  apply = jax.jit(lambda maps: head.apply(variables, maps, False)[0])
  moved = np.abs(apply(maps | {4: maps[4].at[0, 6, 1].add(30.0)}) - apply(maps)).sum(axis=(0, 2))
  points = make_points((4, 8), 32)
  place = points.xy_P2[:64][np.argmax(moved[:64])]
  assert np.max(np.abs(place - [6, 26])) <= 4  # column 1, row 6; the tower blurs it a little
