"""One command a table: what is missing is found and run once; what is shown has its comparison."""

import contextlib
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssrl_jax import table_runs, tables
from ssrl_jax.config import load_file
from ssrl_jax.run_folder import alone_in
from ssrl_jax.table import (
  BUDGETS,
  DATA,
  Column,
  Judge,
  Row,
  Table,
  Training,
  load_table,
  load_tables,
  resolve,
)
from ssrl_jax.table_text import chart, latex, long_rows, markdown
from tests.commands import ROOT, hears_ctrl_c

SMOKE = "configs/smoke.py:simclr"
OURS, THEIRS = Training("configs/smoke.py:fusion", {"optim.weight_decay": 0.2}), Training(SMOKE)
TABLE = Table(
  title="Linear",
  text="Toy.",
  source="Nobody 2026",
  rows=(
    Row("fusion", OURS, seeds=(0, 1, 2), claims={"linear %": 77.8}),
    Row("simclr", THEIRS, seeds=(0, 1), claims={"linear %": 69.3}),
    Row("random init", THEIRS, seeds=(0,), encoder="random_init"),
    Row("raw pixels", OURS, seeds=(0,), encoder="raw_pixels"),
  ),
  columns=(
    Column("linear %", "frozen", "linear/accuracy"),
    Column("minutes", "run", "minutes", decimals=2),
  ),
  judges={"frozen": Judge("linear", {"evaluate.linear.epochs": 3})},
  subject="fusion",
  baselines=("simclr", "random init"),
)
# {(method, seed, encoder): accuracy} that the stand-in for training and judging reports.
ACCURACY = {
  ("fusion", 0, "trained"): 50.0, ("fusion", 1, "trained"): 52.0, ("fusion", 2, "trained"): 57.0,
  ("simclr", 0, "trained"): 45.0, ("simclr", 1, "trained"): 49.0,
  ("simclr", 0, "random_init"): 30.0, ("fusion", 0, "raw_pixels"): 20.0,
}  # fmt: skip


class Stand_in:
  """Does what the commands do to the folders, and keeps what it was asked."""

  def __init__(self, fails=lambda command: False, diverges=lambda command: False):
    self.commands, self.fails, self.diverges = [], fails, diverges

  def __call__(self, command, log):
    self.commands.append(command)
    options = dict(a.removeprefix("--").split("=", 1) for a in command if a.startswith("--"))
    folder = Path(options["workdir"])
    folder.mkdir(parents=True, exist_ok=True)
    if self.fails(command):
      log.write_text("error: out of luck\n")
      return 1
    if "ssrl_jax.main" in command:
      if self.diverges(command):
        (folder / "non_finite.json").write_text("{}")
        return 1
      record = {"wall_seconds": 90, "cpu_seconds": 60, "images_per_second": 10.0, "step": 8}
      (folder / "results.json").write_text(json.dumps(record))
      return 0
    _, method, _, seed = folder.name.split("-")
    results = {
      e: {"linear/accuracy": ACCURACY[method, int(seed), e]} for e in options["encoders"].split(",")
    }
    out = Path(options["out"])
    out.parent.mkdir(exist_ok=True)
    old = json.loads(out.read_text())["results"] if out.exists() else {}
    out.write_text(json.dumps({"results": old | results}))
    return 0


def make(tmp_path, stand_in, table=TABLE, **options):
  return tables.make(table, [tmp_path], run_command=stand_in, say=lambda line: None, **options)


def kinds(stand_in):
  return [c[2].rpartition(".")[2] for c in stand_in.commands]


