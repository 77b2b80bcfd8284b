import json
import subprocess
import sys

import pytest

from ssrl_jax.run_folder import merge_evaluation, read_config, read_facts
from tests.commands import ROOT

OPTIONS = {"evaluate": {"knn": {"k": 5}, "linear": {"epochs": 2}}, "data": {"source": "a"}}


def merge(path, results, digest="d", options=OPTIONS):
  merge_evaluation(path, results, options=options, step=8, state_digest=digest)
  return json.loads(path.read_text())


def test_figures_of_one_state_and_the_same_pictures_add_up(tmp_path):
  path = tmp_path / "new" / "evaluation.json"
  merge(path, {"trained": {"knn/accuracy": 1.0}})
  merge(path, {"random_init": {"knn/accuracy": 2.0}})
  record = merge(path, {"trained": {"linear/accuracy": 3.0}})
  assert record["results"] == {
    "trained": {"knn/accuracy": 1.0, "linear/accuracy": 3.0},
    "random_init": {"knn/accuracy": 2.0},
  }
  assert record["options"] == {"knn": {"k": 5}, "linear": {"epochs": 2}}


def test_damaged_files_are_named(tmp_path):
  path = tmp_path / "evaluation.json"
  path.write_text("{")
  with pytest.raises(ValueError, match=r"evaluation\.json is damaged .*; remove it, or bring it"):
    merge(path, {"trained": {"knn/accuracy": 1.0}})
  (tmp_path / "data.json").write_text("")
  with pytest.raises(ValueError, match=r"data\.json is damaged"):
    read_facts(tmp_path)


def test_figures_by_other_options_are_dropped_for_all_encoders(tmp_path):
  """The file says one set of options a protocol: it must be true of every figure in it."""
  path = tmp_path / "evaluation.json"
  merge(path, {"trained": {"knn/accuracy": 1.0, "linear/accuracy": 3.0}})
  other = OPTIONS | {"evaluate": OPTIONS["evaluate"] | {"knn": {"k": 200}}}
  record = merge(path, {"random_init": {"knn/accuracy": 2.0}}, options=other)
  assert record["results"] == {
    "trained": {"linear/accuracy": 3.0},
    "random_init": {"knn/accuracy": 2.0},
  }
  assert record["options"]["knn"] == {"k": 200}
  larger = {"options": OPTIONS | {"evaluate": OPTIONS["evaluate"] | {"size": 64}}}
  new = {"trained": {"linear/accuracy": 4.0}}
  assert merge(path, new, **larger)["results"] == new


def test_figures_of_an_older_form_of_the_file_are_kept(tmp_path):
  path = tmp_path / "evaluation.json"
  record = merge(path, {"trained": {"knn/accuracy": 1.0}})
  del record["view"]
  path.write_text(json.dumps(record))
  record = merge(path, {"raw_pixels": {"knn/accuracy": 2.0}})
  assert sorted(record["results"]) == ["raw_pixels", "trained"]
  assert "view" in record


def test_figures_of_another_state_or_of_other_pictures_are_dropped(tmp_path):
  path, new = tmp_path / "evaluation.json", {"trained": {"linear/accuracy": 3.0}}
  for change in ({"digest": "e"}, {"options": OPTIONS | {"data": {"source": "b"}}}):
    path.unlink(missing_ok=True)
    merge(path, {"trained": {"knn/accuracy": 1.0}})
    assert merge(path, new, **change)["results"] == new


def test_how_pictures_are_read_drops_nothing(tmp_path):
  path = tmp_path / "evaluation.json"
  merge(path, {"trained": {"knn/accuracy": 1.0}})
  threads = OPTIONS | {"data": {"source": "a", "threads": 4}}
  record = merge(path, {"trained": {"linear/accuracy": 3.0}}, options=threads)
  assert record["results"]["trained"] == {"knn/accuracy": 1.0, "linear/accuracy": 3.0}


def test_a_protocol_s_figures_are_replaced_whole(tmp_path):
  """Its run against another encoder gave one more."""
  path = tmp_path / "evaluation.json"
  merge(path, {"trained": {"knn/accuracy": 1.0, "knn/cka": 2.0}})
  record = merge(path, {"trained": {"knn/accuracy": 3.0}})
  assert record["results"]["trained"] == {"knn/accuracy": 3.0}


@pytest.mark.parametrize("text", ["", "[1]", '{"model_type": "vit"}', '{"method": 3}'])
def test_config_of_something_else_is_refused(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config.json is no run's config; choose another --workdir"):
    read_config(tmp_path)


def test_two_processes_may_write_one_file(tmp_path):
  path = tmp_path / "table.json"
  code = (
    "import pathlib, sys\nfrom ssrl_jax.files import write_json\n"
    "for i in range(500): write_json(pathlib.Path(sys.argv[1]), list(range(i)))"
  )
  command = [sys.executable, "-c", code, str(path)]
  both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
  assert [process.communicate()[1] for process in both] == [b"", b""]
  assert json.loads(path.read_text()) == list(range(499))
  assert list(tmp_path.iterdir()) == [path]


def test_figures_of_as_many_pictures_add_up_and_of_more_replace(tmp_path, caplog):
  path, one = tmp_path / "evaluation.json", {"trained": {"knn/accuracy": 1.0}}
  add = lambda results, n: merge_evaluation(  # noqa: E731
    path, results, options=OPTIONS, step=8, state_digest="d", num_pictures=n
  )
  add(one, (5, 3))
  add({"trained": {"linear/accuracy": 2.0}}, ())  # of a protocol with its own pictures
  assert len(json.loads(path.read_text())["results"]["trained"]) == 2
  assert not caplog.records
  add(one, (5, 4))
  assert json.loads(path.read_text())["results"] == one
  assert "was of another num_pictures and is replaced; --out=NAME.json keeps" in caplog.text
