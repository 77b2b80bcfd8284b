"""The loop: cached pictures train what streamed ones do, and evaluations change nothing."""

import json
import os
import signal
import time
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from ssrl_jax.config import view_group
from ssrl_jax.data.sources import labels_of
from ssrl_jax.evaluate import during
from ssrl_jax.evaluate.during import EarlyStop, evaluate_during
from ssrl_jax.experiment import build, open_split
from ssrl_jax.method import Features
from ssrl_jax.methods import simclr
from ssrl_jax.state import state_digest
from ssrl_jax.train import steps_to_edge, train
from ssrl_jax.watch import RATES, Costs


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


def run(config, workdir, *, stop_after=None, evaluate=None):
  """(digest of the last state, {step: figures}, whether it came to its end)."""
  workdir.mkdir(exist_ok=True)
  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
  views = experiment.method.views
  method = simclr.make(encoder=Linear(), views=views, run=None, hidden_dim=8, out_dim=8)
  experiment = replace(experiment, method=method)
  lines = []

  def say(line):
    lines.append(line)
    if stop_after and line.startswith(f"step {stop_after}/"):
      os.kill(os.getpid(), signal.SIGTERM)

  if config.evaluate.during.every_steps and not evaluate:
    evaluate = evaluate_during(experiment, source, source)
  state, finished = train(experiment, source, workdir, say=say, evaluate=evaluate)
  figures = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    row = {k: v for k, v in json.loads(line).items() if k not in RATES}
    known = figures.setdefault(row["step"], {})
    assert known.keys() & row.keys() <= {"step"}, "a figure of a step stands there twice"
    known.update(row)
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


def test_results_without_a_checkpoint_are_not_written_over(folder, tmp_path):
  (tmp_path / "results.json").write_text("{}")
  with pytest.raises(ValueError, match="holds the results of a run whose checkpoints are gone"):
    run(tiny(folder, devices=1), tmp_path)
  assert (tmp_path / "results.json").read_text() == "{}"


def test_unknown_cache_is_refused(folder):
  with pytest.raises(ValueError, match=r"data.cache is 'gpu'; expected '' .* or 'device'"):
    build(tiny(folder, devices=1, cache="gpu"), num_examples=27, num_classes=2)


def evaluating(folder, **options):
  config = tiny(folder, devices=1)
  config.evaluate.during.update({"every_steps": 2, **options})
  config.evaluate.knn.k, config.evaluate.batch_size = 3, 8
  return config


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
  """An uninterrupted run with evaluations; which of them compiled something."""
  compiled, config = [], evaluating(folder)

  def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(seconds)

  before = []

  def counting(state, moved):
    signs = []
    before.append(len(compiled))
    figures = judge(state, lambda within=None: signs.append(within))
    before.append(len(compiled))
    assert set(signs) == {config.watchdog.evaluation_minutes}  # rarer than those of steps
    return figures

  source = open_split(config, "train")
  experiment = build(config, num_examples=len(source), num_classes=source.num_classes)
  experiment = replace(
    experiment,
    method=simclr.make(
      encoder=Linear(), views=experiment.method.views, run=None, hidden_dim=8, out_dim=8
    ),
  )
  judge = evaluate_during(experiment, source, source)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    result = run(config, tmp_path_factory.mktemp("evaluated"), evaluate=counting)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return result, before


def test_evaluations_while_training_leave_it_as_it_is(streamed, evaluated):
  (digest, figures, finished), _ = evaluated
  assert finished
  assert digest == streamed[0]
  accuracy = {step: row.pop("knn/accuracy") for step, row in figures.items() if "knn/k" in row}
  assert accuracy.keys() == {2, 4, 6}
  assert all(0 < a <= 100 for a in accuracy.values())
  assert {step: row for step, row in figures.items() if "loss" in row}.keys() == streamed[1].keys()


def test_only_the_first_evaluation_compiles(evaluated):
  _, (start, first, *later) = evaluated
  assert first > start
  assert later == [later[0]] * 4, "compiled during a later evaluation, or by the step after one"


def test_run_that_dies_in_an_evaluation_makes_it_again(folder, evaluated, tmp_path):
  config = evaluating(folder)

  def killed(state, moved):
    if int(state.step) == 4:
      raise SystemExit
    return {"knn/accuracy": 0.0, "knn/k": 1.0}

  with pytest.raises(SystemExit):
    run(config, tmp_path, evaluate=killed)
  digest, figures, finished = run(config, tmp_path)
  assert finished
  assert digest == evaluated[0][0]
  assert {s: row["knn/k"] for s, row in figures.items() if "knn/k" in row} == {2: 1, 4: 3, 6: 3}


@pytest.mark.parametrize("stop_after", [None, 6])
def test_run_ends_when_the_figure_has_not_risen_for_its_patience(folder, tmp_path, stop_after):
  config = evaluating(folder, patience=2, figure="score")
  config.steps = 9
  scores = {2: 1.0, 4: 3.0, 6: 3.0, 8: 2.0}
  judged = []

  def evaluate(state, moved):
    judged.append(int(state.step))
    return {"score": scores[judged[-1]]}

  if stop_after:
    assert not run(config, tmp_path, stop_after=stop_after, evaluate=evaluate)[-1]
  digest, _, finished = run(config, tmp_path, evaluate=evaluate)
  assert finished
  assert judged == [2, 4, 6, 8]
  assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} >= {8}
  again = run(config, tmp_path, evaluate=evaluate)
  assert (again[0], again[-1], judged) == (digest, True, [2, 4, 6, 8])


def test_costs_are_those_of_all_starts_of_a_run(tmp_path):
  path = tmp_path / "costs.json"
  cpu = time.process_time()
  Costs(path, started=time.monotonic() - 1000).keep()
  Costs(path, started=time.monotonic() - 500, writes=False).keep()
  second = Costs(path, started=time.monotonic() - 30)
  found = second.read()
  assert 1030 <= found["wall_seconds"] < 1090
  assert 2 * cpu <= found["cpu_seconds"] < 2 * cpu + 10
  second.keep()
  second.keep()  # which counts nothing twice
  assert json.loads(path.read_text())["wall_seconds"] < 1090


def test_early_stopping_by_a_figure_that_is_not_measured_is_refused():
  with pytest.raises(ValueError, match=r"'knn/acc'.*give knn/accuracy, knn/k"):
    EarlyStop("knn/acc", 1, []).add({"knn/accuracy": 1.0, "knn/k": 20.0})


@pytest.mark.parametrize("patience", [0, 2])
def test_what_ends_a_run_is_not_judged_on_the_test_pictures(folder, monkeypatch, patience):
  config = evaluating(folder, patience=patience)
  train_source, test = open_split(config, "train"), open_split(config, "train")
  experiment = build(config, num_examples=len(train_source), num_classes=2)
  seen = []

  def trained_evaluation(experiment, state, bank, judged):
    seen.append((bank, judged))
    raise KeyboardInterrupt

  monkeypatch.setattr(during, "trained_evaluation", trained_evaluation)
  with pytest.raises(KeyboardInterrupt):
    evaluate_during(experiment, train_source, test)(None, print)
  ((bank, judged),) = seen
  if not patience:
    assert judged is test
    return
  assert bank.whole is judged.whole is train_source
  both = np.concatenate([bank.positions, judged.positions])
  assert sorted(both) == list(range(len(train_source)))
  held = labels_of(judged)
  assert [np.sum(held == k) for k in range(2)] == [
    -(-np.sum(train_source.labels == k) // 10) for k in range(2)
  ]
