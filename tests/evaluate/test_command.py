"""What `python -m ssrl_jax.evaluate` refuses, and how its options may be written."""

import pytest

from configs import smoke
from ssrl_jax.evaluate import __main__ as command
from ssrl_jax.files import write_json


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
  """Runs the command on a run without a checkpoint; returns the config that it would judge by."""
  write_json(tmp_path / "config.json", smoke.get_config("simclr").to_dict())
  configs = []
  monkeypatch.setattr(command, "run", lambda values, config: configs.append(config) or 0)

  def call(*arguments):
    status = command.cli(["evaluate", f"--workdir={tmp_path}", *arguments])
    return configs.pop() if status == 0 else None

  return call


@pytest.mark.parametrize("prefix", ["--", "--config.", "-config."])
def test_options_may_be_written_as_training_has_them(prefix, evaluate):
  config = evaluate(f"{prefix}evaluate.knn.k=3", f"{prefix}data.num_test", "7")
  assert (config.evaluate.knn.k, config.data.num_test) == (3, 7)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--evaluate.knn.kk=1", "unknown option 'evaluate.knn.kk'; did you mean 'evaluate.knn.k'? in "
     "evaluate.knn: k, temperature"),
    ("--config.evaluate.knn.kk=1", "did you mean 'evaluate.knn.k'? in evaluate.knn: k,"),
    ("--evaluate.kn.k=1", "did you mean 'evaluate.knn.k'? in evaluate: "),
    ("--evaluate.knn.something=1", "unknown option 'evaluate.knn.something'; in evaluate.knn: k,"),
    ("--data.sourc=x", "did you mean 'data.source'? in data: "),
    ("--evaluate.knn=3", "the option 'evaluate.knn' is a group; set one of its k, temperature"),
    ("--config.optim.learning_rate=1", "--config.optim.learning_rate=1: an evaluation can change "
     "evaluate, data, mesh, the rest is fixed"),
  ],
)  # fmt: skip
def test_an_unknown_option_names_the_nearest_and_its_own_group(argument, message, evaluate, capsys):
  assert evaluate(argument) is None
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
  assert "fsdp" not in line
  assert "linear_sgd.decay" not in line


def test_an_unknown_protocol_is_refused_before_anything_is_loaded(tmp_path, capsys):
  write_json(tmp_path / "config.json", smoke.get_config("simclr").to_dict())  # no checkpoint
  assert command.cli(["evaluate", f"--workdir={tmp_path}", "--evals=knn,linaer"]) == 1
  assert "unknown evaluation 'linaer'; did you mean 'linear'?" in capsys.readouterr().err
