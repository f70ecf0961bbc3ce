"""Compares runs, as a table, a picture, and a page; trains runs that are not there yet. See
compare.md.
"""
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import repo
from companions.page import write_page
from companions.shared import command
from companions.shared.drawing import drawn
from companions.shared.runs import (
    ALGOS,
    COLUMNS,
    OF_ONE_RUN,
    Run,
    asked,
    cell,
    columns_of,
    figures_of,
    grouped,
    load_runs,
    mean_of,
    read_jsonl,
)
from plumbing.errors import UserError, require, say
from plumbing.reports import bootstrapped, summarize, wilson
from plumbing.settings import option
from tiny_configs import world

DEFAULT_ALGOS = ["ppo", "ppo_lag", "repo", "mask"]

STUDY = [  # the settings that --study changes, a variant each
    "", "--lambda_init 1", "--lambda_init 10", "--lambda_lr 0", "--lambda_lr 0.5",
    "--lambda_max 4", "--threshold -3", "--threshold 3", "--kl_coeff 0.05", "--kl_coeff 0.5",
    "--ptx_coeff 0.3", "--harmful_share 0.1", "--harmful_share 0.6",
    "--batch_size 16 --samples_per_prompt 4",
    # Neighbours: a larger fixed lambda, no critics, replaced rewards, and PPO-Lag with an alpha
    # for each of the four updates of a step.
    "--lambda_lr 0 --lambda_init 5",
    "--baseline group --batch_size 16 --samples_per_prompt 4",
    "--algo gate",
    "--algo ppo_lag --lambda_lr 0.8",
]

OF_SCORES = ("threshold", "reward_model", "cost_model", "judge", "temperature", "eval_samples",
             "max_length", "max_response_length")
SET_HERE = (  # by the comparison itself, so not by its user
    "--seed", "--algo", "--rectify", "--output_dir", "--eval_only", "--dry_run", "--resume",
    "--config",
)


@dataclass
class CompareSettings(command.Settings):
    """Compares finished runs. Without RUNs it trains PPO, PPO-Lag, RePO, and the paper's split as
    we read it (mask) in the tiny world, three seeds each. Other settings go to repo.py."""

    runs: list[str] = field(default_factory=list, metadata={"help": "finished runs"})
    seeds: int = option(3, "runs of each method")
    algos: list[str] = option(None, f"methods, of {', '.join(ALGOS)}; default: "
                                    f"{' '.join(DEFAULT_ALGOS)}")
    study: bool = option(False, "RePO with one of its settings changed at a time, and its "
                                "neighbours")
    harmful_share: float | None = option(None, "train on requests of the tiny world of which this "
                                               "share is harmful")
    out: str | None = option(None, "where table, picture and page go; default: runs/compare, or "
                                   "the current folder for RUNs")

    LEADING, USAGE = "runs", "[RUN ...]"
    passed_on = ()

    def check(self) -> None:
        super().check()
        if self.harmful_share is not None:
            self.passed_on = [*self.passed_on, "--harmful_share", str(self.harmful_share)]
        require(not self.runs or not (self.passed_on or self.study),
                f"{' '.join([*self.passed_on, *['--study'] * self.study])}: is for training, and "
                "finished runs were given")
        for algo in self.algos or []:
            require(algo in ALGOS, f"--algos {algo}: must be of {', '.join(ALGOS)}")
        for word in self.passed_on:
            require(word.partition("=")[0] not in SET_HERE,
                    f"{word}: is set by the comparison itself; it has --algos and --seeds")
            require(word.startswith("-") or not Path(word, "summary.json").exists(),
                    f"{word}: finished runs come before the flags")


# ---- Tables

