import itertools
import logging
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data import dense
from ssrl_jax.data.decode import decode
from ssrl_jax.data.dense import IGNORE, open_boxes, open_masks, read_mask
from ssrl_jax.data.dense_batches import eval_batches, train_batches
from tests.dense_sets import NAMES, draw, save, write_coco, write_masks


def take(batches, count):
  found = list(itertools.islice(batches, count))
  batches.close()
  return found


def test_boxes_are_those_of_the_file_on_a_smaller_canvas(tmp_path):
  source = open_boxes(write_coco(tmp_path, n=3, size=(24, 48)), split="train")
  assert source.class_names == NAMES
  (batch,) = take(eval_batches(source, batch_size=4, canvas=24), 2)
  np.testing.assert_array_equal(batch["extent"][:3], [[12, 24]] * 3)
  np.testing.assert_array_equal(batch["weight"], [1, 1, 1, 0])
  np.testing.assert_array_equal(batch["box_valid"], [[True] * 2] * 3 + [[False] * 2])
  for i in range(3):
    _, _, boxes, labels = draw(i, (24, 48))
    corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes])
    np.testing.assert_allclose(batch["boxes"][i], corners / 2, rtol=1e-6)
    np.testing.assert_array_equal(batch["box_label"][i], labels)


def test_masks_are_those_of_the_files_and_unknown_outside_the_picture(tmp_path):
  source = open_masks(write_masks(tmp_path, n=2, size=(24, 32)), split="train")
  assert source.class_names == ("ground", *NAMES)
  (batch,) = take(eval_batches(source, batch_size=2, canvas=32), 2)
  for i in range(2):
    np.testing.assert_array_equal(batch["mask"][i, :24], draw(i, (24, 32))[1])
  assert np.all(batch["mask"][:, 24:] == IGNORE)


def test_a_mask_is_shrunk_by_nearest_neighbour_without_new_numbers(tmp_path):
  stripes = np.tile(np.array([[0, 3]], np.uint8), (40, 20))
  name = write_masks(tmp_path, n=1, size=(40, 40), change=lambda i, mask: stripes)
  (batch,) = take(eval_batches(open_masks(name, split="train"), batch_size=1, canvas=13), 2)
  assert set(np.unique(batch["mask"])) <= {0, 3}


def test_training_order_is_a_function_of_seed_and_step(tmp_path):
  source = open_boxes(write_coco(tmp_path, n=7), split="train")
  options = {"seed": 3, "batch_size": 3, "canvas": 8}
  ids = [b["id"].tolist() for b in take(train_batches(source, **options), 6)]
  again = [b["id"].tolist() for b in take(train_batches(source, start_step=2, **options), 4)]
  assert ids[2:] == again
  for epoch in range(3):
    assert len({i for batch in ids[2 * epoch : 2 * epoch + 2] for i in batch}) == 6
  assert ids[:2] != ids[2:4]
  threaded = take(train_batches(source, threads=3, **options), 6)
  assert [b["id"].tolist() for b in threaded] == ids


def test_processes_share_the_global_batch(tmp_path):
  source = open_boxes(write_coco(tmp_path, n=7), split="train")
  options = {"batch_size": 4, "canvas": 8}
  for batches, extra, steps in ((train_batches, {"seed": 0}, 3), (eval_batches, {}, 2)):
    whole = take(batches(source, **options, **extra), steps)
    parts = [
      take(batches(source, process_index=p, process_count=2, **options, **extra), steps)
      for p in range(2)
    ]
    for one, *two in zip(whole, *parts):
      np.testing.assert_array_equal(np.concatenate([b["id"] for b in two]), one["id"])


def test_evaluation_has_every_example_once(tmp_path):
  source = open_masks(write_masks(tmp_path, n=7), split="train")
  found = take(eval_batches(source, batch_size=3, canvas=8), 9)
  ids = np.concatenate([b["id"][b["weight"] > 0] for b in found])
  np.testing.assert_array_equal(ids, np.arange(7))
  (some,) = take(eval_batches(source, batch_size=3, canvas=8, limit=3), 9)
  np.testing.assert_array_equal(some["id"], [0, 2, 4])


def test_a_source_can_be_sent_to_a_worker(tmp_path):
  source = pickle.loads(pickle.dumps(open_boxes(write_coco(tmp_path, n=2), split="train")))
  assert len(source) == 2


def test_a_damaged_picture_counts_nothing_and_is_named(tmp_path, caplog):
  name = write_coco(tmp_path, n=3)
  file = tmp_path / "images" / "train" / "1.png"
  file.write_bytes(file.read_bytes()[:-200])  # the header is whole
  (batch,) = take(eval_batches(open_boxes(name, split="train"), batch_size=3, canvas=32), 2)
  np.testing.assert_array_equal(batch["weight"], [1, 0, 1])
  assert not batch["box_valid"][1].any()
  assert "1.png" in caplog.text