def test_every_training_and_judgement_is_run_once_and_never_again(tmp_path):
  stand_in = Stand_in()
  assert make(tmp_path, stand_in) == []
  assert kinds(stand_in) == ["main"] * 5 + ["evaluate"] * 5
  first, judged = stand_in.commands[0], stand_in.commands[5]
  assert "--config=configs/smoke.py:fusion" in first
  assert {"--config.optim.weight_decay=0.2", "--config.seed=0", "--config.evaluate.evals="} <= set(
    first
  )
  assert {"--evals=linear", "--encoders=trained,raw_pixels"} <= set(judged)
  assert "--evaluate.linear.epochs=3" in judged
  again = Stand_in()
  assert make(tmp_path, again) == []
  assert again.commands == []


def test_cells_hold_mean_and_deviation_gaps_are_seed_by_seed_and_claims_stand_beside(tmp_path):
  make(tmp_path, Stand_in())
  record = table_runs.measured(TABLE, [tmp_path])
  assert json.loads(json.dumps(record)) == record  # so that a file of it makes the same table
  text = tables.write_table(tmp_path / "linear", record, command="the command")
  deviation = statistics.stdev([50, 52, 57])
  assert f"| fusion | 3 of 3 | 53.0 ± {deviation:.1f} | 77.8 | 1.50 ± 0.00 |" in text
  assert "| simclr | 2 of 2 | 47.0 ± 2.8 | 69.3 |" in text
  assert "| random init | 1 of 1 | 30.0 |  | - |" in text  # a control has no cost of its own
  assert f"| fusion - simclr | +4.0 ± {statistics.stdev([5, 3]):.1f} | +8.5 |" in text
  assert "| fusion - random init | +20.0 |  |" in text
  assert "Nobody 2026; they are not ours" in text
  assert "the command" in text
  assert "`evaluate.linear.epochs=3`" in text
  with (tmp_path / "linear.csv").open() as file:
    lines = list(csv.reader(file))
  assert ["fusion", "linear %", "1", "52.0", "77.8"] in lines
  latex = (tmp_path / "linear.tex").read_text()
  assert r"fusion & 3 of 3 & 53.0 $\pm$ 3.6 & 77.8 & 1.50 $\pm$ 0.00 \\" in latex
  assert (tmp_path / "linear.png").stat().st_size > 5000


@pytest.mark.parametrize(
  "path", sorted((ROOT / "results").glob("*-local.json")), ids=lambda p: p.stem
)
def test_results_are_what_their_record_makes(path):
  """results/NAME.md, .csv and .tex; no figure is there once and elsewhere otherwise."""
  record = json.loads(path.read_text())
  files = {suffix: path.with_suffix(suffix).read_text() for suffix in (".md", ".csv", ".tex")}
  assert files[".md"] == markdown(record, command=record["command"])
  assert files[".tex"] == latex(record)
  assert list(csv.reader(files[".csv"].splitlines())) == [
    [str(cell) for cell in line] for line in long_rows(record)
  ]


def test_what_was_not_run_is_said_and_an_unfinished_table_is_no_error(tmp_path):
  record = table_runs.measured(TABLE, [tmp_path])
  text = tables.write_table(tmp_path / "linear", record, command="c")
  assert "| fusion | 0 of 3 | not run | 77.8 | not run |" in text
  (panel, *_) = chart(record).axes
  assert [t.get_text() for t in panel.texts] == ["not run"] * 4
  assert "| fusion - simclr | not run | +8.5 |" in text


def test_parts_of_a_table_are_disjoint_and_merge_to_the_whole(tmp_path):
  done = []
  for i in (1, 2):
    stand_in = Stand_in()
    assert make(tmp_path / str(i), stand_in, share=tables.share_of([TABLE], f"{i}/2")) == []
    done.append(stand_in)
  assert [kinds(s).count("main") for s in done] == [3, 2]
  folders = [tmp_path / "1", tmp_path / "2"]
  assert table_runs.missing(TABLE, folders) == ([], [])
  make(tmp_path / "whole", Stand_in())
  assert table_runs.measured(TABLE, folders) == table_runs.measured(TABLE, [tmp_path / "whole"])


