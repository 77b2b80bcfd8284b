"""Prepared sets: the same pictures, whatever happens while they are written."""

import fcntl
import hashlib
import io
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data import prepare
from ssrl_jax.data.decode import DamagedImage, decode
from ssrl_jax.data.pipeline import train_batches
from ssrl_jax.data.sources import open_source
from tests.commands import ROOT

COUNT = 23


def noise(i, size=(12, 10)):
  return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
  """23 pictures of two classes, PNG and JPEG, one name not UTF-8."""
  for i in range(COUNT):
    path = tmp_path / "set" / "train" / ("cat", "dog")[i % 3 == 0]
    path.mkdir(parents=True, exist_ok=True)
    name = os.fsdecode(b"\xe9.png") if i == 5 else f"{i:02d}.{('png', 'jpg')[i % 2]}"
    noise(i).save(path / name, format=("PNG", "JPEG")[i % 2])
  return tmp_path / "set"


def run(*options):
  return prepare.cli([str(o) for o in options])


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def batches_of(source, **options):
  batches = train_batches(source, seed=3, batch_size=6, start_step=0, canvas=16, **options)
  found = [next(batches) for _ in range(8)]
  batches.close()
  return found


def test_training_on_a_prepared_set_is_training_on_its_source(folder, tmp_path, capsys):
  assert (
    run(f"--source=folder:{folder}", f"--out={tmp_path / 'out'}", "--shards=3", "--workers=1") == 0
  )
  assert "23 of 23 examples in 3 shards" in capsys.readouterr().out
  source = open_source(f"folder:{folder}", split="train")
  prepared = open_source(f"arrayrecord:{tmp_path / 'out'}", split="train")
  assert (prepared.class_names, prepared.num_classes) == (source.class_names, 2)
  np.testing.assert_array_equal(prepared.labels, source.labels)
  assert [prepared.name(i) for i in range(COUNT)] == [source.name(i) for i in range(COUNT)]
  for want, got in zip(batches_of(source), batches_of(prepared)):
    for key in want:
      np.testing.assert_array_equal(got[key], want[key], err_msg=key)
  for i in range(COUNT):
    assert prepared[i]["image"] == pathlib.Path(source[i]["image"]).read_bytes()
  copy = pickle.loads(pickle.dumps(prepared))
  assert ([copy[i] for i in range(COUNT)], repr(copy)) == (
    [prepared[i] for i in range(COUNT)], repr(prepared)
  )  # fmt: skip


def test_the_manifest_says_what_is_there(folder, tmp_path):
  (folder / "train" / "cat" / "00.png").write_bytes(b"no picture")
  (folder / "train" / "cat" / "zz.png").symlink_to("nowhere")
  out = tmp_path / "out" / "train"
  assert run(f"--source=folder:{folder}", f"--out={out.parent}", "--shards=2", "--workers=3") == 0
  manifest = json.loads((out / "manifest.json").read_text())
  assert (manifest["examples"], manifest["refused_examples"]) == (23, 2)
  reasons = {r["name"]: r["reason"] for r in manifest["refused"]}
  assert "not one of JPEG" in reasons["cat/00.png"]
  assert "No such file" in reasons["cat/zz.png"]
  assert manifest["class_names"] == ["cat", "dog"]
  for shard in manifest["shards"]:
    content = (out / shard["file"]).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
  with np.load(out / "index.npz", allow_pickle=False) as index:
    refused = {r["position"] for r in manifest["refused"]}
    assert index["id"].tolist() == [i for i in range(25) if i not in refused]
    assert len(index["label"]) == len(index["bytes"]) == 23
  assert set(contents(out)) == {
    ".lock", "options.json", "manifest.json", "index.npz", *(s["file"] for s in manifest["shards"])
  }  # fmt: skip


