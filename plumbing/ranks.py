"""Several processes under torchrun. Each rank samples, scores and learns from its share of a batch,
and every rank knows the whole rollout.

FSDP2 keeps a share of every model on each rank, gathers the weights of a layer when they are
needed, and sums the gradients. All ranks call a sharded model equally often.
"""
import atexit
import os
import socket
import stat
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.modeling_layers import GradientCheckpointingLayer

# Set by torchrun.
RANKS = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if RANKS > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)  # on its machine
SILENCE = 60  # seconds until a machine that does not answer counts as lost
PATIENCE = 3600  # seconds that ranks wait for a slow one


def join_ranks() -> None:
    """Connects to the other ranks, if torchrun started any. Raises ConnectionError."""
    if RANKS == 1 or not os.environ.get("RANK") or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK % torch.cuda.device_count())
    try:
        distributed.init_process_group(timeout=timedelta(seconds=PATIENCE))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"rank {RANK} cannot reach the others ({reason}); if /etc/hosts gives a machine's own "
            "name a loopback address, set GLOO_SOCKET_IFNAME to its network interface",
        ) from None
    # An open group's threads may abort a process that ends.
    atexit.register(distributed.destroy_process_group)
    end_silent_connections()


def end_silent_connections() -> None:
    """Asks the kernel to end this process's connections to machines that have not answered for
    SILENCE seconds. So a dead machine or a cut link is noticed. A rank that computes for longer is
    not affected, because its kernel answers."""
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        with suppress(OSError):  # closed by now, or no TCP connection
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                for option, value in (
                    (socket.TCP_USER_TIMEOUT, 1000 * SILENCE),  # for data that was sent
                    (socket.TCP_KEEPIDLE, SILENCE // 4),        # for an idle connection
                    (socket.TCP_KEEPINTVL, SILENCE // 4),
                    (socket.TCP_KEEPCNT, 3),
                ):
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def has_lost_a_rank(error: BaseException) -> bool:
    """Whether an error says that another rank does not answer."""
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()


@contextmanager
def rank_0_first():
    """Rank 0 runs the body first, then the other ranks run it and find its files."""
    if RANK > 0:
        barrier()
    yield
    if RANK == 0:
        barrier()


def all_reduce(tensor: Tensor, op=distributed.ReduceOp.SUM) -> Tensor:
    """The sum (or maximum) of all ranks' tensors, in place, with the same bits on every rank."""
    if RANKS > 1:
        distributed.all_reduce(tensor, op)
    return tensor


def reduced_over_ranks(numbers: dict, device, op=distributed.ReduceOp.SUM) -> dict:
    """Each number's sum (or maximum) over the ranks."""
    values = torch.tensor([*numbers.values()], dtype=torch.float64, device=device)
    return dict(zip(numbers, all_reduce(values, op).tolist()))


def from_all_ranks(mine: dict) -> dict:
    """All ranks' dicts as one."""
    if RANKS == 1:
        return mine
    parts = [None] * RANKS
    distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def rank_rows(rows):
    """This rank's part of some rows, a list or a tensor."""
    return rows[len(rows) * RANK // RANKS:len(rows) * (RANK + 1) // RANKS]


def rank_chunks(rows, size: int) -> list:
    """This rank's part of some rows, cut into chunks of `size`. All ranks get the same number of
    chunks, because they must call a sharded model equally often. Some may be empty."""
    mine = rank_rows(rows)
    largest_part = -(-len(rows) // RANKS)  # rounded up
    return [mine[start:start + size] for start in range(0, largest_part, size)]


def micro_batches(batch, rows: Tensor, size: int):
    """This rank's share of some rows of a batch (a dataclass of tensors [B, ...]), `size` at a
    time. A rank without rows gets one dummy row without response tokens, because FSDP needs every
    rank to call the model."""
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for chunk in rank_chunks(rows, size):
        has_rows = len(chunk) > 0
        chosen = chunk if has_rows else rows[:1]
        part = type(batch)(**{name: value[chosen] for name, value in tensors.items()})
        if not has_rows:
            part.response_mask = torch.zeros_like(part.response_mask)
        yield part


def per_token(function, model, batch, config):
    """function(model, micro-batch) for all rows of a batch, without gradients. The function returns
    a number per response token, [N], or a pair of such tensors. per_token puts the numbers in their
    places: [B, T] or a pair, 0 outside the mask, the same on all ranks."""
    rows = torch.arange(len(batch.response_mask))                                # [B]
    with torch.no_grad(), config.autocast():
        parts = [call_as_forward(model, function, part)
                 for part in micro_batches(batch, rows, config.micro_batch_size)]
    is_pair = isinstance(parts[0], tuple)
    columns = zip(*parts) if is_pair else [parts]
    is_mine = torch.zeros_like(batch.response_mask)                              # [B, T]
    is_mine[rank_rows(rows)] = True
    is_mine &= batch.response_mask
    placed = [place(torch.cat(column), is_mine) for column in columns]
    return tuple(placed) if is_pair else placed[0]


def place(values: Tensor, is_mine: Tensor) -> Tensor:
    """[this rank's N] -> [B, T], with what the other ranks have."""
    placed = torch.zeros(is_mine.shape, device=values.device)
    return all_reduce(placed.masked_scatter(is_mine, values))  # both go row by row


def sampled_in_shares(sample, rows: list[int], policy: nn.Module) -> dict[int, list[int]]:
    """sample(this rank's share of the rows) -> a response to each: {row: response} of all ranks.
    Meanwhile every rank holds the whole policy, because responses differ in length."""
    mine, responses = rank_rows(rows), {}
    with gathered(policy):
        if mine:
            responses = dict(zip(mine, sample(mine)))
    return from_all_ranks(responses)


def sharded(model: nn.Module, config) -> nn.Module:
    """The model on its device. With several ranks (FSDP2) each rank keeps a share of every weight.
    A layer's weights are gathered in the compute dtype when the layer runs. Weights outside the
    layers (embeddings, last norm, LM head) are whole inside call_as_forward()."""
    if RANKS == 1 or config.dry_run:
        return model.to(config.device)

    mesh = distributed.init_device_mesh(config.device, (RANKS,))
    kept_whole = set()  # the normaliser's few numbers
    if hasattr(model, "normalizer"):
        kept_whole = set(model.normalizer.to(config.device).parameters())
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    heads = [model.score_head] if hasattr(model, "score_head") else []

    for unit in [*layers, *heads, model]:
        compute_dtype = torch.float32 if unit in heads else getattr(torch, config.dtype)
        precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision,
                    ignored_params=kept_whole & set(unit.parameters()))
    model.call = lambda function, *arguments: function(model, *arguments)
    register_fsdp_forward_method(model, "call")
    return model


def call_as_forward(model: nn.Module, function, *arguments):
    """function(model, *arguments). It takes the place of a sharded model's forward: the weights
    that it uses are whole, and their gradients are reduced."""
    if isinstance(model, FSDPModule):
        return model.call(function, *arguments)
    return function(model, *arguments)


@contextmanager
def gathered(model: nn.Module):
    """Inside it every rank holds all weights of a sharded model, so that no rank's forward waits
    for another rank."""
    call_as_forward(model, lambda model: None)  # FSDP takes the module called first as the root
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
        barrier()  # a rank that finishes early waits here
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def clip_gradients(model: nn.Module) -> float:
    """Clips the gradient's norm, over all ranks' shares, to 1. Returns the norm before that."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return (norm if RANKS == 1 else norm.full_tensor()).item()
