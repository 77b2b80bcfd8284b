"""What it costs to read pictures: decoder, shrinking, pipelines side by side, waiting, memory.

python -m benchmarks.data [--photos=FOLDER] [--torch=PYTHON] [--tensorflow=PYTHON] [--seconds=4]
  [--parts=decode,pipelines,peers,small,waiting,memory] [--batches=100000] [--name=data]

Prints a table and writes results/NAME.json. Rates are pictures for each second of processor time of
the process and its threads: what one core does, also on a busy machine; what is compared takes
turns. JPEGs are 500x400 at quality 92: with --photos the folder's pictures enlarged and given noise
as a camera's, so that the files have the size of photographs; else synthetic scenes. --torch and
--tensorflow name interpreters in which the extra `bench`, or tensorflow, is installed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import simplejpeg
from array_record.python import array_record_module
from PIL import Image

from benchmarks.common import write_results
from ssrl_jax.data import decode as decoder
from ssrl_jax.data.pipeline import train_batches

WIDTH, HEIGHT, QUALITY, NOISE = 500, 400, 92, 14
BARE = "bare decoder (libjpeg-turbo)"
PARTS = ("decode", "pipelines", "peers", "small", "waiting", "memory")
CANVASES = (512, 352, 224)  # not shrunk; of configs/imagenet.py; of a small view


def make_jpegs(photos: str, count: int) -> list[bytes]:
  rng = np.random.default_rng(0)
  files = sorted(Path(photos).rglob("*")) if photos else []
  paths = [p for p in files if p.suffix.lower() in (".jpg", ".jpeg")][:count]
  y, x = np.mgrid[:HEIGHT, :WIDTH]
  jpegs = []
  for i in range(count):
    if paths:
      with Image.open(paths[i % len(paths)]) as im:
        base = np.asarray(im.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    else:
      waves = [np.sin(x / rng.uniform(5, 90) + y / rng.uniform(5, 90)) for _ in range(6)]
      base = 128 + 30 * np.stack([waves[c] + waves[c + 3] for c in range(3)], -1)
    noisy = base + rng.normal(0, NOISE, (HEIGHT, WIDTH, 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    jpegs.append(file.getvalue())
  return jpegs


Work = Callable[[float], tuple[int, float]]  # seconds it should take -> pictures, processor seconds


def cpu_rates(named: dict[str, Work], seconds: float) -> dict[str, float]:
  """Pictures a second of processor time: the median of three turns, taken in order."""
  rates: dict[str, list[float]] = {name: [] for name in named}
  for _ in range(3):
    for name, work in named.items():
      count, used = work(seconds / 3)
      rates[name].append(count / used)
  return {name: statistics.median(values) for name, values in rates.items()}


def over(f: Callable[[Any], Any], items: list[Any]) -> Work:
  """f on each of the items, again and again."""

  def work(seconds: float) -> tuple[int, float]:
    start, count = time.process_time(), 0
    while not count or time.process_time() - start < seconds:
      for item in items:
        f(item)
      count += len(items)
    return count, time.process_time() - start

  return work


def turn(open_pipeline: Callable[[], Iterator[Any]], batch: int) -> Work:
  """Starts a pipeline, takes at least six of its batches, and waits until it has stopped.

  What it reads ahead when the time begins stands for what it has read ahead when it ends.
  """

  def work(seconds: float) -> tuple[int, float]:
    threads, batches = threading.active_count(), open_pipeline()
    for _ in range(3):
      next(batches)
    start, count = time.process_time(), 0
    while count < 6 or time.process_time() - start < seconds:
      next(batches)
      count += 1
    used = time.process_time() - start
    batches.close()
    while threading.active_count() > threads:
      time.sleep(0.01)
    return batch * count, used

  return work


def pillow_canvas(data: bytes, canvas: int) -> np.ndarray:
  """JPEG to canvas as with Pillow alone."""
  im = Image.open(io.BytesIO(data))
  im = im.convert("RGB").resize(decoder.fit(*im.size, canvas), Image.Resampling.BICUBIC)
  placed = np.zeros((canvas, canvas, 3), np.uint8)
  placed[: im.height, : im.width] = np.asarray(im)
  return placed


def measure_parts(jpegs: list[bytes], canvas: int, seconds: float) -> list[dict[str, Any]]:
  """A picture's way to the canvas, part by part, over the bare decoder."""
  pixels = [simplejpeg.decode_jpeg(data) for data in jpegs]
  images = [Image.fromarray(p) for p in pixels]
  size, placed = decoder.fit(WIDTH, HEIGHT, canvas), np.zeros((canvas, canvas, 3), np.uint8)
  named = {
    BARE: over(simplejpeg.decode_jpeg, jpegs),
    "Pillow's decoder": over(lambda data: np.asarray(Image.open(io.BytesIO(data))), jpegs),
    "ssrl_jax decode": over(lambda data: decoder.decode_onto(placed, data), jpegs),
    "Pillow alone": over(lambda data: pillow_canvas(data, canvas), jpegs),
  }
  if size != (WIDTH, HEIGHT):
    named["shrinking alone"] = over(lambda p: decoder._shrink(p, size), pixels)
    named["Pillow's shrinking alone"] = over(
      lambda im: np.asarray(im.resize(size, Image.Resampling.BICUBIC)), images
    )
  rates = cpu_rates(named, seconds)
  setting = f"JPEG in memory, canvas {canvas}"
  return [row(setting, name, r, 100 * r / rates[BARE]) for name, r in rates.items()]