KILLED = """
import os, signal, sys
from ssrl_jax.data import prepare
left, when, replace = int(sys.argv[1]), sys.argv[2], os.replace
def replace_and_die(*args):
  global left
  left -= 1
  if left == 0 and when == "before": os.kill(os.getpid(), signal.SIGKILL)
  replace(*args)
  if left == 0: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
sys.exit(prepare.cli(sys.argv[3:]))
"""


def test_killed_again_and_again_the_set_is_the_same_byte_for_byte(folder, tmp_path):
  def command(out):
    return [f"--source=folder:{folder}", f"--out={tmp_path / out}", "--shards=3", "--workers=2"]

  assert run(*command("whole")) == 0
  out, root = tmp_path / "killed" / "train", pathlib.Path(prepare.__file__).parents[2]
  # Renames, were it not killed: options, facts and shard three times, index, manifest.
  for n, when in (
    *((1, "before"), (3, "before"), (2, "after"), (4, "before")),
    *((1, "after"), (3, "before"), (2, "before")),
  ):
    finished = {p: p.stat().st_ino for p in out.glob("*.arrayrecord")}
    died = subprocess.run(
      [sys.executable, "-c", KILLED, str(n), when, *command("killed")], cwd=root, timeout=120
    )
    assert died.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert all(p.stat().st_ino == inode for p, inode in finished.items())  # none is written again
    with pytest.raises(FileNotFoundError):
      open_source(f"arrayrecord:{out.parent}", split="train")
  assert run(*command("killed")) == 0
  assert contents(out) == contents(tmp_path / "whole" / "train")


def test_another_set_or_another_process_is_kept_out(folder, tmp_path, capsys):
  command = [f"--source=folder:{folder}", f"--out={tmp_path / 'out'}"]
  assert run(*command) == 0
  before = contents(tmp_path / "out" / "train")
  assert run(*command, "--shorter_side=5") == 1
  assert "holds another set (shorter_side: 0 -> 5); choose another --out" in capsys.readouterr().err
  noise(99).save(folder / "train" / "cat" / "new.png")
  assert run(*command) == 1
  assert "num_examples=23" in capsys.readouterr().err
  (folder / "train" / "cat" / "new.png").unlink()
  with (tmp_path / "out" / "train" / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    assert run(*command) == 1
  assert "another prepare is at work" in capsys.readouterr().err
  assert run(*command) == 0
  assert contents(tmp_path / "out" / "train") == before


def test_pictures_are_made_smaller_to_the_shorter_side_and_upright(tmp_path):
  (tmp_path / "set").mkdir()
  exif = Image.Exif()
  exif[0x0112] = 6
  noise(0, (40, 60)).save(tmp_path / "set" / "a.jpg", exif=exif, quality=95)
  noise(1, (200, 20)).save(tmp_path / "set" / "b.png")
  noise(2, (16, 30)).save(tmp_path / "set" / "c.png")
  options = ["--shorter_side=16", "--quality=80"]
  assert run(f"--source=folder:{tmp_path / 'set'}", f"--out={tmp_path / 'out'}", *options) == 0
  prepared = open_source(f"arrayrecord:{tmp_path / 'out'}", split="train")
  pictures = [Image.open(io.BytesIO(prepared[i]["image"])) for i in range(3)]
  assert [p.size for p in pictures] == [(16, 24), (16, 160), (30, 16)]
  assert [p.format for p in pictures] == ["JPEG", "JPEG", "PNG"]
  assert prepared[2]["image"] == (tmp_path / "set" / "c.png").read_bytes()


def test_clips_and_drawn_scenes_keep_their_frames_and_pixels(tmp_path):
  for i in range(3):
    (tmp_path / "set" / "run" / f"c{i}").mkdir(parents=True)
    for k in range(3):
      noise(10 * i + k).save(tmp_path / "set" / "run" / f"c{i}" / f"frame{k}.png")
  assert run(f"--source=clips:{tmp_path / 'set'}", f"--out={tmp_path / 'clips'}") == 0
  pairs = [
    (f"clips:{tmp_path / 'set'}", f"arrayrecord:{tmp_path / 'clips'}", {"frames": 2}, 3),
    ("digit_scenes", f"arrayrecord:{tmp_path / 'scenes'}", {}, 5),
  ]
  assert run("--source=digit_scenes", "--limit=5", f"--out={tmp_path / 'scenes'}") == 0
  for source, prepared, options, count in pairs:
    first, second = (
      train_batches(
        open_source(name, split="train", limit=count if name == "digit_scenes" else 0),
        seed=0, batch_size=2, start_step=0, canvas=32, **options,
      )
      for name in (source, prepared)
    )  # fmt: skip
    for _ in range(3):
      want, got = next(first), next(second)
      for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)
    first.close()
    second.close()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(folder, tmp_path):
  program = "import sys; from ssrl_jax.data.prepare import cli; sys.exit(cli(sys.argv[1:]))"
  command = [sys.executable, "-c", program, f"--source=folder:{folder}", f"--out={tmp_path}"]
  limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *command]
  done = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=ROOT)
  assert done.returncode == 1
  assert done.stderr.count("\n") == 1
  assert "could not be written" in done.stderr
  done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
  assert done.returncode == 0, done.stderr


