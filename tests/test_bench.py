# pytest tests/test_bench.py
"""The benchmark, at sizes that take seconds."""
import itertools
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, exhaustive

import kernels.bench as module
from kernels import linear
from kernels.bench import bench_parser, main, measure_one, peak_memory
from kernels.providers import floor, inputs, providers


@pytest.fixture(params=["here", exhaustive("module")])
def bench(request, monkeypatch, capsys):
    """bench(*arguments): the benchmark in this process, where it takes its time less seriously, or
    in one of its own."""
    monkeypatch.setattr(module, "milliseconds", partial(module.milliseconds, seconds=0.01))

    def here(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernels.bench", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    def as_module(*arguments):
        command = [sys.executable, "-m", "kernels.bench", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    return here if request.param == "here" else as_module


def test_it_measures_each_function_both_ways_and_leaves_out_what_is_not_installed(
    tmp_path, bench,
):
    done = bench(
        "--rows", 16, "--vocab", 65, "--hidden", 8, "--dtype", "fp32",
        "--providers", "ours,reference,eager,cut-cross-entropy", "--split", "whole,even",
        "--json", tmp_path / "rows.json",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    measured = {(row["function"], row["pass"], row["logits"]) for row in rows}
    functions = ["gather_log_probs", "linear_log_probs", "repo_loss", "linear_repo_loss"]
    passes, kinds = ["forward", "both"], ["random", "peaked"]
    assert measured == set(itertools.product(functions, passes, kinds))

    value_of = {}
    for row in rows:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["% of floor"] >= 0
        # providers compute the same thing
        value = value_of.setdefault((row["function"], row["logits"]), row["value"])
        assert row["value"] == pytest.approx(value, abs=2e-4)

    if not torch.cuda.is_available():
        assert "No Triton kernel runs here" in done.stdout
        for provider in ("ours (whole)", "ours (even)"):
            assert f"{provider}, linear_repo_loss: on a GPU only" in done.stderr
    assert "not installed (cut_cross_entropy)" in done.stderr or "cut-cross-entropy" in done.stdout


@pytest.mark.parametrize("arguments, says", [
    (("--rows", 0), "must be at least 1"),
    (("--dtype", "fp8"), "invalid choice"),
    (("--providers", "none"), "none is unknown; choose from F.linear_cross_entropy, Liger, "),
    (("--providers", "quack"), "none of them runs here"),
    (("--split", "odd"), "odd is unknown; choose from whole, even"),
    (("--compiled", "--targets", "sm_1"), "sm_1 is unknown; choose from sm_80, sm_90"),
    (("--functions", "sum"), "sum is unknown; choose from gather_log_probs, linear_log_probs"),
    (("--json", "no/such/folder/x"), "No such file"),
])
def test_nonsense_is_refused(bench, arguments, says):
    done = bench("--vocab", 5, "--hidden", 5, "--rows", 5, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path, monkeypatch):
    rows = iter([{"function": "f", "ms": 1.0}, {"function": "f", "ms": 2.0}])

    def measure(*arguments):
        yield from rows
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["kernels.bench", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(KeyboardInterrupt):
        main()
    assert [row["ms"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [1, 2]


@pytest.mark.parametrize("function", ["linear_log_probs", "linear_repo_loss"])
def test_a_provider_per_split_switches_to_it(monkeypatch, function):
    monkeypatch.setattr(linear, "SPLIT", "whole")
    tensors, _ = inputs(function, 2, 9, 4, torch.float32, "cpu", peaked=False)
    for split in ("even", "whole"):
        providers(2, ["whole", "even"])[function][f"ours ({split})"]()(*tensors)
        assert linear.SPLIT == split


@pytest.mark.parametrize("has_grad", [True, False])
def test_providers_that_overwrite_get_new_logits_each_time(monkeypatch, has_grad):
    seen = []

    def overwriting(logits, target_ids):
        seen.append(logits.detach().clone())
        value = logits.mean()
        logits.detach().zero_()
        return value

    monkeypatch.setattr(module, "OVERWRITES", {("gather_log_probs", "other")})
    arguments = bench_parser("cpu").parse_args(["--rows", "4", "--vocab", "9"])
    row = measure_one(arguments, "cpu", (1e9, 1e9), "gather_log_probs", "other",
                      lambda: overwriting, has_grad, False)
    assert len(seen) > 5 and all(torch.equal(logits, seen[0]) for logits in seen)
    assert seen[0].any() and row["value"] == pytest.approx(seen[0].mean().item(), abs=1e-4)


@pytest.fixture(scope="session")
def without_datasets(long_runs) -> str:
    """What `pytest --collect-only` prints where datasets is not installed: see conftest.py."""
    return (long_runs("without_datasets") / "collected.log").read_text()


def test_kernels_are_tested_and_measured_without_the_package_datasets(without_datasets):
    files = {line.split("::")[0] for line in without_datasets.splitlines() if "::" in line}
    measured_and_tested = {"tests/test_bench.py", "tests/test_log_prob.py", "tests/test_linear.py"}
    assert measured_and_tested <= files and "tests/test_run.py" not in files


def test_floors_by_hand():
    assert floor("gather_log_probs", False, 8192, 32001, 4096, 2) == (2 * 8192 * 32001, 0)
    assert floor("gather_log_probs", True, 8192, 32001, 4096, 2) == (6 * 8192 * 32001, 0)
    assert floor("linear_repo_loss", True, 8192, 32001, 4096, 2) == (0, 6 * 8192 * 32001 * 4096)


@pytest.mark.skipif(torch.cuda.is_available(), reason="by hand for the CPU's allocator")
def test_memory_by_hand():
    kept = []
    assert peak_memory(lambda: kept.append(torch.empty(2 ** 20))) == 2 ** 22

    def make_three():
        results = []
        for _ in range(3):
            results.append(torch.empty(2 ** 20) + 1)

    # a temporary and the results up to then
    assert peak_memory(make_three) == pytest.approx(4 * 2 ** 22, rel=1e-4)
