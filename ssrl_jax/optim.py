"""Learning-rate schedule, LARS, AdamW, SGD, and which parameters they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from ssrl_jax.state import named_leaves

OPTIMIZERS = ("adamw", "lars", "sgd")


def warmup_cosine(
  *, peak: float, warmup_steps: int, total_steps: int, final_fraction: float
) -> Callable[[Any], Any]:
  """Linear from 0 to `peak` over the warm-up, then half a cosine to `final_fraction * peak`."""
  if not 0 <= warmup_steps < max(total_steps, 1):
    raise ValueError(
      f"warm-up of {warmup_steps} steps does not fit into {total_steps} steps; lower "
      "optim.warmup_epochs or raise epochs"
    )
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup_steps else peak,
    peak_value=peak,
    warmup_steps=warmup_steps,
    decay_steps=total_steps,
    end_value=peak * final_fraction,
  )


def decay_mask(params: Any) -> Any:
  """True for arrays of two or more axes; biases and the weights of norms are left alone.

  SimCLR, BYOL, Barlow Twins and VICReg exclude these from weight decay and from LARS' adaptation
  alike. (SwAV's LARC excludes nothing.)
  """
  return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(
  *,
  name: str,
  learning_rate: float,
  scale_by_batch: bool,
  warmup_epochs: float,
  final_fraction: float,
  weight_decay: float,
  momentum: float,
  b1: float,
  b2: float,
  trust_coefficient: float,
  clip_norm: float,
  batch_size: int,
  steps_per_epoch: int,
  total_steps: int,
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
  """The update rule and its learning rate as a function of the step.

  Args:
    name: "adamw" (decoupled decay, times the learning rate), "sgd" (Nesterov off, decay added to
      the gradient) or "lars" (You et al. 2017, learning rate inside the momentum as in SimCLR's
      code; BYOL and Barlow Twins have it outside, apex's LARC clips).
    learning_rate: at the peak; for batch 256 if `scale_by_batch`, which scales it linearly.
    warmup_epochs, final_fraction: see `warmup_cosine`.
    weight_decay: on arrays of two or more axes only (`decay_mask`).
    momentum: of sgd and lars. b1, b2: of adamw. trust_coefficient: of lars.
    clip_norm: global gradient norm is cut to this first; 0 = off.
  """
  if name not in OPTIMIZERS:
    raise ValueError(f"unknown optim.name {name!r}; one of {', '.join(OPTIMIZERS)}")
  schedule = warmup_cosine(
    peak=learning_rate * (batch_size / 256 if scale_by_batch else 1),
    warmup_steps=round(warmup_epochs * steps_per_epoch),
    total_steps=total_steps,
    final_fraction=final_fraction,
  )
  if name == "adamw":
    rule = optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=decay_mask)
  elif name == "sgd":
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    rule = optax.chain(decay, optax.sgd(schedule, momentum))
  else:
    rule = optax.lars(
      schedule,
      weight_decay=weight_decay,
      weight_decay_mask=decay_mask,
      trust_coefficient=trust_coefficient,
      trust_ratio_mask=decay_mask,
      momentum=momentum,
    )
  if clip_norm > 0:
    rule = optax.chain(optax.clip_by_global_norm(clip_norm), rule)
  return rule, schedule


def describe_groups(params: Any) -> str:
  """Two lines: what is decayed (and adapted by LARS), and what is left alone."""
  groups: dict[bool, list[tuple[str, Any]]] = {True: [], False: []}
  for name, p in named_leaves(params):
    groups[p.ndim > 1].append((name, p))

  def line(title, group):
    kinds = sorted({name.rsplit("/", 1)[-1] for name, _ in group})
    count = sum(p.size for _, p in group)
    return f"{title}: {len(group)} arrays, {count:,} parameters ({', '.join(kinds)})"

  return "\n".join([line("weight decay", groups[True]), line("no weight decay", groups[False])])
