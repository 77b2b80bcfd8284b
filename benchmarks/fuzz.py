"""The decoder against damaged and hostile files: each is decoded or refused, in time and memory.

Inputs are random bytes and mutated files of every format that is read: flipped bits, cut ends,
splices, edited headers, repeated parts. Each must give a valid canvas, the same one twice, or raise
DamagedImage. They are decoded in a child process, so that a crash or a hang is seen; the inputs of
every finding are kept.

Command  python -m benchmarks.fuzz [--inputs=N] [--seed=S] [--keep=DIR]
Output   results/fuzz.json, and the files in DIR
"""

from __future__ import annotations

import argparse
import collections
import io
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ssrl_jax.data.decode import DamagedImage, decode

CANVAS = 48
SLOW = 2.0  # CPU seconds for one input, decoded twice: more is a finding
HUNG = 120.0  # seconds by the clock, after which the child is killed
RSS_UNIT = 1024 if sys.platform == "darwin" else 1  # ru_maxrss is in bytes there, KiB elsewhere

# Values that parsers trip over: 0, 1, all ones, the ends of signed and unsigned integers.
EDGES = [
  value.to_bytes(size, order)
  for size in (1, 2, 4)
  for value in (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1))
  for order in ("big", "little")
]


class Verdict(NamedTuple):
  """What became of an input."""

  outcome: str  # decoded, damaged, or a finding: error, invalid, unstable, slow, crash, hang
  detail: str
  seconds: float  # of the CPU
  peak_mib: float  # of the child so far


def encoded(pixels: np.ndarray, mode: str, format: str, **options: Any) -> bytes:
  buffer, image = io.BytesIO(), Image.fromarray(pixels).convert(mode)
  if mode == "I":
    image = image.point(lambda x: x * 257)  # 16 bits: of 8 in 32 nobody knows what is white
  image.save(buffer, format, **options)
  return buffer.getvalue()


def real_files() -> list[tuple[str, bytes]]:
  """(format, content) of small valid files: modes, compressions, animations, metadata."""
  np_rng = np.random.default_rng(0)
  y, x = np.mgrid[:52, :70]
  smooth = np.stack([x * 3, y * 4, x + y], -1).astype(np.uint8)
  pixels = smooth ^ np_rng.integers(0, 32, smooth.shape, np.uint8)
  deep = (pixels[:, :, 0].astype(np.uint16) << 8) | pixels[:, :, 1]
  turned = Image.Exif()
  turned[0x0112] = 6
  more = [Image.fromarray(pixels[::-1].copy()), Image.fromarray(pixels[:, ::-1].copy())]
  animated = {"save_all": True, "append_images": more}
  settings: list[tuple[str, str, dict[str, Any]]] = [
    *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
    ("JPEG", "RGB", {"progressive": True, "exif": turned, "quality": 95, "subsampling": 0}),
    ("JPEG", "RGB", {"restart_marker_blocks": 2, "comment": b"a comment"}),
    *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "LA", "P", "1")),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "RGB", {**animated, "exif": turned}),
    *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (0, 1)),
    ("WEBP", "RGB", {**animated, "exif": turned}),
    *(("BMP", mode, {}) for mode in ("RGB", "L", "P", "1")),
    ("GIF", "P", {}),
    ("GIF", "RGB", {**animated, "transparency": 0}),
    *(("TIFF", "RGB", {"compression": c}) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg")),
    ("TIFF", "RGB", {"compression": "packbits", **animated}),
    *(("TIFF", mode, {}) for mode in ("I", "CMYK", "RGBA", "P")),
    ("TIFF", "1", {"compression": "group4"}),
    *(("PPM", mode, {}) for mode in ("RGB", "L", "1")),
    *(("JPEG2000", mode, {}) for mode in ("RGB", "RGBA", "L")),
    ("JPEG2000", "RGB", {"irreversible": True, "tile_size": (32, 32), "no_jp2": True}),
  ]
  files = [(format, encoded(pixels, mode, format, **options)) for format, mode, options in settings]
  for format in ("PNG", "TIFF", "PPM"):
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, format)
    files.append((format, buffer.getvalue()))
  buffer = io.BytesIO()
  Image.fromarray(pixels[:, :, 0].astype(np.float32) / 255).save(buffer, "TIFF")
  files.append(("TIFF", buffer.getvalue()))
  return files


class Inputs:
  """The i-th input, a pure function of (seed, i)."""

  def __init__(self, seed: int):
    self._seed, self._files = seed, real_files()

  def __call__(self, i: int) -> tuple[str, bytes]:
    """Format and content; "random" for random bytes, a quarter of them behind a real start."""
    np_rng = np.random.default_rng((self._seed, i))
    if i % 20 == 0:
      start = self._file(np_rng)[1][: np_rng.integers(40)] if np_rng.random() < 0.25 else b""
      return "random", start + np_rng.bytes(np_rng.integers(2000))
    format, data = self._file(np_rng)
    for _ in range(np_rng.choice([1, 1, 2, 4])):
      data = MUTATIONS[np_rng.integers(len(MUTATIONS))](np_rng, data, self._file(np_rng)[1])
    return format, bytes(data)

  def _file(self, np_rng: np.random.Generator) -> tuple[str, bytes]:
    return self._files[np_rng.integers(len(self._files))]


def _cut(np_rng: np.random.Generator, n: int) -> tuple[int, int]:
  a, b = sorted(np_rng.integers(0, n + 1, 2).tolist())
  return a, b


def _flip_bits(np_rng, data, other):
  bits = np.frombuffer(data, np.uint8).copy()
  where = np_rng.integers(0, max(len(bits), 1), np_rng.choice([1, 2, 8, 64]))
  if len(bits):
    bits[where] ^= (1 << np_rng.integers(0, 8, len(where))).astype(np.uint8)
  return bits.tobytes()


