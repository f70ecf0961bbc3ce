# pytest tests/test_compiled.py
"""The Triton kernels compiled ahead of time, for GPUs not here, and the script's use of them."""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, exhaustive, read_jsonl


def run_compiling(*arguments) -> str:
    """What Python prints with these arguments, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment,
                          check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="session")
def compiled(long_runs) -> Path:
    """The folder with what the compilers were asked in the background: see conftest.py."""
    return long_runs("compiled")


@pytest.fixture(params=["sm_90,gfx942", exhaustive("sm_80,sm_100,sm_120")])
def machine_code(compiled, request) -> list[dict]:
    """What `python -m kernels.bench --compiled` finds."""
    file = compiled / "compiled.json"
    if "sm_90" not in request.param:
        file = compiled / "others.json"
        run_compiling("-m", "kernels.bench", "--compiled", "--targets", request.param,
                      "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert {row["target"] for row in rows} == set(request.param.split(","))
    assert len(rows) == 6 * len(request.param.split(","))
    return rows


def test_no_spills_and_few_registers_on_every_target(machine_code):
    for row in machine_code:
        assert row["spills"] == 0 and 0 < row["registers"] <= 64, row


def test_rows_are_read_and_written_16_bytes_at_a_time_whatever_their_alignment(machine_code):
    """Nothing is told to the compiler about pointers, V or strides.

    So this code is also that of V = 32001. 2-byte accesses: the rows' ends, the target.
    """
    for row in machine_code:
        loads, stores = row["loads"], row["stores"]
        if row["kernel"].startswith("log-prob"):
            assert loads["16 B"] >= 1 and loads["2 B"] <= 5, row
        if row["kernel"] not in ("log-prob", "log-prob, entropy", "loss"):
            assert stores["16 B"] >= 1 and stores["2 B"] == 2, row
            assert set(stores) <= {"2 B", "4 B", "16 B"}, row


def test_sizes_alignments_and_temperature_are_no_constants_of_the_code():
    """What the launcher would compile anew for: constants, and arguments that it may look at.

    Only the choice of entropy and the dtypes are.
    """
    code = """
from kernels import linear_loss, log_prob, objective
for kernel in (log_prob.forward_kernel, log_prob.backward_kernel, linear_loss.row_kernel,
               objective.loss_kernel):
    assert all(parameter.do_not_specialize or parameter.is_constexpr for parameter in kernel.params)
    print(*[parameter.name for parameter in kernel.params if parameter.is_constexpr])
"""
    assert run_compiling("-c", code).split("\n") == [
        "LANES GROUP CAPPED ENTROPY", "LANES GROUP CAPPED", "LANES GROUP CAPPED", "BLOCK", "",
    ]


@pytest.mark.parametrize("capability", [90, exhaustive(80), exhaustive(100), exhaustive(120)])
def test_every_launch_compiles_through_tritons_own_way_without_a_double(compiled, capability):
    """All dtypes, both types of ids, with and without cap and entropy: see jit_path.py. Numbers of
    Python are fp32 in the machine code."""
    file = compiled / f"jit-{capability}.txt"
    if not file.exists():
        file.write_text(run_compiling("tests/jit_path.py", str(capability)))
    lines = [line.split() for line in file.read_text().splitlines()]
    kernels = Counter(name for name, *_ in lines)
    assert kernels == {
        "forward_kernel": 3 * 2 * (2 * 2), "backward_kernel": 3 * 2 * 2, "row_kernel": 3 * 2 * 2,
        "loss_kernel": 3,
    }
    for name, _, doubles, size in lines:
        assert int(size) > 0 and doubles == "0", name


@pytest.fixture(scope="session")
def interpreted(long_runs) -> Path:
    """The folder with two short runs of the script, one by the interpreter: see conftest.py."""
    return long_runs("interpreted")


def test_a_run_by_the_interpreter_gives_the_metrics_of_a_run_by_plain_pytorch(interpreted):
    plain, triton = (read_jsonl(interpreted / name / "metrics.jsonl") for name in ("by-0", "by-1"))
    assert len(plain) == len(triton) == 2
    # equal to the last bit, it would be one backend twice
    assert any(a["policy_grad_norm"] != b["policy_grad_norm"] for a, b in zip(plain, triton))

    timings = {name for name in plain[0] if name.startswith(("seconds", "tokens_per", "peak"))}
    for a, b in zip(plain, triton):
        assert a.keys() == b.keys()
        for name in a.keys() - timings:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
