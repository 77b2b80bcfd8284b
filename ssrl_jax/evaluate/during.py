"""Evaluation while training, and early stopping by its figures."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from ssrl_jax import parallel
from ssrl_jax.data.sources import Part, Source, Subset, labels_of
from ssrl_jax.evaluate.linear import split_held_out
from ssrl_jax.evaluate.suite import runs, select, trained_evaluation
from ssrl_jax.experiment import Experiment
from ssrl_jax.state import TrainState

HELD_OUT = 0.1  # of the training pictures, which early stopping judges

Moved = Callable[..., None]  # called at signs of life, as `processes.watchdog` has it
Evaluate = Callable[[TrainState, Moved], dict[str, float]]  # of `evaluate_during`


def evaluate_during(experiment: Experiment, train: Source, test: Source | None) -> Evaluate | None:
  """What judges a state while a run trains, as config.evaluate.during says; None: nothing does.

  It is given the state and what to call at signs of life, which may be rarer than a step's.
  Protocols that the pictures lack something for are left out, as by `evaluate_run`. With patience a
  tenth of the training pictures is judged by the others, else the test pictures are by all.

  Raises:
    ValueError: the options contradict each other.
  """
  config = experiment.config.evaluate
  options, chosen = config.during, select(config.during.evals)
  if min(options.every_steps, options.num_train, options.patience) < 0:
    raise ValueError("evaluate.during: every_steps, num_train and patience must be >= 0")
  if options.patience and not options.every_steps:
    raise ValueError(
      "evaluate.during.patience counts evaluations, and evaluate.during.every_steps is 0: set it"
    )
  chosen = {n: p for n, p in chosen.items() if runs(p, train, test is not None)}
  if not options.every_steps or not chosen:
    return None
  if options.patience and options.figure.split("/")[0] not in chosen:
    raise ValueError(
      f"evaluate.during.figure is {options.figure!r}, of which patience is to judge, and what is "
      f"evaluated is {', '.join(chosen)}"
    )
  bank = train
  if options.patience:  # what ends a run is a choice, and the test pictures choose nothing
    bank, test = held_out_parts(train, HELD_OUT)
  bank = Subset(bank, min(options.num_train, len(bank)), seed=0) if options.num_train else bank

  def judge(state: TrainState, moved: Moved) -> dict[str, float]:
    evaluation = trained_evaluation(experiment, state, bank, test)
    patient = functools.partial(moved, experiment.config.watchdog.evaluation_minutes)
    evaluation = dataclasses.replace(evaluation, moved=patient)
    return {k: v for n, p in chosen.items() for k, v in p.run(evaluation, **config[n]).items()}

  return judge


def held_out_parts(source: Source, share: float) -> tuple[Part, Part]:
  """What judges, and what is judged: this share of each class, or of all without labels."""
  labels = labels_of(source) if source.num_classes else np.zeros(len(source), np.int32)
  kept, held = split_held_out(labels, share, seed=0)
  return Part(source, kept), Part(source, held)


class Evaluations:
  """When a run evaluates what it has come to, once each however often it is resumed.

  Args:
    options: the config group evaluate.during.
    evaluate: None: nothing is evaluated.
    records: the lines of metrics.jsonl up to `step`.
    step: that the run goes on from.
    total: steps of the run.
  """

  def __init__(
    self,
    options: ConfigDict,
    evaluate: Evaluate | None,
    records: Sequence[Mapping[str, float]],
    *,
    step: int,
    total: int,
  ):
    self._evaluate = evaluate
    self.every = options.every_steps if evaluate else total
    self._early_stop = EarlyStop(options.figure, options.patience if evaluate else 0, records)
    # The checkpoint of a step comes before its evaluation, which may be missing.
    at_step = [r for r in records if r["step"] == step]
    missing = parallel.all_processes(np.array([all("loss" in r for r in at_step)]))
    self._made = step if step == 0 or not missing[0] else None

  def due(self, step: int) -> bool:
    return step % self.every == 0 and step != self._made

  def make(self, state: TrainState, moved: Moved) -> tuple[dict[str, float], float]:
    """The figures, and the seconds that they took."""
    start = time.perf_counter()
    figures = self._evaluate(state, moved)
    self._early_stop.add(figures)
    return figures, time.perf_counter() - start

  def reason(self) -> str | None:
    """Why the run ends here, in a line; None: it goes on."""
    return self._early_stop.reason()


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
