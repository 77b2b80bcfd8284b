"""Frozen features of a data set, extracted once and shared by all evaluations."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssrl_jax import parallel
from ssrl_jax.data.batches import Batches
from ssrl_jax.data.decode import decode
from ssrl_jax.data.pipeline import eval_batches
from ssrl_jax.data.sources import Source
from ssrl_jax.method import Array, Features
from ssrl_jax.pixels import denormalise, normalise
from ssrl_jax.views import eval_pixels, eval_view

RAW_SIZE = 32  # pixels, of the control that does nothing

Apply = Callable[[Any, Array, bool, Any], tuple[Features, Any]]  # see method.Encoder.apply


class FeatureSet(NamedTuple):
  """One row for each readable picture of a split, in the order of `ids`."""

  features: np.ndarray  # float32 [N, D]
  labels: np.ndarray  # int32 [N], -1 where unknown
  ids: np.ndarray  # int64 [N], position in the source, ascending

  def labelled(self) -> FeatureSet:
    """The rows whose label is known."""
    known = self.labels >= 0
    return FeatureSet(self.features[known], self.labels[known], self.ids[known])


class Rows(NamedTuple):
  """What the host knows of a batch."""

  counts: np.ndarray  # bool [B]: False for padding and for pictures that cannot be read
  labels: np.ndarray  # int32 [B], -1 where unknown
  ids: np.ndarray  # int64 [B]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
  """An encoder, the data to judge it on, and the view of a picture that it is shown.

  `apply` and `weights` are apart so that the weights are an argument of the compiled function, not
  constants in it, and so that other weights of the same encoder need no second compilation.
  """

  apply: Apply
  weights: Any  # arrays on the mesh; () for an encoder without any
  train: Source  # the bank of k-NN, the training set of the linear probe
  test: Source | None  # None: only for protocols that bring their own pictures
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
  folder: Path | None = None  # where a protocol may write pictures and tables; None: nowhere
  moved: Callable[[], None] = lambda: None  # called at each batch: a sign of life
  other: Evaluation | None = None  # another encoder, for what compares two
  cache: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

  def with_encoder(self, apply: Apply, weights: Any) -> Evaluation:
    """The same judgement of another encoder; nothing extracted is carried over."""
    return dataclasses.replace(self, apply=apply, weights=weights, cache={})

  def features(self, split: str, kind: str = "pooled") -> FeatureSet:
    """The features of "train" or "test", extracted at the first call; the same on every host.

    Args:
      kind: what of the encoder's output, see `vectors`. All kinds are extracted at once.

    Raises:
      ValueError: see `check_kind`.
    """
    if (split, kind) not in self.cache:
      kinds = ("pooled",) if kind == "pooled" else self.kinds()
      self.check_kind(kind)
      found = self._extract(split, kinds)
      self.cache.update({(split, k): rows for k, rows in found.items()})
    return self.cache[split, kind]

  def kinds(self) -> tuple[str, ...]:
    """The kinds of vectors that this encoder gives, "pooled" first."""
    images = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32)
    found = jax.eval_shape(self._vectors, self.weights, images)  # sorted by name
    return tuple(sorted(found, key=lambda kind: kind != "pooled"))

  def check_kind(self, kind: str) -> None:
    """Raises ValueError where the encoder gives no such vectors."""
    if kind != "pooled" and kind not in self.kinds():
      known = ", ".join(self.kinds())
      raise ValueError(f"unknown kind of vector {kind!r}; this encoder has: {known}")

  def _vectors(self, weights: Any, images: Array) -> dict[str, Array]:
    return vectors(self.apply(weights, images, False, None)[0])

  def labelled(self, split: str, kind: str = "pooled") -> tuple[FeatureSet, int]:
    """The labelled rows of a split, and how many others were left out.

    Raises:
      ValueError: there are none.
    """
    rows = self.features(split, kind)
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

  def batches(self, split: str, *, limit: int = 0) -> Iterator[dict[str, Array]]:
    """Every example of a split once, as global batches on the devices.

    Each has image, extent, label, id (words) and weight, which is 0 for what must not count: see
    `pipeline.eval_batches`.

    Args:
      limit: only this many examples, spread evenly over the split; 0: all.
    """
    parallel.check_batch_size(self.batch_size, self.mesh)
    batches = eval_batches(
      self._source(split),
      batch_size=self.batch_size,
      canvas=self.canvas,
      limit=limit or None,
      **self.reading(),
    )
    yield from self.on_devices(batches)

  def reading(self) -> dict[str, int]:
    """How batches are read: this process's part of them, and with how many workers."""
    return {
      "workers": self.workers,
      "threads": self.threads,
      "process_index": jax.process_index(),
      "process_count": jax.process_count(),
    }

  def on_devices(self, batches: Batches) -> Iterator[dict[str, Array]]:
    """Batches that end, as global ones on the devices, each with a sign of life."""
    with contextlib.closing(batches):
      for batch in batches:
        self.moved()
        yield parallel.to_device(batch, self.mesh)

  def own_folder(self) -> Path | None:
    """`folder`, made; None where there is none, or where another process writes into it."""
    if self.folder is None or jax.process_index():
      return None
    self.folder.mkdir(parents=True, exist_ok=True)
    return self.folder

  def views(self, split: str, *, limit: int = 0) -> Iterator[tuple[Array, Array, Rows]]:
    """The evaluation views, batch by batch, before they are normalised.

    Yields:
      pixels float32 [B, size, size, 3] in [0, 1]; the id words uint32 [B, 2]; and on the host,
      which of them count, their labels and ids. The encoder takes the pixels by `encode`.
    """
    for batch in self.batches(split, limit=limit):
      pixels_BHWC, told = _views(batch, mesh=self.mesh, size=self.size, crop=self.crop)
      label_B, words_B2, weight_B = jax.device_get(told)
      yield pixels_BHWC, batch["id"], Rows(weight_B > 0, label_B, join_words(words_B2))

  def encode(self, pixels_BHWC: Array, kind: str = "pooled") -> Array:
    """The vectors [B, D] of evaluation views in [0, 1], float32, whole on every host."""
    options = {"apply": self.apply, "kind": kind, "mesh": self.mesh}
    return _encode(self.weights, pixels_BHWC, mean=self.mean, std=self.std, **options)

  def _source(self, split: str) -> Source:
    sources = {"train": self.train, "test": self.test}
    if split not in sources:
      raise ValueError(f"unknown split {split!r}; known: train, test")
    return sources[split]

  def _view(self) -> dict[str, Any]:
    return {"size": self.size, "crop": self.crop, "mean": self.mean, "std": self.std}

  def _extract(self, split: str, kinds: tuple[str, ...]) -> dict[str, FeatureSet]:
    source = self._source(split)
    rows, pending = [], None
    options = {"apply": self.apply, "kinds": kinds, "mesh": self.mesh}
    for batch in self.batches(split):
      out = _extract_batch(self.weights, batch, **options, **self._view())
      if pending:  # fetch the batch before this one while this one is computed
        rows.append(_fetch(pending))
      pending = out
    rows.append(_fetch(pending))
    *columns, labels, ids = (np.concatenate(column) for column in zip(*rows))
    order = np.argsort(ids)
    found = {k: FeatureSet(x[order], labels[order], ids[order]) for k, x in zip(kinds, columns)}
    for rows in found.values():
      _check(rows, split=split, num_expected=len(source), num_classes=self.num_classes)
    return found


