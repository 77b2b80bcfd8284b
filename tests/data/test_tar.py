"""WebDataset archives: read in place, by an index that is kept."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data import index_cache, tar
from ssrl_jax.data.decode import DamagedImage, decode
from ssrl_jax.data.sources import open_source


def picture(value):
  file = io.BytesIO()
  Image.new("RGB", (8, 6), (value, value, value)).save(file, format="PNG")
  return file.getvalue()


def pack(path, members, **options):
  """Members are (name, bytes); text becomes its bytes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", **options) as archive:
    for name, content in members:
      content = content.encode() if isinstance(content, str) else content
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def levels(source):
  return [int(decode(source[i]["image"], canvas=8)[0][0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def archives(tmp_path):
  """Two archives of train with labels 0 to 3, one of validation with 0 and 1 only."""
  for k in range(2):
    members = []
    for i in range(k * 5, k * 5 + 5):
      members += [(f"dir/{i:04d}.cls", str(i % 4)), (f"dir/{i:04d}.png", picture(10 * i))]
    pack(tmp_path / "set" / f"some-train-{k:04d}.tar", members)
  members = [(f"{i}.{e}", c) for i in (0, 1) for e, c in (("PNG", picture(i)), ("cls", f"{i}\n"))]
  pack(tmp_path / "set" / "some-validation-0000.tar", members)
  return tmp_path / "set"


def test_archives_are_read_in_place_in_their_order(archives):
  before = sorted(archives.rglob("*"))
  source = open_source(f"tar:{archives}", split="train")
  assert levels(source) == [10 * i for i in range(10)]
  assert source.labels.tolist() == [i % 4 for i in range(10)]
  assert [source[i]["label"] for i in range(10)] == source.labels.tolist()
  assert source.class_names == tuple("0123")
  assert source.name(7) == "some-train-0001.tar/dir/0007"
  assert sorted(archives.rglob("*")) == before
  copy = pickle.loads(pickle.dumps(source))
  assert (repr(copy), levels(copy)) == (repr(source), levels(source))
  assert repr(source) == (
    f"TarSource('tar:{archives}', split='train', num_examples=10, num_classes=4)"
  )


def test_a_pattern_chooses_archives_and_splits_share_their_classes(archives):
  assert levels(open_source(f"tar:{archives}/*train-0001*", split="train")) == [50, 60, 70, 80, 90]
  test = open_source(f"tar:{archives}", split="test")
  assert (levels(test), test.num_classes) == ([0, 1], 4)
  assert len(open_source(f"tar:{archives}/some-train-0000.tar", split="train")) == 5
  with pytest.raises(ValueError, match=r"no split 'test'; it has: train$"):
    open_source(f"tar:{archives}/*train*", split="test")
  with pytest.raises(FileNotFoundError, match=r"no files for tar:.*nothing\*; give tar:PATH"):
    open_source(f"tar:{archives}/nothing*", split="train")


def test_archives_that_name_no_split_are_left_out_aloud(archives, caplog):
  pack(archives / "extra.tar", [("1.png", picture(1))])
  assert len(open_source(f"tar:{archives}", split="train")) == 10
  assert "1 files name no split and are left out, e.g." in caplog.text


def test_classes_may_be_names_or_in_json_or_missing(tmp_path):
  pack(tmp_path / "a.tar", [
    ("1.json", json.dumps({"label": "emu", "text": "x"})), ("1.png", picture(1)),
    ("2.png", picture(2)), ("2.json", json.dumps({"label": "never"})), ("2.cls", " cat\n"),
    ("3.png", picture(3)), ("3.json", "[1]"), ("4.json", "{"), ("4.png", picture(4)),
  ])  # fmt: skip
  source = open_source(f"tar:{tmp_path}", split="train")
  assert source.class_names == ("cat", "emu")
  assert source.labels.tolist() == [1, 0, -1, -1]
  pack(tmp_path / "a.tar", [("1.png", picture(1))])
  source = open_source(f"tar:{tmp_path}", split="train")
  assert (source.num_classes, source.class_names, source.labels.tolist()) == (None, (), [-1])


def test_minus_one_is_no_class_and_a_truth_value_no_label(tmp_path):
  pack(tmp_path / "a.tar", [
    ("1.cls", "-1"), ("1.png", picture(1)), ("2.json", '{"label": -1}'), ("2.png", picture(2)),
    ("3.json", '{"label": true}'), ("3.png", picture(3)), ("4.cls", "10"), ("4.png", picture(4)),
    ("5.json", '{"label": 2}'), ("5.png", picture(5)),
  ])  # fmt: skip
  source = open_source(f"tar:{tmp_path}", split="train")
  assert source.class_names == tuple(str(k) for k in range(11))
  assert source.labels.tolist() == [-1, -1, -1, 10, 2]
  pack(tmp_path / "a.tar", [("1.cls", "-1"), ("1.png", picture(1))])
  source = open_source(f"tar:{tmp_path}", split="train")
  assert (source.num_classes, source.labels.tolist()) == (None, [-1])


def test_member_names_are_split_at_the_first_dot(tmp_path, caplog):
  name = os.fsdecode(b"d.ir/caf\xe9 " + b"x" * 200)
  pack(tmp_path / "a.tar", [
    (f"{name}.png", picture(5)), (f"{name}.seg.png", picture(6)), (f"{name}.cls", "1"),
    ("other/notes.txt", "x"),
  ], encoding="utf-8", errors="surrogateescape")  # fmt: skip
  source = open_source(f"tar:{tmp_path}", split="train")
  assert (levels(source), source.labels.tolist()) == ([5], [1])
  assert source.name(0) == f"a.tar/{name}"
  assert "1 pictures named KEY.WORD.EXTENSION left out" in caplog.text


@pytest.mark.parametrize(
  ("name", "members", "message"),
  [
    ("a.tar", [("x.txt", "no")], "no pictures in 1 archives"),
    ("a.tar", [("x.png", b"1"), ("x.jpg", b"2")], "two pictures of the key 'x'"),
    ("a.tar", [("x.png", b"1"), ("x.cls", b"\xff")], "cannot be indexed"),
  ],
)
def test_archives_that_cannot_be_read_say_why(name, members, message, tmp_path):
  pack(tmp_path / name, members)
  with pytest.raises(ValueError, match=message):
    open_source(f"tar:{tmp_path}", split="train")


@pytest.mark.parametrize("spoil", ["compressed", "cut", "text"])
def test_what_is_no_whole_uncompressed_archive_is_refused(spoil, archives):
  path = archives / "some-train-0001.tar"
  if spoil == "compressed":
    with tarfile.open(path, "w:gz") as archive:
      archive.addfile(tarfile.TarInfo("x.png"))
  else:
    path.write_bytes(path.read_bytes()[:3000] if spoil == "cut" else b"text" * 500)
  with pytest.raises(ValueError, match=r"some-train-0001\.tar cannot be indexed .*uncompressed"):
    open_source(f"tar:{archives}", split="train")


def test_links_within_an_archive_are_refused(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as archive:
    info = tarfile.TarInfo("x.png")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(info)
  with pytest.raises(ValueError, match=r"'x.png' of .* is no plain file"):
    open_source(f"tar:{tmp_path}", split="train")


def test_an_archive_that_shrinks_or_goes_is_damage(archives):
  source = open_source(f"tar:{archives}", split="train")
  path = archives / "some-train-0001.tar"
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(
    DamagedImage, match=r"shorter since it was indexed: some-train-0001\.tar/dir/0005"
  ):
    source[5]
  path.unlink()
  with pytest.raises(DamagedImage, match="No such file"):
    source[5]
  assert levels(source.__class__(str(archives), split="train"))[:5] == [0, 10, 20, 30, 40]


def test_the_index_is_kept_and_made_anew_for_a_changed_archive(archives, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(index_cache, "SETTLED_NS", -(10**18))
  read, indexed = tar._read_index, []
  monkeypatch.setattr(tar, "_read_index", lambda a: indexed.append(os.path.basename(a)) or read(a))
  first = open_source(f"tar:{archives}", split="train")
  assert len(indexed) == 3
  second = open_source(f"tar:{archives}", split="train")
  assert len(indexed) == 3
  assert (levels(second), repr(second)) == (levels(first), repr(first))
  np.testing.assert_array_equal(second.labels, first.labels)
  pack(archives / "some-train-0000.tar", [("0.png", picture(99))])
  assert levels(open_source(f"tar:{archives}", split="train"))[:2] == [99, 50]
  assert indexed[3:] == ["some-train-0000.tar"]


@pytest.mark.parametrize(
  ("label", "message"),
  [("-5", "a label is -5; expected 0 and more, or -1"), ("2000000", "a label is 2,000,000, of 2")],
)
def test_numbers_that_are_no_classes_are_refused(label, message, tmp_path):
  members = [("1.cls", "0"), ("1.png", picture(1)), ("2.cls", label), ("2.png", picture(2))]
  pack(tmp_path / "a.tar", members)
  with pytest.raises(ValueError, match=message):
    open_source(f"tar:{tmp_path}", split="train")


@pytest.mark.parametrize(
  "spoil",
  [
    lambda data, header: data[:header] + bytes([data[header] ^ 255]) + data[header + 1 :],
    lambda data, header: data[: header + 100],
    lambda data, header: data[:header],
    lambda data, header: data + data,
  ],
  ids=["damaged header", "cut within a header", "cut before a header", "two joined"],
)
def test_an_archive_does_not_end_where_it_is_damaged(spoil, tmp_path):
  path = tmp_path / "set" / "train-0.tar"
  pack(path, [(f"{i}.png", picture(i)) for i in range(8)])
  with tarfile.open(path) as archive:
    header = archive.getmembers()[5].offset
  path.write_bytes(spoil(path.read_bytes(), header))
  with pytest.raises(ValueError, match=r"0.tar cannot be indexed \((it is damaged|more follow)"):
    open_source(f"tar:{tmp_path / 'set'}", split="train")


def test_compressed_archives_beside_others_are_refused(archives):
  with tarfile.open(archives / "some-train-0002.tar.gz", "w:gz"):
    pass
  with pytest.raises(ValueError, match=r"some-train-0002.tar.gz is compressed.*decompress it"):
    open_source(f"tar:{archives}", split="train")


def test_labels_of_other_kinds_are_counted_and_whole_floats_are_numbers(tmp_path, caplog):
  members = []
  for i, text in enumerate(['{"label": 3.0}', '{"label": 0.5}', '{"label": ', "[1]", "{}"]):
    members += [(f"{i}.png", picture(i)), (f"{i}.json", text)]
  members += [("5.png", picture(5)), ("5.cls", "\ufeff1")]
  pack(tmp_path / "set" / "train-0.tar", members)
  source = open_source(f"tar:{tmp_path / 'set'}", split="train")
  assert source.labels.tolist() == [3, -1, -1, -1, -1, 1]
  assert "in 3 KEY.json the label is no whole number or name" in caplog.text


def test_a_source_is_named_by_its_whole_path(archives, monkeypatch):
  monkeypatch.chdir(archives.parent)
  assert repr(open_source("tar:set", split="train")) == repr(
    open_source(f"tar:{archives}", split="train")
  )
