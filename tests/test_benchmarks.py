"""The benchmarks run and report what they promise; what they measure is asserted nowhere."""

import numpy as np
import pytest

from benchmarks import accumulate, blocks, data, evaluate, index, leak, loop, scaling, step
from configs import digits
from ssrl_jax.data import index_cache


def test_step_benchmark_measures_the_step_and_its_parts():
  config = digits.get_config("simclr")
  config.update({"batch_size": 16})
  config.mesh.devices = 1
  row = step.measure(config, steps=1)
  assert (row["method"], row["batch"], row["precision"]) == ("simclr", 16, "float32")
  for name in ("step_ms", "views_ms", "forward_ms", "forward_backward_ms", "peak_mib"):
    assert row[name] > 0
  assert row["views_per_s"] == pytest.approx(2 * row["images_per_s"])


def test_blocks_benchmark_compares_equal_values_and_runs_nothing_over_its_limit():
  plain, cut = (blocks.measure("nt_xent", 64, 8, block, limit_gib=1.0) for block in (0, 16))
  assert plain["value"] == cut["value"]
  assert blocks.measure("nt_xent", 64, 8, 0, limit_gib=0.0)["seconds"] == "not run"


def test_accumulate_benchmark_measures_memory_and_time():
  config = digits.get_config("simclr")
  config.update({"batch_size": 8})
  config.encoder.name, config.encoder.vit.patch = "vit_pico", 16
  (row,) = accumulate.measure(config, [(4, True)], rounds=1)
  assert (row["parts"], row["remat"], row["relative_time"]) == (4, "True", 1)
  for name in ("temporary_mib", "kept_mib", "seconds"):
    assert row[name] > 0


def test_evaluate_benchmark_measures_each_part():
  rows = [
    evaluate.measure_features("vit_pico", images=20, batch=16),
    evaluate.measure_knn(queries=5, bank=30, dim=4),
    evaluate.measure_linear(3, train=20, dim=4, classes=2, epochs=1),
  ]
  assert [row["what"] for row in rows] == ["features", "k-NN", "linear"]
  assert len({tuple(row) for row in rows}) == 1
  for row in rows:
    assert row["seconds"] > 0
    assert row["compile_s"] >= 0
    assert row["per_s"] > 0


def test_index_benchmark_lists_with_and_without_what_was_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(index_cache, "SETTLED_NS", 0)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "set").mkdir()
  rows = index.measure(str(tmp_path / "set"), 30, 3, tmp_path / "cache", cold=False)
  warm = [row for row in rows if row["what"].endswith("warm")]
  assert [row["runs"] for row in warm] == [index.REPEATS] * 3
  assert {row["wall_seconds"] for row in rows if row not in warm} == {"not run"}
  assert len(list((tmp_path / "cache" / "ssrl_jax").iterdir())) == 1


def test_data_benchmark_measures_the_way_to_the_canvas(tmp_path):
  jpegs = data.make_jpegs("", 2)
  (tmp_path / "a.jpg").write_bytes(jpegs[0])
  rows = [
    *data.measure_parts(jpegs, 224, seconds=0.01),
    *data.measure_peers(tmp_path, 224, 0.01, torch="", tensorflow=""),
    *data.measure_memory(10),
  ]
  assert {tuple(row) for row in rows} == {("setting", "what", "per_s", "percent")}
  what = {row["what"]: row for row in rows}
  assert what[data.BARE]["percent"] == "100.0"
  assert what["tf.data"]["per_s"] == "not run"
  assert float(what["after 10 batches"]["per_s"].replace(",", "")) > 0


def test_scaling_model_charges_a_network_only_where_there_is_one():
  work = scaling.Work((1e9, 0.0), 1e6, 1e9, 1e9, 1e5, 10, (0.0, 1e3))
  chip = scaling.CHIPS["TPU v6e"]
  alone, one_slice, two = (scaling.step_time(work, chip, n, 4096) for n in (1, 256, 512))
  assert alone["step"] == max(alone["compute"], alone["memory"])
  assert alone["norms"] == alone["loss"] == alone["gradients"] == 0
  assert two["norms"] > one_slice["norms"] > 0
  assert two["compute"] == pytest.approx(one_slice["compute"] / 2)


def test_leak_benchmark_reports_memory_files_and_threads(tmp_path):
  rows = leak.measure(steps=100, cache="", workdir=tmp_path)
  assert [row["step"] for row in rows] == [50, 100]
  assert all(row["resident_mib"] > 0 and row["open_files"] > 0 for row in rows)


def test_loop_benchmark_holds_the_loop_up_for_bare_steps_and_leaves_evaluations_out(monkeypatch):
  clock = [0.0]

  def passes(seconds):
    clock[0] += seconds

  monkeypatch.setattr(loop.Turns, "_now", lambda self: np.array([clock[0], 2 * clock[0]]))
  turns = loop.Turns(lambda steps: passes(steps * 3.0), 10)
  evaluate = turns.evaluating(lambda state: passes(1000.0))
  turns("starting at step 0")
  passes(500.0)  # compiling
  turns("step 10/30")
  passes(40.0)
  evaluate(None)
  turns("step 20/30")
  ((looped, alone),) = turns.laps
  assert looped.tolist() == [40.0, 80.0]
  assert alone.tolist() == [30.0, 60.0]
  assert [wall for wall, _ in turns.evaluations] == [1000.0]
