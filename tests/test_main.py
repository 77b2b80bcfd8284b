"""The command as its users run it: trained, killed, resumed, misused."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.run_folder import alone_in
from ssrl_jax.watch import RATES
from tests.commands import EVALUATE, LIMIT, MAIN, ROOT, Fork, start

SMOKE = "--config=configs/smoke.py"
# What compiles in a fraction of the time: where the command is tested, no method and no views.
SMALL = ("--config.encoder.name=resnet6", "--config.global_views.jitter=0",
         "--config.global_views.greyscale=0")  # fmt: skip
QUICK_RUN = ("--config=configs/smoke.py:simclr", *SMALL)
WITH_TARGET = ("--config=configs/smoke.py:byol", *SMALL)  # more state than simclr's
QUICK = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")  # what conftest.py makes compilation quick by


def run(*arguments, **options) -> tuple[int, str, str]:
  return Fork(*arguments, **options).finish()


def fails_with_one_line(*arguments, **options) -> str:
  code, _, err = run(*arguments, **options)
  assert code == 1, err
  assert "Traceback" not in err
  (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
  return line


def records(folder) -> list[dict]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder) -> dict:
  return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """An uninterrupted run of the smoke recipe: its folder and what it printed."""
  folder = tmp_path_factory.mktemp("runs") / "finished"
  process = start(SMOKE, f"--workdir={folder}")
  out, err = process.communicate(timeout=LIMIT)
  assert process.returncode == 0, err
  return folder, out, err


def test_run_leaves_what_the_design_promises(finished):
  folder, out, err = finished
  assert "Traceback" not in err
  assert {p.name for p in folder.iterdir()} >= {
    "config.json", "metrics.jsonl", "results.json", "report.html", "checkpoints", "tensorboard"
  }  # fmt: skip
  record = results(folder)
  assert re.fullmatch("[0-9a-f]{64}", record["state_digest"])
  assert record["step"] == 8
  for encoder in ("trained", "random_init", "raw_pixels"):
    for figure in ("knn/accuracy", "linear/accuracy"):
      assert 0 <= record["results"][encoder][figure] <= 100
  assert "random initialisation" in out.splitlines()[-2]
  assert "raw pixels" in out.splitlines()[-1]


def test_log_lines_tell_rate_loss_probe_and_time_left(finished):
  _, out, _ = finished
  lines = [line for line in out.splitlines() if line.startswith("step ")]
  assert len(lines) == 4
  for line in lines:
    for part in ("loss ", "probe ", "images/s", "data wait ", "MFU ", "ETA "):
      assert part in line


def test_tensorboard_events_hold_the_metrics(finished):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  folder, _, _ = finished
  events = EventAccumulator(str(folder / "tensorboard"))
  events.Reload()
  logged = {r["step"]: r["loss"] for r in records(folder)}
  board = {e.step: e.value for e in events.Scalars("loss")}
  assert board.keys() == logged.keys()
  np.testing.assert_allclose([board[s] for s in logged], list(logged.values()), rtol=1e-6)


def test_finished_run_is_not_trained_again(finished):
  folder, _, _ = finished
  before = results(folder)["state_digest"], records(folder)
  code, out, _ = run(SMOKE, f"--workdir={folder}")
  assert code == 0
  assert "resuming at step 8" in out
  assert (results(folder)["state_digest"], records(folder)) == before


def test_evaluate_gives_the_run_s_own_figures(finished):
  folder, _, _ = finished
  code, out, err = run(f"--workdir={folder}", "--evals=knn", module=EVALUATE)
  assert code == 0, err
  again = json.loads((folder / "evaluation.json").read_text())
  assert again["state_digest"] == results(folder)["state_digest"]
  assert (
    again["results"]["trained"]["knn/accuracy"]
    == (results(folder)["results"]["trained"]["knn/accuracy"])
  )
  assert "linear" not in out
  costs = json.loads((folder / "evaluation-costs.json").read_text())
  assert 0 < costs["wall_seconds"] < 600
  assert costs["cpu_seconds"] > 0


@pytest.mark.parametrize("num_train", [None, 7])
def test_evaluate_on_other_pictures_takes_all_of_them_unless_told(finished, tmp_path, num_train):
  """The run's own limits are of its own set."""
  folder, _, _ = finished
  for split, n in (("train", 9), ("test", 4)):
    for k in range(n):
      place = tmp_path / "set" / split / "ab"[k % 2]
      place.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (8, 8), (k, 0, 0)).save(place / f"{k}.png")
  out, limit = tmp_path / "own.json", [f"--data.num_train={num_train}"] if num_train else []
  shared = [f"--workdir={folder}", f"--out={out}", "--encoders=raw_pixels", "--evals=linear"]
  source = f"--data.source=folder:{tmp_path / 'set'}"
  code, _, err = run(*shared, source, *limit, "--evaluate.linear.epochs=1", module=EVALUATE)
  assert code == 0, err
  data = json.loads(out.read_text())["data"]
  assert (data["num_train"], data["num_test"]) == (num_train or 0, 0)


