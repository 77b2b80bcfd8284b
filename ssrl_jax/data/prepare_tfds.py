"""Prepares a TensorFlow Datasets set once, as ArrayRecord, so that training reads it without TF.

  python -m ssrl_jax.data.prepare_tfds cifar10 --data_dir=DIR

Needs TensorFlow (`pip install -e '.[prepare]'`); nothing else in the package imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m ssrl_jax.data.prepare_tfds", description=__doc__)
  parser.add_argument("name", help="as in tfds:NAME, e.g. cifar10 or NAME/CONFIG:VERSION")
  parser.add_argument("--data_dir", help="folder of the prepared sets; default: that of TFDS")
  args = parser.parse_args(argv)
  try:
    import tensorflow  # noqa: F401
  except ImportError:
    raise SystemExit("preparing a TFDS set needs TensorFlow: pip install -e '.[prepare]'") from None
  import tensorflow_datasets as tfds

  builder = tfds.builder(args.name, data_dir=args.data_dir, file_format="array_record")
  builder.download_and_prepare()
  # TFDS keeps what is already there, in whatever format.
  if "array_record" not in {f.value for f in builder.info.available_file_formats()}:
    raise SystemExit(
      f"{builder.data_path} was prepared before in another format; give another --data_dir"
    )
  sizes = ", ".join(f"{name} {s.num_examples}" for name, s in builder.info.splits.items())
  print(f"tfds:{args.name} is ready in {builder.data_path}: {sizes}")


if __name__ == "__main__":
  main()
