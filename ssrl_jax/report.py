"""report.html: what a run learnt and whether to believe it, on one self-contained page.

No network, no script: pictures are data URIs, charts are inline SVG in the page's own colours, so
they follow a light or a dark screen. Whatever a run does not have is shown as missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ssrl_jax import charts
from ssrl_jax.config import flatten
from ssrl_jax.evaluate import EVALS
from ssrl_jax.evaluate.features import Evaluation, FeatureSet
from ssrl_jax.evaluate.knn import nearest
from ssrl_jax.files import write_whole
from ssrl_jax.metrics import collapse, read_metrics

ROWS = {
  "trained": "trained",
  "random_init": "untrained (same network, random weights)",
  "raw_pixels": "raw pixels (no network)",
}


class Neighbours(NamedTuple):
  """Some test pictures and the training pictures nearest to them, most similar first."""

  query: np.ndarray  # uint8 [n, h, w, 3]
  query_label: np.ndarray  # int [n], -1 where unknown
  found: np.ndarray  # uint8 [n, k, h, w, 3]
  found_label: np.ndarray  # int [n, k]
  similarity: np.ndarray  # float [n, k], cosine


class Figures(NamedTuple):
  """What the page shows beside the run's own files; each may be missing."""

  views: dict[str, np.ndarray] | None = None  # name of the views -> uint8 [n, V, h, w, 3]
  neighbours: Neighbours | None = None
  test: FeatureSet | None = None  # of the trained encoder
  class_names: tuple[str, ...] = ()
  embedding_size: int | None = None  # dimensions of what health/rank was measured on


def gather(
  evaluation: Evaluation,
  *,
  views: dict[str, np.ndarray] | None = None,
  embedding_size: int | None = None,
  num_queries: int = 8,
  k: int = 5,
) -> Figures:
  """The figures of an evaluated encoder; on many hosts every one must call it.

  The queries lie evenly over the test set: they are not chosen by success.
  """
  train, test = evaluation.features("train"), evaluation.features("test")
  rows = np.unique(np.linspace(0, len(test.ids) - 1, num_queries).astype(int))
  similarity, index = nearest(test.features[rows], train.features, k=min(k, len(train.ids)))
  found = evaluation.pictures("train", train.ids[index].reshape(-1))
  neighbours = Neighbours(
    query=evaluation.pictures("test", test.ids[rows]),
    query_label=test.labels[rows],
    found=found.reshape(*index.shape, *found.shape[1:]),
    found_label=train.labels[index],
    similarity=similarity,
  )
  return Figures(views, neighbours, test, tuple(evaluation.test.class_names), embedding_size)


def write_report(workdir: str | Path, *, figures: Figures | None = None) -> Path:
  """Writes report.html from the folder's results.json, metrics.jsonl and `figures`."""
  path = Path(workdir) / "report.html"
  if jax.process_index() == 0:
    results = _read_json(path.with_name("results.json"))
    config = results.get("config") or _read_json(path.with_name("config.json"))
    page = render(results, config, read_metrics(workdir), figures or Figures())
    write_whole(path, page)
  return path


def _read_json(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def render(
  results: dict[str, Any], config: dict[str, Any], metrics: list[dict[str, Any]], figures: Figures
) -> str:
  """The whole page."""
  flat = flatten(config)
  name = [str(flat.get(f"{k}.name", f"unknown {k}")) for k in ("method", "encoder")]
  title = f"{name[0]} with {name[1]} on {flat.get('data.source', 'unknown data')}"
  training = [
    _section("Training", _training(metrics)),
    _section("Health of the embedding", _health(metrics, figures.embedding_size)),
    _section("What the encoder was fed", _views(figures.views)),
  ]
  if results.get("total_steps") == 0:
    came = f"None: this is the encoder of {flat.get('init_from')}, as it came."
    training = [_section("Training", _note(came))]
  sections = [
    _section("Result", _results_table(results.get("results") or {})),
    *training,
    _section("Nearest neighbours", _neighbours(figures.neighbours, figures.class_names)),
    _section("Map of the test pictures", _projection(figures.test, figures.class_names)),
    _section("Spectrum of the features", _spectrum(figures.test)),
    _section("How to get this again", _provenance(results, flat)),
  ]
  return (
    f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escape(title)}</title>\n<style>{charts.stylesheet()}</style>\n</head>\n<body>\n<header>"
    f"<h1>{escape(title)}</h1>\n<p>{escape(_summary(results, metrics))}</p></header>\n"
    f"<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
  )


def _section(title: str, body: str) -> str:
  return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _note(text: str) -> str:
  return f'<p class="note">{escape(text)}</p>\n'


