"""What real folders hold, and the listing that is kept between runs."""

import contextlib
import os
import pathlib
import pickle
import tempfile
import time

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data import index_cache, listing
from ssrl_jax.data.decode import DamagedImage, decode
from ssrl_jax.data.folders import FolderSource
from ssrl_jax.data.index_cache import Names
from ssrl_jax.data.listing import list_pictures
from ssrl_jax.data.sources import check_same_classes, open_source


def put(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 6), (value, value, value)).save(path, format="PNG")


def names(root):
  return [os.fsdecode(p) for p in list_pictures(str(root)).pictures.tolist()]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Listings are kept at once, in a folder of the test's own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(index_cache, "SETTLED_NS", -(10**18))
  return tmp_path / "cache" / "ssrl_jax"


@pytest.fixture
def walks(monkeypatch):
  """The folders that were really listed."""
  walked, walk = [], listing._walk
  monkeypatch.setattr(listing, "_walk", lambda *args: walked.append(args[0]) or walk(*args))
  return walked


@pytest.mark.parametrize(
  "name", ["two words.png", "two\nlines.png", os.fsdecode(b"caf\xe9\xff.PNG")]
)
def test_any_name_that_a_file_system_allows_is_read(name, tmp_path):
  put(tmp_path / f"cl\nass {os.fsdecode(bytes([0xE9]))}" / name, 9)
  put(tmp_path / "other" / "1.png")
  source = pickle.loads(pickle.dumps(FolderSource(str(tmp_path), split="train")))
  assert decode(source[0]["image"], canvas=8)[0][0, 0, 0] == 9
  assert os.path.basename(source.name(0)) == name
  assert source.class_names == (r"cl\nass \xe9".replace(r"\n", "\n"), "other")  # can be shown


def test_one_long_name_does_not_make_all_of_them_long(tmp_path):
  packed = Names.pack([b"a", b"b" * 4000, b"", b"c"] * 1000)
  assert len(pickle.dumps(packed)) < 4_100_000 + 33_000
  assert packed.tolist()[:4] == [packed[i] for i in range(4)] == [b"a", b"b" * 4000, b"", b"c"]


def test_links_are_followed_and_loops_left(tmp_path, caplog):
  root, outside = tmp_path / "root", tmp_path / "outside"
  put(outside / "deep" / "b.png")
  put(root / "real" / "a.png")
  (root / "linked").symlink_to(outside)
  (root / "again").symlink_to(outside)
  (root / "a.png").symlink_to(outside / "deep" / "b.png")
  assert "lead back" not in caplog.text
  (outside / "deep" / "up").symlink_to(outside)
  (root / "real" / "self").symlink_to(".")
  (root / "ping").symlink_to("pong")
  (root / "pong").symlink_to("ping")
  assert names(root) == ["a.png", "again/deep/b.png", "linked/deep/b.png", "real/a.png"]
  assert "3 links lead back" in caplog.text
  assert "'again/deep/up'" in caplog.text


@pytest.mark.parametrize("target", ["nowhere.png", "x.png"])
def test_a_link_that_leads_nowhere_is_a_damaged_picture(target, tmp_path):
  (tmp_path / "x.png").symlink_to(target)
  source = FolderSource(str(tmp_path), split="train")
  with pytest.raises(DamagedImage, match=r"x\.png"):
    decode(source[0]["image"], canvas=8)


def test_what_would_block_or_is_hidden_is_no_picture(tmp_path):
  put(tmp_path / "a" / "b" / "c.png")
  os.mkfifo(tmp_path / "a" / "pipe.png")
  (tmp_path / "a" / "link to a pipe.png").symlink_to("pipe.png")
  put(tmp_path / "a" / ".hidden.png")
  put(tmp_path / ".hidden" / "d.png")
  (tmp_path / "a" / "folder.png").mkdir()
  assert names(tmp_path) == ["a/b/c.png"]


