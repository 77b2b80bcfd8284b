"""The costly parts of an evaluation: features, k-NN, and the linear probe with many settings.

python -m benchmarks.evaluate [--images=10000] [--bank=50000] [--queries=10000] [--train=50000]
  [--dim=512] [--classes=10] [--epochs=50] [--settings=1,50] [--encoder=resnet18] [--name=evaluate]

Pictures and vectors are noise: time does not depend on what they show. `seconds` is a call's after
a first one that compiled, whose extra time is `compile_s`; `cpu_s` is the processor time of all
threads in it, which on a busy machine says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import write_results
from ssrl_jax import parallel
from ssrl_jax.evaluate import knn, linear
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, raw_pixels
from ssrl_jax.method import apply_encoder
from ssrl_jax.models import ENCODERS

SIDE = 32  # pixels


class Noise:
  """`n` pictures of noise, each already decoded."""

  num_classes, class_names = 1, ("noise",)

  def __init__(self, n: int):
    self._n = n
    self._image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)

  def __len__(self) -> int:
    return self._n

  def __getitem__(self, i: int) -> dict:
    return {"image": self._image, "label": 0}


class Seconds(NamedTuple):
  """Of a call that compiles, and of a second one."""

  first: float
  second: float
  cpu: float  # of the second


def time_twice(first: Callable[[], Any], second: Callable[[], Any]) -> Seconds:
  times = []
  for call in (first, second):
    start, cpu = time.perf_counter(), time.process_time()
    call()
    times.append(time.perf_counter() - start)
  return Seconds(*times, time.process_time() - cpu)


def row(what: str, size: str, count: int, unit: str, took: Seconds, share: float = 1.0) -> dict:
  """`share`: the first call's work, over the second's."""
  return {
    "what": what, "size": size, "seconds": took.second, "cpu_s": took.cpu,
    "compile_s": max(took.first - share * took.second, 0.0), "per_s": count / took.second,
    "of": unit,
  }  # fmt: skip


def measure_features(encoder: str, *, images: int, batch: int) -> dict:
  """Extraction with decoding, transfer and the evaluation view."""
  options = {"stem": "cifar"} if encoder.startswith("resnet") else {"patch": 4}
  network = ENCODERS[encoder](**options)
  shape = jnp.zeros((1, SIDE, SIDE, 3))
  weights = jax.jit(lambda key: network.init(key, shape, False))(jax.random.key(0))
  whole = Evaluation(
    functools.partial(apply_encoder, network), {"batch_stats": {}, **weights}, train=Noise(images),
    test=Noise(images), num_classes=1, mesh=parallel.make_mesh(), canvas=SIDE, size=SIDE, crop=1.0,
    mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=batch,
  )  # fmt: skip
  one_batch = dataclasses.replace(whole, test=Noise(batch), cache={})
  took = time_twice(lambda: one_batch.features("test"), lambda: whole.features("test"))
  return row("features", f"{images} images, {encoder}", images, "images", took, batch / images)


def measure_knn(*, queries: int, bank: int, dim: int) -> dict:
  np_rng = np.random.default_rng(0)
  query, rows = (np_rng.normal(size=(n, dim)).astype(np.float32) for n in (queries, bank))
  call = lambda: knn.nearest(query, rows, k=20, mesh=parallel.make_mesh())  # noqa: E731
  took = time_twice(call, call)
  size = f"{queries} against {bank}, {dim} numbers"
  return row("k-NN", size, queries, "queries", took)


def measure_linear(settings: int, *, train: int, dim: int, classes: int, epochs: int) -> dict:
  """The whole probe on features that are there: search, and the chosen setting's training."""
  np_rng = np.random.default_rng(0)
  x, label = np_rng.normal(size=(train, dim)).astype(np.float32), np.arange(train) % classes
  evaluation = Evaluation(
    raw_pixels, (), train=None, test=None, num_classes=classes, mesh=parallel.make_mesh(),
    canvas=SIDE, size=SIDE, crop=1.0, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=1,
    cache={("train", "pooled"): FeatureSet(x, label, np.arange(train))},
  )  # fmt: skip
  rates = [0.1 * 0.9**i for i in range(settings)]

  def call():
    linear.fit_probe(evaluation, learning_rates=rates, weight_decays=(1e-4,), epochs=epochs)

  took = time_twice(call, call)
  size = f"{settings} settings, {train} x {dim}, {classes} classes, {epochs} epochs"
  return row("linear", size, settings, "settings", took)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, value in (
    *(("images", 10_000), ("batch", 256), ("bank", 50_000), ("queries", 10_000)),
    *(("train", 50_000), ("dim", 512), ("classes", 10), ("epochs", 50)),
  ):
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument("--settings", default="1,50")
  parser.add_argument("--encoder", default="resnet18")
  parser.add_argument("--name", default="evaluate")
  o = parser.parse_args()
  rows = [measure_knn(queries=o.queries, bank=o.bank, dim=o.dim)]
  sizes = {"train": o.train, "dim": o.dim, "classes": o.classes, "epochs": o.epochs}
  rows += [measure_linear(int(n), **sizes) for n in o.settings.split(",")]
  rows.append(measure_features(o.encoder, images=o.images, batch=o.batch))
  write_results(o.name, rows)


if __name__ == "__main__":
  main()
