"""The evaluations of one run: of the trained encoder, and of the controls it must beat."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from ssrl_jax import parallel
from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.data.sources import Source, check_same_classes
from ssrl_jax.evaluate import EVALS, Protocol
from ssrl_jax.evaluate.features import Evaluation, raw_pixels
from ssrl_jax.experiment import Experiment, abstract_state, build, create_state, open_split
from ssrl_jax.options import check_numbers, keyword_defaults, nearest
from ssrl_jax.run_folder import Facts, load_config, read_facts
from ssrl_jax.state import TrainState

Results = dict[str, dict[str, float]]  # {"trained": {"knn/accuracy": percent, ...}, ...}

DEFAULT_TEST = "test"  # split, if a recipe names no other
TITLES = {
  "trained": "trained encoder",
  "random_init": "same encoder, random initialisation",
  "raw_pixels": "raw pixels",
}


def select(names: str) -> dict[str, Protocol]:
  """ "knn,linear" -> {name: protocol}, in that order; empty: none.

  Raises:
    ValueError: an unknown name.
  """
  chosen = [name.strip() for name in names.split(",") if name.strip()]
  for name in chosen:
    if name not in EVALS:
      raise ValueError(nearest(name, EVALS, "evaluation"))
  return {name: EVALS[name] for name in chosen}


class Evaluated(NamedTuple):
  results: Results
  evaluation: Evaluation | None  # of the trained encoder; None where nothing could be evaluated
  refused: dict[str, Exception]  # by a protocol, of the pictures or of its options

  def check(self) -> None:
    """Raises ValueError if a protocol refused; for when the figures of the others are kept."""
    if self.refused:
      text = "; ".join(f"{name} could not be run: {error}" for name, error in self.refused.items())
      raise ValueError(text) from next(iter(self.refused.values()))


class Loaded(NamedTuple):
  experiment: Experiment
  state: TrainState


def load_run(folder: Path, *, mesh: ConfigDict | None = None, step: int | None = None) -> Loaded:
  """A checkpoint of a run, and what its config makes; its pictures are not needed.

  Args:
    mesh: a config group for the devices that are here; None: the run's.
    step: whose; None: the newest that is whole.

  Raises:
    FileNotFoundError: there is none yet, or none of this step.
  """
  config, facts = load_config(folder), read_facts(folder)
  if mesh is not None:
    config.mesh = mesh
  if facts is None:
    train = open_split(config, "train")
    facts = Facts(len(train), train.num_classes)
  try:
    experiment = build(config, **facts._asdict())
  except parallel.Indivisible as error:
    raise ValueError(
      f"{folder} was trained with a {error}. Load it on a number of devices that divides it: "
      "--mesh.devices=N, of ssrl_jax.extract --devices=N"
    ) from error
  checkpoints = Checkpoints(folder, keep=1, keep_best=0, read_only=True)
  if step is not None and step not in checkpoints.steps():
    there = ", ".join(map(str, checkpoints.steps())) or "none"
    raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; it has: {there}")
  state = checkpoints.restore(abstract_state(experiment), at_most=step)
  if state is None:
    gone = "no checkpoint any more" if (folder / "results.json").exists() else "none yet"
    raise FileNotFoundError(f"{folder} has no complete checkpoint: {gone}")
  if step not in (None, int(state.step)):
    raise ValueError(f"the checkpoint of step {step} in {folder} is damaged")
  return Loaded(experiment, state)


def open_test(experiment: Experiment, train: Source, evals: str) -> Source | None:
  """The test pictures, or None, and a warning where a protocol of `evals` misses something.

  Called before training, so that nobody waits for hours to read that there is nothing to measure.

  Raises:
    ValueError: what cannot be had was asked for by name: a split that is no default, a protocol
      that brings its own pictures and was told of none.
    FileNotFoundError: an option names a file or folder that is not there.
  """
  config, chosen = experiment.config, asked(evals, experiment.config)
  if chosen and config.evaluate.size > config.data.canvas:
    logging.warning(
      "pictures are kept at %d px (data.canvas), and shown to the encoder enlarged to %d "
      "(evaluate.size): a larger canvas shows more", config.data.canvas, config.evaluate.size,
    )  # fmt: skip
  for name, protocol in chosen.items():
    options, defaults = config.evaluate[name], keyword_defaults(protocol.run)
    if protocol.needs == "nothing" and options.get("source") == "":
      raise ValueError(f"{name} needs pictures of its own: set evaluate.{name}.source")
    for option in (key for key, default in defaults.items() if default == ""):  # files and folders
      path = options[option].partition(":")[2] if option == "source" else options[option]
      if path and not Path(path).expanduser().exists():
        raise FileNotFoundError(f"evaluate.{name}.{option} names {path}, which is not there")
    whole = {key: default for key, default in defaults.items() if type(default) is int}
    check_numbers(f"evaluate.{name}.", options, whole)
    if options.get("seed", 0) >= 2**32:
      raise ValueError(f"evaluate.{name}.seed is {options.seed}; expected less than 2^32")
  labelled = [name for name, p in chosen.items() if p.needs == "labels"]
  if labelled and not train.num_classes:
    logging.warning("%r has no labels: %s will not be run", train, ", ".join(labelled))
  if chosen and not (config.evaluate.size >= 1 and 0 < config.evaluate.crop <= 1):
    raise ValueError(
      f"evaluate.size is {config.evaluate.size} and evaluate.crop {config.evaluate.crop}; expected "
      "at least 1 pixel, and a share of the picture above 0 and at most 1"
    )
  if not [n for n, p in chosen.items() if p.needs != "nothing" and runs(p, train, True)]:
    return None
  try:
    parallel.check_batch_size(config.evaluate.batch_size, experiment.mesh)
  except ValueError as error:
    raise ValueError(f"evaluate.{error}") from error
  try:
    test = open_split(config, "test")
  except (ValueError, FileNotFoundError) as error:
    fix = "name another split by data.test, or judge nothing by evaluate.evals=''"
    if config.data.test != DEFAULT_TEST:
      raise ValueError(f"no test pictures ({error}): {fix}") from error
    logging.warning("no test pictures (%s), so the encoder is not judged: %s", error, fix)
    return None
  if train.num_classes:
    check_same_classes(train, test)
  return test


def asked(evals: str, config: ConfigDict) -> dict[str, Protocol]:
  """`select`; one that needs but pictures, and is told of its own, needs nothing of the run's."""
  return {
    name: p._replace(needs="nothing")
    if p.needs == "test" and config.evaluate[name].get("source")
    else p
    for name, p in select(evals).items()
  }


