"""Looks at what runs have written: an evaluation in numbers, the tables that repo.py prints, and comparisons of runs, as tables and pictures.

    python tiny_configs/compare.py                       # PPO, PPO-Lag and both estimators of RePO, three seeds each, in the tiny world
    python tiny_configs/compare.py --algos repo --seeds 2 --kl_coeff 0.1    # other settings go to repo.py as they are
    python tiny_configs/compare.py --study               # RePO's own settings, one changed at a time
    python tiny_configs/compare.py RUN [RUN ...]         # any finished runs, tiny or 7B; of two runs also quadrants and worst prompts
"""
import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

COLUMNS = {"reward": "reward", "cost": "cost", "rectified_cost": "rectified cost", "safety_rate": "responses safe", "prompts_fully_safe": "prompts fully safe",
           "over_refusal_rate": "over-refusal", "reward_on_harmless_prompts": "reward on harmless prompts", "lambda": "final λ", "kl": "KL", "wall_seconds": "seconds"}
ALGOS = {"ppo": ("PPO", ["--algo", "ppo"]), "ppo_lag": ("PPO-Lag", ["--algo", "ppo_lag"]), "repo": ("RePO", ["--algo", "repo"]),
         "mask": ("RePO, mask", ["--algo", "repo", "--rectify", "mask"])}
STUDY = [[], *([f"--{name}", value] for name, values in {
    "lambda_init": "1 10", "lambda_lr": "0 0.5", "lambda_max": "4", "threshold": "-3 3", "kl_coeff": "0.05 0.5", "ptx_coeff": "0.3",
    "harmful_share": "0.1 0.6"}.items() for value in values.split()), ["--batch_size", "16", "--samples_per_prompt", "4"]]
OF_ONE_RUN = {"seed", "output_dir", "resume", "environment", "sample_every", "save_every", "keep_checkpoints", "dry_run", "gpu_memory", "scorer_timeout",
              "max_bad_steps"}  # no part of a method
OWN = ("--seed", "--algo", "--rectify", "--output_dir", "--eval_only", "--dry_run", "--resume", "--config")  # what a comparison sets itself


def summarize(rows: list[dict]) -> dict:
    """The scores of an evaluation, from the rows of eval.jsonl. Those that only a judge can give are None without one.

    safety_rate counts responses with a cost at or below the threshold, prompts_fully_safe the prompts all of whose responses are;
    over_refusal_rate counts refusals among the responses to harmless prompts.
    """
    responses = [response for row in rows for response in row["responses"]]
    judged = [response for response in responses if response["verdict"] is not None]
    harmful = [response for response in judged if response["verdict"]["harmful_prompt"]]
    harmless = [response for response in judged if not response["verdict"]["harmful_prompt"]]

    def mean(values: list) -> float | None:
        return fmean(values) if values else None

    return {
        **{name: mean([response[name] for response in responses]) for name in ("reward", "cost", "rectified_cost", "kl")},
        "safety_rate": mean([response["safe"] for response in responses]),
        "prompts_fully_safe": mean([all(response["safe"] for response in row["responses"]) for row in rows]),
        "safety_rate_on_harmful_prompts": mean([response["safe"] for response in harmful]),
        "judge_safety_rate": mean([response["verdict"]["safe"] for response in judged]),
        "over_refusal_rate": mean([response["verdict"]["refused"] for response in harmless]),
        "reward_on_harmless_prompts": mean([response["reward"] for response in harmless]),
    }


def printable(text: str) -> str:
    """Text for a terminal: what would steer it, escape codes or a reversed reading order, is spelled out. Lines stay lines, and joined emoji whole."""
    return "".join(c if c.isprintable() or c in "\n\u200d" else ascii(c)[1:-1] for c in text)


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


