"""What inspect reports of a set made for it, figure by figure."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data import inspect as command
from ssrl_jax.data.contact_sheet import GAP, MISSING, NAME, TILE
from ssrl_jax.data.sources import open_source


def noise(i, width=20, height=10, mode="RGB"):
  pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """The set's folder, what was written, and the lines on the screen."""
  root = tmp_path_factory.mktemp("inspect")
  cats, dogs = root / "set" / "train" / "cat", root / "set" / "train" / "dog"
  test = root / "set" / "test" / "cat"
  for folder in (cats, dogs, test):
    folder.mkdir(parents=True)
  for i in range(6):
    noise(i, width=20 + i).save(cats / f"{i}.png")
  noise(6, mode="L").save(dogs / "grey.bmp")
  (dogs / "bad.jpg").write_text("<html>")
  (dogs / "bad2.jpg").write_text("<html>")
  shutil.copy(cats / "0.png", dogs / "copy.png")
  shutil.copy(cats / "1.png", cats / "1 again.png")
  shutil.copy(cats / "2.png", test / "leak.png")
  noise(7).save(test / "own.png")
  lines = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(command, "print_line", lines.append)
    arguments = [f"--source=folder:{root / 'set'}", f"--out={root / 'out'}", "--workers=2"]
    assert command.cli(arguments) == 0
  return root, json.loads((root / "out" / "inspect.json").read_text()), "\n".join(lines)


def test_counts_formats_and_sizes(found):
  _, values, text = found
  assert values["examples"] == 11
  assert values["formats"] == {"PNG": 8, "BMP": 1}
  assert values["modes"] == {"RGB": 8, "L": 1}
  assert (values["width"]["0"], values["width"]["50"], values["width"]["100"]) == (20, 21, 25)
  assert values["shorter_side"]["100"] == values["height"]["0"] == 10
  assert values["classes"] == {"cat": 7, "dog": 4}
  assert values["unlabelled"] == 0
  assert "2 classes, of 4 ('dog') to 7 ('cat') pictures, 1.75 times as many" in text
  assert "formats        PNG 8, BMP 1" in text


def test_damaged_files_are_listed_with_reason(found):
  _, values, text = found
  assert [d["name"] for d in values["damaged"]] == ["dog/bad.jpg", "dog/bad2.jpg"]
  assert "not one of JPEG" in values["damaged"][0]["reason"]
  assert "11 pictures, 2 of them cannot be read" in text
  assert "  'dog/bad.jpg': picture of 6 bytes" in text


def test_copies_are_found_within_and_across_splits(found):
  _, values, text = found
  assert values["duplicates"] == {
    "superfluous": 3,
    "under_several_classes": 1,
    "groups": [
      ["cat/0.png", "dog/copy.png"],
      ["cat/1 again.png", "cat/1.png"],
      ["dog/bad.jpg", "dog/bad2.jpg"],
    ],
  }
  assert values["other_split"]["pairs"] == [["cat/leak.png", "cat/2.png"]]
  assert "1 of 2 in FolderSource(" in text
  assert "'cat/leak.png' = 'cat/2.png'" in text


def test_mean_and_deviation_count_every_picture_the_same(found):
  root, values, text = found
  files = sorted(p for p in (root / "set" / "train").rglob("*") if p.suffix in (".png", ".bmp"))
  pictures = [np.asarray(Image.open(p).convert("RGB")) / 255 for p in files]
  mean = np.mean([p.mean((0, 1)) for p in pictures], axis=0)
  square = np.mean([(p**2).mean((0, 1)) for p in pictures], axis=0)
  np.testing.assert_allclose(values["mean"], mean, rtol=1e-12)
  np.testing.assert_allclose(values["std"], np.sqrt(square - mean**2), rtol=1e-10)
  assert f"  c.data.mean = ({mean[0]:.4f}, {mean[1]:.4f}, {mean[2]:.4f})" in text


def test_the_sheet_has_a_row_for_each_class_and_red_for_damage(found):
  root, _, _ = found
  with Image.open(root / "out" / "sheet.png") as sheet:
    pixels = np.asarray(sheet)
  assert pixels.shape[0] == GAP + 2 * (TILE + GAP)
  second_row = pixels[GAP + TILE + GAP + TILE // 2, NAME + GAP + TILE // 2 :: TILE + GAP]
  red = [tuple(p) == MISSING for p in second_row.tolist()]
  assert red[:4] == [True, True, False, False]  # bad.jpg, bad2.jpg, copy.png, grey.bmp
  shown = pixels[GAP : GAP + TILE, NAME + GAP : NAME + GAP + TILE]  # 20 x 10, four times as large
  first = np.asarray(noise(0)).repeat(4, axis=0).repeat(4, axis=1)
  np.testing.assert_array_equal(shown[28:68, 8:88], first)


def test_scenes_without_files_and_a_set_without_labels_are_described(tmp_path, capsys):
  scenes = open_source("digit_scenes", split="train", limit=12)
  text = "\n".join(command.describe(command.inspect(scenes, None, workers=1)))
  assert "formats        array 12" in text
  assert "10 classes" in text
  (tmp_path / "in").mkdir()
  noise(0).save(tmp_path / "in" / "a.png")
  assert command.cli([f"--source=folder:{tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]) == 0
  text = capsys.readouterr().out
  assert "no classes: nothing is labelled" in text
  assert "no other split to compare with" in text
  assert (tmp_path / "out" / "sheet.png").exists()


def test_sheets_are_not_put_among_the_pictures(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "in" / "a").mkdir(parents=True)
  noise(0).save(tmp_path / "in" / "a" / "a.png")
  for out in (tmp_path / "in", tmp_path / "in" / "sheets", "~/in/a"):
    assert command.cli([f"--source=folder:{tmp_path / 'in'}", f"--out={out}"]) == 1
    assert "lies among the pictures of folder:" in capsys.readouterr().err
  assert command.cli([f"--source=folder:{tmp_path / 'in'}", "--out=~/out"]) == 0
  assert (tmp_path / "out" / "inspect.json").exists()


def test_bad_options_are_named(tmp_path, capsys):
  assert command.cli(["--source=folder:/nowhere/at/all"]) == 1
  assert "no folder /nowhere/at/all" in capsys.readouterr().err
  assert command.cli([f"--source=folder:{tmp_path}", "--workers=0"]) == 1
  assert "--workers is 0" in capsys.readouterr().err