def test_evaluate_takes_options_adds_to_its_file_and_needs_no_training_pictures(finished, tmp_path):
  folder, _, _ = finished
  out = tmp_path / "own.json"
  shared = [f"--workdir={folder}", f"--out={out}", "--encoders=trained"]
  code, _, err = run(*shared, "--evals=knn", "--evaluate.knn.k=3", module=EVALUATE)
  assert code == 0, err
  options = ["--evals=retrieval,geometry", "--evaluate.geometry.num_lidar=8", f"--other={folder}"]
  code, printed, err = run(*shared, *options, module=EVALUATE)
  assert code == 0, err
  record = json.loads(out.read_text())
  assert list(record["results"]) == ["trained"]
  figures = record["results"]["trained"]
  assert {"knn/accuracy", "retrieval/map", "geometry/rankme"} <= figures.keys()
  assert figures["knn/k"] == 3
  assert figures["geometry/cka"] == pytest.approx(1, abs=1e-4)  # with itself
  assert record["options"]["knn"]["k"] == 3
  assert "recall@1 %" in printed
  assert (tmp_path / "own" / "trained" / "geometry_spectrum.csv").exists()
  assert json.loads((folder / "data.json").read_text()) == {"num_examples": 128, "num_classes": 10}


def test_python_of_the_readme_gives_features(finished, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder, _, _ = finished
  text = (ROOT / "README.md").read_text()
  code = re.search(r"\*\*From Python\*\*.*?```python\n(.*?)```", text, re.DOTALL)[1]
  names = {"pixels": np.zeros((2, 32, 32, 3), np.uint8)}
  exec(code.replace("runs/digits-fusion", str(folder)), names)
  features = names["features"]
  assert features.pooled.ndim == 2
  assert np.isfinite(features.pooled).all()
  assert all(m.shape[0] == 2 for m in features.maps.values())
  with np.load("encoder.npz") as weights:
    assert {name.split("/")[0] for name in weights} == {"params", "batch_stats"}
    kernel = names["state"].params["encoder"]["backbone"]["stem_conv"]["kernel"]
    np.testing.assert_array_equal(weights["params/backbone/stem_conv/kernel"], kernel)


def test_evaluation_beside_a_run_leaves_the_run_s_files_alone(finished, tmp_path):
  """And writes its own where --out says, so that the run's folder need not be writable."""
  folder, _, _ = finished
  stacks, out = folder / "stacks-0.txt", tmp_path / "new" / "own.json"
  stacks.touch()  # as the watchdog of training has it
  before = sorted(folder.iterdir())
  code, _, err = run(f"--workdir={folder}", f"--out={out}", "--evals=knn", module=EVALUATE)
  assert code == 0, err
  assert sorted(folder.iterdir()) == before
  assert sorted(out.parent.iterdir()) == [out.with_name("own-costs.json"), out]
  stacks.unlink()


def test_evaluate_names_the_nearest_option_and_what_a_file_must_be(finished):
  folder, _, _ = finished
  meant = "did you mean"
  for argument, expected in (
    ("--evaluate.knn.kk=3", meant),
    ("--data.sourc=x", meant),
    ("--step=3", "has no checkpoint of step 3; it has: "),
    ("--out=figures", "figures: expected a file NAME.json"),
    ("--encoders=trained,random", "did you mean 'random_init'"),
    ("--mesh.fsdp=3", "mesh.fsdp is 3, which does not divide the 1 devices"),
    ("--data.test=tset", "no test pictures"),
    ("--data.source=clips:/nowhere", "nowhere"),
  ):
    code, _, err = run(f"--workdir={folder}", argument, module=EVALUATE)
    assert code == 1
    assert expected in err


def test_evaluation_that_can_judge_nothing_is_an_error(finished, tmp_path):
  """Else a script, or a table, takes it for done."""
  Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
  code, _, err = run(
    f"--workdir={finished[0]}", "--evals=knn", f"--data.source=folder:{tmp_path}",
    "--data.num_train=0", f"--out={tmp_path / 'figures.json'}", module=EVALUATE,
  )  # fmt: skip
  assert code == 1
  assert "none of knn could be run on these pictures" in err


def deterministic(record: dict) -> dict:
  return {k: v for k, v in record.items() if k not in RATES}


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(tmp_path):
  """SIGKILL at three moments, the last of them likely during a save; then to the end."""
  arguments = [*WITH_TARGET, "--config.steps=24", "--config.checkpoint.every_steps=3",
               "--config.evaluate.evals=", "--config.evaluate.report=False"]  # fmt: skip
  process = start(*arguments, f"--workdir={tmp_path / 'whole'}")  # with other hashes than a fork
  _, err = process.communicate(timeout=LIMIT)
  assert process.returncode == 0, err
  killed, costs = tmp_path / "killed", []
  for wanted in (5, 10, 18):
    command = Fork(*arguments, f"--workdir={killed}")
    for line in command.lines():
      match = re.match(r"step +(\d+)/", line)
      if match and int(match[1]) >= wanted:
        break
    time.sleep(0.05 * (wanted % 3))
    command.process.kill()
    command.finish()
    costs.append(json.loads((killed / "costs.json").read_text())["cpu_seconds"])
    with (killed / "metrics.jsonl").open("a") as f:
      f.write('{"step": 23, "lo')  # a line that the kill cut short
  code, out, err = run(*arguments, f"--workdir={killed}")
  assert code == 0, err
  assert re.search(r"resuming at step [1-9]", out)
  assert results(killed)["state_digest"] == results(tmp_path / "whole")["state_digest"]
  assert [deterministic(r) for r in records(killed)] == [
    deterministic(r) for r in records(tmp_path / "whole")
  ]
  assert results(killed)["cpu_seconds"] > sum(costs[-1:]) > 0
  assert costs == sorted(costs)  # of one start more each


@pytest.mark.slow
def test_same_command_ends_with_the_same_bytes_on_eight_devices(tmp_path):
  """On one they have been compared, of a run that was killed and one that was not."""
  arguments = *WITH_TARGET, "--config.evaluate.evals=", "--config.evaluate.report=False"
  digests = []
  for name in ("a", "b"):
    code, _, err = run(*arguments, f"--workdir={tmp_path / name}", num_devices=8)
    assert code == 0, err
    digests.append(results(tmp_path / name)["state_digest"])
  assert digests[0] == digests[1]


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
  arguments = [*QUICK_RUN, "--config.steps=100000", "--config.checkpoint.every_steps=100000",
               f"--workdir={tmp_path}"]  # fmt: skip
  process = start(*arguments)
  for line in process.stdout:
    if line.startswith("step "):
      break
  process.terminate()
  out, err = process.communicate(timeout=LIMIT)
  assert process.returncode == 143, err
  step = int(re.search(r"stopped at step (\d+); the same command goes on", out)[1])
  assert (tmp_path / "checkpoints" / str(step)).is_dir()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([SMOKE, "--config.optim.learning_rte=1"], "did you mean 'optim.learning_rate'"),
    ([SMOKE + ":simclr", "--config.method.tau=0.9"], "unknown config key 'method.tau'; "),
    ([SMOKE + ":moco_v2", "--config.method.queue_size=40"], "multiple of batch_size 16"),
    ([SMOKE, "--config.batch_size=many"], "many"),
    ([SMOKE + ":simclear"], "did you mean 'simclr'"),
    ([SMOKE, "--config.method.name=byol"], "choose it by --config=FILE:METHOD"),
    ([SMOKE, "--config.epochs=1"], "epochs would have no effect: steps is 8"),
    ([SMOKE, "--config.encoder.name=resnet19"], "resnet18"),
    ([SMOKE, "--config.data.source=digit_scene"], "digit_scenes"),
    ([SMOKE, "--config.data.source=folder:/nowhere/at/all"], "/nowhere/at/all"),
    ([SMOKE, "--config.data.source=tfds:cifar10", "--config.data.data_dir=/nowhere"],
     "prepare_tfds"),
    ([SMOKE, "--config.batch_size=4096"], "lower batch_size"),
    ([SMOKE, "--config.data.source=clips:/nowhere/at/all"], "give clips:PATH"),
    ([SMOKE, "--config.data.frames=2"], "give data.source=clips:PATH"),
    ([SMOKE, "--config.data.max_bad_fraction=5"], "expected 0 (none) to 1 (never stop)"),
    ([SMOKE, "--config.data.frames=0"], "data.frames is 0; expected 1 to 2"),
    ([SMOKE, "--config.data.sampling=weights"], "name the .npy file"),
    ([SMOKE, "--config.views_ramp.start=0.5"], "views_ramp.epochs is 0"),
    ([SMOKE, "--config.optim.name=adamww"], "adamw"),
    ([SMOKE, "--config.evaluate.evals=knm"], "did you mean 'knn'"),
    ([SMOKE, "--config.evaluate.during.patience=2"], "evaluate.during.every_steps is 0"),
    ([SMOKE, "--config.evaluate.during.every_steps=-2"], "must be >= 0"),
    ([SMOKE, "--config.evaluate.during.every_steps=2", "--config.evaluate.during.patience=1",
      "--config.evaluate.during.figure=linear/accuracy"], "what is evaluated is knn"),
    ([SMOKE, "--config.evaluate.batch_size=0"], "evaluate.batch_size 0 is not divisible"),
    ([SMOKE, "--config.log.every_steps=0"], "log.every_steps is 0; expected 1 or more"),
    ([SMOKE, "--config.checkpoint.every_steps=0"], "checkpoint.every_steps is 0"),
    ([SMOKE, "--config.data.cache=device", "--config.data.steps_ahead=0"], "steps_ahead is 0"),
    ([SMOKE, "--config.global_views.count=0"], "global views"),
    ([SMOKE, "--config.encoder.name=vit_nano", "--config.encoder.vit.patch=7"], "patch"),
    (["--config=configs/nothing.py"], "error: no file configs/nothing.py; recipes are in configs/"),
    (["--config=configs/smokee.py"], "configs/smokee.py; did you mean configs/smoke.py?"),
    (["--config", "smoke:simclr"], "no file smoke; did you mean configs/smoke.py?"),
    (["--config=configs/smokee.py", "--help"], "did you mean configs/smoke.py?"),
    ([], "--config"),
    ([SMOKE, "config.epochs=20"], "unknown argument 'config.epochs=20'"),
    (["--config", "configs/smoke.py", "--config.epoch=3"], "did you mean 'epochs'"),
    ([SMOKE, "--config.encoder.resnet.width=0"], "encoder.resnet.width is 0; expected 1 or more"),
    ([SMOKE + ":swav", "--config.method.queue_size=-16"], "queue_size is -16; expected 0 or more"),
  ],
)  # fmt: skip
def test_bad_arguments_give_one_line_with_the_fix(arguments, message, tmp_path):
  assert message in fails_with_one_line(*arguments, f"--workdir={tmp_path / 'run'}")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("module", "arguments", "lines"),
  [
    (MAIN, [], ["--dry_run", "--workdir", "--config.KEY"]),
    (MAIN, [SMOKE + ":byol"], ["--config.method.tau [0.99]", "--config.batch_size [16]"]),
    (EVALUATE, [], ["--workdir", "segmentation,robustness", "[knn,linear]", "--GROUP.KEY"]),
    ("ssrl_jax.tables", [], ["--plan", "--rows"]),
    ("ssrl_jax.replay", [], ["--step"]),
    ("ssrl_jax.data.cluster", [], ["--num_clusters"]),
  ],
)
def test_help_lists_the_flags_and_what_the_recipe_lets_be_set(module, arguments, lines):
  code, out, err = run(*arguments, "--help", module=module)
  assert (code, err) == (0, "")
  assert out.startswith("python -m ssrl_jax.")
  assert all(line in out for line in lines)
  assert not re.search("grain|logtostderr", out)  # what libraries define


