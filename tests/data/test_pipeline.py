import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data import pipeline
from ssrl_jax.data.pipeline import (
  MAX_DAMAGED,
  PADDING,
  each_as_trained,
  eval_batches,
  train_batches,
)
from ssrl_jax.data.sampling import Sampling, position
from ssrl_jax.data.sources import Mixture, Subset, open_source, read_together

SIDE = 8


class Greys:
  """Picture i is grey level i % 251 and its label i % 5; those in `damaged` cannot be read."""

  num_classes = 5
  class_names = tuple("abcde")

  def __init__(self, n, damaged=()):
    self._n, self._damaged = n, frozenset(damaged)

  def __len__(self):
    return self._n

  def __getitem__(self, i):
    if i in self._damaged:
      return {"image": b"<html>", "label": i % 5}
    return {"image": np.full((6, 4, 3), i % 251, np.uint8), "label": i % 5}

  def __repr__(self):
    return f"Greys({self._n})"


class Mislabelled(Greys):
  """Label 0 everywhere but at position 3."""

  def __init__(self, n, label):
    super().__init__(n)
    self._label = label

  def __getitem__(self, i):
    return super().__getitem__(i) | {"label": self._label if i == 3 else 0}


def take(source, num_batches, *, seed=0, batch_size=8, start_step=0, **options):
  batches = train_batches(
    source, seed=seed, batch_size=batch_size, start_step=start_step, canvas=SIDE, **options
  )
  taken = [next(batches) for _ in range(num_batches)]
  batches.close()
  return taken


def evaluate(source, **options):
  batches = eval_batches(source, canvas=SIDE, **options)
  taken = list(batches)
  batches.close()
  return taken


def ids(batches):
  return np.array([b["id"] for b in batches])


