import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax.losses import dense
from tests.numeric import unit

closest_pairs = jax.jit(dense.closest_pairs, static_argnames="num")


def maps(b=3, n=6, m=5, c=4, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(b, n, c)).astype(np.float32), rng.normal(size=(b, m, c)).astype(
    np.float32
  )


def test_match_features_is_the_largest_cosine():
  x, y = maps()
  y *= np.array([0.1, 1, 10, 100, 3], np.float32)[None, :, None]  # lengths that must not matter
  match = jax.jit(dense.match_features)(x, y)
  assert match.dtype == jnp.int32
  for b in range(3):
    for i in range(6):
      cosines = [unit(x[b, i]) @ unit(y_j) for y_j in y[b]]
      assert match[b, i] == np.argmax(cosines)


def test_matching_a_permutation_finds_it():
  x, _ = maps(n=6)
  order = np.array([3, 0, 5, 1, 4, 2])
  match = dense.match_features(x, x[:, order])
  np.testing.assert_array_equal(np.asarray(order)[match], np.tile(np.arange(6), (3, 1)))
  np.testing.assert_array_equal(dense.take_places(x[:, order], match), x)


def closest64(x, y, num):
  """neirest_neighbores of main_vicregl.py: of each place its nearest; the `num` smallest of those.

  In the order of the places of x: they are selected by a mask.
  """
  best = []
  for i, x_i in enumerate(x.astype(np.float64)):
    distances = [np.sqrt(((x_i - y_j) ** 2).sum()) for y_j in y.astype(np.float64)]
    best.append((min(distances), i, int(np.argmin(distances))))
  return sorted((i, j) for _, i, j in sorted(best)[:num])


@pytest.mark.parametrize("num", [1, 4, 6])
@pytest.mark.parametrize("offset", [0.0, 30.0])  # far from the origin, squares cancel
def test_closest_pairs_are_vicregls(num, offset):
  x, y = (z + np.float32(offset) for z in maps())
  i, j = closest_pairs(x, y, num=num)
  assert i.shape == j.shape == (3, num)
  for b in range(3):
    assert list(zip(np.asarray(i[b]), np.asarray(j[b]))) == closest64(x[b], y[b], num)


def test_closest_pairs_by_hand():
  x = np.array([[[0, 0], [10, 0], [5, 5]]], np.float32)
  y = np.array([[[10, 1], [0, 3]]], np.float32)  # distances 3, 1 and sqrt(29) to 1, 0 and 1
  i, j = closest_pairs(x, y, num=2)
  np.testing.assert_array_equal(i, [[0, 1]])
  np.testing.assert_array_equal(j, [[1, 0]])


def test_closest_pairs_is_not_symmetric_and_may_repeat_a_place_of_the_other_view():
  x, y = np.float32([[[0], [1], [2]]]), np.float32([[[1.4], [50], [60]]])
  _, j = closest_pairs(x, y, num=3)
  np.testing.assert_array_equal(j, [[0, 0, 0]])
  i, j = closest_pairs(y, x, num=1)
  assert (int(i[0, 0]), int(j[0, 0])) == (0, 1)


def test_choices_have_no_gradient_and_the_chosen_have():
  x, y = maps(b=1, n=4, m=4)

  def distance(x, y):
    i, j = dense.closest_pairs(x, y, num=2)
    match = dense.match_features(x, y)
    here, there = dense.take_places(x, i), dense.take_places(y, j)
    return jnp.sum((here - there) ** 2) + 0 * jnp.sum(match), (i, j)

  gradient, (i, j) = jax.grad(distance, has_aux=True)(x, y)
  expected = np.zeros(x.shape)
  for i_k, j_k in zip(np.asarray(i[0]), np.asarray(j[0])):
    expected[0, i_k] = 2 * (x[0, i_k] - y[0, j_k])
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_choices_at_extreme_lengths_are_places(scale):
  x, y = (np.float32(scale) * z for z in maps())
  i, j = closest_pairs(x, y, num=3)
  match = dense.match_features(x, y)
  for places, num in ((i, 6), (j, 5), (match, 5)):
    assert np.all((np.asarray(places) >= 0) & (np.asarray(places) < num))
  assert all(len(set(row)) == 3 for row in np.asarray(i).tolist())