def test_all_tables_of_a_folder_are_shared_out_without_a_training_done_twice(tmp_path):
  """Also what two tables have in common, which is another row of each."""
  longer = Row("longer", Training(SMOKE, {"optim.weight_decay": 0.3}), seeds=(1,))
  several = [TABLE, TABLE._replace(rows=(*TABLE.rows[1:], longer))]
  done = []
  for i in (1, 2):
    stand_in, share = Stand_in(), tables.share_of(several, f"{i}/2")
    for table in several:
      assert make(tmp_path / str(i), stand_in, table=table, share=share) == []
    done.append(stand_in)
  assert [kinds(s).count("main") for s in done] == [3, 3]
  for table in several:
    assert table_runs.missing(table, [tmp_path / "1", tmp_path / "2"]) == ([], [])


def test_what_tables_have_cost_counts_what_they_share_once(tmp_path):
  make(tmp_path, Stand_in())
  for path in tmp_path.glob("runs/*/results.json"):
    path.with_name("costs.json").write_text(json.dumps({"cpu_seconds": 720.0}))
  for path in tmp_path.glob("runs/*/judged/*.json"):
    path.with_name(f"{path.stem}-costs.json").write_text(json.dumps({"cpu_seconds": 360.0}))
  line = "trainings 1 CPU hours (of 5), evaluations 0.5 CPU hours (of 5)"
  assert table_runs.spent([TABLE, TABLE._replace(rows=TABLE.rows[:2])], [tmp_path]) == line
  next(tmp_path.glob("runs/*/judged/*-costs.json")).unlink()  # of before costs were kept
  some = "evaluations 0.4 CPU hours (known of 4, of 5)"
  assert table_runs.spent([TABLE], [tmp_path]).endswith(some)
  assert table_runs.spent([TABLE], [tmp_path / "none"]).startswith("trainings 0 CPU hours (of 0)")


def test_a_folder_is_all_of_its_tables(tmp_path):
  names = [name for name, _ in load_tables("configs/tables:paper")]
  assert names == sorted(f"{p.stem}-paper" for p in Path("configs/tables").glob("[a-z]*.py"))
  with pytest.raises(FileNotFoundError, match="holds no table files"):
    load_tables(str(tmp_path))


def test_a_failure_is_named_and_the_rest_goes_on(tmp_path):
  stand_in = Stand_in(fails=lambda c: "ssrl_jax.main" in c and "--config.seed=1" in c)
  failed = make(tmp_path, stand_in)
  assert len(failed) == 2
  assert all("-1: train failed with 1: error: out of luck" in line for line in failed)
  assert kinds(stand_in).count("evaluate") == 3
  assert make(tmp_path, Stand_in()) == []  # the same command does what is left
  assert table_runs.missing(TABLE, [tmp_path]) == ([], [])


INTERRUPTED = """
import pathlib, signal, sys, time
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, lambda *a: stop.append(a))
print("started", flush=True)
while not stop:
  time.sleep(0.01)
time.sleep(1)
print("saved", flush=True)
"""


def test_ctrl_c_waits_for_the_training_to_save(tmp_path):
  """Sent as a terminal does, to all processes of the command."""
  program = (
    "import pathlib, sys; from ssrl_jax import tables; "
    "tables.execute([sys.executable, '-c', sys.argv[1]], pathlib.Path(sys.argv[2]))"
  )
  log = tmp_path / "table.log"
  command = [sys.executable, "-c", program, INTERRUPTED, str(log)]
  options = {"cwd": ROOT, "start_new_session": True, "stderr": subprocess.PIPE, "text": True}
  with hears_ctrl_c(), subprocess.Popen(command, **options) as process:
    while process.poll() is None and not (log.exists() and log.read_text()):
      time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
  assert log.read_text() == "started\nsaved\n"
  assert "interrupted: waiting for what runs to save" in err


