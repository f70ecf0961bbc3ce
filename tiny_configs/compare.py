"""Looks at what runs have written: the tables that repo.py prints, and a comparison of finished runs.

    python -m tiny_configs.compare runs/*        # one line per finished run, from its summary.json
"""
import json
import shutil
import sys
from pathlib import Path

COLUMNS = ("cost", "safety_rate", "prompts_fully_safe", "safety_rate_on_harmful_prompts", "judge_safety_rate", "over_refusal_rate",
           "reward_on_harmless_prompts", "kl", "lambda")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def samples_table(samples: list[dict]) -> str:
    """The costliest responses of a batch and its cheapest, a line each, cut to the terminal's width."""
    samples = sorted(samples, key=lambda sample: -sample["cost"])
    width = max(shutil.get_terminal_size((140, 24)).columns - 20, 60)
    lines = [f"\nstep {samples[0]['step']}", "  reward    cost  prompt -> response, costliest first"]
    for sample in samples[:3] + samples[3:][-1:]:
        text = " ".join(f"{sample['prompt']} -> {sample['response']}".split())
        lines.append(f"{sample['reward']:8.2f}{sample['cost']:8.2f}  {text if len(text) <= width else text[:width - 1] + '…'}")
    return "\n".join(lines)


def scores_table(**columns: dict) -> str:
    """Scores as summary.json holds them, a line each, a column per keyword."""
    lines = [f"\n{'on held-out prompts':32}" + "".join(f"{title:>10}" for title in columns)]
    lines += [f"{name:32}" + "".join(f"{number(scores[name]):>10}" for scores in columns.values()) for name in next(iter(columns.values()))]
    return "\n".join(lines)


def runs_table(folders: list[Path]) -> str:
    """A line per run, as a Markdown table; folders without a summary.json are left out."""
    lines = ["| run | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for folder in folders:
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text())
            lines.append(f"| {folder.name} | " + " | ".join(number(summary[name]) for name in COLUMNS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(runs_table([Path(name) for name in sys.argv[1:]]))
