"""Retrieval: the pictures of the query's class among those most similar to it by cosine.

Recall@k as metric learning counts it (Oh Song et al. 2016, Deep Metric Learning via Lifted
Structured Feature Embedding): a query is right when one of its k nearest has its class. Mean
average precision as image retrieval counts it, over the ranking of the whole bank; mAP@R of
Musgrave et al. 2020 (A Metric Learning Reality Check) stops at rank R.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.method import normalise
from ssrl_jax.parallel import cut_rows, replicated

RANKS = (1, 5, 10)
BANKS = ("test", "train")
TABLE = 2**24  # similarities in a block, which with their sorting take about 300 MB


def run(evaluation: Evaluation, *, kind: str = "pooled", bank: str = "test") -> dict[str, float]:
  """Ranks a bank by cosine similarity to each labelled test picture.

  Args:
    kind: of the vectors, one of `evaluation.kinds()`; an encoder with no other gives "pooled".
    bank: "test": all other labelled test pictures; "train": the labelled training pictures.

  Returns:
    retrieval/recall_at_1, _5, _10: percent of the queries with one of their class among the k most
      similar.
    retrieval/map: percent; the mean over queries of the mean of the precision at the rank of each
      of the R pictures of the bank with the query's class.
    retrieval/map_at_r: percent; 1 / R times the sum of the precision at those of them that are
      among the first R.
    retrieval/queries: test pictures that have one of their class in the bank: those that count.
    retrieval/unlabelled: pictures of query and bank that were left out.
  """
  if bank not in BANKS:
    raise ValueError(f"retrieval's bank is {bank!r}; expected one of {', '.join(BANKS)}")
  known = evaluation.kinds()
  if len(known) == 1:  # raw pixels have no other, and are judged beside
    kind = known[0]
  query, unlabelled = evaluation.labelled("test", kind)
  rows, left_out = query, 0
  if bank == "train":
    rows, left_out = evaluation.labelled("train", kind)
  hit, precision, precision_r, num_relevant = rank(
    query.features, query.labels, rows.features, rows.labels, own=bank == "test",
    mesh=evaluation.mesh,
  )  # fmt: skip
  counts = num_relevant > 0
  if not counts.any():
    raise ValueError(
      f"none of the {len(counts)} test pictures has another of its class in the {bank} pictures; "
      "retrieval needs at least two pictures of a class"
    )
  if not counts.all():
    logging.warning(
      "retrieval: %d of %d queries have none of their class in the bank and are left out",
      np.sum(~counts), len(counts),
    )  # fmt: skip
  mean = lambda x_N: 100 * float(np.mean(x_N[counts], dtype=np.float64))  # noqa: E731
  return {
    **{f"retrieval/recall_at_{k}": mean(hit[:, i]) for i, k in enumerate(RANKS)},
    "retrieval/map": mean(precision),
    "retrieval/map_at_r": mean(precision_r),
    "retrieval/queries": float(counts.sum()),
    "retrieval/unlabelled": float(unlabelled + left_out),
  }


def rank(
  query_ND: np.ndarray,
  query_label_N: np.ndarray,
  bank_MD: np.ndarray,
  bank_label_M: np.ndarray,
  *,
  own: bool,
  query_block: int = 0,
  mesh: Mesh | None = None,
) -> tuple[np.ndarray, ...]:
  """What the ranking of the bank gives for each query. Of equals the first in the bank is first.

  Walks over blocks of queries, which the devices of a mesh share; each device holds the bank and a
  table [block, M].

  Args:
    own: the queries are the bank, and a picture is not compared with itself.
    query_block: queries at once; 0: so many that the table has `TABLE` elements.

  Returns:
    Whether there is a hit up to each of `RANKS`, bool [N, 3]; average precision, average precision
    up to rank R, float32 [N] in [0, 1], 0 where R is 0; R, int32 [N].
  """
  size = query_block or max(1, TABLE // len(bank_MD))
  if not query_block and mesh is not None:
    size = -(-size // mesh.size) * mesh.size
  size = min(size, len(query_ND))
  bank = bank_MD, bank_label_M.astype(np.int32)
  if mesh is not None:  # once to every device that will have queries
    devices = cut_rows(np.zeros(size), mesh).sharding.mesh
    bank = jax.device_put(bank, replicated(devices))
  found = []
  for start in range(0, len(query_ND), size):
    rows = np.minimum(np.arange(start, start + size), len(query_ND) - 1)  # the last one again
    place = rows.astype(np.int32) if own else np.full(size, -1, np.int32)
    block = (query_ND[rows], query_label_N[rows].astype(np.int32), place)
    out = _rank(*(cut_rows(x, mesh) for x in block), *bank)
    found.append([x[: len(query_ND) - start] for x in jax.device_get(out)])
  return tuple(np.concatenate(column) for column in zip(*found))


@jax.jit
def _rank(query_ND, query_label_N, place_N, bank_MD, bank_label_M):
  """See `rank`; place_N is the query's own row of the bank, or -1."""
  s_NM = jnp.matmul(normalise(query_ND), normalise(bank_MD).T, precision=jax.lax.Precision.HIGHEST)
  itself_NM = jnp.arange(bank_MD.shape[0])[None] == place_N[:, None]
  relevant_NM = (query_label_N[:, None] == bank_label_M[None]) & ~itself_NM
  distance_NM = jnp.where(itself_NM, jnp.inf, -s_NM)
  _, relevant_NM = jax.lax.sort((distance_NM, relevant_NM), num_keys=1, is_stable=True)
  total_N1 = jnp.sum(relevant_NM, axis=1, keepdims=True)
  rank_1M = jnp.arange(1, bank_MD.shape[0] + 1)[None]
  precision_NM = jnp.where(relevant_NM, jnp.cumsum(relevant_NM, axis=1) / rank_1M, 0)
  early_NM = jnp.where(rank_1M <= total_N1, precision_NM, 0)
  divisor_N = jnp.maximum(total_N1[:, 0], 1)
  hit_NK = jnp.stack([jnp.any(relevant_NM[:, :k], axis=1) for k in RANKS], axis=1)
  return (
    hit_NK, jnp.sum(precision_NM, axis=1) / divisor_N, jnp.sum(early_NM, axis=1) / divisor_N,
    total_N1[:, 0],
  )  # fmt: skip
