"""Pictures kept on the devices train what streamed pictures do: same bytes, same figures."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from configs import digits
from ssrl_jax.config import view_group
from ssrl_jax.experiment import build, open_split
from ssrl_jax.state import state_digest
from ssrl_jax.train import train

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


def tiny(folder, *, devices, cache="", most=1, sampling="class"):
  c = digits.get_config("simclr")
  c.encoder.name = "resnet6"
  c.encoder.resnet.update({"width": 2})
  c.global_views = view_group(size=8, jitter=0.0, blur=(0.0,), greyscale=0.0)
  c.batch_size, c.steps = 8, 7
  c.data.update({"source": f"folder:{folder}", "canvas": 16, "num_train": 0, "threads": 1})
  c.data.update({"cache": cache, "steps_ahead": most, "sampling": sampling})
  c.checkpoint.every_steps, c.log.every_steps = 4, 3
  c.log.tensorboard = False
  c.mesh.devices = devices
  return c


def run(config, workdir, *, stop_after=None):
  """(digest of the last state, {step: figures}, whether it came to its end)."""
  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
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


def test_pictures_on_the_device_train_the_same_state(folder, streamed, tmp_path):
  assert run(tiny(folder, devices=1, cache="device"), tmp_path) == streamed
  assert streamed[1][7]["data/substituted"] > 0


def test_several_steps_in_a_dispatch_train_the_same_state_also_resumed(folder, streamed, tmp_path):
  config = tiny(folder, devices=1, cache="device", most=3)
  *_, finished = run(config, tmp_path, stop_after=3)
  assert not finished
  assert run(config, tmp_path) == streamed
