"""Linear probe: softmax regression on frozen features, the field's usual measure.

A grid of learning rates and weight decays is trained at once, by vmap, on a part of the training
pictures; the pair that is best on the held-out rest is trained again on all of them and sees the
test pictures once. Features are standardised with the training pictures' mean and deviation, so one
grid serves encoders of any scale (MAE's probe puts a BatchNorm without scale there, to that end).
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.evaluate.knn import TOP5_CLASSES, top_accuracy
from ssrl_jax.method import Array
from ssrl_jax.parallel import cut_rows

Head = dict[str, Array]  # kernel float32 [D, K], bias [1, K]


LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)


class Probe(NamedTuple):
  """A probe, fitted to the training pictures' features."""

  head: Head
  mean_1D: np.ndarray  # of the training features, float32
  scale_1D: np.ndarray  # 1 / deviation, 0 for a constant dimension
  held_out_accuracy: float  # percent of the held-out training pictures, of the pair chosen
  learning_rate: float
  weight_decay: float
  unlabelled: int  # training pictures that were left out

  def logits(self, features_ND: np.ndarray) -> np.ndarray:
    """float32 [N, K] of raw features."""
    return np.asarray(apply(self.head, (features_ND - self.mean_1D) * self.scale_1D))


def run(
  evaluation: Evaluation,
  *,
  learning_rates: Sequence[float] = LEARNING_RATES,
  weight_decays: Sequence[float] = WEIGHT_DECAYS,
  epochs: int = 50,
  batch_size: int = 256,
  held_out: float = 0.1,
  seed: int = 0,
) -> dict[str, float]:
  """Trains the probe on the training pictures and applies it to the test pictures.

  Pictures without a label are left out. Learning rates are those at the start, for this batch size.

  Returns:
    linear/accuracy: percent of the test pictures, of the pair that the held-out pictures chose.
    linear/top5: percent whose class is among the five likeliest; with 20 classes or more.
    linear/held_out_accuracy: percent of the held-out training pictures, of that pair: a maximum
      over the grid, so it flatters a little.
    linear/learning_rate, linear/weight_decay: that pair.
    linear/unlabelled: pictures of both sets that were left out.
  """
  probe = fit_probe(
    evaluation, learning_rates=learning_rates, weight_decays=weight_decays, epochs=epochs,
    batch_size=batch_size, held_out=held_out, seed=seed,
  )  # fmt: skip
  test, test_unlabelled = evaluation.labelled("test")
  logits = probe.logits(test.features)
  figures = {"linear/accuracy": top_accuracy(logits, test.labels, 1)}
  if evaluation.num_classes >= TOP5_CLASSES:
    figures["linear/top5"] = top_accuracy(logits, test.labels, 5)
  return figures | {
    "linear/held_out_accuracy": probe.held_out_accuracy,
    "linear/learning_rate": probe.learning_rate,
    "linear/weight_decay": probe.weight_decay,
    "linear/unlabelled": float(probe.unlabelled + test_unlabelled),
  }


def fit_probe(
  evaluation: Evaluation,
  *,
  learning_rates: Sequence[float] = LEARNING_RATES,
  weight_decays: Sequence[float] = WEIGHT_DECAYS,
  epochs: int = 50,
  batch_size: int = 256,
  held_out: float = 0.1,
  seed: int = 0,
) -> Probe:
  """The probe of the clean training pictures, fitted once for all protocols that ask alike.

  See `run` for the arguments.
  """
  _check_options(learning_rates, weight_decays, epochs, batch_size)
  grid = tuple(learning_rates), tuple(weight_decays)
  asked = ("probe", *grid, epochs, batch_size, held_out, seed)
  if asked in evaluation.cache:
    return evaluation.cache[asked]
  train, unlabelled = evaluation.labelled("train")
  kept, held = split_held_out(train.labels, held_out, seed=seed)
  pairs = list(itertools.product(*grid))
  fit = functools.partial(
    fit_heads, num_classes=evaluation.num_classes, epochs=epochs, batch_size=batch_size, seed=seed,
    mesh=evaluation.mesh,
  )  # fmt: skip
  part, rest = standardise(train.features[kept], train.features[held])
  best, accuracy = choose(fit(part, train.labels[kept], pairs), rest, train.labels[held])
  _warn_at_edge("learning_rates", pairs[best][0], learning_rates)
  _warn_at_edge("weight_decays", pairs[best][1], weight_decays)

  mean_1D, scale_1D = moments(train.features)
  whole = (train.features - mean_1D) * scale_1D
  (head,) = unstack(fit(whole, train.labels, [pairs[best]]))
  probe = Probe(head, mean_1D, scale_1D, accuracy, *pairs[best], unlabelled)
  evaluation.cache[asked] = probe
  return probe


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
  mean_1D, scale_1D = moments(train_ND)
  return (train_ND - mean_1D) * scale_1D, (other_MD - mean_1D) * scale_1D


