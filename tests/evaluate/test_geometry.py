import csv
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ssrl_jax import parallel
from ssrl_jax.evaluate import geometry
from ssrl_jax.evaluate.features import Evaluation, FeatureSet
from ssrl_jax.method import Features, ViewSpec

SIZE = 8
RNG = np.random.default_rng(0)


def rotation(d, seed=1):
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def spectrum_of(values, n=4000, seed=2):
  """Vectors whose sample covariance has exactly these eigenvalues, around a mean."""
  x = np.random.default_rng(seed).normal(size=(n, len(values)))
  u, _, _ = np.linalg.svd(x - x.mean(0, keepdims=True), full_matrices=False)
  mean = np.arange(len(values)).reshape(1, -1)
  return u * np.sqrt(n * np.asarray(values)).reshape(1, -1) @ rotation(len(values)) + mean


def test_rankme_counts_equal_directions():
  basis = rotation(16)
  assert geometry.rankme(basis) == pytest.approx(16, rel=1e-4)
  assert geometry.rankme(basis[:, :4] @ basis[:4]) == pytest.approx(4, rel=1e-4)
  assert geometry.rankme(np.ones((20, 8))) == pytest.approx(
    1, rel=1e-4
  )  # uncentred: the mean is one
  values = np.array([4.0, 2, 1, 1])
  p = values / values.sum()
  assert geometry.rankme(np.diag(values)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_lidar_is_its_definition_by_eigenvalues():
  n, v, d, delta = 30, 5, 4, 0.01
  x = RNG.normal(size=(n, 1, d)) * [[[3, 2, 1, 0.1]]] + RNG.normal(size=(n, v, d))
  mean = x.mean(1)
  within = sum(np.outer(z - m, z - m) for zs, m in zip(x, mean) for z in zs) / (n * v)
  between = sum(np.outer(m - mean.mean(0), m - mean.mean(0)) for m in mean) / n
  e = np.linalg.eigvals(np.linalg.inv(within + delta * np.eye(d)) @ between).real
  p = e / e.sum() + 1e-7
  expected = np.exp(-(p * np.log(p)).sum())
  assert geometry.lidar(x, delta=delta) == pytest.approx(expected, rel=1e-8)


def test_lidar_of_views_that_agree_in_k_directions_is_k():
  pictures = rotation(8)[:, :3] @ np.diag([1.0, 1, 1]) @ rotation(6, seed=3)[:3]
  pictures = np.concatenate([pictures, -pictures])  # mean 0, three equal directions
  views = np.repeat(pictures[:, None], 4, axis=1)
  assert geometry.lidar(views, delta=1e-4) == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_a_power_law_is_its_exponent(alpha):
  x = spectrum_of(np.arange(1, 121.0) ** -alpha)
  found, r2 = geometry.alpha_req(geometry.covariance_spectrum(x), first=5, last=100)
  assert found == pytest.approx(alpha, rel=1e-6)
  assert r2 == pytest.approx(1)


def test_alpha_is_weighted_least_squares_and_knows_when_it_cannot_tell():
  e = np.sort(RNG.uniform(1, 2, 40))[::-1]
  x, y, w = np.log(np.arange(5, 31)), np.log(e[4:30]), np.sqrt(1 / np.arange(5, 31))
  slope = np.linalg.lstsq(np.stack([x * w, w], 1), y * w, rcond=None)[0][0]
  assert geometry.alpha_req(e, first=5, last=30)[0] == pytest.approx(-slope)
  assert np.isnan(geometry.alpha_req(np.array([1.0, 0.5, 0, 0, 0, 0, 0, 0]), first=5, last=100)[0])


def test_spectrum_and_participation_of_known_covariances():
  values = np.array([3.0, 2, 1, 0.5])
  found = geometry.covariance_spectrum(spectrum_of(values))
  np.testing.assert_allclose(found, values, rtol=1e-9)
  assert geometry.participation(found) == pytest.approx(6.5**2 / 14.25)
  assert geometry.participation(np.ones(7)) == 7


def test_alignment_and_uniformity_of_hand_cases():
  x = np.array([[2.0, 0], [0, 3]])
  assert geometry.alignment(x, 5 * x) == 0
  assert geometry.alignment(x, -x) == pytest.approx(4)
  assert geometry.alignment(x, x[::-1]) == pytest.approx(2)
  assert geometry.uniformity(np.array([[1.0, 0], [0, 1], [-1, 0]])) == pytest.approx(
    np.log((2 * np.exp(-4) + np.exp(-8)) / 3)
  )
  assert geometry.uniformity(np.ones((9, 4))) == pytest.approx(0)
  # A vector of nothing is at distance 1 of the others.
  with_zero = np.array([[1.0, 0], [0, 1], [0, 0]])
  expected = np.log((np.exp(-4) + 2 * np.exp(-2)) / 3)
  assert geometry.uniformity(with_zero) == pytest.approx(expected)


def test_uniformity_does_not_depend_on_blocks(monkeypatch):
  x = RNG.normal(size=(50, 3))
  whole = geometry.uniformity(x)
  monkeypatch.setattr(geometry, "BLOCK", 7)
  assert geometry.uniformity(x) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("dimension", [2, 5])
def test_two_nn_finds_the_dimension_of_a_plane_in_more_of_them(dimension):
  x = np.random.default_rng(7).normal(size=(1000, dimension)) @ rotation(12)[:dimension]
  assert geometry.two_nn(x) == pytest.approx(dimension, rel=0.08)


def test_two_nn_leaves_out_duplicates():
  x = np.random.default_rng(7).uniform(size=(1500, 2))
  copies = np.concatenate([x, x[:100]])
  assert geometry.two_nn(copies) == pytest.approx(2, rel=0.1)
  assert np.isnan(geometry.two_nn(np.ones((30, 2))))


def test_cka_is_blind_to_rotation_scale_and_shift_and_not_to_more():
  x, y = RNG.normal(size=(200, 6)), RNG.normal(size=(200, 9))
  assert geometry.linear_cka(x, 3 * x @ rotation(6) + 5) == pytest.approx(1)
  assert geometry.linear_cka(x, y) == pytest.approx(geometry.linear_cka(y, x))
  assert geometry.linear_cka(x, y) < 0.2
  stretched = x * np.array([[10.0, 1, 1, 1, 1, 1]])
  assert geometry.linear_cka(x, stretched) < 0.9
  kernel = lambda z: (z - z.mean(0)) @ (z - z.mean(0)).T  # noqa: E731
  k, m = kernel(x), kernel(y)
  expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
  assert geometry.linear_cka(x, y) == pytest.approx(expected)
  assert geometry.linear_cka(x[:5], y[:5]) == pytest.approx(
    (kernel(x[:5]) * kernel(y[:5])).sum()
    / np.linalg.norm(kernel(x[:5])) / np.linalg.norm(kernel(y[:5]))
  )  # fmt: skip


def test_pairs_are_the_pictures_that_both_have():
  x = np.arange(5.0).reshape(5, 1)
  none = np.full(3, -1)
  ours, theirs = (
    FeatureSet(x[[0, 2, 3]], none, np.array([0, 2, 3])),
    FeatureSet(10 * x[[2, 3, 4]], none, np.array([2, 3, 4])),
  )
  np.testing.assert_array_equal(
    np.concatenate(geometry.paired(ours, theirs), 1), [[2, 20], [3, 30]]
  )
  with pytest.raises(ValueError, match="0 test pictures in common"):
    geometry.paired(ours, theirs._replace(ids=theirs.ids + 9))


class Noise:
  num_classes, class_names = None, ()

  def __init__(self, n):
    self.images = np.random.default_rng(n).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    return {"image": self.images[i], "label": -1}


def project(weights, images, train, key):
  pooled = jnp.tanh(images.reshape(images.shape[0], -1) @ weights)
  return Features(pooled=pooled, maps={4: images[:, ::4, ::4]}), ()


def make(num_devices=8, **options):
  weights = jnp.asarray(np.random.default_rng(3).normal(size=(SIZE * SIZE * 3, 6)) / 10)
  options = {"test": Noise(21), "weights": weights} | options
  return Evaluation(
    project, train=None, num_classes=None, mesh=parallel.make_mesh(num_devices), canvas=SIZE,
    size=SIZE, crop=1.0, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=8, **options,
  )  # fmt: skip


QUICK = {"num_lidar": 11, "num_views": 3, "jitter": 0.0, "alpha_from": 1}


def test_run_is_the_definitions_on_the_test_pictures(tmp_path):
  evaluation = make(folder=tmp_path, other=make(weights=jnp.ones((SIZE * SIZE * 3, 2))))
  figures = geometry.run(evaluation, num_test=13, **QUICK)
  x = evaluation.features("test").features[np.arange(13) * 21 // 13].astype(np.float64)
  assert figures["geometry/rankme"] == geometry.rankme(x)
  assert figures["geometry/uniformity"] == geometry.uniformity(x)
  assert (figures["geometry/num_test"], figures["geometry/dimensions"]) == (13, 6)
  assert 0 <= figures["geometry/cka"] < 1
  assert 1 <= figures["geometry/lidar"] <= 6
  with (tmp_path / "geometry_spectrum.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  np.testing.assert_allclose(
    [float(r["eigenvalue"]) for r in rows], geometry.covariance_spectrum(x), rtol=1e-6
  )
  assert float(rows[-1]["cumulative_share"]) == pytest.approx(1)
  assert (tmp_path / "geometry_spectrum.png").stat().st_size > 5000
  own = dataclasses.replace(evaluation, other=evaluation, folder=None)
  assert geometry.run(own, kind="map4", **QUICK)["geometry/cka"] == pytest.approx(1)


def test_views_are_those_of_their_pictures_on_1_and_8_devices():
  spec = ViewSpec(name="geometry", count=2, size=SIZE, jitter=0.0, greyscale=0.0)
  options = {"limit": 10, "seed": 0}
  views = geometry.view_vectors(make(), spec, "pooled", **options)
  assert views.shape == (10, 2, 6)
  alone = geometry.view_vectors(make(1), spec, "pooled", **options)
  np.testing.assert_allclose(views, alone, atol=1e-5)
  assert np.abs(views[:, 0] - views[:, 1]).max() > 0.1
  whole = spec._replace(
    flip=0.0, area=(1.0, 1.0), aspect=(1.0, 1.0), mean=(0.5,) * 3, std=(0.25,) * 3
  )
  same = geometry.view_vectors(make(), whole, "pooled", **options)
  rows = make().features("test").features[np.arange(10) * 21 // 10]
  np.testing.assert_allclose(same, np.stack([rows, rows], 1), atol=1e-4)


def test_too_few_views_are_an_error():
  with pytest.raises(ValueError, match="num_views is 1"):
    geometry.run(make(), num_views=1)


def test_vectors_that_an_encoder_does_not_have_are_refused_before_any_are_made():
  for evaluation in (make(), make(other=make())):
    with pytest.raises(ValueError, match="'fused'; this encoder has: pooled"):
      geometry.run(evaluation, kind="fused")
    assert not evaluation.cache
  with pytest.raises(ValueError, match="num_test is -1"):
    geometry.run(make(), num_test=-1)
