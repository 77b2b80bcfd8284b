"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """A file to write, which becomes `path` once it is whole; else nothing of it is left.

  Raises:
    OSError: names `path`.
  """
  # Of this process: another may write the same file.
  partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.partial")
  try:
    yield partial
    os.replace(partial, path)
  except OSError as error:
    if error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
  with whole(path) as partial:
    partial.write_text(text, encoding="utf-8")


def printable(name: str) -> str:
  r"""A file's name whose bytes are not UTF-8 with these as \\xe9, so that it can be shown."""
  return os.fsencode(name).decode(errors="backslashreplace")


def check_folder(path: Path, flag: str) -> None:
  """Refuses a path that is no folder and cannot become one, as something else lies there.

  Raises:
    NotADirectoryError: names what lies there, and the flag that named the path.
  """
  there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
  if not there.is_dir():
    kind = "a file" if there.exists() else "a link that leads nowhere"
    raise NotADirectoryError(f"{flag}={path}: {there} is {kind}, no folder; name a folder")


def check_outside(out: Path, source: str, flag: str) -> None:
  """Refuses a place among the pictures of `folder:PATH` or `clips:PATH`, which it would join.

  Raises:
    ValueError: names both.
  """
  kind, _, path = source.partition(":")
  if kind in ("folder", "clips"):
    root, place = Path(path).expanduser().resolve(), out.resolve()
    if place == root or root in place.parents:
      raise ValueError(f"{flag}={out} lies among the pictures of {source}; name a place elsewhere")


def read_json(path: Path) -> Any:
  """Raises ValueError, which names the file, if it is none."""
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); remove it, or bring it back") from error


def write_json(path: Path, value: Any) -> None:
  write_whole(path, json.dumps(value, indent=2) + "\n")
