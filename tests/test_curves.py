# pytest tests/test_curves.py
"""--log_to: curves by TensorBoard, read back by its own reader, where it is installed; trackio and
wandb by stand-ins that keep what they are called with, as their documentation has the calls."""
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import read_jsonl
from test_run import FEW, summary_of

from plumbing import reports, runs

FLAGS = (*FEW, "--save_every", 2, "--log_to", "wandb")


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for done in (0, 2):  # the second goes on after step 2 of 4
        curves = reports.open_curves(done, tmp_path, SimpleNamespace(log_to="tensorboard"))
        for step in range(done + 1, 5):
            curves.log({"cost": 10 * done + step}, step)
        curves.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("cost")]
    assert shown == [(1, 1), (2, 2), (3, 23), (4, 24)]


def stand_in(name: str, monkeypatch):
    """Takes the library's place."""
    calls = []
    library = SimpleNamespace(
        __spec__=ModuleSpec(name, None), calls=calls,
        init=lambda **options: calls.append(options),
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("finished"))
    monkeypatch.setitem(sys.modules, name, library)
    return library


@pytest.mark.parametrize("name, same", [("trackio", "name"), ("wandb", "id")])
def test_a_resume_names_the_same_run_and_another_folder_another_one(
    tmp_path, monkeypatch, name, same
):
    library = stand_in(name, monkeypatch)
    for out in ("first", "first", "second"):
        (tmp_path / out).mkdir(exist_ok=True)
        reports.open_curves(0, tmp_path / out, SimpleNamespace(log_to=name))
    first, again, second = library.calls
    assert first[same] == again[same] != second[same]
    assert first["resume"] == "allow" and first["project"] == "repo"


def test_a_run_logs_its_metrics_and_summary_and_a_resume_the_rest(run, monkeypatch):
    library, begun = stand_in("wandb", monkeypatch), []
    monkeypatch.setattr(runs, "open_curves", lambda step, *more: (
        begun.append(step), reports.open_curves(step, *more))[1])
    code, out, _ = run(*FLAGS)
    assert code == 0
    options, *logged, (last_step, summary), end = library.calls
    assert json.loads(json.dumps(options["config"]))["steps"] == 4 and end == "finished"
    assert [{"step": step, **row} for step, row in logged] == read_jsonl(out / "metrics.jsonl")
    assert last_step == 4 and summary["summary/cost"] == summary_of(out)["cost"]
    assert "summary/algo" not in summary and "summary/before" not in summary

    for folder in ("checkpoints/step-4", "final"):  # as if killed in the last evaluation
        shutil.rmtree(out / folder)
    for file in ("summary.json", "eval.jsonl"):
        (out / file).unlink()
    library.calls.clear()
    assert run(*FLAGS, "--resume")[0] == 0
    assert begun == [0, 2] and [step for step, _ in library.calls[1:-1]] == [3, 4, 4]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_without_the_package_it_is_a_sentence_before_any_weight_is_loaded(run, monkeypatch, name):
    monkeypatch.setattr(reports, "find_spec", lambda package: None)
    monkeypatch.setattr(runs, "load_policy", lambda config: pytest.fail("loaded the policy"))
    code, out, printed = run(*FLAGS, "--log_to", name)
    assert code == 2 and not out.exists()
    assert printed == f"error: --log_to {name}: needs that package (pip install {name})\n"


def test_what_the_library_cannot_do_is_a_sentence(run, monkeypatch):
    library = stand_in("wandb", monkeypatch)
    monkeypatch.setattr(library, "init", lambda **options: 1 / 0)
    code, _, printed = run(*FLAGS)
    assert code == 2 and "Traceback" not in printed
    assert "error: --log_to wandb: cannot begin (ZeroDivisionError: division by zero)" in printed
