"""Geometry of the representation: how many directions it uses, how evenly, and whose it resembles.

No labels and nothing to train. Each function below is one figure's definition, in float64.
"""

from __future__ import annotations

import csv
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ssrl_jax import charts, parallel
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, join_words, vectors
from ssrl_jax.method import ViewSpec
from ssrl_jax.views import make_views

EPS = 1e-7  # added to each share before its logarithm, as RankMe's and LiDAR's papers do
BLOCK = 1024  # rows whose distances to all others are held at once


def run(
  evaluation: Evaluation,
  *,
  kind: str = "pooled",
  num_test: int = 5000,
  num_lidar: int = 1000,
  num_views: int = 10,
  area: Sequence[float] = (0.2, 1.0),
  jitter: float = 0.8,
  greyscale: float = 0.2,
  flip: float = 0.5,
  delta: float = 1e-4,
  alpha_from: int = 5,
  alpha_to: int = 100,
  seed: int = 0,
) -> dict[str, float]:
  """Figures of the test pictures' vectors; the training pictures are not looked at.

  Args:
    kind: which vectors, see `features.vectors`; the other encoder must have them too.
    num_test: test pictures, spread evenly, for all figures but LiDAR and alignment; 0: all.
    num_lidar: pictures for LiDAR; 1000 in the paper.
    num_views: of each of them; 50 in the paper. Alignment takes the first two.
    area, jitter, greyscale, flip: of those views, as in `ViewSpec`, whatever the run trained with.
    delta: LiDAR's ridge.
    alpha_from: the first eigenvalue (counted from 1) of the line for alpha. alpha_to: the last.
    seed: of the views.

  Returns:
    geometry/rankme: `rankme`, in [1, D].
    geometry/lidar: `lidar`, in [1, D].
    geometry/alpha, geometry/alpha_r2: `alpha_req`, and how well the line fits. What cannot be told
      (too few dimensions for alpha, too many duplicates for TwoNN) is left out, with a warning.
    geometry/alignment: `alignment` of two views, in [0, 4]; lower is more invariant.
    geometry/uniformity: `uniformity`, in [-8, 0]; lower is more even.
    geometry/intrinsic_dimension: `two_nn`.
    geometry/participation: (sum e)^2 / sum e^2 of the covariance's eigenvalues e, in [1, D].
    geometry/cka: `linear_cka` with the same pictures' vectors of `evaluation.other`, if given.
    geometry/num_test, geometry/dimensions: N and D.
    geometry_spectrum.csv and .png in the evaluation's folder: the covariance's eigenvalues.
  """
  if num_views < 2 or num_lidar < 2:
    raise ValueError(f"num_views is {num_views} and num_lidar {num_lidar}; expected at least 2")
  if num_test < 0:
    raise ValueError(f"geometry: num_test is {num_test}; expected 0 (all) or more")
  for one in filter(None, (evaluation, evaluation.other)):
    one.check_kind(kind)
  rows = evaluation.features("test", kind)
  chosen = _spread(len(rows.ids), num_test)
  x_ND = rows.features[chosen].astype(np.float64)
  spec = ViewSpec(
    name="geometry", count=num_views, size=evaluation.size, area=tuple(area), flip=flip,
    jitter=jitter, greyscale=greyscale, mean=evaluation.mean, std=evaluation.std,
  )  # fmt: skip
  views_NVD = view_vectors(evaluation, spec, kind, limit=num_lidar, seed=seed)
  if alpha_from < 1:
    raise ValueError(f"geometry: alpha_from is {alpha_from}; eigenvalues are counted from 1")
  eigenvalue_D = covariance_spectrum(x_ND)
  alpha, r2 = alpha_req(eigenvalue_D, first=alpha_from, last=alpha_to)
  figures = {
    "geometry/rankme": rankme(x_ND),
    "geometry/lidar": lidar(views_NVD, delta=delta),
    "geometry/alpha": alpha,
    "geometry/alpha_r2": r2,
    "geometry/alignment": alignment(views_NVD[:, 0], views_NVD[:, 1]),
    "geometry/uniformity": uniformity(x_ND),
    "geometry/intrinsic_dimension": two_nn(x_ND),
    "geometry/participation": participation(eigenvalue_D),
    "geometry/num_test": float(len(x_ND)),
    "geometry/dimensions": float(x_ND.shape[1]),
  }
  undefined = [name for name, value in figures.items() if not np.isfinite(value)]
  if undefined:
    logging.warning(
      "geometry: %s cannot be told of %d vectors of %d dimensions and are left out",
      ", ".join(undefined), *x_ND.shape,
    )  # fmt: skip
    figures = {name: value for name, value in figures.items() if name not in undefined}
  if evaluation.other is not None:
    ours = FeatureSet(rows.features[chosen], rows.labels[chosen], rows.ids[chosen])
    figures["geometry/cka"] = linear_cka(*paired(ours, evaluation.other.features("test", kind)))
  if folder := evaluation.own_folder():
    _write(folder, eigenvalue_D, alpha, alpha_from, alpha_to)
  return figures


