"""Few labels: how far the encoder gets when only some training pictures have one.

As the semi-supervised tables of SimCLR, BYOL and SwAV (1 % and 10 % of ImageNet), and the few-shot
ones of MSN (n pictures a class, mean over draws). Linear on frozen features, and on request
fine-tuned on the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssrl_jax.evaluate import finetune, linear
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.evaluate.labels import choose_ids

ALONE = {"learning_rate": 0.03, "weight_decay": 1e-2}  # where nothing can be held out to choose


def run(
  evaluation: Evaluation,
  *,
  fractions: Sequence[float] = (0.01, 0.1),
  nums_per_class: Sequence[int] = (),
  labels_file: str = "",
  draws: int = 5,
  learning_rates: Sequence[float] = linear.LEARNING_RATES,
  weight_decays: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
  steps: int = 500,
  batch_size: int = 256,
  held_out: float = 0.2,
  finetuned: bool = False,
  finetune_epochs: int = 50,
  finetune_batch_size: int = 128,
  finetune_optimizer: str = "adamw",
  finetune_learning_rate: float = 1e-3,
  finetune_head_rate: float = 1.0,
  finetune_weight_decay: float = 0.05,
  finetune_layer_decay: float = 0.75,
  finetune_warmup_epochs: float = 5.0,
  seed: int = 0,
) -> dict[str, float]:
  """The linear probe, and on request fine-tuning, on some of the labels, over several draws.

  Draw i of a setting has seed + i: the same pictures for every encoder, and the ones that
  `finetune` takes with that seed. The probe is `linear.fit_probe`, on pooled vectors of the
  evaluation view (the papers fine-tune, or crop: their numbers are those of `finetuned`). Where no
  class has two labels none can be held out to choose by: the rate is then 0.03, the decay 0.01.

  Args:
    fractions: of each class, rounded; see `labels.draw`.
    nums_per_class: pictures of each class.
    labels_file: a published list instead, see `labels.read_list`; one draw, no other setting.
    draws: of each setting.
    learning_rates, weight_decays, batch_size, held_out: of the probe, see `linear.fit_probe`.
    steps: of the probe, whole epochs of which there are at least so many; 50 epochs of a few
      pictures would be too few.
    finetuned: also fine-tune; options named finetune_x are those of `finetune.run`.
    seed: of the draws, and with them of all that follows.

  Returns:
    low_label/SETTING/accuracy: percent of the test pictures, mean over the draws; SETTING is "1pct"
      for a fraction of 0.01, "5_per_class", or "file".
    low_label/SETTING/std: standard deviation over draws (of a sample, divisor draws - 1), in
      points; with two draws or more.
    low_label/SETTING/labels: training pictures that were used, mean over the draws.
    low_label/SETTING/finetuned, /finetuned_std: likewise, of fine-tuning.
  """
  settings = _settings(fractions, nums_per_class, labels_file)
  draws = 1 if labels_file else draws
  if draws < 1 or steps < 1:
    raise ValueError(f"draws is {draws} and steps {steps}; both must be at least 1")
  chosen = {  # all before the first training, so that what cannot be drawn is said at once
    name: [choose_ids(evaluation.train, **setting, seed=seed + i) for i in range(draws)]
    for name, setting in settings.items()
  }
  probe = {
    "learning_rates": learning_rates, "weight_decays": weight_decays, "batch_size": batch_size,
    "held_out": held_out,
  }  # fmt: skip
  tuning = {
    "epochs": finetune_epochs, "batch_size": finetune_batch_size,
    "optimizer": finetune_optimizer, "learning_rate": finetune_learning_rate,
    "head_rate": finetune_head_rate, "weight_decay": finetune_weight_decay,
    "layer_decay": finetune_layer_decay, "warmup_epochs": finetune_warmup_epochs,
  }  # fmt: skip
  figures = {}
  for name, draws_of_ids in chosen.items():
    linear_accuracy = [
      probe_accuracy(evaluation, ids, steps=steps, seed=seed + i, **probe)
      for i, ids in enumerate(draws_of_ids)
    ]
    found = {"accuracy": linear_accuracy, "labels": [len(ids) for ids in draws_of_ids]}
    if finetuned:
      found["finetuned"] = [
        finetune.run(evaluation, **settings[name], seed=seed + i, **tuning)["finetune/accuracy"]
        for i in range(draws)
      ]
    figures |= _summary(f"low_label/{name}", found)
  return figures


def probe_accuracy(
  evaluation: Evaluation, ids: np.ndarray, *, steps: int, batch_size: int, seed: int, **probe: Any
) -> float:
  """Percent of the labelled test pictures, of the linear probe on the training pictures `ids`."""
  labels = linear.training_rows(evaluation, "pooled", ids).labels
  if not len(labels):
    raise ValueError(f"none of the {len(ids)} training pictures with a label could be read")
  if np.bincount(labels).max() == 1:
    probe |= {"learning_rates": (ALONE["learning_rate"],)}
    probe |= {"weight_decays": (ALONE["weight_decay"],)}
  kept = np.sum(np.floor((1 - probe["held_out"]) * np.bincount(labels)))  # when choosing
  epochs = -(-steps // max(1, int(kept) // batch_size))
  fitted = linear.fit_probe(
    evaluation, epochs=epochs, batch_size=batch_size, seed=seed, ids=ids, **probe
  )
  test, _ = evaluation.labelled("test")
  return linear.accuracies(fitted.logits(test.features), test.labels)["accuracy"]


def _settings(
  fractions: Sequence[float], nums_per_class: Sequence[int], labels_file: str
) -> dict[str, dict[str, Any]]:
  """{name in the figures: which labels, as `choose_ids` and `finetune.run` are told}."""
  if labels_file:
    return {"file": {"labels_file": labels_file}}
  settings: dict[str, dict[str, Any]] = {
    f"{100 * f:g}pct": {"label_fraction": f} for f in fractions
  }
  for n in nums_per_class:
    if n < 1:
      raise ValueError(f"nums_per_class is {tuple(nums_per_class)}; expected numbers of at least 1")
    settings[f"{n}_per_class"] = {"num_per_class": n}
  if not settings:
    raise ValueError("fractions and nums_per_class are empty; give one, e.g. fractions=(0.1,)")
  return settings


def _summary(name: str, found: dict[str, list[float]]) -> dict[str, float]:
  figures = {}
  for key, values in found.items():
    figures[f"{name}/{key}"] = float(np.mean(values))
    if len(values) > 1 and key != "labels":
      std = "std" if key == "accuracy" else f"{key}_std"
      figures[f"{name}/{std}"] = float(np.std(values, ddof=1))
  return figures