def test_a_class_folder_without_pictures_is_named(tmp_path, caplog):
  put(tmp_path / "train" / "cat" / "1.png")
  (tmp_path / "train" / "dog" / "deeper").mkdir(parents=True)
  FolderSource(str(tmp_path), split="train")
  assert "1 folders" in caplog.text
  assert "'dog'" in caplog.text
  put(tmp_path / "train" / "emu" / "1.png")
  source = FolderSource(str(tmp_path), split="train")
  assert source.class_names == ("cat", "emu")
  assert caplog.text.count("1 folders") == 2


@contextlib.contextmanager
def no_privileges():
  """Root may read everything, so root becomes nobody for a while."""
  if os.geteuid() != 0:
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_a_folder_that_may_not_be_read_is_named_in_one_line():
  with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to others
    os.chmod(root, 0o755)
    put(pathlib.Path(root) / "closed" / "a.png")
    os.chmod(f"{root}/closed", 0o000)
    with no_privileges(), pytest.raises(ValueError, match=r"closed' may not be read \(Perm") as e:
      FolderSource(root, split="train")
    os.chmod(f"{root}/closed", 0o755)
  assert "\n" not in str(e.value)


def test_a_closed_folder_beside_the_splits_is_passed_by():
  with tempfile.TemporaryDirectory() as root:
    os.chmod(root, 0o755)
    put(pathlib.Path(root) / "train" / "a.png")
    os.mkdir(f"{root}/lost+found", 0o000)
    with no_privileges():
      assert len(FolderSource(root, split="train")) == 1


@pytest.mark.parametrize("inner", ["", "images"])
def test_folders_that_are_called_nearly_as_splits_are_named(tmp_path, caplog, inner):
  for name in ("Training", "test_set"):
    put(tmp_path / inner / name / "a.png")
  FolderSource(str(tmp_path), split="train")
  assert "Training, test_set look like splits of" in caplog.text


def test_uneven_classes_and_a_test_split_without_labels(tmp_path):
  for k in range(5):
    put(tmp_path / "train" / "many" / f"{k}.png")
  put(tmp_path / "train" / "one" / "0.png")
  put(tmp_path / "test" / "0.png")
  train, test = (open_source(f"folder:{tmp_path}", split=s) for s in ("train", "test"))
  assert np.bincount(train.labels).tolist() == [5, 1]
  assert test.labels.tolist() == [-1]
  with pytest.raises(ValueError, match=r"FolderSource.*test.* has no labels, and .*train.* has"):
    check_same_classes(train, test)


# The kept listing.


def make_set(root):
  for name in ("a/1.png", "a/2.png", "b/deep/3.png"):
    put(root / name)
  time.sleep(0.02)  # the clock of files ticks every few milliseconds
  return root


def test_a_kept_listing_is_used_and_lies_outside_of_the_data(tmp_path, cache, walks):
  root = make_set(tmp_path / "set")
  before = sorted(root.rglob("*"))
  first = FolderSource(str(root), split="train")
  second = FolderSource(str(root), split="train")
  assert len(walks) == 1
  assert [second[i] for i in range(3)] == [first[i] for i in range(3)]
  assert (second.class_names, repr(second)) == (first.class_names, repr(first))
  assert sorted(root.rglob("*")) == before
  assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
  "change",
  [
    lambda root: put(root / "b" / "deep" / "4.png"),
    lambda root: (root / "a" / "2.png").unlink(),
    lambda root: (root / "a" / "2.png").rename(root / "a" / "9.png"),
    lambda root: (root / "a" / "2.png").rename(root / "b" / "2.png"),
    lambda root: (root / "b").rename(root / "c"),
    lambda root: put(root / "new" / "5.png"),
    lambda root: (root / "link.png").symlink_to("a/1.png"),
  ],
  ids=["add", "remove", "rename", "move", "rename_folder", "add_folder", "add_link"],
)
def test_every_change_of_a_folder_is_seen_even_if_its_times_are_set_back(
  change, tmp_path, cache, walks
):
  root = make_set(tmp_path / "set")
  names(root)
  folders = [root, root / "a", root / "b", root / "b" / "deep"]
  times = {f: (f.stat().st_atime_ns, f.stat().st_mtime_ns) for f in folders}
  change(root)
  for folder, ns in times.items():
    if folder.exists():
      os.utime(folder, ns=ns)
  expected = sorted(str(p.relative_to(root)) for p in root.rglob("*.png"))
  assert names(root) == expected
  assert len(walks) == 2


