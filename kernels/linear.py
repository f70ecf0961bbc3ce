"""LM head and log-prob in one: only the logits of one chunk of tokens exist at a time.

With hidden states X [N, H] and the head's weight W [V, H], a chunk's logits are Z = X W^T. One
Triton program per row turns Z into log-probs. In the backward it overwrites Z with its own gradient
G, and two products follow for each chunk:

    dX  = G W
    dW += G^T X        with G_nj = (dloss / dlog p_n / T) (1[j = t_n] - p_nj)

rows.py derives the second factor of G, objective.py the first.

linear_log_probs does not know its upstream gradients in the forward. It computes the logits again
in the backward, which makes four products. linear_loss.py knows the loss and needs three.

PyTorch computes the products. dW is summed in fp32 over the chunks, because bf16 would round the
sum once per chunk. Rows of a chunk are padded to a multiple of 128 bytes, so each row begins where
wide loads may begin. Under autocast, inputs are cast as a linear layer's are. Gradients have the
type of their tensor.

cuBLAS promises its best speed only if the widths of the matrices are multiples of 16 bytes too. In
each of the three products one of them is V. parts() can cut V mod 8 tokens off, which adds a small
product to each large one. Neither way has been measured, so SPLIT is a switch; kernels.bench can
time both.
"""
import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.log_prob import backward_rows, empty_results, forward_rows
from kernels.reference import rows_per_chunk

SPLIT = "whole"  # or "even": see parts


def compute_dtype(hidden, weight):
    """The type in which a linear layer would compute."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def chunk_length(hidden, weight_learns):
    """Tokens in a chunk. All chunks have about the same length."""
    count, hidden_size = hidden.shape
    number = triton.cdiv(count, rows_per_chunk(hidden_size, weight_learns))
    return triton.cdiv(count, max(number, 1))


def parts(vocab):
    """Slices of the vocabulary. Each product is computed once per slice.

    If SPLIT is "even", the last V mod 8 tokens are a slice of their own. It comes first, so that dX
    is rounded to bf16 while it is small, and once more at its end.
    """
    even = vocab - vocab % 8
    if SPLIT == "whole" or even in (0, vocab):
        return [slice(0, vocab)]
    return [slice(even, vocab), slice(0, even)]


def chunks(hidden, weight, weight_learns):
    """Yields (slice of the tokens, their logits [n, V]). All chunks share one buffer."""
    count, vocab = len(hidden), len(weight)
    length = chunk_length(hidden, weight_learns)
    padded_vocab = triton.cdiv(vocab, 64) * 64  # 128 bytes in bf16
    buffer = hidden.new_empty(length, padded_vocab)
    for start in range(0, count, max(length, 1)):
        rows = slice(start, min(start + length, count))
        logits = buffer[:rows.stop - start, :vocab]
        for part in parts(vocab):
            torch.mm(hidden[rows], weight[part].t(), out=logits[:, part])
        yield rows, logits


def add_gradients(gradient, x, w, rows, hidden_gradient, weight_gradient):
    """One chunk's products: dX = G W and dW += G^T X. A gradient that is not needed is empty."""
    vocab = len(w)
    for part in parts(vocab):
        g = gradient[:, part]
        if len(hidden_gradient):
            add_product(hidden_gradient[rows], g, w[part], is_first=part.stop == vocab)
        if len(weight_gradient):
            add_product(weight_gradient[part], g.t(), x[rows], is_first=rows.start == 0)


def add_product(total, a, b, is_first):
    """total += a @ b, in total's type and one pass over it. The first product overwrites total."""
    beta = 0.0 if is_first else 1.0
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:  # on the CPU a product's sum has the type of its factors
        total.addmm_(a.float(), b.float(), beta=beta)


# ---- as operators of PyTorch, which torch.compile does not look into

@torch.library.custom_op("repo::linear_log_probs", mutates_args=())
def linear_op(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, soft_cap: float,
    dtype: torch.dtype, weight_learns: bool, with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropies, maxima, log2 sums). The backward needs the last two."""
    results = empty_results(hidden, target_ids, with_entropy)
    log_probs, entropies, maxima, log2_sums = results
    x, w, target_ids = hidden.to(dtype), weight.to(dtype), target_ids.contiguous()
    for rows, logits in chunks(x, w, weight_learns):
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
    """dX in the compute type and dW in fp32. A gradient that is not needed is empty."""
    gradients = empty_gradients(hidden, weight, dtype, hidden_needs, weight_needs)
    x, w, target_ids = hidden.to(dtype), weight.to(dtype), target_ids.contiguous()
    upstream = upstream.contiguous()
    for rows, logits in chunks(x, w, weight_learns):
        backward_rows(
            logits[None], target_ids[rows], temperature, soft_cap,
            log_probs[rows], maxima[rows], log2_sums[rows], upstream[rows],
            gradient=logits[None],
        )
        add_gradients(logits, x, w, rows, *gradients)
    return gradients


@linear_backward_op.register_fake
def _(upstream, hidden, weight, target_ids, temperature, soft_cap, dtype, weight_learns,
      hidden_needs, weight_needs, log_probs, maxima, log2_sums):
    return empty_gradients(hidden, weight, dtype, hidden_needs, weight_needs)


def empty_gradients(hidden, weight, dtype, hidden_needs, weight_needs):
    """Memory for dX and dW. Without tokens no product is stored in dW, so it starts as zero."""
    hidden_gradient = hidden.new_empty(hidden.shape if hidden_needs else 0, dtype=dtype)
    make = weight.new_empty if hidden.shape[0] > 0 else weight.new_zeros
    return hidden_gradient, make(weight.shape if weight_needs else 0, dtype=torch.float32)


def keep_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # autograd makes no zeros for outputs without a gradient
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
    of_inputs = [
        gradient.to(tensor.dtype) if needed else None
        for gradient, tensor, needed in zip(gradients, (hidden, weight), needs)
    ]
    return *of_inputs, *[None] * 6


linear_op.register_autograd(once_differentiable(backward), setup_context=keep_for_backward)


def linear_log_probs(
    hidden, weight, target_ids, temperature=1.0, return_entropy=False, soft_cap=0.0,
):
    """gather_log_probs(hidden @ weight.T, ...): [N, H], [V, H], [N] -> fp32 [N].

    With return_entropy a pair: the second is each row's entropy, fp32 [N].
    """
    dtype = compute_dtype(hidden, weight)
    weight_learns = weight.requires_grad  # also without gradients: the same chunks as in an update
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs, entropies, _, _ = linear_op(
            hidden, weight, target_ids, float(temperature), float(soft_cap), dtype,
            weight_learns, return_entropy,
        )
    return (log_probs, entropies) if return_entropy else log_probs
