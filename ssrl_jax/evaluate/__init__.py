"""Protocols that measure frozen features, one a file: `run(evaluation, **options) -> figures`.

To add one: write its file, add its `run` to EVALS. The names of its figures begin with its own
("knn/accuracy"), and its keyword arguments are the knobs of the config group of that name.
"""

from __future__ import annotations

from collections.abc import Callable

from ssrl_jax.config import nearest
from ssrl_jax.evaluate import knn, linear

EVALS: dict[str, Callable[..., dict[str, float]]] = {"knn": knn.run, "linear": linear.run}


def select(names: str) -> dict[str, Callable[..., dict[str, float]]]:
  """ "knn,linear" -> {name: run}, in that order; empty: none.

  Raises:
    ValueError: an unknown name.
  """
  chosen = [name.strip() for name in names.split(",") if name.strip()]
  for name in chosen:
    if name not in EVALS:
      raise ValueError(nearest(name, EVALS, "evaluation"))
  return {name: EVALS[name] for name in chosen}