def test_a_folder_that_cannot_be_written_is_one_failure_and_the_rest_goes_on(tmp_path):
  stand_in = Stand_in()

  def run_command(command, log):
    if "fusion" in log.parent.name and log.parent.name.endswith("-0"):
      raise PermissionError(13, "Permission denied", str(log))
    return stand_in(command, log)

  failed = make(tmp_path, run_command)
  assert len(failed) == 1
  assert "train failed with no start: [Errno 13] Permission denied" in failed[0]
  assert kinds(stand_in) == ["main"] * 4 + ["evaluate"] * 4


def test_a_run_that_another_table_trains_meanwhile_is_no_failure(tmp_path):
  stand_in = Stand_in()

  def run_command(command, log):
    stand_in(command, log)
    return 1 if "ssrl_jax.main" in command else 0  # refused, and by then trained

  assert make(tmp_path, run_command) == []


def test_divergence_is_counted_and_leaves_the_mean_alone(tmp_path):
  table = TABLE._replace(columns=(*TABLE.columns, Column("diverged", "run", "diverged", 2)))
  stand_in = Stand_in(diverges=lambda c: "--config.seed=2" in c)
  assert make(tmp_path, stand_in, table=table) == []
  text = tables.write_table(tmp_path / "t", table_runs.measured(table, [tmp_path]), command="c")
  assert "| fusion | 3 of 3 | 51.0 ± 1.4 (2) | 77.8 | 1.50 ± 0.00 (2) | 0.33 ± 0.58 |" in text


def test_divergence_on_another_machine_is_merged(tmp_path):
  table = TABLE._replace(columns=(*TABLE.columns, Column("diverged", "run", "diverged", 2)))
  for i in (1, 2):
    stand_in = Stand_in(diverges=lambda c: "--config.seed=1" in c)
    make(tmp_path / str(i), stand_in, share=tables.share_of([table], f"{i}/2"), table=table)
  folders = [tmp_path / "1", tmp_path / "2"]
  assert table_runs.missing(table, folders) == ([], [])
  rows = table_runs.measured(table, folders)["rows"]
  assert [row["cells"]["diverged"].get("1") for row in rows[:2]] == [1.0, 1.0]


def test_a_run_that_came_to_its_end_after_all_did_not_diverge(tmp_path):
  stand_in = Stand_in(diverges=lambda c: "--config.seed=2" in c)
  make(tmp_path, stand_in)
  folder = table_runs.runs_of(TABLE)[2].folder([tmp_path])
  assert table_runs.run_figures(folder) == {"diverged": 1.0}
  record = {"wall_seconds": 60, "cpu_seconds": 60, "images_per_second": 1.0, "step": 8}
  (folder / "results.json").write_text(json.dumps(record))
  assert table_runs.run_figures(folder)["diverged"] == 0
  assert [run.seed for run, _, _ in table_runs.missing(TABLE, [tmp_path])[1]] == [2]


def test_a_judgement_that_was_cut_short_is_made_again(tmp_path):
  """Figures are kept a protocol at a time, so a file may hold some of a judge's only."""
  judge = Judge("knn,linear")
  both = TABLE._replace(judges={"frozen": judge})
  run = table_runs.runs_of(both)[0]
  folder = run.folder([tmp_path])
  out = table_runs.judged_file(run, "frozen", judge, [tmp_path])
  out.parent.mkdir(parents=True)
  (folder / "results.json").write_text("{}")
  for figures, left in (({"knn/a": 1}, True), ({"knn/a": 1, "linear/a": 1}, False)):
    out.write_text(json.dumps({"results": dict.fromkeys(("trained", "raw_pixels"), figures)}))
    assert (run in [r for r, _, _ in table_runs.missing(both, [tmp_path])[1]]) == left


