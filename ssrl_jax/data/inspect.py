"""python -m ssrl_jax.data.inspect --source=SOURCE [--split=train] [--out=DIR] [--limit=N]

Reads every picture of a source and says what is there: sizes, formats, what is damaged or there
twice, how even the classes are, mean and standard deviation. With --out also as inspect.json, and
sheet.png to look at. Of a clip the middle frame is read.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import hashlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ssrl_jax.command_line import exit_with_one_line, print_line
from ssrl_jax.data.contact_sheet import contact_sheet
from ssrl_jax.data.decode import FORMATS, DamagedImage, Picture, decode_pixels, read_file
from ssrl_jax.data.listing import HELD_OUT
from ssrl_jax.data.sources import Source, labels_of, open_source
from ssrl_jax.files import check_outside, write_json

LONGER = 512  # pixels, to which larger pictures are shrunk for mean and std
QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent
LISTED = 10  # examples of a finding in the text; inspect.json has all


class Facts(NamedTuple):
  """Of one picture."""

  digest: bytes  # of its bytes
  damage: str = ""  # why it cannot be read; then there is nothing below
  num_bytes: int = 0
  format: str = ""
  mode: str = ""
  width: int = 0  # as stored, before it is turned upright
  height: int = 0
  moments: tuple[np.ndarray, np.ndarray] | None = None  # float64 [3]: means of x and of x * x


def inspect(source: Source, other: Source | None, *, workers: int) -> dict[str, Any]:
  """What inspect.json holds.

  Args:
    source: every example is read.
    other: its other split, whose bytes are compared; None: there is none.
    workers: threads.
  """
  facts = _each(functools.partial(_facts, source), len(source), workers)
  good = [f for f in facts if not f.damage]
  labels = labels_of(source)
  found = {
    "source": repr(source),
    "examples": len(source),
    "damaged": _damaged(source, facts),
    "formats": _counts(f.format for f in good),
    "modes": _counts(f.mode for f in good),
    **_quantiles(good),
    "classes": {n: int(np.sum(labels == k)) for k, n in enumerate(source.class_names)},
    "unlabelled": int(np.sum(labels < 0)),
    "duplicates": _duplicates(source, labels, facts),
    "other_split": None,
    "mean": None,
    "std": None,
  }
  if other is not None:
    found["other_split"] = _across(source, other, facts, workers)
  if good:
    mean, square = (np.mean([f.moments[k] for f in good], axis=0) / 255 ** (k + 1) for k in (0, 1))
    found |= {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist()}
  return found


def _each(f: Callable[[int], Any], n: int, workers: int) -> list[Any]:
  bar = functools.partial(tqdm, total=n, unit=" pictures", disable=None)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    # In runs, so that the threads hand each other fewer things.
    runs = [range(k, min(k + 64, n)) for k in range(0, n, 64)]
    done = pool.map(lambda run: [f(i) for i in run], runs)
    return list(bar(result for run in done for result in run))


def _facts(source: Source, i: int) -> Facts:
  try:
    picture = _stored(source[i]["image"])
  except DamagedImage as error:
    return Facts(b"", str(error))
  digest = _digest(picture) if len(picture) else b""  # empty files are no copies of each other
  try:
    pixels = decode_pixels(picture, LONGER)
  except DamagedImage as error:
    return Facts(digest, str(error))
  counts = np.array(Image.fromarray(pixels).histogram(), np.float64).reshape(3, 256)
  levels, num_pixels = np.arange(256.0), counts[0].sum()
  moments = counts @ levels / num_pixels, counts @ levels**2 / num_pixels
  if isinstance(picture, np.ndarray):
    height, width = picture.shape[:2]
    kind = ("array", f"{picture.dtype} x {picture.shape[2] if picture.ndim > 2 else 1}")
    return Facts(digest, "", picture.nbytes, *kind, width, height, moments)
  with Image.open(io.BytesIO(picture), formats=FORMATS) as im:
    return Facts(digest, "", len(picture), im.format, im.mode, *im.size, moments)


def _stored(picture: Picture) -> bytes | np.ndarray:
  return picture if isinstance(picture, bytes | np.ndarray) else read_file(picture)


def _digest(picture: bytes | np.ndarray) -> bytes:
  return hashlib.blake2b(picture, digest_size=16).digest()


def _damaged(source: Source, facts: list[Facts]) -> list[dict[str, str]]:
  damaged = [i for i, f in enumerate(facts) if f.damage]
  return [{"name": source.name(i), "reason": facts[i].damage} for i in damaged]


def _counts(values: Iterable[str]) -> dict[str, int]:
  return dict(collections.Counter(values).most_common())


def _quantiles(good: list[Facts]) -> dict[str, dict[str, int]]:
  """{"width": {"0": ..., "50": ..., "100": ...}, ...}, percent of the pictures."""
  columns = {
    "width": [f.width for f in good],
    "height": [f.height for f in good],
    "shorter_side": [min(f.width, f.height) for f in good],
    "bytes": [f.num_bytes for f in good],
  }
  return {
    name: {str(q): int(np.percentile(v, q, method="nearest")) for q in QUANTILES} if v else {}
    for name, v in columns.items()
  }


def _duplicates(source: Source, labels: np.ndarray, facts: list[Facts]) -> dict[str, Any]:
  groups = collections.defaultdict(list)
  for i, f in enumerate(facts):
    if f.digest:
      groups[f.digest].append(i)
  twice = [group for group in groups.values() if len(group) > 1]
  return {
    "superfluous": sum(len(group) - 1 for group in twice),
    "under_several_classes": sum(len(set(labels[group].tolist())) > 1 for group in twice),
    "groups": [[source.name(i) for i in group] for group in twice],
  }


def _across(source: Source, other: Source, facts: list[Facts], workers: int) -> dict[str, Any]:
  place = {f.digest: i for i, f in enumerate(facts) if f.digest}

  def digest(i: int) -> bytes:
    try:
      return _digest(_stored(other[i]["image"]))
    except DamagedImage:
      return b""

  digests = _each(digest, len(other), workers)
  shared = [(i, place[d]) for i, d in enumerate(digests) if d in place]
  return {
    "source": repr(other),
    "examples": len(other),
    "also_here": len(shared),
    "pairs": [[other.name(i), source.name(j)] for i, j in shared],
  }


def describe(found: dict[str, Any]) -> list[str]:
  """Lines for a reader who has never seen the set."""
  damaged, twice, classes = found["damaged"], found["duplicates"], found["classes"]
  lines = [
    found["source"],
    f"{found['examples']:,} pictures, {len(damaged):,} of them cannot be read",
    *_some(f"{d['name']!r}: {d['reason']}" for d in damaged),
    f"formats        {_list(found['formats'])}",
    f"pixel modes    {_list(found['modes'])}",
    "               " + "".join(f"{_percent(q):>12}" for q in QUANTILES),
  ]
  for name in ("width", "height", "shorter_side", "bytes"):
    lines.append(f"{name:15}" + "".join(f"{v:12,}" for v in found[name].values()))
  if classes:
    sizes = sorted(classes.items(), key=lambda item: item[1])
    (least, few), (most, many) = sizes[0], sizes[-1]
    ratio = f", {many / few:.3g} times as many" if few else ""
    lines.append(
      f"{len(classes)} classes, of {few:,} ({least!r}) to {many:,} ({most!r}) pictures{ratio}; "
      f"{found['unlabelled']:,} pictures without a class"
    )
  else:
    lines.append("no classes: nothing is labelled")
  lines.append(
    f"{twice['superfluous']:,} pictures are exact copies of another; "
    f"{twice['under_several_classes']:,} pictures are there under several classes"
  )
  lines += _some(" = ".join(map(repr, group)) for group in twice["groups"])
  other = found["other_split"]
  if other:
    lines.append(
      f"{other['also_here']:,} of {other['examples']:,} in {other['source']} are here too"
    )
    lines += _some(f"{there!r} = {here!r}" for there, here in other["pairs"])
  else:
    lines.append("no other split to compare with")
  if found["mean"]:
    lines.append("mean and standard deviation, every picture counting the same; for a recipe:")
    lines += [
      f"  c.data.{k} = ({', '.join(f'{v:.4f}' for v in found[k])})" for k in ("mean", "std")
    ]
  return lines


def _some(lines: Iterable[str]) -> list[str]:
  lines = [f"  {line}" for line in lines]
  more = [f"  and {len(lines) - LISTED:,} more"] if len(lines) > LISTED else []
  return lines[:LISTED] + more


def _list(counts: dict[str, int]) -> str:
  return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def _percent(q: int) -> str:
  return {0: "smallest", 50: "median", 100: "largest"}.get(q, f"{q} %")


def _other_split(args: argparse.Namespace) -> Source | None:
  """The held-out part of train, or train for any other."""
  other = HELD_OUT[0] if args.split.startswith("train") else "train"
  try:
    return open_source(args.source, split=other, data_dir=args.data_dir)
  except (ValueError, FileNotFoundError) as error:
    if "has no split" not in str(error):
      logging.warning("split %r is not compared with: %s", other, error)
    return None


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser("python -m ssrl_jax.data.inspect", allow_abbrev=False)
  parser.add_argument("--source", required=True, help="as data.source, e.g. folder:PATH")
  parser.add_argument("--split", default="train", help="default: train")
  parser.add_argument("--out", default="", help="folder for inspect.json and sheet.png")
  parser.add_argument("--limit", type=int, default=0, help="so many examples, drawn; 0 = all")
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
  parser.add_argument("--data_dir", default="", help="of tfds: sets")
  parser.add_argument("--traceback", action="store_true", help="on an error, show where it arose")
  return parser.parse_args(argv)


def main(argv: list[str]) -> int:
  args = parse(argv)
  if args.workers < 1:
    raise ValueError(f"--workers is {args.workers}; expected at least 1")
  out = Path(args.out).expanduser()
  if args.out:
    check_outside(out, args.source, "--out")
  source = open_source(args.source, split=args.split, data_dir=args.data_dir, limit=args.limit)
  found = inspect(source, _other_split(args), workers=args.workers)
  for line in describe(found):
    print_line(line)
  if args.out:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inspect.json", found)
    contact_sheet(source).save(out / "sheet.png")
    print_line(f"all of it in {out / 'inspect.json'}; pictures to look at in {out / 'sheet.png'}")
  return 0


def cli(argv: list[str]) -> int:
  logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
  return exit_with_one_line(lambda: main(argv), show_traceback=lambda: "--traceback" in argv)


if __name__ == "__main__":
  sys.exit(cli(sys.argv[1:]))
