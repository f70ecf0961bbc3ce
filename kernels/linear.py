"""LM head, log-prob and loss in one: the logits of N tokens never exist, only those of one chunk of them at a time.

With hidden states X [N, H] and the head's weight W [V, H], a chunk's logits are Z = X W^T. One Triton program per row turns Z into log-probs and,
in place, into its own gradient G; then, chunk by chunk,

    dX = G W        dW += G^T X        with G_nj = (dloss / dlog p_n / T) (1[j = t_n] - p_nj)        (log_prob.py, repo_loss.py)

linear_repo_loss does this in the forward: the clip depends on the log-prob itself, but a chunk holds whole rows, so each log-prob is final before
its row of G is written. Three products per token and nothing computed twice; the backward only scales dX and dW by the upstream scalar.
linear_log_probs cannot know its upstream gradients in the forward, and makes the logits again in the backward: a fourth product, no more memory.

The products are the library's. dW is summed in fp32 over the chunks: in bf16 each chunk would round the sum again. The chunk's rows are padded to
multiples of 128 bytes, for the products as much as for the row program; an odd V costs nothing. Under autocast everything is cast as a linear
layer's inputs are, and gradients come back in the type of what they belong to.
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.log_prob import backward_rows, forward_rows, log_prob_of, read_row, write_gradient
from kernels.reference import ROWS_PER_CHUNK
from kernels.repo_loss import clipped_objective, launch_loss, named

LANES, NUM_WARPS = 1024, 16  # many threads on few rows: a row's second reading should still find it in the L2 cache


@triton.jit(do_not_specialize=range(14))
def row_kernel(logits, target_ids, log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, vocab, stride: tl.int64,
               temperature, lowest_ratio, highest_ratio, gradient_scale, LANES: tl.constexpr, GROUP: tl.constexpr):
    """A row of logits becomes its own gradient times gradient_scale, by way of its log-prob and the loss on it."""
    n = tl.program_id(0).to(tl.int64)
    row, target = logits + n * stride, tl.load(target_ids + n)
    maximum, log2_s, _ = read_row(row, vocab, temperature, LANES, GROUP, False)
    log_prob = log_prob_of(row, target, vocab, temperature, maximum, log2_s)
    tl.store(log_probs + n, log_prob)
    _, upstream, _, _, _ = clipped_objective(log_prob, tl.load(old_log_probs + n), tl.load(reward_advantages + n), tl.load(cost_advantages + n),
                                             tl.load(penalty + n), tl.load(token_weight + n), lowest_ratio, highest_ratio)
    tl.debug_barrier()  # every thread has read the target's logit before any thread overwrites it
    write_gradient(row, row, target, vocab, temperature, maximum, log2_s, log_prob, upstream * gradient_scale, LANES, GROUP)


def compute_dtype(hidden, weight):
    """What a linear layer would compute in."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(hidden.dtype, weight.dtype)


def chunks(hidden, weight):
    """(slice of the tokens, their logits [chunk, V]) one after the other, all in the same buffer."""
    vocab = len(weight)
    buffer = hidden.new_empty(min(ROWS_PER_CHUNK, len(hidden)), -(-vocab // 64) * 64)
    for start in range(0, len(hidden), ROWS_PER_CHUNK):
        rows = slice(start, min(start + ROWS_PER_CHUNK, len(hidden)))
        logits = buffer[:rows.stop - start, :vocab]
        yield rows, torch.mm(hidden[rows], weight.t(), out=logits)


def products(chunk_gradients, hidden, weight, needs_hidden, needs_weight):
    """dX and dW [fp32] from (tokens, G) of one chunk after the other; None where it is not needed."""
    hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
    weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    for rows, gradient in chunk_gradients:
        if needs_hidden:
            torch.mm(gradient, weight, out=hidden_gradient[rows])
        if needs_weight and gradient.is_cuda and gradient.dtype != torch.float32:
            torch.addmm(weight_gradient, gradient.t(), hidden[rows], out_dtype=torch.float32, out=weight_gradient)
        elif needs_weight:  # the CPU's products have no other type of sum than that of their factors
            weight_gradient.addmm_(gradient.t().float(), hidden[rows].float())
    return hidden_gradient, weight_gradient


class LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, return_entropy):
        ctx.dtype, ctx.temperature = compute_dtype(hidden, weight), temperature
        results = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3 + return_entropy)]  # log-probs, maxima, log2_sums, entropy
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits in chunks(hidden.to(ctx.dtype), weight.to(ctx.dtype)):
                forward_rows(logits[None], target_ids[rows], temperature, *[result[rows] for result in results])
        log_probs, maxima, log2_sums, *entropy = results
        ctx.save_for_backward(hidden, weight, target_ids, log_probs, maxima, log2_sums)
        ctx.mark_non_differentiable(*entropy)
        return (log_probs, *entropy) if return_entropy else log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        hidden, weight, target_ids, *saved = ctx.saved_tensors
        x, w, upstream = hidden.to(ctx.dtype), weight.to(ctx.dtype), upstream.contiguous()

        def chunk_gradients():
            for rows, logits in chunks(x, w):
                backward_rows(logits[None], target_ids[rows], ctx.temperature, *[tensor[rows] for tensor in (*saved, upstream)], logits[None])
                yield rows, logits

        with torch.autocast(hidden.device.type, enabled=False):
            hidden_gradient, weight_gradient = products(chunk_gradients(), x, w, *ctx.needs_input_grad[:2])
        return *as_their_inputs(hidden_gradient, weight_gradient, hidden, weight), None, None, None


class LinearRepoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, clip_range, temperature, *tokens):
        dtype, tokens = compute_dtype(hidden, weight), [tensor.float().contiguous() for tensor in tokens]
        x, w, log_probs = hidden.to(dtype), weight.to(dtype), hidden.new_empty(len(hidden), dtype=torch.float32)
        ctx.scale = 2.0 ** len(hidden).bit_length()  # w_t is about 1 / N: fp16 would lose the gradients' small entries; a power of 2 rounds nothing

        def chunk_gradients():
            for rows, logits in chunks(x, w):
                with torch.cuda.device_of(logits):
                    row_kernel[len(logits),](logits, target_ids[rows], log_probs[rows], *[tensor[rows] for tensor in tokens], logits.shape[1],
                                             logits.stride(0), float(temperature), 1.0 - clip_range, 1.0 + clip_range, ctx.scale, LANES,
                                             16 // logits.element_size(), num_warps=NUM_WARPS)
                yield rows, logits

        with torch.autocast(hidden.device.type, enabled=False):
            hidden_gradient, weight_gradient = products(chunk_gradients(), x, w, *ctx.needs_input_grad[:2])
        loss, stats, _ = launch_loss([log_probs, *tokens], clip_range)
        ctx.save_for_backward(*as_their_inputs(hidden_gradient, weight_gradient, hidden, weight))
        ctx.mark_non_differentiable(log_probs, stats)
        return loss, log_probs, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        factor = upstream / ctx.scale
        scaled = (gradient if gradient is None else gradient * factor for gradient in ctx.saved_tensors)  # not in place: the graph may be kept
        return *scaled, *[None] * 8


def as_their_inputs(hidden_gradient, weight_gradient, hidden, weight):
    pairs = (hidden_gradient, hidden), (weight_gradient, weight)
    return [gradient if gradient is None else gradient.to(tensor.dtype) for gradient, tensor in pairs]


def linear_log_probs(hidden, weight, target_ids, temperature=1.0, return_entropy=False):
    """gather_log_probs(hidden @ weight.T, ...): [N, H], [V, H], [N] -> fp32 [N], and the entropies [N] if asked for."""
    return LinearLogProbs.apply(hidden, weight, target_ids.contiguous(), temperature, return_entropy)


def linear_repo_loss(hidden, weight, target_ids, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight,
                     clip_range=0.2, temperature=1.0):
    """repo_loss(linear_log_probs(...), ...): (scalar loss, detached fp32 log-probs [N], stats)."""
    tokens = old_log_probs, reward_advantages, cost_advantages, penalty, token_weight
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss, log_probs, stats = LinearRepoLoss.apply(hidden, weight, target_ids.contiguous(), clip_range, temperature, *tokens)
    else:
        log_probs = linear_log_probs(hidden, weight, target_ids, temperature)
        loss, stats, _ = launch_loss([log_probs, *tokens], clip_range)
    return loss, log_probs, named(stats)
