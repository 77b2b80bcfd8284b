"""Hybrid: a weighted sum of other methods' losses over the same views and one shared encoder.

  c.method.terms = ("simclr", "mae")
  c.method.weights = (1.0, 0.5)
  c.method.options = {"simclr": {"temperature": 0.2}, "mae": {"mask_ratio": 0.6}}

Each term keeps heads, targets, queues and centres of its own; the encoder's parameters and batch
statistics are one, the terms following each other. The first term decides what is evaluated, and
gives the features of the online probe and the embeddings of the health figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ssrl_jax.method import Encoder, Method, Run, ViewSpec
from ssrl_jax.options import check_numbers, keyword_defaults, nearest

DEFAULTS: Mapping[str, Any] = {}


def make(
  *,
  encoder: nn.Module,
  views: tuple[ViewSpec, ...],
  run: Run,
  terms: tuple[str, ...] = ("simclr", "vicreg"),
  weights: tuple[float, ...] = (1.0, 0.1),
  options: Mapping[str, Any] = DEFAULTS,
) -> Method:
  """The Method of a weighted sum.

  Args:
    encoder, views: must suit every term.
    run: passed on.
    terms: names of two or more different methods.
    weights: of their losses, positive.
    options: {term: {option: value}}; what is left out has the factory's default.
  """
  methods = make_terms(terms, weights, options, encoder=encoder, views=views, run=run)

  def init(key, views):
    # One key: the encoder starts the same in every term, and so do the targets that copy it.
    both = {name: method.init(key, views) for name, method in methods.items()}
    params, state = {"encoder": {}}, {"batch_stats": {"encoder": {}}}
    for name, (own_params, own_state) in reversed(both.items()):
      params, state = put(params, state, name, own_params, own_state)
    return params, state

  def loss(params, method_state, views, key, step):
    total, metrics, first = 0.0, {}, None
    for weight, (name, method) in zip(weights, methods.items()):
      value, aux = method.loss(*take(params, method_state, name), views, key, step)
      _, method_state = put(params, method_state, name, {"encoder": {}}, aux.method_state)
      total += weight * value
      metrics |= {name: value} | {f"{name}_{k}": v for k, v in aux.metrics.items()}
      first = first or aux
    return total, first._replace(method_state=method_state, metrics=metrics)

  def after_update(params, method_state, step):
    for name, method in methods.items():
      own = method.after_update(*take(params, method_state, name), step)
      params, method_state = put(params, method_state, name, *own)
    return params, method_state

  def encoder_weights(params, method_state):
    name, method = next(iter(methods.items()))
    return method.encoder.weights(*take(params, method_state, name))

  constant = tuple(f"{name}/{lr}" for name, m in methods.items() for lr in m.constant_lr)
  # The encoder is every term's.
  frozen = {
    path if path.startswith("encoder/") else f"{name}/{path}": steps
    for name, m in methods.items()
    for path, steps in m.frozen.items()
  }
  first = next(iter(methods.values()))
  judged = Encoder(encoder_weights, first.encoder.apply)
  seen = tuple(dict.fromkeys(spec for m in methods.values() for spec in m.views))
  return Method(seen, init, loss, after_update, judged, constant, first.unit_variance, frozen)


def make_terms(terms, weights, options, **arguments) -> dict[str, Method]:
  from ssrl_jax.methods import METHODS  # here: this module is one of them

  if len(terms) < 2 or len(set(terms)) < len(terms) or len(weights) != len(terms):
    raise ValueError(
      f"hybrid: terms {tuple(terms)} and weights {tuple(weights)}; expected two or more different "
      "methods and a weight for each"
    )
  if min(weights) <= 0:
    raise ValueError(f"hybrid: weights are {tuple(weights)}; they must be positive")
  for name in terms:
    if name not in METHODS or name == "hybrid":
      raise ValueError(f"hybrid: {nearest(name, [m for m in METHODS if m != 'hybrid'], 'term')}")
  for name in options.keys() - set(terms):
    raise ValueError(
      f"hybrid: method.options has options of {name!r}, which is not among the terms "
      f"{', '.join(terms)}; give those of the terms, or none: --config.method.options='{{}}'"
    )
  for name, own in options.items():
    known = keyword_defaults(METHODS[name])
    unknown = [key for key in own if key not in known]
    if unknown:
      raise ValueError(f"hybrid: {nearest(unknown[0], known, f'option of {name}')}")
    check_numbers(f"hybrid: {name}.", own, known)
  return {name: METHODS[name](**arguments, **options.get(name, {})) for name in terms}


def take(params, method_state, name):
  """A term's parameters and state as the method itself lays them out."""
  stats = method_state["batch_stats"]
  own_params = {"encoder": params["encoder"], **params[name]}
  own_stats = {"encoder": stats["encoder"], **stats[name]}
  return own_params, {"batch_stats": own_stats, **method_state[name]}


def put(params, method_state, name, own_params, own_state):
  """The inverse of `take`; of the encoder, what a term does not have is kept."""
  own_state, stats = dict(own_state), method_state["batch_stats"]
  own_stats = dict(own_state.pop("batch_stats"))
  own_params = dict(own_params)
  params = params | {
    "encoder": {**params["encoder"], **own_params.pop("encoder")},
    name: own_params or params.get(name, {}),
  }
  stats = stats | {
    "encoder": {**stats["encoder"], **own_stats.pop("encoder", {})},
    name: own_stats,
  }
  return params, method_state | {"batch_stats": stats, name: own_state}