def test_what_compares_two_runs_waits_for_the_other(tmp_path):
  """With --rows it may be another process's, and half trained."""
  compared = TABLE._replace(judges={"frozen": Judge("linear", of=THEIRS.name)})
  stand_in, mine = Stand_in(), {(OURS.name, 0)}
  assert make(tmp_path, stand_in, table=compared, share=mine) == []
  assert kinds(stand_in) == ["main"]
  assert make(tmp_path, stand_in, table=compared, share={(THEIRS.name, 0)}) == []
  stand_in = Stand_in()
  assert make(tmp_path, stand_in, table=compared, share=mine) == []
  assert kinds(stand_in) == ["evaluate"]


def test_a_folder_to_merge_that_is_not_there_is_refused(tmp_path, capsys):
  argv = ["tables", "--table=configs/tables/linear.py", f"--workdir={tmp_path}", "--report"]
  for given, meant in ((tmp_path / "none", tmp_path), ("~/none", Path.home())):
    assert tables.cli([*argv, f"--merge={given}"]) == 1
    assert f"{meant / 'none'} holds no runs of tables" in capsys.readouterr().err


def test_other_options_are_judged_anew_and_do_not_replace_the_first(tmp_path):
  make(tmp_path, Stand_in())
  other = TABLE._replace(judges={"frozen": Judge("linear", {"evaluate.linear.epochs": 4})})
  stand_in = Stand_in()
  make(tmp_path, stand_in, table=other)
  assert kinds(stand_in) == ["evaluate"] * 5
  assert table_runs.missing(TABLE, [tmp_path]) == ([], [])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("path", sorted(Path("configs/tables").glob("[a-z]*.py")), ids=str)
def test_every_table_file_names_only_what_exists(path, budget):
  name, table = load_table(f"{path}:{budget}")
  assert name == f"{path.stem}-{budget}"
  assert table.rows
  assert table.columns


def test_data_sets_may_lie_anywhere_without_another_name():
  training = Training(SMOKE, {"data.source": "folder:{data}/set"})
  command = tables.train_command(table_runs.Run(training, 0, ()), Path("run"), "/mnt/x")
  assert "--config.data.source=folder:/mnt/x/set" in command
  assert "mnt" not in training.name


def test_other_overrides_are_another_run():
  assert Training(SMOKE).name.startswith("smoke-simclr-")
  assert Training(SMOKE).name != Training(SMOKE, {"optim.weight_decay": 0.3}).name
  one, two = {"epochs": 3.0, "seed": 1}, {"seed": 1, "epochs": 3.0}
  assert Training(SMOKE, one).name == Training(SMOKE, two).name


def test_plan_says_steps_flops_and_hours_and_runs_nothing(tmp_path, capsys):
  share = tables.share_of([TABLE], "1/1")
  tables.plan([TABLE, TABLE], [tmp_path], share=share, say=print)
  out = capsys.readouterr().out
  assert f"{OURS.name}-0 " in out
  assert "5 trainings, 5 evaluations missing" in out
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"baselines": ("simclrr",)}, "unknown row 'simclrr'; did you mean 'simclr'"),
    ({"columns": (Column("a", "frozn", "b"),)}, "unknown column 'linear %'|'frozn'"),
    ({"judges": {"frozen": Judge("linear", of="smoke-byol")}}, "unknown training 'smoke-byol'"),
    ({"judges": {"frozen": Judge("linaer")}}, "unknown evaluation 'linaer'; did you mean 'linear'"),
    (
      {"judges": {"frozen": Judge("linear", {"evaluate.linear.epoch": 3})}},
      "unknown option of an evaluation 'evaluate.linear.epoch'",
    ),
    (
      {"rows": (Row("fusion", Training(SMOKE, {"epoch": 3})), *TABLE.rows[1:])},
      "unknown config key 'epoch'; did you mean 'epochs'",
    ),
    ({"rows": (*TABLE.rows, TABLE.rows[0])}, "two rows have one title"),
    (
      {"rows": (TABLE.rows[0]._replace(encoder="random"), *TABLE.rows[1:])},
      "unknown encoder 'random'; did you mean 'random_init'",
    ),
  ],
)  # fmt: skip
def test_a_table_that_names_nothing_is_refused(tmp_path, monkeypatch, change, message):
  path = tmp_path / "bad.py"
  path.write_text("TABLE = None\ndef get_table(budget):\n  return TABLE\n")
  module = load_file(str(path))
  module.TABLE = TABLE._replace(**change)
  real = load_file
  monkeypatch.setattr("ssrl_jax.table.load_file", lambda p: module if p == str(path) else real(p))
  with pytest.raises(ValueError, match=message):
    load_table(str(path))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b"])
