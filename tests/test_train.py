"""Pictures kept on the devices train what streamed pictures do: same bytes, same figures."""

import json
import os
import signal

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from configs import digits
from ssrl_jax.config import view_group
from ssrl_jax.experiment import build, open_split
from ssrl_jax.method import Features
from ssrl_jax.methods import simclr
from ssrl_jax.state import state_digest
from ssrl_jax.train import steps_to_edge, train

RATES = ("images_per_second", "data_wait_percent", "mfu_percent", "time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two uneven classes, two damaged pictures, three sizes."""
  root, np_rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
  for name, count in (("a", 21), ("b", 6)):
    (root / name).mkdir()
    for i in range(count):
      pixels = np_rng.integers(0, 256, (16, 10 + 5 * (i % 3), 3), np.uint8)
      Image.fromarray(pixels).save(root / name / f"{i:02}.png")
  for damaged in ("a/03.png", "b/05.png"):
    (root / damaged).write_bytes(b"<html>")
  return root


class Linear(nn.Module):
  """An encoder that compiles in no time: what is tested is what it is fed."""

  @nn.compact
  def __call__(self, images, train):
    del train
    return Features(pooled=nn.Dense(8)(images.reshape(len(images), -1)), maps={})


def tiny(folder, *, devices, cache="", ahead=1, sampling="class"):
  c = digits.get_config("simclr")
  c.global_views = view_group(size=16, jitter=0.0, blur=(0.0,), greyscale=0.0)
  c.batch_size, c.steps = 8, 7
  c.data.update({"source": f"folder:{folder}", "canvas": 16, "num_train": 0, "threads": 1})
  c.data.update({"cache": cache, "steps_ahead": ahead, "sampling": sampling})
  c.checkpoint.every_steps, c.log.every_steps = 4, 3
  c.log.tensorboard, c.evaluate.size = False, 16
  c.mesh.devices = devices
  return c


def run(config, workdir, *, stop_after=None):
  """(digest of the last state, {step: figures}, whether it came to its end)."""
  workdir.mkdir(exist_ok=True)
  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
  views = experiment.method.views
  method = simclr.make(encoder=Linear(), views=views, run=None, hidden_dim=8, out_dim=8)
  experiment = experiment._replace(method=method)
  lines = []

  def say(line):
    lines.append(line)
    if stop_after and line.startswith(f"step {stop_after}/"):
      os.kill(os.getpid(), signal.SIGTERM)

  state, finished = train(experiment, source, workdir, say=say)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  figures = {r["step"]: {k: v for k, v in r.items() if k not in RATES} for r in rows}
  return state_digest(state), figures, finished


@pytest.fixture(scope="module")
def streamed(folder, tmp_path_factory):
  return run(tiny(folder, devices=1), tmp_path_factory.mktemp("streamed"))


def test_pictures_on_the_device_train_the_same_state_also_resumed(folder, streamed, tmp_path):
  config = tiny(folder, devices=1, cache="device", ahead=5)
  *_, finished = run(config, tmp_path, stop_after=3)
  assert not finished
  assert run(config, tmp_path) == streamed
  assert streamed[1][7]["data/substituted"] > 0


def test_pictures_cut_over_eight_devices_train_the_same_state(folder, tmp_path):
  config = tiny(folder, devices=8, cache="device", sampling="uniform", ahead=3)
  config.data.cache_mib = 0.003  # of 0.02
  want = run(tiny(folder, devices=8, sampling="uniform"), tmp_path / "streamed")
  assert run(config, tmp_path / "device") == want


def test_first_bad_step_of_those_given_ahead_is_named_and_not_saved(folder, tmp_path):
  config = tiny(folder, devices=1, cache="device", ahead=7)
  config.optim.update({"learning_rate": 1e30, "warmup_epochs": 1.0})  # 0 at first
  with pytest.raises(FloatingPointError, match="step 2: NaN or infinity"):
    run(config, tmp_path)
  assert json.loads((tmp_path / "non_finite.json").read_text())["step"] == 2
  assert not any((tmp_path / "checkpoints").iterdir())


def test_steps_given_ahead_end_at_lines_checkpoints_and_the_end():
  assert [steps_to_edge(step, 9, 16, 3, 4) for step in (0, 3, 4, 6, 8)] == [3, 1, 2, 2, 1]
  assert steps_to_edge(0, 9, 2, 3, 4) == 2


def test_unknown_cache_is_refused(folder):
  with pytest.raises(ValueError, match=r"data.cache is 'gpu'; expected '' .* or 'device'"):
    build(tiny(folder, devices=1, cache="gpu"), num_examples=27, num_classes=2)
