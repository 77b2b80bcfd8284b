"""The benchmarks run and report what they promise; what they measure is asserted nowhere."""

import pytest

from benchmarks import accumulate, blocks, data, evaluate, index, scaling, step
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
