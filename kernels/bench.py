"""What the kernels cost, beside what others cost, in one run.

    python -m kernels.bench                               # times and memory of the four functions, forward and forward + backward
    python -m kernels.bench --rows 8192 --vocab 128256 --hidden 3072
    python -m kernels.bench --compiled                    # what compilers make of the kernels, for GPUs that need not be here

A floor is the least a function can take: every logit read (and its gradient written) at the rate of a copy, or its products at the rate of a large
product, both rates measured first. Other providers take part where they are installed. Some of them compute the nearest thing they have, a mean of
log-probs, without temperature or clip; the name says so.
"""
import argparse
import importlib
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
from kernels import linear, log_prob
from kernels.repo_loss import BLOCK, loss_kernel
from kernels.repo_loss import NUM_WARPS as LOSS_WARPS

TEMPERATURE = 1.0  # that of the providers that know none
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---- what is compared

def plain_loss(hidden, weight, target_ids, *tokens):
    """The composition as one would write it first, in the type of its inputs."""
    return kernels.repo_loss(plain_log_probs(hidden, weight, target_ids), *tokens, backend="reference")[0]


def plain_log_probs(hidden, weight, target_ids):
    return kernels.gather_log_probs(hidden @ weight.T, target_ids, TEMPERATURE, backend="reference")


def providers(rows):
    """{function: {provider: () -> a callable of the function's tensors that returns a scalar}}; importing is left to the call."""
    def ours(function, **settings):
        def call(*tensors):
            result = getattr(kernels, function)(*tensors, **settings)
            return result[0] if isinstance(result, tuple) else result.mean()
        return lambda: call

    def of(module, name, **settings):
        return lambda: partial(getattr(importlib.import_module(module), name), **settings)

    def mean_of(function, **settings):
        return lambda: lambda *tensors: function(*tensors, **settings).mean()

    def compiled(function):
        return lambda: torch.compile(function)

    def liger_grpo():
        loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
        length = max(rows // 16, 1)  # it wants sequences: as many as a batch of 16 has tokens

        def call(hidden, weight, target_ids, old_log_probs, advantages, *_):
            hidden, target_ids, old_log_probs = (tensor.unflatten(0, (-1, length)) for tensor in (hidden, target_ids, old_log_probs))
            return loss(hidden, weight, target_ids, torch.ones_like(target_ids), advantages[:len(hidden)], old_per_token_logps=old_log_probs)[0]
        return call

    def torch_linear():
        return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())

    reference = importlib.import_module("kernels.reference")
    liger, mean_nll = "liger_kernel.transformers.functional", " (mean log-prob)"
    return {
        "gather_log_probs": {
            "ours": ours("gather_log_probs"), "reference": ours("gather_log_probs", backend="reference"),
            "torch.compile": compiled(lambda *tensors: reference.gather_log_probs(*tensors).mean()),
            "Liger" + mean_nll: of(liger, "liger_cross_entropy")},
        "linear_log_probs": {
            "ours": ours("linear_log_probs"), "reference": ours("linear_log_probs", backend="reference"), "eager": mean_of(plain_log_probs),
            "torch.compile": compiled(lambda *tensors: plain_log_probs(*tensors).mean()),
            "F.linear_cross_entropy" + mean_nll: torch_linear, "Liger" + mean_nll: of(liger, "liger_fused_linear_cross_entropy"),
            "cut-cross-entropy": of("cut_cross_entropy", "linear_cross_entropy")},
        "repo_loss": {
            "ours": ours("repo_loss"), "reference": ours("repo_loss", backend="reference"),
            "torch.compile": compiled(lambda *tensors: reference.repo_loss(*tensors)[0])},
        "linear_repo_loss": {
            "ours": ours("linear_repo_loss"), "reference": ours("linear_repo_loss", backend="reference"), "eager": lambda: plain_loss,
            "torch.compile": compiled(plain_loss), "Liger GRPO (no cost, one advantage per response)": liger_grpo},
    }


