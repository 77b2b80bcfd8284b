"""What report.html draws: charts as inline SVG, pictures as data URIs, colours and style."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

MAX_POINTS = 300  # of a curve; longer runs are averaged over equal stretches
MAX_PROJECTED = 1000  # points of the map
MAX_SPECTRUM = 5000  # pictures that the spectrum is computed from
MAX_SIDE = 96  # pixels of a picture on the page

# Okabe and Ito's colours, told apart by colour-blind readers; the page gives each a lighter
# twin for dark screens. INK and LINE stand for the page's own and are replaced in the SVG.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SERIES_ON_DARK = ("#58b1ea", "#f0834a", "#2fc498", "#dd9bc0", "#efb73c", "#8fd0f5")
INK, LINE = "#101112", "#a1a2a3"
CLASS_COLOURS = (  # Tol's vibrant scheme and three more: as dark as they are light
  "#0088cc", "#ee7733", "#009988", "#dd4422", "#33bbee",
  "#ee3377", "#999999", "#aa8811", "#8866dd", "#996644",
)  # fmt: skip


def curves(
  metrics: list[dict[str, Any]],
  title: str,
  names: dict[str, str],
  *,
  log: bool = False,
  limits: tuple[float | None, float | None] = (None, None),
) -> str:
  """A chart of {key: legend} over the steps; keys that no line has are left out."""
  series = {n: _series(metrics, n, positive=log) for n in names}
  series = {n: s for n, s in series.items() if np.any(np.isfinite(s[1]))}
  if not series:
    return figure(title, '<p class="none">not logged</p>')

  def draw(axes):
    for i, (n, (steps, values)) in enumerate(series.items()):
      style = {"color": SERIES[i % 6], "linestyle": ("-", "--", ":")[i // 6 % 3]}
      marker = "o" if np.sum(np.isfinite(values)) == 1 else ""
      axes.plot(steps, values, label=names[n], linewidth=1.6, marker=marker, **style)
    axes.set_xlabel("step")
    axes.set_ylim(*limits)
    if log:  # four decades: the last steps of a schedule would flatten the rest
      low, high = axes.dataLim.intervaly
      log_axis(axes, max(low / 1.3, high / 1e4), high * 1.3)
    if len(series) > 1:
      axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=1 if len(series) < 3 else 2, borderpad=0,
        handlelength=1.4, columnspacing=1.2, labelspacing=0.2,
      )  # fmt: skip

  return figure(title, svg(draw, size=(4.4, 2.7), salt=title))


def _series(
  metrics: list[dict[str, Any]], name: str, *, positive: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values, NaN for a gap; means of equal stretches if there are over MAX_POINTS."""
  pairs = [(r["step"], r[name]) for r in metrics if isinstance(r.get(name), (int, float))]
  steps, values = np.array(pairs, float).reshape(-1, 2).T
  shown = np.isfinite(values) & ((values > 0) | (not positive))
  values = np.where(shown, values, np.nan)
  if len(steps) > MAX_POINTS:
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS)
    steps = np.array([steps[p].mean() for p in parts])
    values = np.array([values[p].mean() for p in parts])
  return steps, values


def log_axis(axes: Any, low: float, high: float) -> None:
  """Makes the vertical axis logarithmic, with plain numbers, and enough of them."""
  axes.set_yscale("log")
  axes.set_ylim(low, high)
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
  axes.yaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_minor_formatter("")


