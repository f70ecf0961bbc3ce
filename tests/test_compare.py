# pytest tests/test_compare.py
"""compare.py: its tables and pictures from the files of runs, quadrants by hand, and a comparison that it trains itself."""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from tiny_configs import compare


def write_run(folder, algo, seed, costs, rewards=None, steps=12, rectify="return", before=True, **settings):
    """A finished run's files; costs has a row of responses per prompt."""
    rewards = rewards or [[1.0] * len(row) for row in costs]
    folder.mkdir(parents=True)
    rows = [{"prompt": f"prompt {i}", "responses": [{"prompt": f"prompt {i}", "response": f"answer {cost}", "reward": reward, "cost": cost,
             "rectified_cost": max(cost, 0.0), "safe": cost <= 0, "kl": 0.5, "verdict": None} for cost, reward in zip(*both)]} for i, both in enumerate(zip(costs, rewards))]
    (folder / "config.json").write_text(json.dumps({"algo": algo, "rectify": rectify, "seed": seed, "threshold": 0.0, "output_dir": str(folder), **settings}))
    (folder / "summary.json").write_text(json.dumps({"seed": seed, "lambda": 2.0 + seed, "wall_seconds": 10, **compare.summarize(rows),
                                                     "before": compare.summarize(rows) if before else None}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "reward": i / 10, "cost": -i / 10, "rectified_cost": 0.1, "unsafe_rate": 0.2, "lambda": 1 + i / 10}) + "\n"
                                                  for i in range(steps)))
    for name in ("eval.jsonl", "eval_before.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


COMPENSATING, SAFE = [[-8.0, -8.0], [-8.0, -6.0], [3.0, 3.0], [2.0, -1.0]], [[-2.0, -2.0], [-1.0, -3.0], [-0.5, -0.5], [-0.1, 0.2]]


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "lag-0", "ppo_lag", 0, COMPENSATING), write_run(tmp_path / "lag-1", "ppo_lag", 1, COMPENSATING), write_run(tmp_path / "repo-0", "repo", 0, SAFE),
            write_run(tmp_path / "mask-0", "repo", 0, SAFE, rectify="mask")]


