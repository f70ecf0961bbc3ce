"""Finished runs as a page, report.html: one file that needs no other and no network.

    python -m companions.page RUN [RUN ...] [--out DIR]

It holds the scores with their intervals, the training curves, the held-out costs sorted, and every
held-out prompt with its responses before and after. page.html is its frame, with the script that
sorts and filters the prompts.

What models have written is never markup: it lies in the page as json without any "<", and the
script shows it as text. All other text goes through text().
"""
import html
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from string import Template

from companions.shared import learning
from companions.shared.runs import (
    COLUMNS,
    CURVES,
    Run,
    asked,
    cell,
    curve,
    figures_of,
    grouped,
    load_runs,
    mean_of,
)
from plumbing.errors import printable, require, say
from plumbing.folder import write_whole
from plumbing.settings import option

FRAME = Path(__file__).parent / "shared" / "page.html"
STYLES = 6  # kinds of lines that page.html has
LIMIT_GAP = 7  # per cent of a chart's height that a label needs for itself


@dataclass
class PageSettings:
    """Finished runs as a page for the browser, report.html."""

    runs: list[str] = field(default_factory=list, metadata={
        "help": "finished runs; the words before the first flag"})
    out: str = option(".", "the folder for report.html")
    json: str | None = option(None, "also write the runs' figures to this file")

    def check(self) -> None:
        require(self.runs, "usage: python -m companions.page RUN [RUN ...] [--out DIR]")


def run(settings: PageSettings) -> dict:
    groups = grouped(load_runs([Path(folder) for folder in settings.runs]))
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    say(f"a page for the browser: {write_page(groups, out)}")
    return figures_of(groups)


def main(argv: list[str] | None = None) -> int:
    return learning.main_of(PageSettings, run, argv=argv, first="runs")


def write_page(groups: dict[str, list[Run]], out: Path) -> Path:
    """report.html of grouped runs. What a run lacks is left out, and a sentence says so."""
    runs = list(itertools.chain(*groups.values()))
    notes = [note for run in runs for note in missing_in(run)]
    frame = Template(FRAME.read_text())
    path = out / "report.html"
    write_whole(path, frame.substitute(
        title=text(", ".join(groups)),
        scores=scores_table(groups),
        notes="\n".join(f"<p class='note'>{text(note)}</p>" for note in notes),
        curves=curve_charts(groups),
        costs=cost_chart(groups),
        data=as_data([prompts_of(run) for run in runs]),
    ))
    return path


def text(words) -> str:
    """Words as they stand in a page: no markup, and nothing that turns the reading order."""
    return html.escape(printable(str(words)))


def as_data(value) -> str:
    """json for a script element, which only a "<" could end or make a comment of."""
    return json.dumps(value).replace("<", "\\u003c")


# ---- What a run has, and what it lacks

def missing_in(run: Run) -> list[str]:
    """A sentence for each part of the page that this run has nothing for."""
    notes = []
    if run.config.get("eval_only"):
        notes.append(f"{run.folder}: nothing was trained, so there are neither curves nor "
                     "responses before training.")
    else:
        if not run.metrics:
            notes.append(f"{run.folder}: has no metrics.jsonl, so no curves.")
        if not run.before:
            notes.append(f"{run.folder}: has no eval_before.jsonl, so its prompts are shown after "
                         "training alone.")
    if run.before and not rows_before(run):
        notes.append(f"{run.folder}: eval_before.jsonl ({len(run.before)} prompts) and eval.jsonl "
                     f"({len(run.prompts)}) do not hold the same prompts, so they are shown after "
                     "training alone.")
    if "intervals" not in run.summary:
        notes.append(f"{run.folder}: has no intervals in its summary.json, being from an earlier "
                     "version.")
    return notes


def rows_before(run: Run) -> dict[tuple, dict]:
    """{prompt: its row of eval_before.jsonl}; none if those are not the prompts of eval.jsonl."""
    rows = {asked(row): row for row in run.before}
    return rows if rows.keys() == {asked(row) for row in run.prompts} else {}


def prompts_of(run: Run) -> dict:
    """What the script shows of a run: its held-out prompts, with all responses."""
    before = rows_before(run)
    rows = []
    for row in run.prompts:
        shown = {"prompt": " ".join(asked(row)), "category": row.get("category", ""),
                 "after": evaluated(row)}
        if before:
            shown["before"] = evaluated(before[asked(row)])
        rows.append(shown)
    return {"name": f"{run.name}, {run.folder}", "rows": rows}


def evaluated(row: dict) -> dict:
    """A row of an evaluation: its means, how many responses are unsafe, and the responses."""
    responses = row["responses"]
    return {
        **{name: mean_of(row, name) for name in ("rectified_cost", "cost", "reward")},
        "unsafe": sum(not response["safe"] for response in responses),
        "responses": [shown_response(response) for response in responses],
    }


def shown_response(response: dict) -> dict:
    names = "response", "rectified_cost", "cost", "reward", "kl", "safe"
    verdict = response["verdict"] or {}
    return {name: response[name] for name in names} | {"refused": verdict.get("refused", False)}


# ---- Scores

