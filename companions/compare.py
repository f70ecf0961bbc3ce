"""Compares runs, as tables, pictures and a page, and trains those that are not there yet.

    python -m companions.compare                    # PPO, PPO-Lag, RePO and the paper's split as
                                                    # we read it (mask), three seeds each
    python -m companions.compare --algos repo --seeds 2 --kl_coeff 0.1
                                                    # other settings go to repo.py as they are
    python -m companions.compare --study            # RePO's own settings, one changed at a time,
                                                    # and its neighbours
    python -m companions.compare RUN [RUN ...]      # any finished runs, tiny or 7B; of two runs
                                                    # also quadrants and worst prompts
"""
import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import repo
from companions.page import write_page
from companions.shared.learning import exit_code, is_harmful, words_and_flags, write_json
from companions.shared.runs import (
    ALGOS,
    COLUMNS,
    CURVES,
    OF_ONE_RUN,
    Run,
    asked,
    cell,
    curve,
    figures_of,
    grouped,
    load_runs,
    mean_of,
    read_jsonl,
)
from plumbing.errors import UserError, printable, require
from tiny_configs import world

DEFAULT_ALGOS = ["ppo", "ppo_lag", "repo", "mask"]

STUDY = [  # the settings that --study changes, a variant each
    "", "--lambda_init 1", "--lambda_init 10", "--lambda_lr 0", "--lambda_lr 0.5",
    "--lambda_max 4", "--threshold -3", "--threshold 3", "--kl_coeff 0.05", "--kl_coeff 0.5",
    "--ptx_coeff 0.3", "--harmful_share 0.1", "--harmful_share 0.6",
    "--batch_size 16 --samples_per_prompt 4",
    # Neighbours: a fixed lambda is above, and here one with more weight; then no critics; then
    # rewards replaced; then PPO-Lag's rule for each of the four updates.
    "--lambda_lr 0 --lambda_init 5",
    "--baseline group --batch_size 16 --samples_per_prompt 4",
    "--algo gate",
    "--algo ppo_lag --lambda_lr 0.8",
]

SET_HERE = (  # by the comparison itself, so not by its user
    "--seed", "--algo", "--rectify", "--output_dir", "--eval_only", "--dry_run", "--resume",
    "--config",
)


# ---- Tables

