"""What the protocols share that train on pictures rather than on vectors: source, batches, view."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from ssrl_jax.data.batches import Batches
from ssrl_jax.data.pipeline import train_batches
from ssrl_jax.data.sources import Source
from ssrl_jax.evaluate.features import Apply, Evaluation, FeatureSet
from ssrl_jax.evaluate.linear import Head
from ssrl_jax.evaluate.linear import apply as apply_head
from ssrl_jax.method import Array, Features, ViewSpec
from ssrl_jax.views import make_views


class Rows:
  """Some examples of a source, in the order of `ids`, with labels of the caller's if given."""

  def __init__(self, source: Source, ids: np.ndarray, labels: np.ndarray | None = None):
    self._source, self._ids, self._labels = source, ids, labels
    self.num_classes, self.class_names = source.num_classes, source.class_names

  def __len__(self) -> int:
    return len(self._ids)

  def __getitem__(self, i: int) -> dict[str, Any]:
    example = self._source[int(self._ids[i])]
    return example if self._labels is None else {**example, "label": int(self._labels[i])}

  def __repr__(self) -> str:
    return f"Rows({self._source!r}, {len(self)})"


def fit_batch_size(batch_size: int, num_examples: int, num_devices: int) -> tuple[int, int]:
  """The batch size to use, at most that asked for, and how often each example stands in an epoch.

  The largest multiple of the devices that the examples fill; with fewer examples than devices, each
  of them comes several times.
  """
  if batch_size < num_devices or batch_size % num_devices:
    nearest = max(round(batch_size / num_devices), 1) * num_devices
    raise ValueError(
      f"batch_size {batch_size} is not divisible by {num_devices} devices; nearest: {nearest}"
    )
  copies = -(-num_devices // num_examples)
  return min(batch_size, copies * num_examples // num_devices * num_devices), copies


def training_batches(
  evaluation: Evaluation,
  ids: np.ndarray,
  *,
  batch_size: int,
  seed: int,
  labels: np.ndarray | None = None,
) -> tuple[Batches, int, int]:
  """Endless batches of the training pictures `ids`, their size, and the steps of an epoch.

  Args:
    batch_size: at most; see `fit_batch_size`.
    seed: of the order.
    labels: of the pictures, instead of the source's.
  """
  batch_size, copies = fit_batch_size(batch_size, len(ids), evaluation.mesh.size)
  ids, labels = np.tile(ids, copies), None if labels is None else np.tile(labels, copies)
  batches = train_batches(
    Rows(evaluation.train, ids, labels),
    seed=seed,
    batch_size=batch_size,
    start_step=0,
    canvas=evaluation.canvas,
    workers=evaluation.workers,
    threads=evaluation.threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  return batches, batch_size, len(ids) // batch_size


def crop_and_flip(
  evaluation: Evaluation, key: Array, batch: dict[str, Array], *, smallest_crop: float
) -> Array:
  """One random resized crop of each picture, mirrored or not: float32 [B, size, size, 3].

  torchvision's RandomResizedCrop and RandomHorizontalFlip, what the papers train heads on.

  Args:
    smallest_crop: of the picture's area, in (0, 1].
  """
  spec = ViewSpec(
    name="train", count=1, size=evaluation.size, area=(float(smallest_crop), 1.0), jitter=0.0,
    greyscale=0.0, mean=tuple(evaluation.mean), std=tuple(evaluation.std),
  )  # fmt: skip
  return make_views(key, batch, (spec,))["train"][:, 0]


def classify(evaluation: Evaluation, weights: Any, head: Head, split: str) -> FeatureSet:
  """The logits of `head` on the pooled vectors of other weights: of each labelled picture once."""
  classifier = evaluation.with_encoder(_with_head(evaluation.apply), (weights, head))
  return classifier.labelled(split)[0]


@functools.lru_cache(maxsize=8)
def _with_head(encoder: Apply) -> Apply:
  """One function for each encoder, so that a second call of `classify` compiles nothing."""

  def apply(weights, images, train, key):
    features, _ = encoder(weights[0], images, train, key)
    return Features(pooled=apply_head(weights[1], features.pooled), maps={}), weights

  return apply
