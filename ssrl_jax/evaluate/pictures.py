"""What the protocols share that train on pictures rather than on vectors: source, batches, view."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssrl_jax import parallel
from ssrl_jax.data.batches import Batches
from ssrl_jax.data.pipeline import train_batches
from ssrl_jax.data.sources import Part, Source
from ssrl_jax.evaluate.features import Apply, Evaluation, FeatureSet
from ssrl_jax.evaluate.linear_fit import Head
from ssrl_jax.evaluate.linear_fit import apply as apply_head
from ssrl_jax.method import Array, Features, ViewSpec
from ssrl_jax.views import make_views


class Relabelled(Part):
  """Some examples of a source with labels of the caller's."""

  def __init__(self, source: Source, positions: np.ndarray, labels: np.ndarray):
    super().__init__(source, positions)
    self.labels = labels

  def __getitem__(self, i: int) -> dict[str, Any]:
    return super().__getitem__(i) | {"label": int(self.labels[i])}

  def read_together(self, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    found = super().read_together(positions)
    return {i: example | {"label": int(self.labels[i])} for i, example in found.items()}


def fit_batch_size(batch_size: int, num_examples: int, num_devices: int) -> tuple[int, int]:
  """The batch size to use, at most that asked for, and how often each example stands in an epoch.

  The largest multiple of the devices that the examples fill; with fewer examples than devices, each
  of them comes several times.
  """
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
  parallel.check_batch_size(batch_size, evaluation.mesh)
  batch_size, copies = fit_batch_size(batch_size, len(ids), evaluation.mesh.size)
  ids = np.tile(ids, copies)
  if labels is None:
    part = Part(evaluation.train, ids)
  else:
    part = Relabelled(evaluation.train, ids, np.tile(labels, copies))
  batches = train_batches(
    part, seed=seed, batch_size=batch_size, start_step=0, canvas=evaluation.canvas,
    **evaluation.reading(),
  )  # fmt: skip
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
    greyscale=0.0, mean=evaluation.mean, std=evaluation.std,
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
