"""Softmax regressions, one for each learning rate and weight decay, all trained at once."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ssrl_jax.evaluate.knn import top_accuracy
from ssrl_jax.method import Array
from ssrl_jax.parallel import cut_rows

Head = dict[str, Array]  # kernel float32 [D, K], bias [1, K]

LEGS = (1 / 64, 1 / 16, 1 / 4)  # of a race: shares of the training, after which settings drop out


def search_to_the_end(
  x_ND: np.ndarray,
  label_N: np.ndarray,
  held_MD: np.ndarray,
  held_label_M: np.ndarray,
  pairs: Sequence[tuple[float, float]],
  **options: Any,
) -> tuple[int, float]:
  """The place in `pairs` of the head that is best on the held-out rows; its accuracy in percent.

  Args:
    options: of `fit_heads`.

  Raises:
    FloatingPointError: all diverged.
  """
  heads = fit_heads(x_ND, label_N, pairs, **options)
  accuracy, _, best = ranking(heads, held_MD, held_label_M)[0]
  return best, accuracy


def race(
  x_ND: np.ndarray,
  label_N: np.ndarray,
  held_MD: np.ndarray,
  held_label_M: np.ndarray,
  pairs: Sequence[tuple[float, float]],
  *,
  num_classes: int,
  epochs: int,
  batch_size: int,
  seed: int,
  mesh: Mesh | None = None,
) -> tuple[int, float]:
  """As `search_to_the_end`, settings dropping out while they train.

  After 1/64 and 1/16 of the training the better quarter of them goes on, two or more; after 1/4 the
  best one has won (successive halving, Jamieson & Talwalkar 2016). As learning rates have not
  fallen yet, it is the mean of each head over the steps since the last time that is judged.
  """
  batch_size = min(batch_size, len(label_N))
  steps = len(label_N) // batch_size
  ends = sorted({math.ceil(share * epochs * steps) for share in LEGS})
  np_rng = np.random.default_rng(seed)
  orders = [np_rng.permutation(len(label_N)) for _ in range(-(-ends[-1] // steps))]
  rows_TB = np.concatenate([x[: steps * batch_size].reshape(steps, batch_size) for x in orders])
  left = np.arange(len(pairs))
  rates_2G = np.asarray(pairs, np.float32).T
  state = _start(_zeros(len(pairs), x_ND.shape[1], num_classes), *rates_2G)
  x_ND = jnp.asarray(x_ND)
  for first, end in itertools.pairwise([0, *ends]):
    given = jax.tree.map(lambda x: cut_rows(x, mesh), (state, *rates_2G[:, left]))
    batches = x_ND, label_N, rows_TB[first:end]
    state, means = _leg(*given, *batches, total=epochs * steps)
    ranked = ranking(means, held_MD, held_label_M)
    better = np.array([place for *_, place in ranked[: max(-(-len(left) // 4), 2)]])
    state = jax.tree.map(operator.itemgetter(better), state)
    left = left[better]
  return int(left[0]), ranked[0][0]


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
  heads = _zeros(len(pairs_G2), x_ND.shape[1], num_classes)
  heads, *rates = jax.tree.map(lambda x: cut_rows(x, mesh), (heads, *pairs_G2.T))
  options = {"epochs": epochs, "batch_size": batch_size}
  heads = _fit(heads, x_ND, label_N, *rates, np.uint32(seed), **options)
  return {name: x[: len(pairs)] for name, x in heads.items()}


def _zeros(g: int, d: int, k: int) -> Head:
  return {"kernel": np.zeros((g, d, k), np.float32), "bias": np.zeros((g, 1, k), np.float32)}


def _optimizer(learning_rate, weight_decay, total):
  schedule = optax.cosine_decay_schedule(learning_rate, total)
  decay = optax.add_decayed_weights(weight_decay, mask={"kernel": True, "bias": False})
  return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))


@jax.jit
def _start(heads, learning_rate_G, weight_decay_G):
  """heads, and the state of their optimizer before the first step."""
  start = lambda h, r, w: _optimizer(r, w, 1).init(h)  # noqa: E731
  return heads, jax.vmap(start)(heads, learning_rate_G, weight_decay_G)


def _make_step(x_ND, label_N, learning_rate_G, weight_decay_G, total):
  """(heads, state of the optimizer), rows of a batch -> the same after a step."""

  def loss(head, x_BD, label_B):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(head, x_BD), label_B))

  def update(head, opt_state, learning_rate, weight_decay, x_BD, label_B):
    grads = jax.grad(loss)(head, x_BD, label_B)
    optimizer = _optimizer(learning_rate, weight_decay, total)
    updates, opt_state = optimizer.update(grads, opt_state, head)
    return optax.apply_updates(head, updates), opt_state

  def step(state, row_B):
    batch = (x_ND[row_B], label_N[row_B])
    grid = jax.vmap(update, in_axes=(0, 0, 0, 0, None, None))
    return grid(*state, learning_rate_G, weight_decay_G, *batch)

  return step


@functools.partial(jax.jit, static_argnames=("epochs", "batch_size"))
def _fit(heads, x_ND, label_N, learning_rate_G, weight_decay_G, seed, *, epochs, batch_size):
  n = len(label_N)
  step = _make_step(x_ND, label_N, learning_rate_G, weight_decay_G, epochs * (n // batch_size))

  def epoch(state, key):
    rows = jax.random.permutation(key, n)[: n // batch_size * batch_size]
    return jax.lax.scan(lambda *a: (step(*a), None), state, rows.reshape(-1, batch_size))

  state = _start(heads, learning_rate_G, weight_decay_G)
  (heads, _), _ = jax.lax.scan(epoch, state, jax.random.split(jax.random.key(seed), epochs))
  return heads


@functools.partial(jax.jit, static_argnames="total")
def _leg(state, learning_rate_G, weight_decay_G, x_ND, label_N, rows_TB, *, total):
  """The state after these batches, and the mean of the heads over them."""
  step = _make_step(x_ND, label_N, learning_rate_G, weight_decay_G, total)

  def add(carry, row_B):
    state = step(carry[0], row_B)
    return (state, jax.tree.map(jnp.add, carry[1], state[0])), None

  (state, sums), _ = jax.lax.scan(add, (state, jax.tree.map(jnp.zeros_like, state[0])), rows_TB)
  return state, jax.tree.map(lambda x: x / len(rows_TB), sums)


def apply(head: Head, x_BD: Array | np.ndarray) -> Array:
  """Logits [B, K]."""
  logits_BK = jnp.matmul(x_BD, head["kernel"], precision=jax.lax.Precision.HIGHEST)
  return logits_BK + head["bias"]


def unstack(heads: Head) -> list[Head]:
  return [{k: v[i] for k, v in heads.items()} for i in range(len(heads["bias"]))]


def ranking(heads: Head, x_ND: np.ndarray, label_N: np.ndarray) -> list[tuple[float, float, int]]:
  """(accuracy in percent, minus the loss, place) of each head, the best first.

  A head that diverged is not among them.

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
  return sorted(scores, reverse=True)