def test_a_linked_folder_that_is_replaced_is_seen(tmp_path, cache, walks):
  for place in ("old", "new"):
    put(tmp_path / place / f"{place}.png")
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "link").symlink_to(tmp_path / "old")
  assert names(tmp_path / "set") == ["link/old.png"]
  (tmp_path / "old").rename(tmp_path / "gone")
  (tmp_path / "new").rename(tmp_path / "old")
  assert names(tmp_path / "set") == ["link/new.png"]


@pytest.mark.parametrize(
  "spoil",
  [
    lambda content: b"",
    lambda content: b"something else",
    lambda content: content[:-1],
    lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    lambda content: pickle.dumps(content),
  ],
  ids=["empty", "foreign", "cut", "flipped", "pickled"],
)
def test_a_damaged_cache_is_ignored_and_made_anew(spoil, tmp_path, cache, walks):
  root = make_set(tmp_path / "set")
  expected = names(root)
  (file,) = cache.iterdir()
  good = file.read_bytes()
  file.write_bytes(spoil(good))
  assert names(root) == expected
  assert len(walks) == 2
  assert file.read_bytes() == good
  names(root)
  assert len(walks) == 2


def test_the_cache_of_another_folder_is_not_taken_for_this_one(tmp_path, cache):
  (tmp_path / "one").mkdir()
  put(tmp_path / "one" / "x.png")
  names(tmp_path / "one")
  (file,) = cache.iterdir()
  (tmp_path / "two").mkdir()
  file.rename(index_cache._file("folder", str(tmp_path / "two")))
  assert index_cache.load("folder", str(tmp_path / "two")) is None


def test_a_folder_that_has_just_changed_is_not_kept(tmp_path, cache, monkeypatch):
  monkeypatch.setattr(index_cache, "SETTLED_NS", 10**12)
  names(make_set(tmp_path / "set"))
  assert not cache.exists()


def test_times_before_1970_are_listed_and_kept(tmp_path, cache, walks):
  root = make_set(tmp_path / "set")
  for folder in (root, root / "a"):
    os.utime(folder, (-10, -10))
  assert len(FolderSource(str(root), split="train")) == 3
  assert len(names(root)) == 3
  assert len(walks) == 1


def test_a_cache_that_cannot_be_written_is_said_and_harmless(tmp_path, monkeypatch, cache, caplog):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert len(names(make_set(tmp_path / "set"))) == 3
  assert "not kept" in caplog.text


def test_splits_are_found_in_any_case(tmp_path):
  """Else Train and Test would be two classes of one set, the test pictures among them."""
  for split, label in (("Train", "a"), ("Train", "b"), ("TEST", "a"), ("TEST", "b")):
    put(tmp_path / split / label / "1.png")
  for split in ("train", "test"):
    source = FolderSource(str(tmp_path), split=split)
    assert (len(source), source.class_names) == (2, ("a", "b"))


def test_a_class_named_as_a_split_is_said(tmp_path, caplog):
  for name in ("bus/0.png", "car/0.png", "train/0.png", "notes/a.txt", "val/0.png"):
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
  assert len(FolderSource(str(tmp_path / "set"), split="train")) == 1
  (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
  assert "train is taken for the split" in line
  assert "(bus, car)" in line
