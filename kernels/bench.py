"""What the kernels cost, beside what others cost, in one run.

    python -m kernels.bench               # times and memory of the four functions, both passes
    python -m kernels.bench --rows 8192 --vocab 128256 --hidden 3072
    python -m kernels.bench --functions linear_log_probs --providers ours,Liger,quack
    python -m kernels.bench --plot times.png   # over V and over N: times and memory
    python -m kernels.bench --compiled    # what compilers make of the kernels, for GPUs not here

A floor is the least a function can take: every logit read (and its gradient written) at the rate of
a copy, or its products at the rate of a large product, both rates measured first. Other providers
take part where they are installed (providers.py). Each figure is printed, and written to --json,
as soon as it is there: a run that is cut off keeps what it has.
"""
import argparse
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from kernels.compiled import KERNELS, TARGETS, compile_for
from kernels.providers import OVERWRITES, floor, inputs, providers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- measuring

def milliseconds(function, device, seconds=0.5):
    """(median, 20th, 80th percentile) of a call; on a GPU with the L2 cache emptied before each."""
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


@contextmanager
def without_stderr():
    """The profiler announces each of its starts there, from below Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(function, device="cpu"):
    """Bytes alive at the worst moment of a call, beyond those before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    cpu = [ProfilerActivity.CPU]
    with without_stderr(), profile(activities=cpu, profile_memory=True) as recorded:
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
    """(bytes per second of a copy, read and write; operations per second of a large product)."""
    size, n = (2 ** 28, 8192) if device == "cuda" else (2 ** 24, 1024)
    source = torch.empty(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device).to(dtype)
    copy, _, _ = milliseconds(lambda: target.copy_(source), device)
    product, _, _ = milliseconds(lambda: a @ a, device)
    return 8 * size / copy * 1e3, 2 * n ** 3 / product * 1e3


def measure(arguments, device):
    """A row per function, provider, pass and kind of logits, one after the other."""
    machine = copy_rate, product_rate = rates(device, DTYPES[arguments.dtype])
    print(f"copy {copy_rate / 1e9:,.0f} GB/s, "
          f"product {product_rate / 1e12:,.2f} TFLOP/s ({arguments.dtype}); "
          f"N = {arguments.rows}, V = {arguments.vocab}, H = {arguments.hidden}", flush=True)
    passes = list(itertools.product((False, True), repeat=2))
    for function, loaders in providers(arguments.rows).items():
        for provider, load in loaders.items():
            if takes_part(function, provider, arguments, device):
                yield from measure_provider(
                    arguments, device, machine, function, provider, load, passes)


def short(provider):
    """"Liger" of "Liger GRPO (no cost, one advantage per response)"."""
    return provider.split()[0]


def takes_part(function, provider, arguments, device):
    if arguments.providers and short(provider) not in arguments.providers:
        return False
    if arguments.functions and function not in arguments.functions:
        return False
    return provider != "ours" or device != "cpu"  # there it is the reference


def measure_provider(arguments, device, machine, function, provider, load, passes):
    """Rows of some passes, (with backward, peaked) each; what fails ends the provider's turn."""
    try:
        for backward, peaked in passes:
            yield measure_one(
                arguments, device, machine, function, provider, load, backward, peaked)
    except ModuleNotFoundError as error:
        print(f"{provider}, {function}: not installed ({error.name})", file=sys.stderr)
    except Exception as error:  # another library's own matter, whatever it is; the others go on
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
    if overwrites:  # without the copies, which are no work of its own
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