def row(setting: str, what: str, per_s: float | str, percent: float | str = "-") -> dict[str, Any]:
  """A line of the table; `percent` is of the bare decoder's rate, or of the time that is waited."""
  figures = (x if isinstance(x, str) else f"{x:,.{d}f}" for x, d in ((per_s, 0), (percent, 1)))
  return {"setting": setting, "what": what, **dict(zip(("per_s", "percent"), figures))}


class Jpegs:
  """JPEG files of a folder by position, as `folder:` gives them."""

  num_classes, class_names = None, ()

  def __init__(self, folder: Path, repeat: int):
    self._paths = [str(p) for p in sorted(folder.iterdir())] * repeat

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {"image": self._paths[i], "label": -1}


class Records:
  """32-px pictures and their labels in an ArrayRecord, raw or as PNG."""

  num_classes, class_names = 10, tuple("0123456789")

  def __init__(self, path: Path, *, png: bool):
    self.records, self._png = grain.sources.ArrayRecordDataSource([str(path)]), png

  def __len__(self) -> int:
    return len(self.records)

  def parse(self, record: bytes) -> dict[str, Any]:
    data = record[1:]
    image = data if self._png else np.frombuffer(data, np.uint8).reshape(32, 32, 3)
    return {"image": image, "label": record[0]}

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self.parse(self.records[i])

  def read_together(self, positions: list[int]) -> dict[int, dict[str, Any]]:
    return dict(zip(positions, map(self.parse, self.records.__getitems__(positions))))


def write_records(path: Path, count: int, *, png: bool) -> Records:
  rng = np.random.default_rng(0)
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for i in range(count):
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    pixels = coarse // 2 + rng.integers(0, 64, coarse.shape, np.uint8)
    data = pixels.tobytes()
    if png:
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, "PNG")
      data = file.getvalue()
    writer.write(bytes([i % 10]) + data)
  writer.close()
  return Records(path, png=png)