def runs_table(groups: dict[str, list[Run]]) -> str:
    """A Markdown table, a line per group: mean ± standard deviation over its seeds.

    Its first line is the policies of the first group before their training.
    """
    first = next(iter(groups.values()))
    rows = {"before": [run.summary["before"] for run in first if run.summary["before"]]}
    for name, runs in groups.items():
        rows[name] = [run.summary for run in runs]

    lines = [
        "| | seeds | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, summaries in rows.items():
        if summaries:
            cells = [name, str(len(summaries)), *(cell(summaries, key) for key in COLUMNS)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quadrant(old: dict, new: dict) -> tuple[str, str]:
    """A prompt's reward beside what it was before, and whether all its new responses are safe."""
    old_reward, new_reward = mean_of(old, "reward"), mean_of(new, "reward")
    change = "equal"
    if new_reward > old_reward:
        change = "better"
    elif new_reward < old_reward:
        change = "worse"
    is_safe = all(response["safe"] for response in new["responses"])
    return change, "safe" if is_safe else "unsafe"


def quadrants(a: Run, b: Run, draws: int = 2000) -> str:
    """How many prompts have more, as much or less reward in run b than in run a, and are safe or
    unsafe in run b; as shares with 95 % bootstrap intervals over prompts."""
    rows_of_a = {asked(row): row for row in a.prompts}
    found = [quadrant(rows_of_a[asked(row)], row)
             for row in b.prompts if asked(row) in rows_of_a]
    if not found:
        return f"\n{a.folder} and {b.folder} have no held-out prompt in common"

    rng = random.Random(0)
    resampled = [rng.choices(found, k=len(found)) for _ in range(draws)]
    has_equal = any(change == "equal" for change, _ in found)
    changes = ("better", "equal", "worse") if has_equal else ("better", "worse")

    lines = [f"\n{b.folder} against {a.folder}, {len(found)} prompts (95 % bootstrap intervals)"]
    for kind in itertools.product(changes, ("safe", "unsafe")):
        count = found.count(kind)
        shares = sorted(sample.count(kind) / len(found) for sample in resampled)
        low, high = shares[draws // 40], shares[-1 - draws // 40]  # 2.5 % lie beyond either
        title = f"{kind[0]} reward, {kind[1]}"
        lines.append(f"  {title:24s}{count:5d}  {count / len(found):6.1%}  [{low:.1%}, {high:.1%}]")
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


# ---- Pictures

# Colours that differ in lightness, each with its own line, so that a print in grey can be read.
STYLES = [
    {"color": "#8fc1e3", "ls": "-", "lw": 4},
    {"color": "#d17a22", "ls": "--", "lw": 2},
    {"color": "#12355b", "ls": "-", "lw": 2},
    {"color": "#7a1f4f", "ls": ":", "lw": 2.5},
    {"color": "#3f8f5f", "ls": "-.", "lw": 2},
    {"color": "#000000", "ls": (0, (7, 2, 1, 2, 1, 2)), "lw": 1.5},
]


def draw_pictures(groups: dict[str, list[Run]], out: Path) -> list[Path]:
    """curves.png and compensation.png; without matplotlib a sentence instead."""
    try:
        import matplotlib.figure  # optional
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install matplotlib)")
        return []
    pictures = {
        out / "curves.png": draw_curves,
        out / "compensation.png": draw_compensation,
    }
    for path, draw in pictures.items():
        figure = matplotlib.figure.Figure(layout="constrained")
        draw(figure, groups)
        figure.savefig(path, dpi=150)
    return list(pictures)


def draw_curves(figure, groups: dict[str, list[Run]]) -> None:
    """(a) Training: mean over seeds; the band is from the lowest to the highest seed."""
    figure.set_size_inches(17, 3.4)
    axes = figure.subplots(1, len(CURVES))
    for (metric, title), axis in zip(CURVES.items(), axes):
        for (name, runs), style in zip(groups.items(), itertools.cycle(STYLES)):
            by_run = [curve(run, metric) for run in runs]
            by_step = [*zip(*by_run)]  # as many steps as the shortest run has
            steps = range(1, len(by_step) + 1)
            axis.plot(steps, [fmean(values) for values in by_step], label=name, **style)
            if len(runs) > 1:
                lowest, highest = [*map(min, by_step)], [*map(max, by_step)]
                axis.fill_between(steps, lowest, highest, color=style["color"], alpha=0.15, lw=0)
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)


def draw_compensation(figure, groups: dict[str, list[Run]]) -> None:
    """(b) Every held-out prompt's mean cost, sorted, of each group's first run: what a mean over
    prompts hides."""
    figure.set_size_inches(9, 5.2)
    axis = figure.subplots()
    first_runs = [runs[0] for runs in groups.values()]
    threshold = first_runs[0].config["threshold"]

    for name, run, style in zip(groups, first_runs, itertools.cycle(STYLES)):
        costs = sorted(mean_of(row, "cost") for row in run.prompts)
        percents = [100 * (i + 0.5) / len(costs) for i in range(len(costs))]
        mean = fmean(costs)
        side = "below" if mean <= threshold else "above"
        unsafe = sum(cost > threshold for cost in costs) / len(costs)
        label = (f"{name} (seed {run.config['seed']}): mean cost {mean:.1f}, {side} the limit; "
                 f"{unsafe:.0%} of the prompts above it")
        axis.plot(percents, costs, label=label, **style)

    top = max(axis.get_ylim()[1], threshold + 1)
    axis.axhspan(threshold, top, color="0.9", zorder=0)
    axis.axhline(threshold, color="0.2", lw=1)
    bottom = axis.get_ylim()[0]
    axis.text(1, threshold + 0.02 * (top - bottom),
              f"unsafe: cost above the limit d = {threshold:g}", va="bottom")
    axis.set(
        title="Safety compensation: a mean below the limit says nothing about single prompts",
        xlabel="held-out prompts, sorted by cost (percent)", xlim=(0, 100),
        ylabel="cost (mean of a prompt's responses)", ylim=(None, top),
    )
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))


