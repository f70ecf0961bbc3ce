"""Finished runs as a page for the browser: one file that needs no other and no network. See
page.md.

page.html is its frame, with the script that sorts and filters the prompts. Texts of models are
never markup: they are json without any "<", and the script shows them as text. All other text goes
through text().
"""
import base64
import html
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from companions.shared import command
from companions.shared.drawing import drawn
from companions.shared.runs import (
    COLUMNS,
    Run,
    asked,
    cell,
    columns_of,
    figures_of,
    grouped,
    load_runs,
    mean_of,
)
from plumbing.errors import printable, require, say
from plumbing.folder import write_whole
from plumbing.settings import option

FRAME = Path(__file__).parent / "shared" / "page.html"


@dataclass
class PageSettings(command.Settings):
    """Writes report.html: the scores, pictures and held-out prompts of finished runs."""

    runs: list[str] = field(default_factory=list, metadata={"help": "finished runs"})
    out: str = option(".", "the folder that gets the page")

    LEADING, USAGE = "runs", "RUN [RUN ...]"

    def check(self) -> None:
        super().check()
        require(self.runs, "name finished runs: python -m companions.page RUN [RUN ...]")


def run(settings: PageSettings) -> dict:
    """Writes the page; returns every run's summary by group."""
    groups, out = grouped(load_runs([Path(folder) for folder in settings.runs])), Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    page = write_page(groups, drawn(groups), out)
    say(f"a page for the browser: {page}")
    return figures_of(groups)


def write_page(groups: dict[str, list[Run]], pictures: dict[str, bytes], out: Path) -> Path:
    """report.html of grouped runs, with {file name: png}. The page leaves out what a run lacks, and
    says so."""
    runs = list(itertools.chain(*groups.values()))
    notes = [note for run in runs for note in missing_in(run)]
    frame = Template(FRAME.read_text())
    path = out / "report.html"
    write_whole(path, frame.substitute(
        title=text(", ".join(groups)),
        scores=scores_table(groups),
        notes="\n".join(f"<p class='note'>{text(note)}</p>" for note in notes),
        pictures="\n".join(itertools.starmap(embedded, pictures.items())),
        data=as_data([prompts_of(run) for run in runs]),
    ))
    return path


def embedded(name: str, png: bytes) -> str:
    """A picture inside the page."""
    return f"<img alt='{name}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def text(words) -> str:
    """Words for a page, without markup or characters that turn the reading order."""
    return html.escape(printable(str(words)))


def as_data(value) -> str:
    """json for a script element. Only a "<" could end it or begin a comment."""
    return json.dumps(value).replace("<", "\\u003c")


# ---- What a run has, and what it lacks

def missing_in(run: Run) -> list[str]:
    """A sentence for each part of the page that this run has nothing for."""
    notes = []
    if run.config.get("eval_only"):
        notes.append("was evaluated only, so it has neither curves nor responses before training.")
    else:
        if not run.metrics:
            notes.append("has no metrics.jsonl, so there are no curves.")
        if not rows_before(run):
            notes.append("has no eval_before.jsonl with the prompts of eval.jsonl, so there are no "
                         "responses before training.")
    if "intervals" not in run.summary:
        notes.append("has no intervals in its summary.json; an earlier version wrote it.")
    return [f"{run.folder}: {note}" for note in notes]


def rows_before(run: Run) -> dict[tuple, dict]:
    """{prompt: its row of eval_before.jsonl}, if these are the prompts of eval.jsonl."""
    rows = {asked(row): row for row in run.before}
    return rows if rows.keys() == {asked(row) for row in run.prompts} else {}


def prompts_of(run: Run) -> dict:
    """A run's held-out prompts with all responses, as the script shows them."""
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
    """A prompt's means, its number of unsafe responses, and the responses."""
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
    """A line per score that any group has; a column per group, the first one before training."""
    columns = columns_of(groups)
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
    """A single run's interval. Several runs have a standard deviation instead."""
    edges = summaries[0].get("intervals", {}).get(key)
    if len(summaries) > 1 or not edges:
        return ""
    return f"<small>{edges[0]:.3f} to {edges[1]:.3f}</small>"


if __name__ == "__main__":
    sys.exit(command.main(PageSettings, run))
