"""Every launch of the kernels through Triton's own way from call to machine code, for a GPU that is
not here: python tests/jit_path.py 90

In the place of a driver stands one that knows the GPU's name alone; kernels are compiled as their
calls ask for, and not run. Prints a line for each: name, bytes of shared memory, how often its
PTX names a double, bytes of machine code.
"""
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

from kernels import linear, linear_loss, log_prob, objective  # noqa: E402

N, V, H = 10, 65, 16


class NoGpu:
    """What a launch asks of a driver before there is code to run."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all(capability: int) -> dict:
    """{(kernel's name, hash): what the compiler gave}"""
    driver.set_active(NoGpu(capability))
    compiled = {}
    run = JITFunction.run

    def compile_only(self, *arguments, **settings):
        settings["warmup"] = True
        kernel = run(self, *arguments, **settings)
        compiled[kernel.name, kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ids in (torch.int64, torch.int32):
            launch_all(dtype, ids)
    return compiled


def launch_all(dtype, ids) -> None:
    """All four functions, both passes, with and without their options."""
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    logits = torch.randn(2, N // 2, V).to(dtype).requires_grad_()
    targets = torch.zeros(N, dtype=ids)
    per_token = [torch.zeros(N) for _ in range(5)]
    for soft_cap in (0.0, 30.0):
        for with_entropy in (False, True):
            result = linear.linear_log_probs(hidden, weight, targets, 0.7, with_entropy, soft_cap)
            (result[0] if with_entropy else result).sum().backward()
        loss, _, _ = linear_loss.linear_repo_loss(
            hidden, weight, targets, *per_token, 0.2, 0.7, soft_cap,
        )
        loss.backward()
    for with_entropy in (False, True):
        result = log_prob.gather_log_probs(logits, targets.view(2, -1), 1, with_entropy)
        (result[0] if with_entropy else result).sum().backward()
    log_probs = torch.zeros(N, dtype=dtype, requires_grad=True)
    objective.repo_loss(log_probs, *per_token)[0].backward()


if __name__ == "__main__":
    for (name, _), kernel in compile_all(int(sys.argv[1])).items():
        doubles = kernel.asm["ptx"].count(".f64")
        print(name, kernel.metadata.shared, doubles, len(kernel.asm["cubin"]))