class Run:
    """A finished run's files."""
    def __init__(self, folder: Path):
        self.folder = folder
        self.config, self.summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
        self.metrics, self.prompts, self.before = (read_jsonl(folder / name) for name in ("metrics.jsonl", "eval.jsonl", "eval_before.jsonl"))
        self.settings = {name: value for name, value in self.config.items() if name not in OF_ONE_RUN}
        if self.config["algo"] != "repo":
            self.settings.pop("rectify")
        self.name = ALGOS["mask" if (self.config["algo"], self.config["rectify"]) == ("repo", "mask") else self.config["algo"]][0]
        if self.config.get("eval_only"):  # nothing was trained
            self.name, self.summary = f"{Path(self.config['eval_only']).name}, evaluated", self.summary | {"lambda": None, "wall_seconds": None}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def load_runs(folders: list[Path]) -> list[Run]:
    """Finished runs. Exits with one sentence for a folder that is none."""
    for folder in folders:
        for name in ("config.json", "summary.json", "eval.jsonl"):
            if not (folder / name).is_file():
                sys.exit(f"error: {folder}: has no {name}, so it is not a finished run of repo.py")
    return [Run(folder) for folder in folders]


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under a name that tells the groups apart. The same seed twice is a run repeated, say after a change of code."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    settings, named = [group[0].settings for group in groups.values()], {}
    keys = dict.fromkeys(key for some in settings for key in some if key not in ("algo", "rectify", "eval_only"))
    changed = [key for key in keys if len({json.dumps(some.get(key)) for some in settings}) > 1]
    for group in groups.values():
        values = {key: group[0].settings.get(key) for key in changed}
        name = ", ".join([group[0].name, *(f"{key} {Path(value).name if isinstance(value, str) else value}" for key, value in values.items())])
        name = name if len(name) < 60 else f"{group[0].name}, {group[0].folder.name}"
        is_repeated = len({run.config["seed"] for run in group}) < len(group)
        named |= {f"{name} ({run.folder})": [run] for run in group} if is_repeated or name in named else {name: group}
    return named


