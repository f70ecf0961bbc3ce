"""What the kernels cost, beside what others cost, in one run.

    python -m kernels.bench               # times and memory of the four functions, both passes
    python -m kernels.bench --rows 8192 --vocab 128256 --hidden 3072
    python -m kernels.bench --compiled    # what compilers make of the kernels, for GPUs not here

A floor is the least a function can take: every logit read (and its gradient written) at the rate of
a copy, or its products at the rate of a large product, both rates measured first. Other providers
take part where they are installed. Some of them compute the nearest thing they have, a mean of
log-probs, without temperature or clip; the name says so.
"""
import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch.profiler import ProfilerActivity, profile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels import linear, log_prob, objective, reference

TEMPERATURE = 1.0  # that of the providers that know none
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- what is compared: callables of a function's tensors that return a scalar

def ours(function, **settings):
    """One of the four functions: its loss, or the mean of its log-probs."""
    def call(*tensors):
        result = function(*tensors, **settings)
        return result[0] if isinstance(result, tuple) else result.mean()

    return call


def plain_log_probs(hidden, weight, target_ids):
    """LM head and log-prob as one would write them first, in the type of their inputs."""
    logits = hidden @ weight.T
    return kernels.gather_log_probs(logits, target_ids, TEMPERATURE, backend="reference")


def plain_mean(hidden, weight, target_ids):
    return plain_log_probs(hidden, weight, target_ids).mean()


def plain_loss(hidden, weight, target_ids, *per_token):
    log_probs = plain_log_probs(hidden, weight, target_ids)
    return kernels.repo_loss(log_probs, *per_token, backend="reference")[0]


def reference_mean(logits, target_ids):
    return reference.gather_log_probs(logits, target_ids).mean()


def reference_loss(*per_token):
    return reference.repo_loss(*per_token)[0]


def imported(module, name):
    return getattr(importlib.import_module(module), name)


