import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import masked
from tests.numeric import differences


def pictures(b=2, h=6, w=4, c=3):
  return np.random.default_rng(0).normal(size=(b, h, w, c)).astype(np.float32)


def test_patchify_is_row_column_channel_of_each_patch_row_by_row():
  x = pictures()
  patches = masked.patchify(x, 2)
  assert patches.shape == (2, 6, 12)
  for b, n, m in np.ndindex(2, 6, 12):
    (row, column), (y, within) = divmod(n, 2), divmod(m, 6)
    expected = x[b, 2 * row + y, 2 * column + within // 3, within % 3]
    assert patches[b, n, m] == expected


def standardise64(patches):
  """models_mae.py, forward_loss: torch's var, which divides by M - 1, and 1e-6 added to it."""
  out = np.zeros(patches.shape)
  for i in np.ndindex(*patches.shape[:-1]):
    x = patches[i].astype(np.float64)
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / (len(x) - 1)
    out[i] = (x - mean) / np.sqrt(var + 1e-6)
  return out


def test_standardise_patches_is_maes_target_with_the_unbiased_variance():
  x = pictures().reshape(2, 6, 12) * np.float32(0.01) + 3
  got = jax.jit(masked.standardise_patches)(x)
  np.testing.assert_allclose(got, standardise64(x), rtol=2e-4, atol=1e-4)
  # -1 and 1 have variance 2 unbiased, 1 biased.
  got = masked.standardise_patches(np.array([[[-1, 1]]], np.float32))
  np.testing.assert_allclose(got, [[[-(0.5**0.5), 0.5**0.5]]], rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_standardised_patches_and_their_gradient_stay_finite(scale):
  x = np.float32(scale) * pictures().reshape(2, 6, 12)
  value, gradient = jax.value_and_grad(lambda x: jnp.sum(masked.standardise_patches(x)[..., 0]))(x)
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


def test_mean_where_by_hand_with_its_gradient():
  x = np.array([[1, 2, 6], [4, 5, 6], [7, 8, 9]], np.float32)
  chosen = np.array([[True, False, True], [False] * 3, [True] * 3])
  np.testing.assert_allclose(masked.mean_where(x, chosen), [3.5, 0, 8])
  gradient = jax.grad(lambda x: jnp.sum(masked.mean_where(x, chosen)))(x)
  expected = differences(
    lambda x: sum(x[i][chosen[i]].mean() for i in range(3) if chosen[i].any()), x
  )
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_random_order_is_a_uniform_permutation_of_each_row():
  order = np.asarray(
    jax.jit(masked.random_order, static_argnums=(1, 2))(jax.random.key(0), 4000, 5)
  )
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(5), (4000, 1)))
  counts = np.array([[np.mean(order[:, place] == n) for n in range(5)] for place in range(5)])
  np.testing.assert_allclose(counts, 0.2, atol=4 * (0.16 / 4000) ** 0.5)  # four deviations
  assert len({tuple(row) for row in order}) == 120
  other = masked.random_order(jax.random.key(1), 4000, 5)
  assert np.any(np.asarray(other) != order)


def draw(num, grid, area, aspect, seed=0):
  """Blocks [num, h, w], and of each top, left, height, width."""
  block = masked.random_blocks(jax.random.key(seed), num, grid, area=area, aspect=aspect)
  assert block.shape == (num, grid[0] * grid[1])
  assert block.dtype == bool
  block = np.asarray(block).reshape(num, *grid)
  rows, columns = block.any(axis=2), block.any(axis=1)
  top, left = rows.argmax(axis=1), columns.argmax(axis=1)
  height, width = rows.sum(axis=1), columns.sum(axis=1)
  # A rectangle is the outer product of its rows and columns, each without a gap.
  np.testing.assert_array_equal(block, rows[:, :, None] & columns[:, None, :])
  for lines, start, length in ((rows, top, height), (columns, left, width)):
    place = np.arange(lines.shape[1])
    expected = (place >= start[:, None]) & (place < (start + length)[:, None])
    np.testing.assert_array_equal(lines, expected)
  return block, top, left, height, width


def test_random_blocks_have_the_area_and_the_aspect_asked_for():
  area, aspect = (0.1, 0.3), (0.5, 2.0)
  grid = (200, 200)  # fine, so that rounding to patches is small; no such block meets a border
  block, _, _, height, width = draw(400, grid, area, aspect)
  share, ratio = block.mean(axis=(1, 2)), height / width
  assert 0.1 - 0.005 < share.min() < 0.11
  assert 0.29 < share.max() < 0.3 + 0.005
  assert 0.5 - 0.01 < ratio.min() < 0.53
  assert 1.9 < ratio.max() < 2 + 0.03
  # Uniform in the area, log-uniform in the aspect, and independent: quartiles, 4 deviations of 400.
  quartiles = [0.25, 0.5, 0.75]
  np.testing.assert_allclose((np.quantile(share, quartiles) - 0.1) / 0.2, quartiles, atol=0.1)
  log = np.log(ratio / 0.5) / np.log(4)
  np.testing.assert_allclose(np.quantile(log, quartiles), quartiles, atol=0.1)
  assert abs(np.corrcoef(share, log)[0, 1]) < 0.2


def test_random_blocks_lie_anywhere_within_the_grid():
  # 2 x 2 of 5 x 4: tops 0 to 3 and lefts 0 to 2, all alike.
  _, top, left, height, width = draw(3000, (5, 4), (0.2, 0.2), (1.0, 1.0))
  assert set(height) == set(width) == {2}
  for start, num in ((top, 4), (left, 3)):
    counts = np.bincount(start, minlength=num) / 3000
    assert counts.shape == (num,)
    np.testing.assert_allclose(counts, 1 / num, atol=4 * (0.25 / 3000) ** 0.5)
  assert abs(np.corrcoef(top, left)[0, 1]) < 0.08


@pytest.mark.parametrize(
  ("area", "aspect"), [((0.0, 0.0), (1, 1)), ((1.0, 1.0), (0.1, 10.0)), ((0.5, 0.5), (1e-3, 1e3))]
)
def test_random_blocks_have_at_least_one_patch_and_stay_inside(area, aspect):
  block, top, left, height, width = draw(200, (4, 6), area, aspect)
  assert block.any(axis=(1, 2)).all()
  assert np.all(top + height <= 4)
  assert np.all(left + width <= 6)
  if area == (0.0, 0.0):
    assert set(height) == set(width) == {1}


def test_a_block_of_everything_is_everything():
  assert draw(3, (5, 5), (1.0, 1.0), (1.0, 1.0))[0].all()
