"""Measures the kernels beside other implementations.

    python -m kernels.bench               # times and memory of the four functions, both passes
    python -m kernels.bench --rows 8192 --vocab 128256 --hidden 3072
    python -m kernels.bench --functions linear_log_probs --providers ours,Liger,quack
    python -m kernels.bench --functions linear_repo_loss --split whole,even
    python -m kernels.bench --compiled    # registers, spills and load widths; needs no GPU

The column "% of floor" compares a time with the least that its function can take. That is the time
to move every logit at the rate of a copy, or to compute its products at the rate of a large
product. The benchmark measures both rates first. Other providers are measured if they are
installed (providers.py). Each row is printed, and written to --json, as soon as it is measured.
"""
import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from kernels import runs_triton
from kernels.compiled import KERNELS, TARGETS, compile_for
from kernels.providers import OVERWRITES, floor, inputs, providers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- measuring

def milliseconds(function, device, seconds=0.5):
    """(median, 20th, 80th percentile) of a call. On a GPU the L2 cache is emptied before each."""
    if device == "cuda":
        return triton.testing.do_bench(
            function, warmup=100, rep=1000 * seconds, quantiles=[0.5, 0.2, 0.8],
        )

    function()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    low, _, _, high = statistics.quantiles(times, n=5)
    return statistics.median(times), low, high


def peak_memory(function, device="cpu"):
    """The most bytes that a call holds at one time, beyond those that were held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would print each of its starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def rates(device, dtype):
    """(bytes per second that a copy reads and writes, operations per second of a large product)."""
    size, n = (2 ** 28, 8192) if device == "cuda" else (2 ** 24, 1024)
    source = torch.empty(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device).to(dtype)
    copy, _, _ = milliseconds(lambda: target.copy_(source), device)
    product, _, _ = milliseconds(lambda: a @ a, device)
    return 8 * size / copy * 1e3, 2 * n ** 3 / product * 1e3


def measure(arguments, device):
    """Yields a row for each function, provider, pass and kind of logits."""
    machine = copy_rate, product_rate = rates(device, DTYPES[arguments.dtype])
    print(f"copy {copy_rate / 1e9:,.0f} GB/s, "
          f"product {product_rate / 1e12:,.2f} TFLOP/s ({arguments.dtype}); "
          f"N = {arguments.rows}, V = {arguments.vocab}, H = {arguments.hidden}", flush=True)
    for function, loaders in providers(arguments.rows, arguments.split).items():
        for provider, load in loaders.items():
            if not takes_part(function, provider, arguments):
                continue
            if short(provider) == "ours" and not has_triton(device):
                print(f"{provider}, {function}: on a GPU only", file=sys.stderr)
                continue
            yield from measure_provider(arguments, device, machine, function, provider, load)


def short(provider):
    """"Liger" of "Liger GRPO (no cost, one advantage per response)"."""
    return provider.split()[0]


def takes_part(function, provider, arguments):
    if arguments.providers and short(provider) not in arguments.providers:
        return False
    return not arguments.functions or function in arguments.functions


def has_triton(device):
    """False on a CPU without Triton's interpreter: there, our functions are the reference."""
    return runs_triton(torch.empty(0, device=device))


def measure_provider(arguments, device, machine, function, provider, load):
    """Yields the rows of one provider. An error ends its turn, and the others go on."""
    try:
        for backward in (False, True):
            for peaked in (False, True):
                yield measure_one(
                    arguments, device, machine, function, provider, load, backward, peaked)
    except ModuleNotFoundError as error:
        print(f"{provider}, {function}: not installed ({error.name})", file=sys.stderr)
    except Exception as error:  # whatever another library raises
        first_line = (str(error).splitlines() or [""])[0]
        print(f"{provider}, {function}: {type(error).__name__}: {first_line}", file=sys.stderr)


def measure_one(arguments, device, machine, function, provider, load, backward, peaked):
    sizes = arguments.rows, arguments.vocab, arguments.hidden
    tensors, learnable = inputs(function, *sizes, DTYPES[arguments.dtype], device, peaked)
    implementation = load()
    learning = [tensor.requires_grad_(backward) for tensor in tensors[:learnable]]
    overwrites = (function, provider) in OVERWRITES

    kept = tensors[0].detach()

    def copy():
        return kept.clone().requires_grad_(backward)

    def call():
        if overwrites:
            tensors[0] = learning[0] = copy()
        with torch.set_grad_enabled(backward):
            value = implementation(*tensors)
            if backward:
                torch.autograd.grad(value, learning)
        return value.detach()

    value = call()  # compiles
    memory = peak_memory(call, device)
    median, low, high = milliseconds(call, device)
    if overwrites:  # a provider is not charged for the copies
        copying, _, _ = milliseconds(copy, device)
        median, low, high = median - copying, low - copying, high - copying
        memory -= kept.nbytes

    moved, computed = floor(function, backward, *sizes, tensors[0].element_size())
    copy_rate, product_rate = machine
    least = 1e3 * (moved / copy_rate + computed / product_rate)
    if computed:
        rate = f"{computed / median / 1e9:,.2f} TFLOP/s"
    else:
        rate = f"{moved / median / 1e6:,.0f} GB/s"
    gradients = sum(tensor.nbytes for tensor in learning) if backward else 0
    return {
        "function": function,
        "pass": "both" if backward else "forward",
        "logits": "peaked" if peaked else "random",
        "provider": provider,
        "ms": round(median, 4),
        "p20": round(low, 4),
        "p80": round(high, 4),
        "rate": rate,
        "% of floor": round(100 * least / median, 1),
        "peak MiB": round(memory / 2 ** 20, 1),
        "of it gradients": round(gradients / 2 ** 20, 1),
        "value": round(value.item(), 5),
    }


