"""Semantic segmentation on an encoder's maps: a linear head or a light decoder, by mIoU."""

from __future__ import annotations

import contextlib
import csv
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from ssrl_jax import parallel
from ssrl_jax.data.dense import IGNORE, MaskSource, open_masks
from ssrl_jax.data.dense_batches import eval_batches
from ssrl_jax.data.sources import check_same_classes
from ssrl_jax.evaluate import dense
from ssrl_jax.evaluate.features import Apply, Evaluation
from ssrl_jax.method import Array
from ssrl_jax.models.dense import LightSegmenter, LinearSegmenter, pyramid_strides
from ssrl_jax.pixels import denormalise

HEADS = ("linear", "light")
IGNORED_COLOUR = (128, 128, 128)


def run(
  evaluation: Evaluation,
  *,
  source: str = "",
  train_split: str = "train",
  test_split: str = "test",
  head: str = "linear",
  stride: int = 4,
  levels: int = 4,
  width: int = 64,
  size: int = 128,
  scales: Sequence[float] = (0.8, 1.25),
  steps: int = 500,
  batch_size: int = 16,
  learning_rate: float = 3e-3,
  weight_decay: float = 1e-4,
  finetune: bool = False,
  encoder_rate: float = 0.1,
  num_pictures: int = 6,
  seed: int = 0,
) -> dict[str, float]:
  """Trains a head on the training split's masks and judges it on every test picture once.

  The linear head is BatchNorm and a 1x1 convolution on all maps at one grid, as in DINOv2's linear
  segmentation (Oquab et al. 2023, section 7.4), but on all scales rather than the last layer; the
  light one is close to Panoptic FPN's. Loss: cross-entropy of each pixel that has a class, logits
  enlarged bilinearly to the view. The view shows the whole picture, its longer side being `size`;
  figures are of its pixels, not of the original's.

  Args:
    source: "masks:PATH"; see `data.dense.MaskSource`. train_split, test_split: of that source.
    head: "linear" or "light". stride: of the grid it works on, pixels. levels: of the
      light head's pyramid. width: its channels.
    size: side of the view, pixels; a multiple of the encoder's coarsest stride.
    scales: range of the random scale in training; a mirror image half the time.
    num_pictures: test pictures shown beside truth and prediction in segmentation.png.
    others: as `dense.train_head`.

  Returns:
    segmentation/miou: percent; the mean of TP / (TP + FP + FN) over the classes that truth or
      prediction has, of one confusion matrix over all test pixels that have a class.
    segmentation/pixel_accuracy: percent of these pixels.
    segmentation/classes: how many classes the mean is over.
    segmentation/damaged, missing_masks, missing_images: test pictures that could not be read, and
      what was left out of both splits.
    segmentation.csv and segmentation.png are written to `evaluation.folder`.
  """
  if head not in HEADS:
    raise ValueError(f"segmentation: head is {head!r}; expected one of {', '.join(HEADS)}")
  strides = dense.map_strides(evaluation, size, "segmentation")
  train, test = open_masks(source, split=train_split), open_masks(source, split=test_split)
  check_same_classes(train, test)
  module = make_head(head, strides, train.num_classes, stride=stride, levels=levels, width=width)
  if size % module.stride:
    raise ValueError(
      f"segmentation: stride {stride} makes a grid of {module.stride} pixels, which does not "
      f"divide size {size}; lower evaluate.segmentation.stride or change the size"
    )
  trained = dense.train_head(
    evaluation, module, functools.partial(pixel_loss, size=size), train,
    name="segmentation", size=size, scales=scales, steps=steps, batch_size=batch_size,
    learning_rate=learning_rate, weight_decay=weight_decay, finetune=finetune,
    encoder_rate=encoder_rate, seed=seed,
  )  # fmt: skip
  options = {"size": size, "mean": evaluation.mean, "std": evaluation.std}
  table_KK, damaged = confusion(evaluation, module, trained, test, batch_size, options)
  if folder := evaluation.own_folder():
    write_table(folder / "segmentation.csv", table_KK, test.class_names)
    show = functools.partial(write_pictures, folder / "segmentation.png")
    show(evaluation.apply, module, trained, test, num_pictures, options)
  dropped = {key: train.dropped[key] + test.dropped[key] for key in train.dropped}
  figures = scores(table_KK) | {"damaged": damaged} | dropped
  return {f"segmentation/{key}": float(value) for key, value in figures.items()}


