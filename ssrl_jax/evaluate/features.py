"""Frozen features of a data set, extracted once and shared by all evaluations."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssrl_jax import parallel
from ssrl_jax.data.decode import decode
from ssrl_jax.data.pipeline import eval_batches
from ssrl_jax.data.sources import Source
from ssrl_jax.method import Array, Features
from ssrl_jax.pixels import denormalise
from ssrl_jax.views import eval_view

Encode = Callable[[Any, Array], Features]  # (state, normalised float32 [B, h, w, 3])


class FeatureSet(NamedTuple):
  """One row for each readable picture of a split, in the order of `ids`."""

  features: np.ndarray  # float32 [N, D]
  labels: np.ndarray  # int32 [N], -1 where unknown
  ids: np.ndarray  # int64 [N], position in the source, ascending

  def labelled(self) -> FeatureSet:
    """The rows whose label is known."""
    known = self.labels >= 0
    return FeatureSet(self.features[known], self.labels[known], self.ids[known])


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
  """An encoder, the data to judge it on, and the view of a picture that it is shown.

  `encode` and `state` are apart so that the weights are an argument of the compiled function, not
  constants in it, and so that another state of the same encoder needs no second compilation.
  """

  encode: Encode
  state: Any  # arrays on the mesh; () for an encoder without weights
  train: Source  # the bank of k-NN, the training set of the linear probe
  test: Source
  num_classes: int | None  # None: unlabelled
  mesh: Mesh
  canvas: int  # side of the square that a picture is decoded to, pixels
  size: int  # side of the evaluation view, pixels
  crop: float  # its share of the picture's shorter side
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  batch_size: int  # over all devices
  workers: int = 0  # reader processes; 0: threads of this one
  threads: int = 1  # that decode, in each reader process
  cache: dict[str, FeatureSet] = dataclasses.field(default_factory=dict, repr=False)  # by split

  def with_encoder(self, encode: Encode, state: Any) -> Evaluation:
    """The same judgement of another encoder; nothing extracted is carried over."""
    return dataclasses.replace(self, encode=encode, state=state, cache={})

  def features(self, split: str) -> FeatureSet:
    """The features of "train" or "test", extracted at the first call; the same on every host."""
    if split not in self.cache:
      self.cache[split] = self._extract(split)
    return self.cache[split]

  def labelled(self, split: str) -> tuple[FeatureSet, int]:
    """The labelled rows of a split, and how many others were left out.

    Raises:
      ValueError: there are none.
    """
    rows = self.features(split)
    known = rows.labelled()
    if not self.num_classes or not len(known.labels):
      raise ValueError(
        f"the {split} pictures ({len(rows.labels)}) have no labels, and k-NN and the linear probe "
        "need them: set evaluate.evals to '', or sort the pictures into one folder for each class"
      )
    return known, len(rows.labels) - len(known.labels)

  def pictures(self, split: str, ids: Sequence[int]) -> np.ndarray:
    """The evaluation views of some pictures, as uint8 [n, size, size, 3]."""
    source = self._source(split)
    images, extents = zip(*[decode(source[int(i)]["image"], canvas=self.canvas) for i in ids])
    batch = {"image": jnp.asarray(np.stack(images)), "extent": jnp.asarray(np.stack(extents))}
    return np.asarray(_pictures(batch, **self._view()))

  def _source(self, split: str) -> Source:
    sources = {"train": self.train, "test": self.test}
    if split not in sources:
      raise ValueError(f"unknown split {split!r}; known: train, test")
    return sources[split]

  def _view(self) -> dict[str, Any]:
    mean, std = tuple(self.mean), tuple(self.std)  # hashable also when a config made them lists
    return {"size": self.size, "crop": self.crop, "mean": mean, "std": std}

  def _extract(self, split: str) -> FeatureSet:
    source = self._source(split)
    parallel.check_batch_size(self.batch_size, self.mesh)
    batches = eval_batches(
      source,
      batch_size=self.batch_size,
      canvas=self.canvas,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      workers=self.workers,
      threads=self.threads,
    )
    rows, pending = [], None
    with contextlib.closing(batches):
      for batch in batches:
        batch = parallel.to_device(batch, self.mesh)
        out = _extract_batch(self.state, batch, encode=self.encode, mesh=self.mesh, **self._view())
        if pending:  # fetch the batch before this one while this one is computed
          rows.append(_fetch(pending))
        pending = out
    rows.append(_fetch(pending))
    features, labels, ids = (np.concatenate(column) for column in zip(*rows))
    order = np.argsort(ids)
    found = FeatureSet(features[order], labels[order], ids[order])
    _check(found, split=split, num_expected=len(source), num_classes=self.num_classes)
    return found


@functools.partial(jax.jit, static_argnames=("encode", "mesh", "size", "crop", "mean", "std"))
def _extract_batch(state, batch, *, encode, mesh, size, crop, mean, std):
  """Features, label, id and weight of a global batch, whole on every device, so on every host."""
  images = eval_view(batch, size=size, crop=crop, mean=mean, std=std)
  pooled_BD = encode(state, images).pooled.astype(jnp.float32)
  out = (pooled_BD, batch["label"], batch["id"], batch["weight"])
  return jax.lax.with_sharding_constraint(out, parallel.replicated(mesh))


@functools.partial(jax.jit, static_argnames=("size", "crop", "mean", "std"))
def _pictures(batch, *, size, crop, mean, std):
  views_BHWC = eval_view(batch, size=size, crop=crop, mean=mean, std=std)
  return denormalise(views_BHWC, mean, std)


def _fetch(out: tuple[Array, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The rows that count: padding and damaged pictures have weight 0."""
  pooled_BD, label_B, words_B2, weight_B = jax.device_get(out)
  id_B = words_B2[:, 0].astype(np.int64) | (words_B2[:, 1].astype(np.int64) << 32)
  counts = weight_B > 0
  return pooled_BD[counts], label_B[counts], id_B[counts]


def _check(rows: FeatureSet, *, split: str, num_expected: int, num_classes: int | None) -> None:
  assert np.all(np.diff(rows.ids) > 0), "an example was counted twice"
  if not len(rows.ids):
    raise ValueError(f"none of the {num_expected} {split} pictures could be read")
  if len(rows.ids) < num_expected:
    logging.warning(
      "%d of %d %s pictures could not be read and are left out of the evaluation",
      num_expected - len(rows.ids), num_expected, split,
    )  # fmt: skip
  if not np.all(np.isfinite(rows.features)):
    bad = rows.ids[~np.all(np.isfinite(rows.features), axis=1)]
    raise FloatingPointError(
      f"the encoder gives NaN or infinity for {len(bad)} of {len(rows.ids)} {split} pictures, "
      f"first for number {bad[0]}; evaluate an earlier checkpoint"
    )
  if num_classes and np.any(rows.labels >= num_classes):
    raise ValueError(
      f"the {split} pictures have label {rows.labels.max()}, but there are {num_classes} classes "
      f"(0 to {num_classes - 1}); train and test must have the same classes"
    )


def raw_pixels(state: Any, images: Array) -> Features:
  """An encoder that does nothing: the control that any learnt feature should beat."""
  del state
  return Features(pooled=images.reshape(images.shape[0], -1), maps={})
