"""LM head, log-prob and loss in one: only the logits of one chunk of tokens exist at a time.

With hidden states X [N, H] and the head's weight W [V, H], a chunk's logits are Z = X W^T. One
Triton program per row turns Z into log-probs and, in place, into its own gradient G; then, chunk by
chunk,

    dX  = G W
    dW += G^T X        with G_nj = (dloss / dlog p_n / T) (1[j = t_n] - p_nj)

(log_prob.py derives the second factor, objective.py the first).

linear_repo_loss does this in the forward: the clip depends on the log-prob itself, but a chunk
holds whole rows, so each log-prob is final before its row of G is written. Three products per token
and nothing computed twice; the backward only scales dX and dW by the upstream scalar.
linear_log_probs cannot know its upstream gradients in the forward, and makes the logits again in
the backward: a fourth product, no more memory.

The products are the library's. dW is summed in fp32 over the chunks: in bf16 each chunk would round
the sum again. The chunk's rows are padded to multiples of 128 bytes, for the products as much as
for the row program; an odd V costs nothing. Under autocast everything is cast as a linear layer's
inputs are, and gradients come back in the type of what they belong to.
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.log_prob import backward_rows, forward_rows, log_prob_of, read_row, write_gradient
from kernels.objective import clipped_objective, launch_loss, named
from kernels.reference import ROWS_PER_CHUNK

# Many threads on few rows: a row's second reading should still find it in the L2 cache. 16 warps
# are 512 threads, so 2 lanes and two 16-byte loads in flight for each: 32 bytes per thread, 16 KiB
# per tile. V = 32001 in bf16 is 4,000 groups: 3 tiles and 928 groups of a fourth.
LANES, NUM_WARPS = 1024, 16


@triton.jit(do_not_specialize=range(14))  # one binary whatever sizes, strides and alignments are
def row_kernel(
    logits,               # [n, V] of a chunk, bf16, fp16 or fp32; overwritten by their gradient
    target_ids,           # [n] int64 or int32
    log_probs,            # [n] fp32, written
    old_log_probs,        # [n] fp32
    reward_advantages,    # [n] fp32
    cost_advantages,      # [n] fp32
    penalty,              # [n] fp32, lambda_i of the token's response
    token_weight,         # [n] fp32, w_t
    vocab,                # V
    stride: tl.int64,     # of logits, from row to row
    temperature,          # fp32, above 0
    lowest_ratio,         # fp32, 1 - epsilon
    highest_ratio,        # fp32, 1 + epsilon
    gradient_scale,       # fp32, a factor of the gradient
    LANES: tl.constexpr,  # groups in a tile
    GROUP: tl.constexpr,  # logits in 16 bytes
):
    """A row of logits becomes its own gradient, by way of its log-prob and the loss on it."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    target = tl.load(target_ids + n)
    maximum, log2_s, _ = read_row(row, vocab, temperature, LANES, GROUP, False)
    log_prob = log_prob_of(row, target, vocab, temperature, maximum, log2_s)
    tl.store(log_probs + n, log_prob)

    _, upstream, _, _, _ = clipped_objective(
        log_prob,
        tl.load(old_log_probs + n),
        tl.load(reward_advantages + n),
        tl.load(cost_advantages + n),
        tl.load(penalty + n),
        tl.load(token_weight + n),
        lowest_ratio,
        highest_ratio,
    )

    tl.debug_barrier()  # every thread has read the target's logit before any thread overwrites it
    write_gradient(
        row, row, target, vocab, temperature, maximum, log2_s, log_prob, upstream * gradient_scale,
        LANES, GROUP,
    )


def launch_rows(logits, target_ids, log_probs, per_token, clip_range, temperature, scale):
    """A chunk's logits [n, V] into log_probs [n] and, in place, scale times their gradient.

    per_token holds old log-probs, both advantages, penalty and weight, each [n].
    """
    old_log_probs, reward_advantages, cost_advantages, penalty, token_weight = per_token
    with torch.cuda.device_of(logits):
        row_kernel[(len(logits),)](
            logits=logits,
            target_ids=target_ids,
            log_probs=log_probs,
            old_log_probs=old_log_probs,
            reward_advantages=reward_advantages,
            cost_advantages=cost_advantages,
            penalty=penalty,
            token_weight=token_weight,
            vocab=logits.shape[1],
            stride=logits.stride(0),
            temperature=float(temperature),
            lowest_ratio=1.0 - clip_range,
            highest_ratio=1.0 + clip_range,
            gradient_scale=scale,
            LANES=LANES,
            GROUP=16 // logits.element_size(),
            num_warps=NUM_WARPS,
        )