def _truncate(np_rng, data, other):
  return data[: np_rng.integers(len(data) + 1)]


def _splice(np_rng, data, other):
  return data[: np_rng.integers(len(data) + 1)] + other[np_rng.integers(len(other) + 1) :]


def _edit(np_rng, data, other):
  """An edge value written somewhere, mostly into the first bytes, where the headers are."""
  value = EDGES[np_rng.integers(len(EDGES))]
  at = int(np_rng.integers(0, min(len(data), 200 if np_rng.random() < 0.8 else len(data)) + 1))
  return data[:at] + value + data[at + len(value) :]


def _repeat(np_rng, data, other):
  a, b = _cut(np_rng, len(data))
  return data[:b] + data[a:b] * int(np_rng.choice([1, 2, 50])) + data[b:]


def _remove(np_rng, data, other):
  a, b = _cut(np_rng, len(data))
  return data[:a] + data[b:]


def _overwrite(np_rng, data, other):
  a, b = _cut(np_rng, len(data))
  b = min(b, a + 64)
  return data[:a] + np_rng.bytes(b - a) + data[b:]


MUTATIONS = (_flip_bits, _truncate, _splice, _edit, _repeat, _remove, _overwrite)


def judge(data: bytes, canvas: int = CANVAS) -> tuple[str, str]:
  """Outcome and detail of one input, but for crash and hang."""
  start = time.process_time()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow warns of much that is damaged
      image, extent = decode(data, canvas=canvas)
      again, _ = decode(data, canvas=canvas)
  except DamagedImage as error:
    outcome, detail = "damaged", str(error)
  except Exception as error:
    return "error", f"{type(error).__name__}: {error}"
  else:
    outcome, detail = "decoded", ""
    height, width = extent.tolist()
    inside = 1 <= height <= canvas and 1 <= width <= canvas
    if image.dtype != np.uint8 or image.shape != (canvas, canvas, 3) or not inside:
      return "invalid", f"{image.dtype} {image.shape}, extent {extent}"
    if image[height:].any() or image[:, width:].any():
      return "invalid", "pixels outside the extent"
    if (image != again).any():
      return "unstable", f"{int((image != again).sum())} values differ when decoded again"
  seconds = time.process_time() - start
  return ("slow", f"{seconds:.1f} s, {outcome}") if seconds > SLOW else (outcome, detail)


def _child(inputs: Callable, judge: Callable, first: int, end: int, connection) -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes of every fault
  connection.send("started")
  for i in range(first, end):
    data, start = inputs(i)[1], time.process_time()
    outcome, detail = judge(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_UNIT / 1024
    connection.send(Verdict(outcome, detail, time.process_time() - start, peak))


def verdicts(
  inputs: Callable[[int], tuple[str, bytes]],
  num_inputs: int,
  *,
  judge: Callable[[bytes], tuple[str, str]] = judge,
  hung: float = HUNG,
) -> Iterator[tuple[int, Verdict]]:
  """(i, verdict) of each input, from a child that is started again after a crash or hang."""
  context = multiprocessing.get_context("spawn")
  i = 0
  while i < num_inputs:
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(inputs, judge, i, num_inputs, theirs), daemon=True)
    child.start()
    theirs.close()
    ours.recv()  # however long the start takes
    ended = None
    while i < num_inputs and not ended:
      try:
        if not ours.poll(hung):
          ended = "hang", f"more than {hung:.0f} s"
          child.kill()
          continue
        verdict = ours.recv()
      except EOFError:
        child.join()
        ended = "crash", f"exit code {child.exitcode}"
        continue
      yield i, verdict
      i += 1
    child.join()
    if ended:
      yield i, Verdict(*ended, hung if ended[0] == "hang" else 0.0, 0.0)
      i += 1


def run(num_inputs: int, seed: int, keep: Path) -> list[dict[str, Any]]:
  """A row for each format, and one for all."""
  inputs, start = Inputs(seed), time.perf_counter()
  counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  slowest: dict[str, float] = collections.defaultdict(float)
  peaks: dict[str, float] = collections.defaultdict(float)
  highest = 0.0
  for i, verdict in verdicts(inputs, num_inputs):
    format, data = inputs(i)
    rise, highest = verdict.peak_mib - highest, max(highest, verdict.peak_mib)
    for name in (format, "all"):
      counts[name][verdict.outcome] += 1
      slowest[name] = max(slowest[name], verdict.seconds)
      peaks[name] = max(peaks[name], rise if i else 0.0)
    if verdict.outcome not in ("decoded", "damaged"):
      keep.mkdir(parents=True, exist_ok=True)
      (keep / f"{seed}-{i}-{verdict.outcome}.{format.lower()}").write_bytes(data)
      print(f"input {i} ({format}): {verdict.outcome}: {verdict.detail}", flush=True)
    if (i + 1) % 10_000 == 0:
      print(f"{i + 1:,} inputs, {time.perf_counter() - start:.0f} s", flush=True)
  findings = ("error", "invalid", "unstable", "slow", "crash", "hang")
  return [
    {
      "format": name,
      "inputs": sum(count.values()),
      **{outcome: count[outcome] for outcome in ("decoded", "damaged", *findings)},
      "slowest_cpu_s": round(slowest[name], 3),
      "largest_rise_mib": round(peaks[name], 1),  # of the child's peak memory, by one input
    }
    for name, count in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0]))
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--inputs", type=int, default=120_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
  options = parser.parse_args()
  from benchmarks.common import write_results  # imports JAX, which the child does not need

  write_results("fuzz", run(options.inputs, options.seed, options.keep))


if __name__ == "__main__":
  main()
