# pytest tests/test_bench.py
"""The benchmark, at sizes that take seconds."""
import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, exhaustive

from kernels.bench import floor, main, peak_memory


@pytest.fixture(params=["here", exhaustive("module")])
def bench(request, monkeypatch, capsys):
    """bench(*arguments): the benchmark in this process, or in one of its own."""

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
        "--providers", "ours,reference,eager,cut-cross-entropy",
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
        assert "Times mean nothing" not in done.stderr and "CPU, " in done.stdout
    assert "not installed (cut_cross_entropy)" in done.stderr or "cut-cross-entropy" in done.stdout


@pytest.mark.parametrize("arguments, says", [
    (("--rows", 0), "must be at least 1"),
    (("--dtype", "fp8"), "invalid choice"),
    (("--providers", "none"), "none of them is here"),
    (("--json", "no/such/folder/x"), "No such file"),
])
def test_nonsense_is_refused(bench, arguments, says):
    done = bench("--vocab", 5, "--hidden", 5, "--rows", 5, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


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