def test_rows_that_are_no_part_are_refused(text):
  with pytest.raises(ValueError, match="expected i/n"):
    tables.share_of([TABLE], text)


def test_unknown_file_and_budget_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="configs/tables"):
    load_table("configs/tables/none.py")
  with pytest.raises(FileNotFoundError, match=r"did you mean configs/tables/linear\.py\?"):
    load_table("configs/liner.py")
  with pytest.raises(ValueError, match="unknown budget 'locl'; did you mean 'local'"):
    load_table("configs/smoke.py:locl")


REAL = """
from ssrl_jax.table import Column, Judge, Row, Table, Training

def get_table(budget):
  train = Training("configs/smoke.py:simclr", {"steps": 2, "data.num_train": 64})
  return Table(
    "Real", "Smoke.", "", (Row("simclr", train), Row("random init", train, encoder="random_init")),
    (Column("k-NN %", "near", "knn/accuracy"), Column("minutes", "run", "minutes")),
    {"near": Judge("knn", {"evaluate.knn.k": 5, "data.num_test": 32})},
    subject="simclr", baselines=("random init",),
  )
"""


def test_the_command_trains_judges_writes_and_finds_everything_done_the_next_time(tmp_path, capsys):
  (tmp_path / "real.py").write_text(REAL)
  argv = ["tables", f"--table={tmp_path / 'real.py'}", f"--workdir={tmp_path / 'out'}"]
  assert tables.cli(argv) == 0, next((tmp_path / "out").glob("runs/*/table.log")).read_text()
  first = capsys.readouterr().out
  assert "train\n" in first
  assert "near of trained, random_init\n" in first
  assert re.search(r"cost: trainings 0\.00\d+ CPU hours \(of 1\), evaluations 0\.00\d+ ", first)
  record = json.loads((tmp_path / "out" / "real-local.json").read_text())
  for row in record["rows"]:
    assert 0 <= row["cells"]["k-NN %"]["0"] <= 100
  (judged,) = (tmp_path / "out").glob("runs/*/judged/near-????????.json")
  options = json.loads(judged.read_text())
  assert options["options"]["knn"]["k"] == 5
  assert options["data"]["num_test"] == 32
  assert tables.cli(argv) == 0
  assert "train\n" not in capsys.readouterr().out


def test_runs_of_a_recipe_that_was_changed_since_are_refused(tmp_path, capsys):
  """Else an edited recipe would show the figures of its old form."""
  (tmp_path / "real.py").write_text(REAL)
  argv = ["tables", f"--table={tmp_path / 'real.py'}", f"--workdir={tmp_path}", "--report"]
  _, table = load_table(argv[1].removeprefix("--table="))
  (run, *_) = table_runs.runs_of(table)
  config = resolve(run.training)
  config.data.source, config.seed, config.evaluate.evals = "folder:/elsewhere", 7, ""
  del config.guard.keep  # a knob that an older version did not have
  path = run.folder([tmp_path]) / "config.json"
  path.parent.mkdir(parents=True)
  path.write_text(config.to_json())
  assert tables.cli(argv) == 0
  config.evaluate.knn.k += 1  # the table gives its own
  config.evaluate.linear.epochs += 1  # nothing of this table
  path.write_text(config.to_json())
  assert tables.cli(argv) == 0
  config.evaluate.size *= 2
  path.write_text(config.to_json())
  assert tables.cli(argv) == 1
  assert "older form of its recipe (evaluate.size" in capsys.readouterr().err
  config.evaluate.size //= 2
  config.optim.learning_rate *= 2
  path.write_text(config.to_json())
  assert tables.cli(argv) == 1
  assert re.search(
    r"older form of its recipe \(optim.learning_rate .* -> .*\): move it away",
    capsys.readouterr().err,
  )


