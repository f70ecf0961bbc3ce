# pytest tests/test_bench.py
"""The benchmark, at sizes that take seconds."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels.bench import floor, peak_memory


def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "kernels.bench", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def test_it_measures_each_function_both_ways_and_leaves_out_what_is_not_installed(tmp_path):
    done = bench("--rows", 16, "--vocab", 65, "--hidden", 8, "--dtype", "fp32", "--providers", "ours,reference,eager,cut-cross-entropy", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    functions = ["gather_log_probs", "linear_log_probs", "repo_loss", "linear_repo_loss"]
    assert {(row["function"], row["pass"], row["logits"]) for row in rows} == {(f, p, k) for f in functions for p in ("forward", "both") for k in ("random", "peaked")}
    for row in rows:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["% of floor"] >= 0
        same = [other["value"] for other in rows if (other["function"], other["logits"]) == (row["function"], row["logits"])]
        assert row["value"] == pytest.approx(same[0], abs=2e-4)  # providers compute the same thing
    assert torch.cuda.is_available() or "Times mean nothing" not in done.stderr and "CPU, " in done.stdout
    assert "not installed (cut_cross_entropy)" in done.stderr or "cut-cross-entropy" in done.stdout


@pytest.mark.parametrize("arguments, says", [(("--rows", 0), "must be at least 1"), (("--dtype", "fp8"), "invalid choice"),
                                             (("--providers", "none"), "none of them is here"), (("--json", "no/such/folder/x"), "No such file")])
def test_nonsense_is_refused(arguments, says):
    done = bench("--vocab", 5, "--hidden", 5, "--rows", 5, *arguments)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_floors_and_memory_by_hand():
    assert floor("gather_log_probs", False, 8192, 32001, 4096, 2) == (2 * 8192 * 32001, 0)
    assert floor("gather_log_probs", True, 8192, 32001, 4096, 2) == (6 * 8192 * 32001, 0)
    assert floor("linear_repo_loss", True, 8192, 32001, 4096, 2) == (0, 6 * 8192 * 32001 * 4096)
    if not torch.cuda.is_available():
        kept = []
        assert peak_memory(lambda: kept.append(torch.empty(2 ** 20))) == 2 ** 22
        assert peak_memory(lambda: [torch.empty(2 ** 20) + 1 for _ in range(3)] and None) == pytest.approx(4 * 2 ** 22, rel=1e-4)  # a temporary and the results up to then