def _spread(n: int, limit: int) -> np.ndarray:
  """`limit` row numbers of n, spread evenly; 0: all."""
  count = min(n, limit or n)
  return np.arange(count) * n // count


def view_vectors(
  evaluation: Evaluation, spec: ViewSpec, kind: str, *, limit: int, seed: int
) -> np.ndarray:
  """float64 [N, V, D] of random views of test pictures, in the order of their ids."""
  found, ids = [], []
  for batch in evaluation.batches("test", limit=limit):
    out = _view_vectors(
      evaluation.weights, batch, np.uint32(seed), apply=evaluation.apply, kind=kind, spec=spec,
      mesh=evaluation.mesh,
    )  # fmt: skip
    x_BVD, weight_B, words_B2 = jax.device_get(out)
    found.append(x_BVD[weight_B > 0])
    ids.append(join_words(words_B2)[weight_B > 0])
  x_NVD = np.concatenate(found)[np.argsort(np.concatenate(ids))].astype(np.float64)
  if len(x_NVD) < 2 or not np.all(np.isfinite(x_NVD)):
    raise ValueError(
      f"geometry: {len(x_NVD)} test pictures could be read, and the views' vectors are finite: "
      f"{bool(np.all(np.isfinite(x_NVD)))}; expected at least 2 pictures and finite vectors"
    )
  return x_NVD


@functools.partial(jax.jit, static_argnames=("apply", "kind", "spec", "mesh"))
def _view_vectors(weights, batch, seed, *, apply, kind, spec, mesh):
  views_BVHWC = make_views(jax.random.key(seed), batch, (spec,))[spec.name]
  # One view after another: all of a batch's views at once would not fit next to large encoders.
  found_VBD = jax.lax.map(
    lambda x_BHWC: vectors(apply(weights, x_BHWC, False, None)[0])[kind],
    jnp.swapaxes(views_BVHWC, 0, 1),
  )
  out = jnp.swapaxes(found_VBD, 0, 1), batch["weight"], batch["id"]
  return jax.lax.with_sharding_constraint(out, parallel.replicated(mesh))


def effective_number(value_D: np.ndarray) -> float:
  """exp of the entropy of the shares: how many values of equal size would be as diverse."""
  total = np.sum(value_D)
  if total <= 0:
    return 1.0  # nothing varies: as one direction
  share_D = value_D / total + EPS
  return float(np.exp(-np.sum(share_D * np.log(share_D))))


def rankme(x_ND: np.ndarray) -> float:
  """RankMe (Garrido et al. 2023, equation 1): of the singular values of the uncentred vectors."""
  return effective_number(np.linalg.svd(x_ND, compute_uv=False))


def lidar(views_NVD: np.ndarray, *, delta: float) -> float:
  """LiDAR (Thilak et al. 2023): a picture is a class, its views are the class's members.

  Of the eigenvalues of W^-1/2 B W^-1/2, where B is the covariance of the pictures' means and W that
  of the views about them, plus delta * identity.
  """
  n, v, d = views_NVD.shape
  mean_ND = views_NVD.mean(axis=1)
  within_KD = (views_NVD - mean_ND.reshape(n, 1, d)).reshape(n * v, d)
  between_ND = mean_ND - mean_ND.mean(axis=0, keepdims=True)
  value_D, vector_DD = np.linalg.eigh(within_KD.T @ within_KD / (n * v))
  whiten_DD = vector_DD / np.sqrt(np.maximum(value_D, 0) + delta).reshape(1, d)
  singular = np.linalg.svd(between_ND @ whiten_DD / np.sqrt(n), compute_uv=False)
  return effective_number(singular**2)


def covariance_spectrum(x_ND: np.ndarray) -> np.ndarray:
  """Eigenvalues of the covariance, descending, float64 [min(N, D)]."""
  centred_ND = x_ND - x_ND.mean(axis=0, keepdims=True)
  return np.linalg.svd(centred_ND, compute_uv=False) ** 2 / len(x_ND)


def alpha_req(eigenvalue_D: np.ndarray, *, first: int, last: int) -> tuple[float, float]:
  """alpha-ReQ (Agrawal et al. 2022): the spectrum falls as i^-alpha; near 1 is best.

  Weighted least squares of log eigenvalue on log i for i = first..last (or to the last eigenvalue
  above rounding), weight 1 / i, as in arnab39/reptrix.

  Returns:
    alpha, and the weighted R^2 of the line; NaN where fewer than three eigenvalues are there.
  """
  positive = int(np.sum(eigenvalue_D > 1e-12 * max(eigenvalue_D[0], 1e-300)))
  i = np.arange(first, min(last, positive) + 1, dtype=np.float64)
  if len(i) < 3:
    return float("nan"), float("nan")
  x, y, weight = np.log(i), np.log(eigenvalue_D[first - 1 : first - 1 + len(i)]), 1 / i
  x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
  slope = np.sum(weight * x * y) / np.sum(weight * x * x)
  spread = np.sum(weight * y * y)
  r2 = 1 - np.sum(weight * (y - slope * x) ** 2) / spread if spread > 0 else 1.0
  return float(-slope), float(r2)


