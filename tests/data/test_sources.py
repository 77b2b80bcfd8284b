import os
import pathlib
import pickle
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ssrl_jax.data import prepare_tfds
from ssrl_jax.data.decode import decode
from ssrl_jax.data.folders import FolderSource
from ssrl_jax.data.listing import EXTENSIONS, choose_columns, find_split
from ssrl_jax.data.sources import (
  Subset,
  check_frames,
  check_same_classes,
  labels_of,
  open_source,
)


def put(path, value=0):
  """A picture whose grey level says which one it is."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 6), (value, value, value)).save(path, format="PNG")


def contents(source, root):
  examples = (source[i] for i in range(len(source)))
  return [(os.path.relpath(e["image"], root), e["label"]) for e in examples]


def test_folder_of_classes_is_labelled_in_sorted_order(tmp_path):
  for name in ("dog/b.png", "cat/deep/er/z.PNG", "cat/a.JPeG", "dog/.hidden.png", ".git/x.png"):
    put(tmp_path / "train" / name)
  (tmp_path / "train" / "dog" / "notes.txt").write_text("no picture")
  (tmp_path / "train" / "empty").mkdir()
  put(tmp_path / "test" / "cat" / "t.png")
  source = open_source(f"folder:{tmp_path}", split="train")
  assert source.class_names == ("cat", "dog")
  assert source.num_classes == 2
  want = [("cat/a.JPeG", 0), ("cat/deep/er/z.PNG", 0), ("dog/b.png", 1)]
  assert contents(source, tmp_path / "train") == want


def test_folder_order_is_that_of_names_not_of_the_file_system(tmp_path, monkeypatch):
  for name in ("c", "a", "b"):
    put(tmp_path / f"{name}.png")
  scandir = os.scandir

  class Reversed:
    def __init__(self, path):
      with scandir(path) as entries:
        self._entries = sorted(entries, key=lambda e: e.name, reverse=True)

    def __enter__(self):
      return self._entries

    def __exit__(self, *_):
      pass

  plain = contents(FolderSource(str(tmp_path), split="train"), tmp_path)
  monkeypatch.setattr(os, "scandir", Reversed)
  assert contents(FolderSource(str(tmp_path), split="train"), tmp_path) == plain
  assert [name for name, _ in plain] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("a.png", "class/b.png")])
def test_flat_or_mixed_folder_is_unlabelled(names, tmp_path):
  for name in names:
    put(tmp_path / name)
  source = open_source(f"folder:{tmp_path}", split="train")
  assert contents(source, tmp_path) == [(name, -1) for name in sorted(names)]
  assert source.num_classes is None
  assert source.class_names == ()


@pytest.mark.parametrize("kind", ["folder", "clips"])
def test_one_folder_is_no_class_and_that_is_said(kind, tmp_path, caplog):
  for name in ("x/a/1.png", "x/b/2.png"):
    put(tmp_path / name)
  source = open_source(f"{kind}:{tmp_path}", split="train")
  assert labels_of(source).tolist() == [-1, -1]
  assert (source.num_classes, source.class_names) == (None, ())
  (record,) = caplog.records
  assert f"nothing in {tmp_path} is labelled: all its" in record.getMessage()
  assert "lie in one folder, 'x'; classes are two or more" in record.getMessage()


@pytest.mark.parametrize(("kind", "stray"), [("folder", "stray.png"), ("clips", "stray/1.png")])
def test_what_lies_beside_class_folders_is_named_with_what_to_do(kind, stray, tmp_path, caplog):
  for name in ("cat/1/1.png", "dog/1/1.png", stray):
    put(tmp_path / name)
  assert open_source(f"{kind}:{tmp_path}", split="train").num_classes is None
  (record,) = caplog.records
  assert f"{tmp_path} is labelled: 1 of its" in record.getMessage()
  assert f"e.g. {stray.removesuffix('/1.png')!r}; if the folders are classes, move" in (
    record.getMessage()
  )


def test_flat_pictures_are_unlabelled_without_a_word(tmp_path, caplog):
  put(tmp_path / "1.png")
  assert open_source(f"folder:{tmp_path}", split="train").num_classes is None
  assert not caplog.records


def test_held_out_splits_stand_for_one_another(tmp_path):
  put(tmp_path / "train" / "1.png")
  put(tmp_path / "val" / "2.png")
  assert contents(open_source(f"folder:{tmp_path}", split="test"), tmp_path) == [("val/2.png", -1)]
  put(tmp_path / "test" / "3.png")
  for split in ("val", "test"):
    ((name, _),) = contents(open_source(f"folder:{tmp_path}", split=split), tmp_path)
    assert name.startswith(split)
  with pytest.raises(ValueError, match="no split 'extra'; it has: train, test, val"):
    open_source(f"folder:{tmp_path}", split="extra")


def test_folder_without_splits_is_not_evaluated_on_its_training_pictures(tmp_path):
  put(tmp_path / "cat" / "a.png")
  assert len(open_source(f"folder:{tmp_path}", split="train")) == 1
  with pytest.raises(ValueError, match=r"no split 'test'; it has: train \(all of it\)"):
    open_source(f"folder:{tmp_path}", split="test")


def test_missing_and_empty_folders_say_what_was_found(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    open_source(f"folder:{tmp_path}/nowhere", split="train")
  (tmp_path / "a.txt").write_text("")
  (tmp_path / "b.heic").write_text("")
  with pytest.raises(ValueError, match=r"found 1 x \.heic, 1 x \.txt") as error:
    open_source(f"folder:{tmp_path}", split="train")
  assert all(extension in str(error.value) for extension in EXTENSIONS)


def test_folder_names_that_are_not_utf8_survive(tmp_path):
  name = os.fsdecode(b"caf\xe9.png")
  put(tmp_path / name)
  source = FolderSource(str(tmp_path), split="train")
  assert decode(source[0]["image"], canvas=8)[1].tolist() == [6, 8]


def test_folder_source_pickles_and_has_a_stable_repr(tmp_path):
  for k in range(3):
    put(tmp_path / f"class{k}" / "a.png")
  source = FolderSource(str(tmp_path), split="train")
  copy = pickle.loads(pickle.dumps(source))
  assert contents(copy, tmp_path) == contents(source, tmp_path)
  assert repr(copy) == repr(source)
  assert (
    repr(source) == f"FolderSource({str(tmp_path)!r}, split='train', num_examples=3, num_classes=3)"
  )


def test_differing_classes_are_named(tmp_path):
  for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/emu/1.png"):
    put(tmp_path / name)
  train, test = (open_source(f"folder:{tmp_path}", split=s) for s in ("train", "test"))
  check_same_classes(train, train)
  with pytest.raises(ValueError, match=r"first: \['dog'\].*second: \['emu'\]"):
    check_same_classes(train, test)


def test_limit_draws_the_same_examples_for_a_seed(tmp_path):
  for k in range(20):
    put(tmp_path / "only" / f"{k:02d}.png")
  whole = contents(open_source(f"folder:{tmp_path}", split="train"), tmp_path)
  first, again, other = (
    contents(open_source(f"folder:{tmp_path}", split="train", limit=8, seed=s), tmp_path)
    for s in (0, 0, 1)
  )
  assert first == again
  assert first != other
  assert len(set(first)) == 8
  assert set(first) <= set(whole)
  assert first == sorted(first)
  with pytest.raises(ValueError, match=r"21 examples are asked of .*num_examples=20"):
    open_source(f"folder:{tmp_path}", split="train", limit=21)


# Clips.


def frame_names(source, i):
  return [os.path.basename(f) for f in source[i]["frames"]]


def test_clips_are_folders_of_frames_in_natural_order_with_classes(tmp_path):
  for name in ("run/b/frame10.png", "run/b/frame2.png", "run/b/.hidden.png", "run/b/notes.txt"):
    put(tmp_path / "train" / name)
  for name in ("jump/deep/er/x1.png", "run/a/frame01.png", "run/a/frame1.png", "run/a/frame0.png"):
    put(tmp_path / "train" / name)
  put(tmp_path / "val" / "run" / "c" / "f.png")
  source = open_source(f"clips:{tmp_path}", split="train")
  assert len(source) == 3
  assert source.class_names == ("jump", "run")
  assert [source[i]["label"] for i in range(3)] == labels_of(source).tolist() == [0, 1, 1]
  assert frame_names(source, 0) == ["x1.png"]
  assert frame_names(source, 1) == ["frame0.png", "frame01.png", "frame1.png"]
  assert frame_names(source, 2) == ["frame2.png", "frame10.png"]
  assert [os.path.basename(source[i]["image"]) for i in range(3)] == [
    "x1.png", "frame01.png", "frame10.png"  # the middle one
  ]  # fmt: skip
  assert len(open_source(f"clips:{tmp_path}", split="test")) == 1
  copy = pickle.loads(pickle.dumps(source))
  assert [copy[i] for i in range(3)] == [source[i] for i in range(3)]
  assert repr(copy) == f"ClipSource({str(tmp_path / 'train')!r}, split='train', {SIZE})"


SIZE = "num_examples=3, num_classes=2"


@pytest.mark.parametrize("names", [("a/1.png", "b/1.png"), ("a/1.png", "class/b/1.png")])
def test_clips_that_are_not_all_in_class_folders_are_unlabelled(names, tmp_path):
  for name in names:
    put(tmp_path / name)
  source = open_source(f"clips:{tmp_path}", split="train")
  assert [source[i]["label"] for i in range(len(source))] == [-1, -1]
  assert (source.num_classes, source.class_names) == (None, ())


def test_folders_that_are_no_clips_say_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere; give clips:PATH"):
    open_source(f"clips:{tmp_path}/nowhere", split="train")
  (tmp_path / "a.txt").write_text("")
  with pytest.raises(ValueError, match=r"no pictures in .*found 1 x \.txt"):
    open_source(f"clips:{tmp_path}", split="train")
  put(tmp_path / "clip" / "1.png")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"the clip .*empty has no frames; remove the folder"):
    open_source(f"clips:{tmp_path}", split="train")
  (tmp_path / "empty").rmdir()
  put(tmp_path / "still.png")
  with pytest.raises(ValueError, match=r"1 pictures lie in .* itself, e\.g\. still\.png; put"):
    open_source(f"clips:{tmp_path}", split="train")


def test_check_frames_names_the_value_and_the_fix(tmp_path):
  put(tmp_path / "clip" / "1.png")
  clips, stills = (open_source(f"{k}:{tmp_path}", split="train") for k in ("clips", "folder"))
  check_frames(clips, 2, 2)
  check_frames(stills, 1, 0)
  with pytest.raises(ValueError, match=r"data\.frames is 0; expected at least 1"):
    check_frames(clips, 0, 0)
  with pytest.raises(ValueError, match=r"frame_span is 1, .*at least 2, or 0"):
    check_frames(clips, 2, 1)
  for frames, span in ((2, 0), (1, 3)):
    with pytest.raises(ValueError, match=rf"frames is {frames} .*FolderSource.*still pictures"):
      check_frames(stills, frames, span)


def test_labels_of_are_those_of_the_examples(tmp_path):
  for k in range(12):
    put(tmp_path / f"class{k % 3}" / f"{k}.png")
  whole = open_source(f"folder:{tmp_path}", split="train")
  scenes = open_source("digit_scenes", split="train", limit=6)
  for source in (whole, Subset(whole, 7, seed=0), scenes, Subset(scenes, 3, seed=0)):
    assert labels_of(source).tolist() == [source[i]["label"] for i in range(len(source))]


def test_unknown_source_names_the_valid_ones():
  for name in ("cifar10", "folder:", "tfds:", "digits"):
    with pytest.raises(ValueError, match=r"'tfds:NAME', 'folder:PATH', .*'cifar:PATH', 'digit_sc"):
      open_source(name, split="train")


def test_digit_scenes_open_by_name():
  source = open_source("digit_scenes", split="val", size=32, limit=7, seed=3)
  assert len(source) == 7
  assert source.num_classes == 10
  assert source[0]["image"].shape == (32, 32, 3)
  assert isinstance(Subset(source, 3, seed=0)[2]["label"], int)


# TFDS. Its own tools cannot write without TensorFlow, but a builder of pictures can.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data_dir with `tiny_greys`: 20 train and 6 validation pictures, level 10 i, label i % 3."""

  class TinyGreys(tfds.core.GeneratorBasedBuilder):
    """Twenty-six grey pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["ash", "bone", "coal"]),
        "note": tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {
        "train": self._generate_examples(0, 20),
        "validation": self._generate_examples(20, 26),
      }

    def _generate_examples(self, first, end):
      for i in range(first, end):
        image = Image.new("RGB", (8, 6), (10 * i % 256,) * 3)
        yield i, {"image": image, "label": i % 3, "note": "x"}

  data_dir = str(tmp_path_factory.mktemp("tfds"))
  TinyGreys(data_dir=data_dir, file_format="array_record").download_and_prepare()
  return data_dir


def test_tfds_yields_encoded_pictures_and_labels(prepared):
  source = open_source("tfds:tiny_greys", split="train", data_dir=prepared)
  assert (len(source), source.num_classes) == (20, 3)
  assert source.class_names == ("ash", "bone", "coal")
  seen = set()
  for i in range(20):
    example = source[i]
    assert set(example) == {"image", "label"}
    assert isinstance(example["image"], bytes)
    image, extent = decode(example["image"], canvas=8)
    level = int(image[0, 0, 0])
    assert extent.tolist() == [6, 8]
    assert example["label"] == level // 10 % 3
    seen.add(level)
  assert seen == {10 * i for i in range(20)}


def test_tfds_splits_slices_and_pickles(prepared):
  test = open_source("tfds:tiny_greys", split="test", data_dir=prepared)
  assert len(test) == 6
  assert repr(test) == (
    "TfdsSource(tiny_greys/1.0.0, split='validation', num_examples=6, num_classes=3)"
  )
  half = open_source("tfds:tiny_greys", split="train[:50%]", data_dir=prepared)
  assert len(half) == 10
  copy = pickle.loads(pickle.dumps(half))
  assert [copy[i] for i in range(10)] == [half[i] for i in range(10)]
  with pytest.raises(ValueError, match="no split 'extra'; it has: train, validation"):
    open_source("tfds:tiny_greys", split="extra", data_dir=prepared)


def test_unprepared_tfds_says_how_to_prepare_it_without_a_network(tmp_path, monkeypatch):
  monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("used the network"))
  monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("used the network"))
  with pytest.raises(FileNotFoundError) as error:
    open_source("tfds:cifar10", split="train", data_dir=str(tmp_path))
  assert "pip install -e '.[prepare]'" in str(error.value)
  assert f"python -m ssrl_jax.data.prepare_tfds cifar10 --data_dir={tmp_path}" in str(error.value)


def test_unknown_tfds_names_the_nearest(tmp_path):
  with pytest.raises(ValueError, match=r"no data set 'cifar_10'; nearest: .*cifar10\b"):
    open_source("tfds:cifar_10", split="train", data_dir=str(tmp_path))
  with pytest.raises(ValueError, match=r"version 9\.9\.9"):
    open_source("tfds:cifar10:9.9.9", split="train", data_dir=str(tmp_path))


def test_columns_are_found_or_listed():
  def chosen(pictures, labels):
    return choose_columns(pictures, labels, known=["some", "columns"], where="tfds:x")

  assert chosen(["photo"], ["species"]) == ("photo", "species")
  assert chosen(["photo"], []) == ("photo", None)
  assert chosen(["image", "mask"], ["label", "coarse_label"]) == ("image", "label")
  for bad in ((["left", "right"], []), (["image"], ["a", "b"]), ([], [])):
    with pytest.raises(ValueError, match="tfds:x needs one picture"):
      chosen(*bad)


def test_preparing_without_tensorflow_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(SystemExit, match=r"pip install -e '\.\[prepare\]'"):
    prepare_tfds.main(["cifar10"])


def test_reading_tfds_imports_no_tensorflow(prepared):
  code = (
    "import sys; from ssrl_jax.data.sources import open_source; "
    f"s = open_source('tfds:tiny_greys:1.0.0', split='train', data_dir={prepared!r}); s[0]; "
    "sys.exit('tensorflow' in sys.modules)"
  )
  root = pathlib.Path(prepare_tfds.__file__).parents[2]
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr


def test_real_folder_indexes_and_decodes(data_dir, tmp_path):
  with zipfile.ZipFile(data_dir / "imagenette128" / "val.zip") as z:
    for name in [n for n in z.namelist() if n.lower().endswith((".jpg", ".jpeg"))][:20]:
      z.extract(name, tmp_path)
  source = open_source(f"folder:{tmp_path}", split="train")
  assert len(source) == 20
  levels = [decode(source[i]["image"], canvas=64)[0].mean() for i in range(20)]
  assert np.std(levels) > 1


@pytest.mark.parametrize(
  ("asked", "there", "found"),
  [
    ("test", ("train", "val"), "val"),
    ("validation", ("train", "test"), "test"),
    ("valid", ("train", "val", "test"), "val"),  # and never the test pictures
    ("test[:9]", ("train", "valid"), "valid[:9]"),
    ("test", ("train", "val", "valid"), None),
    ("val", ("train", "validation", "valid", "test"), None),
    ("train", ("test",), None),
  ],
)
def test_one_split_stands_for_another_where_it_is_clear_which(asked, there, found):
  if found is None:
    with pytest.raises(ValueError, match=f"x has no split '{asked}'; it has: "):
      find_split(asked, there, where="x")
  else:
    assert find_split(asked, there, where="x") == found
