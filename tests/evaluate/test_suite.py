"""Which protocols run, and that what is measured is kept whatever comes after."""

import dataclasses
import pathlib

import pytest

from configs import smoke
from ssrl_jax import main
from ssrl_jax.data.sources import NoPictures
from ssrl_jax.evaluate import EVALS, Protocol, suite
from ssrl_jax.evaluate.suite import evaluate_run, open_test, runs
from ssrl_jax.experiment import build
from ssrl_jax.run_folder import Facts, write_run
from ssrl_jax.watch import Costs


class Pictures:
  def __init__(self, num_classes):
    self.num_classes = num_classes
    self.class_names = tuple(str(i) for i in range(num_classes or 0))


def able(num_classes, has_test):
  return {n for n, p in EVALS.items() if runs(p, Pictures(num_classes), has_test)}


def test_protocols_run_where_their_needs_are_met():
  own = {"detection", "segmentation"}
  assert able(10, True) == set(EVALS)
  assert able(None, True) == own | {"geometry", "attention"}
  assert able(10, False) == able(None, False) == own


@pytest.mark.parametrize(
  ("evals", "opened", "said"),
  [("knn,geometry", True, "knn will not be run"), ("knn", False, "knn will not"),
   ("detection", False, ""), ("geometry", True, "")],
)  # fmt: skip
def test_test_pictures_of_an_unlabelled_run_are_opened_where_they_are_of_use(
  evals, opened, said, caplog
):
  config = smoke.get_config("simclr")
  config.evaluate.detection.source = "coco:."
  experiment = build(config, num_examples=128, num_classes=None)
  assert (open_test(experiment, Pictures(None), evals) is not None) == opened
  assert said in caplog.text
  assert bool(caplog.records) == bool(said)


def test_a_split_that_was_named_and_is_not_there_is_refused():
  """Before training, and not passed over: nobody wants to hear of it days later."""
  config = smoke.get_config("simclr")
  config.data.test = "tset"
  experiment = build(config, num_examples=128, num_classes=10)
  with pytest.raises(ValueError, match=r"no test pictures \(.*tset.*name another split by data"):
    open_test(experiment, Pictures(10), "knn")


def test_pictures_that_nobody_named_may_be_missing(monkeypatch, caplog):
  def no_split(config, split):
    raise FileNotFoundError(f"no folder {split}")

  monkeypatch.setattr(suite, "open_split", no_split)
  config = smoke.get_config("simclr")
  experiment = build(config, num_examples=128, num_classes=10)
  assert open_test(experiment, Pictures(10), "knn") is None
  assert "no folder test" in caplog.text


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_a_protocol_without_its_own_pictures_is_refused_before_anything_runs(name):
  experiment = build(smoke.get_config("simclr"), num_examples=128, num_classes=10)
  with pytest.raises(ValueError, match=f"{name} needs pictures of its own: set evaluate.{name}"):
    open_test(experiment, Pictures(10), f"knn,{name}")


@dataclasses.dataclass
class Judged:
  folder: pathlib.Path | None = None
  moved: object = None


def test_each_protocol_s_figures_are_kept_before_the_next_one_runs(monkeypatch):
  """An evaluation that is killed, or fails, has lost no more than the protocol it was at."""

  def killed(evaluation):
    raise OSError("killed here")

  monkeypatch.setattr(suite, "trained_evaluation", lambda *a, **k: Judged())
  monkeypatch.setattr(suite, "control", lambda name, trained, experiment: trained)
  quick, long = Protocol(lambda evaluation: {"knn/accuracy": 5.0}, {}), Protocol(killed, {})
  monkeypatch.setattr(suite, "select", lambda evals: {"knn": quick, "finetune": long})
  config, kept = smoke.get_config("simclr"), []
  config.evaluate.knn = config.evaluate.finetune = {}
  experiment = build(config, num_examples=128, num_classes=10)
  with pytest.raises(OSError, match="killed here"):
    evaluate_run(
      experiment, None, Pictures(10), Pictures(10), evals="knn", say=print, keep=kept.append
    )
  assert kept == [{"trained": {"knn/accuracy": 5.0}}]


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_what_one_protocol_refuses_costs_no_figure_of_another(monkeypatch, error):
  def refuses(evaluation):
    raise error("class 3 has no picture")

  figures = Protocol(lambda evaluation: {"knn/accuracy": 5.0}, {})
  chosen = {"low_label": Protocol(refuses, {}), "knn": figures}
  monkeypatch.setattr(suite, "trained_evaluation", lambda *a, **k: Judged())
  monkeypatch.setattr(suite, "control", lambda name, trained, experiment: trained)
  monkeypatch.setattr(suite, "select", lambda evals: chosen)
  config = smoke.get_config("simclr")
  config.evaluate.knn = config.evaluate.low_label = {}
  experiment = build(config, num_examples=128, num_classes=10)
  evaluated = evaluate_run(
    experiment, None, Pictures(10), Pictures(10), evals="low_label,knn", say=print
  )
  assert evaluated.results == {n: {"knn/accuracy": 5.0} for n in ("trained", "random_init")}
  with pytest.raises(ValueError, match="low_label could not be run: class 3 has no picture"):
    evaluated.check()
  evaluated._replace(refused={}).check()


