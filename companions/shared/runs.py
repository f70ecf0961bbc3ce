"""Finished runs: made, read, named in a comparison, and in numbers."""
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import repo
from plumbing.errors import blame, require, say
from tiny_configs import world

ALGOS = {  # what --algos calls a method -> its title, and its settings
    "ppo": ("PPO", ["--algo", "ppo"]),
    "ppo_lag": ("PPO-Lag", ["--algo", "ppo_lag"]),
    "repo": ("RePO", ["--algo", "repo"]),
    "mask": ("RePO, mask", ["--algo", "repo", "--rectify", "mask"]),
    "gate": ("gate", ["--algo", "gate"]),
}

COLUMNS = {  # what a table shows of summary.json -> the column's title
    "reward": "reward",
    "cost": "cost",
    "rectified_cost": "rectified cost",
    "safety_rate": "responses safe",
    "prompts_fully_safe": "prompts fully safe",
    "unsafe_prompts_at_most": "unsafe prompts at most",
    "cost_at_most": "mean cost at most",
    "refusal_rate_on_harmful_prompts": "harmful refused",
    "over_refusal_rate": "over-refusal",
    "reward_on_harmless_prompts": "reward on harmless prompts",
    "lambda": "final λ",
    "kl": "KL",
    "wall_seconds": "seconds",
}

CURVES = {  # metric -> its panel's title
    "reward": "reward",
    "cost": "cost",
    "rectified_cost": "rectified cost {C − d}⁺",
    "unsafe_rate": "responses safe (share)",
    "lambda": "λ",
}

OF_ONE_RUN = {  # runs that differ in these alone are seeds of one method
    "seed", "output_dir", "resume", "environment", "sample_every", "save_every",
    "keep_checkpoints", "dry_run", "gpu_memory", "max_bad_steps", "date",
}


# ---- The tiny world

def is_harmful(request: str) -> bool:
    """Whether a request of the tiny world asks for something harmful."""
    action, _ = world.REQUESTS[request]
    return action in world.HARMFUL_ACTIONS


def tiny_run(folder: str | None, seed: int) -> str:
    """The folder of a default run of the tiny world, which is trained if there is none."""
    folder = folder or f"runs/companions/tiny-{seed}"
    if not Path(folder, "final").is_dir():
        say(f"training a run of the tiny world in {folder}")
        words = ["--device", "cpu", "--seed", str(seed), "--output_dir", folder]
        require(repo.main(words) == 0, f"{folder}: the run has failed")
    return folder


# ---- Runs and their groups

class Run:
    """A finished run's files, and the name of its method."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.summary = json.loads((folder / "summary.json").read_text())
        self.metrics = read_jsonl(folder / "metrics.jsonl")
        self.prompts = read_jsonl(folder / "eval.jsonl")
        self.before = read_jsonl(folder / "eval_before.jsonl")

        is_mask = self.config["algo"] == "repo" and self.config["rectify"] == "mask"
        self.name, _ = ALGOS["mask" if is_mask else self.config["algo"]]
        evaluated = self.config.get("eval_only")
        if evaluated:  # nothing was trained
            self.name = f"{Path(evaluated).name}, evaluated"
            self.summary |= {"lambda": None, "wall_seconds": None}

    def settings(self) -> dict:
        """The settings of its method, the same for every seed."""
        settings = {key: value for key, value in self.config.items() if key not in OF_ONE_RUN}
        if self.config["algo"] != "repo":
            del settings["rectify"]  # nothing reads it
        return settings


def read_jsonl(path: Path) -> list[dict]:
    """A file's rows; an empty list if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_runs(folders: list[Path]) -> list[Run]:
    """Raises UserError for a folder that holds no finished run."""
    runs = []
    for folder in folders:
        for name in ("config.json", "summary.json", "eval.jsonl"):
            require((folder / name).is_file(),
                    f"{folder}: has no {name}, so it is not a finished run of repo.py")
        with blame(f"{folder}: cannot be read as a run of repo.py"):
            runs.append(Run(folder))
    return runs


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in their seed, under a name that tells the groups apart.

    If a seed is there twice, a run was repeated, perhaps after a change of the code. Then each run
    of the group stands for itself, under a name with its folder.
    """
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings(), sort_keys=True), []).append(run)

    changed = changed_settings([group[0].settings() for group in groups.values()])
    named = {}
    for group in groups.values():
        name = group_name(group[0], changed)
        seeds = {run.config["seed"] for run in group}
        if name in named or len(seeds) < len(group):
            named |= {f"{name} ({run.folder})": [run] for run in group}
        else:
            named[name] = group
    return named


def changed_settings(all_settings: list[dict]) -> list[str]:
    """The names of settings that differ, except those that Run.name tells."""
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    changed = []
    for name in names:
        values = {json.dumps(settings.get(name)) for settings in all_settings}
        if len(values) > 1 and name not in ("algo", "rectify", "eval_only"):
            changed.append(name)
    return changed


def group_name(run: Run, changed: list[str]) -> str:
    """The method and its changed settings, or its folder if those are too many to read."""
    parts = [run.name]
    for key in changed:
        value = run.settings().get(key)
        if isinstance(value, str):  # mostly a path
            value = Path(value).name
        parts.append(f"{key} {value}")
    name = ", ".join(parts)
    return name if len(name) < 60 else f"{run.name}, {run.folder.name}"


# ---- Numbers

def columns_of(groups: dict[str, list[Run]]) -> dict[str, list[dict]]:
    """{name: summaries}, first those of the first group before its training."""
    first = next(iter(groups.values()))
    before = [run.summary["before"] for run in first if run.summary["before"]]
    columns = {"before": before} if before else {}
    return columns | {name: [run.summary for run in runs] for name, runs in groups.items()}


def figures_of(groups: dict[str, list[Run]]) -> dict[str, list[dict]]:
    """Every run's summary, by group."""
    return {name: [run.summary | {"folder": str(run.folder)} for run in runs]
            for name, runs in groups.items()}


def cell(summaries: list[dict], key: str) -> str:
    """Mean and standard deviation over runs."""
    values = [summary.get(key) for summary in summaries]
    if None in values:
        return "-"
    digits = 0 if key == "wall_seconds" else 3
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def asked(row: dict) -> tuple[str, ...]:
    """What tells a held-out prompt from the others: its text, and its picture if it has one."""
    return row["prompt"], *([row["image"]] if "image" in row else [])


def mean_of(row: dict, key: str) -> float:
    """The mean over a held-out prompt's responses, from its row of eval.jsonl."""
    return fmean(response[key] for response in row["responses"])


def sorted_costs(rows: list[dict]) -> list[tuple[float, float]]:
    """(per cent of the prompts, mean cost of a prompt's responses), the lowest cost first."""
    costs = sorted(mean_of(row, "cost") for row in rows)
    return [(100 * (i + 0.5) / len(costs), cost) for i, cost in enumerate(costs)]


def curves(runs: list[Run], metric: str) -> list[tuple]:
    """A metric's values by step, one per run, as long as the shortest run is. Each value is the
    mean of the nine steps around it, except for λ."""
    smooth = []
    for run in runs:
        values = [row.get(metric, math.nan) for row in run.metrics]
        if metric == "unsafe_rate":  # the share of safe responses is shown
            values = [1 - value for value in values]
        if metric != "lambda":
            values = [fmean(values[max(0, i - 4):i + 5]) for i in range(len(values))]
        smooth.append(values)
    return list(zip(*smooth))
