"""Objectives that tell examples apart. Rows are brought to unit length first; the batch is the
global batch. With `block` > 0 keys are taken that many at a time, forwards and backwards, so that
the largest array is [B, block] (2 B rows where both views ask); value and gradient stay the same
up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssrl_jax.method import Array, exact_matmul, fold_views, normalise

Pairs = Callable[[Array, Array], Array]  # (row [B, 1], column [1, M]) -> bool [B, M]
LOW = -1e30  # instead of -inf, which has no difference to itself


def nt_xent(z1_BP: Array, z2_BP: Array, *, temperature: float, block: int = 0) -> Array:
  """NT-Xent: cross-entropy of finding the other view among the 2B - 1 other views of the batch.

  Chen et al. 2020 (SimCLR), equation 1. Official code: google-research/simclr objective.py (both
  directions, self masked).

  Args:
    z1_BP: embeddings of the first views, any scale.
    z2_BP: embeddings of the second views; row i belongs to the image of row i of `z1_BP`.
    temperature: divides the cosines; > 0.
    block: see above.

  Returns:
    float32 [B], in [0, inf): the mean of the two directions for each image.
  """
  return _both_views(z1_BP, z2_BP, temperature, block, lambda i, j: i == j)


def decoupled(z1_BP: Array, z2_BP: Array, *, temperature: float, block: int = 0) -> Array:
  """DCL: NT-Xent without the positive pair in the denominator.

  Yeh et al. 2022, equation 6; implemented in raminnakhli/Decoupled-Contrastive-Learning dcl.py,
  which sums one direction; this is the mean of both. Arguments and result as `nt_xent`, but the
  value may be negative.
  """
  return _both_views(z1_BP, z2_BP, temperature, block, lambda i, j: i // 2 == j // 2)


def _both_views(z1_BP, z2_BP, temperature, block, skip) -> Array:
  z_NP = _side_by_side(z1_BP, z2_BP)
  lse_N, own_N = contrast(
    z_NP,
    z_NP,
    temperature=temperature,
    positive=lambda i, j: i ^ 1 == j,
    skip=skip,
    block=block,
  )
  return jnp.mean((lse_N - own_N).reshape(-1, 2), axis=1)


def _side_by_side(z1_BP: Array, z2_BP: Array) -> Array:
  """[2B, P] of unit length, the views of image i in rows 2 i and 2 i + 1.

  Not one view after the other: each device has rows of both, and would have to send them away.
  """
  return fold_views(normalise(jnp.stack([z1_BP, z2_BP], axis=1)))


def info_nce(q_BP: Array, k_BP: Array, *, temperature: float, block: int = 0) -> Array:
  """Cross-entropy of finding each query's own key among the B keys of the batch.

  As MoCo v3's and NNCLR's official forms, without MoCo v3's factor 2 * temperature; float32 [B].
  """
  q_BP, k_BP = normalise(q_BP), normalise(k_BP)
  options = {"temperature": temperature, "block": block}
  lse_B, own_B = contrast(q_BP, k_BP, positive=lambda i, j: i == j, **options)
  return lse_B - own_B


def info_nce_queue(
  q_BP: Array, k_BP: Array, queue_QP: Array, *, temperature: float, block: int = 0
) -> Array:
  """Cross-entropy of each query's own key against a queue of others' keys.

  He et al. 2020 (MoCo), equation 1: the other keys of the batch are no negatives; float32 [B].
  """
  q_BP, k_BP, queue_QP = normalise(q_BP), normalise(k_BP), normalise(queue_QP)
  own_B = jnp.sum(q_BP * k_BP, axis=1) / temperature
  others_B, _ = contrast(q_BP, queue_QP, temperature=temperature, block=block)
  return jnp.logaddexp(own_B, others_B) - own_B


def supervised_contrastive(
  z1_BP: Array, z2_BP: Array, label_B: Array, *, temperature: float, block: int = 0
) -> Array:
  """SupCon: every view of the same class is a positive (Khosla et al. 2020, equation 2, L_out).

  As the official HobbitLong/SupContrast losses.py with temperature equal to the base
  temperature. An image whose label is -1 (unknown) has its other view as its only positive.

  Returns:
    float32 [B], the mean over the two views of each image.
  """
  z_NP = _side_by_side(z1_BP, z2_BP)
  b = z1_BP.shape[0]
  # Unknown labels become classes of their own.
  class_B = jnp.where(label_B < 0, -1 - jnp.arange(b), label_B)
  class_N = jnp.repeat(class_B, 2)

  def positive(i, j):  # columns beyond the last are padding of the last block
    return (class_N[i] == class_N[j % (2 * b)]) & (i != j)

  lse_N, own_N = contrast(
    z_NP,
    z_NP,
    temperature=temperature,
    positive=positive,
    skip=lambda i, j: i == j,
    block=block,
  )
  return jnp.mean((lse_N - own_N).reshape(-1, 2), axis=1)


def contrast(
  q_BP: Array,
  k_NP: Array,
  *,
  temperature: float,
  positive: Pairs | None = None,
  skip: Pairs | None = None,
  block: int = 0,
) -> tuple[Array, Array]:
  """Both halves of a cross-entropy over keys, in one pass over blocks of them.

  Args:
    q_BP, k_NP: of unit length.
    positive: which pairs are the ones to find; at least one for each row. None: nothing is.
    skip: which pairs are left out of the sum. None: none.
    block: keys at a time; 0: all.

  Returns:
    float32 [B]: log sum_j exp(q_i k_j / temperature) over the pairs not skipped; and the mean of
    q_i k_j / temperature over the positive pairs.
  """
  b, (n, p) = q_BP.shape[0], k_NP.shape
  block = min(block, n) or n
  count = -(-n // block)
  k_KMP = jnp.pad(k_NP, ((0, count * block - n), (0, 0))).reshape(count, block, p)
  row_B1, column_1M = jnp.arange(b)[:, None], jnp.arange(block)[None, :]

  def add(carry, start_and_keys):
    high_B, sum_B, own_B, num_B = carry
    start, k_MP = start_and_keys
    j_1M = start + column_1M
    logits_BM = exact_matmul(q_BP, k_MP.T) / temperature
    out_BM = jnp.broadcast_to(j_1M >= n, logits_BM.shape)
    # From the same product as the rest: accelerators round it, and lse - own must stay >= 0.
    if positive:
      own_BM = positive(row_B1, j_1M) & ~out_BM
      own_B += jnp.sum(jnp.where(own_BM, logits_BM, 0), axis=1)
      num_B += jnp.sum(own_BM, axis=1)
    if skip:
      out_BM |= skip(row_B1, j_1M)
    logits_BM = jnp.where(out_BM, LOW, logits_BM)
    top_B = jnp.maximum(high_B, jax.lax.stop_gradient(jnp.max(logits_BM, axis=1)))
    sum_B = sum_B * jnp.exp(high_B - top_B) + jnp.sum(jnp.exp(logits_BM - top_B[:, None]), axis=1)
    return (top_B, sum_B, own_B, num_B), None

  zeros_B = jnp.zeros(b, jnp.float32)
  carry = (zeros_B + LOW, zeros_B, zeros_B, zeros_B)
  if count == 1:
    carry, _ = add(carry, (0, k_KMP[0]))
  else:
    carry, _ = jax.lax.scan(jax.checkpoint(add), carry, (jnp.arange(count) * block, k_KMP))
  high_B, sum_B, own_B, num_B = carry
  return high_B + jnp.log(sum_B), own_B / jnp.maximum(num_B, 1)
