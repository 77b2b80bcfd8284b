"""Learning-rate schedule, LARS, AdamW, SGD, and which parameters they leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssrl_jax.state import named_leaves

OPTIMIZERS = ("adamw", "larc", "lars", "sgd")
OPTIONS_OF = {  # options that not all have, and who has them
  "momentum": ("larc", "lars", "sgd"),
  "b1": ("adamw",),
  "b2": ("adamw",),
  "trust_coefficient": ("larc", "lars"),
  "clip_ratio": ("larc",),
}


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
  alike. (Who excludes less: docs/methods.md, "Which views, heads and optimizer".)
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
  clip_ratio: bool,
  final_weight_decay: float,
  clip_norm: float,
  clip_each: bool,
  batch_size: int,
  steps_per_epoch: int,
  total_steps: int,
  constant_lr: tuple[str, ...] = (),
  frozen: Mapping[str, float] = MappingProxyType({}),
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
  """The update rule and its learning rate as a function of the step.

  Args:
    name: "adamw" (decoupled decay, times the learning rate), "sgd" (Nesterov off, decay added to
      the gradient), "lars" (You et al. 2017, learning rate inside the momentum as in SimCLR's
      code) or "larc" (learning rate outside it; see `larc`). "LARS" means four different rules in
      the field: SimCLR's; BYOL's and Barlow Twins' (larc); SwAV's, apex's LARC without clipping
      (larc, but excluding no parameter); solo-learn's (larc with clip_ratio).
    learning_rate: at the peak; for batch 256 if `scale_by_batch`, which scales it linearly.
    warmup_epochs, final_fraction: see `warmup_cosine`.
    weight_decay: on arrays of two or more axes only (`decay_mask`).
    final_weight_decay: >= 0: from weight_decay to this as half a cosine (DINO, I-JEPA; adamw only).
    momentum: of sgd, lars and larc. b1, b2: of adamw. trust_coefficient: of lars and larc.
    clip_ratio: of larc.
    clip_norm: the gradient's norm is cut to this first; 0 = off.
    clip_each: not the norm over all arrays, but of each array by itself (DINO).
    constant_lr: paths in params, from the top, whose learning rate stays at its peak (SimSiam).
    frozen: {path: steps} what stays as it is, decay and moments included, for so many steps
      (SwAV, DINO) or for ever (inf, MoCo v3), as where PyTorch has no gradient.
  """
  if name not in OPTIMIZERS:
    raise ValueError(f"unknown optim.name {name!r}; one of {', '.join(OPTIMIZERS)}")
  for option, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
    if not 0 <= value < math.inf:
      raise ValueError(f"{option} is {value}; expected 0 or more")
  for option, value in {"momentum": momentum, "b1": b1, "b2": b2}.items():
    if not 0 <= value < 1:
      raise ValueError(f"{option} is {value}; expected at least 0 and below 1")
  peak = learning_rate * (batch_size / 256 if scale_by_batch else 1)
  schedule = warmup_cosine(
    peak=peak,
    warmup_steps=round(warmup_epochs * steps_per_epoch),
    total_steps=total_steps,
    final_fraction=final_fraction,
  )
  decay: Any = weight_decay
  if final_weight_decay >= 0:
    if name != "adamw":
      raise ValueError(
        f"final_weight_decay is for adamw only, but optim.name is {name}; set it to -1"
      )
    decay = cosine(weight_decay, final_weight_decay, total_steps)

  def update_rule(learning_rate, decay):
    if name == "adamw":
      return optax.chain(
        optax.scale_by_adam(b1, b2),
        optax.add_decayed_weights(decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
      )
    if name == "sgd":
      decayed = optax.add_decayed_weights(weight_decay, mask=decay_mask)
      return optax.chain(decayed, optax.sgd(learning_rate, momentum))
    if name == "larc":
      return larc(
        learning_rate,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        clip_ratio=clip_ratio,
        momentum=momentum,
      )
    return optax.lars(
      learning_rate,
      weight_decay=weight_decay,
      weight_decay_mask=decay_mask,
      trust_coefficient=trust_coefficient,
      trust_ratio_mask=decay_mask,
      momentum=momentum,
    )

  rule = by_path(update_rule, schedule, decay, peak=peak, constant_lr=constant_lr, frozen=frozen)
  if clip_norm > 0:
    clip = clip_by_each_norm if clip_each else optax.clip_by_global_norm
    rule = clipped(rule, clip(clip_norm))
  return rule, schedule


def by_path(
  update_rule: Callable[[Any, Any], optax.GradientTransformation],
  schedule: Callable[[Any], Any],
  decay: Any,
  *,
  peak: float,
  constant_lr: tuple[str, ...],
  frozen: Mapping[str, float],
) -> optax.GradientTransformation:
  """update_rule(rate, decay), and what is otherwise under some paths: see `make_optimizer`."""
  rule = update_rule(schedule, decay)
  labels = dict.fromkeys(constant_lr, "constant") | {
    path: "frozen" if math.isinf(steps) else f"frozen {int(steps)}"
    for path, steps in frozen.items()
    if steps > 0
  }
  if not labels:
    return rule
  rules = {"scheduled": rule, "constant": update_rule(peak, decay), "frozen": optax.set_to_zero()}
  for steps in {int(n) for n in frozen.values() if 0 < n < math.inf}:
    late = [later(x, steps) if callable(x) else x for x in (schedule, decay)]
    rules[f"frozen {steps}"] = starting_at(update_rule(*late), steps)
  return optax.multi_transform(rules, lambda params: under_paths(params, labels, "scheduled"))


def clipped(
  rule: optax.GradientTransformation, clip: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`rule` of what `clip`, which has no state, leaves; its state is `rule`'s: a run may change."""

  def update(gradients, state, params):
    return rule.update(clip.update(gradients, optax.EmptyState())[0], state, params)

  return optax.GradientTransformation(rule.init, update)