def sweep(arguments, device):
    """Both passes on random logits, at several V with all of N and at several N with all of V."""
    machine = rates(device, DTYPES[arguments.dtype])
    for over, parts in (("vocab", (8, 4, 2, 1)), ("rows", (8, 4, 2))):
        for part in parts:
            sizes = argparse.Namespace(**vars(arguments))
            setattr(sizes, over, max(getattr(arguments, over) // part, 1))
            for function, loaders in providers(sizes.rows).items():
                for provider, load in loaders.items():
                    if takes_part(function, provider, arguments, device):
                        for row in measure_provider(
                            sizes, device, machine, function, provider, load, [(True, False)],
                        ):
                            yield {**row, "V": sizes.vocab, "N": sizes.rows}


def plot(rows, file):
    """A line of panels per function: ms and MiB over V, ms and MiB over N; a curve per provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    functions = list(dict.fromkeys(row["function"] for row in rows))
    figure, panels = pyplot.subplots(len(functions), 4, squeeze=False, layout="constrained",
                                     figsize=(16, 3.4 * len(functions)))
    largest = {size: max(row[size] for row in rows) for size in "VN"}
    for function, line in zip(functions, panels):
        for panel, (size, what) in zip(line, itertools.product("VN", ("ms", "peak MiB"))):
            other = "N" if size == "V" else "V"
            curves = defaultdict(list)
            for row in rows:
                if row["function"] == function and row[other] == largest[other]:
                    curves[row["provider"]].append((row[size], max(row[what], 1e-3)))
            for provider, points in curves.items():
                panel.plot(*zip(*sorted(points)), marker="o", markersize=3, label=provider)
            panel.set(title=f"{function}, {other} = {largest[other]:,}", xlabel=size, ylabel=what,
                      xscale="log", yscale="log")
            sizes = sorted({row[size] for row in rows})
            panel.set_xticks(sizes, [f"{number:,}" for number in sizes])
            panel.minorticks_off()
        line[0].legend(fontsize=7)
    figure.savefig(file, dpi=120)


def environment(device):
    """One line that says on what this was measured."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if device != "cuda":
        return (f"CPU, {torch.get_num_threads()} threads, {versions}. Ours is the reference here; "
                "times mean nothing but beside each other, memory does.")

    driver = "unknown"
    program = shutil.which("nvidia-smi")
    if program:
        ask = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        of_each_gpu = subprocess.run(ask, capture_output=True, text=True).stdout.split()
        driver = of_each_gpu[0] if of_each_gpu else driver
    return f"{torch.cuda.get_device_name()}, driver {driver}, {versions}"


# ---- the command line

def print_table(rows):
    """Rows of equal keys as a Markdown table."""
    print("| " + " | ".join(rows[0]).replace("_", " ") + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(cell, row.values())) + " |")


def cell(value):
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{count} x {width}" for width, count in value.items())
    return str(value)


def print_tables(rows):
    """One per function; the compiled kernels, which name none, are one."""
    for function in dict.fromkeys(row.get("function") for row in rows):
        print(f"\n{function}\n" if function else "")
        print_table([
            {key: value for key, value in row.items() if key not in ("function", "value")}
            for row in rows if row.get("function") == function
        ])


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
    parser.add_argument("--functions", type=lambda names: names.split(","), metavar="A,B",
                        help="only these, such as linear_repo_loss")
    parser.add_argument("--providers", type=lambda names: names.split(","), metavar="A,B",
                        help="only these, such as ours,reference")
    parser.add_argument("--plot", metavar="FILE",
                        help="measure forward and backward at an eighth, a quarter and half of V "
                             "and of N too, and draw times and memory; needs matplotlib")
    parser.add_argument("--compiled", action="store_true",
                        help="print registers, spills, shared memory and load widths instead; "
                             "needs no GPU")
    parser.add_argument("--targets", type=lambda names: names.split(","), metavar="A,B",
                        default=list(TARGETS),
                        help=f"those of --compiled (default: {','.join(TARGETS)})")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too, as they come")
    return parser


def checked_arguments(device):
    """What the command line says. Exits with a sentence for what cannot be done, before the minutes
    that measuring takes."""
    parser = bench_parser(device)
    arguments = parser.parse_args()
    if min(arguments.rows, arguments.vocab, arguments.hidden) < 1:
        parser.error("--rows, --vocab and --hidden must be at least 1")
    if arguments.compiled and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("--compiled: TRITON_INTERPRET=1 is set, and an interpreter compiles nothing")
    unknown = set(arguments.functions or ()) - set(providers(1))
    if unknown:
        parser.error(f"--functions {','.join(sorted(unknown))}: "
                     f"there are {', '.join(providers(1))}")
    names = {short(name) for loaders in providers(1).values() for name in loaders}
    unknown = set(arguments.providers or ()) - names
    if unknown:
        parser.error(f"--providers {','.join(sorted(unknown))}: there are "
                     f"{', '.join(sorted(names))}")
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"--targets {','.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    for flag in ("json", "plot"):
        file = getattr(arguments, flag)
        try:
            if file:
                open(file, "a").close()
        except OSError as error:
            parser.error(f"--{flag} {file}: {error.strerror}")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return arguments


def keep(rows, row, arguments, where):
    """Adds a row, prints it and writes all of them, now."""
    rows.append(row)
    if not arguments.compiled:
        print(f"  {row['function']}, {row['provider']}, {row['pass']}, {row['logits']}: "
              f"{row['ms']} ms, {row['peak MiB']} MiB", flush=True)
    if arguments.json:
        with open(f"{arguments.json}.new", "w") as file:
            json.dump({"environment": where, "rows": rows}, file, indent=1)
        os.replace(f"{arguments.json}.new", arguments.json)  # whole at each instant


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = checked_arguments(device)
    where = environment(device)
    print(where)
    if arguments.compiled:
        found = (compile_for(target, name) for target in arguments.targets for name in KERNELS)
    elif arguments.plot:
        found = sweep(arguments, device)
    else:
        found = measure(arguments, device)

    rows = []
    for row in found:
        keep(rows, row, arguments, where)
    if not rows:
        bench_parser(device).error("none of the --providers is here, or has such --functions")
    print_tables(rows)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly when its reader does, as `| head`
    main()