# ---- Training

def train_all(algos: list[str], variants: list[list[str]], seeds: int, out: Path) -> list[Path]:
    """Trains what is not there yet; returns the folders of all: by method, by variant, by seed.

    Raises UserError for settings that cannot work, and for a run that has failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    commands = commands_of(algos, variants, seeds, out)
    # This refuses what is wrong before any training, and builds the tiny world.
    configs = {folder: repo.resolve_config(words) for folder, words in commands.items()}
    waiting = [folder for folder, config in configs.items() if not is_finished(folder, config)]
    if not waiting:
        print(f"all {len(commands)} runs were there, in {out}")
        return list(commands)

    title = f"{len(waiting)} runs, {len(commands) - len(waiting)} were there"
    steps = configs[waiting[0]].steps
    total = steps * len(waiting) if steps else None  # without --steps the prompts decide it
    pool = process_pool()
    try:
        futures = {folder: pool.submit(train_one, folder, commands[folder]) for folder in waiting}
        with tqdm(total=total, unit="step", desc=title) as bar:
            watch(futures, bar)
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


def is_finished(folder: Path, config: repo.Config) -> bool:
    """Whether a run with these very settings has finished there."""
    if not (folder / "summary.json").is_file():
        return False
    found = json.loads((folder / "config.json").read_text())
    wanted = {name: value for name, value in vars(config).items() if name not in OF_ONE_RUN}
    return all(value is None or found.get(name, getattr(repo.Config, name)) == value
               for name, value in wanted.items())


def process_pool() -> ProcessPoolExecutor:
    """A process per CPU core, of one thread each; with a GPU one process after the other."""
    spawn = multiprocessing.get_context("spawn")
    if torch.cuda.is_available():
        return ProcessPoolExecutor(1, spawn)
    return ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,))


def train_one(folder: Path, words: list[str]) -> int:
    """repo.main in a process of its own, its output in a file beside the run's folder."""
    with open(f"{folder}.log", "w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return repo.main(words)
        except Exception:
            traceback.print_exc(file=file)
            return 1


def watch(futures: dict[Path, Future], bar: tqdm) -> None:
    """Shows the steps that were made until all runs are done. Raises UserError if one fails."""
    while True:
        is_done = all(future.done() for future in futures.values())
        bar.update(sum(len(read_jsonl(folder / "metrics.jsonl")) for folder in futures) - bar.n)
        for folder, future in futures.items():
            if future.done() and (future.exception() or future.result()):
                end = Path(f"{folder}.log").read_text()[-500:]
                raise UserError(f"{folder} failed, see {folder}.log:\n{end}", code=1)
        if is_done:
            return
        time.sleep(0.5)


def with_harmful_share(settings: list[str], out: Path) -> list[str]:
    """--harmful_share S as settings that repo.py knows: a file of training requests with it."""
    if "--harmful_share" not in settings:
        return settings
    i = settings.index("--harmful_share")
    share = read_share(settings[i:i + 2])
    file = out / f"harmful_{share}.txt"
    file.write_text("".join(f"{request}\n" for request in requests_with(share)))
    family = world.build()
    others = [*settings[:i], *settings[i + 2:], "--dataset", str(file)]
    return [*others, "--eval_dataset", family["eval_dataset"], "--judge", family["judge"]]


def read_share(words: list[str]) -> float:
    """S of --harmful_share S. Raises UserError if that is none."""
    try:
        share = float(words[1])
    except (IndexError, ValueError):
        share = math.nan
    require(0 < share < 1, f"{' '.join(words)}: must be a share between 0 and 1")
    return share


def requests_with(share: float) -> list[str]:
    """Training requests of the tiny world: as many as there can be with this share harmful."""
    harmful, harmless = [], []
    for request in world.split_requests()[0]:
        (harmful if is_harmful(request) else harmless).append(request)
    total = min(len(harmful) / share, len(harmless) / (1 - share))
    return evenly(harmful, round(total * share)) + evenly(harmless, round(total * (1 - share)))


def evenly(items: list[str], count: int) -> list[str]:
    """So many of the items, at even distances."""
    return [items[int(k * len(items) / count)] for k in range(count)]


# ---- Main

def read_command_line(words: list[str]) -> tuple[list[Path], argparse.Namespace, list[str]]:
    """(finished runs, own options, settings of repo.py). Raises UserError for what cannot work."""
    parser = argparse.ArgumentParser(
        usage="python -m companions.compare [RUN ...] [--seeds N] [--algos ...] [--study] "
              "[--out DIR] [--json FILE] [settings of repo.py]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, exit_on_error=False,
    )
    parser.add_argument("--seeds", type=int, default=3, help="train the seeds 0 to N - 1")
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=DEFAULT_ALGOS)
    parser.add_argument("--study", action="store_true",
                        help="train RePO with one setting changed at a time")
    parser.add_argument("--out", type=Path, help="folder for tables, pictures and page; default: "
                                                 "runs/compare, or the current one for RUNs")
    parser.add_argument("--json", help="also write the table's figures to this file")

    folders, flags = words_and_flags(words)
    runs = [Path(word) for word in folders]
    try:
        options, settings = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help lists the settings") from error
    options.out = options.out or Path("." if runs else "runs/compare")

    require(not runs or not (settings or options.study),
            "settings and --study are for training, and finished runs were given")
    for word in settings:
        require(word.partition("=")[0] not in SET_HERE,
                f"{word}: is set by the comparison itself; it has --algos and --seeds")
        require(word.startswith("-") or not Path(word, "summary.json").exists(),
                f"{word}: finished runs come before the flags")
    require(options.seeds >= 1, f"--seeds {options.seeds}: must be 1 or more")
    return runs, options, settings


