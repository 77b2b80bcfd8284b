"""What chance decides on the host beside a shuffle: which examples an epoch has, and which frames.

Everything is a pure function of the seed, the epoch, and for frames the example: not of the worker
or the process that asks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from ssrl_jax.data.sources import Source, labels_of

SAMPLINGS = ("uniform", "class", "weights", "clusters")

# An id is the example's position, and from this bit on the number of its copies drawn before in the
# epoch: views depend on the id, and two copies in one batch would otherwise get the same views.
COPY_BIT = 40
_EPOCH, _FRAMES = 1, 2  # keep the random numbers of the two draws apart


class Sampling(NamedTuple):
  """How often each example is drawn."""

  weights: np.ndarray  # float64 [N], sum 1
  groups: np.ndarray  # int [N]; the draws of a group as a whole keep to its weight too


def position(ids: np.ndarray) -> np.ndarray:
  """The position in the source of each id of a training batch."""
  return ids & ((1 << COPY_BIT) - 1)


def make_sampling(
  source: Source,
  *,
  sampling: str,
  file: str,
  power: float,
  mixture_weights: Sequence[float] = (),
) -> Sampling | None:
  """Reads and checks the weights of all examples; None for uniform, each once an epoch.

  Args:
    sampling: "uniform"; "class", balanced over the labels; "weights" or "clusters", by `file`.
    file: an .npy of one value an example, in the order of the source: floats (0: never
      drawn), or whole numbers that name a cluster (-1: never drawn).
    power: 1 is fully balanced, 0 uniform: a group of n examples has weight n ** (1 - power), an
      example of weight w has w ** power.
    mixture_weights: of each source of a Mixture, whose share of the draws is its weight over their
      sum; within a source the rest of the arguments says; empty: no source is favoured.

  Raises:
    ValueError, FileNotFoundError: with what to change.
  """
  if sampling not in SAMPLINGS:
    raise ValueError(f"unknown data.sampling {sampling!r}; known: {', '.join(SAMPLINGS)}")
  if not 0 <= power <= 1:
    raise ValueError(f"data.sampling_power is {power}; expected 0 (uniform) to 1 (fully balanced)")
  from_file = sampling in ("weights", "clusters")
  if bool(file) != from_file:
    fix = "name the .npy file" if from_file else "leave it empty, or sample by weights or clusters"
    raise ValueError(f"data.sampling is {sampling!r} and data.sampling_file is {file!r}; {fix}")
  if sampling == "uniform" and not len(mixture_weights):
    return None
  if sampling == "uniform":
    weights, groups = np.ones(len(source)), np.zeros(len(source), np.int8)
  elif sampling == "weights":
    values = _read(file, source)
    weights, groups = _checked_weights(values, file) ** power, np.zeros(len(values), np.int8)
    weights[values == 0] = 0  # whatever the power
  else:
    values = _read(file, source) if from_file else _known_labels(source)
    weights, groups = _balanced(values, power, what=file or repr(source))
  if len(mixture_weights):
    weights = _shared(weights, source, mixture_weights)
    # The source comes first, so that it keeps to its share as its groups keep to theirs.
    groups = source.origins * np.int64(groups.max() + 1) + groups
  weights = weights / weights.sum()
  if weights.max() * len(weights) >= 1 << (62 - COPY_BIT):
    raise ValueError(
      f"example {weights.argmax()} would be drawn {weights.max() * len(weights):.3g} times an "
      "epoch; lower data.sampling_power or its weight"
    )
  return Sampling(weights, groups)


def _shared(weights: np.ndarray, source: Source, shares: Sequence[float]) -> np.ndarray:
  """The weights, scaled so that those of each source of a Mixture sum to its share."""
  sums = np.bincount(source.origins, weights, minlength=len(shares))
  if len(shares) != len(sums) or not all(0 < share < np.inf for share in shares):
    raise ValueError(
      f"data.mixture_weights is {tuple(shares)}; expected {len(sums)} positive numbers, one for "
      "each source of data.mixture"
    )
  if not sums.all():
    raise ValueError(
      f"data.mixture_weights favours source {sums.argmin()} of {source!r}, which is not there or "
      "has no example of a weight above 0; give a weight for each source of data.mixture, and "
      "check data.sampling_file and data.num_train"
    )
  return weights * (np.array(shares) / sums)[source.origins]


def _known_labels(source: Source) -> np.ndarray:
  labels = labels_of(source)
  unknown = int(np.sum(labels < 0))
  if source.num_classes is None or unknown:
    raise ValueError(
      f"data.sampling 'class' needs every label, and {unknown} of {len(labels)} examples of "
      f"{source!r} have none; sort them into class folders, or sample by 'clusters' "
      "(python -m ssrl_jax.data.cluster)"
    )
  return labels


def _read(file: str, source: Source) -> np.ndarray:
  file = os.path.expanduser(file)
  if not os.path.isfile(file):
    raise FileNotFoundError(
      f"no file {file}; data.sampling_file names an .npy, one value an example"
    )
  try:
    values = np.load(file, allow_pickle=False)
  except (ValueError, EOFError):
    values = None
  if not isinstance(values, np.ndarray):
    raise ValueError(f"{file} is no .npy; data.sampling_file names one, one value an example")
  if values.shape != (len(source),):
    raise ValueError(
      f"{file} has shape {values.shape}; expected ({len(source)},), one value for each example of "
      f"{source!r}; make it anew for this source, split and num_train"
    )
  return values


def _checked_weights(values: np.ndarray, file: str) -> np.ndarray:
  if values.dtype.kind not in "fiu":
    raise ValueError(f"{file} holds {values.dtype}; weights are floats, 0 or more")
  weights = values.astype(np.float64)
  bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
  if len(bad):
    raise ValueError(
      f"{file} gives example {bad[0]} the weight {weights[bad[0]]} ({len(bad)} such); expected "
      "finite numbers, 0 or more"
    )
  if not weights.any():
    raise ValueError(f"{file} has only weights of 0; give at least one example a positive one")
  return weights


def _balanced(values: np.ndarray, power: float, *, what: str) -> tuple[np.ndarray, np.ndarray]:
  if values.dtype.kind not in "iu":
    raise ValueError(f"{what} holds {values.dtype}; clusters are whole numbers, -1 = never drawn")
  if values.min() < -1 or values.max() < 0:
    raise ValueError(
      f"{what} has clusters from {values.min()} to {values.max()}; expected 0 or more, and -1 only "
      "for what is never drawn"
    )
  _, groups, sizes = np.unique(values, return_inverse=True, return_counts=True)
  weights = sizes.astype(np.float64)[groups] ** -power  # n examples: n ** (1 - power) together
  left_out = values == -1
  weights[left_out] = 0
  if left_out.any():
    logging.warning("%s: %d examples are in no cluster and not drawn", what, left_out.sum())
  return weights, groups


class EpochOrder:
  """(epoch, place in it) -> id, for a sampling that is not uniform.

  Systematic resampling: of N draws an epoch an example of weight w has floor(N w) or ceil(N w), and
  so has a group of the sum of its weights. Which of the two, and the order, is drawn anew for each
  epoch. The order of the epoch at hand is kept: 8 bytes an example.
  """

  def __init__(self, sampling: Sampling, seed: int):
    self._groups, self._seed = sampling.groups, seed
    # Counted in whole numbers, since rounding in a sum of floats could make 1 draw 0 or 2.
    n = len(sampling.weights)
    self._unit = 1 << min(40, 62 - n.bit_length())  # one draw; n are below 2 ** 62
    self._shares = np.round(sampling.weights * (n * self._unit)).astype(np.int64)
    self._shares[self._shares.argmax()] += n * self._unit - self._shares.sum()
    self._kept: tuple[int, np.ndarray] | None = None

  def __getstate__(self):
    return self.__dict__ | {"_kept": None}

  def __call__(self, epoch: int, place: int) -> int:
    kept = self._kept  # read once: another thread may put another
    if kept is None or kept[0] != epoch:
      self._kept = kept = (epoch, self.epoch(epoch))
    return int(kept[1][place])

  def epoch(self, epoch: int) -> np.ndarray:
    """All ids of an epoch, int64 [N]."""
    np_rng = np.random.default_rng((_EPOCH, self._seed, epoch))
    # Neighbours are drawn in turn: in an order of its own for each epoch, within the groups.
    order = np_rng.permutation(len(self._shares))
    order = order[np.argsort(self._groups[order], kind="stable")]
    ends = np.cumsum(self._shares[order])
    drawn = -((np_rng.integers(self._unit) - ends) // self._unit)  # ceil of (end - offset) / unit
    counts = np.diff(drawn, prepend=0)
    copy = np.arange(len(order)) - np.repeat(drawn - counts, counts)
    return np_rng.permutation(np.repeat(order, counts) | (copy << COPY_BIT))


def draw_frames(
  num_frames: int, *, count: int, span: int, seed: int, epoch: int, example_id: int
) -> np.ndarray:
  """Which `count` of a clip's frames an epoch shows, in random order; int [count].

  Without replacement from a random window of `span` frames (0: the whole clip); where the window
  has fewer, they are repeated in turn.
  """
  np_rng = np.random.default_rng((_FRAMES, seed, epoch, example_id))
  window = min(num_frames, span or num_frames)
  first = np_rng.integers(num_frames - window + 1)
  return first + np.resize(np_rng.permutation(window), count)
