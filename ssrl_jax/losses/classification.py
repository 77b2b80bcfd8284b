"""Losses of a classifier, among them two that tolerate wrong labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from ssrl_jax.method import Array

LOSSES = ("cross_entropy", "generalised", "symmetric")


def cross_entropy(logits_BK: Array, label_B: Array, *, smoothing: float = 0.0) -> Array:
  """-sum_k t_k log p_k, where t gives the label 1 - smoothing and all K classes smoothing / K.

  Szegedy et al. 2016, section 7. Labels are 0 or more: -1, unknown, is not masked here.

  Returns:
    float32 [B], in [0, inf).
  """
  target_BK = jax.nn.one_hot(label_B, logits_BK.shape[-1])
  target_BK = optax.smooth_labels(target_BK, smoothing)
  return optax.softmax_cross_entropy(logits_BK.astype(jnp.float32), target_BK)


def generalised_cross_entropy(logits_BK: Array, label_B: Array, *, q: float) -> Array:
  """(1 - p_label^q) / q: cross-entropy as q goes to 0, half the mean absolute error at q = 1.

  Zhang & Sabuncu 2018, whose value is 0.7; without their truncation. Labels are 0 or more.

  Args:
    q: in (0, 1]; the larger, the less a label that looks wrong pulls.

  Returns:
    float32 [B], in [0, 1 / q].
  """
  if not 0 < q <= 1:
    raise ValueError(f"q is {q}; it must be above 0 and at most 1, e.g. 0.7")
  return -jnp.expm1(q * _log_probability(logits_BK, label_B)) / q  # p^q - 1, precise near q = 0


def symmetric_cross_entropy(
  logits_BK: Array, label_B: Array, *, alpha: float, beta: float, log_zero: float
) -> Array:
  """alpha * cross-entropy(label, p) + beta * cross-entropy(p, label).

  Wang et al. 2019. The second term takes the logarithm of a one-hot label, 0 for
  the class and `log_zero` for the others, so it is -log_zero * (1 - p_label): bounded, tolerant.
  Labels are 0 or more.

  Args:
    alpha, beta: 0 or more; the paper has 0.1 and 1 for CIFAR-10, 6 and 0.1 for CIFAR-100.
    log_zero: below 0; the paper's A.

  Returns:
    float32 [B], in [0, inf).
  """
  if min(alpha, beta) < 0 or alpha + beta == 0 or log_zero >= 0:
    raise ValueError(
      f"alpha is {alpha}, beta {beta}, log_zero {log_zero}; expected alpha and beta of 0 or more, "
      "not both 0, and log_zero below 0, e.g. 0.1, 1 and -4"
    )
  log_p_B = _log_probability(logits_BK, label_B)
  return -alpha * log_p_B + beta * log_zero * jnp.expm1(log_p_B)


def _log_probability(logits_BK: Array, label_B: Array) -> Array:
  """Of each row's label, float32 [B]."""
  log_p_BK = jax.nn.log_softmax(logits_BK.astype(jnp.float32))
  return jnp.take_along_axis(log_p_BK, label_B[:, None], axis=1)[:, 0]
