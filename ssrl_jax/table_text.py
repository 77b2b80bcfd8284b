"""A measured table as Markdown, CSV, LaTeX and a chart. What was not run says so."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ssrl_jax.charts import INK, LINE, SERIES

NOT_RUN = "not run"
Record = dict[str, Any]  # see table_runs.measured


def write_table(stem: Path, record: Record, *, command: str) -> str:
  """Writes STEM.md, .csv, .tex and .png; returns the Markdown."""
  stem.parent.mkdir(parents=True, exist_ok=True)
  record = json.loads(json.dumps(record))  # as STEM.json has it: tuples are lists
  text = markdown(record, command=command)
  suffixed = lambda suffix: stem.with_name(stem.name + suffix)  # noqa: E731
  suffixed(".md").write_text(text)
  suffixed(".tex").write_text(latex(record))
  with suffixed(".csv").open("w", newline="") as file:
    csv.writer(file).writerows(long_rows(record))
  chart(record).savefig(suffixed(".png"), dpi=150)
  return text


def spread(values: list[float], decimals: int) -> str:
  """ "43.7 ± 1.4", mean and sample deviation; "43.7" of one; "not run" of none."""
  if not values:
    return NOT_RUN
  mean = f"{statistics.fmean(values):.{decimals}f}"
  return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def claimed(record: Record, title: str) -> bool:
  return any(title in row["claims"] for row in record["rows"])


def header_and_body(record: Record) -> tuple[list[str], list[list[str]]]:
  """The cells of the table: each measured column, and the claims beside it where there are any."""
  header = ["row", "seeds"]
  for column in record["columns"]:
    header.append(column["title"])
    if claimed(record, column["title"]):
      header.append(f"claim: {column['title']}")
  body = []
  for row in record["rows"]:
    run = max((len(cell) for cell in row["cells"].values()), default=0)
    cells = [row["title"], f"{run} of {len(row['seeds'])}"]
    for column in record["columns"]:
      title = column["title"]
      found = list(row["cells"][title].values())
      fewer = f" ({len(found)})" if 0 < len(found) < run else ""
      cells.append("-" if costs_nothing(row, column) else spread(found, column["decimals"]) + fewer)
      if claimed(record, title):
        cells.append(f"{row['claims'][title]:g}" if title in row["claims"] else "")
    body.append(cells)
  return header, body


def gaps(record: Record) -> tuple[list[str], list[list[str]]]:
  """The lead of the subject over each baseline, seed by seed, and the claimed one."""
  header = ["gap"]
  for column in record["columns"]:
    if compared(column):
      header.append(column["title"])
      if claimed(record, column["title"]):
        header.append(f"claim: {column['title']}")
  rows = {row["title"]: row for row in record["rows"]}
  body = []
  for title in record["baselines"]:
    ours, theirs = rows[record["subject"]], rows[title]
    cells = [f"{record['subject']} - {title}"]
    for column in filter(compared, record["columns"]):
      key = column["title"]
      cells.append(signed(seed_gaps(ours["cells"][key], theirs["cells"][key]), column["decimals"]))
      if claimed(record, key):
        both = key in ours["claims"] and key in theirs["claims"]
        cells.append(f"{ours['claims'][key] - theirs['claims'][key]:+.1f}" if both else "")
    body.append(cells)
  return header, body


def compared(column: Record) -> bool:
  return column["judge"] != "run"


def costs_nothing(row: Record, column: Record) -> bool:
  """Of a control, which trains nothing, there are no figures of its training."""
  return not compared(column) and row["encoder"] != "trained"


def seed_gaps(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> list[float]:
  return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def signed(values: list[float], decimals: int) -> str:
  text = spread(values, decimals)
  return text if text == NOT_RUN or text.startswith("-") else f"+{text}"


def markdown(record: Record, *, command: str) -> str:
  lines = [f"# {record['title']}", "", record["text"], "", *grid(*header_and_body(record)), ""]
  if record["subject"]:
    lines += [f"Lead of {record['subject']}, seed by seed:", "", *grid(*gaps(record)), ""]
  if any(row["claims"] for row in record["rows"]):
    lines += [f"Claims are those of {record['source']}; they are not ours.", ""]
  lines += [
    "Mean ± sample standard deviation over seeds; (n): over n of them. Command:",
    "",
    f"    {command}",
    "",
  ]
  if record.get("machines"):
    lines += [f"On {'; '.join(record['machines'])}. Cost: {record['cost']}.", ""]
  trainings = {
    f"`{row['recipe']}`" + "".join(f" `{k}={v}`" for k, v in row["overrides"].items()): None
    for row in record["rows"]
  }
  lines += ["Trained:", "", *(f"- {t}" for t in trainings)]
  judged = {
    f"{key}: {judge['evals']}" + "".join(f" `{k}={v}`" for k, v in judge["options"].items()): None
    for key, judge in record["judges"].items()
  }
  lines += ["", "Judged:", "", *(f"- {j}" for j in judged)]
  return "\n".join(lines) + "\n"


def grid(header: list[str], body: list[list[str]]) -> list[str]:
  return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]


def long_rows(record: Record) -> list[list[Any]]:
  """One line for each row, column and seed: what a spreadsheet or a script wants."""
  lines: list[list[Any]] = [["row", "column", "seed", "value", "claim"]]
  for row in record["rows"]:
    for column in record["columns"]:
      if costs_nothing(row, column):
        continue
      title, cells = column["title"], row["cells"][column["title"]]
      claim = row["claims"].get(title, "")
      for seed in row["seeds"]:
        lines.append([row["title"], title, seed, cells.get(str(seed), NOT_RUN), claim])
  return lines


def latex(record: Record) -> str:
  """A tabular with booktabs' rules."""
  header, body = header_and_body(record)
  rows = [" & ".join(escape(cell) for cell in cells) + r" \\" for cells in (header, *body)]
  return "\n".join(
    [
      r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}",
      r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", "",
    ]
  )  # fmt: skip


