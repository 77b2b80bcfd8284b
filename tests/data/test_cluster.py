"""The command that clusters a run's training set, on an untrained run of two kinds of pictures."""

import numpy as np
import pytest
from PIL import Image

from configs import smoke
from ssrl_jax.data import cluster
from ssrl_jax.data.sampling import make_sampling
from ssrl_jax.data.sources import open_source
from ssrl_jax.run_folder import Facts
from tests.untrained import save_untrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run's folder: 30 dark and 6 light pictures, the first of them damaged; one checkpoint."""
  root = tmp_path_factory.mktemp("run")
  np_rng = np.random.default_rng(0)
  for i in range(36):
    pixels = np_rng.integers(0, 100, (16, 16, 3)) + 150 * (i % 6 == 5)
    (root / "set").mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(root / "set" / f"{i:02d}.png")
  (root / "set" / "00.png").write_bytes(b"")
  config = smoke.get_config("simclr")
  config.data.update({"source": f"folder:{root / 'set'}", "canvas": 16, "num_train": 0})
  config.evaluate.update({"size": 16, "batch_size": 16})
  save_untrained(root / "run", config, Facts(36, None))
  return root


def test_clusters_part_what_differs_and_can_be_sampled_by(folder, capsys):
  arguments = [f"--workdir={folder / 'run'}", "--num_clusters=2", f"--out={folder / 'c.npy'}"]
  assert cluster.cli(["cluster", *arguments]) == 0
  out = capsys.readouterr().out
  assert "35 of 36 examples in 2 clusters of 6 to 29, median 17.5" in out
  found = np.load(folder / "c.npy")
  assert found[0] == -1
  light = np.arange(36) % 6 == 5
  assert set(found[light]) == {1 - found[1]}
  assert set(found[~light][1:]) == {found[1]}
  source = open_source(f"folder:{folder / 'set'}", split="train")
  sampling = make_sampling(source, sampling="clusters", file=str(folder / "c.npy"), power=1.0)
  np.testing.assert_allclose(sampling.weights[light].sum(), 0.5)
  assert cluster.cli(["cluster", *arguments[:2], f"--out={folder / 'again.npy'}"]) == 0
  assert (folder / "again.npy").read_bytes() == (folder / "c.npy").read_bytes()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--num_clusters=2"], "workdir"),
    (["--workdir=RUN", "--num_clusters=37"], "num_clusters is 37; expected 2 to 36"),
    (["--workdir=/nowhere", "--num_clusters=2"], "no run's folder"),
  ],
)
def test_bad_arguments_are_one_line(arguments, message, folder, capsys):
  arguments = [a.replace("RUN", str(folder / "run")) for a in arguments]
  assert cluster.cli(["cluster", *arguments]) == 1
  assert message in capsys.readouterr().err
