"""The one loop of every protocol that trains on pictures: fine-tuning, linear, dense heads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ssrl_jax import parallel
from ssrl_jax.method import Array

CHECK_EVERY = 50  # steps between two looks at the loss: each look waits for the device

# (params, stats, batch, key) -> scalar, stats after it; stats: batch statistics or ()
Loss = Callable[[Any, Any, dict[str, Array], Array], tuple[Array, Any]]


def fit(
  loss: Loss,
  params: Any,
  stats: Any,
  batches: Iterator[dict[str, np.ndarray]],
  *,
  optimizer: optax.GradientTransformation,
  num_steps: int,
  seed: int,
  mesh: Mesh,
  name: str,
  moved: Callable[[], None] = lambda: None,
) -> tuple[Any, Any]:
  """Trains `params` for `num_steps` batches; a pure function of its arguments.

  Args:
    loss: see `Loss`; its key is a new one each step.
    params, stats: arrays of any kind; neither is changed or donated.
    batches: this process's share of global batches, with "id" among their keys; closed at the end
      where that is possible.
    optimizer: of `params`; what must stay still is masked by it, or is no part of `params`.
    name: of the protocol, for the message when the loss diverges.
    moved: is called at each step: a sign of life.

  Returns:
    params and stats after the last step, replicated on the mesh.

  Raises:
    FloatingPointError: the loss is not finite; the step is named, to within CHECK_EVERY.
  """

  def step(carry, batch, key, number):
    params, stats, opt_state = carry
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
      params, stats, batch, jax.random.fold_in(key, number)
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats, opt_state), value

  whole = parallel.replicated(mesh)
  # Copies: the first step's donation must not take the caller's arrays.
  carry = jax.jit(lambda p, s: (p, s, optimizer.init(p)), out_shardings=whole)(params, stats)
  step = jax.jit(step, donate_argnums=0, out_shardings=whole)
  key, value = jax.random.key(seed), None
  closing = contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext()
  with closing:
    for number in range(num_steps):
      if number % CHECK_EVERY == 0 and value is not None:
        check_finite(value, name, number)
      batch = parallel.to_device(next(batches), mesh)
      carry, value = step(carry, batch, key, np.uint32(number))
      moved()
  check_finite(value, name, num_steps)
  return carry[0], carry[1]


def check_finite(value: Array, name: str, number: int) -> None:
  if not np.isfinite(value):
    raise FloatingPointError(
      f"{name}: the loss is {float(value)} after {number} steps; lower its learning rate"
    )