def moments(train_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and 1 / deviation, float32 [1, D]; 0 for the scale of a constant dimension."""
  mean = np.mean(train_ND, axis=0, keepdims=True, dtype=np.float64)
  std = np.std(train_ND, axis=0, keepdims=True, dtype=np.float64)
  scale = np.where(std > 1e-6 * np.abs(mean) + 1e-12, 1 / np.maximum(std, 1e-12), 0)
  return mean.astype(np.float32), scale.astype(np.float32)


def fit_heads(
  x_ND: np.ndarray,
  label_N: np.ndarray,
  pairs: Sequence[tuple[float, float]],
  *,
  num_classes: int,
  epochs: int,
  batch_size: int,
  seed: int,
  mesh: Mesh | None = None,
) -> Head:
  """One head for each (learning rate, weight decay), stacked: kernel [G, D, K], bias [G, 1, K].

  All see the same batches: shuffled anew each epoch, the uneven rest of an epoch being left out
  that time. SGD with Nesterov momentum 0.9, cosine to zero, weight decay on the kernel only. With a
  mesh, its devices share the heads.
  """
  batch_size = min(batch_size, len(label_N))
  pairs_G2 = np.asarray(pairs, np.float32)
  if mesh is not None and len(pairs) > 1:  # a few heads twice, so that all devices have as many
    pairs_G2 = np.resize(pairs_G2, (-(-len(pairs) // mesh.size) * mesh.size, 2))
  g, d = len(pairs_G2), x_ND.shape[1]
  heads = {
    "kernel": np.zeros((g, d, num_classes), np.float32),
    "bias": np.zeros((g, 1, num_classes), np.float32),
  }
  heads, *rates = jax.tree.map(lambda x: cut_rows(x, mesh), (heads, *pairs_G2.T))
  options = {"epochs": epochs, "batch_size": batch_size}
  heads = _fit(heads, x_ND, label_N, *rates, np.uint32(seed), **options)
  return {name: x[: len(pairs)] for name, x in heads.items()}


@functools.partial(jax.jit, static_argnames=("epochs", "batch_size"))
def _fit(heads, x_ND, label_N, learning_rate_G, weight_decay_G, seed, *, epochs, batch_size):
  key = jax.random.key(seed)
  steps = x_ND.shape[0] // batch_size

  def optimizer(learning_rate, weight_decay):
    schedule = optax.cosine_decay_schedule(learning_rate, epochs * steps)
    decay = optax.add_decayed_weights(weight_decay, mask={"kernel": True, "bias": False})
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))

  def loss(head, x_BD, label_B):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(head, x_BD), label_B))

  def update(head, opt_state, learning_rate, weight_decay, x_BD, label_B):
    grads = jax.grad(loss)(head, x_BD, label_B)
    updates, opt_state = optimizer(learning_rate, weight_decay).update(grads, opt_state, head)
    return optax.apply_updates(head, updates), opt_state

  def step(carry, row_B):
    batch = (x_ND[row_B], label_N[row_B])
    grid = jax.vmap(update, in_axes=(0, 0, 0, 0, None, None))
    return grid(*carry, learning_rate_G, weight_decay_G, *batch), None

  def epoch(carry, key):
    rows = jax.random.permutation(key, x_ND.shape[0])[: steps * batch_size]
    return jax.lax.scan(step, carry, rows.reshape(steps, batch_size))

  opt_state = jax.vmap(lambda h, r, w: optimizer(r, w).init(h))(
    heads, learning_rate_G, weight_decay_G
  )
  (heads, _), _ = jax.lax.scan(epoch, (heads, opt_state), jax.random.split(key, epochs))
  return heads


def apply(head: Head, x_BD: Array | np.ndarray) -> Array:
  """Logits [B, K]."""
  logits_BK = jnp.matmul(x_BD, head["kernel"], precision=jax.lax.Precision.HIGHEST)
  return logits_BK + head["bias"]


def unstack(heads: Head) -> list[Head]:
  return [{k: v[i] for k, v in heads.items()} for i in range(len(heads["bias"]))]


def choose(heads: Head, x_ND: np.ndarray, label_N: np.ndarray) -> tuple[int, float]:
  """Index of the head with the best accuracy, of equals the lower loss; its accuracy in percent.

  A head that diverged is never chosen.

  Raises:
    FloatingPointError: all diverged.
  """
  scores = []
  for i, head in enumerate(unstack(heads)):
    logits = apply(head, x_ND)
    loss = float(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label_N)))
    if np.isfinite(loss):
      scores.append((top_accuracy(np.asarray(logits), label_N, 1), -loss, i))
  if not scores:
    raise FloatingPointError("the linear probe diverged for every learning rate; add lower ones")
  accuracy, _, best = max(scores)
  return best, accuracy


def _warn_at_edge(name: str, value: float, grid: Sequence[float]) -> None:
  """Says when the grid may have cut off the best value; nothing lies below a decay of 0."""
  if len(grid) > 1 and (value == max(grid) or value == min(grid) > 0):
    logging.warning(
      "linear probe: the best of %s %s is at its edge: %g; a wider grid may do better",
      name, tuple(grid), value,
    )  # fmt: skip


def _check_options(learning_rates, weight_decays, epochs, batch_size) -> None:
  if not learning_rates or min(learning_rates) <= 0:
    raise ValueError(f"learning_rates is {learning_rates}; give one or more positive numbers")
  if not weight_decays or min(weight_decays) < 0:
    raise ValueError(f"weight_decays is {weight_decays}; give one or more numbers, none below 0")
  if epochs < 1 or batch_size < 1:
    raise ValueError(f"epochs is {epochs} and batch_size {batch_size}; both must be at least 1")
