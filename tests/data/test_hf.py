"""Local Hugging Face sets, written here with pyarrow as that library lays them out."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssrl_jax.data import hf
from ssrl_jax.data.decode import DamagedImage, decode
from ssrl_jax.data.sources import labels_of, open_source

FEATURES = {
  "image": {"_type": "Image"},
  "label": {"_type": "ClassLabel", "names": ["ash", "bone", "coal"]},
  "note": {"dtype": "string", "_type": "Value"},
}


def picture(value):
  file = io.BytesIO()
  Image.new("RGB", (8, 6), (value, value, value)).save(file, format="PNG")
  return file.getvalue()


def table(values, features=FEATURES, label=lambda i: i % 3):
  rows = {
    "image": pa.array(
      [{"bytes": picture(i), "path": None} for i in values],
      pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    ),
    "label": pa.array([label(i) for i in values], pa.int64()),
    "note": pa.array(["x" for _ in values]),
  }
  metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
  return pa.table(rows).replace_schema_metadata(metadata)


def write_parquet(path, values, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(table(values, **options), path, row_group_size=7)


def write_arrow(path, values):
  path.parent.mkdir(parents=True, exist_ok=True)
  written = table(values)
  with pa.ipc.new_stream(path, written.schema) as stream:
    stream.write_table(written, max_chunksize=7)


def parquet_set(root):
  write_parquet(root / "data" / "train-00000-of-00002.parquet", range(20))
  write_parquet(root / "data" / "train-00001-of-00002.parquet", range(20, 30))
  write_parquet(root / "data" / "test-00000-of-00001.parquet", range(30, 35))


def saved_set(root):
  write_arrow(root / "train" / "data-00000-of-00002.arrow", range(20))
  write_arrow(root / "train" / "data-00001-of-00002.arrow", range(20, 30))
  write_arrow(root / "train" / "cache-0123456789abcdef.arrow", range(3))
  write_arrow(root / "test" / "data-00000-of-00001.arrow", range(30, 35))


def levels(source):
  return [int(decode(source[i]["image"], canvas=8)[0][0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("write", [parquet_set, saved_set])
def test_rows_are_read_in_their_order_with_class_names(write, tmp_path):
  write(tmp_path)
  source = open_source(f"hf:{tmp_path}", split="train")
  assert levels(source) == list(range(30))
  assert source.class_names == ("ash", "bone", "coal")
  assert [source[i]["label"] for i in range(30)] == [i % 3 for i in range(30)]
  np.testing.assert_array_equal(labels_of(source), source.labels)
  assert "00001-of-00002" in source.name(20)
  test = open_source(f"hf:{tmp_path}", split="validation")
  assert (levels(test), test.num_classes) == ([30, 31, 32, 33, 34], 3)
  copy = pickle.loads(pickle.dumps(source))
  assert (levels(copy), repr(copy)) == (levels(source), repr(source))
  assert repr(source) == f"HfSource('hf:{tmp_path}', split='train', num_examples=30, num_classes=3)"


def test_no_more_row_groups_are_kept_than_the_limit(tmp_path, monkeypatch):
  parquet_set(tmp_path)
  source = open_source(f"hf:{tmp_path}", split="train")
  group = hf._read(*source._groups[0], "image").nbytes
  monkeypatch.setattr(hf, "KEPT_BYTES", 2 * group)
  order = np.random.default_rng(0).integers(0, 30, 100).tolist()
  assert [int(decode(source[i]["image"], canvas=8)[0][0, 0, 0]) for i in order] == order
  assert 1 <= len(source._kept) <= 2


def test_features_may_be_missing_or_partly_known(tmp_path):
  write_parquet(tmp_path / "a" / "x.parquet", range(6), features=None)
  source = open_source(f"hf:{tmp_path}/a", split="train")
  assert (levels(source), source.class_names) == (list(range(6)), ("0", "1", "2"))
  unlabelled = {"image": FEATURES["image"], "note": FEATURES["note"]}
  write_parquet(tmp_path / "b" / "x.parquet", range(6), features=unlabelled)
  source = open_source(f"hf:{tmp_path}/b", split="train")
  assert (source.num_classes, source.labels.tolist()) == (None, [-1] * 6)
  write_parquet(tmp_path / "c" / "x.parquet", range(6), label=lambda i: None if i else 2)
  assert open_source(f"hf:{tmp_path}/c", split="train").labels.tolist() == [2, -1, -1, -1, -1, -1]


def test_numbers_are_those_of_all_splits_and_none_that_no_class_could_have(tmp_path):
  def write(split, labels):
    rows = table(range(len(labels)), features=None, label=lambda i: labels[i])
    pq.write_table(rows, tmp_path / f"{split}.parquet")
    return open_source(f"hf:{tmp_path}", split=split)

  write("test", [2, None, 0])
  train = write("train", [0, 1, 0])
  assert (train.class_names, train.labels.tolist()) == (("0", "1", "2"), [0, 1, 0])
  test = open_source(f"hf:{tmp_path}", split="test")
  assert (test.class_names, test.labels.tolist()) == (("0", "1", "2"), [2, -1, 0])
  with pytest.raises(ValueError, match="a label is -5; expected 0 and more, or -1 for none"):
    write("train", [0, -5, 1])
  with pytest.raises(ValueError, match="a label is 1,000,000,000, of 2 pictures"):
    write("train", [10**9, 1])
  (tmp_path / "train.parquet").unlink()
  pq.write_table(table([0], features=None, label=lambda i: None), tmp_path / "test.parquet")
  assert write("train", [None, -1]).num_classes is None


def test_rows_in_several_places_are_not_mixed(tmp_path):
  write_parquet(tmp_path / "small" / "train-0.parquet", range(3))
  write_parquet(tmp_path / "large" / "train-0.parquet", range(6))
  with pytest.raises(ValueError, match=r"in 2 places: .*large/\*\.parquet, .*small/\*\.parquet"):
    open_source(f"hf:{tmp_path}", split="train")
  assert len(open_source(f"hf:{tmp_path}/small", split="train")) == 3


def test_a_row_without_bytes_is_damage_and_strange_columns_are_named(tmp_path):
  column = pa.array(
    [{"bytes": None, "path": None}], hf_type := table([0]).schema.field("image").type
  )
  assert pa.types.is_struct(hf_type)
  pq.write_table(pa.table({"image": column}), tmp_path / "train.parquet")
  with pytest.raises(DamagedImage, match=r"train\.parquet, group 0, row 0 is empty"):
    open_source(f"hf:{tmp_path}", split="train")[0]
  pq.write_table(pa.table({"image": [[1, 2]]}), tmp_path / "train.parquet")
  with pytest.raises(ValueError, match=r"column 'image' is list<.*expected encoded pictures"):
    open_source(f"hf:{tmp_path}", split="train")
  pq.write_table(pa.table({"photo": [b"x"]}), tmp_path / "train.parquet")
  with pytest.raises(ValueError, match=r"needs one picture .* among \['photo'\]"):
    open_source(f"hf:{tmp_path}", split="train")


def test_without_pyarrow_it_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs pyarrow: pip install -e '.\[hf\]'"):
    open_source(f"hf:{tmp_path}", split="train")


def test_a_split_without_labels_is_not_missed_and_nulls_of_any_width_are_none(tmp_path):
  data = io.BytesIO()
  Image.new("RGB", (4, 4)).save(data, format="PNG")
  pictures = [data.getvalue()] * 3
  labels = pa.array([1, None, 0], pa.uint8())
  (tmp_path / "data").mkdir()
  pq.write_table(pa.table({"image": pictures, "label": labels}), tmp_path / "data/train-0.parquet")
  pq.write_table(pa.table({"image": pictures}), tmp_path / "data/test-0.parquet")
  assert open_source(f"hf:{tmp_path}", split="train").labels.tolist() == [1, -1, 0]
  assert open_source(f"hf:{tmp_path}", split="test").num_classes is None
  pq.write_table(pa.table({"image": pictures}), tmp_path / "data/train-1.parquet")
  with pytest.raises(ValueError, match=r"train-1.parquet has no column 'label'"):
    open_source(f"hf:{tmp_path}", split="train")