def compute_dtype(hidden, weight):
    """What a linear layer would compute in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def chunks(hidden, weight):
    """(slice of the tokens, their logits [n, V]) one after the other, all in the same buffer."""
    count, vocab = len(hidden), len(weight)
    padded_vocab = triton.cdiv(vocab, 64) * 64  # 128 bytes where a logit has two
    buffer = hidden.new_empty(min(ROWS_PER_CHUNK, count), padded_vocab)
    for start in range(0, count, ROWS_PER_CHUNK):
        rows = slice(start, min(start + ROWS_PER_CHUNK, count))
        logits = buffer[:rows.stop - start, :vocab]
        torch.mm(hidden[rows], weight.t(), out=logits)
        yield rows, logits


def products(chunk_gradients, hidden, weight, needs_hidden, needs_weight):
    """dX and dW [fp32] from (tokens, G) of one chunk after the other; None where not needed."""
    hidden_gradient = weight_gradient = None
    if needs_hidden:
        hidden_gradient = torch.empty_like(hidden)
    if needs_weight:
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)

    for rows, gradient in chunk_gradients:
        if needs_hidden:
            torch.mm(gradient, weight, out=hidden_gradient[rows])
        if needs_weight:
            add_product(weight_gradient, gradient.t(), hidden[rows])
    return hidden_gradient, weight_gradient


def add_product(total, a, b):
    """total += a @ b, summed in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # the CPU's products have no other type of sum than that of their factors
        total.addmm_(a.float(), b.float())


def in_their_types(gradients, tensors):
    """Gradients in the type of what they belong to; None stays None."""
    return [
        None if gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, tensors)
    ]


class LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, return_entropy):
        ctx.dtype, ctx.temperature = compute_dtype(hidden, weight), temperature
        log_probs, maxima, log2_sums = (
            hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3)
        )
        entropies = torch.empty_like(log_probs) if return_entropy else None

        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits in chunks(hidden.to(ctx.dtype), weight.to(ctx.dtype)):
                forward_rows(
                    logits[None], target_ids[rows], temperature,
                    log_probs[rows], maxima[rows], log2_sums[rows],
                    entropies[rows] if return_entropy else None,
                )

        ctx.save_for_backward(hidden, weight, target_ids, log_probs, maxima, log2_sums)
        if not return_entropy:
            return log_probs
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        hidden, weight, target_ids, log_probs, maxima, log2_sums = ctx.saved_tensors
        x, w, upstream = hidden.to(ctx.dtype), weight.to(ctx.dtype), upstream.contiguous()

        def chunk_gradients():
            for rows, logits in chunks(x, w):
                backward_rows(
                    logits[None], target_ids[rows], ctx.temperature,
                    log_probs[rows], maxima[rows], log2_sums[rows], upstream[rows],
                    gradient=logits[None],
                )
                yield rows, logits

        with torch.autocast(hidden.device.type, enabled=False):
            gradients = products(chunk_gradients(), x, w, *ctx.needs_input_grad[:2])
        return *in_their_types(gradients, (hidden, weight)), None, None, None


class LinearRepoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, clip_range, temperature, *per_token):
        dtype = compute_dtype(hidden, weight)
        x, w = hidden.to(dtype), weight.to(dtype)
        per_token = [tensor.float().contiguous() for tensor in per_token]
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)

        # w_t is about 1 / N, so fp16 would lose the gradients' small entries. A power of 2, because
        # it rounds nothing.
        ctx.scale = 2.0 ** len(hidden).bit_length()

        def chunk_gradients():
            for rows, logits in chunks(x, w):
                launch_rows(
                    logits, target_ids[rows], log_probs[rows],
                    [tensor[rows] for tensor in per_token],
                    clip_range, temperature, ctx.scale,
                )
                yield rows, logits

        with torch.autocast(hidden.device.type, enabled=False):
            gradients = products(chunk_gradients(), x, w, *ctx.needs_input_grad[:2])
        loss, stats, _ = launch_loss([log_probs, *per_token], clip_range)
        ctx.save_for_backward(*in_their_types(gradients, (hidden, weight)))
        ctx.mark_non_differentiable(log_probs, stats)
        return loss, log_probs, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        factor = upstream / ctx.scale
        scaled = [
            None if gradient is None else gradient * factor  # not in place: the graph may be kept
            for gradient in ctx.saved_tensors
        ]
        no_others = [None] * 8  # target_ids, two settings, five arrays of data
        return *scaled, *no_others


def linear_log_probs(hidden, weight, target_ids, temperature=1.0, return_entropy=False):
    """gather_log_probs(hidden @ weight.T, ...): [N, H], [V, H], [N] -> fp32 [N].

    With return_entropy a pair: the second is each row's entropy, fp32 [N].
    """
    target_ids = target_ids.contiguous()
    return LinearLogProbs.apply(hidden, weight, target_ids, temperature, return_entropy)


def linear_repo_loss(
    hidden, weight, target_ids,
    old_log_probs, reward_advantages, cost_advantages, penalty, token_weight,
    clip_range=0.2, temperature=1.0,
):
    """repo_loss(linear_log_probs(...), ...): (scalar loss, detached fp32 log-probs [N], stats)."""
    per_token = old_log_probs, reward_advantages, cost_advantages, penalty, token_weight
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if learns:
        loss, log_probs, stats = LinearRepoLoss.apply(
            hidden, weight, target_ids.contiguous(), clip_range, temperature, *per_token,
        )
    else:
        log_probs = linear_log_probs(hidden, weight, target_ids, temperature)
        loss, stats, _ = launch_loss([log_probs, *per_token], clip_range)
    return loss, log_probs, named(stats)
