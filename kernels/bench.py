"""What the kernels cost. `python -m kernels.bench --compiled` compiles them for GPUs that need not be here and prints what the machine code uses."""
import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import linear, log_prob
from kernels.repo_loss import BLOCK, loss_kernel
from kernels.repo_loss import NUM_WARPS as LOSS_WARPS

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
    if name in ("temperature", "lowest_ratio", "highest_ratio"):
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


def bench_parser():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--compiled", action="store_true", required=True, help="print registers, spills, shared memory and load widths; needs no GPU")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    return parser


def main():
    arguments = bench_parser().parse_args()
    rows = [compile_for(target, name) for target in TARGETS for name in KERNELS]
    print_table(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