def test_help_of_an_evaluation_lists_what_a_run_lets_be_set(finished):
  code, out, err = run(f"--workdir={finished[0]}", "--help", module=EVALUATE)
  assert (code, err) == (0, "")
  assert "  --evaluate.knn.k [20]" in out
  assert "--optim" not in out


def test_empty_folder_names_the_extensions(tmp_path):
  (tmp_path / "pictures").mkdir()
  line = fails_with_one_line(SMOKE, f"--config.data.source=folder:{tmp_path / 'pictures'}")
  assert ".jpg" in line


def test_batch_that_devices_cannot_share_names_the_nearest(tmp_path):
  line = fails_with_one_line(
    SMOKE, "--config.batch_size=20", f"--workdir={tmp_path}", num_devices=8
  )
  assert "batch_size 20 is not divisible by 8 devices; nearest: 16 or 24" in line


def test_changed_config_is_refused_with_its_keys(finished):
  folder, _, _ = finished
  line = fails_with_one_line(SMOKE, f"--workdir={folder}", "--config.optim.learning_rate=0.5")
  assert "optim.learning_rate: 0.004 -> 0.5" in line
  assert "--allow_config_change" in line


def test_change_that_the_checkpoint_does_not_fit_leaves_the_folder_as_it_was(finished, tmp_path):
  folder = shutil.copytree(finished[0], tmp_path / "run")
  line = fails_with_one_line(
    SMOKE, f"--workdir={folder}", "--config.encoder.fusion.width=24", "--allow_config_change"
  )
  assert "of another state than this config makes" in line
  for name in ("config.json", "data.json"):
    assert (folder / name).read_text() == (finished[0] / name).read_text()


