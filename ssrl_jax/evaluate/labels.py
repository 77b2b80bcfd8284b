"""Which training labels a protocol may see: seeded shares, published lists, labels made wrong."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np

from ssrl_jax.data.sources import Source, labels_of


def choose_ids(
  source: Source,
  *,
  label_fraction: float = 1.0,
  num_per_class: int = 0,
  labels_file: str = "",
  seed: int = 0,
) -> np.ndarray:
  """Ids of the training pictures whose labels may be seen: of a file, else drawn with `seed`.

  Args:
    source: with labels; pictures without one are never chosen.
    label_fraction: see `draw`; not used with num_per_class > 0 or a file.
    num_per_class: see `draw`; 0: by fraction.
    labels_file: see `read_list`; empty: drawn.

  Returns:
    int64, ascending.
  """
  labels = labels_of(source)
  if not source.num_classes or not np.any(labels >= 0):
    raise ValueError(
      f"{source!r} has no labels to choose from; sort the pictures into one folder for each class"
    )
  if labels_file:
    ids = read_list(labels_file, source)
    unknown = ids[labels[ids] < 0]
    if len(unknown):
      raise ValueError(
        f"{labels_file} lists {len(unknown)} pictures without a label, e.g. number {unknown[0]}; "
        "remove them from the list"
      )
    return ids
  return draw(
    labels, source.num_classes, fraction=label_fraction, num_per_class=num_per_class, seed=seed
  )


def draw(
  label_N: np.ndarray,
  num_classes: int,
  *,
  fraction: float = 1.0,
  num_per_class: int = 0,
  seed: int = 0,
) -> np.ndarray:
  """Rows drawn without replacement: `num_per_class` of each class, or of each class its share.

  A draw of a larger share or number with the same seed holds a smaller one's rows.

  Args:
    label_N: -1 where unknown: never drawn.
    fraction: in (0, 1]; a class of n has round(fraction * n).
    num_per_class: 1 or more; 0: by fraction.

  Returns:
    int64, ascending.

  Raises:
    ValueError: a class would have no label, or has fewer than asked for.
  """
  if not 0 < fraction <= 1:
    raise ValueError(f"label fraction is {fraction}; expected above 0 and at most 1, e.g. 0.1")
  if num_per_class < 0:
    raise ValueError(f"num_per_class is {num_per_class}; expected 1 or more, or 0 = by fraction")
  np_rng = np.random.default_rng(seed)
  drawn = []
  for label in range(num_classes):
    rows = np_rng.permutation(np.flatnonzero(label_N == label))
    count = num_per_class or round(fraction * len(rows))
    if count > len(rows):
      raise ValueError(
        f"num_per_class is {count}, but class {label} has {len(rows)} labelled training pictures; "
        f"ask for at most {len(rows)}"
      )
    if not count:
      least = f"at least {1 / len(rows):.3g}" if len(rows) else "pictures of every class"
      raise ValueError(
        f"label fraction {fraction} leaves class {label} of {len(rows)} pictures without a label; "
        f"give {least}, or a number of each class (num_per_class; of low_label nums_per_class)"
      )
    drawn.append(rows[:count])
  return np.sort(np.concatenate(drawn))


def read_list(file: str, source: Source) -> np.ndarray:
  """Ids of the pictures that a text file names, one a line, such as SimCLR's ImageNet subsets.

  A line is a position in the source, or the end of a path: a file's name, with as many folders
  before it as make it unique.

  Raises:
    ValueError, FileNotFoundError: no such file, or a line that names no picture, several, or one
      that another line has named.
  """
  path = Path(file).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"no file {path}; labels_file names a text file, one picture a line")
  text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    raise ValueError(f"{path} is empty; expected a file name or a position on each line")
  positions = all(line.isdecimal() for line in lines)
  ids = [int(line) for line in lines] if positions else _find(lines, source, path)
  if max(ids) >= len(source):
    raise ValueError(
      f"{path} lists number {max(ids)}, but {source!r} ends at {len(source) - 1}; make the list "
      "for this source and split"
    )
  repeated = [i for i, count in collections.Counter(ids).items() if count > 1]
  if repeated:
    raise ValueError(f"{path} lists picture {repeated[0]} more than once; remove the repeats")
  return np.sort(np.asarray(ids, np.int64))


def _find(lines: list[str], source: Source, path: Path) -> list[int]:
  by_name: dict[str, list[tuple[str, int]]] = {}
  for i in range(len(source)):
    image = source[i]["image"]
    if not isinstance(image, str):
      raise ValueError(
        f"{path} lists file names, and {source!r} has none; list positions from 0 to "
        f"{len(source) - 1} instead"
      )
    image = image.replace("\\", "/")
    by_name.setdefault(image.rsplit("/", 1)[-1], []).append((f"/{image}", i))
  found = []
  for line in lines:
    candidates = by_name.get(line.rsplit("/", 1)[-1], [])
    matches = [i for image, i in candidates if image.endswith(f"/{line.lstrip('/')}")]
    if len(matches) != 1:
      fix = "add its folder, as in class/name.jpg" if matches else "correct the list or the split"
      raise ValueError(f"{path}: {len(matches)} pictures of {source!r} are named {line}; {fix}")
    found.append(matches[0])
  return found


def symmetric_noise(label_N: np.ndarray, num_classes: int, *, rate: float, seed: int) -> np.ndarray:
  """The labels, of which round(rate * N), drawn with `seed`, become any OTHER class.

  Some papers draw from all classes, which leaves one in K of these labels right.

  Args:
    label_N: all known.
    rate: in [0, 1).
  """
  if not 0 <= rate < 1:
    raise ValueError(f"label_noise is {rate}; expected 0 or more and below 1, e.g. 0.4")
  if rate and num_classes < 2:
    raise ValueError(f"label noise needs another class, and num_classes is {num_classes}")
  np_rng = np.random.default_rng(seed)
  rows = np_rng.permutation(len(label_N))[: round(rate * len(label_N))]
  noisy_N = np.array(label_N)
  noisy_N[rows] = (noisy_N[rows] + np_rng.integers(1, max(num_classes, 2), len(rows))) % num_classes
  return noisy_N