def test_runs_that_are_older_than_a_knob_that_the_recipe_turns_are_refused(tmp_path, capsys):
  (tmp_path / "real.py").write_text(REAL.replace(":simclr", ":fusion"))
  argv = ["tables", f"--table={tmp_path / 'real.py'}", f"--workdir={tmp_path}", "--report"]
  _, table = load_table(argv[1].removeprefix("--table="))
  (run, *_) = table_runs.runs_of(table)
  config = resolve(run.training)
  del config.method.place_weight, config.method.place_grid
  path = run.folder([tmp_path]) / "config.json"
  path.parent.mkdir(parents=True)
  path.write_text(config.to_json())
  assert tables.cli(argv) == 1
  assert "recipe (method.place_weight 0.0 -> 1.0): move it away" in capsys.readouterr().err


def test_run_that_another_process_trains_is_waited_for_and_not_trained_again(tmp_path):
  run = table_runs.runs_of(TABLE)[0]
  folder, lock, lines = run.folder([tmp_path]), contextlib.ExitStack(), []
  lock.enter_context(alone_in(folder))

  def say(line):
    lines.append(line)
    if "waiting for the process" in line:
      (folder / "results.json").write_text("{}")
      lock.close()

  stand_in = Stand_in()
  assert tables.make(TABLE, [tmp_path], run_command=stand_in, say=say) == []
  assert kinds(stand_in).count("main") == 4
  assert "waiting for the process" in lines[0]


def test_pictures_that_have_moved_are_those_that_train_and_judge(tmp_path):
  training = Training(SMOKE, {"data.source": f"folder:{DATA}/set"})
  judges = {
    "frozen": Judge("linear"),
    "others": Judge("linear", {"data.source": f"folder:{DATA}/others"}),
  }
  columns = tuple(Column(k, k, "linear/accuracy") for k in judges)
  rows = (Row("simclr", training),)
  table = TABLE._replace(
    rows=rows, columns=columns, judges=judges, subject="simclr", baselines=()
  )  # fmt: skip
  stand_in = Stand_in()
  assert make(tmp_path, stand_in, table, data="/new") == []
  train, frozen, others = stand_in.commands
  assert {"--config.data.source=folder:/new/set", "--allow_config_change=True"} <= set(train)
  assert {"--data.source=folder:/new/set", "--data.num_train=128", "--data.num_test=50"} < set(
    frozen
  )
  assert [a for a in others if "data.source" in a] == ["--data.source=folder:/new/others"]


NEEDS_DATA = """
from ssrl_jax.table import DATA, Column, Judge, Row, Table, Training

def get_table(budget):
  one = Training("configs/smoke.py:simclr", {"data.source": f"folder:{DATA}/one"})
  mixture = {"data.source": "mixture", "data.mixture": (f"cifar:{DATA}/two", f"tar:{DATA}/t*")}
  two = Training("configs/smoke.py:byol", mixture)
  return Table(
    "T", "Smoke.", "", (Row("simclr", one), Row("byol", two)),
    (Column("k-NN %", "near", "knn/accuracy"), Column("AP", "boxes", "detection/AP")),
    {"near": Judge("knn"), "boxes": Judge("detection", {
      "evaluate.detection.source": f"coco:{DATA}/boxes", "evaluate.detection.steps": 3})},
  )
"""