def later(schedule: Callable[[Any], Any], steps: int) -> Callable[[Any], Any]:
  """The schedule for who counts from step `steps` on."""
  return lambda count: schedule(count + steps)


def starting_at(rule: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
  """No update before step `steps`, where `rule` begins with its own step 0."""

  def init(params):
    return jnp.zeros((), jnp.int32), rule.init(params)

  def update(gradients, state, params):
    count, inner = state
    updates, after = rule.update(gradients, inner, params)
    still = lambda new, old: jnp.where(count < steps, old, new)  # noqa: E731
    updates = jax.tree.map(lambda u: still(u, jnp.zeros_like(u)), updates)
    return updates, (count + 1, jax.tree.map(still, after, inner))

  return optax.GradientTransformation(init, update)


def clip_by_each_norm(limit: float) -> optax.GradientTransformation:
  """Each array by itself is cut to this norm."""
  cut = lambda g: g * jnp.minimum(1, limit / (jnp.linalg.norm(g) + 1e-6))  # noqa: E731
  return optax.stateless(lambda gradients, params: jax.tree.map(cut, gradients))


def larc(
  learning_rate: Any,
  *,
  weight_decay: float,
  trust_coefficient: float,
  clip_ratio: bool,
  momentum: float,
) -> optax.GradientTransformation:
  """Layer-wise rates, then SGD with momentum: v = momentum v + ratio (g + decay p); p -= rate v.

  ratio = trust_coefficient |p| / (|g + decay p| + 1e-8), or 1 where either length is 0 and for
  arrays that `decay_mask` leaves alone. With `clip_ratio` it is at most the learning rate's worth:
  min(ratio / rate, 1), so that no layer moves faster than plain SGD (apex LARC, solo-learn). Those
  two divide by |g| + decay |p| instead, which differs by the decay's small share.
  """

  def init(params):
    del params
    return jnp.zeros((), jnp.int32)

  def update(gradients, count, params):
    rate = learning_rate(count) if callable(learning_rate) else learning_rate

    def scaled(g, p, adapted):
      if not adapted:
        return g
      g = g + weight_decay * p
      length, size = jnp.linalg.norm(p), jnp.linalg.norm(g)
      ratio = trust_coefficient * length / (size + 1e-8)
      if clip_ratio:
        ratio = jnp.minimum(ratio / jnp.maximum(rate, 1e-12), 1)
      return g * jnp.where((length > 0) & (size > 0), ratio, 1)

    return jax.tree.map(scaled, gradients, params, decay_mask(params)), count + 1

  adapt = optax.GradientTransformation(init, update)
  return optax.chain(adapt, optax.sgd(learning_rate, momentum))


def cosine(start: float, end: float, total_steps: int) -> Callable[[Any], Any]:
  """Half a cosine from `start` to `end`."""
  return lambda step: end + (start - end) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2


def under_paths(params: Any, marks: Mapping[str, Any], otherwise: Any) -> Any:
  """Like `params`: of each array the mark of the path that it lies under."""

  def mark(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator="/") + "/"
    under = (value for path, value in marks.items() if name.startswith(f"{path}/"))
    return next(under, otherwise)

  return jax.tree_util.tree_map_with_path(mark, params)


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