def test_workdir_of_another_method_is_refused(finished):
  folder, _, _ = finished
  line = fails_with_one_line(SMOKE + ":simclr", f"--workdir={folder}")
  assert "holds a run of method 'fusion', not 'simclr'" in line


def test_second_run_in_a_folder_is_refused_while_the_first_lives(tmp_path):
  with alone_in(tmp_path):
    line = fails_with_one_line(SMOKE, f"--workdir={tmp_path}")
  assert f"another process ({os.getpid()} on " in line
  assert "choose another --workdir" in line
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("module", [MAIN, EVALUATE, "ssrl_jax.extract", "ssrl_jax.tables"])
def test_workdir_that_is_a_file_or_below_one_is_named(module, tmp_path):
  (tmp_path / "file").write_text("")
  more = {
    MAIN: [SMOKE, "--config.data.source=folder:/nowhere"], "ssrl_jax.extract": ["--out=x"],
    "ssrl_jax.tables": ["--table=configs/tables/linear.py"],
  }.get(module, [])  # fmt: skip
  for path in (tmp_path / "file", tmp_path / "file" / "run"):
    line = fails_with_one_line(*more, f"--workdir={path}", module=module)
    want = f"error: --workdir={path}: {tmp_path / 'file'} is a file, no folder; name a folder"
    assert line.startswith(want)


