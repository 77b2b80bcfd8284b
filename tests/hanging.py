"""`ssrl_jax.main` whose k-NN never ends: for the watchdog's test."""

import time

from ssrl_jax import evaluate, main


def cli(argv: list[str]) -> int:
  hang = lambda evaluation, **options: time.sleep(10_000)  # noqa: E731
  evaluate.EVALS["knn"] = evaluate.EVALS["knn"]._replace(run=hang)
  return main.cli(argv)
