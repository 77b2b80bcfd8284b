"""Listings of folders and archives, kept between runs in the user's cache folder.

$XDG_CACHE_HOME/ssrl_jax (~/.cache/ssrl_jax), a file for each listed path. Nothing depends on it: a
file that is missing, damaged or not ours is ignored, and the folder may be deleted at any time.
Whether a listing still holds is for the caller to check.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

# Times of files stand still for some milliseconds (on some file systems for 2 seconds): what
# changed so shortly before it was listed may change again without a trace.
SETTLED_NS = 3_000_000_000

VERSION = b"ssrl_jax 2\n"  # raised when the arrays change their meaning


class Names:
  """Byte strings in one: a million are sent to a worker, or kept in a file, in no time."""

  def __init__(self, joined: bytes, ends: np.ndarray):
    self._joined, self._ends = joined, ends

  @classmethod
  def pack(cls, names: Sequence[bytes]) -> Names:
    return cls(b"".join(names), np.cumsum([len(n) for n in names], dtype=np.int64))

  @classmethod
  def from_arrays(cls, arrays: Arrays, key: str) -> Names:
    return cls(arrays[key].tobytes(), arrays[f"{key}_ends"])

  def arrays(self, key: str) -> Arrays:
    return {key: np.frombuffer(self._joined, np.uint8), f"{key}_ends": self._ends}

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, i: int) -> bytes:
    return self._joined[self._ends[i - 1] if i else 0 : self._ends[i]]

  def tolist(self) -> list[bytes]:
    ends = self._ends.tolist()
    return [self._joined[a:b] for a, b in zip([0, *ends], ends)]


def load(kind: str, path: str) -> Arrays | None:
  """What was saved for this path; None if nothing was, or something else than was saved."""
  try:
    content = _file(kind, path).read_bytes()
  except OSError:
    return None
  start = len(_header(b""))
  if content[:start] != _header(content[start:]):
    return None
  with np.load(io.BytesIO(content[start:]), allow_pickle=False) as arrays:
    found = {key: arrays[key] for key in arrays.files}
  return found if found.pop("path").tobytes() == os.fsencode(path) else None


def stamp(status: os.stat_result) -> tuple[int, int, int, int]:
  """Changes whenever a file or a folder's entries do, even if its times are set back.

  Of 64 bits each, without a sign: times before 1970 are large numbers.
  """
  words = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
  return tuple(word % 2**64 for word in words)


def save(kind: str, path: str, arrays: Arrays, *, stamps: np.ndarray, now: int) -> None:
  """Keeps the arrays and stamps, whole or not at all: then the next run lists anew.

  Args:
    stamps: uint64 [n, 4], of everything that was listed.
    now: when they were taken, in nanoseconds; what had changed shortly before is not kept.
  """
  if stamps[:, 2:].astype(np.int64).max() > now - SETTLED_NS:
    return
  file, body = _file(kind, path), io.BytesIO()
  arrays = arrays | {"path": np.frombuffer(os.fsencode(path), np.uint8), "stamps": stamps}
  np.savez(body, **arrays)
  _write(file, body.getvalue())


def _write(file: Path, body: bytes) -> None:
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
      with os.fdopen(handle, "wb") as stream:
        stream.write(_header(body) + body)
      os.replace(partial, file)
    except OSError:
      os.unlink(partial)
      raise
  except OSError as error:
    logging.warning("a listing is not kept in %s: %s", file.parent, error)


def _header(body: bytes) -> bytes:
  return VERSION + hashlib.sha256(body).digest()


def _file(kind: str, path: str) -> Path:
  root = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(root):  # the XDG specification: a relative one is to be ignored
    root = os.path.expanduser("~/.cache")
  digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
  return Path(root) / "ssrl_jax" / f"{kind}-{digest}"
