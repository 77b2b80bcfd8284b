"""Early stopping: whether a figure of the evaluations while training still gets better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ssrl_jax import parallel


class EarlyStop:
  """Remembers a figure of which more is better, as metrics.jsonl has it.

  With many processes all must ask at the same steps: they do what process 0's figures say.
  """

  def __init__(self, figure: str, patience: int, records: Sequence[Mapping[str, float]]):
    """patience: evaluations without a new best; 0: never stops. records: those until now."""
    self._figure, self._patience = figure, patience
    self._values = [r[figure] for r in records if figure in r]

  def add(self, figures: Mapping[str, float]) -> None:
    if not self._patience:
      return
    if self._figure not in figures:
      raise ValueError(
        f"evaluate.during.figure is {self._figure!r}, of which patience is to judge, and the "
        f"evaluations give {', '.join(figures)}"
      )
    self._values.append(figures[self._figure])

  def reason(self) -> str | None:
    """Why the run ends here, in a line; None: it goes on. Of equal figures the first is best."""
    if not self._patience:
      return None
    since = len(self._values) - 1 - int(np.argmax(self._values)) if self._values else 0
    since = int(parallel.all_processes(np.array([since]))[0])
    if since < self._patience:
      return None
    return f"{self._figure} had no new best in {since} evaluations (evaluate.during.patience)"