def environment(device):
    """One line about the machine and the versions."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if device != "cuda":
        what = "Triton's interpreter" if has_triton(device) else "No Triton kernel"
        return (f"CPU, {torch.get_num_threads()} threads, {versions}. {what} runs here. "
                "Compare memory; compare times only with each other.")

    driver = "unknown"
    program = shutil.which("nvidia-smi")
    if program:
        ask = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        of_each_gpu = subprocess.run(ask, capture_output=True, text=True).stdout.split()
        driver = of_each_gpu[0] if of_each_gpu else driver
    return f"{torch.cuda.get_device_name()}, driver {driver}, {versions}"


# ---- the command line

def print_row(row, previous):
    """A row of a Markdown table. A new function begins a new table."""
    function = row.get("function")  # the compiled kernels have none
    shown = {key: value for key, value in row.items() if key not in ("function", "value")}
    if previous is None or previous.get("function") != function:
        print(f"\n{function}\n" if function else "")
        print("| " + " | ".join(shown).replace("_", " ") + " |")
        print("|---" * len(shown) + "|")
    print("| " + " | ".join(map(cell, shown.values())) + " |", flush=True)


def cell(value):
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{count} x {width}" for width, count in value.items())
    return str(value)


def names(text):
    return text.split(",")


def bench_parser(device):
    on_gpu = device == "cuda"
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=8192 if on_gpu else 512,
                        help="tokens, N (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=32001 if on_gpu else 8001,
                        help="V (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 64,
                        help="H (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32",
                        help="of logits, hidden states and weight (default: %(default)s)")
    parser.add_argument("--functions", type=names, metavar="A,B",
                        help="measure only these, such as linear_repo_loss")
    parser.add_argument("--providers", type=names, metavar="A,B",
                        help="measure only these, such as ours,reference")
    parser.add_argument("--split", type=names, metavar="A,B", default=["whole"],
                        help="how ours computes products if V is no multiple of 8: whole, or even, "
                             "with V mod 8 tokens apart; or both (default: whole)")
    parser.add_argument("--compiled", action="store_true",
                        help="compile the kernels instead, and print registers, spills, shared "
                             "memory and load widths; needs no GPU")
    parser.add_argument("--targets", type=names, metavar="A,B", default=list(TARGETS),
                        help=f"GPUs for --compiled (default: {','.join(TARGETS)})")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file too")
    return parser


def checked_arguments(device):
    """The command line. A mistake ends the process with one sentence, before any measurement."""
    parser = bench_parser(device)
    arguments = parser.parse_args()
    if min(arguments.rows, arguments.vocab, arguments.hidden) < 1:
        parser.error("--rows, --vocab and --hidden must be at least 1")
    if arguments.compiled and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("--compiled: the interpreter compiles nothing; unset TRITON_INTERPRET")
    loaders = providers(1)
    for flag, known in (
        ("functions", list(loaders)),
        ("providers", sorted({short(name) for of_one in loaders.values() for name in of_one})),
        ("split", ["whole", "even"]),
        ("targets", list(TARGETS)),
    ):
        unknown = [name for name in getattr(arguments, flag) or () if name not in known]
        if unknown:
            parser.error(f"--{flag}: {unknown[0]} is unknown; choose from {', '.join(known)}")
    try:
        if arguments.json:
            open(arguments.json, "a").close()
    except OSError as error:
        parser.error(f"--json {arguments.json}: {error.strerror}")
    return arguments


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = checked_arguments(device)
    where = environment(device)
    print(where)
    if arguments.compiled:
        found = (compile_for(target, name) for target in arguments.targets for name in KERNELS)
    else:
        found = measure(arguments, device)

    rows = []
    for row in found:
        print_row(row, rows[-1] if rows else None)
        rows.append(row)
        if arguments.json:  # the file is whole at any time
            with open(f"{arguments.json}.new", "w") as file:
                json.dump({"environment": where, "rows": rows}, file, indent=1)
            os.replace(f"{arguments.json}.new", arguments.json)
    if not rows:
        bench_parser(device).error("--providers: none of them runs here and has such a function")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the process without a traceback
    main()
