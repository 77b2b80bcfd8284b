"""Protocols that judge an encoder, one a file: `run(evaluation, **options) -> figures`.

To add one: write its file and add it to EVALS. The names of its figures begin with its own
("knn/accuracy"), and its keyword arguments, with their defaults, are the knobs of the config group
evaluate.NAME. Protocols import neither config nor experiment: they see an `Evaluation` and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ssrl_jax.evaluate import (
  attention,
  bias,
  detection,
  finetune,
  geometry,
  knn,
  linear,
  linear_sgd,
  low_label,
  retrieval,
  robustness,
  segmentation,
)


class Protocol(NamedTuple):
  """A protocol, and how it is shown."""

  run: Callable[..., dict[str, float]]
  columns: dict[str, str]  # its main figures and their titles in a table
  pixels: bool = False  # whether it can judge raw pixels: it asks for nothing but `pooled`
  needs: str = "labels"  # of the run's pictures: labels, test (pictures) or nothing


EVALS: dict[str, Protocol] = {
  "knn": Protocol(knn.run, {"knn/accuracy": "k-NN %"}, pixels=True),
  "linear": Protocol(linear.run, {"linear/accuracy": "linear %"}, pixels=True),
  "linear_sgd": Protocol(linear_sgd.run, {"linear_sgd/accuracy": "lin. SGD %"}),
  "retrieval": Protocol(
    retrieval.run,
    {"retrieval/recall_at_1": "recall@1 %", "retrieval/map": "mAP %"},
    pixels=True,
  ),
  "low_label": Protocol(
    low_label.run,
    {"low_label/1pct/accuracy": "1 % lab.", "low_label/10pct/accuracy": "10 % lab."},
  ),
  "finetune": Protocol(finetune.run, {"finetune/accuracy": "fine-tuned"}),
  "detection": Protocol(
    detection.run, {"detection/AP": "box AP %", "detection/AP50": "AP50 %"}, needs="nothing"
  ),
  "segmentation": Protocol(segmentation.run, {"segmentation/miou": "mIoU %"}, needs="nothing"),
  "robustness": Protocol(
    robustness.run,
    {"robustness/mean": "corrupted %", "robustness/noise": "noise %"},
    pixels=True,
  ),
  "geometry": Protocol(
    geometry.run,
    {"geometry/rankme": "RankMe", "geometry/lidar": "LiDAR", "geometry/cka": "CKA"},
    needs="test",
  ),
  "attention": Protocol(attention.run, {"attention/pointing": "pointing %"}, needs="test"),
  "bias": Protocol(bias.run, {"bias/worst_class": "worst class %"}, pixels=True),
}