def test_a_damaged_record_is_damage_and_a_missing_shard_is_named(folder, tmp_path):
  run(f"--source=folder:{folder}", f"--out={tmp_path / 'out'}", "--shards=2")
  name = f"arrayrecord:{tmp_path / 'out'}"
  first, second = sorted((tmp_path / "out" / "train").glob("*.arrayrecord"))
  content = bytearray(first.read_bytes())
  content[content.index(b"PNG")] ^= 1
  first.write_bytes(content)
  source = open_source(name, split="train")
  assert source[0]["image"][:2] == b"\xff\xd8"  # the JPEG before it is whole
  assert source.name(1).endswith("00000-of-00002.arrayrecord, record 1")
  with pytest.raises(DamagedImage, match=r"00000-of-00002\.arrayrecord, record 1: .*hash mismatch"):
    source[1]
  half = open_source(f"{name}/train/00001*", split="train")
  assert half.labels.tolist() == source.labels[-len(half) :].tolist()
  assert half[0] == source[len(source) - len(half)]
  second.unlink()
  with pytest.raises(FileNotFoundError, match=r"shard .*00001-of-00002\.arrayrecord is not there"):
    open_source(name, split="train")
  first.rename(first.with_name("x.arrayrecord"))
  with pytest.raises(ValueError, match=r"x\.arrayrecord is no shard of the set beside it"):
    open_source(f"{name}/train/x*", split="train")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--quality=0"], "--quality is 0; expected 1 to 100"),
    (["--workers=0"], "--workers is 0; expected 1"),
    (["--shards=24"], "--shards is 24, but there are 23 examples"),
    (["--split=test"], "no split 'test'; it has: train"),
  ],
)
def test_bad_options_are_named_and_write_nothing(options, message, folder, tmp_path, capsys):
  assert run(f"--source=folder:{folder}", f"--out={tmp_path / 'out'}", *options) == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_set_without_one_readable_picture_is_refused(tmp_path, capsys):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.png").write_text("no")
  assert run(f"--source=folder:{tmp_path / 'in'}", f"--out={tmp_path / 'out'}") == 1
  assert "no picture of the source can be read" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train_extra", "fold_1", "Unlabelled"])
def test_a_split_of_any_name_is_read_again_and_mixed_with_none(split, tmp_path):
  for name, value in (("train", 10), (split, 200)):
    (tmp_path / "set" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "set" / name / "0.png")
  where = f"folder:{tmp_path / 'set'}"
  for name in ("train", split):
    assert prepare.cli([f"--source={where}", f"--split={name}", f"--out={tmp_path / 'o'}"]) == 0
  for name in ("train", split):
    source = open_source(f"arrayrecord:{tmp_path / 'o'}", split=name)
    levels = [decode(source[i]["image"], canvas=8)[0][0, 0, 0] for i in range(len(source))]
    assert levels == [10 if name == "train" else 200]
