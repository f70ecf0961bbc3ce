"""Compiles the kernels for GPUs that need not be present, and reads the machine code."""
import re
import subprocess
import tempfile
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import linear_loss, log_prob, objective, rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# bytes of an access, by the suffix of its instruction on NVIDIA and on AMD
BYTES_OF = {
    "U8": 1, "U16": 2, "": 4, "64": 8, "128": 16,
    "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}

SCALARS = "temperature", "soft_cap", "lowest_ratio", "highest_ratio"

GROUP = 8  # logits in 16 bytes: bf16
ROW = {"LANES": rows.LANES, "GROUP": GROUP, "CAPPED": False}
WITH_CAP = {"LANES": rows.LANES, "GROUP": GROUP, "CAPPED": True}
LOGITS_PER_TURN = rows.LANES * GROUP
KERNELS = {  # name: (kernel, constants, warps, logits per turn of its loop)
    name: (kernel, constants, rows.NUM_WARPS, LOGITS_PER_TURN) for name, kernel, constants in (
        ("log-prob", log_prob.forward_kernel, {**ROW, "ENTROPY": False}),
        ("log-prob, entropy", log_prob.forward_kernel, {**ROW, "ENTROPY": True}),
        ("log-prob backward", log_prob.backward_kernel, ROW),
        ("log-prob, loss, gradient", linear_loss.row_kernel, ROW),
        ("the same with a cap", linear_loss.row_kernel, WITH_CAP),
    )
} | {
    "loss": (objective.loss_kernel, {"BLOCK": objective.BLOCK}, objective.NUM_WARPS, None),
}


def type_of(argument):
    """The type of a kernel's argument, by its name."""
    if argument in ("logits", "gradient"):
        return "*bf16"
    if argument in SCALARS:
        return "fp32"
    if argument in ("inner", "vocab", "count"):
        return "i32"
    if argument == "target_ids":
        return "*i64"
    if argument.endswith("stride"):
        return "i64"
    return "*fp32"  # an array with a number per token


def compile_for(target, name):
    """Compiles one kernel for bf16 logits, without assumptions about pointers.

    Returns a row of the table: registers, spilled bytes, shared memory, widths of access.
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
    """The number of loads, or of stores, by width: {"2 B": 1, "16 B": 4}."""
    counts = Counter(BYTES_OF[width] for access, width in accesses if access == kind)
    return {f"{width} B": count for width, count in sorted(counts.items())}


def longest_loop(code):
    """Instructions of the longest loop: from a label to the branch back to it."""
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
