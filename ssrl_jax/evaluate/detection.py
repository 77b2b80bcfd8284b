"""Object detection on an encoder's maps: a small FCOS, by COCO's average precision."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from ssrl_jax import parallel
from ssrl_jax.data.dense import Boxes, CocoSource, open_boxes
from ssrl_jax.data.dense_batches import eval_batches
from ssrl_jax.data.sources import check_same_classes
from ssrl_jax.evaluate import dense, fcos
from ssrl_jax.evaluate.features import Evaluation
from ssrl_jax.method import Array
from ssrl_jax.models.dense import Detector, pyramid_strides


class Found(NamedTuple):
  """What was detected in one picture, in its own pixels, best first."""

  corners: np.ndarray  # float [M, 4]: left, top, right, bottom
  scores: np.ndarray  # float [M]
  labels: np.ndarray  # int [M]


def run(
  evaluation: Evaluation,
  *,
  source: str = "",
  train_split: str = "train",
  test_split: str = "test",
  stride: int = 4,
  levels: int = 4,
  width: int = 64,
  depth: int = 2,
  size: int = 128,
  scales: Sequence[float] = (0.8, 1.25),
  steps: int = 1000,
  batch_size: int = 16,
  learning_rate: float = 2e-3,
  weight_decay: float = 1e-4,
  finetune: bool = False,
  encoder_rate: float = 0.1,
  max_boxes: int = 0,
  candidates: int = 500,
  nms: float = 0.6,
  max_detections: int = 100,
  seed: int = 0,
) -> dict[str, float]:
  """Trains a detector on the training split's boxes and judges it on every test picture once.

  FCOS (Tian et al. 2019) with the centre sampling, GIoU and score of its official code, on a
  pyramid that fits the encoder's strides (`models.dense.Pyramid`); smaller towers and AdamW. The
  view shows the whole picture, its longer side being `size`.

  Args:
    source: "coco:PATH"; see `data.dense.CocoSource`. train_split, test_split: of that source.
    stride: of the pyramid's finest level, pixels, or the encoder's next.
    levels: of the pyramid, each of twice the stride before.
    width: channels of the head. depth: convolutions of each of its towers.
    size: side of the view, pixels; a multiple of the encoder's coarsest stride.
    scales: range of the random scale in training; a mirror image half the time.
    max_boxes: that one training picture may have; see `CocoSource`.
    candidates: the best scores of a picture that enter non-maximum suppression; nms: of
      two boxes with a higher IoU the better one stays.
    max_detections: of a picture; COCO's figures are for 100.
    others: as `dense.train_head`.

  Returns:
    detection/AP: percent; COCO's average precision, over IoU 0.50, 0.55 to 0.95 and classes.
    detection/AP50, detection/AP75: the same at IoU 0.50 and 0.75.
    detection/damaged: test pictures that could not be read; they and their boxes count nothing.
    detection/missing_images, damaged_images, unlisted_images, clipped_boxes, empty_boxes,
      crowd_boxes, truncated_boxes: of both splits together; see `CocoSource`.
    detection.csv, the figures of each class, is written to `evaluation.folder`.
  """
  _check_options(stride, levels, candidates, nms, max_detections)
  strides = dense.map_strides(evaluation, size, "detection")
  train = open_boxes(source, split=train_split, max_boxes=max_boxes)
  test = open_boxes(source, split=test_split)
  check_same_classes(train, test)
  for part in (train, test):
    if not any(len(boxes.labels) for boxes in part.boxes):
      raise ValueError(f"detection: {part!r} has no box at all; annotate some of its pictures")
  levels_of = pyramid_strides(strides, stride=stride, levels=levels)
  head = Detector(train.num_classes, levels_of, width, depth)
  points = fcos.make_points(levels_of, size)
  trained = dense.train_head(
    evaluation, head, functools.partial(box_loss, points=points, size=size), train,
    name="detection", size=size, scales=scales, steps=steps, batch_size=batch_size,
    learning_rate=learning_rate, weight_decay=weight_decay, finetune=finetune,
    encoder_rate=encoder_rate, seed=seed,
  )  # fmt: skip
  options = {"candidates": candidates, "threshold": nms, "count": max_detections}
  found = detect_all(evaluation, head, trained, test, batch_size, size=size, **options)
  truth = [test.boxes[i] for i in found]
  figures, rows = average_precision(
    truth, list(found.values()), test.num_classes, max_detections=max_detections
  )
  if folder := evaluation.own_folder():
    write_table(folder / "detection.csv", rows, test.class_names, truth)
  dropped = {key: train.dropped[key] + test.dropped[key] for key in train.dropped}
  figures |= {"damaged": len(test) - len(found)} | dropped
  return {f"detection/{key}": float(value) for key, value in figures.items()}


def box_loss(
  outputs: tuple[Array, Array, Array],
  places: dense.Places,
  batch: dict[str, Array],
  *,
  points: fcos.Points,
  size: int,
) -> Array:
  boxes_BN4, valid_BN = dense.view_boxes(batch["boxes"], batch["box_valid"], places, size=size)
  assign = jax.vmap(functools.partial(fcos.assign, points))
  return fcos.loss(outputs, assign(boxes_BN4, batch["box_label"], valid_BN), batch["weight"])[0]


def detect_all(
  evaluation: Evaluation,
  head: nn.Module,
  trained: dense.Trained,
  test: CocoSource,
  batch_size: int,
  *,
  size: int,
  **options: Any,
) -> dict[int, Found]:
  """What is found in each readable picture of the test set, by its position, the same everywhere.

  `options` are those of `fcos.detect`.
  """
  view = {"size": size, "mean": evaluation.mean, "std": evaluation.std}
  batches = eval_batches(test, batch_size=batch_size, canvas=size, **evaluation.reading())
  found: dict[int, Found] = {}
  for batch in evaluation.on_devices(batches):
    out = _detect(
      trained, batch, apply=evaluation.apply, head=head, mesh=evaluation.mesh,
      options=tuple(options.items()), **view,
    )  # fmt: skip
    for id_2, weight, extent_2, *one in zip(*jax.device_get(out)):
      if weight > 0:
        i = int(id_2[0]) | int(id_2[1]) << 32
        found[i] = _in_picture(*one, extent_2=extent_2, size_2=test.sizes[i], size=size)
  if not found:
    raise ValueError(f"none of the {len(test)} pictures of {test!r} could be read")
  return dict(sorted(found.items()))


@functools.partial(
  jax.jit, static_argnames=("apply", "head", "mesh", "options", "size", "mean", "std")
)
def _detect(trained, batch, *, apply, head, mesh, options, **view):
  outputs, places = dense.apply_head(apply, head, trained, batch, **view)
  limits_B2 = batch["extent"][:, ::-1] * places.scale_B[:, None]
  points = fcos.make_points(head.strides, view["size"])
  detect = functools.partial(fcos.detect, points, **dict(options))
  out = batch["id"], batch["weight"], batch["extent"], *jax.vmap(detect)(*outputs, limits_B2)
  return jax.lax.with_sharding_constraint(out, parallel.replicated(mesh))


def _in_picture(boxes_M4, score_M, label_M, *, extent_2, size_2, size) -> Found:
  """From the view's pixels to the picture's; places without a box have score 0."""
  some = score_M > 0
  per_pixel_2 = extent_2.max() / size * size_2 / extent_2
  corners = boxes_M4[some].astype(np.float64) * np.tile(per_pixel_2[::-1], 2).reshape(1, 4)
  return Found(corners, score_M[some], label_M[some])


def average_precision(
  truth: Sequence[Boxes], found: Sequence[Found], num_classes: int, *, max_detections: int = 100
) -> tuple[dict[str, float], np.ndarray]:
  """COCO's figures by pycocotools, in percent, and AP, AP50 and AP75 of each class, [K, 3].

  A class without a box has NaN, and no part in the mean. Crowd boxes take detections away without
  counting them.
  """
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
    whole = COCO()
    whole.dataset = {
      "images": [{"id": i} for i in range(len(truth))],
      "categories": [{"id": label} for label in range(num_classes)],
      "annotations": _annotations(truth),
    }
    whole.createIndex()
    rows = [
      (i, *box[:2], *(box[2:] - box[:2]), score, label)
      for i, one in enumerate(found)
      for box, score, label in zip(*one)
    ]
    if not rows:  # which pycocotools cannot take: every class that has a box scores 0
      present = {int(label) for boxes in truth for label in boxes.labels[~boxes.crowd]}
      table = np.full((num_classes, 3), np.nan)
      table[sorted(present)] = 0
    else:
      judge = COCOeval(whole, whole.loadRes(np.array(rows, np.float64)), "bbox")
      judge.params.maxDets = [max_detections]
      judge.params.areaRng, judge.params.areaRngLbl = [[0, np.inf]], ["all"]
      judge.evaluate()
      judge.accumulate()
      precision_TRK = judge.eval["precision"][:, :, :, 0, 0]  # -1: no box of the class
      precision_TRK = np.where(precision_TRK < 0, np.nan, precision_TRK)
      at = [int(np.argmin(np.abs(judge.params.iouThrs - x))) for x in (0.5, 0.75)]
      table = 100 * np.stack(
        [precision_TRK.mean(axis=(0, 1)), *(precision_TRK[t].mean(axis=0) for t in at)], axis=1
      )
  if np.all(np.isnan(table)):
    raise ValueError("detection: the readable test pictures have no box but crowds; add some")
  return dict(zip(("AP", "AP50", "AP75"), np.nanmean(table, axis=0).tolist())), table


def _annotations(truth: Sequence[Boxes]) -> list[dict[str, Any]]:
  annotations = []
  for i, (corners, labels, crowd) in enumerate(truth):
    for (left, top, right, bottom), label, is_crowd in zip(corners, labels, crowd):
      width, height = float(right - left), float(bottom - top)
      annotations.append({
        "id": len(annotations) + 1,  # from 1 on: pycocotools takes 0 for "matched nothing"
        "image_id": i,
        "category_id": int(label),
        "bbox": [float(left), float(top), width, height],
        "area": width * height,
        "iscrowd": int(is_crowd),
      })  # fmt: skip
  return annotations


def write_table(
  path: Path, rows_K3: np.ndarray, class_names: Sequence[str], truth: Sequence[Boxes]
) -> None:
  """A line for each class: name, AP, AP50, AP75 in percent (empty: no box), number of boxes."""
  labels = np.concatenate([boxes.labels[~boxes.crowd] for boxes in truth])
  counts = np.bincount(labels, minlength=len(class_names))
  with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
    writer = csv.writer(file)
    writer.writerow(["class", "AP", "AP50", "AP75", "boxes"])
    for name, row, count in zip(class_names, rows_K3, counts):
      writer.writerow([name, *("" if np.isnan(x) else f"{x:.2f}" for x in row), count])


def _check_options(stride, levels, candidates, nms, max_detections) -> None:
  least = {
    "stride": stride, "levels": levels, "candidates": candidates, "max_detections": max_detections
  }  # fmt: skip
  for name, value in least.items():
    if value < 1:
      raise ValueError(f"detection: {name} is {value}; expected at least 1")
  if not 0 < nms <= 1:
    raise ValueError(f"detection: nms is {nms}; expected an IoU above 0 and at most 1, e.g. 0.6")