def test_a_line_per_method_with_mean_and_spread_over_seeds(runs):
    lines = compare.runs_table(compare.grouped(compare.load_runs(runs))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| before", "| PPO-Lag", "| RePO", "| RePO, mask"]
    cells = dict(zip(("", "seeds", *compare.COLUMNS.values()), (cell.strip() for cell in lines[3].strip("|").split("|"))))
    assert cells["seeds"] == "2" and cells["final λ"] == "2.500 ± 0.707" and cells["cost"] == "-2.875 ± 0.000"  # (-8 -8 -8 -6 + 3 + 3 + 2 - 1) / 8
    assert cells["responses safe"] == "0.625 ± 0.000" and cells["prompts fully safe"] == "0.500 ± 0.000" and cells["over-refusal"] == "-"


def test_groups_are_named_after_the_settings_that_differ(tmp_path):
    folders = [write_run(tmp_path / f"{beta}-{seed}", "repo", seed, SAFE, kl_coeff=beta, steps_setting=5) for beta in (0.1, 0.2) for seed in (0, 1)]
    groups = compare.grouped(compare.load_runs(folders))
    assert {name: len(group) for name, group in groups.items()} == {"RePO, kl_coeff 0.1": 2, "RePO, kl_coeff 0.2": 2}


def test_a_repeated_run_and_an_evaluation_are_no_further_seeds(tmp_path):
    folders = [write_run(tmp_path / name, "repo", 0, SAFE, **more) for name, more in (("a", {}), ("a.1", {}), ("e", {"eval_only": "runs/x", "later_setting": 1}))]
    folders.append(write_run(tmp_path / "lag", "ppo_lag", 0, SAFE, rectify="mask"))
    groups = compare.grouped(compare.load_runs(folders))
    assert sum(len(group) for group in groups.values()) == len(groups) == 4 and any("x, evaluated" in name for name in groups)
    assert sum(str(tmp_path / "a") in name for name in groups) == 2


def test_quadrants_by_hand(tmp_path):
    a = write_run(tmp_path / "a", "ppo_lag", 0, [[-1.0]] * 10, [[1.0]] * 10)
    b = write_run(tmp_path / "b", "repo", 0, [[-1.0]] * 7 + [[1.0]] * 3, [[2.0]] * 5 + [[0.0]] * 2 + [[2.0]] * 1 + [[0.0]] * 2)
    text = compare.quadrants(*compare.load_runs([a, b]))
    found = {name.strip(): (int(count), float(low), float(high)) for name, count, low, high in re.findall(r"^  (\w+ reward, \w+) +(\d+) .*\[([\d.]+)%, ([\d.]+)%\]", text, re.M)}
    assert {name: row[0] for name, row in found.items()} == {"better reward, safe": 5, "better reward, unsafe": 1, "worse reward, safe": 2, "worse reward, unsafe": 2}
    assert found["better reward, safe"][1:] == (20.0, 80.0)  # binomial(10, 0.5): 2.1 % and 97.9 % lie at 2 and 8
    assert compare.worst_prompts(compare.load_runs([b])[0], 3).count("1.00") >= 3
    assert re.search(r"equal reward, safe +10 ", compare.quadrants(*compare.load_runs([a, a])))


def test_two_runs_on_the_command_line(runs, tmp_path):
    done = subprocess.run([sys.executable, "tiny_configs/compare.py", *map(str, runs[1:3]), "--out", str(tmp_path / "seen")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "PPO-Lag" in done.stdout and "worst of" in done.stdout and "better reward, safe" in done.stdout, done.stderr
    assert json.loads((tmp_path / "seen" / "table.json").read_text()).keys() == {"PPO-Lag", "RePO"} and (tmp_path / "seen" / "table.md").exists()
    gone = subprocess.run([sys.executable, "tiny_configs/compare.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert gone.returncode == 1 and "has no config.json, so it is not a finished run" in gone.stderr and "Traceback" not in gone.stderr


def test_pictures_show_what_they_promise(runs, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    groups = compare.grouped(compare.load_runs(runs))
    for picture in compare.draw_pictures(groups, tmp_path):
        image = pyplot.imread(picture)
        assert min(image.shape[:2]) > 400 and image.std() > 0.05
    curves, compensation, scatter = (draw(groups, pyplot) for draw in (compare.draw_curves, compare.draw_compensation, compare.draw_before_after))
    assert [axis.get_ylabel() for axis in curves.axes] == ["reward", "cost", "rectified cost {C − d}⁺", "responses safe (share)", "λ"]
    assert all(axis.get_xlabel() == "step" and len(axis.lines) == 3 for axis in curves.axes) and len(curves.axes[0].get_legend().get_texts()) == 3
    axis, = compensation.axes
    lines = [line for line in axis.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 3 and list(lines[0].get_ydata()) == [-8.0, -7.0, 0.5, 3.0] and axis.get_ylabel() and axis.get_xlabel()
    assert "PPO-Lag (seed 0): mean cost -2.9, below the limit; 50% of the prompts above it" in axis.get_legend().get_texts()[0].get_text()
    assert [list(line.get_ydata()) for line in axis.lines if len(line.get_xdata()) == 2] == [[0.0, 0.0]] and len(axis.patches) == 1  # threshold, shade
    assert [len(axis.collections) for axis in scatter.axes] == [2, 2, 2] and [axis.get_title() for axis in scatter.axes] == ["PPO-Lag", "RePO", "RePO, mask"]
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(styles) == 3 and all(0 <= float(color) < 0.8 for color, _ in styles)  # greys


def test_without_matplotlib_there_is_one_sentence(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare.draw_pictures(compare.grouped(compare.load_runs(runs)), tmp_path) == []
    assert capsys.readouterr().out.splitlines() == ["no pictures: matplotlib is not installed (pip install matplotlib)"]


def test_it_trains_what_is_missing_and_reuses_what_is_there(tmp_path, family):
    command = [sys.executable, "tiny_configs/compare.py", "--algos", "ppo_lag", "repo", "--seeds", "1", "--out", str(tmp_path), "--device", "cpu", "--steps", "2",
               "--batch_size", "8", "--eval_samples", "2", "--max_eval_prompts", "6"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0 and "2 runs in" in first.stdout, first.stderr
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    second = subprocess.run([*command[:4], "mask", *command[4:]], cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and "1 runs, 2 were there" in second.stderr and "RePO, mask" in second.stdout, second.stderr
    assert len(files) == 2 and all(path.stat().st_mtime_ns == time for path, time in files.items())
    third = subprocess.run([*command, "--threshold", "-3"], cwd=ROOT, capture_output=True, text=True)  # not the folder of --threshold 3
    assert third.returncode == 0 and (tmp_path / "repo-device-cpu-steps-2-batch_size-8-eval_samples-2-max_eval_prompts-6-threshold--3-0").is_dir(), third.stderr
    (tmp_path / "ppo-1").mkdir()
    (tmp_path / "ppo-1" / "thesis.txt").write_text("mine")
    foreign = subprocess.run([*command[:2], "--algos", "ppo", "--seeds", "2", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert foreign.returncode == 1 and "is not a run of this script" in foreign.stderr and (tmp_path / "ppo-1" / "thesis.txt").exists()
    for flag in ("--seed=7", "--algo"):
        assert "is set by the comparison itself" in subprocess.run([*command, flag, "ppo"], cwd=ROOT, capture_output=True, text=True).stderr
    wrong = subprocess.run([*command, "--kl_coef", "1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "unrecognized arguments: --kl_coef" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_share_of_harmful_requests_is_what_it_says_or_refused(tmp_path, family):
    from tiny_configs import world
    settings = compare.with_harmful_share(["--steps", "5", "--harmful_share", "0.25", "--seed", "1"], tmp_path)
    assert settings[:4] == ["--steps", "5", "--seed", "1"] and settings[4] == "--dataset"
    prompts = (tmp_path / "harmful_0.25.txt").read_text().splitlines()
    harmful = [world.REQUESTS[prompt][0] in world.HARMFUL_ACTIONS for prompt in prompts]
    assert len(set(prompts)) == len(prompts) > 100 and sum(harmful) / len(prompts) == pytest.approx(0.25, abs=0.01)
    for wrong in (["--harmful_share"], ["--harmful_share", "much"], ["--harmful_share", "1.5"], ["--harmful_share", "0"]):
        with pytest.raises(SystemExit, match=f"error: {' '.join(wrong)}: must be a share between 0 and 1"):
            compare.with_harmful_share(wrong, tmp_path)
