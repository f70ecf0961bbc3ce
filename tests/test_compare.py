# pytest tests/test_compare.py
"""Comparisons: tables and pictures from the files of runs, quadrants by hand, and runs that the
comparison trains itself."""
import json
import re
import sys

import pytest

import repo
from companions import compare
from companions.shared import command, drawing
from companions.shared.runs import grouped, load_runs
from plumbing.errors import UserError
from plumbing.reports import summarize
from tiny_configs import world

COMPENSATING = [[-8.0, -8.0], [-8.0, -6.0], [3.0, 3.0], [2.0, -1.0]]
SAFE = [[-2.0, -2.0], [-1.0, -3.0], [-0.5, -0.5], [-0.1, 0.2]]


def call(*words) -> int:
    return command.main(compare.CompareSettings, compare.run, [*map(str, words)])


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


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    lines = compare.runs_table(grouped(load_runs(runs))).splitlines()
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


def test_groups_are_named_after_the_settings_that_differ(tmp_path):
    folders = [
        write_run(tmp_path / f"{beta}-{seed}", "repo", seed, SAFE, kl_coeff=beta, steps_setting=5)
        for beta in (0.1, 0.2) for seed in (0, 1)
    ]
    groups = grouped(load_runs(folders))
    sizes = {name: len(group) for name, group in groups.items()}
    assert sizes == {"RePO, kl_coeff 0.1": 2, "RePO, kl_coeff 0.2": 2}


def test_a_repeated_run_and_an_evaluation_are_no_further_seeds(tmp_path):
    folders = [
        write_run(tmp_path / "a", "repo", 0, SAFE),
        write_run(tmp_path / "a.1", "repo", 0, SAFE),
        write_run(tmp_path / "e", "repo", 0, SAFE, eval_only="runs/x", later_setting=1),
        write_run(tmp_path / "lag", "ppo_lag", 0, SAFE, rectify="mask"),
    ]
    groups = grouped(load_runs(folders))
    assert sum(len(group) for group in groups.values()) == len(groups) == 4
    assert any("x, evaluated" in name for name in groups)
    assert sum(str(tmp_path / "a") in name for name in groups) == 2


def test_quadrants_by_hand(tmp_path):
    costs = [[-1.0]] * 7 + [[1.0]] * 3
    rewards = [[2.0]] * 5 + [[0.0]] * 2 + [[2.0]] * 1 + [[0.0]] * 2
    a = write_run(tmp_path / "a", "ppo_lag", 0, [[-1.0]] * 10, [[1.0]] * 10)
    b = write_run(tmp_path / "b", "repo", 0, costs, rewards)
    text = compare.quadrants(*load_runs([a, b]))

    line = r"^  (\w+ reward, \w+) +(\d+) .*\[([\d.]+)%, ([\d.]+)%\]"
    counts, intervals = {}, {}
    for name, count, low, high in re.findall(line, text, re.M):
        counts[name], intervals[name] = int(count), (float(low), float(high))
    assert counts == {"better reward, safe": 5, "better reward, unsafe": 1,
                      "worse reward, safe": 2, "worse reward, unsafe": 2}
    assert intervals["better reward, safe"] == (23.7, 76.3)  # Wilson's, of 5 in 10

    assert compare.worst_prompts(load_runs([b])[0], 3).count("1.00") >= 3
    with_itself = compare.quadrants(*load_runs([a, a]))
    assert re.search(r"equal reward, safe +10 ", with_itself)


def test_a_change_is_that_of_each_prompt(tmp_path):
    """Prompts differ by 100 and every one gains 1, or half of them do: by then the standard error
    is 0.5 / sqrt(400)."""
    old = evaluation([[100.0 * i] for i in range(400)], [[0.0]] * 400)
    new = evaluation([[100.0 * i + 1] for i in range(400)], [[2.0 * (i % 2)] for i in range(400)])
    text = compare.changes("a to b", old, new[::-1] + evaluation([[5.0]] * 401, [[5.0]] * 401)[-1:])
    lines = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert lines["cost"] == ["+1.000"]  # no prompt differs from the others: no interval
    mean, low, high = [float(word.strip("[],")) for word in lines["reward"]]
    assert (mean, low, high) == pytest.approx((1, 0.902, 1.098), abs=0.01)


