"""What real folders hold, from files on disk through decoding and through training batches."""

import contextlib
import io
import logging
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data.decode import GREY, DamagedImage, decode
from ssrl_jax.data.pipeline import eval_batches, train_batches
from ssrl_jax.data.sampling import Sampling, make_sampling, position
from ssrl_jax.data.sources import check_same_classes, open_source

SIDE = 32
H, W = 16, 24
Y, X = np.mgrid[:H, :W].astype(np.uint8)
COLOUR = np.stack([X * 10, Y * 15, 100 + X], -1)
LEVEL = X * 6 + Y * 7
NOISE = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
HIDDEN = np.dstack([COLOUR, np.where(X < 12, 0, 255).astype(np.uint8)])


def encoded(pixels, format="PNG", mode=None, **options):
  buffer = io.BytesIO()
  im = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  (im.convert(mode) if mode else im).save(buffer, format, **options)
  return buffer.getvalue()


def grey(level):
  return np.stack([level] * 3, -1)


def turned(value):
  exif = Image.Exif()
  exif[0x0112] = value
  return exif


def without_adobe(data):
  """A CMYK JPEG without Adobe's marker, whose inks are not inverted."""
  at = data.index(b"\xff\xee")
  return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]


def palette():
  im = Image.fromarray((X // 12).astype(np.uint8)).convert("P")
  im.putpalette([200, 0, 0, 0, 50, 0])
  return im


def bomb():
  data = bytearray(encoded(np.zeros((1, 1), bool), "BMP"))
  data[18:26] = struct.pack("<ii", 20_000, 20_000)
  return bytes(data)


CMYK = np.dstack([COLOUR, LEVEL // 4])
INKS = ((255 - COLOUR.astype(float)) * (255 - LEVEL[:, :, None] // 4) / 255).astype(int)
NAN = np.where(X == 3, np.nan, LEVEL / np.float32(255)).astype(np.float32)
STRIP = np.repeat(np.linspace(0, 255, 4000).astype(np.uint8), 3).reshape(1, 4000, 3)
FRAMES = {"save_all": True, "append_images": [Image.fromarray(NOISE)]}
SMOOTH = {"quality": 100, "subsampling": 0}

# Name of the file -> its content, the pixels it shows (None: damaged), how far off these may be.
KINDS = {
  "truncated.jpg": (encoded(NOISE, "JPEG")[:-60], None, 0),
  "empty.jpg": (b"", None, 0),
  "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", None, 0),
  "notes.png": (b"to do: collect pictures\n", None, 0),
  "grey16.png": (encoded(LEVEL.astype(np.uint16) * 257), grey(LEVEL), 0),
  "float.tif": (encoded(LEVEL / np.float32(255), "TIFF"), grey(LEVEL), 0),
  "nan.tif": (encoded(NAN, "TIFF"), None, 0),
  "cmyk.tif": (encoded(Image.fromarray(CMYK, "CMYK"), "TIFF"), INKS, 1),
  "adobe.jpg": (encoded(Image.fromarray(CMYK, "CMYK"), "JPEG", **SMOOTH), INKS, 6),
  "inks.jpg": (
    without_adobe(encoded(Image.fromarray(255 - CMYK, "CMYK"), "JPEG", **SMOOTH)), INKS, 6
  ),
  "hidden.png": (encoded(HIDDEN), np.where(HIDDEN[:, :, 3:] == 0, GREY, COLOUR), 0),
  "palette.png": (
    encoded(palette(), transparency=1),
    np.where(X[:, :, None] < 12, np.array([200, 0, 0]).reshape(1, 1, 3), GREY), 0,
  ),
  "grey.jpg": (encoded(LEVEL, "JPEG", **SMOOTH), grey(LEVEL), 3),
  "alpha.png": (
    encoded(Image.fromarray(np.dstack([LEVEL, HIDDEN[:, :, 3]]), "LA")),
    grey(np.where(X < 12, GREY, LEVEL)), 0,
  ),
  "moving.gif": (encoded(LEVEL, "GIF", **FRAMES), grey(LEVEL), 0),
  "moving.webp": (encoded(COLOUR, "WEBP", lossless=True, **FRAMES), COLOUR, 0),
  "turned.jpg": (encoded(COLOUR, "JPEG", exif=turned(6), **SMOOTH), np.rot90(COLOUR, -1), 4),
  "turned.png": (encoded(COLOUR, exif=turned(6)), np.rot90(COLOUR, -1), 0),
  "dot.png": (encoded(COLOUR[:1, :1]), COLOUR[:1, :1], 0),
  "strip.png": (encoded(STRIP), STRIP[:, 62::125], 3),
  "bomb.bmp": (bomb(), None, 0),
}  # fmt: skip
DAMAGED = [name for name, (_, want, _) in KINDS.items() if want is None]


@contextlib.contextmanager
def no_permission(folder):
  """Ordinary rights for this process, which as root may read everything."""
  if os.geteuid() != 0:
    yield
    return
  os.chmod(folder, 0o755)
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def through_training(path, *, epochs=1, **options):
  """{name: (picture without the rest of the canvas, whether substituted)} of every file, once."""
  source = open_source(f"folder:{path}", split="train")
  names = [Path(source[i]["image"]).name for i in range(len(source))]
  batches = train_batches(source, seed=0, batch_size=1, start_step=0, canvas=SIDE, **options)
  seen = {}
  with contextlib.closing(batches):
    for _ in range(epochs * len(source)):
      batch = next(batches)
      height, width = batch["extent"][0]
      assert not batch["image"][0, height:].any()
      assert not batch["image"][0, :, width:].any()
      shown = batch["image"][0, :height, :width].astype(int)
      seen[names[batch["id"][0]]] = shown, bool(batch["substituted"][0])
  return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Every kind of file, each followed by a picture of noise: its stand-in where it is damaged."""
  path = tmp_path_factory.mktemp("kinds")
  for name, (data, _, _) in KINDS.items():
    (path / name).write_bytes(data)
    (path / f"{name}~.png").write_bytes(encoded(NOISE))
  (path / "a folder.jpg").mkdir()
  return path


@pytest.fixture(scope="module")
def trained(folder):
  return through_training(folder, threads=2)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_shown_as_it_looks_or_replaced(name, folder, trained):
  _, want, tolerance = KINDS[name]
  shown, substituted = trained[name]
  assert substituted == (want is None)
  if want is None:
    np.testing.assert_array_equal(shown, NOISE)
    with pytest.raises(DamagedImage, match=name):
      decode(folder / name, canvas=SIDE)
    return
  assert shown.shape == want.shape
  assert np.abs(shown - want).max() <= tolerance
  image, (height, width) = decode(folder / name, canvas=SIDE)
  np.testing.assert_array_equal(image[:height, :width], shown)


def test_no_file_becomes_a_constant_training_picture(trained):
  assert len(trained) == 2 * len(KINDS)
  constant = [name for name, (shown, _) in trained.items() if shown.min() == shown.max()]
  constant += [name for name, (shown, _) in trained.items() if np.ptp(shown, (0, 1)).max() == 0]
  assert set(constant) == {"dot.png"}  # a single pixel


def test_evaluation_gives_damaged_files_no_weight(folder):
  source = open_source(f"folder:{folder}", split="train")
  with contextlib.closing(eval_batches(source, batch_size=8, canvas=SIDE)) as batches:
    rows = [(i, w) for b in batches for i, w in zip(b["id"], b["weight"]) if i >= 0]
  left_out = [Path(source[int(i)]["image"]).name for i, weight in rows if not weight]
  assert sorted(left_out) == sorted(DAMAGED)
  assert len(rows) == 2 * len(KINDS)


@pytest.mark.parametrize("value", [3, 5, 6])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_one_orientation_rule_for_paths_bytes_and_pictures(format, value, tmp_path):
  path = tmp_path / f"a.{format.lower()}"
  path.write_bytes(encoded(NOISE, format, exif=turned(value)))
  want = decode(path.read_bytes(), canvas=SIDE)
  with Image.open(path) as opened:
    for form in (path, str(path), opened):
      for got, expected in zip(decode(form, canvas=SIDE), want):
        np.testing.assert_array_equal(got, expected)
  assert want[1].tolist() == ([W, H] if value >= 5 else [H, W])


def test_file_without_permission_and_dangling_link_are_replaced():
  with tempfile.TemporaryDirectory() as path:  # pytest's own folders are closed to others
    for name in "abcd":
      Path(path, f"{name}.png").write_bytes(encoded(NOISE))
    os.chmod(Path(path, "b.png"), 0)
    os.symlink("nowhere.png", Path(path, "c.png~.png"))
    with no_permission(path):
      with pytest.raises(DamagedImage, match=r"b\.png: PermissionError"):
        decode(Path(path, "b.png"), canvas=SIDE)
      seen = through_training(path)
  assert {name for name, (_, substituted) in seen.items() if substituted} == {"b.png", "c.png~.png"}
  assert all((shown == NOISE).all() for shown, _ in seen.values())


def test_files_deleted_and_replaced_during_the_run(tmp_path, caplog):
  for i in range(4):
    (tmp_path / f"{i}.png").write_bytes(encoded(NOISE))
  source = open_source(f"folder:{tmp_path}", split="train")
  batches = train_batches(source, seed=0, batch_size=4, start_step=0, canvas=SIDE)
  with contextlib.closing(batches), caplog.at_level(logging.WARNING, logger="absl"):
    assert not next(batches)["substituted"].any()
    (tmp_path / "1.png").unlink()
    (tmp_path / "3.png").write_bytes(encoded(COLOUR))
    batch = [next(batches) for _ in range(5)][-1]  # a few are read ahead
  shown = {i: (image[:H, :W], s) for i, image, s in zip(*(batch[k] for k in batch_keys()))}
  assert [i for i, (_, s) in shown.items() if s] == [1]
  np.testing.assert_array_equal(shown[3][0], COLOUR)
  np.testing.assert_array_equal(shown[1][0], NOISE)
  (message,) = [r.getMessage() for r in caplog.records]
  assert "1.png: FileNotFoundError" in message


def batch_keys():
  return ("id", "image", "substituted")


def class_folders(path, split, sizes):
  for name, count in sizes.items():
    (path / split / name).mkdir(parents=True)
    for i in range(count):
      (path / split / name / f"{i}.png").write_bytes(encoded(NOISE))


def test_uneven_classes_train_evenly_where_asked_and_an_empty_one_is_none(tmp_path):
  class_folders(tmp_path, "train", {"many": 12, "few": 2, "none": 0})
  source = open_source(f"folder:{tmp_path}", split="train")
  assert source.class_names == ("few", "many")
  sampling = make_sampling(source, sampling="class", file="", power=1.0)
  assert isinstance(sampling, Sampling)
  for options, want in (({}, [2, 12]), ({"sampling": sampling}, [7, 7])):
    batches = train_batches(source, seed=0, batch_size=14, start_step=0, canvas=SIDE, **options)
    with contextlib.closing(batches):
      batch = next(batches)
    assert np.bincount(batch["label"]).tolist() == want
    np.testing.assert_array_equal(batch["label"], source.labels[position(batch["id"])])


@pytest.mark.parametrize(
  ("test", "message"),
  [
    ({"few": 1, "many": 0, "other": 1}, r"only in the first: \['many'\]"),  # a class is empty
    ({"few": 1, "many": 0}, r"test.* has no labels, and .*train.* has"),  # one class is none
    ({"": 2}, r"test.* has no labels, and .*train.* has"),
  ],
)
def test_labels_that_the_test_split_lacks_are_named(test, message, tmp_path):
  class_folders(tmp_path, "train", {"many": 2, "few": 1})
  if "" in test:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(encoded(NOISE))
  else:
    class_folders(tmp_path, "test", test)
  splits = [open_source(f"folder:{tmp_path}", split=s) for s in ("train", "test")]
  with pytest.raises(ValueError, match=message):
    check_same_classes(*splits)