def inputs(function, rows, vocab, hidden_size, dtype, device, peaked):
    """The function's tensors, those with a gradient first. Peaked: the target has nearly all of the probability, as most tokens of a trained model."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    tokens = [random(rows) * 0.1 - (0.1 if peaked else 10.0), random(rows), random(rows), random(rows).abs(), torch.full((rows,), 1 / rows, device=device)]
    if function == "repo_loss":
        return [tokens[0] + 0.1 * random(rows), *tokens], 1
    if function == "gather_log_probs":
        logits = random(rows, vocab, dtype=dtype)
        return [logits.scatter_(1, targets[:, None], 20.0) if peaked else logits, targets], 1
    weight = random(vocab, hidden_size, dtype=dtype) / hidden_size ** 0.5
    hidden = weight[targets] * 20 if peaked else random(rows, hidden_size, dtype=dtype)
    return [hidden, weight, targets, *(tokens if function == "linear_repo_loss" else [])], 2


def floor(function, backward, rows, vocab, hidden_size, itemsize):
    """(bytes to move, floating-point operations) that no implementation can do without."""
    if function.startswith("linear"):
        return 0, (6 if backward else 2) * rows * vocab * hidden_size
    if function == "gather_log_probs":  # the backward reads the logits again and writes as much
        return (3 if backward else 1) * rows * vocab * itemsize, 0
    return (9 if backward else 6) * rows * 4, 0

# ---- measuring

def milliseconds(function, device, seconds=0.5):
    """(median, 20th, 80th percentile) of a call; on a GPU with the L2 cache emptied before each."""
    if device == "cuda":
        return triton.testing.do_bench(function, warmup=100, rep=1000 * seconds, quantiles=[0.5, 0.2, 0.8])
    function()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end and len(times) < 200:
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), *(statistics.quantiles(times, n=5)[i] for i in (0, 3))


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
    with without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def rates(device, dtype):
    """(bytes per second of a copy, read and write; floating-point operations per second of a large product)."""
    size = 2 ** 28 if device == "cuda" else 2 ** 24
    source = torch.empty(size, dtype=torch.float32, device=device)
    target, n = torch.empty_like(source), 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    copy, product = (milliseconds(function, device)[0] for function in (lambda: target.copy_(source), lambda: a @ a))
    return 8 * size / copy * 1e3, 2 * n ** 3 / product * 1e3


def measure(arguments, device):
    """A row per function, pass, kind of logits and provider."""
    dtype = DTYPES[arguments.dtype]
    copy_rate, product_rate = rates(device, dtype)
    print(f"copy {copy_rate / 1e9:,.0f} GB/s, product {product_rate / 1e12:,.2f} TFLOP/s ({arguments.dtype}); "
          f"N = {arguments.rows}, V = {arguments.vocab}, H = {arguments.hidden}", flush=True)
    rows = []
    for function, implementations in providers(arguments.rows).items():
        for name, load in implementations.items():
            if arguments.providers and name.split(" (")[0] not in arguments.providers or name == "ours" and device == "cpu":
                continue
            try:
                rows += [measure_one(arguments, device, function, name, load, backward, peaked, copy_rate, product_rate)
                         for backward in (False, True) for peaked in (False, True)]
            except ModuleNotFoundError as error:
                print(f"{name}, {function}: not installed ({error.name})", file=sys.stderr)
            except Exception as error:  # whatever another library raises here is its own matter; the others go on
                print(f"{name}, {function}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
    return rows


def measure_one(arguments, device, function, name, load, backward, peaked, copy_rate, product_rate):
    tensors, learnable = inputs(function, arguments.rows, arguments.vocab, arguments.hidden, DTYPES[arguments.dtype], device, peaked)
    implementation, gradients = load(), [tensor.requires_grad_(backward) for tensor in tensors[:learnable]]

    def call():
        with torch.set_grad_enabled(backward):
            value = implementation(*tensors)
            if backward:
                torch.autograd.grad(value, gradients)
        return value.detach()

    value = call()  # compiles
    memory = peak_memory(call, device)
    median, low, high = milliseconds(call, device)
    moved, computed = floor(function, backward, arguments.rows, arguments.vocab, arguments.hidden, tensors[0].element_size())
    rate = f"{computed / median / 1e9:,.2f} TFLOP/s" if computed else f"{moved / median / 1e6:,.0f} GB/s"
    share = 1e3 * (moved / copy_rate + computed / product_rate) / median
    return {"function": function, "pass": "both" if backward else "forward", "logits": "peaked" if peaked else "random", "provider": name,
            "ms": round(median, 4), "p20": round(low, 4), "p80": round(high, 4), "rate": rate, "% of floor": round(100 * share, 1),
            "peak MiB": round(memory / 2 ** 20, 1), "of it gradients": round(backward * sum(tensor.nbytes for tensor in gradients) / 2 ** 20, 1),
            "value": round(value.item(), 5)}


def environment(device):
    """One line that says on what this was measured."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if device != "cuda":
        return f"CPU, {torch.get_num_threads()} threads, {versions}. Ours is the reference here; times mean nothing but beside each other, memory does."
    ask = [shutil.which("nvidia-smi"), "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True).stdout.split()[:1] if ask[0] else []
    return f"{torch.cuda.get_device_name()}, driver {' '.join(driver) or 'unknown'}, {versions}"

# ---- what compilers make of the kernels

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
BYTES_OF = {"U8": 1, "U16": 2, "": 4, "64": 8, "128": 16, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
ROW = {"LANES": log_prob.LANES, "GROUP": 8}
KERNELS = {  # kernel, constants, warps, logits per turn of its loop
    "log-prob": (log_prob.forward_kernel, {**ROW, "ENTROPY": False}, log_prob.NUM_WARPS, log_prob.LANES * 8),
    "log-prob, entropy": (log_prob.forward_kernel, {**ROW, "ENTROPY": True}, log_prob.NUM_WARPS, log_prob.LANES * 8),
    "log-prob backward": (log_prob.backward_kernel, ROW, log_prob.NUM_WARPS, log_prob.LANES * 8),
    "log-prob, loss, gradient": (linear.row_kernel, {"LANES": linear.LANES, "GROUP": 8}, linear.NUM_WARPS, linear.LANES * 8),
    "loss": (loss_kernel, {"BLOCK": BLOCK}, LOSS_WARPS, None),
}


def type_of(name):
    """The kernels' naming: logits and their gradient are bf16, numbers of tokens and strides integers, single ratios floats, the rest fp32 arrays."""
    if name in ("logits", "gradient"):
        return "*bf16"
    if name in ("temperature", "lowest_ratio", "highest_ratio", "gradient_scale"):
        return "fp32"
    if name in ("inner", "vocab", "count"):
        return "i32"
    return "*i64" if name == "target_ids" else "i64" if name.endswith("stride") else "*fp32"


def compile_for(target, name):
    """Machine code of one kernel on bf16 logits, with nothing assumed of any pointer: its registers, spilled bytes, shared memory, widths of access."""
    kernel, constants, warps, logits_per_turn = KERNELS[name]
    signature = {argument: "constexpr" if argument in constants else type_of(argument) for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(constant),): value for constant, value in constants.items()})
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps})
    row = {"target": target, "kernel": name, "shared_bytes": compiled.metadata.shared}
    if target.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        field = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code)}
        accesses = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", code)
        row |= {"registers": field["vgpr_count"], "spills": field["vgpr_spill_count"] + field["sgpr_spill_count"], "instructions_per_logit": None}
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tools = triton.knobs.nvidia
            usage = subprocess.run([tools.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
            code = subprocess.run([tools.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True).stdout
        field = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        accesses = [("load" if access == "LDG" else "store", width) for access, width in re.findall(r"\b(LDG|STG)\.E(?:\.(\w+))?", code)]
        row |= {"registers": field["REG"], "spills": field["STACK"] + field["LOCAL"],
                "instructions_per_logit": logits_per_turn and round(longest_loop(code) * 32 * warps / logits_per_turn, 2)}
    return row | {f"{kind}s": {f"{width} B": count for width, count in sorted(Counter(BYTES_OF[width] for access, width in accesses if access == kind).items())}
                  for kind in ("load", "store")}


def longest_loop(code):
    """Instructions of the longest loop in a disassembly: from a label to the branch back to it."""
    labels, longest, count = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.+);", line):
            count += 1
            if (branch := re.search(r"BRA.*`\((\.L\w+)\)", instruction[1])) and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest


def print_table(rows):
    """Rows of equal keys as a Markdown table."""
    print("| " + " | ".join(rows[0]).replace("_", " ") + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        cells = [", ".join(f"{count} x {width}" for width, count in cell.items()) if isinstance(cell, dict) else cell for cell in row.values()]
        print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")


def bench_parser(device):
    on_gpu = device == "cuda"
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192 if on_gpu else 512, help="tokens, N (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=32001 if on_gpu else 8001, help="V (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 64, help="H (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="of logits, hidden states and weight (default: %(default)s)")
    parser.add_argument("--providers", type=lambda names: names.split(","), metavar="A,B", help="only these, such as ours,reference")
    parser.add_argument("--compiled", action="store_true", help="print registers, spills, shared memory and load widths instead; needs no GPU")
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
    try:
        file = open(arguments.json, "w") if arguments.json else None  # before the minutes that measuring takes
    except OSError as error:
        parser.error(f"--json {arguments.json}: {error.strerror}")
    print(environment(device))
    rows = [compile_for(target, name) for target in TARGETS for name in KERNELS] if arguments.compiled else measure(arguments, device)
    if not rows:
        parser.error(f"--providers {','.join(arguments.providers)}: none of them is here")
    for function in dict.fromkeys(row.get("function") for row in rows):
        print(f"\n{function}\n" if function else "")
        print_table([{key: cell for key, cell in row.items() if key not in ("function", "value")} for row in rows if row.get("function") == function])
    if file:
        with file:
            json.dump({"environment": environment(device), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