def test_boxes_are_clipped_dropped_and_counted(tmp_path, caplog):
  def change(content):
    one, two, three, four, five = content["annotations"][:5]
    one["bbox"] = [-4, 20, 10, 30]  # reaches out at the left and below
    two["bbox"] = [3, 3, 0, 5]
    three["bbox"] = [40, 3, 5, 5]  # wholly outside
    four["iscrowd"] = 1
    five["bbox"] = [0, 0, 32.01, 5]  # rounding, not an error

  with caplog.at_level(logging.WARNING):
    source = open_boxes(write_coco(tmp_path, change=change), split="train")
  np.testing.assert_array_equal(source.boxes[0].corners, [[0, 20, 6, 32]])
  assert len(source.boxes[1].labels) == 1
  assert source.boxes[1].crowd.tolist() == [True]
  counts = {"clipped_boxes": 1, "empty_boxes": 2, "crowd_boxes": 1, "truncated_boxes": 0}
  assert counts.items() <= source.dropped.items()
  assert "1 boxes reach beyond" in caplog.text
  assert "2 boxes have no area" in caplog.text
  (batch,) = take(eval_batches(source, batch_size=6, canvas=32), 2)
  assert batch["box_valid"].sum() == 9  # of 12, without the crowd and the two of no area


def test_more_boxes_than_the_padding_leave_the_largest(tmp_path, caplog):
  def change(content):
    content["annotations"][0]["bbox"], content["annotations"][1]["bbox"] = (
      [0, 0, 3, 3],
      [4, 4, 9, 9],
    )

  name = write_coco(tmp_path, n=2, change=change)
  source = open_boxes(name, split="train", max_boxes=1)
  assert source.dropped["truncated_boxes"] == 2
  assert "max_boxes 1" in caplog.text
  (batch,) = take(eval_batches(source, batch_size=2, canvas=32), 2)
  np.testing.assert_array_equal(batch["boxes"][0], [[4, 4, 13, 13]])
  assert open_boxes(name, split="train").max_boxes == 2


def test_missing_unlisted_and_bare_pictures_are_counted(tmp_path, caplog):
  def change(content):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 12]

  name = write_coco(tmp_path, n=4, change=change)
  (tmp_path / "images" / "train" / "0.png").unlink()
  (tmp_path / "images" / "train" / "1.png").write_bytes(b"no picture")
  save(tmp_path / "images" / "train" / "new.png", draw(9)[0])
  source = open_boxes(name, split="train")
  assert [p[-5:] for p in source.paths] == ["2.png", "3.png"]
  assert len(source.boxes[0].labels) == 0
  counts = {"missing_images": 1, "damaged_images": 1, "unlisted_images": 1}
  assert counts.items() <= source.dropped.items()
  for word in ("0.png", "1.png", "new.png"):
    assert word in caplog.text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c["annotations"][3].update(category_id=7), r"category_id 7; expected one of \(5, "),
    (
      lambda c: c["annotations"][3].update(image_id=99),
      "annotation 4 is of image 99, which is not",
    ),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]; expected \[left"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "bbox .*nan"),
    (lambda c: c["images"][1].update(id=10), "1 image ids twice, first 10"),
    (lambda c: c["images"][1].update(width=64), "1.png has 64x32 pixels, but it has 32x32"),
    (lambda c: c["images"][1].update(file_name="./0.png"), "1 file_names twice, first 0.png"),
    (lambda c: c["categories"][1].update(id=5), "1 category ids twice, first 5"),
    (lambda c: c["categories"][1].update(id="x"), "words as category ids, first 'x', and numbers"),
    (lambda c: c["categories"].append(None), "train.json: category 3 in the list is None"),
    (lambda c: c["images"][1].update(id=[1]), r"train.json: image 1 in the list is {'id': \[1\]"),
    (lambda c: c["images"][1].update(file_name=7), "image 1 in the list is .*'file_name': 7"),
    (lambda c: c["images"][1].update(height="32"), "train.json: image 11 has height '32'"),
    (lambda c: c["annotations"].insert(1, 7), "train.json: annotation 1 is 7; expected an object"),
    (lambda c: c["annotations"][3].update(image_id=[10]), r"annotation 4 is of image \[10\]"),
    (lambda c: c["annotations"][3].update(category_id="5"), "annotation 4 has category_id '5'"),
    (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), r"annotation 1 has bbox \['1', 2"),
    (lambda c: c["annotations"][0].update(bbox=[None, 2, 3, 4]), "annotation 1 has bbox .None, 2"),
    (lambda c: c["annotations"][0].update(bbox=[True, 2, 3, 4]), "annotation 1 has bbox .True, 2"),
    (lambda c: c.update(annotations=None), "not in COCO's format"),
    (lambda c: c.pop("categories"), "not in COCO's format"),
    (lambda c: c.update(images=[]), "0 images and 3 categories"),
  ],
)
def test_broken_annotations_are_refused_in_one_line(tmp_path, change, message):
  name = write_coco(tmp_path, n=2, change=change)
  with pytest.raises(ValueError, match=message) as error:
    open_boxes(name, split="train")
  assert "\n" not in str(error.value)