def participation(eigenvalue_D: np.ndarray) -> float:
  """(sum e)^2 / sum e^2; 1 where nothing varies."""
  squares = np.sum(eigenvalue_D**2)
  return float(np.sum(eigenvalue_D) ** 2 / squares) if squares > 0 else 1.0


def alignment(first_ND: np.ndarray, second_ND: np.ndarray) -> float:
  """Mean squared distance of two views of a picture on the unit sphere (Wang & Isola 2020)."""
  return float(np.mean(np.sum((_unit(first_ND) - _unit(second_ND)) ** 2, axis=1)))


def uniformity(x_ND: np.ndarray) -> float:
  """log mean exp(-2 d^2) over all pairs of different pictures (Wang & Isola 2020, t = 2)."""
  x_ND, total = _unit(x_ND), 0.0  # vectors of nothing but zeros stay so
  n, length_N = len(x_ND), np.sum(x_ND**2, axis=1)
  for start in range(0, n, BLOCK):
    rows = slice(start, start + BLOCK)
    square = length_N[rows, None] + length_N[None] - 2 * x_ND[rows] @ x_ND.T
    near = np.exp(-2 * np.maximum(square, 0))
    near[np.arange(len(near)), start + np.arange(len(near))] = 0  # each picture's pair with itself
    total += np.sum(near)
  return float(np.log(total / (n * (n - 1))))


def _unit(x_ND: np.ndarray) -> np.ndarray:
  return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


def two_nn(x_ND: np.ndarray, *, discarded: float = 0.1) -> float:
  """TwoNN (Facco et al. 2017): dimension by the distances to the two nearest neighbours.

  Slope, through the origin, of -log(1 - F(m)) on log m over the ratios m of second to first
  distance, without the largest `discarded` of them. Pictures with a duplicate are left out. NaN
  where fewer than ten are left.
  """
  if len(x_ND) < 10:
    return float("nan")
  from sklearn.neighbors import NearestNeighbors  # a second to import, here only

  distance_N3, _ = NearestNeighbors(n_neighbors=3).fit(x_ND).kneighbors(x_ND)
  nearest, second = distance_N3[:, 1], distance_N3[:, 2]
  ratio = np.sort(second[nearest > 0] / nearest[nearest > 0])
  kept = int(len(ratio) * (1 - discarded))
  if kept < 10:
    return float("nan")
  x, y = np.log(ratio[:kept]), -np.log1p(-np.arange(1, kept + 1) / len(ratio))
  return float(np.sum(x * y) / np.sum(x * x)) if np.any(x > 0) else float("nan")


def paired(ours: FeatureSet, theirs: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
  """The vectors of the pictures that both have; the sources must be the same."""
  _, own, other = np.intersect1d(ours.ids, theirs.ids, return_indices=True)
  if len(own) < 2:
    raise ValueError(f"the two encoders have {len(own)} test pictures in common; CKA needs 2")
  return ours.features[own].astype(np.float64), theirs.features[other].astype(np.float64)


def linear_cka(x_ND: np.ndarray, y_NE: np.ndarray) -> float:
  """Linear CKA (Kornblith et al. 2019, section 3), in [0, 1]; blind to rotation and scale."""
  x_ND, y_NE = (z - z.mean(axis=0, keepdims=True) for z in (x_ND, y_NE))
  own = np.linalg.norm(_gram(x_ND)) * np.linalg.norm(_gram(y_NE))
  if own == 0:
    return 0.0  # one of them is constant
  return float(np.linalg.norm(x_ND.T @ y_NE) ** 2 / own)


def _gram(x_ND: np.ndarray) -> np.ndarray:
  """The smaller of the two products, whose Frobenius norms are equal."""
  return x_ND.T @ x_ND if x_ND.shape[1] <= x_ND.shape[0] else x_ND @ x_ND.T


def _write(folder: Path, eigenvalue_D: np.ndarray, alpha: float, first: int, last: int) -> None:
  total = max(float(np.sum(eigenvalue_D)), 1e-300)
  with (folder / "geometry_spectrum.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["number", "eigenvalue", "share", "cumulative_share"])
    for i, value in enumerate(eigenvalue_D):
      shares = value / total, np.sum(eigenvalue_D[: i + 1]) / total
      writer.writerow([i + 1, f"{value:.9g}", *(f"{share:.9g}" for share in shares)])
  shown = np.flatnonzero(eigenvalue_D > 1e-12 * max(eigenvalue_D[0], 1e-300))
  figure = Figure(figsize=(5, 3.6), layout="constrained")
  axes = figure.add_subplot()
  axes.loglog(shown + 1, eigenvalue_D[shown], color=charts.SERIES[0])
  if np.isfinite(alpha):
    i = np.arange(first, min(last, len(shown)) + 1)
    height = np.average(np.log(eigenvalue_D[i - 1]) + alpha * np.log(i), weights=1 / i)
    line = np.exp(height) * i**-alpha
    axes.loglog(i, line, "--", color=charts.SERIES[1], label=f"i^-{alpha:.2f}")
    axes.legend()
  axes.set_xlabel("number i")
  axes.set_ylabel("eigenvalue of the covariance")
  figure.savefig(folder / "geometry_spectrum.png", dpi=120)
