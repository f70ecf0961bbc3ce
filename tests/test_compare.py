# pytest tests/test_compare.py
"""compare.py: its tables and pictures from the files of runs, quadrants by hand, and a comparison
that it trains itself."""
import itertools
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, exhaustive

import repo
from companions import compare
from companions.shared.learning import is_harmful
from plumbing.errors import UserError
from plumbing.reports import summarize

COMPENSATING = [[-8.0, -8.0], [-8.0, -6.0], [3.0, 3.0], [2.0, -1.0]]
SAFE = [[-2.0, -2.0], [-1.0, -3.0], [-0.5, -0.5], [-0.1, 0.2]]


def as_script(*words) -> subprocess.CompletedProcess:
    """compare.py in a process of its own."""
    command = [sys.executable, "-m", "companions.compare", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(params=["here", exhaustive("script")])
def script(request, capsys):
    """script(*words): compare.py in this process, or in one of its own, which takes seconds to
    begin."""
    if request.param == "script":
        return as_script

    def call(*words):
        code = compare.main([*map(str, words)])
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return call


def evaluation(costs: list, rewards: list) -> list[dict]:
    """The rows of an eval.jsonl: costs and rewards have a row of responses per prompt."""
    rows = []
    for i, (prompt_costs, prompt_rewards) in enumerate(zip(costs, rewards)):
        responses = [{
            "prompt": f"prompt {i}", "response": f"answer {cost}", "reward": reward, "cost": cost,
            "rectified_cost": max(cost, 0.0), "safe": cost <= 0, "kl": 0.5, "verdict": None,
        } for cost, reward in zip(prompt_costs, prompt_rewards)]
        rows.append({"prompt": f"prompt {i}", "responses": responses})
    return rows


def metrics_of(step: int) -> dict:
    return {"step": step + 1, "reward": step / 10, "cost": -step / 10, "rectified_cost": 0.1,
            "unsafe_rate": 0.2, "lambda": 1 + step / 10}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, algo, seed, costs, rewards=None, steps=12, rectify="return", before=True,
              **settings):
    """A finished run's files; costs has a row of responses per prompt."""
    rows = evaluation(costs, rewards or [[1.0] * len(row) for row in costs])
    scores = summarize(rows)
    config = {"algo": algo, "rectify": rectify, "seed": seed, "threshold": 0.0,
              "output_dir": str(folder), **settings}
    summary = {"seed": seed, "lambda": 2.0 + seed, "wall_seconds": 10, **scores,
               "before": scores if before else None}

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    write_jsonl(folder / "metrics.jsonl", [metrics_of(step) for step in range(steps)])
    write_jsonl(folder / "eval.jsonl", rows)
    write_jsonl(folder / "eval_before.jsonl", rows)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "lag-0", "ppo_lag", 0, COMPENSATING),
        write_run(tmp_path / "lag-1", "ppo_lag", 1, COMPENSATING),
        write_run(tmp_path / "repo-0", "repo", 0, SAFE),
        write_run(tmp_path / "mask-0", "repo", 0, SAFE, rectify="mask"),
    ]


def test_a_line_per_method_with_mean_and_spread_over_seeds(runs):
    lines = compare.runs_table(compare.grouped(compare.load_runs(runs))).splitlines()
    names = [line.split(" | ")[0] for line in lines[2:]]
    assert names == ["| before", "| PPO-Lag", "| RePO", "| RePO, mask"]

    values = [cell.strip() for cell in lines[3].strip("|").split("|")]
    cells = dict(zip(("", "seeds", *compare.COLUMNS.values()), values))
    assert cells["seeds"] == "2"
    assert cells["final λ"] == "2.500 ± 0.707"
    assert cells["cost"] == "-2.875 ± 0.000"  # (-8 -8 -8 -6 + 3 + 3 + 2 - 1) / 8
    assert cells["responses safe"] == "0.625 ± 0.000"
    assert cells["prompts fully safe"] == "0.500 ± 0.000"
    assert cells["over-refusal"] == "-"