def assert_same(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
      assert a[key].dtype == b[key].dtype


class Clips(Greys):
  """Clip i has i % 9 + 1 frames; frame k has grey level 10 * i + k. (clip, frame) may be damaged,
  or of another size."""

  def __init__(self, n, damaged=(), odd=()):
    super().__init__(n)
    self._broken, self._odd = frozenset(damaged), frozenset(odd)

  def __getitem__(self, i):
    frames = tuple(self._frame(i, k) for k in range(i % 9 + 1))
    return {"image": frames[len(frames) // 2], "frames": frames, "label": i % 5}

  def _frame(self, i, k):
    if (i, k) in self._broken:
      return b"<html>"
    return np.full((6, 5 if (i, k) in self._odd else 4, 3), 10 * i + k, np.uint8)


def frames_shown(batches):
  """{(epoch of 3 batches, clip): frames}"""
  return {
    (step // 3, int(i)): (image[:, 0, 0, 0].astype(int) - 10 * i).tolist()
    for step, batch in enumerate(batches)
    for i, image in zip(batch["id"], batch["image"])
  }


def test_batch_has_the_shapes_and_types_of_the_contract():
  (batch,) = take(Greys(100), 1)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "image": ((8, SIDE, SIDE, 3), "uint8"),
    "extent": ((8, 2), "int32"),
    "label": ((8,), "int32"),
    "id": ((8,), "int64"),
    "substituted": ((8,), "bool"),
  }
  assert not batch["substituted"].any()
  np.testing.assert_array_equal(batch["extent"], [[6, 4]] * 8)
  np.testing.assert_array_equal(batch["label"], batch["id"] % 5)
  for image, i in zip(batch["image"], batch["id"]):
    assert (image[:6, :4] == i % 251).all()
    assert not image[6:].any()
    assert not image[:, 4:].any()


def test_an_epoch_has_each_example_at_most_once_and_the_next_differs():
  epochs = ids(take(Greys(45), 10)).reshape(2, 40)  # 5 of 45 do not fill a batch
  for epoch in epochs:
    assert len(set(epoch.tolist())) == 40
    assert set(epoch.tolist()) <= set(range(45))
  assert (epochs[0] != epochs[1]).mean() > 0.5
  assert set(epochs[0].tolist()) != set(epochs[1].tolist())  # others are left out
  assert (ids(take(Greys(45), 10, seed=1)).reshape(2, 40) != epochs).mean() > 0.5


def test_order_is_shuffled_over_the_whole_source():
  first = ids(take(Greys(1000), 10)).ravel()
  assert abs(first.mean() - 500) < 100
  assert abs(np.corrcoef(np.arange(80), first)[0, 1]) < 0.35


@pytest.mark.parametrize("start", [1, 7, 12, 13, 40])
def test_entering_at_a_step_is_the_stream_from_there(start):
  whole = take(Greys(100, damaged={5, 50}), start + 4)  # 12 steps an epoch
  assert_same(take(Greys(100, damaged={5, 50}), 4, start_step=start), whole[start:])


def test_entering_far_into_training_is_immediate():
  (batch,) = take(Greys(100), 1, start_step=10**9)
  assert len(set(batch["id"].tolist())) == 8


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batches(count):
  whole = ids(take(Greys(100), 30))
  parts = [take(Greys(100), 30, process_index=p, process_count=count) for p in range(count)]
  np.testing.assert_array_equal(np.concatenate([ids(p) for p in parts], axis=1), whole)


def test_restart_on_another_number_of_processes_continues_the_stream():
  whole = ids(take(Greys(100), 20))
  parts = [take(Greys(100), 5, start_step=15, process_index=p, process_count=2) for p in range(2)]
  np.testing.assert_array_equal(np.concatenate([ids(p) for p in parts], axis=1), whole[15:])


@pytest.mark.parametrize("threads", [2, 5, 16])
def test_threads_do_not_change_the_stream(threads):
  source = Greys(100, damaged={3, 4, 99})
  assert_same(take(source, 15, threads=threads), take(source, 15))
  assert_same(evaluate(source, batch_size=16, threads=threads), evaluate(source, batch_size=16))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_stream(workers):
  source = Greys(100, damaged={3, 4, 99})
  want = take(source, 9, start_step=7)
  got = take(source, 9, start_step=7, workers=workers, threads=2)
  assert_same(got, want)
  assert all(type(v) is np.ndarray for b in got for v in b.values())  # no shared memory


def test_damaged_example_is_replaced_by_the_next_and_keeps_its_id(caplog):
  source = Greys(40, damaged={7, 8, 39})
  with caplog.at_level(logging.WARNING, logger="absl"):
    got = take(source, 20)  # four epochs
  messages = [r.getMessage() for r in caplog.records]
  np.testing.assert_array_equal(ids(got), ids(take(Greys(40), 20)))
  stand_in = {7: 9, 8: 9, 39: 0}
  for batch in got:
    for j, i in enumerate(batch["id"].tolist()):
      shown = stand_in.get(i, i)
      assert batch["substituted"][j] == (i in stand_in)
      assert batch["label"][j] == shown % 5
      assert batch["image"][j, 0, 0, 0] == shown
  assert sum(b["substituted"].sum() for b in got) == 3 * 4
  assert_same(take(source, 20), got)
  assert len(messages) == 3  # each once, not once an epoch
  for i in stand_in:
    assert sum(f"example {i} of Greys(40) is damaged" in m for m in messages) == 1


def test_what_is_never_drawn_stands_in_for_nothing():
  weights = np.where(np.isin(np.arange(40), (8, 9, 39)), 0, 1) / 37
  source, sampling = Greys(40, damaged={7, 38}), Sampling(weights, np.zeros(40, np.int8))
  stand_in = {7: 10, 38: 0}
  seen = set()
  for batch in take(source, 20, sampling=sampling):
    for j, i in enumerate(position(batch["id"]).tolist()):
      seen.add(i)
      assert batch["image"][j, 0, 0, 0] == stand_in.get(i, i)
  assert {7, 38} < seen
  every = each_as_trained(source, canvas=8, workers=0, threads=1, sampling=sampling)
  shown = np.concatenate([batch["image"][:, 0, 0, 0] for batch in every])
  assert shown[[7, 38]].tolist() == [10, 0]


def test_damaged_file_is_named(tmp_path, caplog):
  for k in range(8):
    Image.new("RGB", (4, 4)).save(tmp_path / f"{k}.png")
  (tmp_path / "5.png").write_bytes(b"")
  with caplog.at_level(logging.WARNING, logger="absl"):
    take(open_source(f"folder:{tmp_path}", split="train"), 1)
  assert sum("5.png" in r.getMessage() for r in caplog.records) == 1


def test_hopeless_damage_stops_with_an_error():
  almost = Greys(400, damaged=range(MAX_DAMAGED - 1))
  assert sum(b["substituted"].sum() for b in take(almost, 50)) == MAX_DAMAGED - 1
  with pytest.raises(ValueError, match=rf"{MAX_DAMAGED} examples in a row.*repair.*6 bytes"):
    take(Greys(400, damaged=range(400)), 1)


@pytest.mark.parametrize("label", [5, -2])
@pytest.mark.parametrize("threads", [1, 2])
def test_impossible_label_is_an_error(label, threads):
  source = Mislabelled(8, label)
  with pytest.raises(ValueError, match=rf"example 3 of Greys\(8\) has label {label}; .*num_class"):
    take(source, 1, threads=threads)
  with pytest.raises(ValueError, match=f"has label {label}"):
    evaluate(source, batch_size=8)


def test_unknown_labels_are_kept():
  (batch,) = take(Mislabelled(8, -1), 1)
  assert sorted(batch["label"].tolist()) == [-1] + [0] * 7


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 101}, r"Greys\(100\) has 100 examples.*batch_size to at most 100"),
    ({"batch_size": 10, "process_count": 4}, "not divisible by 4 processes; nearest: 8 or 12"),
    ({"process_count": 2, "process_index": 2}, "process_index 2"),
    ({"start_step": -1}, "start_step is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"workers": -1}, "workers is -1"),
    ({"threads": 0}, "threads is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
  ],
)
def test_bad_options_name_the_value_and_the_fix(options, message):
  with pytest.raises(ValueError, match=message):
    take(Greys(100), 1, **options)


def test_closed_iterator_is_at_its_end():
  batches = train_batches(Greys(50), seed=0, batch_size=8, start_step=0, canvas=SIDE, threads=2)
  next(batches)
  batches.close()
  batches.close()
  assert next(batches, None) is None


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 31])
def test_evaluation_counts_each_example_once(n, count):
  parts = [
    evaluate(Greys(n), batch_size=8, process_index=p, process_count=count) for p in range(count)
  ]
  assert {len(p) for p in parts} == {-(-n // 8)}
  joined = [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*parts)]
  whole = evaluate(Greys(n), batch_size=8)
  assert_same(joined, whole)
  weight = np.concatenate([b["weight"] for b in whole])
  assert weight.dtype == np.float32
  np.testing.assert_array_equal(ids(whole).ravel()[weight == 1], np.arange(n))
  assert (ids(whole).ravel()[weight == 0] == PADDING).all()
  assert weight.sum() == n


def test_evaluation_pads_with_black_and_marks_damage():
  last = evaluate(Greys(11, damaged={9}), batch_size=8)[-1]
  np.testing.assert_array_equal(last["id"], [8, 9, 10] + [PADDING] * 5)
  np.testing.assert_array_equal(last["weight"], [1, 0, 1, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(last["substituted"], [False, True] + [False] * 6)
  np.testing.assert_array_equal(last["label"], [3, -1, 0] + [-1] * 5)
  assert not last["image"][last["weight"] == 0].any()
  assert (last["extent"] > 0).all()  # so that nothing is divided by zero


def test_evaluation_of_a_part_spreads_over_the_source():
  batches = evaluate(Greys(100), batch_size=8, limit=10)
  weight = np.concatenate([b["weight"] for b in batches])
  np.testing.assert_array_equal(ids(batches).ravel()[weight == 1], np.arange(0, 100, 10))
  everything = evaluate(Greys(10), batch_size=8, limit=99)
  assert sum(b["weight"].sum() for b in everything) == 10


# Clips: 25 of them make three batches of 8 an epoch.


def test_clips_add_a_frames_axis_only_where_there_is_more_than_one():
  (batch,) = take(Clips(25), 1, frames=3)
  assert batch["image"].shape == (8, 3, SIDE, SIDE, 3)
  np.testing.assert_array_equal(batch["extent"], [[6, 4]] * 8)
  np.testing.assert_array_equal(batch["label"], batch["id"] % 5)
  (batch,) = take(Clips(25), 1)
  assert batch["image"].shape == (8, SIDE, SIDE, 3)


def test_frames_are_of_the_clip_without_repetition_while_there_are_any():
  shown = frames_shown(take(Clips(25), 30, frames=4))
  for (_, i), frames in shown.items():
    there = i % 9 + 1
    assert set(frames) <= set(range(there))
    assert len(set(frames)) == min(4, there)
  assert {f for (_, i), frames in shown.items() if i == 8 for f in frames} == set(range(9))
  assert any(frames != sorted(frames) for frames in shown.values())
  assert len({tuple(frames) for (_, i), frames in shown.items() if i == 17}) > 5  # new each epoch


def test_frames_come_from_one_window_of_the_span():
  spans = {
    max(f) - min(f)
    for (_, i), f in frames_shown(take(Clips(25), 60, frames=2, frame_span=3)).items()
    if i % 9 >= 4
  }
  assert spans == {1, 2}


def test_frames_do_not_depend_on_start_processes_or_threads():
  options = {"frames": 3, "frame_span": 4, "seed": 5}
  source = Clips(25, damaged={(8, 2), (12, 0)})
  whole = take(source, 9, **options)
  assert_same(take(source, 4, start_step=5, **options), whole[5:])
  assert_same(take(source, 9, threads=3, **options), whole)
  parts = [take(source, 9, process_index=p, process_count=2, **options) for p in range(2)]
  for part in zip(*parts, whole):
    images = np.concatenate([b["image"] for b in part[:2]])
    np.testing.assert_array_equal(images, part[2]["image"])
  assert frames_shown(take(source, 3, **options)) != frames_shown(
    take(source, 3, **(options | {"seed": 6}))
  )


@pytest.mark.slow
def test_frames_and_sampling_do_not_depend_on_workers():
  options = {"frames": 3, "sampling": Sampling(np.arange(25) / 300, np.arange(25) % 2)}
  want = take(Clips(25), 7, start_step=4, **options)
  assert_same(take(Clips(25), 7, start_step=4, workers=2, **options), want)


def test_clip_with_a_damaged_or_odd_frame_is_replaced_where_it_is_drawn(caplog):
  source = Clips(25, damaged={(8, 2)}, odd={(17, 4)})
  with caplog.at_level(logging.WARNING, logger="absl"):
    got = take(source, 60, frames=3)
  replaced = {8: 0, 17: 0}
  for batch in got:
    for image, i, substituted in zip(batch["image"], batch["id"].tolist(), batch["substituted"]):
      level = image[:, 0, 0, 0].astype(int)
      assert (level // 10 == i + substituted).all()
      if substituted:
        replaced[i] += 1
      else:
        assert 10 * 8 + 2 not in level
        assert 10 * 17 + 4 not in level
  assert 0 < replaced[8] < 20
  assert 0 < replaced[17] < 20
  messages = [r.getMessage() for r in caplog.records]
  assert len(messages) == 2
  assert sum(": 6x5 pixels on the canvas, and another frame" in m for m in messages) == 1


def test_evaluation_sees_the_middle_frame():
  batches = evaluate(Clips(25), batch_size=8)
  for batch in batches:
    assert batch["image"].ndim == 4
    for image, i, weight in zip(batch["image"], batch["id"], batch["weight"]):
      if weight:
        assert image[0, 0, 0] == 10 * i + (i % 9 + 1) // 2


def test_frames_of_still_pictures_are_refused():
  with pytest.raises(ValueError, match=r"frames is 2 .*Greys\(100\) has still pictures"):
    take(Greys(100), 1, frames=2)


# Uneven sampling.

UNEVEN = Sampling(np.array([30, 5, 1, 0, *[4] * 16]) / 100, np.zeros(20, np.int8))


def test_sampled_stream_enters_anywhere_and_is_shared_by_processes():
  whole = take(Greys(20), 12, sampling=UNEVEN)  # 16 of 20 draws an epoch are whole batches
  assert_same(take(Greys(20), 5, start_step=7, sampling=UNEVEN), whole[7:])
  parts = [
    ids(take(Greys(20), 12, sampling=UNEVEN, process_index=p, process_count=4)) for p in range(4)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), ids(whole))
  (far,) = take(Greys(20), 1, start_step=10**9, sampling=UNEVEN)
  assert 3 not in position(far["id"])
  epochs = ids(whole).reshape(6, 16)
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
  for epoch in epochs:
    assert len(set(epoch.tolist())) == 16  # every copy has an id of its own
    assert np.sum(position(epoch) == 0) >= 2  # 6 of 20 draws, of which 4 fill no batch


def test_copies_are_read_and_reported_as_their_example(caplog):
  with caplog.at_level(logging.WARNING, logger="absl"):
    got = take(Greys(20, damaged={0}), 4, sampling=UNEVEN)
  for batch in got:
    where = position(batch["id"])
    np.testing.assert_array_equal(batch["substituted"], where == 0)
    shown = np.where(where == 0, 1, where)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], shown)
    np.testing.assert_array_equal(batch["label"], shown % 5)
  assert sum(b["substituted"].sum() for b in got) >= 8
  (message,) = [r.getMessage() for r in caplog.records]
  assert "example 0 of Greys(20) is damaged" in message


def test_reader_goes_to_workers_without_its_threads():
  reader = pipeline._Reader(Greys(20), SIDE, 2)
  want = reader.train((np.zeros(8, int), np.arange(8)))
  got = pickle.loads(pickle.dumps(reader)).train((np.zeros(8, int), np.arange(8)))
  assert_same([got], [want])
  reader.close()


class Together(Greys):
  """Reads many at once."""

  def read_together(self, positions):
    self.asked = getattr(self, "asked", 0) + 1
    return {i: self[i] for i in positions}


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_together_changes_no_batch(threads):
  source, damaged = Together(20, damaged={0, 7}), {0, 7}
  options = {"sampling": UNEVEN, "threads": threads}
  assert_same(take(source, 5, **options), take(Greys(20, damaged), 5, **options))
  assert_same(evaluate(source, batch_size=8), evaluate(Greys(20, damaged), batch_size=8))
  assert 5 + 3 <= source.asked <= 5 + 3 + 3  # once a batch; some are read ahead


def test_empty_share_of_a_batch_reads_nothing():
  """As the last batch's of an evaluation by many processes may be."""
  source = Subset(Together(20), 5, seed=0)
  assert read_together(source, []) == {}
  parts = [evaluate(source, batch_size=8, process_index=i, process_count=2) for i in range(2)]
  found = np.concatenate([batch["id"] for part in parts for batch in part])
  assert np.sort(position(found[found != PADDING])).tolist() == list(range(5))


def test_parts_and_mixtures_read_together_what_their_sources_do():
  whole, other = Together(20), Greys(20)
  mixed = Mixture([other, Subset(whole, 12, seed=0)])
  assert_same(take(mixed, 5), take(Mixture([other, Subset(Greys(20), 12, seed=0)]), 5))
  assert 5 <= whole.asked <= 5 + 3
  positions = [3, 19, 25, 31]  # of the second: -1, -1, 5, 11
  inner = mixed.parts[1].positions
  together = mixed.read_together(positions)
  assert {i: x["image"].max() for i, x in together.items()} == {25: inner[5], 31: inner[11]}