def vectors(features: Features) -> dict[str, Array]:
  """Every vector [B, D] that an encoder's output offers to a judge, float32, by its name.

  "pooled"; "mapS", the mean over the map of stride S; "tokens", the mean of a ViT's tokens;
  "scales" and "fused" of a FusionEncoder.
  """
  found = {"pooled": features.pooled}
  found |= {f"map{s}": _mean(x, (1, 2)) for s, x in sorted(features.maps.items())}
  if features.tokens is not None:
    found["tokens"] = _mean(features.tokens, (1,))
  if features.scales is not None:
    found["scales"] = features.scales.reshape(features.scales.shape[0], -1)
  if features.fused is not None:
    found["fused"] = features.fused
  return {name: x.astype(jnp.float32) for name, x in found.items()}


def _mean(x: Array, axis: tuple[int, ...]) -> Array:
  return jnp.mean(x.astype(jnp.float32), axis)  # of a bfloat16 encoder, too


@functools.partial(
  jax.jit, static_argnames=("apply", "kinds", "mesh", "size", "crop", "mean", "std")
)
def _extract_batch(weights, batch, *, apply, kinds, mesh, **view):
  """Features, label, id and weight of a global batch, whole on every device, so on every host."""
  features, _ = apply(weights, eval_view(batch, **view), False, None)
  found = vectors(features)
  out = (*(found[kind] for kind in kinds), batch["label"], batch["id"], batch["weight"])
  return jax.lax.with_sharding_constraint(out, parallel.replicated(mesh))


@functools.partial(jax.jit, static_argnames=("mesh", "size", "crop"))
def _views(batch, *, mesh, size, crop):
  told = (batch["label"], batch["id"], batch["weight"])
  told = jax.lax.with_sharding_constraint(told, parallel.replicated(mesh))
  pixels_BHWC = eval_pixels(batch, size=size, crop=crop)
  return jax.lax.with_sharding_constraint(pixels_BHWC, parallel.batch_sharding(mesh)), told


@functools.partial(jax.jit, static_argnames=("apply", "kind", "mesh", "mean", "std"))
def _encode(weights, pixels_BHWC, *, apply, kind, mesh, mean, std):
  images_BHWC = jax.vmap(functools.partial(normalise, mean=mean, std=std))(pixels_BHWC)
  found = vectors(apply(weights, images_BHWC, False, None)[0])[kind]
  return jax.lax.with_sharding_constraint(found, parallel.replicated(mesh))


@functools.partial(jax.jit, static_argnames=("size", "crop", "mean", "std"))
def _pictures(batch, *, size, crop, mean, std):
  views_BHWC = eval_view(batch, size=size, crop=crop, mean=mean, std=std)
  return denormalise(views_BHWC, mean, std)


def _fetch(out: tuple[Array, ...]) -> tuple[np.ndarray, ...]:
  """The rows that count: padding and damaged pictures have weight 0."""
  *vectors, label_B, words_B2, weight_B = jax.device_get(out)
  id_B, counts = join_words(words_B2), weight_B > 0
  return *(x[counts] for x in vectors), label_B[counts], id_B[counts]


def join_words(words_B2: np.ndarray) -> np.ndarray:
  """The ids, int64 [B], of their low and high words."""
  return words_B2[:, 0].astype(np.int64) | (words_B2[:, 1].astype(np.int64) << 32)


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


def raw_pixels(weights: Any, images: Array, train: bool, key: Any) -> tuple[Features, Any]:
  """An encoder that does nothing: the control that any learnt feature should beat.

  Larger pictures are shrunk to RAW_SIZE: those of ImageNet at 224 px would take 771 GB.
  """
  del train, key
  if max(images.shape[1:3]) > RAW_SIZE:
    shape = (images.shape[0], RAW_SIZE, RAW_SIZE, images.shape[3])
    images = jax.image.resize(images, shape, "linear", antialias=True)
  return Features(pooled=images.reshape(images.shape[0], -1), maps={}), weights