def test_two_runs_on_the_command_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "drawn", lambda groups: {})  # which takes seconds
    out = tmp_path / "seen"
    assert call(*runs[1:3], "--out", out, "--json", tmp_path / "table.json") == 0
    printed = capsys.readouterr().out
    for text in ("PPO-Lag", "worst of", "better reward, safe", "compared with itself",
                 f"browser: {out / 'report.html'}"):
        assert text in printed
    assert json.loads((tmp_path / "table.json").read_text()).keys() == {"PPO-Lag", "RePO"}
    assert (out / "table.md").read_text() in printed and (out / "report.html").exists()


def test_what_is_no_finished_run_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="has no config.json, so it is not a finished run"):
        load_runs([tmp_path])
    (runs[0] / "config.json").write_text('{"algo": "repo"')
    with pytest.raises(UserError, match="lag-0: cannot be read as a run of repo.py"):
        load_runs(runs[:1])


def lightness(color: str) -> float:
    """0 for black to 1 for white, as a printer without colours shows it."""
    red, green, blue = (int(color[i:i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_lines_can_be_told_apart_in_grey():
    shades = [lightness(style["color"]) for style in drawing.STYLES[:4]]
    assert all(before - after > 0.1 for before, after in zip(shades, shades[1:]))
    assert len({str(style["ls"]) for style in drawing.STYLES[:5]}) == 5


def test_pictures_show_what_they_promise(runs):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from matplotlib.figure import Figure

    groups = grouped(load_runs(runs))
    pictures = drawing.drawn(groups)
    assert [*pictures] == ["compensation.png", "curves.png"]
    assert all(png.startswith(b"\x89PNG") and len(png) > 10_000 for png in pictures.values())

    curves, compensation = Figure(), Figure()
    drawing.draw_curves(curves, groups)
    drawing.draw_compensation(compensation, groups)
    titles = [axis.get_ylabel() for axis in curves.axes]
    assert titles == [
        "reward", "cost", "rectified cost {C − d}⁺", "responses safe (share)", "λ"]
    assert all(len(axis.lines) == 3 for axis in curves.axes)
    assert list(curves.axes[4].lines[0].get_ydata())[:2] == [1.0, 1.1]  # λ is not smoothed
    assert curves.axes[1].lines[0].get_ydata()[0] == pytest.approx(-0.2)  # of steps 0 to 4

    axis, = compensation.axes
    lines = [line for line in axis.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 3 and list(lines[0].get_ydata()) == [-8.0, -7.0, 0.5, 3.0]
    label = axis.get_legend().get_texts()[0].get_text()
    assert ("PPO-Lag (seed 0): mean cost -2.9, below the limit; 50% of the prompts above it"
            in label)
    thresholds = [list(line.get_ydata()) for line in axis.lines if len(line.get_xdata()) == 2]
    assert thresholds == [[0.0, 0.0]]


def test_runs_with_other_limits_are_shown_with_them(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from matplotlib.figure import Figure

    tight = write_run(tmp_path / "lag", "ppo_lag", 0, [[-7.0]] * 4)
    change_json(tight / "config.json", threshold=-6.5)
    loaded = load_runs([tight, write_run(tmp_path / "repo", "repo", 0, [[-2.0]] * 4)])
    figure = Figure()
    drawing.draw_compensation(figure, grouped(loaded))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "below the limit -6.5; 0% of the prompts above it" in labels[0]
    assert "below the limit 0; 0% of the prompts above it" in labels[1]
    assert compare.unlike(loaded) == ["threshold"] and compare.unlike(loaded[:1]) == []


def test_without_matplotlib_there_is_one_sentence(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert drawing.drawn(grouped(load_runs(runs))) == {}
    assert capsys.readouterr().out.splitlines() == [
        "no pictures: matplotlib is not installed (pip install matplotlib)"]


FEW = ["--device", "cpu", "--steps", "2", "--batch_size", "8", "--eval_samples", "2",
       "--max_eval_prompts", "6"]
NAMED_AFTER_FEW = "device-cpu-steps-2-batch_size-8-eval_samples-2-max_eval_prompts-6"


def test_it_trains_the_one_that_is_missing(half_runs, long_runs, capsys):
    """In a process in the background: see conftest.py."""
    at, there = long_runs("half_runs"), half_runs["ppo_lag"] / "summary.json"
    assert "2 runs in" in (at / "compared.txt").read_text()
    assert "1 runs, 1 were there" in (at / "compared.log").read_text()
    assert "RePO" in (at / "compared.txt").read_text()
    trained = half_runs["repo"] / "summary.json"
    begin = (at / "lag.done").stat().st_mtime_ns
    assert there.stat().st_mtime_ns <= begin < trained.stat().st_mtime_ns

    words = ["--algos", "ppo_lag", "repo", "--seeds", "1", "--device", "cpu", "--steps", "75"]
    assert call(*words, "--out", there.parents[1]) == 0
    assert "all 2 runs were there" in capsys.readouterr().out
    table = json.loads((there.parents[1] / "table.json").read_text())
    assert table.keys() == {"PPO-Lag", "RePO"}


@pytest.mark.exhaustive
def test_it_trains_what_is_missing_of_other_settings(tmp_path, family, capsys):
    two = ["--algos", "ppo_lag", "repo", "--seeds", 1, "--out", tmp_path, *FEW]
    assert call(*two) == 0
    assert "2 runs in" in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert call("--algos", "mask", *two[1:]) == 0
    printed = capsys.readouterr()
    assert "1 runs, 2 were there" in printed.err and "RePO, mask" in printed.out
    assert len(files) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())


def test_a_change_of_settings_is_another_run(tmp_path, family):
    """Not the folder of --threshold 3. A run of other settings in its folder does not count."""
    changed, = compare.commands_of(["repo"], [[*FEW, "--threshold", "-3"]], 1, tmp_path)
    assert changed == tmp_path / f"repo-{NAMED_AFTER_FEW}-threshold--3-0"
    (folder, words), = compare.commands_of(["repo"], [FEW], 1, tmp_path).items()
    config = repo.resolve_config(words)
    write_run(folder, "repo", 0, SAFE)
    (folder / "config.json").write_text(json.dumps(vars(config)))
    assert compare.is_finished(folder, config)
    (folder / "config.json").write_text(json.dumps(vars(config) | {"kl_coeff": 0.9}))
    assert not compare.is_finished(folder, config)


@pytest.mark.parametrize("words, says", [
    (["--algos", "ppo", "--seeds", "2"], "is not a run of this script"),
    (["--seed=7"], "--seed=7: is set by the comparison itself"),
    (["--algo", "ppo"], "--algo: is set by the comparison itself"),
    (["--kl_coef", "1"], "unrecognized arguments: --kl_coef"),
    (["--algos", "repo", "repo", "--seeds", "1"], "repo-0: two of the runs would be written there"),
    (["--algos", "dpo"], "--algos dpo: must be of ppo, ppo_lag, repo, mask, gate"),
])
def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path, family, capsys, words, says):
    (tmp_path / "ppo-1").mkdir()
    (tmp_path / "ppo-1" / "thesis.txt").write_text("mine")
    assert call(*words, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error
    assert (tmp_path / "ppo-1" / "thesis.txt").exists()


def test_finished_runs_are_not_trained_further(runs, capsys):
    assert call(runs[0], "--kl_coeff", 0.1) == 2
    error = capsys.readouterr().err
    assert "--kl_coeff 0.1: is for training, and finished runs were given" in error


def test_a_share_of_harmful_requests_is_what_it_says_or_refused(tmp_path, family):
    words = compare.with_harmful_share(["--steps", "5", "--harmful_share", "0.25"], tmp_path)
    assert words[:3] == ["--steps", "5", "--dataset"]
    prompts = (tmp_path / "harmful_0.25.txt").read_text().splitlines()
    harmful = [world.REQUESTS[prompt][0] in world.HARMFUL_ACTIONS for prompt in prompts]
    assert len(set(prompts)) == len(prompts) > 100
    assert sum(harmful) / len(prompts) == pytest.approx(0.25, abs=0.01)
    for wrong in ("--harmful_share", "--harmful_share much", "--harmful_share 1.5"):
        with pytest.raises(UserError, match=f"{wrong}: must be a share between 0 and 1"):
            compare.with_harmful_share(wrong.split(), tmp_path)
