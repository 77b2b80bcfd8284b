"""What is read from files is data: nothing in it is executed, and it makes nothing be written."""

import ast
import io
import json
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from configs import smoke
from ssrl_jax.checkpoint import Checkpoints, abstract
from ssrl_jax.data.sampling import make_sampling
from ssrl_jax.data.sources import open_source
from ssrl_jax.run_folder import load_config
from tests.commands import ROOT
from tests.test_checkpoint import make_state, saved

EXECUTE = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml",
          "urllib", "requests", "http", "socket", "ftplib"}  # fmt: skip
ALLOWED = {  # where recipes, which are code, are loaded; and commands of ours are started
  ("config.py", "exec_module"), ("tables.py", "subprocess"),
}  # fmt: skip


class Bomb:
  """Makes a folder when it is unpickled."""

  def __reduce__(self):
    return os.mkdir, (os.environ["BOMB"],)


@pytest.fixture
def bomb(tmp_path, monkeypatch):
  monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
  yield Bomb()
  assert not (tmp_path / "executed").exists()


def uses(tree):
  """What of the forbidden a module imports or calls."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = (
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
      )
      yield from (n.split(".")[0] for n in names)
    elif isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      loads = name == "np.load" and "allow_pickle=False" not in ast.unparse(node)
      yield "np.load with pickles" if loads else name if "." not in name else name.split(".")[-1]


def test_package_has_no_code_that_executes_or_fetches_what_it_reads():
  forbidden = UNSAFE | EXECUTE - {"compile"} | {
    "np.load with pickles", "extractall", "extract", "exec_module", "system", "subprocess"
  }  # fmt: skip
  for file in sorted(pathlib.Path(ROOT, "ssrl_jax").rglob("*.py")):
    found = {(file.name, use) for use in uses(ast.parse(file.read_text())) if use in forbidden}
    assert found <= ALLOWED, file


def test_durations_do_not_hang_on_the_clock_that_can_be_set():
  for file in sorted(pathlib.Path(ROOT, "ssrl_jax").rglob("*.py")):
    calls = {
      ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)
    }
    assert not calls & {"time.time", "datetime.now", "datetime.datetime.now"}, file


def test_code_in_config_json_stays_text(tmp_path, monkeypatch):
  code = f"__import__('os').mkdir({str(tmp_path / 'executed')!r})"
  saved = json.loads(smoke.get_config().to_json_best_effort())
  saved["data"]["source"] = saved["encoder"]["name"] = code
  (tmp_path / "config.json").write_text(json.dumps(saved))
  config = load_config(tmp_path)
  assert config.data.source == config.encoder.name == code
  assert not (tmp_path / "executed").exists()


def test_checkpoint_with_a_pickle_in_it_is_a_damaged_one(tmp_path, bomb):
  saved(tmp_path, [2, 3]).close()
  for file in (tmp_path / "checkpoints" / "3").rglob("*"):
    if file.is_file():
      file.write_bytes(pickle.dumps(bomb))
  restored = Checkpoints(tmp_path, keep=3, keep_best=0).restore(abstract(make_state(0)))
  assert int(restored.step) == 2


def test_weights_with_a_pickle_in_them_are_refused(tmp_path, bomb):
  (tmp_path / "set").mkdir()
  Image.new("RGB", (4, 4)).save(tmp_path / "set" / "a.png")
  np.save(tmp_path / "w.npy", np.array([bomb], dtype=object))
  source = open_source(
    f"folder:{tmp_path / 'set'}", split="train", data_dir="", size=8, limit=0, seed=0
  )
  with pytest.raises(ValueError, match=r"is no \.npy"):
    make_sampling(
      source, sampling="weights", file=str(tmp_path / "w.npy"), power=1.0, mixture_weights=()
    )


def test_tar_whose_members_lead_out_of_it_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  picture = io.BytesIO()
  Image.new("RGB", (4, 4)).save(picture, "png")
  (tmp_path / "set").mkdir()
  with tarfile.open(tmp_path / "set" / "train-0.tar", "w") as archive:
    for name in ("../../evil", str(tmp_path / "evil"), "good"):
      info = tarfile.TarInfo(f"{name}.png")
      info.size = len(picture.getvalue())
      archive.addfile(info, io.BytesIO(picture.getvalue()))
  before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
  source = open_source(
    f"tar:{tmp_path / 'set'}", split="train", data_dir="", size=8, limit=0, seed=0
  )
  assert [source[i]["image"] for i in range(len(source))] == [picture.getvalue()] * 3
  assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before