def test_a_size_of_null_is_none_stated(tmp_path):
  name = write_coco(tmp_path, n=2, change=lambda c: c["images"][1].update(height=None, width=None))
  assert open_boxes(name, split="train").sizes.tolist() == [[32, 32]] * 2


def test_sources_that_are_not_there_are_refused(tmp_path):
  name = write_coco(tmp_path, n=2, split="val")
  assert len(open_boxes(name, split="test")) == 2  # val stands for test
  with pytest.raises(ValueError, match="no split 'train'; it has: val"):
    open_boxes(name, split="train")
  with pytest.raises(ValueError, match="source is ''; expected 'coco:PATH'"):
    open_boxes("", split="train")
  with pytest.raises(ValueError, match=r"source is 'coco:.*'; expected 'masks:PATH'"):
    open_masks(name, split="train")
  with pytest.raises(FileNotFoundError, match="no folder /nowhere; give coco:PATH"):
    open_boxes("coco:/nowhere", split="train")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match=r"no annotations/SPLIT.json in .*empty"):
    open_boxes(f"coco:{tmp_path / 'empty'}", split="train")
  with pytest.raises(FileNotFoundError, match=r"no folder masks/SPLIT in .*empty"):
    open_masks(f"masks:{tmp_path / 'empty'}", split="train")
  for i in (0, 1):
    (tmp_path / "images" / "val" / f"{i}.png").unlink()
  with pytest.raises(FileNotFoundError, match="none of the 2 pictures"):
    open_boxes(name, split="val")


def wider(i, mask):
  return np.pad(mask, ((0, 0), (0, i)))  # all but the first


def beyond(i, mask):
  return np.where(mask == 1, np.uint8(9), mask)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (wider, "2 of 3 masks have another size than their picture, first .*1.png has 33x32 pixels"),
    (beyond, "of 3 masks have numbers beyond the 4 classes, first .* with 9; expected 0 to 3"),
    (
      lambda i, mask: np.where(mask > 0, np.uint8(255), 0),
      "the 3 masks in .*train have only class 0 .*write the foreground as 1",
    ),
    (lambda i, mask: np.stack([mask] * 3, -1), "has 3 channels; expected one of class numbers"),
    (lambda i, mask: mask.astype(np.uint16) + 300, "numbers from 300 to 30[0-3]; at most 255"),
  ],
)
def test_broken_masks_are_refused_in_one_line(tmp_path, change, message):
  name = write_masks(tmp_path, n=3, change=change)
  with pytest.raises(ValueError, match=message) as error:
    open_masks(name, split="train")
  assert "\n" not in str(error.value)


def test_masks_of_one_class_are_refused_without_a_list_too(tmp_path):
  name = write_masks(tmp_path, n=2, change=lambda i, mask: np.where(mask > 0, np.uint8(255), 0))
  (tmp_path / "classes.txt").unlink()
  with pytest.raises(ValueError, match=r"have only class 0 .*write the foreground as 1"):
    open_masks(name, split="train")


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
def test_a_picture_that_lies_sideways_is_measured_upright(tmp_path, suffix):
  exif = Image.Exif()
  exif[274] = 6
  Image.new("RGB", (50, 30)).save(tmp_path / f"a.{suffix}", exif=exif)
  _, extent = decode((tmp_path / f"a.{suffix}").read_bytes(), canvas=50)
  assert tuple(extent) == dense._upright_size(tmp_path / f"a.{suffix}") == (50, 30)


def test_a_class_without_a_name_is_refused(tmp_path):
  name = write_masks(tmp_path, n=2)
  path = next(tmp_path.rglob("classes.txt"))
  path.write_text("ground\n\ncar\ntree\n")
  with pytest.raises(ValueError, match=r"line 2 of .*classes\.txt is empty; class 1 needs a name"):
    open_masks(name, split="train")