def test_harmless_change_goes_on(finished, tmp_path):
  folder, _, _ = finished
  copy = tmp_path / "copy"
  subprocess.run(["cp", "-r", folder, copy], check=True)
  older = json.loads((copy / "config.json").read_text())
  del older["guard"]  # as a run that is older than a knob has it
  (copy / "config.json").write_text(json.dumps(older))
  code, out, err = run(
    SMOKE, f"--workdir={copy}", "--config.steps=10", "--config.log.every_steps=1",
    "--config.evaluate.evals=",
  )  # fmt: skip
  assert code == 0, err
  assert "resuming at step 8" in out
  assert [r["step"] for r in records(copy)] == [2, 4, 6, 8, 9, 10]


def test_nan_stops_the_run_and_names_step_images_and_tensor(tmp_path):
  np.save(tmp_path / "weights.npy", [9.0] * 8 + [1.0] * 120)  # some twice in a batch
  line = fails_with_one_line(
    *QUICK_RUN, f"--workdir={tmp_path}", "--config.optim.learning_rate=1e38",
    "--config.checkpoint.every_steps=1", "--config.data.sampling=weights",
    f"--config.data.sampling_file={tmp_path / 'weights.npy'}",
  )  # fmt: skip
  assert re.search(r"step \d+: NaN or infinity, first in '[a-z/_0-9A-Z]+'", line)
  record = json.loads((tmp_path / "non_finite.json").read_text())
  assert len(record["ids"]) == 16 > len(set(record["ids"]))
  assert max(record["ids"]) < 128  # positions, whichever copy it was
  assert str(record["ids"][0]) in line
  saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
  assert max(saved, default=0) < record["step"]
  step = record["step"]
  code, out, err = run(f"--workdir={tmp_path}", f"--step={step}", module="ssrl_jax.replay")
  assert code == 0, err
  assert f"from step {step - 1}, 0 steps to go before step {step}" in out
  bad = record["first_bad_tensor"]
  assert f"step {step}: first bad is {bad!r}, as it was then" in out
  code, _, err = run(f"--workdir={tmp_path}", "--step=99", module="ssrl_jax.replay")
  assert code == 1
  assert f"bad steps whose batch was kept: [{step}]" in err


