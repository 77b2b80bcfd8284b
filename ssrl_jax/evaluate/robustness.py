"""Robustness to common corruptions: a judge of clean features meets corrupted test pictures.

Hendrycks & Dietterich, ICLR 2019: 15 corruptions at 5 severities. The pictures are corrupted on the
device as they are judged (`ssrl_jax.corruptions` names where that departs from the published
sets), or read from the published ImageNet-C or CIFAR-10-C.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from ssrl_jax.corruptions import NAMES, NOISES, SEVERITIES, corrupt, table_for
from ssrl_jax.corruptions.levels import ALEXNET_ERROR
from ssrl_jax.data.folders import FolderSource
from ssrl_jax.data.sources import Source, check_same_classes
from ssrl_jax.evaluate import knn
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.evaluate.linear import fit_probe
from ssrl_jax.method import Array

Predict = Callable[[np.ndarray], np.ndarray]  # features [N, D] -> classes [N]
Change = Callable[[Array, Array], Array]  # pixels, id words -> pixels
AT_ONCE = 5  # conditions dispatched before the first is fetched: they all stay on the device


class Tally(NamedTuple):
  right: int
  seen: int

  @property
  def accuracy(self) -> float:
    """In percent."""
    return 100 * self.right / self.seen


def run(
  evaluation: Evaluation,
  *,
  judge: str = "linear",
  num_test: int = 0,
  source: str = "",
  baseline: str = "",
  sigmas: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.4),
  seed: int = 0,
  probe_epochs: int = 50,
  k: int = 20,
  temperature: float = 0.07,
) -> dict[str, float]:
  """Judges the test pictures clean and under 15 corruptions at 5 severities.

  Pictures get the severities of ImageNet-C if the view is larger than 64 pixels, else those of
  CIFAR-10-C. What chance does to a picture depends on (seed, corruption, severity, its id) only.
  Pictures without a label, and damaged ones, do not count.

  Args:
    judge: "linear", the probe of `linear.run` with its own grid, or "knn", that of `knn.run`; both
      know clean training pictures only.
    num_test: this many test pictures, spread evenly; 0: all.
    source: read the corrupted pictures instead of making them: "imagenet_c:PATH" with
      PATH/CORRUPTION/SEVERITY/CLASS/*, or "cifar10_c:PATH" with PATH/CORRUPTION.npy and labels.npy.
      They are shown whole, not cropped as the clean ones.
    baseline: whose errors divide for mCE: the robustness.json that this protocol wrote for another
      encoder, judged alike and on as many pictures of as many classes. Empty: AlexNet's published
      ones for the published ImageNet-C at 224 pixels, else no mCE.
    sigmas: of a sweep of Gaussian noise on pixels in [0, 1]; the same noise, scaled.
    seed: of the chance in the corruptions and of the probe.
    probe_epochs: of the linear probe. k, temperature: of k-NN, as in `knn.run`.

  Returns:
    robustness/clean: accuracy on the clean pictures, percent; so are the next four.
    robustness/mean: mean over the 75 conditions.
    robustness/noise: mean over gaussian_noise, shot_noise and impulse_noise, 15 conditions.
    robustness/NAME: mean over the 5 severities of a corruption.
    robustness/sigma_X: at noise of deviation X.
    robustness/mce_vs_BASELINE: 100 * mean over corruptions of error / the baseline's error.
    robustness/num_test: pictures that were judged clean.
  """
  if not evaluation.num_classes:
    raise ValueError("robustness needs labels, and the pictures have none; use class folders")
  if any(sigma <= 0 for sigma in sigmas):
    raise ValueError(f"sigmas is {sigmas}; expected positive deviations such as 0.1")
  table = _table(evaluation, source)
  ours = {
    "table": table, "size": evaluation.size, "crop": evaluation.crop, "judge": judge,
    "probe_epochs": probe_epochs, "k": k, "temperature": temperature,
    "num_classes": evaluation.num_classes,
    "num_test": min(num_test or len(evaluation.test), len(evaluation.test)),
  }  # fmt: skip
  divisor = _baseline(evaluation, baseline, ours)  # before the minutes of work
  predict = _judge(evaluation, judge, probe_epochs, k, temperature, seed)
  tallies = _tally(evaluation, predict, source, sigmas, num_test, seed)
  grid = {n: [tallies[n, s].accuracy for s in SEVERITIES] for n in NAMES}
  means = {n: float(np.mean(row)) for n, row in grid.items()}
  figures = {
    "robustness/clean": tallies["clean"].accuracy,
    "robustness/mean": float(np.mean([*means.values()])),
    "robustness/noise": float(np.mean([means[n] for n in NOISES])),
    **{f"robustness/{n}": mean for n, mean in means.items()},
    **{f"robustness/sigma_{s:g}": tallies["sigma", s].accuracy for s in sigmas},
    "robustness/num_test": float(tallies["clean"].seen),
  }
  if divisor:
    name, errors = divisor
    figures[f"robustness/mce_vs_{name}"] = mce(means, errors)
  if folder := evaluation.own_folder():
    _write(folder, tallies, ours, means)
  return figures


def mce(accuracy: dict[str, float], baseline_error: dict[str, float]) -> float:
  """Mean corruption error: 100 * mean of error / baseline's error; both means over severities.

  Args:
    accuracy: percent, by corruption.
    baseline_error: percent, by corruption.
  """
  return 100 * float(np.mean([(100 - accuracy[n]) / baseline_error[n] for n in NAMES]))


def _table(evaluation: Evaluation, source: str) -> str:
  """What the corrupted pictures are: a key of LEVELS, or what was published."""
  kind, _, path = source.partition(":")
  if source and (kind not in ("imagenet_c", "cifar10_c") or not path):
    raise ValueError(
      f"robustness: source is {source!r}; expected '' (corrupt the test pictures), "
      "'imagenet_c:PATH' or 'cifar10_c:PATH'"
    )
  return f"published {kind}" if source else table_for(evaluation.size)


def _baseline(
  evaluation: Evaluation, baseline: str, ours: dict[str, Any]
) -> tuple[str, dict[str, float]] | None:
  """The name and the mean errors, percent, of what mCE divides by; `ours`: what must be alike."""
  if not baseline:
    published = ours["table"] == "published imagenet_c"  # made here they differ: frost, JPEG
    if published and evaluation.size == 224 and evaluation.num_classes == 1000:
      return "alexnet", {n: 100 * error for n, error in ALEXNET_ERROR.items()}
    return None
  path = Path(baseline).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"robustness.baseline: no file {path}; give a robustness.json")
  try:
    found = json.loads(path.read_bytes())
    name, theirs = str(found["name"]), {key: found[key] for key in ours}
    errors = {n: float(found["errors"][n]) for n in NAMES}
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(
      f"robustness.baseline: {path} is not the robustness.json that this protocol writes "
      f"({type(e).__name__}: {e}); give that of another run"
    ) from e
  if ours != theirs:
    raise ValueError(f"{path} is of {theirs}, this evaluation of {ours}; they must be alike")
  if min(errors.values()) <= 0:
    raise ValueError(f"{path} has an error of 0 for a corruption, by which mCE cannot divide")
  return name, errors


def _judge(
  evaluation: Evaluation, judge: str, epochs: int, k: int, temperature: float, seed: int
) -> Predict:
  if judge == "linear":
    probe = fit_probe(evaluation, epochs=epochs, seed=seed)
    return lambda features_ND: probe.logits(features_ND).argmax(1)
  if judge != "knn":
    raise ValueError(f"robustness: judge is {judge!r}; expected 'linear' or 'knn'")
  if k < 1 or temperature <= 0:
    raise ValueError(f"robustness: k is {k} and temperature {temperature}; both must be positive")
  bank, _ = evaluation.labelled("train")

  def vote(features_ND):
    near, index = knn.nearest(
      features_ND, bank.features, k=min(k, len(bank.labels)), mesh=evaluation.mesh
    )
    labels = bank.labels[index]
    return knn.class_votes(near, labels, evaluation.num_classes, temperature=temperature).argmax(1)

  return vote


def _tally(
  evaluation: Evaluation,
  predict: Predict,
  source: str,
  sigmas: Sequence[float],
  num_test: int,
  seed: int,
) -> dict[Any, Tally]:
  """{"clean", (corruption, severity), ("sigma", sigma)} -> how many were right."""
  changes: dict[Any, Change] = {"clean": lambda pixels, ids: pixels}
  if not source:
    for name in NAMES:
      for s in SEVERITIES:
        changes[name, s] = functools.partial(corrupt, name=name, severity=s, seed=seed)
  for sigma in sigmas:
    changes["sigma", sigma] = functools.partial(
      corrupt, name="gaussian_noise", severity=0, level=float(sigma), seed=seed
    )
  tallies = _count(evaluation, predict, changes, num_test)
  if source:
    for condition, pictures in _published(evaluation, source).items():
      shown = dataclasses.replace(evaluation, test=pictures, crop=1.0)
      tallies[condition] = _count(shown, predict, {0: changes["clean"]}, num_test)[0]
  return tallies


def _count(
  evaluation: Evaluation, predict: Predict, changes: dict[Any, Change], num_test: int
) -> dict[Any, Tally]:
  """Reads each picture once, and judges it under every change."""
  right, seen, unread = dict.fromkeys(changes, 0), 0, 0
  for pixels_BHWC, id_B2, rows in evaluation.views("test", limit=num_test):
    valid = rows.counts & (rows.labels >= 0)
    labels = rows.labels[valid]
    seen, unread = seen + len(labels), unread + int(np.sum(~rows.counts & (rows.ids >= 0)))
    conditions = list(changes)
    for start in range(0, len(conditions), AT_ONCE):
      some = conditions[start : start + AT_ONCE]
      found = [evaluation.encode(changes[c](pixels_BHWC, id_B2)) for c in some]
      for condition, features_BD in zip(some, jax.device_get(found)):
        features_ND = features_BD[valid]
        if not np.all(np.isfinite(features_ND)):
          raise FloatingPointError(
            f"the encoder gives NaN or infinity under {condition}; evaluate an earlier checkpoint"
          )
        if len(labels):
          right[condition] += int(np.sum(predict(features_ND) == labels))
  if unread:
    logging.warning("robustness: %d pictures of %r could not be read", unread, evaluation.test)
  if not seen:
    raise ValueError(f"none of the pictures of {evaluation.test!r} has a label and can be read")
  return {condition: Tally(n, seen) for condition, n in right.items()}


def _published(evaluation: Evaluation, source: str) -> dict[tuple[str, int], Source]:
  """{(corruption, severity): its pictures} of a published set, all of which must be there."""
  kind, _, path = source.partition(":")
  root = Path(path).expanduser()
  conditions = [(n, s) for n in NAMES for s in SEVERITIES]
  if kind == "cifar10_c":
    needed = [root / f"{n}.npy" for n in NAMES] + [root / "labels.npy"]
  else:
    needed = [root / n / str(s) for n, s in conditions]
  missing = [str(p.relative_to(root)) for p in needed if not p.exists()]
  if missing:
    raise FileNotFoundError(
      f"{root} is no {kind}: {len(missing)} of {len(needed)} are missing, the first {missing[0]}"
    )
  if kind == "cifar10_c":
    return {(n, s): ArrayPictures(root, n, s, evaluation.test) for n, s in conditions}
  found = {(n, s): FolderSource(str(root / n / str(s)), split="train") for n, s in conditions}
  for pictures in found.values():
    check_same_classes(evaluation.test, pictures)
  return found


class ArrayPictures:
  """One corruption and severity of CIFAR-10-C: a fifth of the rows of its array.

  Its class numbers are taken to be those of `clean`, as those of CIFAR-10 in alphabetical order.
  """

  def __init__(self, root: Path, name: str, severity: int, clean: Source):
    self._path = os.fspath(root / f"{name}.npy")
    labels = np.load(root / "labels.npy", allow_pickle=False)
    shape = np.load(self._path, mmap_mode="r", allow_pickle=False).shape
    if len(labels) % len(SEVERITIES) or shape[:1] != labels.shape or shape[3:] != (3,):
      raise ValueError(
        f"{self._path} has shape {shape} and labels.npy {labels.shape}; expected [5 N, H, W, 3] "
        "and [5 N], severity 1 first"
      )
    if labels.max(initial=0) + 1 != clean.num_classes:
      raise ValueError(
        f"{root} has the labels of {labels.max(initial=0) + 1} classes, and the run's pictures "
        f"{clean.num_classes}; judge a run on the same set, uncorrupted"
      )
    num = len(labels) // len(SEVERITIES)
    self._start = num * (severity - 1)
    self.labels = labels[self._start : self._start + num].astype(np.int32)
    self.num_classes, self.class_names = clean.num_classes, clean.class_names

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict[str, Any]:
    # Opened anew each time: a mapped array would go to worker processes as all of its bytes.
    image = np.array(np.load(self._path, mmap_mode="r", allow_pickle=False)[self._start + i])
    return {"image": image, "label": int(self.labels[i])}

  def __repr__(self) -> str:
    return f"ArrayPictures({self._path!r}, rows from {self._start}, num_examples={len(self)})"


def _write(
  folder: Path,
  tallies: dict[Any, Tally],
  ours: dict[str, Any],
  means: dict[str, float],
) -> None:
  """robustness.csv (every condition), robustness.png, and robustness.json, a baseline's errors."""
  with (folder / "robustness.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["corruption", "severity", "accuracy", "num_pictures"])
    for condition, tally in tallies.items():
      name, severity = condition if isinstance(condition, tuple) else (condition, 0)
      writer.writerow([name, severity, f"{tally.accuracy:.4f}", tally.seen])
  baseline = {
    "name": "-".join(part for part in folder.absolute().parts[-3:] if part != "evaluation"),
    **ours,
    "errors": {n: 100 - mean for n, mean in means.items()},
  }
  (folder / "robustness.json").write_text(json.dumps(baseline, indent=2))
  _draw(folder / "robustness.png", tallies, ours["table"])


def _draw(path: Path, tallies: dict[Any, Tally], table: str) -> None:
  grid = np.array([[tallies[n, s].accuracy for s in SEVERITIES] for n in NAMES])
  clean = tallies["clean"].accuracy
  figure = Figure(figsize=(5, 6), layout="constrained")
  axes = figure.add_subplot()
  axes.imshow(grid, vmin=0, vmax=max(clean, grid.max()), cmap="viridis", aspect="auto")
  for (row, column), value in np.ndenumerate(grid):
    colour = "black" if value > 0.6 * clean else "white"
    axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
  axes.set_xticks(range(len(SEVERITIES)), SEVERITIES)
  axes.set_yticks(range(len(NAMES)), [n.replace("_", " ") for n in NAMES])
  axes.set_xlabel("severity")
  axes.set_title(f"accuracy, % ({table}; clean {clean:.1f})", fontsize=10)
  figure.savefig(path, dpi=120)