def plain_grain(source: Any, parse: Callable, batch: int) -> Iterator[Any]:
  dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(parse).batch(batch)
  return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def peer(python: str, name: str, folder: Path, canvas: int, views: int, seconds: float) -> float:
  """Pictures a second of processor time that another loader gives; see benchmarks/peers.py."""
  script = Path(__file__).with_name("peers.py")
  arguments = [name, str(folder), str(canvas), str(views), str(seconds)]
  done = subprocess.run(
    [python, str(script), *arguments], capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def measure_pipelines(
  folder: Path, jpegs: list[bytes], canvas: int, seconds: float
) -> list[dict[str, Any]]:
  """Files of a folder to shuffled batches of 64, one thread."""
  source = Jpegs(folder, 20)

  def ours() -> Iterator[Any]:
    return train_batches(source, seed=0, batch_size=64, start_step=0, canvas=canvas)

  def plain() -> Iterator[Any]:
    return plain_grain(source, lambda e: pillow_canvas(Path(e["image"]).read_bytes(), canvas), 64)

  rates = cpu_rates(
    {
      BARE: over(simplejpeg.decode_jpeg, jpegs),
      "ssrl_jax, any number of views": turn(ours, 64),
      "Grain and Pillow": turn(plain, 64),
    },
    seconds,
  )
  setting = f"JPEG files, canvas {canvas}"
  return [row(setting, name, r, 100 * r / rates[BARE]) for name, r in rates.items()]


def measure_peers(
  folder: Path, canvas: int, seconds: float, torch: str, tensorflow: str
) -> list[dict[str, Any]]:
  """Other loaders; torch makes the views on the host, so it is shown with none, 2 and 10."""
  rows, setting = [], f"JPEG files, canvas {canvas}"
  for python, name, what, views in (
    (torch, "torch", "torch DataLoader and Pillow", 0),
    (torch, "torch", "torch DataLoader and Pillow, 2 random crops", 2),
    (torch, "torch", "torch DataLoader and Pillow, 10 random crops", 10),
    (tensorflow, "tensorflow", "tf.data", 0),
  ):
    rate = peer(python, name, folder, canvas, views, seconds) if python else "not run"
    rows.append(row(setting, what, rate))
  return rows


def measure_small(folder: Path, form: str, seconds: float) -> list[dict[str, Any]]:
  """32-px pictures from ArrayRecord in batches of 512."""
  source = write_records(folder / f"{form}.array_record", 20_000, png=form == "PNG")

  def decoded(record: bytes) -> dict[str, Any]:
    example = source.parse(record)
    if isinstance(example["image"], bytes):
      example["image"] = np.asarray(Image.open(io.BytesIO(example["image"])))
    return example

  def ours() -> Iterator[Any]:
    return train_batches(source, seed=0, batch_size=512, start_step=0, canvas=32)

  def plain() -> Iterator[Any]:
    return plain_grain(source.records, decoded, 512)

  named = {"ssrl_jax": turn(ours, 512), "Grain and Pillow": turn(plain, 512)}
  return [
    row(f"ArrayRecord, 32 px, {form}", name, r) for name, r in cpu_rates(named, seconds).items()
  ]


def measure_waiting(folder: Path, workers: int) -> dict[str, Any]:
  """Share of the time that a loop waits whose device needs 1.5 times as long as the host."""
  batch = 64
  batches = train_batches(
    Jpegs(folder, 20), seed=0, batch_size=batch, start_step=0, canvas=224, workers=workers
  )
  for _ in range(4 + 8 * workers):  # more than are read ahead: they would make the host look faster
    next(batches)
  start = time.perf_counter()
  for _ in range(20):
    next(batches)
  step, waited, start = 1.5 * (time.perf_counter() - start) / 20, 0.0, time.perf_counter()
  for _ in range(40):
    time.sleep(step)  # a device at work needs no processor
    before = time.perf_counter()
    next(batches)
    waited += time.perf_counter() - before
  percent = 100 * waited / (time.perf_counter() - start)
  batches.close()
  what = f"{workers} workers" if workers else "threads of the process"
  return row("waiting, device 1.5 times slower than the host", what, batch / step, percent)


class Tiny:
  num_classes, class_names = None, ()

  def __len__(self) -> int:
    return 1000

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {"image": np.full((4, 4, 3), i % 256, np.uint8), "label": -1}


def resident_mib() -> float:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize() / 2**20


def measure_memory(num_batches: int) -> list[dict[str, Any]]:
  """Resident memory at five places of a long stream of tiny batches."""
  batches = train_batches(Tiny(), seed=0, batch_size=4, start_step=0, canvas=4, threads=2)
  rows = []
  for k in range(1, num_batches + 1):
    next(batches)
    if k % (num_batches // 5) == 0:
      rows.append(row("resident memory, MiB", f"after {k:,} batches", resident_mib()))
  batches.close()
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--photos", default="")
  parser.add_argument("--torch", default="")
  parser.add_argument("--tensorflow", default="")
  parser.add_argument("--seconds", type=float, default=4.0)
  parser.add_argument("--parts", default=",".join(PARTS))
  parser.add_argument("--batches", type=int, default=100_000)
  parser.add_argument("--name", default="data")
  options = parser.parse_args()
  jpegs = make_jpegs(options.photos, 32)
  kilobytes = np.mean([len(data) for data in jpegs]) / 1000
  print(f"{len(jpegs)} JPEGs of {kilobytes:.0f} KB, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
  with tempfile.TemporaryDirectory() as root:
    folder = Path(root) / "jpegs"
    folder.mkdir()
    for i, data in enumerate(jpegs):
      (folder / f"{i:03}.jpg").write_bytes(data)
    rows, seconds, parts = [], options.seconds, options.parts.split(",")
    if set(parts) & {"decode", "pipelines", "peers"}:
      rows.append(row("size of a JPEG, bytes", "mean", 1000 * kilobytes))
    for canvas in CANVASES if "decode" in parts else ():
      rows += measure_parts(jpegs, canvas, seconds)
    for canvas in CANVASES if "pipelines" in parts else ():
      rows += measure_pipelines(folder, jpegs, canvas, seconds)
    if "peers" in parts:
      rows += measure_peers(folder, CANVASES[-1], seconds, options.torch, options.tensorflow)
    for form in ("raw", "PNG") if "small" in parts else ():
      rows += measure_small(Path(root), form, seconds)
    for workers in (0, 2) if "waiting" in parts else ():
      rows.append(measure_waiting(folder, workers))
    if "memory" in parts:
      rows += measure_memory(options.batches)
  write_results(options.name, rows)


if __name__ == "__main__":
  main()