def spread(values: list, digits: int = 3) -> str:
    """Mean and standard deviation over runs."""
    if None in values:
        return "-"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def runs_table(groups: dict[str, list[Run]]) -> str:
    """A Markdown table, a line per group: mean ± standard deviation over its seeds; first the first method's policies before training."""
    lines = ["| | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    rows = {"before": [run.summary["before"] for run in next(iter(groups.values())) if run.summary["before"]]} | {name: [run.summary for run in group] for name, group in groups.items()}
    for name, some in rows.items():
        cells = (spread([summary.get(key) for summary in some], 0 if key == "wall_seconds" else 3) for key in COLUMNS)
        lines += [f"| {name} | {len(some)} | " + " | ".join(cells) + " |"] if some else []
    return "\n".join(lines)


def mean_of(row: dict, key: str) -> float:
    """Of a held-out prompt's responses."""
    return fmean(response[key] for response in row["responses"])


def quadrants(a: Run, b: Run, draws: int = 2000) -> str:
    """How the prompts of run b compare with those of run a: more, as much or less reward than a gave, at safe (all responses) or unsafe responses of b's.
    Shares with 95 % bootstrap intervals over prompts."""
    answers = {row["prompt"]: row for row in a.prompts}
    pairs = [(answers[row["prompt"]], row) for row in b.prompts if row["prompt"] in answers]
    if not pairs:
        return f"\n{a.folder} and {b.folder} have no held-out prompt in common"
    rewards = [(mean_of(old, "reward"), mean_of(new, "reward")) for old, new in pairs]
    kinds = [("better" if new > old else "equal" if new == old else "worse", "safe" if all(r["safe"] for r in row["responses"]) else "unsafe")
             for (old, new), (_, row) in zip(rewards, pairs)]
    chance, lines = random.Random(0), [f"\n{b.folder} against {a.folder}, {len(pairs)} prompts (95 % bootstrap intervals)"]
    resampled = [chance.choices(kinds, k=len(kinds)) for _ in range(draws)]
    for reward in ("better", *["equal"] * any(kind[0] == "equal" for kind in kinds), "worse"):
        for safety in ("safe", "unsafe"):
            shares = sorted(some.count((reward, safety)) / len(kinds) for some in resampled)
            count = kinds.count((reward, safety))
            lines.append(f"  {reward + ' reward, ' + safety:24s}{count:5d}  {count / len(kinds):6.1%}  [{shares[draws // 40]:.1%}, {shares[-1 - draws // 40]:.1%}]")
    return "\n".join(lines)


def worst_prompts(run: Run, count: int = 10) -> str:
    """The prompts with the costliest single response, and that response."""
    worst = sorted((max(row["responses"], key=lambda response: response["cost"]) for row in run.prompts), key=lambda response: -response["cost"])
    return "\n".join([f"\nworst of {run.folder}", "    cost  reward  prompt -> response"] +
                     [f"{r['cost']:8.2f}{r['reward']:8.2f}  {' '.join((r['prompt'] + ' -> ' + r['response']).split())}" for r in worst[:count]])


# Grey levels and line styles, so that a picture can be read without colour.
STYLES = [{"color": "0.75", "ls": "-", "lw": 4}, {"color": "0.0", "ls": "-", "lw": 1.5}, {"color": "0.3", "ls": "--", "lw": 2}, {"color": "0.5", "ls": ":", "lw": 2},
          {"color": "0.0", "ls": "-.", "lw": 1.5}, {"color": "0.6", "ls": "--", "lw": 2}]


def draw_pictures(groups: dict[str, list[Run]], out: Path) -> list[Path]:
    """curves.png, compensation.png and before_after.png. Says so in one sentence if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figures = {"curves": draw_curves(groups, pyplot), "compensation": draw_compensation(groups, pyplot), "before_after": draw_before_after(groups, pyplot)}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
        pyplot.close(figure)
    return [out / f"{name}.png" for name in figures]


def draw_curves(groups, pyplot):
    """(a) Training: mean over seeds, each point the mean of the steps around it; the band is from the lowest to the highest seed."""
    panels = {"reward": "reward", "cost": "cost", "rectified_cost": "rectified cost {C − d}⁺", "unsafe_rate": "responses safe (share)", "lambda": "λ"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(17, 3.4), layout="constrained")
    for (key, title), axis in zip(panels.items(), axes):
        for (name, runs), style in zip(groups.items(), STYLES * len(groups)):
            length = min(len(run.metrics) for run in runs)
            curves = [[1 - row.get(key, math.nan) if key == "unsafe_rate" else row.get(key, math.nan) for row in run.metrics[:length]] for run in runs]
            smooth = curves if key == "lambda" else [[fmean(curve[max(0, i - 4):i + 5]) for i in range(length)] for curve in curves]
            axis.plot(range(1, length + 1), [fmean(values) for values in zip(*smooth)], label=name, **style)
            if len(runs) > 1:
                axis.fill_between(range(1, length + 1), [min(v) for v in zip(*smooth)], [max(v) for v in zip(*smooth)], color=style["color"], alpha=0.15, lw=0)
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)
    return figure


def draw_compensation(groups, pyplot):
    """(b) Every held-out prompt's mean cost, sorted, of each group's first run: what a mean over prompts hides."""
    figure, axis = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    first = {name: runs[0] for name, runs in groups.items()}
    threshold = next(iter(first.values())).config["threshold"]
    for (name, run), style in zip(first.items(), STYLES * len(groups)):
        costs = sorted(mean_of(row, "cost") for row in run.prompts)
        shares, mean = [100 * (i + 0.5) / len(costs) for i in range(len(costs))], fmean(costs)
        unsafe = sum(cost > threshold for cost in costs) / len(costs)
        label = f"{name} (seed {run.config['seed']}): mean cost {mean:.1f}, {'below' if mean <= threshold else 'above'} the limit; {unsafe:.0%} of the prompts above it"
        axis.plot(shares, costs, label=label, **style)
    top = max(axis.get_ylim()[1], threshold + 1)
    axis.axhspan(threshold, top, color="0.9", zorder=0)
    axis.axhline(threshold, color="0.2", lw=1)
    axis.text(1, threshold + 0.02 * (top - axis.get_ylim()[0]), f"unsafe: cost above the limit d = {threshold:g}", va="bottom")
    axis.set(xlabel="held-out prompts, sorted by cost (percent)", ylabel="cost (mean of a prompt's responses)", xlim=(0, 100), ylim=(None, top),
             title="Safety compensation: a mean below the limit says nothing about single prompts")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
    return figure


def draw_before_after(groups, pyplot):
    """(c) Reward against cost, a point per held-out prompt, before and after training, of each group's first run."""
    figure, axes = pyplot.subplots(1, len(groups), figsize=(4.2 * len(groups), 4.2), layout="constrained", sharex=True, sharey=True, squeeze=False)
    for (name, runs), axis in zip(groups.items(), axes[0]):
        for rows, label, style in ((runs[0].before, "before", {"marker": "o", "facecolors": "none", "edgecolors": "0.6"}),
                                   (runs[0].prompts, "after", {"marker": "x", "color": "0.0"})):
            if rows:
                axis.scatter([mean_of(row, "cost") for row in rows], [mean_of(row, "reward") for row in rows], s=22, label=label, **style)
        axis.axvline(runs[0].config["threshold"], color="0.2", lw=1)
        axis.set(title=name, xlabel="cost (mean of a prompt's responses)")
    right = max(axes[0][0].get_xlim()[1], runs[0].config["threshold"] + 1)  # of all panels, which share their axes
    for (_, runs), axis in zip(groups.items(), axes[0]):
        axis.axvspan(runs[0].config["threshold"], right, color="0.9", zorder=0)
        axis.set_xlim(right=right)
    axes[0][0].set_ylabel("reward (mean of a prompt's responses)")
    axes[0][0].legend(frameon=False, title="held-out prompts", loc="center")
    return figure


def one_thread() -> None:
    import torch
    torch.set_num_threads(1)


def train_one(words: list[str]) -> int:
    """repo.main in a process of its own, its output in a file beside the run's folder."""
    import repo
    out = Path(words[-1])
    with out.with_name(f"{out.name}.log").open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return repo.main(words)
        except Exception:
            traceback.print_exc(file=file)
            return 1


def is_finished(out: Path, words: list[str]) -> bool:
    """Whether a run with these very settings has finished there."""
    import repo
    if not (out / "summary.json").is_file():
        return False
    wanted, found = vars(repo.resolve_config(words)), json.loads((out / "config.json").read_text())
    return all(found.get(name) == value for name, value in wanted.items() if name not in OF_ONE_RUN and value is not None)


def with_harmful_share(settings: list[str], out: Path) -> list[str]:
    """--harmful_share S as settings that repo.py knows: the tiny world's training requests, with so many of one kind left out that S of them are harmful."""
    if "--harmful_share" not in settings:
        return settings
    import repo
    from tiny_configs import world
    i, requests = settings.index("--harmful_share"), world.split_requests()[0]
    try:
        share = float(settings[i + 1])
    except (IndexError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        sys.exit(f"error: {' '.join(settings[i:i + 2])}: must be a share between 0 and 1")
    harmful, harmless = ([prompt for prompt in requests if (world.REQUESTS[prompt][0] in world.HARMFUL_ACTIONS) == kind] for kind in (True, False))
    total = min(len(harmful) / share, len(harmless) / (1 - share))
    chosen = [kind[int(k * len(kind) / n)] for kind, n in ((harmful, round(total * share)), (harmless, round(total * (1 - share)))) for k in range(n)]
    (out / f"harmful_{share}.txt").write_text("".join(f"{prompt}\n" for prompt in chosen))
    family = world.build(repo.BEAVER_TEMPLATE)
    return [*settings[:i], *settings[i + 2:], "--dataset", str(out / f"harmful_{share}.txt"), "--eval_dataset", family["eval_dataset"], "--judge", family["judge"]]


def train_all(algos: list[str], seeds: int, variants: list[list[str]], out: Path) -> list[Path]:
    """Runs what is not there yet: a process per CPU core, or one after the other on a GPU. Returns the folders, method by method."""
    import torch

    import repo
    out.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for algo, settings, seed in itertools.product(algos, variants, range(seeds)):
        folder = out / f"{algo}{''.join('-' + word.removeprefix('--').replace('/', '_') for word in settings)}-{seed}"
        assert folder not in jobs, folder
        jobs[folder] = [*ALGOS[algo][1], "--seed", str(seed), *with_harmful_share(settings, out), "--output_dir", str(folder)]
    try:
        steps = [repo.resolve_config(words) for words in jobs.values()][0].steps  # refuses what is wrong, and builds the tiny world
        waiting = {folder: words for folder, words in jobs.items() if not is_finished(folder, words)}
    except repo.UserError as error:
        sys.exit(f"error: {error}")
    if not waiting:
        print(f"all {len(jobs)} runs were there, in {out}")
        return list(jobs)
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), None if torch.cuda.is_available() else one_thread)
    try:
        futures = {pool.submit(train_one, words): folder for folder, words in waiting.items()}
        with tqdm(total=len(waiting) * (steps or 1), unit="step", desc=f"{len(waiting)} runs, {len(jobs) - len(waiting)} were there") as bar:
            while not all(future.done() for future in futures) or bar.n < bar.total:
                bar.update(sum(len(read_jsonl(folder / "metrics.jsonl")) for folder in waiting) - bar.n if steps else 0)
                failed = [futures[future] for future in futures if future.done() and (future.exception() or future.result())]
                if failed:
                    sys.exit(f"error: {failed[0]} failed, see {failed[0]}.log:\n" + Path(f"{failed[0]}.log").read_text()[-500:])
                if all(future.done() for future in futures):
                    break
                time.sleep(0.5)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)
    return list(jobs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage="compare.py [RUN ...] [--seeds N] [--algos ...] [--study] [--out DIR] [settings of repo.py]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=list(ALGOS))
    parser.add_argument("--study", action="store_true", help="RePO with the settings of STUDY instead")
    parser.add_argument("--out", type=Path, help="where tables and pictures go; default: runs/compare, or here for RUNs")
    words = sys.argv[1:] if argv is None else argv
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    options, settings = parser.parse_known_args(words[first_flag:])
    runs = [Path(word) for word in words[:first_flag]]
    if runs and (settings or options.study):
        sys.exit("error: settings and --study are for training, and finished runs were given")
    for word in settings:
        if word.partition("=")[0] in OWN or not word.startswith("-") and Path(word, "summary.json").exists():
            sys.exit(f"error: {word}: " + ("is set by the comparison itself; it has --algos and --seeds" if word.startswith("-") else "finished runs come before the flags"))
    if options.seeds < 1:
        sys.exit(f"error: --seeds {options.seeds}: must be 1 or more")
    out = options.out or Path("." if runs else "runs/compare")
    begin = time.perf_counter()
    if options.study:
        folders = train_all(["repo"], options.seeds, [some + settings for some in STUDY], out)
        groups = {" ".join(some) or "default": load_runs(folders[i * options.seeds:(i + 1) * options.seeds]) for i, some in enumerate(STUDY)}
    else:
        folders = runs or train_all(options.algos, options.seeds, [settings], out)
        groups = grouped(load_runs(folders))
    table = runs_table(groups)
    print(printable(f"\n{table}\n"))
    if not runs:
        print(f"{len(folders)} runs in {time.perf_counter() - begin:.0f} s")
    if len(runs) == 2:
        pair = load_runs(runs)
        print(printable("\n".join([quadrants(*pair), *map(worst_prompts, pair)])))
    out.mkdir(parents=True, exist_ok=True)
    name = "study" if options.study else "table"
    (out / f"{name}.md").write_text(table + "\n")
    (out / f"{name}.json").write_text(json.dumps({name: [run.summary | {"folder": str(run.folder)} for run in group] for name, group in groups.items()}, indent=2))
    for picture in [] if options.study else draw_pictures(groups, out):
        print(f"drawn: {picture}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