def _number(value: Any, form: str = ".1f", missing: str = "not run") -> str:
  """A number as text; what is none says so."""
  if not isinstance(value, (int, float)):
    return missing
  return format(value, form) if math.isfinite(value) else "not finite"


def _summary(results: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
  step = results.get("step") or (metrics[-1]["step"] if metrics else 0)
  total = f" of {results['total_steps']:,}" if results.get("total_steps") else ""
  parts = [f"{step:,}{total} steps"]
  if results.get("wall_seconds"):
    parts.append(f"{results['wall_seconds'] / 60:,.1f} minutes")
  if results.get("images_per_second"):
    parts.append(f"{results['images_per_second']:,.0f} images/s")
  devices = results.get("devices")
  if isinstance(devices, dict):
    parts.append(f"{devices.get('count', '?')} x {devices.get('kind', 'unknown device')}")
  elif devices:
    parts.append(str(devices))
  return " · ".join(parts)


def _results_table(results: dict[str, dict[str, float]]) -> str:
  found = {key for row in results.values() for key in row}
  titles = {key: title for p in EVALS.values() for key, title in p.columns.items()}
  titles |= {k: k.replace("/accuracy", " %") for k in sorted(found - titles.keys())
             if k.endswith("/accuracy")}  # fmt: skip
  shown = [key for key in titles if key in found] or ["knn/accuracy", "linear/accuracy"]
  head = "".join(f"<th>{escape(titles[key])}</th>" for key in shown)
  body = ""
  for row, words in (ROWS | {r: r for r in results if r not in ROWS}).items():
    cells = "".join(_result_cell(results.get(row, {}).get(k), titles[k]) for k in shown)
    body += f'<tr class="{"ours" if row == "trained" else "control"}">'
    body += f"<th>{escape(words)}</th>{cells}</tr>\n"
  note = _note(
    "Of the test pictures. What training taught is the distance to both controls. "
    + _protocol(results.get("trained") or {})
  )
  return f'<table class="results"><tr><th></th>{head}</tr>\n{body}</table>\n{note}'


def _protocol(figures: dict[str, float]) -> str:
  """What the evaluations chose for the trained encoder."""
  parts = []
  if "knn/k" in figures:
    parts.append(f"k-NN: k = {figures['knn/k']:g}.")
  if "linear/learning_rate" in figures:
    parts.append(
      f"Linear probe: learning rate {figures['linear/learning_rate']:g} and weight decay "
      f"{_number(figures.get('linear/weight_decay'), 'g', 'unknown')}, chosen on held-out training "
      f"pictures ({_number(figures.get('linear/held_out_accuracy'), '.1f', 'unknown')} % right)."
    )
  return " ".join(parts)


def _result_cell(value: Any, title: str) -> str:
  if not isinstance(value, (int, float)) or not math.isfinite(value):
    return f'<td class="none">{_number(value)}</td>'
  bar = f'<i style="width:{min(max(value, 0), 100):.1f}%"></i>' if "%" in title else ""
  return f'<td>{value:.1f}<span class="bar">{bar}</span></td>'


def _training(metrics: list[dict[str, Any]]) -> str:
  terms = sorted({key for r in metrics for key in r if key.startswith("loss/")})
  drawn = [
    charts.curves(metrics, "Loss", {"loss": ""}),
    charts.curves(metrics, "Terms of the loss", {t: t.removeprefix("loss/") for t in terms}),
    charts.curves(metrics, "Online probe, % of training views right", {"probe/accuracy": ""}),
    charts.curves(metrics, "Learning rate", {"learning_rate": ""}),
    charts.curves(metrics, "Images a second", {"images_per_second": ""}, limits=(0, None)),
    charts.curves(
      metrics, "Use of the device, %",
      {"mfu_percent": "of peak FLOP/s (MFU)", "data_wait_percent": "waiting for data"},
      limits=(0, None),
    ),
  ]  # fmt: skip
  ramp = {"data/views_strength": ""}
  if any(key in r for key in ramp for r in metrics):  # the ramp is on
    drawn.append(charts.curves(metrics, "Strength of the views", ramp, limits=(0, None)))
  return _panels(drawn, metrics, ("loss", "probe/", "learning_rate", "images_per_second"))


def _health(metrics: list[dict[str, Any]], embedding_size: int | None) -> str:
  word, sentence = verdict(metrics, embedding_size)
  body = f'<p class="verdict {word.replace(" ", "-")}"><b>{escape(word)}</b> {escape(sentence)}</p>'
  size = f" of {embedding_size}" if embedding_size else ""
  floor = {"limits": (0, None)}
  drawn = [
    charts.curves(metrics, "Spread (1: even, 0: all the same)", {"health/std": ""}, **floor),
    charts.curves(metrics, "Mean |cosine| (1: all parallel)", {"health/cosine": ""}, **floor),
    charts.curves(metrics, f"Effective dimensions{size}", {"health/rank": ""}, **floor),
    charts.curves(
      metrics, "Distance to target, 2 - 2 cos", {"health/target_distance": ""}, **floor
    ),
    charts.curves(metrics, "Norm of the gradient", {"health/grad_norm": ""}, log=True),
    charts.curves(metrics, "Norm of the update", {"health/update_norm": ""}, log=True),
  ]
  raw = {"health/raw_std": ""}
  if any(key in r for key in raw for r in metrics):
    title = "Standard deviation (the loss asks for 1)"
    drawn.append(charts.curves(metrics, title, raw, **floor))
  meaning = (
    "Complete collapse gives every picture the same embedding: spread near 0, |cosine| near 1. "
    "Dimensional collapse keeps pictures apart in a few directions only: few effective dimensions, "
    "(Σe)²/Σe² of the covariance's eigenvalues e. A distance to the target that falls to 0 with "
    "either means that the target was met by saying nothing; a gradient norm that jumps comes "
    "before a diverged loss."
  )
  return body + _panels(drawn, metrics, ("health/",)) + _note(meaning)


def verdict(metrics: list[dict[str, Any]], embedding_size: int | None) -> tuple[str, str]:
  """One word and its reason, of the last line that has the health figures."""
  names = ("health/std", "health/cosine", "health/rank")
  lines = [r for r in metrics if all(isinstance(r.get(n), (int, float)) for n in names)]
  if not lines:
    return "unknown", "The run logged no health figures."
  last = lines[-1]
  if not all(math.isfinite(last[n]) for n in names):
    return "not finite", f"At step {last['step']:,} the embedding holds NaN or infinity."
  found = collapse(last, embedding_size or 0)
  if found:
    return "collapsed", f"At step {last['step']:,}: {found}."
  return "healthy", (
    f"At step {last['step']:,} the embeddings of different pictures differ: spread "
    f"{last['health/std']:.2f} of 1, mean |cosine| {last['health/cosine']:.2f}, "
    f"{last['health/rank']:.1f} effective dimensions."
  )


def _panels(drawn: Iterable[str], metrics: list[dict[str, Any]], prefixes: tuple[str, ...]) -> str:
  values = [v for r in metrics for key, v in r.items() if key.startswith(prefixes)]
  bad = sum(isinstance(v, float) and not math.isfinite(v) for v in values)
  note = _note(f"{bad} logged values were not finite; the curves have gaps there.") if bad else ""
  return f'<div class="charts">{"".join(drawn)}</div>\n{note}'


def _views(views: dict[str, np.ndarray] | None) -> str:
  if not views:
    return _note("not recorded")
  body = ""
  for name, view_NVHWC in views.items():
    v, h, w = view_NVHWC.shape[1:4]
    title = f"{name}: {v} of each picture, {w} x {h} pixels; one picture a column"
    body += charts.figure(
      title, charts.image(charts.contact_sheet(view_NVHWC), f"{name} views", "sheet")
    )
  return f"{body}{_note('As the loss saw them, drawn at random for these pictures.')}"


def _neighbours(neighbours: Neighbours | None, class_names: Sequence[str]) -> str:
  if neighbours is None:
    return _note("not recorded")

  def cell(picture, label, kind, under=""):
    name = _class_name(label, class_names)
    image = charts.image(charts.shrink(picture), name, "thumb")
    return f'<figure class="{kind}">{image}<figcaption>{escape(name)}{under}</figcaption></figure>'

  body = ""
  for query, label, *found in zip(*neighbours):
    body += f'<div class="row">{cell(query, label, "query")}'
    for picture, other, similarity in zip(*found):
      kind, mark = ("same", "✓ ") if other == label else ("other", "✗ ")
      kind, mark = (kind, mark) if label >= 0 and other >= 0 else ("query", "")
      body += cell(
        picture, other, kind, f"<small>{mark}{_number(float(similarity), '.3f')}</small>"
      )
    body += "</div>\n"
  known = (neighbours.found_label >= 0) & (neighbours.query_label.reshape(-1, 1) >= 0)
  same = neighbours.found_label == neighbours.query_label.reshape(-1, 1)
  note = (
    "Left a test picture, beside it the training pictures whose features are nearest, with their "
    "cosine similarity. Test pictures evenly spaced in the set, not chosen by success. "
  )
  if np.any(known):
    note += (
      f"Green ✓: the same class; red ✗: another. {np.sum(same & known)} of {np.sum(known)} here "
      "have the same."
    )
  return f'<div class="neighbours">{body}</div>\n{_note(note)}'


def _class_name(label: int, class_names: Sequence[str]) -> str:
  if label < 0:
    return "unknown"
  return str(class_names[label]) if label < len(class_names) else f"class {label}"


def _projection(test: FeatureSet | None, class_names: Sequence[str]) -> str:
  if test is None:
    return _note("not recorded")
  rows = np.unique(np.linspace(0, len(test.ids) - 1, charts.MAX_PROJECTED).astype(int))
  found = charts.project(test.features[rows])
  if found is None:
    return _note("The features of all test pictures are the same: there is nothing to map.")
  label_N, (xy_N2, share) = test.labels[rows], found

  def draw(axes):
    axes.scatter(*xy_N2[label_N < 0].T, s=7, color=charts.LINE, linewidths=0)
    for i, label in enumerate(np.unique(label_N[label_N >= 0])):
      points = xy_N2[label_N == label]
      axes.scatter(*points.T, s=7, color=charts.CLASS_COLOURS[i % 10], linewidths=0, alpha=0.85)
      if i < 20:  # more names would hide the points
        place = points[np.argmin(np.sum((points - np.median(points, 0, keepdims=True)) ** 2, 1))]
        axes.text(
          *place, _class_name(label, class_names), ha="center", va="center", color="#ffffff",
          bbox={"facecolor": charts.CLASS_COLOURS[i % 10], "linewidth": 0, "pad": 2},
        )  # fmt: skip
    axes.set_axis_off()
    axes.set_aspect("equal", "datalim")

  note = (
    f"The two principal directions of the unit-length features of {len(rows):,} test pictures, "
    f"which hold {100 * share:.0f} % of their variance; a colour and a name for each class, the "
    "name at its middle. Classes that overlap here may be apart in other directions."
  )
  return f'<div class="map">{charts.svg(draw, size=(7, 4.4), salt="map")}</div>{_note(note)}'


def _spectrum(test: FeatureSet | None) -> str:
  if test is None:
    return _note("not recorded")
  rows = np.unique(np.linspace(0, len(test.ids) - 1, charts.MAX_SPECTRUM).astype(int))
  share_D = charts.spectrum(test.features[rows])
  if not np.sum(share_D):
    return _note("The features of all test pictures are the same: they have no spectrum.")
  rank = np.sum(share_D) ** 2 / np.sum(share_D**2)
  most = int(np.searchsorted(np.cumsum(share_D), 0.95)) + 1

  def draw(axes):
    shown = share_D > 1e-6
    axes.plot(
      np.arange(1, len(share_D) + 1)[shown], share_D[shown], color=charts.SERIES[0], linewidth=1.8
    )
    axes.axvline(rank, color=charts.SERIES[1], linewidth=1.2, linestyle="--")
    axes.annotate(
      f"{rank:.1f} effective", (rank, 1), xycoords=("data", "axes fraction"), xytext=(4, -3),
      textcoords="offset points", va="top", color=charts.SERIES[1],
    )  # fmt: skip
    charts.log_axis(axes, max(share_D[shown].min() / 1.3, 1e-6), share_D[0] * 1.5)
    axes.set_xlabel("direction, the strongest first")
    axes.set_ylabel("share of the variance")

  note = (
    f"Eigenvalues of the covariance of the encoder's {len(share_D)}-dimensional features over "
    f"{len(rows):,} test pictures, as shares of their sum. {rank:.1f} effective dimensions, "
    f"(Σe)²/Σe²; {most} hold 95 % of the variance. A cliff is a dimensional collapse."
  )
  return f'<div class="map">{charts.svg(draw, size=(7, 3), salt="spectrum")}</div>{_note(note)}'


def _provenance(results: dict[str, Any], flat: dict[str, Any]) -> str:
  versions = results.get("versions") or {}
  devices = results.get("devices")
  if isinstance(devices, dict):
    devices = ", ".join(f"{k} {v}" for k, v in devices.items())
  facts = {
    "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
    "devices": devices,
    "seconds, all starts together": _number(results.get("wall_seconds"), ",.1f", "unknown"),
    "pictures replaced as damaged": results.get("substituted"),
    "SHA-256 of the final state": results.get("state_digest"),
  }
  rows = "".join(
    f"<tr><th>{escape(k)}</th><td>{escape(str('unknown' if v in (None, '') else v))}</td></tr>\n"
    for k, v in facts.items()
  )
  config = "\n".join(f"{k} = {v!r}" for k, v in flat.items()) or "unknown"
  command = results.get("command") or "unknown"
  return (
    f"<pre>{escape(command)}</pre>\n"
    f'<table class="facts">{rows}</table>\n'
    f"<details><summary>Every knob of the run</summary><pre>{escape(config)}</pre></details>"
  )