def test_two_pictures_of_one_name_are_refused_and_hidden_files_passed_over(tmp_path):
  name = write_masks(tmp_path, n=2)
  for part in ("images", "masks"):  # as macOS leaves them in an archive
    (tmp_path / part / "train" / "._0.png").write_bytes(b"no picture")
  assert len(open_masks(name, split="train")) == 2
  save(tmp_path / "images" / "train" / "1.bmp", draw(1)[0])
  with pytest.raises(ValueError, match=r"train has 1\.bmp and 1\.png; give them two names"):
    open_masks(name, split="train")


def test_a_mark_at_the_beginning_is_no_part_of_the_first_class(tmp_path):
  name = write_masks(tmp_path, n=2)
  classes = tmp_path / "classes.txt"
  classes.write_text(classes.read_text(), encoding="utf-8-sig")
  assert open_masks(name, split="train").class_names[0] == "ground"


def test_pictures_without_mask_and_the_reverse_are_left_out_and_counted(tmp_path, caplog):
  name = write_masks(tmp_path, n=4)
  (tmp_path / "images" / "train" / "0.png").unlink()
  (tmp_path / "masks" / "train" / "2.png").unlink()
  source = open_masks(name, split="train")
  assert len(source) == 2
  assert source.dropped == {"missing_masks": 1, "missing_images": 1}
  assert "0.png" not in caplog.text  # names are those up to the extension
  assert "first 2" in caplog.text
  for i in (1, 3):
    (tmp_path / "masks" / "train" / f"{i}.png").unlink()
  with pytest.raises(FileNotFoundError, match=r"no picture in .* has a mask of its name"):
    open_masks(name, split="train")


def test_without_a_list_the_highest_number_of_all_splits_tells_the_classes(tmp_path):
  write_masks(tmp_path, n=2, change=lambda i, mask: np.minimum(mask, 1))
  name = write_masks(
    tmp_path, n=2, split="test", change=lambda i, mask: np.where(mask > 0, 4, 255).astype(np.uint8)
  )
  (tmp_path / "classes.txt").unlink()
  for split in ("train", "test"):
    assert open_masks(name, split=split).class_names == ("0", "1", "2", "3", "4")


def test_a_mask_with_a_palette_is_read_as_numbers(tmp_path):
  name = write_masks(tmp_path, n=1)
  _, mask, _, _ = draw(0)
  im = Image.fromarray(mask)
  im.putpalette([7, 7, 7] * 256)
  im.save(tmp_path / "masks" / "train" / "0.png")
  (batch,) = take(eval_batches(open_masks(name, split="train"), batch_size=1, canvas=32), 2)
  np.testing.assert_array_equal(batch["mask"][0], mask)


def test_fewer_pictures_than_a_batch_are_refused(tmp_path):
  source = open_masks(write_masks(tmp_path, n=2), split="train")
  with pytest.raises(ValueError, match="2 examples, fewer than one batch of 4"):
    train_batches(source, seed=0, batch_size=4, canvas=8)


def test_real_masks_and_pictures_fit(data_dir, tmp_path):
  with zipfile.ZipFile(data_dir / "camvid240" / "val.zip") as z:
    names = [n for n in z.namelist() if n.startswith("masks/")][:3]
    for name in names:
      mask = np.asarray(Image.open(z.open(name)))
      save(tmp_path / "masks" / "val" / name[6:], np.where(mask == 11, 255, mask).astype(np.uint8))
      picture = tmp_path / "images" / "val" / f"{name[6:-4]}.jpg"
      picture.parent.mkdir(parents=True, exist_ok=True)
      picture.write_bytes(z.read(f"images/{name[6:-4]}.jpg"))
  source = open_masks(f"masks:{tmp_path}", split="test")
  (batch,) = take(eval_batches(source, batch_size=3, canvas=128), 2)
  assert batch["extent"].tolist() == [[96, 128]] * 3
  assert (batch["mask"][:, 96:] == IGNORE).all()
  assert len(np.unique(batch["mask"][:, :96])) > 5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_would_be_other_classes(tmp_path, bits):
  """Pillow reads 0, 1, 2, 3 of 2 bits as 0, 85, 170, 255; a file of 1 bit is 0 and 1."""
  rows = b"\x00" + bytes([0b01000000 if bits < 8 else 1] + [0] * (bits - 1))  # filter 0, 8 pixels
  chunk = lambda kind, content: (  # noqa: E731
    struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
  )
  header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
  parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  path = tmp_path / "mask.png"
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
  if bits in (2, 4):
    with pytest.raises(ValueError, match=f"mask.png is of {bits}-bit grey; save it with 8 bits"):
      read_mask(str(path))
  else:
    assert read_mask(str(path)).max() == 1