def class_folders(path: pathlib.Path, *, train: int, test: int) -> None:
  """Two classes of noise pictures of different colours and shapes, one file damaged."""
  rng = np.random.default_rng(0)
  for split, count in (("train", train), ("test", test)):
    for label, name in enumerate(("dark", "light")):
      folder = path / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 128, (20 + i % 7, 24, 3)) + 127 * label
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
  (path / "train" / "dark" / "0.png").write_bytes(b"not a picture")


def test_folder_of_pictures_trains_and_counts_the_damaged_one(tmp_path):
  class_folders(tmp_path / "set", train=20, test=9)
  code, _, err = run(
    *QUICK_RUN, f"--workdir={tmp_path / 'run'}",
    f"--config.data.source=folder:{tmp_path / 'set'}",
    "--config.data.num_train=0", "--config.data.num_test=0", "--config.steps=5",
  )  # fmt: skip
  assert code == 0, err
  assert err.count("0.png: not one of") == 1
  record = results(tmp_path / "run")
  assert record["substituted"] >= 2  # 5 steps of 16 are two epochs of 40 and more
  assert record["damaged"] == 1
  (line,) = (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()
  damaged = json.loads(line)
  assert damaged["path"] == str(tmp_path / "set" / "train" / "dark" / "0.png")
  assert damaged["reason"].startswith("not one of JPEG")
  assert results(tmp_path / "run")["results"]["raw_pixels"]["knn/accuracy"] == 100


def test_folder_with_too_many_damaged_files_stops_and_goes_on_when_that_is_allowed(tmp_path):
  class_folders(tmp_path / "set", train=20, test=1)
  for i in range(1, 6):
    (tmp_path / "set" / "train" / "dark" / f"{i}.png").write_bytes(b"")
  arguments = (
    *QUICK_RUN, f"--workdir={tmp_path / 'run'}",
    f"--config.data.source=folder:{tmp_path / 'set'}",
    "--config.data.num_train=0", "--config.steps=6", "--config.checkpoint.every_steps=1",
    "--config.evaluate.evals=", "--config.evaluate.report=False",
  )  # fmt: skip
  line = fails_with_one_line(*arguments)
  stopped = int(re.search(r"step (\d): \d of the \d+ examples seen so far cannot be read", line)[1])
  assert "raise data.max_bad_fraction" in line
  saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
  assert max(saved, default=0) < stopped  # nothing of the step that was too much is kept
  code, _, err = run(*arguments, "--config.data.max_bad_fraction=0.2")
  assert code == 0, err
  assert results(tmp_path / "run")["damaged"] == 6


def test_unlabelled_folder_trains_and_says_that_nothing_is_measured(tmp_path):
  class_folders(tmp_path / "set", train=20, test=1)
  flat = tmp_path / "flat"
  flat.mkdir()
  for i, file in enumerate(sorted((tmp_path / "set" / "train").rglob("*.png"))[1:]):
    file.rename(flat / f"{i}.png")
  code, out, err = run(
    *QUICK_RUN, f"--workdir={tmp_path / 'run'}", f"--config.data.source=folder:{flat}",
    "--config.data.num_train=0", "--config.steps=4",
  )  # fmt: skip
  assert code == 0, err
  assert "has no labels" in err
  assert "probe" not in out
  assert (tmp_path / "run" / "report.html").exists()


def test_clips_train_by_class_on_views_that_grow_harder(tmp_path):
  rng = np.random.default_rng(0)
  for split, count in (("train", 12), ("test", 4)):
    for label, name in enumerate(("dark", "light")):
      for i in range(count if label else count // 2):
        folder = tmp_path / "set" / split / name / f"clip{i}"
        folder.mkdir(parents=True)
        for k in range(3):
          pixels = rng.integers(0, 128, (20, 24, 3)) + 127 * label
          Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
  arguments = (
    *QUICK_RUN, f"--workdir={tmp_path / 'run'}",
    f"--config.data.source=clips:{tmp_path / 'set'}",
    "--config.data.num_train=0", "--config.data.num_test=0", "--config.data.frames=2",
    "--config.data.sampling=class", "--config.views_ramp.start=0.2", "--config.views_ramp.epochs=4",
  )  # fmt: skip
  code, _, err = run(*arguments)
  assert code == 0, err
  strengths = [r["data/views_strength"] for r in records(tmp_path / "run")]
  np.testing.assert_allclose(strengths, [0.4, 0.8, 1.0, 1.0], rtol=1e-6)  # of updates 2, 4, 6, 8
  assert results(tmp_path / "run")["results"]["raw_pixels"]["knn/accuracy"] == 100
  assert "Strength of the views" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_dry_run_of_imagenet_tells_what_it_costs():
  code, out, err = run("--config=configs/imagenet.py", "--dry_run", "--devices=8")
  assert code == 0, err
  for part in ("Total", "batch/image", "on each device [512, 384, 384, 3]", "state memory",
               "FLOPs", "device-hours"):  # fmt: skip
    assert part in out


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--compile"], "are for --dry_run, which is not given"),
    (["--dry_run", "--devices=8", "--tpu=v5e:2x4"], "both say how many devices there are"),
    (["--dry_run", "--tpu=v9:2x2"], "no TPU slice 'v9:2x2' can be described"),
  ],
)
def test_dry_run_is_asked_for_devices_that_can_be(flags, message):
  code, _, err = run(f"{SMOKE}:simclr", *flags)
  assert code == 1
  assert err.startswith("error: ")
  assert message in err


