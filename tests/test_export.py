"""An encoder into a file and out of it again: the command, `init_from`, a run of no epochs."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from configs import smoke
from ssrl_jax import export
from ssrl_jax.evaluate.suite import load_run
from ssrl_jax.models.torch_names import backbone_names, to_torch
from ssrl_jax.run_folder import Facts
from ssrl_jax.state import named_leaves
from tests.commands import Fork
from tests.untrained import save_untrained


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """plain/ and fused/: runs with one kind of backbone; encoder.safetensors: of the first."""
  root = tmp_path_factory.mktemp("export")
  for name, method in (("plain", "simclr"), ("fused", "fusion")):
    config = smoke.get_config(method)
    config.encoder.name = "resnet6"
    config.seed = 3
    config.data.update({"canvas": 16, "num_train": 40, "num_test": 24})
    config.global_views.size = config.evaluate.size = 16
    save_untrained(root / name, config, Facts(40, 10))
  assert exported(root / "plain", root / "encoder.safetensors") == 0
  return root


def exported(folder, out, *arguments):
  return export.cli(["export", f"--workdir={folder}", f"--out={out}", *arguments])


def judged(folder):
  experiment, state = load_run(folder)
  return dict(named_leaves(experiment.method.encoder.weights(state.params, state.method_state)))


def test_file_holds_the_encoder_and_how_to_feed_it(root):
  mine, file = judged(root / "plain"), root / "encoder.safetensors"
  expected = to_torch(mine, (2, 2))
  found = load_file(file)
  assert found.keys() == expected.keys()
  for name, x in found.items():
    np.testing.assert_array_equal(x, expected[name], err_msg=name)
  kernel_HWIO = mine["params/stem_conv/kernel"]
  np.testing.assert_array_equal(found["conv1.weight"], np.transpose(kernel_HWIO, (3, 2, 0, 1)))
  with safe_open(file, framework="numpy") as opened:
    facts = opened.metadata()
  assert json.loads(facts["encoder"])["name"] == "resnet6"
  assert json.loads(facts["mean"]) == list(load_run(root / "plain").experiment.config.data.mean)
  assert facts["image_size"] == "16"
  assert facts["format"] == "pt"  # what transformers asks for
  again = file.with_name("again.safetensors")
  assert exported(root / "plain", again) == 0
  assert again.read_bytes() == file.read_bytes()


def test_positions_and_image_size_are_of_one_grid(tmp_path):
  config = smoke.get_config("simclr")
  config.encoder.name, config.encoder.vit.patch = "vit_pico", 4
  config.data.update({"canvas": 16, "num_train": 40, "num_test": 24})
  config.global_views.size, config.evaluate.size = 16, 32
  save_untrained(tmp_path / "run", config, Facts(40, 10))
  assert exported(tmp_path / "run", tmp_path / "vit.safetensors") == 0
  assert load_file(tmp_path / "vit.safetensors")["pos_embed"].shape == (1, 1 + 4 * 4, 24)
  with safe_open(tmp_path / "vit.safetensors", framework="numpy") as opened:
    assert opened.metadata()["image_size"] == "16"


def test_of_a_wrapped_encoder_the_backbone_and_that_is_said(root, capsys, tmp_path):
  out = tmp_path / "new" / "fused.safetensors"
  assert exported(root / "fused", out) == 0
  assert "arrays that are not the backbone's, e.g. batch_stats/project" in capsys.readouterr().out
  mine = judged(root / "fused")
  inside = {short: mine[name] for short, name in backbone_names(mine).items()}
  assert all("/project" not in name for name in inside)
  found = load_file(out)
  assert found.keys() == load_file(root / "encoder.safetensors").keys()
  for name, x in to_torch(inside, (2, 2)).items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)
  assert [p.name for p in out.parent.iterdir()] == ["fused.safetensors"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=RUN", "--out=x.npz"], "expected a name that ends with .safetensors"),
    (["--workdir=/nowhere", "--out=x.safetensors"], "no run's folder"),
    (["--workdir=RUN", "--out=x.safetensors", "--step=7"], "no checkpoint of step 7; it has: 0"),
    (["--workdir=RUN", "--out=/dev/null/x.safetensors"], "/dev/null is a file, no folder"),
  ],
)
def test_what_cannot_be_is_one_line(arguments, message, root, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert export.cli(["export", *(a.replace("RUN", str(root / "plain")) for a in arguments)]) == 1
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_run_of_no_epochs_judges_the_file_s_encoder_and_may_go_on(root, tmp_path):
  command = [
    "--config=configs/smoke.py:byol",
    f"--config.init_from={root / 'encoder.safetensors'}",
    "--config.encoder.name=resnet6",
    "--config.steps=0",
    "--config.evaluate.evals=knn",
    f"--workdir={tmp_path / 'run'}",
  ]
  code, out, err = Fork(*command, "--config.epochs=0").finish()
  assert code == 0, err
  assert "starting at step 0, with the encoder of" in out
  record = json.loads((tmp_path / "run" / "results.json").read_text())
  assert record["step"] == record["total_steps"] == 0
  assert record["results"]["trained"] != record["results"]["random_init"]
  page = (tmp_path / "run" / "report.html").read_text()
  assert "as it came" in page
  assert "Health of the embedding" not in page
  expected = judged(root / "plain")
  for name, x in judged(tmp_path / "run").items():  # the target's: both begin with it
    np.testing.assert_array_equal(x, expected[name], err_msg=name)
  code, out, err = Fork(*command, "--config.epochs=1").finish()
  assert code == 0, err
  assert "resuming at step 0" in out
  record = json.loads((tmp_path / "run" / "results.json").read_text())
  assert record["step"] == record["total_steps"] > 0
  code, out, err = Fork(*command, "--config.epochs=0").finish()
  assert code == 1
  assert "steps, and epochs=0 is for an encoder as it came" in err
  other = ["--config.init_from=/other.safetensors", "--config.epochs=0", "--allow_config_change"]
  code, out, err = Fork(*command, *other).finish()
  assert code == 1
  assert "which would be judged as that of '/other.safetensors'" in err


def test_nothing_to_train_is_refused_without_an_encoder(tmp_path):
  command = ["--config=configs/smoke.py:byol", "--config.steps=0", "--config.epochs=0"]
  code, _, err = Fork(*command, f"--workdir={tmp_path / 'run'}").finish()
  assert code == 1
  assert "leave nothing to train; epochs=0 is for an encoder that init_from names" in err
  assert not (tmp_path / "run").exists()