def torch_linear():
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def liger_grpo(rows):
    make_loss = imported("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    loss = make_loss(beta=0.0, use_ref_model=False, loss_type="bnpo")
    length = max(rows // 16, 1)  # it wants sequences: as many as a batch of 16 has tokens

    def call(hidden, weight, target_ids, old_log_probs, advantages, *_):
        hidden, target_ids, old_log_probs = (
            tensor.unflatten(0, (-1, length)) for tensor in (hidden, target_ids, old_log_probs)
        )
        mask = torch.ones_like(target_ids)
        return loss(
            hidden, weight, target_ids, mask, advantages[:len(hidden)],
            old_per_token_logps=old_log_probs,
        )[0]

    return call


def providers(rows):
    """{function: {provider: load}}; load() imports what it needs and returns the callable."""
    liger, cut = "liger_kernel.transformers.functional", "cut_cross_entropy"
    gather, linear_gather = kernels.gather_log_probs, kernels.linear_log_probs
    loss, linear_loss = kernels.repo_loss, kernels.linear_repo_loss
    return {
        "gather_log_probs": {
            "ours": partial(ours, gather),
            "reference": partial(ours, gather, backend="reference"),
            "torch.compile": partial(torch.compile, reference_mean),
            "Liger (mean log-prob)": partial(imported, liger, "liger_cross_entropy"),
        },
        "linear_log_probs": {
            "ours": partial(ours, linear_gather),
            "reference": partial(ours, linear_gather, backend="reference"),
            "eager": lambda: plain_mean,
            "torch.compile": partial(torch.compile, plain_mean),
            "F.linear_cross_entropy (mean log-prob)": torch_linear,
            "Liger (mean log-prob)": partial(imported, liger, "liger_fused_linear_cross_entropy"),
            "cut-cross-entropy": partial(imported, cut, "linear_cross_entropy"),
        },
        "repo_loss": {
            "ours": partial(ours, loss),
            "reference": partial(ours, loss, backend="reference"),
            "torch.compile": partial(torch.compile, reference_loss),
        },
        "linear_repo_loss": {
            "ours": partial(ours, linear_loss),
            "reference": partial(ours, linear_loss, backend="reference"),
            "eager": lambda: plain_loss,
            "torch.compile": partial(torch.compile, plain_loss),
            "Liger GRPO (no cost, one advantage per response)": partial(liger_grpo, rows),
        },
    }


def inputs(function, rows, vocab, hidden_size, dtype, device, peaked):
    """(the function's tensors, how many of them learn: the first).

    Peaked: the target has nearly all of the probability, as most tokens of a trained model.
    """
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    per_token = [
        random(rows) * 0.1 - (0.1 if peaked else 10.0),     # old_log_probs
        random(rows),                                       # reward_advantages
        random(rows),                                       # cost_advantages
        random(rows).abs(),                                 # penalty
        torch.full((rows,), 1 / rows, device=device),       # token_weight
    ]

    if function == "repo_loss":
        log_probs = per_token[0] + 0.1 * random(rows)
        return [log_probs, *per_token], 1

    if function == "gather_log_probs":
        logits = random(rows, vocab, dtype=dtype)
        if peaked:
            logits.scatter_(1, targets[:, None], 20.0)
        return [logits, targets], 1

    weight = random(vocab, hidden_size, dtype=dtype) / hidden_size ** 0.5
    hidden = weight[targets] * 20 if peaked else random(rows, hidden_size, dtype=dtype)
    if function == "linear_log_probs":
        return [hidden, weight, targets], 2
    return [hidden, weight, targets, *per_token], 2


def floor(function, backward, rows, vocab, hidden_size, itemsize):
    """(bytes to move, floating-point operations) that no implementation can do without."""
    if function.startswith("linear"):
        products = 3 if backward else 1
        return 0, 2 * products * rows * vocab * hidden_size
    if function == "gather_log_probs":  # the backward reads the logits again and writes as much
        passes = 3 if backward else 1
        return passes * rows * vocab * itemsize, 0
    arrays = 9 if backward else 6
    return 4 * arrays * rows, 0


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
    """A row per function, provider, pass and kind of logits."""
    machine = copy_rate, product_rate = rates(device, DTYPES[arguments.dtype])
    print(f"copy {copy_rate / 1e9:,.0f} GB/s, "
          f"product {product_rate / 1e12:,.2f} TFLOP/s ({arguments.dtype}); "
          f"N = {arguments.rows}, V = {arguments.vocab}, H = {arguments.hidden}", flush=True)

    rows = []
    for function, loaders in providers(arguments.rows).items():
        for provider, load in loaders.items():
            if takes_part(provider, arguments.providers, device):
                rows += measure_provider(arguments, device, machine, function, provider, load)
    return rows


def takes_part(provider, wanted, device):
    short_name = provider.split(" (")[0]
    if wanted and short_name not in wanted:
        return False
    return provider != "ours" or device != "cpu"  # there it is the reference


def measure_provider(arguments, device, machine, function, provider, load):
    """Both passes on both kinds of logits; no row if any of them fails."""
    passes = itertools.product((False, True), repeat=2)
    try:
        return [
            measure_one(arguments, device, machine, function, provider, load, backward, peaked)
            for backward, peaked in passes
        ]
    except ModuleNotFoundError as error:
        print(f"{provider}, {function}: not installed ({error.name})", file=sys.stderr)
    except Exception as error:  # another library's own matter, whatever it is; the others go on
        first_line = (str(error).splitlines() or [""])[0]
        print(f"{provider}, {function}: {type(error).__name__}: {first_line}", file=sys.stderr)
    return []


def measure_one(arguments, device, machine, function, provider, load, backward, peaked):
    sizes = arguments.rows, arguments.vocab, arguments.hidden
    tensors, learnable = inputs(function, *sizes, DTYPES[arguments.dtype], device, peaked)
    implementation = load()
    learning = [tensor.requires_grad_(backward) for tensor in tensors[:learnable]]

    def call():
        with torch.set_grad_enabled(backward):
            value = implementation(*tensors)
            if backward:
                torch.autograd.grad(value, learning)
        return value.detach()

    value = call()  # compiles
    memory = peak_memory(call, device)
    median, low, high = milliseconds(call, device)

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


# ---- what compilers make of the kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# how instructions of either maker call the width of an access
BYTES_OF = {
    "U8": 1, "U16": 2, "": 4, "64": 8, "128": 16,
    "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}

GROUP = 8  # logits in 16 bytes: bf16
ROW = {"LANES": log_prob.LANES, "GROUP": GROUP}
ROW_TURN = log_prob.LANES * GROUP
LINEAR_ROW = {"LANES": linear.LANES, "GROUP": GROUP}
LINEAR_TURN = linear.LANES * GROUP
KERNELS = {  # name: (kernel, constants, warps, logits per turn of its loop)
    "log-prob":
        (log_prob.forward_kernel, {**ROW, "ENTROPY": False}, log_prob.NUM_WARPS, ROW_TURN),
    "log-prob, entropy":
        (log_prob.forward_kernel, {**ROW, "ENTROPY": True}, log_prob.NUM_WARPS, ROW_TURN),
    "log-prob backward":
        (log_prob.backward_kernel, ROW, log_prob.NUM_WARPS, ROW_TURN),
    "log-prob, loss, gradient":
        (linear.row_kernel, LINEAR_ROW, linear.NUM_WARPS, LINEAR_TURN),
    "loss":
        (objective.loss_kernel, {"BLOCK": objective.BLOCK}, objective.NUM_WARPS, None),
}


def type_of(argument):
    """The type of a kernel's argument, by the kernels' way to name them."""
    if argument in ("logits", "gradient"):
        return "*bf16"
    if argument in ("temperature", "lowest_ratio", "highest_ratio", "gradient_scale"):
        return "fp32"
    if argument in ("inner", "vocab", "count"):
        return "i32"
    if argument == "target_ids":
        return "*i64"
    if argument.endswith("stride"):
        return "i64"
    return "*fp32"  # an array with a number per token


def compile_for(target, name):
    """What a compiler makes of one kernel on bf16 logits, with nothing assumed of any pointer.

    A row of the table: registers, spilled bytes, shared memory, widths of access.
    """
    kernel, constants, warps, logits_per_turn = KERNELS[name]
    signature = {
        argument: "constexpr" if argument in constants else type_of(argument)
        for argument in kernel.arg_names
    }
    by_place = {
        (kernel.arg_names.index(constant),): value for constant, value in constants.items()
    }
    source = ASTSource(kernel, signature, by_place)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps})

    instructions_per_logit = None
    if target.startswith("gfx"):
        registers, spills, accesses = amd_code(compiled)
    else:
        registers, spills, accesses, loop = nvidia_code(compiled)
        if logits_per_turn:
            instructions_per_logit = round(loop * 32 * warps / logits_per_turn, 2)
    return {
        "target": target,
        "kernel": name,
        "shared_bytes": compiled.metadata.shared,
        "registers": registers,
        "spills": spills,
        "instructions_per_logit": instructions_per_logit,
        "loads": count_widths("load", accesses),
        "stores": count_widths("store", accesses),
    }


def amd_code(compiled):
    """(registers, spills, [(load or store, width)])."""
    code = compiled.asm["amdgcn"]
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code))
    spills = int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])
    accesses = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", code)
    return int(fields["vgpr_count"]), spills, accesses


