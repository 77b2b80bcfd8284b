"""Other loaders over the same folder of JPEGs: run by benchmarks/data.py in their own environments.

python benchmarks/peers.py torch|tensorflow FOLDER CANVAS VIEWS SECONDS

Prints pictures a second of processor time: shuffled batches of 64, one thread. VIEWS 0: the picture
shrunk to the canvas; else so many random crops of it. Imports nothing of ssrl_jax.
"""

import json
import sys
import time
from pathlib import Path


def torch_batches(paths, canvas, views):
  import numpy as np
  import torch
  from PIL import Image

  torch.set_num_threads(1)
  rng = np.random.default_rng(0)

  def crop(im):
    """A random part of 8 to 100 % of the area, as most recipes take it."""
    area, ratio = rng.uniform(0.08, 1) * im.width * im.height, rng.uniform(3 / 4, 4 / 3)
    w, h = min(im.width, (area * ratio) ** 0.5), min(im.height, (area / ratio) ** 0.5)
    x, y = rng.uniform(0, im.width - w), rng.uniform(0, im.height - h)
    view = im.resize((canvas, canvas), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return torch.from_numpy(np.array(view))

  class Files(torch.utils.data.Dataset):
    def __len__(self):
      return len(paths)

    def __getitem__(self, i):
      im = Image.open(paths[i]).convert("RGB")
      if views:
        return torch.stack([crop(im) for _ in range(views)])
      scale = canvas / max(im.size)
      size = (round(im.width * scale), round(im.height * scale))
      return torch.from_numpy(np.array(im.resize(size, Image.Resampling.BICUBIC)))

  while True:
    yield from torch.utils.data.DataLoader(Files(), batch_size=64, shuffle=True, drop_last=True)


def tensorflow_batches(paths, canvas, views):
  import tensorflow as tf

  tf.config.threading.set_intra_op_parallelism_threads(1)
  tf.config.threading.set_inter_op_parallelism_threads(1)
  assert not views

  def read(path):
    pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    pixels = tf.image.resize(
      pixels, (canvas, canvas), "bicubic", preserve_aspect_ratio=True, antialias=True
    )
    return tf.saturate_cast(tf.round(pixels), tf.uint8)

  dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
  dataset = dataset.map(read, num_parallel_calls=1).batch(64, drop_remainder=True)
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  yield from dataset.with_options(options)


def main():
  name, folder, canvas, views, seconds = sys.argv[1:]
  paths = [str(p) for p in sorted(Path(folder).iterdir())] * 20
  make = {"torch": torch_batches, "tensorflow": tensorflow_batches}[name]
  batches = make(paths, int(canvas), int(views))
  next(batches)
  start, count = time.process_time(), 0
  while count < 128 or time.process_time() - start < float(seconds):
    next(batches)
    count += 64
  print(json.dumps(count / (time.process_time() - start)))


if __name__ == "__main__":
  main()