def test_over_refusal_counts_harmless_requests_alone():
    """Of three harmless prompts one is refused, of one harmful all."""
    rows = evaluation([[-1.0]] * 4, [[1.0]] * 4)
    for row, harmful, refused in zip(rows, [0, 0, 0, 1], [1, 0, 0, 1], strict=True):
        verdict = {"safe": True, "refused": bool(refused), "harmful_prompt": bool(harmful)}
        row["responses"][0]["verdict"] = verdict
    scores = summarize(rows)
    assert scores["over_refusal_rate"] == pytest.approx(1 / 3)
    assert scores["refusal_rate_on_harmful_prompts"] == 1.0


def test_groups_are_named_after_the_settings_that_differ(tmp_path):
    folders = [
        write_run(tmp_path / f"{beta}-{seed}", "repo", seed, SAFE, kl_coeff=beta, steps_setting=5)
        for beta in (0.1, 0.2) for seed in (0, 1)
    ]
    groups = compare.grouped(compare.load_runs(folders))
    sizes = {name: len(group) for name, group in groups.items()}
    assert sizes == {"RePO, kl_coeff 0.1": 2, "RePO, kl_coeff 0.2": 2}


def test_a_repeated_run_and_an_evaluation_are_no_further_seeds(tmp_path):
    folders = [
        write_run(tmp_path / "a", "repo", 0, SAFE),
        write_run(tmp_path / "a.1", "repo", 0, SAFE),
        write_run(tmp_path / "e", "repo", 0, SAFE, eval_only="runs/x", later_setting=1),
        write_run(tmp_path / "lag", "ppo_lag", 0, SAFE, rectify="mask"),
    ]
    groups = compare.grouped(compare.load_runs(folders))
    assert sum(len(group) for group in groups.values()) == len(groups) == 4
    assert any("x, evaluated" in name for name in groups)
    assert sum(str(tmp_path / "a") in name for name in groups) == 2


def test_quadrants_by_hand(tmp_path):
    costs = [[-1.0]] * 7 + [[1.0]] * 3
    rewards = [[2.0]] * 5 + [[0.0]] * 2 + [[2.0]] * 1 + [[0.0]] * 2
    a = write_run(tmp_path / "a", "ppo_lag", 0, [[-1.0]] * 10, [[1.0]] * 10)
    b = write_run(tmp_path / "b", "repo", 0, costs, rewards)
    text = compare.quadrants(*compare.load_runs([a, b]))

    line = r"^  (\w+ reward, \w+) +(\d+) .*\[([\d.]+)%, ([\d.]+)%\]"
    counts, intervals = {}, {}
    for name, count, low, high in re.findall(line, text, re.M):
        counts[name], intervals[name] = int(count), (float(low), float(high))
    assert counts == {"better reward, safe": 5, "better reward, unsafe": 1,
                      "worse reward, safe": 2, "worse reward, unsafe": 2}
    # binomial(10, 0.5): 2.1 % and 97.9 % lie at 2 and 8
    assert intervals["better reward, safe"] == (20.0, 80.0)

    assert compare.worst_prompts(compare.load_runs([b])[0], 3).count("1.00") >= 3
    with_itself = compare.quadrants(*compare.load_runs([a, a]))
    assert re.search(r"equal reward, safe +10 ", with_itself)


