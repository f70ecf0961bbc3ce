"""Several processes under torchrun: every rank samples, scores and learns from its share of each batch, and knows the whole rollout.

FSDP2 keeps the models in shares, gathers a layer's weights when its turn comes, and sums the gradients. All ranks call a sharded model equally often.
"""
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun tells each process which it is, of how many


def join_ranks() -> None:
    """Meets the other ranks, if torchrun has started any."""
    if RANKS > 1 and "RANK" in os.environ and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        distributed.init_process_group(timeout=timedelta(hours=1))  # for a slow judge; that a rank has died, torchrun sees at once


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def over_ranks(tensor: Tensor, op=distributed.ReduceOp.SUM) -> Tensor:
    """The sum (or maximum) of all ranks' tensors, in place, the same bits on each."""
    if RANKS > 1:
        distributed.all_reduce(tensor, op)
    return tensor


def from_all_ranks(mine: dict) -> dict:
    """All ranks' dicts as one."""
    parts = [mine] * RANKS
    if RANKS > 1:
        distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def shares(rows, size: int) -> list:
    """This rank's part of some rows (a list or tensor), `size` at a time. Sharded models move in step, so each rank gets as many pieces; some may be empty."""
    mine = rows[len(rows) * RANK // RANKS:len(rows) * (RANK + 1) // RANKS]
    return [mine[start:start + size] for start in range(0, -(-len(rows) // RANKS), size)]


def sharded(model: nn.Module, config) -> nn.Module:
    """The model in its place on the device. With several ranks (FSDP2) each keeps a share of every weight; a layer's are gathered when its turn comes, in the
    compute dtype; what lies outside the layers, embeddings, last norm and LM head, is whole inside whole()."""
    if RANKS == 1 or config.dry_run:
        return model.to(config.device)
    exact = {id(p) for p in model.normalizer.to(config.device).parameters()} if hasattr(model, "normalizer") else set()
    place = {"mesh": distributed.init_device_mesh(config.device, (RANKS,)), "reshard_after_forward": True}
    heads = [model.score_head] if hasattr(model, "score_head") else []
    for unit in [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)] + heads + [model]:
        precision = torch.float32 if unit in heads else getattr(torch, config.dtype)
        fully_shard(unit, **place, mp_policy=MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False),
                    ignored_params={p for p in unit.parameters() if id(p) in exact})
    model.call = lambda function, *arguments: function(model, *arguments)
    register_fsdp_forward_method(model, "call")
    return model


def whole(model: nn.Module, function, *arguments):
    """function(model, *arguments); of a sharded model, in the place of its forward: whatever weights the function uses are whole, and get their gradients."""
    return model.call(function, *arguments) if isinstance(model, FSDPModule) else function(model, *arguments)


@contextmanager
def gathered(model: nn.Module):
    """A sharded model with all its weights whole on every rank, so that no rank's forward waits for another's."""
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
        barrier()  # whoever has ended early waits here
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