def runs(protocol: Protocol, train: Source, has_test: bool) -> bool:
  """Whether the run's pictures have what a protocol needs."""
  if protocol.needs == "nothing":
    return True
  return has_test and (protocol.needs == "test" or bool(train.num_classes))


def trained_evaluation(
  experiment: Experiment,
  state: TrainState,
  train: Source,
  test: Source,
  folder: Path | None = None,
) -> Evaluation:
  """How the run's encoder is judged: on these pictures, as the config says."""
  config, method = experiment.config, experiment.method

  return Evaluation(
    apply=method.encoder.apply,
    weights=method.encoder.weights(state.params, state.method_state),
    train=train,
    test=test,
    num_classes=train.num_classes,
    mesh=experiment.mesh,
    canvas=config.data.canvas,
    size=config.evaluate.size,
    crop=config.evaluate.crop,
    mean=config.data.mean,
    std=config.data.std,
    batch_size=config.evaluate.batch_size,
    workers=config.data.workers,
    threads=config.data.threads,
    folder=folder,
  )


def evaluate_run(
  experiment: Experiment,
  state: TrainState,
  train: Source,
  test: Source | None,
  *,
  evals: str,
  say: Callable[[str], None],
  folder: Path | None = None,
  other: Loaded | None = None,
  encoders: Sequence[str] = (),
  keep: Callable[[Results], None] = lambda results: None,
  moved: Callable[[], None] = lambda: None,
) -> Evaluated:
  """Runs `evals` ("knn,linear") on the trained encoder and on controls.

  Args:
    experiment: `experiment.config` says which pictures and how, so it may differ from the run's in
      the groups data and evaluate.
    encoders: keys of TITLES; empty: all, or by config the trained one alone.
    keep: is given the figures of each protocol, by encoder, as soon as they are there.
    moved: is called at each batch, as the watchdog wants it.

  Protocols that write pictures and tables put them into a subfolder of `folder` for each encoder.
  What one protocol refuses costs no figure of another: see `Evaluated.check`.
  """
  config = experiment.config
  chosen = {n: p for n, p in asked(evals, config).items() if runs(p, train, test is not None)}
  if not chosen:
    return Evaluated({}, None, {})
  trained = trained_evaluation(experiment, state, train, test, folder)
  trained = dataclasses.replace(trained, moved=moved)
  if other:
    second = trained_evaluation(other.experiment, other.state, train, test)
    trained = dataclasses.replace(trained, other=dataclasses.replace(second, moved=moved))
  encoders = encoders or tuple(TITLES)[: None if experiment.config.evaluate.controls else 1]
  results: Results = {}
  refused: dict[str, Exception] = {}
  for name in encoders:
    start, figures = time.perf_counter(), {}
    evaluation = dataclasses.replace(
      control(name, trained, experiment), folder=folder and folder / name
    )
    for key, protocol in chosen.items():
      if key in refused or (name == "raw_pixels" and not protocol.pixels):
        continue
      try:
        found = protocol.run(evaluation, **experiment.config.evaluate[key])
      except (ValueError, FloatingPointError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and jax.process_count() > 1:
          raise  # of one host, perhaps; the others are alike in all processes
        refused[key] = error
        continue
      figures |= found
      keep({name: found})
    if figures:
      results[name] = figures
      say(f"evaluated {TITLES[name]} in {time.perf_counter() - start:.1f} s")
  return Evaluated(results, trained if test is not None else None, refused)


def check_encoders(text: str) -> tuple[str, ...]:
  """ "trained,random_init" -> its names. Raises ValueError if one is none of TITLES."""
  names = tuple(filter(None, text.split(",")))
  for name in names:
    if name not in TITLES:
      raise ValueError(nearest(name, TITLES, "encoder"))
  return names


def control(name: str, trained: Evaluation, experiment: Experiment) -> Evaluation:
  """The judgement of the encoder `name`, a key of TITLES."""
  if name == "raw_pixels":
    return trained.with_encoder(raw_pixels, ())
  if name == "random_init":
    state = create_state(experiment)
    weights = experiment.method.encoder.weights(state.params, state.method_state)
    return trained.with_encoder(trained.apply, weights)
  return trained


def results_table(results: Results) -> str:
  """The main figures as a text table, a row for each encoder."""
  if not results:
    return "no evaluation was run"
  found = dict.fromkeys(figure for row in results.values() for figure in row)
  columns = {}
  for name, protocol in EVALS.items():
    own = {key: title for key, title in protocol.columns.items() if key in found}
    if not own:  # of other settings than its columns are for: its accuracies, or what there is
      keys = [key for key in found if key.split("/")[0] == name]
      keys = [key for key in keys if key.endswith("/accuracy")] or keys
      own = {key: key.removesuffix("/accuracy") for key in keys}
    columns |= own
  width = max(len(t) for t in TITLES.values())
  wide = {key: max(12, len(title) + 2) for key, title in columns.items()}
  lines = ["".join([" " * width, *(f"{title:>{wide[key]}}" for key, title in columns.items())])]
  for name, row in results.items():
    cells = [f"{row[k]:{n}.1f}" if k in row else f"{'not run':>{n}}" for k, n in wide.items()]
    lines.append(f"{TITLES[name]:<{width}}" + "".join(cells))
  return "\n".join(lines)