def scores_table(groups: dict[str, list[Run]]) -> str:
    """A line per score that anything has; a column per group, the first one before training."""
    first = next(iter(groups.values()))
    columns = {"before": [run.summary["before"] for run in first if run.summary["before"]]}
    columns |= {name: [run.summary for run in runs] for name, runs in groups.items()}
    columns = {name: summaries for name, summaries in columns.items() if summaries}

    titles = "".join(f"<th scope='col'>{text(name)}{seeds(summaries)}</th>"
                     for name, summaries in columns.items())
    lines = [f"<tr><td></td>{titles}</tr>"]
    for key, title in COLUMNS.items():
        cells = [cell(summaries, key) for summaries in columns.values()]
        if set(cells) == {"-"}:
            continue
        shown = "".join(f"<td>{text(value)}{interval(summaries, key)}</td>"
                        for value, summaries in zip(cells, columns.values()))
        lines.append(f"<tr><th scope='row'>{text(title)}</th>{shown}</tr>")
    return "\n".join(lines)


def seeds(summaries: list[dict]) -> str:
    return f"<small>{len(summaries)} seeds</small>" if len(summaries) > 1 else ""


def interval(summaries: list[dict], key: str) -> str:
    """Of a single run; several have their standard deviation instead."""
    edges = summaries[0].get("intervals", {}).get(key)
    if len(summaries) > 1 or not edges:
        return ""
    return f"<small>{edges[0]:.3f} to {edges[1]:.3f}</small>"


# ---- Charts: lines are drawn in a square of 100 by 100 that is stretched; words stand around it

def curve_charts(groups: dict[str, list[Run]]) -> str:
    """A chart per metric of training: the mean over a group's seeds. Nothing without metrics."""
    trained = {name: [run for run in runs if run.metrics] for name, runs in groups.items()}
    if not any(trained.values()):
        return ""
    charts = []
    for metric, title in CURVES.items():
        lines = []
        for runs in trained.values():
            by_step = zip(*(curve(run, metric) for run in runs))  # as many as the shortest has
            lines.append([(step, fmean(values)) for step, values in enumerate(by_step, 1)])
        charts.append(chart(title, lines, "step"))
    names = [(text(name), style_of(i)) for i, name in enumerate(groups)]
    return f"<h2>Training</h2><div class='charts'>{''.join(charts)}</div>{legend(names)}"


def cost_chart(groups: dict[str, list[Run]]) -> str:
    """Every held-out prompt's mean cost, sorted, of each group's first run, and of the first one
    before training."""
    first_runs = [runs[0] for runs in groups.values()]
    threshold = first_runs[0].config["threshold"]
    lines, names = [], []
    for i, (group, run) in enumerate(zip(groups, first_runs)):
        lines.append(sorted_costs(run.prompts))
        names.append((f"{text(group)} (seed {run.config['seed']}): {in_words(lines[i], threshold)}",
                      style_of(i)))
    if rows_before(first_runs[0]):
        lines.append(sorted_costs(first_runs[0].before))
        names.append((f"before: {in_words(lines[-1], threshold)}", "before"))
    drawn = chart("cost, mean of a prompt's responses", lines, "per cent of the held-out prompts",
                  limit=threshold, styles=[style for _, style in names])
    return drawn + legend(names)


def sorted_costs(rows: list[dict]) -> list[tuple[float, float]]:
    costs = sorted(mean_of(row, "cost") for row in rows)
    return [(100 * (i + 0.5) / len(costs), cost) for i, cost in enumerate(costs)]


def in_words(line: list[tuple[float, float]], threshold: float) -> str:
    costs = [cost for _, cost in line]
    above = sum(cost > threshold for cost in costs)
    return f"mean cost {fmean(costs):.2f}, {above} of {len(costs)} prompts above the limit"


def style_of(number: int) -> str:
    return f"line{number % STYLES}"


def legend(names: list[tuple[str, str]]) -> str:
    keys = "".join(f"<li><svg class='key' viewBox='0 0 40 10' aria-hidden='true'>"
                   f"<path class='{style}' d='M0 5H40'/></svg>{name}</li>" for name, style in names)
    return f"<ul class='legend'>{keys}</ul>"


def chart(title: str, lines: list[list[tuple[float, float]]], x_title: str,
          limit: float | None = None, styles: list[str] | None = None) -> str:
    """Lines of (x, y), those that are not finite left out; above the limit it is shaded."""
    lines = [[point for point in line if math.isfinite(point[1])] for line in lines]
    points = list(itertools.chain(*lines))
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    values = [y for _, y in points] + ([] if limit is None else [limit])
    low, high = min(values), max(values)

    def across(x: float) -> float:
        return 100 * (x - left) / ((right - left) or 1)

    def down(y: float) -> float:
        return 97 - 94 * (y - low) / ((high - low) or 1)  # a little air above and below

    shade, labels = "", {down(low): low, down(high): high}
    if limit is not None:
        labels = {y: value for y, value in labels.items() if abs(y - down(limit)) > LIMIT_GAP}
        labels[down(limit)] = limit
        shade = (f"<rect class='above' width='100' height='{down(limit):.2f}'/>"
                 f"<path class='limit' d='M0 {down(limit):.2f}H100'/>")
    paths = ""
    for i, line in enumerate(lines):
        places = " ".join(f"{across(x):.2f},{down(y):.2f}" for x, y in line)
        style = styles[i] if styles else style_of(i)
        paths += f"<polyline class='{style}' points='{places}'/>"
    marks = "".join(f"<span style='top:{y:.1f}%'>{value:.3g}</span>" for y, value in labels.items())
    return f"""<figure><figcaption>{text(title)}</figcaption>
<div class='chart'><div class='marks'>{marks}</div>
<svg viewBox='0 0 100 100' preserveAspectRatio='none' role='img' aria-label='{text(title)}'>{shade}
{paths}</svg></div>
<div class='x'><span>{left:.0f}</span><span>{text(x_title)}</span><span>{right:.0f}</span></div>
</figure>"""


if __name__ == "__main__":
    sys.exit(main())
