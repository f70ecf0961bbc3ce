"""LM head and log-prob in one: only the logits of one chunk of tokens exist at a time.

With hidden states X [N, H] and the head's weight W [V, H], a chunk's logits are Z = X W^T. One
Triton program per row turns Z into log-probs and, in place, into its own gradient G; then, chunk by
chunk,

    dX  = G W
    dW += G^T X        with G_nj = (dloss / dlog p_n / T) (1[j = t_n] - p_nj)

(rows.py derives the second factor, objective.py the first).

linear_log_probs cannot know its upstream gradients in the forward, and makes the logits again in
the backward: four products, no more memory. Where the loss is known, linear_loss.py needs three.

The products are the library's. dW is summed in fp32 over the chunks: in bf16 each chunk would round
the sum again. The chunk's rows are padded to multiples of 128 bytes, for the products as much as
for the row program; an odd V costs nothing. Under autocast everything is cast as a linear layer's
inputs are, and gradients come back in the type of what they belong to.
"""
import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.log_prob import backward_rows, empty_results, forward_rows
from kernels.reference import rows_per_chunk


def compute_dtype(hidden, weight):
    """What a linear layer would compute in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def chunk_length(hidden, weight_learns):
    """Tokens in a chunk: all chunks have about as many."""
    count, hidden_size = hidden.shape
    chunks = triton.cdiv(count, rows_per_chunk(hidden_size, weight_learns))
    return triton.cdiv(count, max(chunks, 1))


def split(hidden, weight_learns):
    """The tokens, cut into slices."""
    count, length = len(hidden), chunk_length(hidden, weight_learns)
    return [slice(start, min(start + length, count)) for start in range(0, count, max(length, 1))]


def new_buffer(hidden, weight, weight_learns):
    """Room for the logits of a chunk, [n, V rounded up]."""
    padded_vocab = triton.cdiv(weight.shape[0], 64) * 64  # 128 bytes in bf16
    return hidden.new_empty(chunk_length(hidden, weight_learns), padded_vocab)


def chunks(hidden, weight, slices, buffer):
    """(slice of the tokens, their logits [n, V]) one after the other, all in the same buffer."""
    for rows in slices:
        logits = buffer[:rows.stop - rows.start, :len(weight)]
        torch.mm(hidden[rows], weight.t(), out=logits)
        yield rows, logits


def add_product(total, a, b, beta=1.0, alpha=1.0):
    """total = beta total + alpha (a @ b), summed in fp32; with beta 0 whatever was there is gone.

    One pass over total, whatever the factors are.
    """
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, beta=beta, alpha=alpha, out_dtype=torch.float32, out=total)
    else:  # the CPU's products have no other type of sum than that of their factors
        total.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)


# ---- as operators of PyTorch, which torch.compile takes as they are

@torch.library.custom_op("repo::linear_log_probs", mutates_args=())
def linear_op(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, soft_cap: float,
    dtype: torch.dtype, weight_learns: bool, with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropies, maxima, log2 sums), the last two for the backward."""
    results = empty_results(hidden, target_ids, with_entropy)
    log_probs, entropies, maxima, log2_sums = results
    x, w, target_ids = hidden.to(dtype), weight.to(dtype), target_ids.contiguous()
    slices, buffer = split(x, weight_learns), new_buffer(x, w, weight_learns)
    for rows, logits in chunks(x, w, slices, buffer):
        forward_rows(
            logits[None], target_ids[rows], temperature, soft_cap,
            log_probs[rows], maxima[rows], log2_sums[rows],
            entropies[rows] if with_entropy else None,
        )
    return results


@linear_op.register_fake
def _(hidden, weight, target_ids, temperature, soft_cap, dtype, weight_learns, with_entropy):
    return empty_results(hidden, target_ids, with_entropy)


@torch.library.custom_op("repo::linear_log_probs_backward", mutates_args=())
def linear_backward_op(
    upstream: Tensor, hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float,
    soft_cap: float, dtype: torch.dtype, weight_learns: bool, hidden_needs: bool,
    weight_needs: bool, log_probs: Tensor, maxima: Tensor, log2_sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """dX in the compute type and dW in fp32; either is of no size if it is not needed."""
    hidden_gradient, weight_gradient = gradients = gradients_of(
        hidden, weight, dtype, hidden_needs, weight_needs,
    )
    x, w, target_ids = hidden.to(dtype), weight.to(dtype), target_ids.contiguous()
    upstream = upstream.contiguous()
    slices, buffer = split(x, weight_learns), new_buffer(x, w, weight_learns)
    for rows, logits in chunks(x, w, slices, buffer):
        backward_rows(
            logits[None], target_ids[rows], temperature, soft_cap,
            log_probs[rows], maxima[rows], log2_sums[rows], upstream[rows],
            gradient=logits[None],
        )
        if hidden_needs:
            torch.mm(logits, w, out=hidden_gradient[rows])
        if weight_needs:
            add_product(weight_gradient, logits.t(), x[rows], beta=float(rows.start > 0))
    return gradients


@linear_backward_op.register_fake
def _(upstream, hidden, weight, target_ids, temperature, soft_cap, dtype, weight_learns,
      hidden_needs, weight_needs, log_probs, maxima, log2_sums):
    return gradients_of(hidden, weight, dtype, hidden_needs, weight_needs)


def gradients_of(hidden, weight, dtype, hidden_needs, weight_needs):
    """Empty dX and dW; without tokens dW is zero, for no product is ever stored in it."""
    hidden_gradient = hidden.new_empty(hidden.shape if hidden_needs else 0, dtype=dtype)
    make = weight.new_empty if hidden.shape[0] > 0 else weight.new_zeros
    return hidden_gradient, make(weight.shape if weight_needs else 0, dtype=torch.float32)


def keep_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    hidden, weight, target_ids, *ctx.settings, _ = inputs
    log_probs, entropies, maxima, log2_sums = output
    ctx.save_for_backward(hidden, weight, target_ids, log_probs, maxima, log2_sums)
    ctx.mark_non_differentiable(entropies, maxima, log2_sums)


def backward(ctx, upstream, *_):
    hidden, weight, target_ids, *kept = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    gradients = linear_backward_op(
        upstream, hidden, weight, target_ids, *ctx.settings, *needs, *kept,
    )
    return *in_their_types(gradients, (hidden, weight), needs), *[None] * 6


def in_their_types(gradients, tensors, needs):
    """Gradients in the type of what they belong to; None where there is none."""
    return [
        gradient.to(tensor.dtype) if needed else None
        for gradient, tensor, needed in zip(gradients, tensors, needs)
    ]


linear_op.register_autograd(once_differentiable(backward), setup_context=keep_for_backward)


def linear_log_probs(
    hidden, weight, target_ids, temperature=1.0, return_entropy=False, soft_cap=0.0,
):
    """gather_log_probs(hidden @ weight.T, ...): [N, H], [V, H], [N] -> fp32 [N].

    With return_entropy a pair: the second is each row's entropy, fp32 [N].
    """
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs, entropies, _, _ = linear_op(
            hidden, weight, target_ids, float(temperature), float(soft_cap), dtype,
            weight.requires_grad, return_entropy,  # cut as an update is, for the same products
        )
    return (log_probs, entropies) if return_entropy else log_probs
