"""The command that writes features to a file, on an untrained run."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import smoke
from ssrl_jax import extract
from ssrl_jax.checkpoint import Checkpoints
from ssrl_jax.evaluate.suite import load_run
from ssrl_jax.run_folder import Facts
from tests.untrained import save_untrained


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """run/: of digit_scenes at 16 px; own/: a class of 9 pictures and one of 1, and one damaged."""
  root = tmp_path_factory.mktemp("extract")
  config = smoke.get_config("simclr")
  config.encoder.name = "resnet6"
  config.data.update({"canvas": 16, "num_train": 40, "num_test": 24})
  config.global_views.size = 16
  config.evaluate.update({"size": 16, "batch_size": 8})
  save_untrained(root / "run", config, Facts(40, 10))
  np_rng = np.random.default_rng(0)
  for name in [*(f"many/{i}" for i in range(9)), "one/0"]:
    path = root / "own" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np_rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
  (root / "own" / "many" / "3.png").write_bytes(b"")
  return root


def extracted(root, *arguments):
  out = root / "new" / "features"  # a folder to be made, a name without a suffix
  assert extract.cli(["extract", f"--workdir={root / 'run'}", f"--out={out}", *arguments]) == 0
  with np.load(out) as file:
    return dict(file)


def test_features_are_those_of_the_encoder_row_by_row(root, capsys):
  found = extracted(root, f"--source=folder:{root / 'own'}")
  assert "9 of 10 pictures" in capsys.readouterr().out
  assert found.keys() == {"pooled", "labels", "classes", "ids", "names"}
  assert list(found["classes"]) == ["many", "one"]
  assert list(found["labels"]) == [0] * 8 + [1]
  assert [name.split("/")[-2:] for name in found["names"]] == [
    *(["many", f"{i}.png"] for i in (0, 1, 2, 4, 5, 6, 7, 8)),
    ["one", "0.png"],
  ]
  experiment, state = load_run(root / "run")
  data = experiment.config.data
  pixels = np.stack([np.array(Image.open(root / "own" / name)) for name in found["names"]])
  images = ((pixels / 255 - np.array(data.mean)) / np.array(data.std)).astype(np.float32)
  want = experiment.method.encode(state.params, state.method_state, images)
  np.testing.assert_allclose(found["pooled"], want.pooled, rtol=1e-4, atol=1e-5)


def test_all_kinds_of_the_run_s_own_test_pictures(root):
  found = extracted(root, "--split=test", "--kinds=map1, pooled", "--devices=8")
  assert found.keys() == {"pooled", "map1", "labels", "classes", "ids", "names"}
  assert {len(x) for name, x in found.items() if name != "classes"} == {24}
  assert len(found["classes"]) == 10
  everything = extracted(root, "--split=test", "--kinds=all")
  assert everything.keys() == found.keys() | {"map2"}
  np.testing.assert_allclose(everything["pooled"], found["pooled"], rtol=1e-5, atol=1e-6)


def test_step_chooses_among_the_checkpoints(root):
  first = extracted(root, "--split=test")
  _, state = load_run(root / "run")
  later = state._replace(step=state.step + 5, params=jax.tree.map(lambda x: 2 * x, state.params))
  checkpoints = Checkpoints(root / "run", keep=2, keep_best=0)
  checkpoints.finish(later, step=5, score=0.0)
  checkpoints.close()
  newest = extracted(root, "--split=test")
  assert not np.allclose(newest["pooled"], first["pooled"])
  again = {step: extracted(root, "--split=test", f"--step={step}") for step in (0, 5)}
  np.testing.assert_array_equal(again[0]["pooled"], first["pooled"])
  np.testing.assert_array_equal(again[5]["pooled"], newest["pooled"])
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3; it has: 0, 5"):
    load_run(root / "run", step=3)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=RUN"], "--out is missing"),
    (["--out=x"], "--workdir is missing"),
    (["--workdir=/nowhere", "--out=x"], "no run's folder"),
    (["--workdir=RUN", "--out=x", "--kinds=poled"], "unknown kind of vector 'poled'"),
    (["--workdir=RUN", "--out=x", "--source=folder:/nowhere"], "/nowhere"),
    (["--workdir=RUN", "--out=.", "--source=folder:/nowhere"], "--out=. is a folder"),
    (["stray", "--workdir=RUN", "--out=x"], "unknown argument 'stray'"),
  ],
)
def test_what_cannot_be_is_one_line(arguments, message, root, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  arguments = [a.replace("RUN", str(root / "run")) for a in arguments]
  assert extract.cli(["extract", *arguments]) == 1
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