def make_head(
  head: str, strides: list[int], num_classes: int, *, stride: int, levels: int, width: int
) -> nn.Module:
  """The module for maps of these strides; its grid is that of `stride`, or the next there is."""
  (grid, *_) = levels_of = pyramid_strides(strides, stride=stride, levels=levels)
  if head == "linear":
    return LinearSegmenter(num_classes, grid)
  return LightSegmenter(num_classes, grid, levels_of, width)


def pixel_loss(
  logits_BhwK: Array, places: dense.Places, batch: dict[str, Array], *, size: int
) -> Array:
  """Mean cross-entropy over the pixels of the global batch that have a class."""
  mask_BHW = dense.view_masks(batch["mask"], batch["extent"], places, size=size)
  logits_BHWK = enlarge_logits(logits_BhwK, size)
  counts_BHW = (mask_BHW != IGNORE) * batch["weight"][:, None, None]
  label_BHW = jnp.where(mask_BHW == IGNORE, 0, mask_BHW)
  loss_BHW = optax.softmax_cross_entropy_with_integer_labels(logits_BHWK, label_BHW)
  return jnp.sum(loss_BHW * counts_BHW) / jnp.maximum(jnp.sum(counts_BHW), 1)


def enlarge_logits(logits_BhwK: Array, size: int) -> Array:
  B, _, _, K = logits_BhwK.shape
  return jax.image.resize(logits_BhwK, (B, size, size, K), "bilinear")


def confusion(
  evaluation: Evaluation,
  head: nn.Module,
  trained: dense.Trained,
  test: MaskSource,
  batch_size: int,
  view: dict[str, Any],
) -> tuple[np.ndarray, int]:
  """Pixels by truth and prediction, int64 [K, K], over the test set; unreadable pictures.

  Whole numbers all the way: int32 within a batch on the device, int64 over batches.
  """
  batches = eval_batches(test, batch_size=batch_size, canvas=view["size"], **evaluation.reading())
  table_KK, read, pending = np.zeros((test.num_classes,) * 2, np.int64), 0, None
  for batch in evaluation.on_devices(batches):
    out = _confusion(
      trained, batch, apply=evaluation.apply, head=head, mesh=evaluation.mesh, **view
    )
    if pending:  # fetched while the next batch is computed
      table_KK, read = table_KK + np.asarray(pending[0]), read + int(pending[1])
    pending = out
  table_KK, read = table_KK + np.asarray(pending[0]), read + int(pending[1])
  if not table_KK.sum():
    raise ValueError(f"{test!r}: no pixel of {read} readable pictures has a class; add masks")
  return table_KK, len(test) - read


@functools.partial(jax.jit, static_argnames=("apply", "head", "mesh", "size", "mean", "std"))
def _confusion(trained, batch, *, apply, head, mesh, **view):
  label_BHW, truth_BHW, _ = _labels(apply, head, trained, batch, **view)
  # What has weight 0 has a mask without any class.
  out = count_pixels(truth_BHW, label_BHW, head.num_classes), jnp.sum(batch["weight"] > 0)
  return jax.lax.with_sharding_constraint(out, parallel.replicated(mesh))