def test_two_runs_on_the_command_line(runs, tmp_path, script):
    done = script(*runs[1:3], "--out", tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    for text in ("PPO-Lag", "worst of", "better reward, safe"):
        assert text in done.stdout, done.stderr
    table = json.loads((tmp_path / "seen" / "table.json").read_text())
    assert table.keys() == {"PPO-Lag", "RePO"}
    assert (tmp_path / "seen" / "table.md").exists()

    gone = script(tmp_path)
    assert gone.returncode == 2
    assert "has no config.json, so it is not a finished run" in gone.stderr
    assert "Traceback" not in gone.stderr

    (runs[0] / "config.json").write_text('{"algo": "repo"')
    damaged = script(runs[0])
    assert damaged.returncode == 2
    assert re.fullmatch(r"error: .*lag-0: cannot be read as a run of repo.py \(.*\)\n",
                        damaged.stderr)


def test_pictures_show_what_they_promise(runs, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
    from matplotlib.figure import Figure

    groups = compare.grouped(compare.load_runs(runs))
    pictures = compare.draw_pictures(groups, tmp_path)
    assert [path.name for path in pictures] == ["curves.png", "compensation.png"]
    for picture in pictures:
        image = matplotlib.image.imread(picture)
        assert min(image.shape[:2]) > 400 and image.std() > 0.05

    curves, compensation = Figure(), Figure()
    compare.draw_curves(curves, groups)
    compare.draw_compensation(compensation, groups)

    titles = [axis.get_ylabel() for axis in curves.axes]
    assert titles == ["reward", "cost", "rectified cost {C − d}⁺", "responses safe (share)", "λ"]
    for axis in curves.axes:
        assert axis.get_xlabel() == "step" and len(axis.lines) == 3
    assert len(curves.axes[0].get_legend().get_texts()) == 3

    axis, = compensation.axes
    lines = [line for line in axis.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 3 and list(lines[0].get_ydata()) == [-8.0, -7.0, 0.5, 3.0]
    assert axis.get_ylabel() and axis.get_xlabel()
    label = axis.get_legend().get_texts()[0].get_text()
    assert ("PPO-Lag (seed 0): mean cost -2.9, below the limit; 50% of the prompts above it"
            in label)
    thresholds = [list(line.get_ydata()) for line in axis.lines if len(line.get_xdata()) == 2]
    assert thresholds == [[0.0, 0.0]]
    assert len(axis.patches) == 1  # the shade

    assert len({(line.get_linestyle(), line.get_linewidth()) for line in lines}) == 3


def test_lines_can_be_told_apart_in_grey():
    """Without colour: by their lightness, or by their dashes."""
    to_rgb = pytest.importorskip("matplotlib.colors").to_rgb
    light = [sum(part * weight for part, weight in zip(to_rgb(style["color"]), (0.3, 0.6, 0.1)))
             for style in compare.STYLES]
    for i, j in itertools.combinations(range(len(light)), 2):
        dashes = [compare.STYLES[at]["ls"] for at in (i, j)]
        assert dashes[0] != dashes[1] or abs(light[i] - light[j]) > 0.3
    assert max(light) < 0.8


def test_without_matplotlib_there_is_one_sentence(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare.draw_pictures(compare.grouped(compare.load_runs(runs)), tmp_path) == []
    assert capsys.readouterr().out.splitlines() == [
        "no pictures: matplotlib is not installed (pip install matplotlib)"]


FEW = ["--device", "cpu", "--steps", "2", "--batch_size", "8", "--eval_samples", "2",
       "--max_eval_prompts", "6"]
NAMED_AFTER_FEW = "device-cpu-steps-2-batch_size-8-eval_samples-2-max_eval_prompts-6"


def test_it_trains_the_one_that_is_missing(half_runs, long_runs, capsys):
    """As a script, in the background: see conftest.py."""
    at, there = long_runs("half_runs"), half_runs["ppo_lag"] / "summary.json"
    assert "2 runs in" in (at / "compared.txt").read_text()
    assert "1 runs, 1 were there" in (at / "compared.log").read_text()
    assert "RePO" in (at / "compared.txt").read_text()
    trained = half_runs["repo"] / "summary.json"
    begin = (at / "lag.done").stat().st_mtime_ns
    assert there.stat().st_mtime_ns <= begin < trained.stat().st_mtime_ns

    words = ["--algos", "ppo_lag", "repo", "--seeds", "1", "--device", "cpu", "--steps", "75"]
    assert compare.main([*words, "--out", str(there.parents[1])]) == 0
    assert "all 2 runs were there" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_it_trains_the_one_that_is_missing_of_other_settings(tmp_path, family, script):
    (there, words), = compare.commands_of(["ppo_lag"], [FEW], 1, tmp_path).items()
    assert there == tmp_path / f"ppo_lag-{NAMED_AFTER_FEW}-0"
    assert repo.main(words) == 0
    time = (there / "summary.json").stat().st_mtime_ns

    done = script("--algos", "ppo_lag", "repo", "--seeds", "1", "--out", tmp_path, *FEW)
    assert done.returncode == 0 and "2 runs in" in done.stdout, done.stderr
    assert "1 runs, 1 were there" in done.stderr and "RePO" in done.stdout
    assert (there / "summary.json").stat().st_mtime_ns == time
    assert (tmp_path / f"repo-{NAMED_AFTER_FEW}-0" / "summary.json").exists()

    again = script("--algos", "ppo_lag", "repo", "--seeds", "1", "--out", tmp_path, *FEW)
    assert again.returncode == 0 and "all 2 runs were there" in again.stdout, again.stderr
    others = compare.commands_of(["repo"], [[*FEW, "--threshold", "-3"]], 1, tmp_path)
    assert [*others] == [tmp_path / f"repo-{NAMED_AFTER_FEW}-threshold--3-0"]


@pytest.mark.exhaustive
def test_it_trains_what_is_missing_and_reuses_what_is_there(tmp_path, family):
    few = ["--seeds", "1", "--out", tmp_path, *FEW]
    two = ["--algos", "ppo_lag", "repo", *few]

    first = as_script(*two)
    assert first.returncode == 0 and "2 runs in" in first.stdout, first.stderr
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    second = as_script("--algos", "ppo_lag", "repo", "mask", *few)
    assert second.returncode == 0 and "1 runs, 2 were there" in second.stderr, second.stderr
    assert "RePO, mask" in second.stdout
    assert len(files) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())

    third = as_script(*two, "--threshold", "-3")  # not the folder of --threshold 3
    assert third.returncode == 0, third.stderr
    assert (tmp_path / f"repo-{NAMED_AFTER_FEW}-threshold--3-0").is_dir(), third.stderr


def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path, family, script):
    (tmp_path / "ppo-1").mkdir()
    (tmp_path / "ppo-1" / "thesis.txt").write_text("mine")
    foreign = script("--algos", "ppo", "--seeds", "2", "--out", tmp_path)
    assert foreign.returncode == 2 and "is not a run of this script" in foreign.stderr
    assert (tmp_path / "ppo-1" / "thesis.txt").exists()

    for flag in ("--seed=7", "--algo"):
        taken = script("--out", tmp_path, flag, "ppo")
        assert taken.returncode == 2 and "is set by the comparison itself" in taken.stderr
    wrong = script("--out", tmp_path, "--kl_coef", "1")
    assert wrong.returncode == 2 and "unrecognized arguments: --kl_coef" in wrong.stderr
    twice = script("--out", tmp_path, "--algos", "repo", "repo", "--seeds", "1")
    assert twice.returncode == 2
    assert "repo-0: two of the runs would be written there" in twice.stderr
    for refused in (foreign, taken, wrong, twice):
        assert "Traceback" not in refused.stderr


def test_a_share_of_harmful_requests_is_what_it_says_or_refused(tmp_path, family, capsys):
    words = ["--steps", "5", "--harmful_share", "0.25", "--seed", "1"]
    settings = compare.with_harmful_share(words, tmp_path)
    assert settings[:4] == ["--steps", "5", "--seed", "1"] and settings[4] == "--dataset"

    prompts = (tmp_path / "harmful_0.25.txt").read_text().splitlines()
    harmful = [is_harmful(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts) > 100
    assert sum(harmful) / len(prompts) == pytest.approx(0.25, abs=0.01)

    for wrong in ("--harmful_share", "--harmful_share much", "--harmful_share 1.5",
                  "--harmful_share 0"):
        sentence = f"{wrong}: must be a share between 0 and 1"
        with pytest.raises(UserError, match=sentence):
            compare.with_harmful_share(wrong.split(), tmp_path)
        assert compare.main(["--out", str(tmp_path), *wrong.split()]) == 2
        assert capsys.readouterr().err == f"error: {sentence}\n"