def test_positions_of_the_whole_picture_are_the_centres_of_the_places():
  got = np.asarray(dense.positions(jnp.array([[0.0, 0.0, 1.0, 1.0]]), (2, 4)))[0]
  expected = [(y, x) for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)]
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_positions_of_a_crop_and_of_its_mirror_image():
  # Rows 0.2 to 0.6, columns 0.5 to 0.9.
  boxes = jnp.array([[0.2, 0.5, 0.6, 0.9], [0.2, 0.9, 0.6, 0.5]])
  plain, mirrored = np.asarray(dense.positions(boxes, (2, 2)))
  np.testing.assert_allclose(plain, [(0.3, 0.6), (0.3, 0.8), (0.5, 0.6), (0.5, 0.8)], rtol=1e-5)
  # What is left in the mirrored view lies right in the picture.
  np.testing.assert_allclose(mirrored, [(0.3, 0.8), (0.3, 0.6), (0.5, 0.8), (0.5, 0.6)], rtol=1e-5)


def test_positions_lead_from_a_view_to_its_mirror_image():
  """Two views of one box, one mirrored: place (r, c) lies where (r, w - 1 - c) does."""
  boxes = jnp.array([[0.1, 0.3, 0.7, 0.8]])
  at, at_mirrored = dense.positions(boxes, (3, 4)), dense.positions(boxes[:, [0, 3, 2, 1]], (3, 4))
  i, j = closest_pairs(at, at_mirrored, num=12)
  expected = {(4 * r + c, 4 * r + 3 - c) for r in range(3) for c in range(4)}
  assert set(zip(np.asarray(i[0]).tolist(), np.asarray(j[0]).tolist())) == expected


def test_positions_of_disjoint_views_pair_their_neighbouring_edges():
  left, right = jnp.array([[0.0, 0.0, 1.0, 0.4]]), jnp.array([[0.0, 0.6, 1.0, 1.0]])
  at, other = (dense.positions(box, (1, 2)) for box in (left, right))
  i, j = closest_pairs(at, other, num=1)
  assert (int(i[0, 0]), int(j[0, 0])) == (1, 0)


def test_seen_from_reads_a_view_where_another_one_lies():
  """A map that holds the position of each place is linear, so bilinear reading is exact."""
  box = jnp.array([[0.1, 0.2, 0.7, 0.9], [0.0, 0.8, 1.0, 0.1], [0.2, 0.2, 0.6, 0.6]])
  at_box = jnp.array([[0.2, 0.7, 0.6, 0.3], [0.3, 0.2, 0.8, 0.6], [0.5, 0.1, 0.9, 0.5]])
  grid = (8, 6)
  at, wanted = (dense.positions(b, grid).reshape(3, *grid, 2) for b in (box, at_box))
  shown, inside = jax.jit(lambda a, b, c: dense.seen_from(a, b, at_box_B4=c))(at, box, at_box)
  low, high = jnp.minimum(box[:, :2], box[:, 2:]), jnp.maximum(box[:, :2], box[:, 2:])
  expected = ((wanted >= low[:, None, None]) & (wanted <= high[:, None, None])).all(-1)
  np.testing.assert_array_equal(inside, expected)
  assert inside[0].all()
  assert inside[1].all()
  assert 0 < inside[2].mean() < 1
  np.testing.assert_allclose(shown[:2], wanted[:2], atol=1e-6)
  # Beyond the centre of an outermost place that one is repeated.
  clipped = np.clip(wanted[2], at[2, 0, 0], at[2, -1, -1])
  np.testing.assert_allclose(shown[2], clipped, atol=1e-6)


def test_seen_from_the_view_itself_is_its_map():
  x, _ = maps(b=2, n=6)
  box = jnp.array([[0.1, 0.2, 0.7, 0.9], [0.0, 0.8, 1.0, 0.1]])
  shown, inside = dense.seen_from(x.reshape(2, 2, 3, 4), box, at_box_B4=box)
  assert inside.all()
  np.testing.assert_allclose(shown, x.reshape(2, 2, 3, 4), atol=2e-6)
