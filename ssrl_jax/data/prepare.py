"""python -m ssrl_jax.data.prepare --source=SOURCE --split=train --out=DIR [--shorter_side=N]

Writes any source as sharded ArrayRecord into DIR/SPLIT, for --config.data.source=arrayrecord:DIR.
Pictures stay the bytes they were, or are made smaller; those that cannot be read are left out and
listed. Killed, the same command goes on behind the last finished shard.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from ssrl_jax.command_line import exit_with_one_line, print_line
from ssrl_jax.data.arrayrecord import ENDING, INDEX, MANIFEST, encode_record
from ssrl_jax.data.decode import FORMATS, DamagedImage, Picture, decode_pixels, read_file
from ssrl_jax.data.sources import Source, open_source
from ssrl_jax.files import check_outside

OPTIONS = "options.json"
EXAMPLES_A_SHARD, MAX_SHARDS = 2048, 512  # unless --shards says otherwise; readers keep shards open
CHECK_SIDE = 32  # pixels; a picture is read to its end at any size, and fastest at a small one
QUALITY = 95  # of JPEG, unless --quality says otherwise


class Record(NamedTuple):
  """What became of one example."""

  data: bytes  # empty: refused
  label: int
  refused: dict[str, str]  # name and reason, or nothing


def prepare(
  source: Source, out: Path, *, shorter_side: int, quality: int, shards: int, workers: int
) -> dict[str, Any]:
  """Writes what is missing of the set in `out`, and returns its manifest.

  Args:
    source: what to write, in its order.
    out: the folder of this split.
    shorter_side: pixels; larger pictures are re-encoded to it as JPEG; 0: all bytes stay.
    quality: of that JPEG, 1 to 100.
    shards: number of files.
    workers: threads that read, check and re-encode.

  Raises:
    ValueError: the folder holds or is getting another set, or no picture can be read.
  """
  options = {
    "source": repr(source), "shorter_side": shorter_side, "quality": quality, "shards": shards
  }  # fmt: skip
  out.mkdir(parents=True, exist_ok=True)
  with _alone(out):
    _check_options(out, options)
    if (out / MANIFEST).exists():
      return _finish(out)
    ends = [len(source) * (k + 1) // shards for k in range(shards)]
    names = [f"{k:05d}-of-{shards:05d}{ENDING}" for k in range(shards)]
    convert = functools.partial(_convert, source, shorter_side=shorter_side, quality=quality)
    bar = tqdm(total=len(source), unit=" pictures", disable=None, smoothing=0.05)
    with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
      for name, start, end in zip(names, [0, *ends], ends):
        if not (out / name).exists():
          records = _in_order(pool, convert, range(start, end), ahead=4 * workers)
          _write_shard(out / name, start, (_counted(bar, record) for record in records))
        else:
          bar.update(end - start)
    _write_index(out, names)
    _write_manifest(out, names, source, options)
    return _finish(out)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
  """Two that write into one folder would mix their shards; the kernel ends this lock with us."""
  with (out / ".lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"another prepare is at work in {out}; wait for it") from None
    yield


def _check_options(out: Path, options: dict[str, Any]) -> None:
  path = out / OPTIONS
  if not path.exists():
    if any(out.glob(f"*{ENDING}")):
      raise ValueError(f"{out} has {ENDING} files of another origin; choose another --out")
    _write_json(path, options)
  old = json.loads(path.read_text())
  changed = [f"{k}: {old[k]} -> {v}" for k, v in options.items() if old[k] != v]
  if changed:
    raise ValueError(f"{out} holds another set ({'; '.join(changed)}); choose another --out")


def _in_order(
  pool: concurrent.futures.Executor, convert: Callable[[int], Record], ids: range, *, ahead: int
) -> Iterator[Record]:
  """convert(i) of each id, at most `ahead` of them at a time in memory."""
  waiting = collections.deque()
  for i in ids:
    waiting.append(pool.submit(convert, i))
    if len(waiting) > ahead:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


def _counted(bar: tqdm, record: Record) -> Record:
  bar.update()
  return record


def _convert(source: Source, i: int, *, shorter_side: int, quality: int) -> Record:
  try:
    example = source[i]
    clip = "frames" in example
    frames = example["frames"] if clip else (example["image"],)
    pictures = [_encode(frame, shorter_side, quality) for frame in frames]
    data = encode_record(source.name(i), example["label"], pictures, clip)
    return Record(data, example["label"], {})
  except DamagedImage as error:
    return Record(b"", -1, {"name": source.name(i), "reason": str(error)})


def _encode(picture: Picture, shorter_side: int, quality: int) -> bytes:
  """The bytes of a picture that can be read, made smaller if they are to be."""
  if isinstance(picture, np.ndarray):
    pixels = decode_pixels(picture, max(picture.shape[:2], default=1))
    picture = _compress(pixels, format="PNG")
  elif not isinstance(picture, bytes):
    picture = read_file(picture)
  decode_pixels(picture, CHECK_SIDE)
  if shorter_side:
    with Image.open(io.BytesIO(picture), formats=FORMATS) as im:
      shorter, longer = sorted(im.size)
    if shorter > shorter_side:
      pixels = decode_pixels(picture, round(longer * shorter_side / shorter))
      picture = _compress(pixels, format="JPEG", quality=quality)
  return picture


def _compress(pixels: np.ndarray, **options: Any) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, **options)
  return file.getvalue()


def _write_shard(path: Path, start: int, records: Iterator[Record]) -> None:
  """The shard appears whole, and after the facts beside it: where it is, both are."""
  partial = path.with_name(path.name + ".partial")
  rows, refused = [], []
  writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
  try:
    for i, record in enumerate(records, start):
      if record.refused:
        refused.append({"position": i, **record.refused})
      else:
        writer.write(record.data)
        rows.append((i, record.label, len(record.data)))
    writer.close()
  except RuntimeError as error:  # of the writer: a full disk, for one
    raise OSError(f"{partial} could not be written ({error}); the same command goes on") from error
  with partial.open("rb+") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.fsync(file.fileno())
  facts = {
    "file": path.name, "examples": len(rows), "bytes": partial.stat().st_size, "sha256": digest,
    "refused": refused, "rows": rows,
  }  # fmt: skip
  _write_json(path.with_suffix(".json"), facts)
  os.replace(partial, path)


def _write_index(out: Path, names: list[str]) -> None:
  rows = [row for name in names for row in _facts(out / name)["rows"]]
  if not rows:
    raise ValueError(
      f"no picture of the source can be read; {out} has the reasons in *.json: remove it when they "
      "are repaired"
    )
  id_N, label_N, size_N = np.array(rows, np.int64).T
  partial = out / f"{INDEX}.partial"
  with partial.open("wb") as file:
    np.savez(file, id=id_N, label=label_N.astype(np.int32), bytes=size_N)
  os.replace(partial, out / INDEX)


def _write_manifest(out: Path, names: list[str], source: Source, options: dict[str, Any]) -> None:
  facts = [_facts(out / name) for name in names]
  shards = [{k: f[k] for k in ("file", "examples", "bytes", "sha256")} for f in facts]
  refused = [example for f in facts for example in f["refused"]]
  digests = "".join(shard["sha256"] for shard in shards)
  manifest = {
    "examples": sum(shard["examples"] for shard in shards),
    "refused_examples": len(refused),
    "bytes": sum(shard["bytes"] for shard in shards),
    "sha256": hashlib.sha256(digests.encode()).hexdigest(),  # of those of the shards, in order
    "num_classes": source.num_classes,
    "class_names": list(source.class_names),
    "options": options,
    "shards": shards,
    "refused": refused,
  }
  _write_json(out / MANIFEST, manifest)


def _finish(out: Path) -> dict[str, Any]:
  """The manifest has the facts of all shards: those of each are no longer needed."""
  manifest = json.loads((out / MANIFEST).read_text())
  for shard in manifest["shards"]:
    (out / shard["file"]).with_suffix(".json").unlink(missing_ok=True)
  return manifest


def _facts(shard: Path) -> dict[str, Any]:
  return json.loads(shard.with_suffix(".json").read_text())


def _write_json(path: Path, value: Any) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(value, indent=None if "rows" in value else 2) + "\n")
  os.replace(partial, path)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser("python -m ssrl_jax.data.prepare", allow_abbrev=False)
  parser.add_argument("--source", required=True, help="as data.source, e.g. folder:PATH")
  parser.add_argument("--split", default="train", help="of the source; default: train")
  parser.add_argument("--out", required=True, help="the set's folder; this split goes to OUT/SPLIT")
  parser.add_argument("--shorter_side", type=int, default=0, help="pixels; 0 = bytes stay as is")
  parser.add_argument("--quality", type=int, default=QUALITY, help="of JPEGs made smaller, 1-100")
  parser.add_argument("--shards", type=int, default=0, help=f"0 = one for {EXAMPLES_A_SHARD:,}")
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
  parser.add_argument("--data_dir", default="", help="of tfds: sets")
  parser.add_argument("--limit", type=int, default=0, help="so many examples, drawn; 0 = all")
  parser.add_argument("--traceback", action="store_true", help="on an error, show where it arose")
  return parser.parse_args(argv)


def main(argv: list[str]) -> int:
  args = parse(argv)
  for name, least, most in (
    ("shorter_side", 0, 65_500), ("quality", 1, 100), ("shards", 0, 99_999), ("workers", 1, 1024)
  ):  # fmt: skip
    if not least <= getattr(args, name) <= most:
      raise ValueError(f"--{name} is {getattr(args, name)}; expected {least} to {most}")
  folder = Path(args.out).expanduser()
  check_outside(folder, args.source, "--out")
  source = open_source(args.source, split=args.split, data_dir=args.data_dir, limit=args.limit)
  if args.shards > len(source):
    raise ValueError(f"--shards is {args.shards}, but there are {len(source)} examples; lower it")
  out = folder / args.split.partition("[")[0]
  manifest = prepare(
    source,
    out,
    shorter_side=args.shorter_side,
    quality=args.quality,
    shards=args.shards or min(MAX_SHARDS, -(-len(source) // EXAMPLES_A_SHARD)),
    workers=args.workers,
  )
  print_line(
    f"{out}: {manifest['examples']:,} of {len(source):,} examples in {len(manifest['shards'])} "
    f"shards, {manifest['bytes'] / 2**20:,.1f} MiB; read them with "
    f"--config.data.source=arrayrecord:{folder}"
  )
  refused = manifest["refused"]
  for example in refused[:5]:
    print_line(f"  refused {example['name']!r}: {example['reason']}")
  if len(refused) > 5:
    print_line(f"  and {len(refused) - 5} more, all in {out / MANIFEST}")
  return 0


def cli(argv: list[str]) -> int:
  logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
  return exit_with_one_line(lambda: main(argv), show_traceback=lambda: "--traceback" in argv)


if __name__ == "__main__":
  sys.exit(cli(sys.argv[1:]))