def study(seeds: int, settings: list[str], out: Path) -> dict[str, list[Run]]:
    """The runs of STUDY, grouped under the settings that it changes."""
    variants = [[*changed.split(), *settings] for changed in STUDY]
    folders = train_all(["repo"], variants, seeds, out)
    groups = {}
    for i, changed in enumerate(STUDY):
        groups[changed or "default"] = load_runs(folders[i * seeds:(i + 1) * seeds])
    return groups


def compare(words: list[str]) -> None:
    """What the command line asks for."""
    folders, options, settings = read_command_line(words)
    start = time.perf_counter()
    if options.study:
        groups = study(options.seeds, settings, options.out)
    elif folders:
        groups = grouped(load_runs(folders))
    else:
        trained = train_all(options.algos, [settings], options.seeds, options.out)
        groups = grouped(load_runs(trained))
    runs = list(itertools.chain(*groups.values()))

    print(printable(f"\n{runs_table(groups)}\n"))
    if not folders:
        print(f"{len(runs)} runs in {time.perf_counter() - start:.0f} s")
    if len(folders) == 2:
        print(printable("\n".join([quadrants(*runs), *map(worst_prompts, runs)])))

    options.out.mkdir(parents=True, exist_ok=True)
    write_tables(groups, options.out, "study" if options.study else "table")
    write_json(options.json, figures_of(groups))
    if not options.study:
        for picture in draw_pictures(groups, options.out):
            print(f"drawn: {picture}")
        print(printable(f"a page for the browser: {write_page(groups, options.out)}"))


def write_tables(groups: dict[str, list[Run]], out: Path, name: str) -> None:
    """NAME.md, the table as it is printed, and NAME.json, every run's summary by group."""
    (out / f"{name}.md").write_text(runs_table(groups) + "\n")
    write_json(out / f"{name}.json", figures_of(groups))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: compare(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