def test_table_shows_what_was_found_also_of_other_settings_than_its_columns_are_for():
  found = {"low_label/50pct/accuracy": 31.25, "low_label/50pct/std": 2.0, "knn/accuracy": 40.0}
  lines = suite.results_table({"trained": found, "raw_pixels": {"knn/accuracy": 20.0}}).splitlines()
  assert lines[0].split() == ["k-NN", "%", "low_label/50pct"]
  assert lines[1].endswith("40.0             31.2")
  assert lines[2].split()[-3:] == ["20.0", "not", "run"]
  assert suite.results_table({}) == "no evaluation was run"
  assert "7.0" in suite.results_table({"trained": {"attention/entropy": 7.0}})


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("size", 0, "evaluate.size is 0"),
    ("crop", 0.0, "evaluate.crop 0.0"),
    ("knn.k", 0, "evaluate.knn.k is 0; expected 1 or more"),
  ],
)
def test_options_out_of_range_are_refused_before_anything_runs(key, value, message):
  config = smoke.get_config("simclr")
  config.evaluate.update_from_flattened_dict({key: value})
  experiment = build(config, num_examples=128, num_classes=10)
  with pytest.raises(ValueError, match=message):
    open_test(experiment, Pictures(10), "knn")


@pytest.mark.parametrize("name", ["detection", "attention"])
def test_own_pictures_are_not_looked_for_where_no_protocol_asks_for_them(tmp_path, name):
  config = smoke.get_config("simclr")
  config.evaluate[name].source = f"coco:{tmp_path}"
  experiment = build(config, num_examples=128, num_classes=10)
  assert open_test(experiment, NoPictures(), name) is None
  chosen = suite.asked(name, config)
  assert all(runs(protocol, NoPictures(), False) for protocol in chosen.values())
  assert suite.asked("robustness", config)["robustness"].needs == "labels"


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("detection.source", "coco:{}/gone"),
    ("robustness.source", "imagenet_c:{}/gone"),
    ("robustness.baseline", "{}/gone"),
    ("bias.groups", "{}/gone"),
    ("low_label.labels_file", "{}/gone"),
  ],
)
def test_files_that_options_name_are_looked_for_before_anything_runs(tmp_path, option, value):
  config, name = smoke.get_config("simclr"), option.split(".")[0]
  config.evaluate.update_from_flattened_dict({option: value.format(tmp_path)})
  experiment = build(config, num_examples=128, num_classes=10)
  with pytest.raises(FileNotFoundError, match=f"evaluate.{option} names {tmp_path}/gone, which"):
    open_test(experiment, Pictures(10), f"knn,{name}")


def test_run_that_these_devices_cannot_share_evenly_names_the_way_out(tmp_path):
  config = smoke.get_config("simclr")
  config.batch_size, config.mesh.devices = 12, 1
  write_run(tmp_path, config, Facts(128, 10))
  config.mesh.devices = 8
  with pytest.raises(ValueError, match=r"with a batch_size 12 is not .* --mesh.devices=N"):
    suite.load_run(tmp_path, mesh=config.mesh)


@pytest.mark.parametrize("found", [{}, {"knn/accuracy": 5.0, "linear/accuracy": 6.0}])
def test_figures_are_written_where_a_later_protocol_of_the_run_fails(monkeypatch, tmp_path, found):
  def evaluate_run(*arguments, keep, **options):
    for name, value in found.items():
      keep({"trained": {name: value}})
    raise ValueError("bias: min_count")

  written = []
  monkeypatch.setattr(main, "evaluate_run", evaluate_run)
  monkeypatch.setattr(main, "write_results", lambda *a, **k: written.append(a[3]))
  experiment = build(smoke.get_config("simclr"), num_examples=128, num_classes=10)
  costs = Costs(tmp_path / "costs.json", started=0.0)
  options = {"say": print, "moved": print, "command": "", "costs": costs}
  with pytest.raises(ValueError, match="min_count"):
    main.judge(experiment, None, Pictures(10), None, tmp_path, **options)
  assert written == ([{"trained": found}] if found else [])
