# pytest tests/test_curves.py
"""--log_to: curves by TensorBoard, read back by its own reader, where it is installed; trackio and
wandb by stand-ins that keep what they are called with, as their documentation has the calls."""

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
from conftest import exhaustive, read_jsonl, write_python
from test_run import FEW, summary_of

from plumbing import reports

FLAGS = (*FEW, "--save_every", 2)


def cut_off_after_step_2(out) -> None:
    """As if the run had been killed in its last evaluation, its newest checkpoint lost."""
    for folder in ("checkpoints/step-4", "final"):
        shutil.rmtree(out / folder)
    for file in ("summary.json", "eval.jsonl"):
        (out / file).unlink()


def read_events(folder) -> dict[str, list]:
    """{name: [(step, value)]}"""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder), size_guidance={reader.SCALARS: 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]}


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_shows_what_the_run_has_written_and_after_a_resume_each_step_once(run):
    flags = (*FLAGS, "--log_to", "tensorboard")
    code, out, _ = run(*flags)
    assert code == 0
    cut_off_after_step_2(out)
    assert run(*flags, "--resume")[0] == 0

    found, metrics = read_events(out / "tensorboard"), read_jsonl(out / "metrics.jsonl")
    for name in metrics[0].keys() - {"step"}:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in metrics]
        assert found[name] == expected, name
    summary = summary_of(out)
    assert found["summary/safety_rate"][-1] == (4, pytest.approx(summary["safety_rate"]))
    assert "summary/algo" not in found and "summary/before" not in found


STAND_IN = """
    calls = []

    def init(**options):
        calls.append(("init", options))

    def log(numbers, step=None):
        calls.append(("log", step, numbers))

    def finish():
        calls.append(("finish",))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(name): a module of that name, which is found before any other."""
    def make(name: str):
        write_python(tmp_path / "site" / f"{name}.py", STAND_IN)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return reports.import_module(name)

    (tmp_path / "site").mkdir()
    yield make
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", [exhaustive("trackio"), "wandb"])
def test_a_library_is_called_as_it_documents_and_a_resume_names_the_same_run(run, stand_in, name):
    library, flags = stand_in(name), (*FLAGS, "--log_to", name)
    code, out, _ = run(*flags)
    assert code == 0
    (_, options), *logged, end = library.calls
    assert end == ("finish",) and options["resume"] == "allow"
    assert options["project"] == "repo" and options["config"]["steps"] == 4
    assert [step for _, step, _ in logged] == [1, 2, 3, 4, 4]
    rows = [{"step": step, **numbers} for _, step, numbers in logged[:4]]
    assert rows == read_jsonl(out / "metrics.jsonl")
    assert logged[4][2]["summary/cost"] == summary_of(out)["cost"]
    json.dumps(options["config"])

    cut_off_after_step_2(out)
    library.calls.clear()
    assert run(*flags, "--resume")[0] == 0
    (_, again), *logged, _ = library.calls
    same = "id" if name == "wandb" else "name"
    assert again[same] == options[same]
    assert [step for _, step, _ in logged] == [3, 4, 4]

    library.calls.clear()
    assert run(*flags)[0] == 0  # another run, in the same folder
    assert library.calls[0][1][same] != options[same]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_without_the_package_it_is_a_sentence_before_any_weight_is_loaded(run, monkeypatch, name):
    monkeypatch.setattr(reports, "find_spec", lambda package: None)
    monkeypatch.setattr("plumbing.runs.load_policy", lambda config: pytest.fail("loaded it"))
    code, out, printed = run(*FLAGS, "--log_to", name)
    assert code == 2 and not out.exists()
    assert printed == f"error: --log_to {name}: needs that package (pip install {name})\n"


def test_what_the_library_cannot_do_is_a_sentence(run, stand_in, monkeypatch):
    library = stand_in("wandb")
    monkeypatch.setattr(library, "init", lambda **options: 1 / 0)
    code, _, printed = run(*FLAGS, "--log_to", "wandb")
    assert code == 2 and "Traceback" not in printed
    assert "error: --log_to wandb: cannot begin (ZeroDivisionError: division by zero)" in printed