def nvidia_code(compiled):
    """(registers, spilled bytes, [(load or store, width)], instructions of the longest loop)."""
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = output_of(tools.cuobjdump.path, "-res-usage", file.name)
        code = output_of(tools.nvdisasm.path, "-c", file.name)

    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    spills = int(fields["STACK"]) + int(fields["LOCAL"])
    kinds = {"LDG": "load", "STG": "store"}
    accesses = [
        (kinds[instruction], width)
        for instruction, width in re.findall(r"\b(LDG|STG)\.E(?:\.(\w+))?", code)
    ]
    return int(fields["REG"]), spills, accesses, longest_loop(code)


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_widths(kind, accesses):
    """How many of a kind there are of each width: {"2 B": 1, "16 B": 4}."""
    counts = Counter(BYTES_OF[width] for access, width in accesses if access == kind)
    return {f"{width} B": count for width, count in sorted(counts.items())}


def longest_loop(code):
    """Instructions of the longest loop in a disassembly: from a label to the branch back to it."""
    labels, longest, count = {}, 0, 0
    for line in code.splitlines():
        label = re.match(r"(\.L\w+):", line)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.+);", line)
        if label:
            labels[label[1]] = count
        elif instruction:
            count += 1
            branch = re.search(r"BRA.*`\((\.L\w+)\)", instruction[1])
            if branch and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest


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
    parser.add_argument("--providers", type=lambda names: names.split(","), metavar="A,B",
                        help="only these, such as ours,reference")
    parser.add_argument("--compiled", action="store_true",
                        help="print registers, spills, shared memory and load widths instead; "
                             "needs no GPU")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    return parser


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = bench_parser(device)
    arguments = parser.parse_args()
    if min(arguments.rows, arguments.vocab, arguments.hidden) < 1:
        parser.error("--rows, --vocab and --hidden must be at least 1")
    if arguments.compiled and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("--compiled: TRITON_INTERPRET=1 is set, and an interpreter compiles nothing")
    try:  # before the minutes that measuring takes
        file = open(arguments.json, "w") if arguments.json else None
    except OSError as error:
        parser.error(f"--json {arguments.json}: {error.strerror}")

    print(environment(device))
    if arguments.compiled:
        rows = [compile_for(target, name) for target in TARGETS for name in KERNELS]
    else:
        rows = measure(arguments, device)
    if not rows:
        parser.error(f"--providers {','.join(arguments.providers)}: none of them is here")
    print_tables(rows)
    if file:
        with file:
            json.dump({"environment": environment(device), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