def runs_table(groups: dict[str, list[Run]]) -> str:
    """A Markdown table, a line per group: mean ± standard deviation over its seeds. The first line
    is the first group before its training."""
    lines = [
        "| | seeds | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, summaries in columns_of(groups).items():
        cells = [name, str(len(summaries)), *(cell(summaries, key) for key in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quadrant(old: dict, new: dict) -> tuple[str, str]:
    """How a prompt's reward has changed, and whether all its new responses are safe."""
    old_reward, new_reward = mean_of(old, "reward"), mean_of(new, "reward")
    change = "equal"
    if new_reward > old_reward:
        change = "better"
    elif new_reward < old_reward:
        change = "worse"
    is_safe = all(response["safe"] for response in new["responses"])
    return change, "safe" if is_safe else "unsafe"


def quadrants(a: Run, b: Run) -> str:
    """How many prompts have more or less reward in run b than in run a, and are safe or unsafe in
    run b, with 95 % intervals of the shares."""
    rows_of_a = {asked(row): row for row in a.prompts}
    found = [quadrant(rows_of_a[asked(row)], row)
             for row in b.prompts if asked(row) in rows_of_a]
    if not found:
        return f"\n{a.folder} and {b.folder} have no held-out prompt in common"

    lines = [f"\n{b.folder} against {a.folder}, {len(found)} prompts (95 % intervals)"]
    for kind in itertools.product(("better", "equal", "worse"), ("safe", "unsafe")):
        count, title = found.count(kind), f"{kind[0]} reward, {kind[1]}"
        low, high = wilson(count / len(found), len(found), 0.95)
        if count or kind[0] != "equal":
            lines.append(f"  {title:24s}{count:5d}  {count / len(found):6.1%}  "
                         f"[{low:.1%}, {high:.1%}]")
    return "\n".join(lines)


def changes(title: str, old: list[dict], new: list[dict]) -> str:
    """What each score of the rows `new` is above that of the rows `old`: the mean over the prompts
    that both have, each compared with itself, and its 95 % interval (bootstrap over prompts)."""
    old_rows = {asked(row): row for row in old}
    pairs = [(summarize([old_rows[asked(row)]]), summarize([row]))
             for row in new if asked(row) in old_rows]
    if not pairs:
        return ""
    lines = [f"\n{title}: changes, each prompt compared with itself (95 % intervals)"]
    for key, name in COLUMNS.items():
        differences = [after[key] - before[key] for before, after in pairs
                       if before.get(key) is not None and after[key] is not None]
        if differences:
            edges = bootstrapped(differences, 0.95)
            interval = f"  [{edges[0]:+.3f}, {edges[1]:+.3f}]" if edges else ""
            lines.append(f"  {name:28s}{fmean(differences):+7.3f}{interval}")
    return "\n".join(lines)


def worst_prompts(run: Run, count: int = 10) -> str:
    """The prompts with the costliest single response, and that response."""
    cost = itemgetter("cost")
    worst = sorted((max(row["responses"], key=cost) for row in run.prompts), key=cost, reverse=True)
    lines = [f"\nworst of {run.folder}", "    cost  reward  prompt -> response"]
    for response in worst[:count]:
        text = " ".join(f"{response['prompt']} -> {response['response']}".split())
        lines.append(f"{response['cost']:8.2f}{response['reward']:8.2f}  {text}")
    return "\n".join(lines)


def unlike(runs: list[Run]) -> list[str]:
    """The settings in which runs differ and that their scores depend on, besides the policies."""
    found = [name for name in OF_SCORES
             if len({json.dumps(run.config.get(name)) for run in runs}) > 1]
    if len({frozenset(map(asked, run.prompts)) for run in runs}) > 1:
        found.append("held-out prompts")
    return found


# ---- Training

def train_all(algos: list[str], variants: list[list[str]], seeds: int, out: Path) -> list[Path]:
    """Trains what is not there yet; returns the folders of all: by method, by variant, by seed.

    Raises UserError for settings that cannot work, and for a run that has failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    commands = commands_of(algos, variants, seeds, out)
    # This refuses wrong settings before any training, and builds the tiny world.
    configs = {folder: repo.resolve_config(words) for folder, words in commands.items()}
    waiting = [folder for folder, config in configs.items() if not is_finished(folder, config)]
    if not waiting:
        say(f"all {len(commands)} runs were there, in {out}")
        return list(commands)

    title = f"{len(waiting)} runs, {len(commands) - len(waiting)} were there"
    steps = configs[waiting[0]].steps
    total = steps * len(waiting) if steps else None  # without --steps the prompts decide it
    pool = process_pool()
    try:
        futures = {folder: pool.submit(train_one, folder, commands[folder]) for folder in waiting}
        with tqdm(total=total, unit="step", desc=title) as progress:
            watch(futures, progress)
    finally:
        pool.shutdown(cancel_futures=True)
    return list(commands)


def commands_of(algos: list[str], variants: list[list[str]], seeds: int, out: Path) -> dict:
    """{folder: command line of repo.py} of every run."""
    commands = {}
    for algo, variant, seed in itertools.product(algos, variants, range(seeds)):
        parts = [word.removeprefix("--").replace("/", "_") for word in variant]
        folder = out / "-".join([algo, *parts, str(seed)])
        require(folder not in commands, f"{folder}: two of the runs would be written there")
        _, method = ALGOS[algo]
        words = [*method, "--seed", str(seed), *with_harmful_share(variant, out)]
        commands[folder] = [*words, "--output_dir", str(folder)]
    return commands


def with_harmful_share(words: list[str], out: Path) -> list[str]:
    """--harmful_share S as settings of repo.py: a file of the tiny world's training requests, of
    which this share is harmful. Raises UserError if S is not a share."""
    if "--harmful_share" not in words:
        return words
    i = words.index("--harmful_share")
    try:
        share = float(words[i + 1])
    except (IndexError, ValueError):
        share = 0.0
    require(0 < share < 1, f"{' '.join(words[i:i + 2])}: must be a share between 0 and 1")
    file, family = out / f"harmful_{share}.txt", world.build()
    file.write_text("".join(f"{request}\n" for request in requests_with(share)))
    return [*words[:i], *words[i + 2:], "--dataset", str(file),
            "--eval_dataset", family["eval_dataset"], "--judge", family["judge"]]


def requests_with(share: float) -> list[str]:
    """As many training requests of the tiny world as there can be with this share harmful, taken
    at even distances."""
    kinds = {True: [], False: []}
    for request in world.split_requests()[0]:
        action, _ = world.REQUESTS[request]
        kinds[action in world.HARMFUL_ACTIONS].append(request)
    total = min(len(kinds[True]) / share, len(kinds[False]) / (1 - share))
    chosen = []
    for is_harmful, part in ((True, share), (False, 1 - share)):
        requests, count = kinds[is_harmful], round(total * part)
        chosen += [requests[int(k * len(requests) / count)] for k in range(count)]
    return chosen


def is_finished(folder: Path, config: repo.Config) -> bool:
    """Whether a run with exactly these settings has finished there."""
    if not (folder / "summary.json").is_file():
        return False
    found = json.loads((folder / "config.json").read_text())
    wanted = {name: value for name, value in vars(config).items() if name not in OF_ONE_RUN}
    return all(value is None or found.get(name, getattr(repo.Config, name)) == value
               for name, value in wanted.items())


def process_pool() -> ProcessPoolExecutor:
    """A process per CPU core, of one thread each. With a GPU there is one process."""
    spawn = multiprocessing.get_context("spawn")
    if torch.cuda.is_available():
        return ProcessPoolExecutor(1, spawn)
    return ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,))


def train_one(folder: Path, words: list[str]) -> int:
    """repo.main in a process of its own, with its output in a file beside the run's folder."""
    with open(f"{folder}.log", "w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return repo.main(words)
        except Exception:
            traceback.print_exc(file=file)
            return 1


def watch(futures: dict[Path, Future], progress: tqdm) -> None:
    """Shows the steps made, until all runs are done. Raises UserError if one fails."""
    while True:
        is_done = all(future.done() for future in futures.values())
        made = sum(len(read_jsonl(folder / "metrics.jsonl")) for folder in futures)
        progress.update(made - progress.n)
        for folder, future in futures.items():
            if future.done() and (future.exception() or future.result()):
                end = Path(f"{folder}.log").read_text()[-500:]
                raise UserError(f"{folder} failed, see {folder}.log:\n{end}", code=1)
        if is_done:
            return
        time.sleep(0.5)


# ---- Main

def study(settings: CompareSettings, out: Path) -> dict[str, list[Run]]:
    """The runs of STUDY, grouped under the settings that it changes."""
    variants = [[*changed.split(), *settings.passed_on] for changed in STUDY]
    folders = train_all(["repo"], variants, settings.seeds, out)
    return {changed or "default": load_runs(folders[i * settings.seeds:][:settings.seeds])
            for i, changed in enumerate(STUDY)}


def run(settings: CompareSettings) -> dict:
    """Prints a table, writes it with pictures and a page; returns every run's summary by group."""
    folders, start = [Path(folder) for folder in settings.runs], time.perf_counter()
    out = Path(settings.out or ("." if folders else "runs/compare"))
    if settings.study:
        groups = study(settings, out)
    else:
        groups = grouped(load_runs(folders or train_all(
            settings.algos or DEFAULT_ALGOS, [list(settings.passed_on)], settings.seeds, out)))
    runs = list(itertools.chain(*groups.values()))

    say(f"\n{runs_table(groups)}\n")
    differing = unlike(runs)
    if differing:
        say(f"warning: these runs differ in {', '.join(differing)}, so scores that depend on them "
            "do not compare")
    if not folders:
        say(f"{len(runs)} runs in {time.perf_counter() - start:.0f} s")
    if len(folders) == 2:
        a, b = runs
        say("\n".join([quadrants(a, b), changes(f"{a.folder} to {b.folder}", a.prompts, b.prompts),
                       *map(worst_prompts, runs)]))
    if len(folders) == 1 and runs[0].before:
        say(changes(f"{runs[0].folder}, by training", runs[0].before, runs[0].prompts))

    out.mkdir(parents=True, exist_ok=True)
    name = "study" if settings.study else "table"
    (out / f"{name}.md").write_text(runs_table(groups) + "\n")
    if not settings.study:
        pictures = drawn(groups)
        for picture, png in pictures.items():
            (out / picture).write_bytes(png)
        say(f"a page for the browser: {write_page(groups, pictures, out)}")
    return figures_of(groups)


if __name__ == "__main__":
    sys.exit(command.main(CompareSettings, run))