def test_pictures_that_are_not_there_are_all_named_before_anything_is_trained(
  tmp_path, capsys, monkeypatch
):
  (tmp_path / "needs.py").write_text(NEEDS_DATA)
  data, work = tmp_path / "sets", tmp_path / "out"
  argv = ["tables", f"--table={tmp_path / 'needs.py'}", f"--workdir={work}", f"--data={data}"]
  monkeypatch.setattr(tables, "make", lambda *args, **options: [])
  assert tables.cli(argv) == 1
  (line,) = capsys.readouterr().err.splitlines()
  every = ", ".join(str(data / name) for name in ("boxes", "one", "t*", "two"))
  assert f"error: no {every}, which the tables still need: lay out --data" in line
  assert not work.exists()
  for share, names in (("1/2", ("boxes", "one")), ("2/2", ("boxes", "t*", "two"))):
    assert tables.cli([*argv, f"--rows={share}"]) == 1
    assert f"no {', '.join(str(data / n) for n in names)}, which" in capsys.readouterr().err
  assert tables.cli([*argv, "--report"]) == 0
  for name in ("one", "two", "t7", "boxes"):
    (data / name).mkdir(parents=True)
  assert tables.cli(argv) == 0


def test_pictures_of_what_is_done_need_not_be_there(tmp_path):
  (tmp_path / "needs.py").write_text(NEEDS_DATA)
  _, table = load_table(str(tmp_path / "needs.py"))
  for run in table_runs.runs_of(table):
    folder = run.folder([tmp_path])
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    for key, figure in (("near", "knn/accuracy"), ("boxes", "detection/AP")):
      path = table_runs.judged_file(run, key, table.judges[key], [tmp_path])
      path.parent.mkdir(exist_ok=True)
      path.write_text(json.dumps({"results": {"trained": {figure: 1.0}}}))
  share = tables.share_of([table], "1/1")
  lacking = lambda: tables.data_lacking([table], [tmp_path], data="/no", share=share)  # noqa: E731
  assert lacking() == []
  for path in tmp_path.glob("runs/*/judged/boxes-*"):
    path.unlink()
  assert lacking() == ["/no/boxes"]  # detection looks at no picture of the run's
  for path in tmp_path.glob("runs/*/judged/near-*"):
    path.unlink()
  assert lacking() == ["/no/boxes", "/no/one"]


def test_plan_warns_of_pictures_that_are_not_there_in_a_line(tmp_path, capsys, monkeypatch):
  (tmp_path / "needs.py").write_text(NEEDS_DATA)
  argv = ["tables", f"--table={tmp_path / 'needs.py'}", f"--workdir={tmp_path}", "--data=/no"]
  monkeypatch.setattr(tables, "plan", lambda *args, **options: None)
  assert tables.cli([*argv, "--plan"]) == 0
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("WARNING: no /no/boxes, /no/one, /no/t*")


def test_plan_of_a_share_is_of_that_share(tmp_path, capsys):
  told = []
  for share in ("1/5", "2/5", "1/1"):
    part = tables.share_of([TABLE], share)
    tables.plan([TABLE], [tmp_path], share=part, say=print)
    told.append(int(re.search(r"(\d+) trainings", capsys.readouterr().out)[1]))
  assert told == [1, 1, 5]


def test_what_a_copy_of_a_run_was_judged_by_counts(tmp_path):
  """Merged: trained in one folder, copied to another and judged there."""
  judge, first, second = TABLE.judges["frozen"], tmp_path / "a", tmp_path / "b"
  run = table_runs.runs_of(TABLE)[0]
  for folder in (run.folder([first]), run.folder([second])):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"state_digest": "x"}')
  out = table_runs.judged_file(run, "frozen", judge, [second])
  out.parent.mkdir()
  out.write_text(json.dumps({"results": {}}))
  assert table_runs.judged_file(run, "frozen", judge, [first, second]) == out
  assert run.folder([first, second]) == run.folder([first])
  (run.folder([second]) / "results.json").write_text('{"state_digest": "y"}')  # another training
  assert table_runs.judged_file(run, "frozen", judge, [first, second]) != out
