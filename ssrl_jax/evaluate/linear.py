"""Linear probe: softmax regression on frozen features, the field's usual measure.

A grid of learning rates and weight decays is trained at once, by vmap, on a part of the training
pictures, for each kind of vector asked for; the setting that is best on the held-out rest is
trained again on all of them and sees the test pictures once. Where a training is long, settings
drop out of that search while it goes on (`race`). Features are standardised with the training
pictures' mean and deviation, so one grid serves encoders of any scale (MAE's probe puts a BatchNorm
without scale there, to that end).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssrl_jax.evaluate.features import Evaluation, FeatureSet
from ssrl_jax.evaluate.knn import TOP5_CLASSES, top_accuracy
from ssrl_jax.evaluate.linear_fit import Head, apply, fit_heads, race, search_to_the_end, unstack

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)


class Probe(NamedTuple):
  """A fitted probe: what turns frozen vectors of one kind into logits."""

  mean: np.ndarray  # float32 [1, D], of the training pictures
  std: np.ndarray  # float32 [1, D]; infinite where they are all alike, which makes that 0
  head: Head
  kind: str  # of the vectors, see `Evaluation.kinds`
  figures: dict[str, float]  # of the choice, see `run`

  def logits(self, x_ND: np.ndarray) -> np.ndarray:
    """float32 [N, K]."""
    return np.asarray(apply(self.head, (x_ND - self.mean) / self.std))


def run(
  evaluation: Evaluation,
  *,
  kinds: Sequence[str] = ("pooled",),
  learning_rates: Sequence[float] = LEARNING_RATES,
  weight_decays: Sequence[float] = WEIGHT_DECAYS,
  epochs: int = 50,
  race_above: int = 2000,
  batch_size: int = 256,
  held_out: float = 0.1,
  seed: int = 0,
) -> dict[str, float]:
  """Trains the probe on the training pictures and applies it to the test pictures.

  Pictures without a label are left out.

  Args:
    others: as `fit_probe`.

  Returns:
    linear/accuracy: percent of the test pictures, of the setting that the held-out pictures chose.
    linear/top5: percent whose class is among the five likeliest; with 20 classes or more.
    linear/held_out_accuracy: percent of the held-out training pictures, of that setting when it was
      chosen: a maximum over the grid, so it flatters a little; where there was more than one.
    linear/learning_rate, linear/weight_decay: of that setting.
    linear/kind: of that setting, as its place in `evaluation.kinds()`, 0 being "pooled"; where
      there was a choice, the log has its name.
    linear/unlabelled: pictures of both sets that were left out.
  """
  probe = fit_probe(
    evaluation, kinds=kinds, learning_rates=learning_rates, weight_decays=weight_decays,
    epochs=epochs, race_above=race_above, batch_size=batch_size, held_out=held_out, seed=seed,
  )  # fmt: skip
  warn_at_edge("linear probe", "learning_rates", probe.figures["learning_rate"], learning_rates)
  warn_at_edge("linear probe", "weight_decays", probe.figures["weight_decay"], weight_decays)
  test, unlabelled = evaluation.labelled("test", probe.kind)
  unlabelled += evaluation.labelled("train", probe.kind)[1]
  figures = accuracies(probe.logits(test.features), test.labels)
  figures |= probe.figures | {"unlabelled": float(unlabelled)}
  return {f"linear/{name}": value for name, value in figures.items()}


def fit_probe(
  evaluation: Evaluation,
  *,
  kinds: Sequence[str] = ("pooled",),
  learning_rates: Sequence[float] = LEARNING_RATES,
  weight_decays: Sequence[float] = WEIGHT_DECAYS,
  epochs: int = 50,
  race_above: int = 2000,
  batch_size: int = 256,
  held_out: float = 0.1,
  seed: int = 0,
  ids: np.ndarray | None = None,
) -> Probe:
  """The probe of the kind, learning rate and weight decay that held-out pictures choose.

  Args:
    kinds: names of `evaluation.kinds()`, or "all"; an encoder with no other gives "pooled".
    learning_rates: at the start, for this batch size.
    weight_decays: of the kernel.
    epochs, batch_size: of every training.
    race_above: steps of a training from which on the search is a `race`: cheaper, and its choice
      a little less sure.
    held_out: share of each class that chooses; not used where there is only one setting.
    seed: of the held-out part and of the order.
    ids: of the training pictures to use; None: all that have a label.

  Raises:
    ValueError: an option out of range, an unknown kind, or no labels.
    FloatingPointError: every setting diverged, or the chosen one on all training pictures.
  """
  _check_options(learning_rates, weight_decays, epochs, batch_size)
  kinds = _resolve(kinds, evaluation)
  pairs = list(itertools.product(learning_rates, weight_decays))
  options = {
    "num_classes": evaluation.num_classes, "batch_size": batch_size, "seed": seed,
    "mesh": evaluation.mesh,
  }  # fmt: skip
  kind, pair, figures = kinds[0], pairs[0], {}
  if len(kinds) * len(pairs) > 1:
    found = []
    for kind in kinds:
      train = training_rows(evaluation, kind, ids)
      kept, held = split_held_out(train.labels, held_out, seed=seed)
      part, rest = standardise(train.features[kept], train.features[held])
      data = part, train.labels[kept], rest, train.labels[held]
      steps = epochs * (len(kept) // min(batch_size, len(kept)))
      search = race if steps > race_above else search_to_the_end
      best, accuracy = search(*data, pairs, epochs=epochs, **options)
      found.append((accuracy, kind, pairs[best]))
    accuracy, kind, pair = max(found, key=lambda x: x[0])  # of equals the earlier kind
    figures = {"held_out_accuracy": accuracy}
  if len(kinds) > 1:
    logging.info("linear probe: the held-out pictures chose %r of %s", kind, ", ".join(kinds))
  train = training_rows(evaluation, kind, ids)
  mean, std = moments(train.features)
  whole = (train.features - mean) / std
  (head,) = unstack(fit_heads(whole, train.labels, [pair], epochs=epochs, **options))
  if not all(np.all(np.isfinite(x)) for x in head.values()):
    raise FloatingPointError(
      f"the linear probe diverged with learning rate {pair[0]:g} and weight decay {pair[1]:g}; "
      "lower them"
    )
  place = evaluation.kinds().index(kind) if kind != "pooled" else 0
  figures |= {"learning_rate": pair[0], "weight_decay": pair[1], "kind": float(place)}
  return Probe(mean, std, head, kind, figures)


def training_rows(evaluation: Evaluation, kind: str, ids: np.ndarray | None) -> FeatureSet:
  """The labelled training pictures, or those of them with these ids."""
  rows, _ = evaluation.labelled("train", kind)
  if ids is None:
    return rows
  chosen = np.isin(rows.ids, ids)
  return FeatureSet(*(x[chosen] for x in rows))


def accuracies(logits_NK: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
  """{"accuracy": percent} and, with `TOP5_CLASSES` or more, "top5"."""
  figures = {"accuracy": top_accuracy(logits_NK, label_N, 1)}
  if logits_NK.shape[1] >= TOP5_CLASSES:
    figures["top5"] = top_accuracy(logits_NK, label_N, 5)
  return figures


def _resolve(kinds: Sequence[str], evaluation: Evaluation) -> tuple[str, ...]:
  kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
  if kinds == ("pooled",):
    return kinds
  known = evaluation.kinds()
  if kinds == ("all",) or len(known) == 1:  # raw pixels have no other, and are judged beside
    return known
  for kind in kinds:
    evaluation.check_kind(kind)
  if not kinds:
    raise ValueError(f"kinds is empty; give one or more of {', '.join(known)}, or all")
  return kinds


def split_held_out(
  label_N: np.ndarray, fraction: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Row numbers to train on and to hold out: the fraction of each class, rounded up.

  A class keeps at least one row to train on.

  Raises:
    ValueError: nothing would be held out.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"held_out is {fraction}; it must be between 0 and 1, for example 0.1")
  np_rng = np.random.default_rng(seed)
  held = []
  for label in np.unique(label_N):
    rows = np_rng.permutation(np.flatnonzero(label_N == label))
    held.append(rows[: min(int(np.ceil(fraction * len(rows))), len(rows) - 1)])
  held = np.sort(np.concatenate(held))
  if not len(held):
    raise ValueError(
      f"{len(label_N)} labelled training pictures, one for each class, leave none to choose the "
      "learning rate by; give at least two pictures of one class"
    )
  return np.setdiff1d(np.arange(len(label_N)), held), held


def standardise(train_ND: np.ndarray, other_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both sets in units of the first one's mean and deviation; constant dimensions become 0."""
  mean, std = moments(train_ND)
  return (train_ND - mean) / std, (other_MD - mean) / std