def _labels(apply: Apply, head: nn.Module, trained, batch, **view) -> tuple[Array, Array, Array]:
  """Prediction and truth, int32 [B, size, size], and the views."""
  logits_BhwK, places = dense.apply_head(apply, head, trained, batch, **view)
  label_BHW = jnp.argmax(enlarge_logits(logits_BhwK, view["size"]), axis=-1)
  truth_BHW = dense.view_masks(batch["mask"], batch["extent"], places, size=view["size"])
  return label_BHW, truth_BHW, dense.view_images(batch, places, **view)


def count_pixels(truth_BHW: Array, label_BHW: Array, num_classes: int) -> Array:
  """int32 [K, K]: pixels of each true class (row) by predicted class; those without class, not."""
  place = jnp.where(truth_BHW == IGNORE, num_classes**2, truth_BHW * num_classes + label_BHW)
  counts = jnp.zeros(num_classes**2 + 1, jnp.int32).at[place.reshape(-1)].add(1)
  return counts[:-1].reshape(num_classes, num_classes)


def class_iou(table_KK: np.ndarray) -> np.ndarray:
  """TP / (TP + FP + FN) of each class, float64 [K]; NaN where neither truth nor prediction is."""
  hits = np.diag(table_KK).astype(np.float64)
  union = table_KK.sum(axis=0) + table_KK.sum(axis=1) - hits
  return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def scores(table_KK: np.ndarray) -> dict[str, float]:
  """miou and pixel_accuracy in percent, and classes."""
  iou_K = class_iou(table_KK)
  return {
    "miou": 100 * float(np.nanmean(iou_K)),
    "pixel_accuracy": 100 * float(np.diag(table_KK).sum() / table_KK.sum()),
    "classes": int(np.sum(~np.isnan(iou_K))),
  }


def write_table(path: Path, table_KK: np.ndarray, class_names: Sequence[str]) -> None:
  """A line for each class: name, IoU in percent (empty: absent), true and predicted pixels."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["class", "iou", "true_pixels", "predicted_pixels"])
    rows = zip(class_names, class_iou(table_KK), table_KK.sum(axis=1), table_KK.sum(axis=0))
    for name, iou, true, predicted in rows:
      writer.writerow([name, "" if np.isnan(iou) else f"{100 * iou:.2f}", true, predicted])


def write_pictures(path, apply, head, trained, test, count, view) -> None:
  """A row for each of `count` test pictures, spread over the set: picture, truth, prediction."""
  if count < 1:
    return
  count = min(count, len(test))
  reader = eval_batches(test, batch_size=count, canvas=view["size"], limit=count)
  with contextlib.closing(reader):
    batch = next(reader)
  batch = {key: jnp.asarray(value) for key, value in batch.items() if key != "id"}
  local = jax.tree.map(np.asarray, trained)  # on one device: other hosts take no part in this
  label, truth, images = jax.jit(functools.partial(_labels, apply, head, **view))(local, batch)
  pixels = np.asarray(denormalise(images, view["mean"], view["std"]))
  colours = np.full((IGNORE + 1, 3), IGNORED_COLOUR, np.uint8)
  colours[: test.num_classes] = palette(test.num_classes)
  rows = []
  for j, extent_2 in enumerate(np.asarray(batch["extent"])):
    height, width = np.ceil(extent_2 * view["size"] / extent_2.max()).astype(int)
    shown = np.full(truth[j].shape, IGNORE)  # outside the picture there is nothing to predict
    shown[:height, :width] = label[j][:height, :width]
    rows.append(np.concatenate([pixels[j], colours[np.asarray(truth[j])], colours[shown]], axis=1))
  Image.fromarray(np.concatenate(rows)).save(path)


def palette(n: int) -> np.ndarray:
  """n colours of different hue, uint8 [n, 3]; neighbours alternate between bright and dark."""
  hue = np.arange(n) * 255 // max(n, 1)
  value = np.where(np.arange(n) % 2, 160, 255)
  hsv = np.stack([hue, np.full(n, 200), value], axis=1).astype(np.uint8)
  return np.asarray(Image.fromarray(hsv[None], "HSV").convert("RGB"))[0]
