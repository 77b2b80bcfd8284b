import html.parser
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from ssrl_jax import charts, parallel, report
from ssrl_jax.evaluate.features import Evaluation, FeatureSet, raw_pixels

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = '<script>alert("x")</script> & $x_1$'


class Page(html.parser.HTMLParser):
  """Fails on an element that is not closed or that another one's end tag closes."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.urls, self.ids, self.words = [], [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.handle_startendtag(tag, attrs)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.urls += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]
    self.ids += [v for k, v in attrs if k == "id"]

  def handle_endtag(self, tag):
    assert self.open, f"</{tag}> closes nothing"
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())


def line(step, **changes):
  record = {
    "step": step,
    "loss": 2.0 / step,
    "loss/consistency": 1.0,
    "loss/constraint": -2.0,
    "probe/accuracy": 10.0 + step / 100,
    "probe/loss": 2.0,
    "health/std": 0.93,
    "health/cosine": 0.11,
    "health/rank": 37.4,
    "health/grad_norm": 0.5,
    "health/update_norm": 0.001,
    "health/target_distance": 0.3,
    "learning_rate": 1e-3,
    "images_per_second": 512.0,
    "data_wait_percent": 1.0,
    "mfu_percent": 30.0,
  }
  return record | changes


def figures(names=("cat", "dog", "eel"), n=60):
  rng = np.random.default_rng(0)
  label = rng.integers(0, 3, n).astype(np.int32)
  features = (rng.normal(size=(3, 8))[label] + rng.normal(size=(n, 8))).astype(np.float32)
  pictures = rng.integers(0, 256, (24, 8, 8, 3), np.uint8)
  neighbours = report.Neighbours(
    query=pictures[:4],
    query_label=np.array([0, 1, 2, -1]),
    found=pictures[4:24].reshape(4, 5, 8, 8, 3),
    found_label=np.array([[0, 0, 0, 1, 2], [1, 1, 0, 0, 0], [2, 0, 0, 0, -1], [0] * 5]),
    similarity=np.tile(np.linspace(0.9, 0.5, 5), (4, 1)),
  )
  views = {
    "global": rng.integers(0, 256, (3, 2, 8, 8, 3), np.uint8),
    "local": rng.integers(0, 256, (3, 4, 5, 5, 3), np.uint8),
  }
  test = FeatureSet(features, label, np.arange(n))
  return report.Figures(views, neighbours, test, names, embedding_size=64)


RESULTS = {
  "results": {
    "trained": {
      "knn/accuracy": 63.28,
      "knn/k": 20.0,
      "linear/accuracy": 68.91,
      "linear/held_out_accuracy": 70.13,
      "linear/learning_rate": 0.03,
      "linear/weight_decay": 0.001,
    },
    "random_init": {"knn/accuracy": 24.13, "linear/accuracy": 36.24},
    "raw_pixels": {"knn/accuracy": 17.74},
  },
  "state_digest": "9f2c1e",
  "step": 400,
  "total_steps": 400,
  "versions": {"jax": "0.10.2"},
  "devices": {"kind": "cpu", "count": 8},
  "wall_seconds": 251.3,
  "images_per_second": 519.2,
  "config": {
    "method": {"name": "fusion"},
    "encoder": {"name": "resnet8"},
    "data": {"source": "digit_scenes"},
    "optim": {"learning_rate": 0.002},
  },
  "command": "python -m ssrl_jax.main --config=configs/digits.py",
}


def write(folder, *, results=RESULTS, metrics=None, shown=None):
  metrics = [line(s) for s in range(20, 401, 20)] if metrics is None else metrics
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
  if results is not None:
    (folder / "results.json").write_text(json.dumps(results))
  return report.write_report(folder, figures=shown).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  return write(tmp_path_factory.mktemp("run"), shown=figures())


def test_page_is_well_formed_and_its_ids_are_unique(full):
  page = Page(full)
  assert page.tags.count("section") == 8
  assert page.tags.count("svg") == 6 + 6 + 2
  assert len(page.ids) == len(set(page.ids))


def test_page_is_self_contained(full):
  page = Page(full)
  assert page.urls
  assert all(u.startswith(("#", "data:image/png;base64,")) for u in page.urls)
  assert not re.search(r"url\((?!#)|@import|<script", full)
  assert {u[1:] for u in page.urls if u.startswith("#")} <= set(page.ids)
  assert set(re.findall(r"url\(#([^)]+)\)", full)) <= set(page.ids)


def test_page_has_the_colours_of_the_screen_and_no_others_for_ink(full):
  assert charts.INK not in full
  assert charts.LINE not in full
  assert "prefers-color-scheme: dark" in full
  for name in ("--s0", "--s1", "--line"):
    assert full.count(f"{name}:") == 2  # light, dark


def test_page_holds_the_figures_of_the_run(full):
  text = Page(full).text
  for part in (
    "fusion with resnet8 on digit_scenes", "400 of 400 steps", "4.2 minutes", "519 images/s",
    "8 x cpu", "63.3", "68.9", "24.1", "36.2", "17.7", "k = 20", "learning rate 0.03",
    "weight decay 0.001", "70.1 % right", "healthy", "37.4 effective dimensions",
    "Effective dimensions of 64", "9f2c1e", "jax 0.10.2", "optim.learning_rate = 0.002",
    "python -m ssrl_jax.main --config=configs/digits.py", "global: 2 of each picture, 8 x 8",
    "local: 4 of each picture, 5 x 5", "8-dimensional features",
  ):  # fmt: skip
    assert part in text, part
  assert text.count("not run") == 1  # raw pixels, linear


def test_figures_of_every_protocol_that_was_run_are_shown_and_no_others(tmp_path):
  results = {
    "trained": {"low_label/1pct/accuracy": 24.61, "geometry/rankme": 140.25, "bias/x": 1.0},
    "random_init": {"low_label/1pct/accuracy": 11.14, "low_label/file/accuracy": 31.77},
  }
  text = write(tmp_path, results=RESULTS | {"results": results})
  table = text[text.index('<table class="results">') : text.index("</table>")]
  assert re.findall("<th>([^<]+)</th>", table)[:3] == ["1 % lab.", "RankMe", "low_label/file %"]
  assert table.count("<i style=") == 3  # a bar of each percentage
  for part in ("24.6", "140.2", "11.1", "31.8"):
    assert part in table


def test_page_is_the_same_every_time(full, tmp_path):
  assert write(tmp_path, shown=figures()) == full


def test_neighbours_are_marked_by_agreement_and_unknown_labels_are_not(full):
  # Known pairs: 5 + 5 + 4; the same class: 3 + 2 + 1.
  assert "6 of 14 here have the same" in Page(full).text
  assert full.count('<figure class="same">') == 6
  assert full.count('<figure class="other">') == 8
  assert full.count('<figure class="query">') == 4 + 1 + 5


def test_page_without_anything_says_so(tmp_path):
  text = Page(report.write_report(tmp_path).read_text(encoding="utf-8")).text
  assert text.count("not run") == 6
  assert text.count("not logged") == 12
  assert text.count("not recorded") == 4
  assert "unknown The run logged no health figures." in text


@pytest.mark.parametrize("missing", ["results", "devices", "versions", "config", "step", "command"])
def test_page_survives_a_missing_piece_of_the_results(missing, tmp_path):
  page = Page(
    write(tmp_path, results={k: v for k, v in RESULTS.items() if k != missing}, metrics=[])
  )
  assert page.tags.count("section") == 8


def test_page_reads_the_config_of_a_run_that_has_no_results_yet(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(RESULTS["config"]))
  assert "fusion with resnet8" in Page(write(tmp_path, results=None)).text


def test_values_that_are_not_finite_are_counted_and_leave_gaps(tmp_path):
  metrics = [line(s) for s in range(1, 10)]
  metrics[3] |= {"loss": math.nan, "health/grad_norm": math.inf, "probe/accuracy": None}
  metrics[4] |= {"loss": -math.inf, "health/grad_norm": 0.0}
  results = RESULTS | {"results": {"trained": {"knn/accuracy": math.nan}}}
  text = Page(write(tmp_path, results=results, metrics=metrics)).text
  assert "2 logged values were not finite" in text  # loss
  assert "1 logged values were not finite" in text  # gradient
  assert "not finite" in text.split("Training")[0]  # the table


def test_series_of_nothing_but_nan_is_drawn_as_missing(tmp_path):
  text = Page(write(tmp_path, metrics=[line(1, loss=math.nan)])).text
  assert "Loss not logged" in text


@pytest.mark.parametrize("where", ["method", "class", "term", "eval", "command", "source", "view"])
def test_names_cannot_become_markup(where, tmp_path):
  results, metrics, shown = json.loads(json.dumps(RESULTS)), [], figures()
  if where == "method":
    results["config"]["method"]["name"] = EVIL
  elif where == "source":
    results["config"]["data"]["source"] = EVIL
  elif where == "command":
    results["command"] = EVIL
  elif where == "eval":
    results["results"]["trained"][f"{EVIL}/accuracy"] = 5.0
  elif where == "class":
    shown = figures(names=(EVIL, "dog", "eel"))
  elif where == "term":
    metrics = [line(s, **{f"loss/{EVIL}": 1.0}) for s in (1, 2)]
  elif where == "view":
    shown = shown._replace(views={EVIL: shown.views["global"]})
  text = write(tmp_path, results=results, metrics=metrics, shown=shown)
  page = Page(text)
  assert "script" not in page.tags
  expected = EVIL.split("/")[0] if where == "eval" else EVIL
  assert " ".join(expected.split()) in page.text


def test_names_in_any_script_are_shown(tmp_path):
  text = write(tmp_path, metrics=[], shown=figures(names=("猫", "собака", "चील")))
  assert "猫" in Page(text).text.split("Map of the test pictures")[1]


@pytest.mark.parametrize(
  ("changes", "word", "reason"),
  [
    ({}, "healthy", "differ"),
    ({"health/std": 0.01}, "collapsed", "complete collapse"),
    ({"health/cosine": 0.999}, "collapsed", "complete collapse"),
    ({"health/rank": 1.2}, "collapsed", "dimensional collapse"),
    ({"health/rank": math.nan}, "not finite", "NaN"),
    ({"health/std": None}, "healthy", "step 5"),  # of the last line that has all figures
  ],
)
def test_verdict_is_of_the_last_line_with_health_figures(changes, word, reason):
  found = report.verdict([line(5), line(9, **changes)], 64)
  assert found[0] == word
  assert reason in found[1]


def test_long_runs_are_averaged_over_equal_stretches():
  metrics = [line(s, loss=float(s)) for s in range(1, 3001)]
  steps, values = charts._series(metrics, "loss", positive=False)
  assert len(steps) == charts.MAX_POINTS
  np.testing.assert_allclose(steps[:2], [5.5, 15.5])
  np.testing.assert_allclose(values, steps)


def test_spectrum_is_the_share_of_the_singular_values():
  for shape in ((50, 7), (7, 20)):
    x = np.random.default_rng(1).normal(size=shape) * np.arange(1, shape[1] + 1).reshape(1, -1) + 9
    square = np.linalg.svd(x - x.mean(0, keepdims=True), compute_uv=False) ** 2
    found = charts.spectrum(x)
    assert len(found) == shape[1]
    np.testing.assert_allclose(found[: len(square)], square / square.sum(), atol=1e-12)
  assert not charts.spectrum(np.full((9, 4), 0.1, np.float32)).any()


def test_projection_keeps_the_two_widest_directions():
  rng = np.random.default_rng(2)
  x = np.zeros((40, 5))
  x[:, 0], x[:, 3], x[:, 4] = rng.normal(size=40), 0.5 * rng.normal(size=40), 20
  xy, share = charts.project(x)
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  centred = unit - unit.mean(0, keepdims=True)
  distance = lambda v: np.linalg.norm(v[:, None] - v[None], axis=-1)  # noqa: E731
  np.testing.assert_allclose(distance(xy), distance(centred), atol=1e-3)
  assert share == pytest.approx(1, abs=1e-2)
  assert charts.project(np.ones((30, 5), np.float32)) is None
  assert charts.project(x[:1]) is None


def test_collapsed_features_are_shown_as_such(tmp_path):
  same = FeatureSet(np.ones((20, 4), np.float32), np.zeros(20, np.int32), np.arange(20))
  text = Page(write(tmp_path, shown=report.Figures(test=same))).text
  assert "there is nothing to map" in text
  assert "they have no spectrum" in text


def test_contact_sheet_has_pictures_in_columns_and_views_in_rows():
  views = np.arange(6, dtype=np.uint8).reshape(3, 2, 1, 1, 1) * np.ones((1, 1, 4, 5, 3), np.uint8)
  sheet = charts.contact_sheet(views, gap=2)
  assert sheet.shape == (2 * 4 + 2, 3 * 5 + 2 * 2, 4)
  assert sheet[6:, 7:12, :3].tolist() == np.full((4, 5, 3), 3).tolist()  # picture 1, view 1
  assert sheet[:, :, 3].min() == 0  # the gap is transparent
  assert (sheet[:4, :5] == [0, 0, 0, 255]).all()


def test_large_pictures_are_made_smaller():
  assert charts.shrink(np.zeros((200, 100, 3), np.uint8)).shape == (96, 48, 3)
  assert charts.shrink(np.zeros((20, 10, 3), np.uint8)).shape == (20, 10, 3)


class Pictures:
  num_classes, class_names = 2, ("a", "b")

  def __init__(self, n):
    self.images = np.random.default_rng(n).integers(0, 256, (n, 6, 6, 3), np.uint8)

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    return {"image": Image.fromarray(self.images[i]), "label": i % 2}


def test_gather_finds_the_neighbours_of_pictures_spread_over_the_test_set():
  train, test = Pictures(7), Pictures(9)
  test.images[8] = train.images[3]
  evaluation = Evaluation(
    raw_pixels, (), train=train, test=test, num_classes=2, mesh=parallel.make_mesh(1), canvas=6,
    size=6, crop=1.0, mean=(0.5,) * 3, std=(0.2,) * 3, batch_size=4,
  )  # fmt: skip
  found = report.gather(evaluation, num_queries=3, k=2).neighbours
  np.testing.assert_array_equal(found.query, test.images[[0, 4, 8]])
  np.testing.assert_array_equal(found.query_label, [0, 0, 0])
  np.testing.assert_array_equal(found.found[2, 0], train.images[3])
  assert found.found_label[2, 0] == 1
  assert found.similarity[2, 0] == pytest.approx(1)
  assert found.found.shape == (3, 2, 6, 6, 3)