def svg(draw: Callable[[Any], None], *, size: tuple[float, float], salt: str) -> str:
  """Inline SVG of what `draw` puts on an axes; the page's colours, its fonts, unique ids."""
  style = {
    "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE, "axes.linewidth": 0.8,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": True, "grid.color": LINE, "grid.alpha": 0.35, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.formatter.useoffset": False,
  }  # fmt: skip
  with matplotlib.rc_context(style), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts draw the text, not ours
    drawing = Figure(figsize=size, layout="constrained")
    drawing.patch.set_alpha(0)
    axes = drawing.add_subplot()
    axes.patch.set_alpha(0)
    draw(axes)
    file = io.StringIO()
    drawing.savefig(file, format="svg", metadata={"Date": None})
  text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
  text = re.sub(r' id="(?!C\d)[A-Za-z0-9.]+_\d+"', "", text[text.index("<svg") :])
  text = re.sub(r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
  names = {INK: "currentColor", LINE: "var(--line)"}
  names |= {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}
  for colour, name in names.items():
    text = text.replace(colour, name)
  return text.replace("xlink:href", "href")


def figure(title: str, body: str) -> str:
  return f"<figure><figcaption>{escape(title)}</figcaption>{body}</figure>\n"


def contact_sheet(view_NVHWC: np.ndarray, *, gap: int = 2) -> np.ndarray:
  """uint8 RGBA: a column for each picture, a row for each of its views, transparent gaps."""
  small = np.stack([[shrink(v) for v in views] for views in view_NVHWC])
  n, v, h, w, _ = small.shape
  sheet = np.zeros((v, h + gap, n, w + gap, 4), np.uint8)
  sheet[:, :h, :, :w, :3] = small.transpose(1, 2, 0, 3, 4)
  sheet[:, :h, :, :w, 3] = 255
  return sheet.reshape(v * (h + gap), n * (w + gap), 4)[:-gap, :-gap]


def shrink(picture_HWC: np.ndarray) -> np.ndarray:
  """A picture of more than MAX_SIDE pixels, made smaller."""
  small = Image.fromarray(picture_HWC)
  small.thumbnail((MAX_SIDE, MAX_SIDE))
  return np.asarray(small)


def image(pixels: np.ndarray, alt: str, kind: str) -> str:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG", optimize=True)
  data = base64.b64encode(file.getvalue()).decode()
  size = f'width="{pixels.shape[1]}" height="{pixels.shape[0]}"'
  return f'<img class="{kind}" {size} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def project(features_ND: np.ndarray) -> tuple[np.ndarray, float] | None:
  """The two principal directions of the unit-length features; None where all are the same.

  Principal components, and not t-SNE: that took half a minute of these pages' few, and its
  distances mean little.

  Returns:
    float64 [N, 2], and the share of the variance that the two hold.
  """
  norm_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
  unit_ND = features_ND.astype(np.float64) / np.maximum(norm_N1, 1e-12)
  unit_ND -= unit_ND.mean(axis=0, keepdims=True)
  u_NK, s_K, _ = np.linalg.svd(unit_ND, full_matrices=False)
  if len(s_K) < 2 or s_K[1] < 1e-5 * np.sqrt(len(unit_ND)):
    return None
  return u_NK[:, :2] * s_K[:2].reshape(1, 2), float(np.sum(s_K[:2] ** 2) / np.sum(s_K**2))


def spectrum(features_ND: np.ndarray) -> np.ndarray:
  """float64 [D], descending: each principal direction's share of the variance; zeros if none."""
  centred = features_ND.astype(np.float64)
  centred -= centred.mean(axis=0, keepdims=True)
  eigenvalue_D = np.zeros(centred.shape[1])
  table = centred.T @ centred if centred.shape[1] <= len(centred) else centred @ centred.T
  found = np.maximum(np.linalg.eigvalsh(table)[::-1], 0)
  eigenvalue_D[: len(found)] = found
  total = np.sum(eigenvalue_D)
  return eigenvalue_D / total if total > 1e-12 * features_ND.size else np.zeros_like(eigenvalue_D)


def stylesheet() -> str:
  light = "".join(f"--s{i}:{c};" for i, c in enumerate(SERIES))
  dark = "".join(f"--s{i}:{c};" for i, c in enumerate(SERIES_ON_DARK))
  return CSS.replace("LIGHT_SERIES", light).replace("DARK_SERIES", dark)


CSS = """
:root { color-scheme: light dark; --page:#f4f5f7; --panel:#ffffff; --ink:#1b1f24; --soft:#5b6570;
  --line:#9aa3ad; --good:#00805d; --bad:#c1440e; LIGHT_SERIES }
@media (prefers-color-scheme: dark) { :root { --page:#14171a; --panel:#1d2125; --ink:#e6e9ec;
  --soft:#9da7b1; --line:#78828c; --good:#2fc498; --bad:#f0834a; DARK_SERIES } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
header p { margin: 6px 0 20px; color: var(--soft); }
section { background: var(--panel); border-radius: 10px; padding: 16px 20px; margin: 0 0 16px; }
h2 { font-size: 17px; margin: 0 0 10px; } figure { margin: 0; } svg { display: block; width: 100%; }
svg text { font-family: inherit !important; }
.note, .none { color: var(--soft); } .note { font-size: 13.5px; margin: 10px 0 0; max-width: 90ch; }
figcaption { font-size: 13.5px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  gap: 18px 22px; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 500; }
.results { width: 100%; table-layout: fixed; font-variant-numeric: tabular-nums; }
.results th:first-child { width: 42%; }
.results th, .results td { padding: 7px 10px 7px 0; vertical-align: top; }
.results tr + tr { border-top: 1px solid color-mix(in srgb, var(--line) 35%, transparent); }
.results .ours { font-size: 19px; font-weight: 650; } .results .ours th { font-weight: 650; }
.bar { display: block; height: 5px; margin-top: 3px; border-radius: 3px; overflow: hidden;
  background: color-mix(in srgb, var(--line) 30%, transparent); }
.bar i { display: block; height: 100%; background: var(--line); }
.ours .bar i { background: var(--s0); }
.verdict { margin: 0 0 14px; padding: 8px 12px; border-left: 4px solid var(--line);
  background: color-mix(in srgb, var(--line) 12%, transparent); }
.verdict b { margin-right: 6px; text-transform: uppercase; letter-spacing: .04em; font-size: 13px; }
.verdict.healthy { border-color: var(--good); } .verdict.healthy b { color: var(--good); }
.verdict.collapsed, .verdict.not-finite { border-color: var(--bad); }
.verdict.collapsed b, .verdict.not-finite b { color: var(--bad); }
img { image-rendering: pixelated; } .sheet { width: 100%; max-width: 860px; height: auto;
  display: block; margin: 6px 0 14px; }
.neighbours { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 14px 28px; }
.row { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 6px; }
.row figure { min-width: 0; } .row figcaption { font-weight: 400; font-size: 12px; line-height: 1.3;
  overflow-wrap: anywhere; } .row small { display: block; color: var(--soft); }
.thumb { width: 100%; height: auto; display: block; border: 3px solid transparent;
  border-radius: 4px; }
.query .thumb { border-color: var(--line); } .same .thumb { border-color: var(--good); }
.other .thumb { border-color: var(--bad); }
.row > figure:first-child figcaption { font-weight: 650; }
.map { max-width: 820px; margin: 0 auto; }
pre { margin: 0; padding: 10px 12px; overflow-x: auto; border-radius: 6px; font-size: 12.5px;
  background: color-mix(in srgb, var(--line) 14%, transparent); }
.facts { margin: 12px 0; font-size: 13.5px; }
.facts th { padding: 3px 16px 3px 0; color: var(--soft);
  white-space: nowrap; vertical-align: top; } .facts td { overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 13.5px; margin-bottom: 8px; }
@media (max-width: 560px) { section { padding: 14px 12px; } .facts th, .facts td { display: block;
  padding: 0; } .facts td { margin-bottom: 8px; } .results .ours { font-size: 16px; } }
"""