def test_dry_run_for_a_tpu_that_is_not_there():
  """Two slices of it, by the TPU's own compiler; only where that is installed."""
  pytest.importorskip("libtpu", reason="needs the extra tpu")
  arguments = (
    f"{SMOKE}:simclr",
    "--config.encoder.name=resnet6",
    "--config.mesh.slices=2",
  )
  code, out, err = run(*arguments, "--dry_run", "--compile", "--tpu=v5e:2x4")
  assert code == 0, err
  assert "mesh              16 device(s) (TPU v5 lite): slice 2, data 8, fsdp 1" in out
  assert re.search(r"^compiled memory +\d+ MiB a device", out, re.MULTILINE)
  assert re.search(r"^between slices +\S+ MiB from each device: all-reduce", out, re.MULTILINE)


def test_neither_tensorflow_nor_torch_is_needed(tmp_path):
  """A run, its evaluation and its report where neither can be found, compiled as users do."""
  code = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
  hidden = name.split(".")[0] in ("tensorflow", "torch", "torchvision", "keras")
  return None if hidden else find(name, path, target)
PathFinder.find_spec = find_others  # as if they were not installed
import importlib, pathlib
for file in sorted(pathlib.Path("ssrl_jax").rglob("*.py")):
  if file.stem not in ("__main__", "__init__"):
    importlib.import_module(".".join(file.with_suffix("").parts))
from ssrl_jax.main import cli
sys.exit(cli(sys.argv))
"""
  done = subprocess.run(
    [sys.executable, "-c", code, *QUICK_RUN, "--config.steps=2", f"--workdir={tmp_path}"],
    cwd=ROOT, env={k: v for k, v in os.environ.items() if k not in QUICK},
    capture_output=True, text=True, timeout=LIMIT,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
