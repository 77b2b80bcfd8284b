"""The binary version of CIFAR: made here byte by byte as its authors' page says."""

import pickle

import numpy as np
import pytest

from ssrl_jax.data.decode import decode
from ssrl_jax.data.sources import open_source, read_together


def write(root, *, fine, train=(3, 2), test=2):
  """Pictures of noise, [H, W, C] each, and labels, of both splits."""
  rng, made = np.random.default_rng(0), {"train": [], "test": []}
  folder = root / ("cifar-100-binary" if fine else "cifar-10-batches-bin")
  folder.mkdir(parents=True)
  if fine:
    files = {"train.bin": ("train", sum(train)), "test.bin": ("test", test)}
  else:
    counts = [*train, 1, 1, 1]
    files = {f"data_batch_{k}.bin": ("train", n) for k, n in enumerate(counts, start=1)}
    files["test_batch.bin"] = ("test", test)
  for name, (split, count) in files.items():
    content = b""
    for _ in range(count):
      image, label = rng.integers(0, 256, (32, 32, 3), np.uint8), int(rng.integers(0, 4))
      made[split].append((image, label))
      planes = [image[:, :, c].tobytes() for c in range(3)]
      content += bytes([7, label] if fine else [label]) + b"".join(planes)
    (folder / name).write_bytes(content)
  names = "fine_label_names.txt" if fine else "batches.meta.txt"
  (folder / names).write_text("ant\nbee\ncat\ndog\n\n")
  return folder, made


@pytest.mark.parametrize("fine", [False, True])
def test_pictures_and_fine_labels_are_those_of_the_files(tmp_path, fine):
  folder, made = write(tmp_path, fine=fine)
  for path in (folder, tmp_path):
    for split in ("train", "test"):
      source = pickle.loads(pickle.dumps(open_source(f"cifar:{path}", split=split)))
      assert source.class_names == ("ant", "bee", "cat", "dog")
      assert source.labels.tolist() == [label for _, label in made[split]]
      assert len(source) == len(made[split])
      together = read_together(source, range(len(source)))
      for i, (image, label) in enumerate(made[split]):
        for example in (source[i], together[i]):
          np.testing.assert_array_equal(decode(example["image"], canvas=32)[0], image)
          assert example["label"] == label
  assert len({source.name(i) for i in range(len(source))}) == len(source)


def test_what_is_not_whole_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no cifar-10-batches-bin or cifar-100-binary"):
    open_source(f"cifar:{tmp_path}", split="train")
  folder, _ = write(tmp_path, fine=False)
  with pytest.raises(ValueError, match="has no split 'extra'"):
    open_source(f"cifar:{folder}", split="extra")
  write(tmp_path, fine=True)
  with pytest.raises(ValueError, match=r"cifar-10-batches-bin and .*cifar-100-binary; name one"):
    open_source(f"cifar:{tmp_path}", split="train")
  (folder / "batches.meta.txt").write_text("ant\n")
  with pytest.raises(ValueError, match="has label 3, of 1 names"):
    open_source(f"cifar:{folder}", split="train")
  file = folder / "data_batch_2.bin"
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"data_batch_2.bin has 6,145 bytes, no multiple of 3,073"):
    open_source(f"cifar:{folder}", split="train")
