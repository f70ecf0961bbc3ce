"""What is trained of a model: all its weights, or low-rank adapters on its linear layers."""
import copy

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plumbing.errors import require
from plumbing.pictures import language_part


class LowRankLinear(nn.Module):
    """LoRA: y = W x + b + B (A x), with A [r, in] random and B [out, r] zero, so that it starts as
    the layer it replaces. W and b are frozen."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        # Shared with every other model on this backbone.
        self.weight, self.bias = linear.weight, linear.bias
        # A step of B moves y about twice as far as the same step of W would. So learning rates
        # carry over, although embeddings, norms and LM head are frozen.
        scale = 2 * linear.in_features ** 0.5 / rank
        device = linear.weight.device
        self.lora_a = nn.Parameter(scale * torch.randn(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)                                                  # [..., in]
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)                      # [r, in], ...
        rows = x.reshape(-1, x.shape[-1])                                            # [n, in]
        y = AddLowRank.apply(rows, self.weight, self.bias, a, b)                     # [n, out]
        return y.view(*x.shape[:-1], len(self.weight))                               # [..., out]


class AddLowRank(torch.autograd.Function):
    """W x + b + B (A x) for n rows. The small products add into the results of the large ones. A
    separate sum would read and write [n, out] once more, and [n, in] in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        low = x @ a.T                                                                # [n, r]
        ctx.save_for_backward(x, weight, a, b, low)
        return F.linear(x, weight, bias).addmm_(low, b.T)                            # [n, out]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, a, b, low = ctx.saved_tensors
        dlow = dy @ b                                                                # [n, r]
        dx = (dy @ weight).addmm_(dlow, a) if ctx.needs_input_grad[0] else None      # [n, in]
        return dx, None, None, dlow.T @ x, dy.T @ low


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights, with B A added to W where there are adapters."""
    layers = [name.removesuffix("lora_a") for name in weights if name.endswith(".lora_a")]
    for layer in layers:
        low_rank = weights.pop(f"{layer}lora_b") @ weights.pop(f"{layer}lora_a")
        weights[f"{layer}weight"] = weights[f"{layer}weight"].float() + low_rank
    return weights


def second_model(model: nn.Module, config) -> nn.Module:
    """A second model like this one: a full copy, or, with adapters, a model that shares the
    backbone's weights."""
    not_copied = {}
    if config.lora_rank:
        not_copied = {id(weight): weight for weight in model.base_model.parameters()}
    return copy.deepcopy(model, memo=not_copied)  # what the memo knows is taken as it is


def make_trainable(model: nn.Module, config) -> nn.Module:
    """Trains all weights but a vision tower's, in fp32. With --lora_rank it trains adapters on the
    linear layers of the language model, and a score head if there is one. Raises UserError if there
    are no such layers."""
    if not config.lora_rank:
        model.float().requires_grad_(True)
        vision_tower(model).requires_grad_(False)
        return model

    model.requires_grad_(False)
    linear_layers = [(parent, name, layer)
                     for parent in language_part(model.base_model).modules()
                     for name, layer in parent.named_children() if type(layer) is nn.Linear]
    require(linear_layers,
            f"--lora_rank {config.lora_rank}: {type(model.base_model).__name__} has no linear "
            "layers to put adapters on; use --lora_rank 0")
    for parent, name, layer in linear_layers:
        setattr(parent, name, LowRankLinear(layer, config.lora_rank))
    if hasattr(model, "score_head"):
        model.score_head.requires_grad_(True)
    return model


def vision_tower(model: nn.Module) -> nn.Module:
    """Empty where a model sees nothing."""
    return getattr(model.base_model, "vision_tower", nn.Module())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, saved and resumed."""
    return {name: parameter for name, parameter in model.named_parameters()
            if parameter.requires_grad}