def escape(text: str) -> str:
  for character in "&%_#$":
    text = text.replace(character, "\\" + character)
  return text.replace("±", r"$\pm$")


def chart(record: Record) -> Figure:
  """A panel for each column: mean, deviation and each seed; the claim as an open diamond."""
  columns = [c for c in record["columns"] if compared(c)] or record["columns"]
  rows = record["rows"]
  across = min(len(columns), 4)
  down = -(-len(columns) // across)
  size = (2.2 + 2.4 * across, down * (1.3 + 0.3 * len(rows)))
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
  for panel in axes[len(columns) :]:
    panel.remove()
  places = range(len(rows), 0, -1)
  for panel, column in zip(axes, columns, strict=False):
    for place, row in zip(places, rows):
      found = list(row["cells"][column["title"]].values())
      if found:
        deviation = statistics.stdev(found) if len(found) > 1 else 0
        subject = row["title"] == record["subject"]
        panel.errorbar(
          statistics.fmean(found), place, xerr=deviation, fmt="o", capsize=3, markersize=6,
          color=SERIES[1] if subject else SERIES[0],
        )  # fmt: skip
        if len(found) > 1:
          panel.plot(found, [place] * len(found), "|", color=LINE, markersize=9, zorder=0)
      else:
        at = {"transform": panel.get_yaxis_transform(), "va": "center", "fontsize": 8}
        panel.text(0.03, place, NOT_RUN, color=INK, **at)
      if column["title"] in row["claims"]:
        claim = row["claims"][column["title"]]
        panel.plot(claim, place, "D", markerfacecolor="none", color=INK, markersize=6)
    panel.set_title(column["title"], fontsize=10)
    panel.grid(axis="x", color=LINE, linewidth=0.4)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_ylim(0.4, len(rows) + 0.6)
    panel.set_yticks(list(places), [row["title"] for row in rows])
  title = record["title"]
  if any(row["claims"] for row in rows):
    title += "  (open diamonds: claims)"
  figure.suptitle(title, fontsize=11)
  return figure
