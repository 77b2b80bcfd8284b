"""Prepared TensorFlow Datasets sets, read without TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ssrl_jax.data.listing import choose_columns, describe, find_split


class TfdsSource:
  """A split of a prepared TFDS set in ArrayRecord format, pictures still encoded."""

  def __init__(self, name: str, *, split: str, data_dir: str = ""):
    import tensorflow_datasets as tfds

    self._reopen = functools.partial(TfdsSource, name, split=split, data_dir=data_dir)
    builder = _prepared_builder(name, data_dir)
    split = find_split(split, tuple(builder.info.splits), where=f"tfds:{name}")
    features = builder.info.features
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    self._image, self._label = choose_columns(
      images, labels, known=sorted(features), where=f"tfds:{name}"
    )
    decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())
    self._records = builder.as_data_source(split=split, decoders=decoders)
    self._name = f"{builder.info.full_name}, split={split!r}"
    label = features[self._label] if self._label else None
    self.num_classes = getattr(label, "num_classes", None)
    names = label.names if self.num_classes and label.names else range(self.num_classes or 0)
    self.class_names = tuple(str(n) for n in names)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._example(self._records[i])

  def read_together(self, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    return dict(zip(positions, map(self._example, self._records.__getitems__(positions))))

  def _example(self, record: dict[str, Any]) -> dict[str, Any]:
    return {"image": record[self._image], "label": int(record[self._label]) if self._label else -1}

  def name(self, i: int) -> str:
    return f"example {i}"

  def __reduce__(self):
    return self._reopen, ()  # TFDS' own objects pickle for some builders only

  def __repr__(self) -> str:
    return f"TfdsSource({self._name}, {describe(self)})"


def _prepared_builder(name: str, data_dir: str):
  """The TFDS builder, or an error at once: TFDS itself would first try to download for minutes."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError as e:
    raise ValueError(_unknown_tfds(name, tfds)) from e
  except AssertionError as e:  # TFDS' way to refuse a version
    raise ValueError(str(e)) from e
  option = f" --data_dir={data_dir}" if data_dir else ""
  prepare = f"python -m ssrl_jax.data.prepare_tfds {name}{option}"
  if not builder.is_prepared():
    raise FileNotFoundError(
      f"tfds:{name} is not prepared in {builder.data_path}. Prepare it once, with TensorFlow: "
      f"pip install -e '.[prepare]' && {prepare}"
    )
  formats = sorted(f.value for f in builder.info.available_file_formats())
  if "array_record" not in formats:
    raise ValueError(
      f"tfds:{name} in {builder.data_path} is prepared as {', '.join(formats)}, without random "
      "access; prepare it as array_record in another folder:\n"
      f"  python -m ssrl_jax.data.prepare_tfds {name} --data_dir=ANOTHER_FOLDER"
    )
  return builder


def _unknown_tfds(name: str, tfds) -> str:
  import difflib

  base = name.partition("/")[0].partition(":")[0]
  known = tfds.list_builders(with_community_datasets=False)
  near = difflib.get_close_matches(base, known, n=3)
  hint = f"; nearest: {', '.join(near)}" if near else ""
  return f"TensorFlow Datasets has no data set {base!r}{hint}"
