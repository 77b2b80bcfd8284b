"""Weighted k-nearest-neighbour classification, the judge that has nothing to train.

As DINO evaluates (facebookresearch/dino, eval_knn.py): cosine similarity s, the k most similar
training pictures vote for their class with weight exp(s / temperature).
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.method import normalise
from ssrl_jax.parallel import cut_rows

TOP5_CLASSES = 20  # with fewer classes than this, five guesses say little


def run(evaluation: Evaluation, *, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
  """Classifies the test pictures by their neighbours among the training pictures.

  Pictures without a label neither vote nor count.

  Args:
    k: neighbours that vote; all, where there are fewer.
    temperature: a vote weighs exp(cosine / temperature).

  Returns:
    knn/accuracy: percent of the labelled test pictures that get their class.
    knn/top5: percent whose class is among the five with most votes; with 20 classes or more.
    knn/k: the k used: that asked for, or the number of labelled training pictures if smaller.
    knn/unlabelled: pictures of both sets that were left out.
  """
  if k < 1 or temperature <= 0:
    raise ValueError(f"k is {k} and temperature {temperature}; both must be positive")
  bank, bank_unlabelled = evaluation.labelled("train")
  query, query_unlabelled = evaluation.labelled("test")
  if k > len(bank.labels):
    logging.warning("k-NN: k %d is capped at the bank's %d pictures", k, len(bank.labels))
    k = len(bank.labels)
  similarity_NK, index_NK = nearest(query.features, bank.features, k=k, mesh=evaluation.mesh)
  votes = class_votes(
    similarity_NK, bank.labels[index_NK], evaluation.num_classes, temperature=temperature
  )
  figures = {"knn/accuracy": top_accuracy(votes, query.labels, 1)}
  if evaluation.num_classes >= TOP5_CLASSES:
    figures["knn/top5"] = top_accuracy(votes, query.labels, 5)
  return figures | {"knn/k": float(k), "knn/unlabelled": float(bank_unlabelled + query_unlabelled)}


def nearest(
  query_ND: np.ndarray,
  bank_MD: np.ndarray,
  *,
  k: int,
  query_block: int = 1024,
  bank_block: int = 8192,
  mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The k rows of the bank with the largest cosine similarity, most similar first.

  Works through blocks of both and keeps a running best, so that the device holds the queries and
  one [query_block, bank_block] table, whatever the bank's size. Of equals the first in the bank
  wins. A zero vector has similarity 0 with everything. With a mesh, its devices share a block of
  queries; `query_block` should be a multiple of their number.

  Returns:
    Similarity float32 [N, k] in [-1, 1], index int32 [N, k]; k at most M.
  """
  if not 1 <= k <= len(bank_MD):
    raise ValueError(f"k is {k}; it must be between 1 and the bank's size {len(bank_MD)}")
  query_block, bank_block = min(query_block, len(query_ND)), min(bank_block, len(bank_MD))
  starts = range(0, len(query_ND), query_block)
  queries = [cut_rows(_block(query_ND, start, query_block), mesh) for start in starts]
  shape = (query_block, k)
  nothing = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
  best = [tuple(cut_rows(x, mesh) for x in nothing) for _ in starts]
  for start in range(0, len(bank_MD), bank_block):
    block = _block(bank_MD, start, bank_block)  # to every device that has queries
    limits = np.array([start, len(bank_MD)], np.int32)
    best = [_merge(*b, q, block, limits) for b, q in zip(best, queries)]
  similarity, index = zip(*jax.device_get(best))
  return np.concatenate(similarity)[: len(query_ND)], np.concatenate(index)[: len(query_ND)]


def _block(x_ND: np.ndarray, start: int, size: int) -> np.ndarray:
  """Rows start to start + size, with rows of zeros where the array has ended."""
  rows = x_ND[start : start + size]
  return np.pad(rows, ((0, size - len(rows)), (0, 0)))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _merge(best_NK, index_NK, query_ND, bank_MD, limits):
  """The best of the best so far and of a block of the bank that starts at row limits[0]."""
  # HIGHEST: accelerators would round to 8 bits, and exp(s / 0.07) makes 0.005 of s into 7 %
  s_NM = jnp.matmul(normalise(query_ND), normalise(bank_MD).T, precision=jax.lax.Precision.HIGHEST)
  row_M = limits[0] + jnp.arange(bank_MD.shape[0], dtype=jnp.int32)
  row_NM = jnp.broadcast_to(row_M.reshape(1, -1), s_NM.shape)
  s_NM = jnp.where(row_NM < limits[1], s_NM, -jnp.inf)
  # top_k prefers the earlier of equals: the best so far stand in front
  s_N, row_N = jnp.concatenate([best_NK, s_NM], 1), jnp.concatenate([index_NK, row_NM], 1)
  best_NK, place_NK = jax.lax.top_k(s_N, best_NK.shape[1])
  return best_NK, jnp.take_along_axis(row_N, place_NK, axis=1)


def class_votes(
  similarity_NK: np.ndarray, label_NK: np.ndarray, num_classes: int, *, temperature: float
) -> np.ndarray:
  """float64 [N, num_classes]: the sum of exp((s - largest s) / temperature) over each class.

  The largest is subtracted because exp(1 / temperature) overflows for a low temperature; a factor
  common to all votes of a query changes no rank.
  """
  s_NK = similarity_NK.astype(np.float64)
  weight_NK = np.exp((s_NK - s_NK[:, :1]) / temperature)
  votes = np.zeros((len(s_NK), num_classes))
  np.add.at(votes, (np.arange(len(s_NK)).reshape(-1, 1), label_NK), weight_NK)
  return votes


def top_accuracy(scores_NC: np.ndarray, label_N: np.ndarray, top: int) -> float:
  """Percent of the rows whose label has one of the `top` highest scores.

  Of equal scores the lowest class goes first, as with argmax. A label whose score is NaN is wrong.
  """
  own_N1 = np.take_along_axis(scores_NC, label_N.reshape(-1, 1), axis=1)
  earlier_NC = np.arange(scores_NC.shape[1]).reshape(1, -1) < label_N.reshape(-1, 1)
  after_NC = (scores_NC < own_N1) | ((scores_NC == own_N1) & ~earlier_NC)  # itself, too
  return 100 * float(np.mean(np.sum(~after_NC, axis=1) < top))