def moments(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation, float32 [1, D]; the deviation of a constant dimension is infinite."""
  mean = np.mean(x_ND, axis=0, keepdims=True, dtype=np.float64)
  std = np.std(x_ND, axis=0, keepdims=True, dtype=np.float64)
  std = np.where(std > 1e-6 * np.abs(mean) + 1e-12, std, np.inf)
  return mean.astype(np.float32), std.astype(np.float32)


def warn_at_edge(what: str, name: str, value: float, grid: Sequence[float]) -> None:
  """Says when the grid may have cut off the best value; nothing lies below a decay of 0."""
  if len(grid) > 1 and (value == max(grid) or value == min(grid) > 0):
    logging.warning(
      "%s: the best of %s %s is at its edge: %g; a wider grid may do better",
      what, name, tuple(grid), value,
    )  # fmt: skip


def _check_options(learning_rates, weight_decays, epochs, batch_size) -> None:
  if not learning_rates or min(learning_rates) <= 0:
    raise ValueError(f"learning_rates is {learning_rates}; give one or more positive numbers")
  if not weight_decays or min(weight_decays) < 0:
    raise ValueError(f"weight_decays is {weight_decays}; give one or more numbers, none below 0")
  if epochs < 1 or batch_size < 1:
    raise ValueError(f"epochs is {epochs} and batch_size {batch_size}; both must be at least 1")
