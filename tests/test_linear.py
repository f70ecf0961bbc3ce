# pytest tests/test_linear.py
"""LM head, log-prob and loss in one: both backends against float64, memory and products."""
from collections import Counter

import pytest
import torch
from conftest import exhaustive, grid
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import linear, reference
from kernels.bench import peak_memory

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
CHUNK = 4


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch) -> str:
    """Both, in chunks of 4 tokens."""
    monkeypatch.setattr(linear, "rows_per_chunk", lambda *_: CHUNK)
    monkeypatch.setattr(reference, "rows_per_chunk_on_cpu", lambda *_: CHUNK)
    return request.param


def head(n, v, h=64, dtype=torch.float32, device="cpu", seed=0):
    """hidden, weight, target_ids: logits of about +-1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(device, dtype)
    weight = torch.randn(v, h, generator=generator).to(device, dtype) / h ** 0.5
    return hidden, weight, torch.randint(v, (n,), generator=generator).to(device)


def token_data_around(log_probs, seed=0):
    """old_log_probs around the given ones, advantages, lambdas, token_weight: per token."""
    generator = torch.Generator().manual_seed(seed)
    n = len(log_probs)
    random = [torch.randn(n, generator=generator).to(log_probs.device) for _ in range(5)]
    return [
        log_probs.float() + random[0] * 0.2,
        random[1],
        random[2],
        random[3].abs(),
        random[4].abs() / max(n, 1),
    ]


def token_data(n, device, log_prob=-4.0):
    """The same around one log-prob for all tokens."""
    return [tensor.to(device) for tensor in token_data_around(torch.full((n,), log_prob))]


def in_double(tensors):
    return [tensor.double() for tensor in tensors]


def computed(function, hidden, weight, *arguments, **settings):
    """(loss, log-probs, dX, dW) in float64 on the CPU, for an upstream gradient of 2."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
    loss, log_probs, _ = function(hidden, weight, *arguments, **settings)
    gradients = torch.autograd.grad(2 * loss, (hidden, weight))
    assert [gradient.dtype for gradient in gradients] == [hidden.dtype, weight.dtype]
    return [tensor.detach().cpu().double() for tensor in (loss, log_probs, *gradients)]


def unfused(hidden, weight, target_ids, *per_token, temperature):
    """The plain composition, in the type of its inputs."""
    logits = hidden @ weight.T
    log_probs = kernels.gather_log_probs(logits, target_ids, temperature, backend="reference")
    loss, stats = kernels.repo_loss(log_probs, *per_token, backend="reference")
    return loss, log_probs.detach(), stats


@pytest.mark.parametrize("n, v", grid(
    [0, 1, CHUNK - 1, CHUNK, CHUNK + 1],
    [1, 65, 1000, 32001],
    telling=[(0, 65), (1, 1), (CHUNK, 65), (CHUNK + 1, 1000), (1, 32001)],
))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_composition(device, backend, n, v, dtype):
    check_the_composition(device, backend, n, v, dtype)


@pytest.mark.parametrize("v, dtype", grid(
    [1, 8, 1007, 32001],
    [torch.float32, torch.bfloat16, torch.float16],
    telling=[(1007, torch.float32), (1007, torch.bfloat16)],
))
def test_it_is_the_composition_if_the_last_v_mod_8_have_products_of_their_own(
    device, monkeypatch, v, dtype,
):
    """At a small V the second rounding of dX would show, at 7 of 1007 tokens it does not."""
    monkeypatch.setattr(linear, "rows_per_chunk", lambda *_: CHUNK)
    monkeypatch.setattr(linear, "SPLIT", "even")
    check_the_composition(device, "triton", CHUNK + 1, v, dtype)


def check_the_composition(device, backend, n, v, dtype):
    hidden, weight, targets = head(n, v, dtype=dtype, device=device)
    x, w = hidden.double(), weight.double()
    per_token = token_data_around(kernels.gather_log_probs(x @ w.T, targets, 1.3))

    ours = computed(kernels.linear_repo_loss, hidden, weight, targets, *per_token,
                    temperature=1.3, backend=backend)
    plain = computed(unfused, hidden, weight, targets, *per_token, temperature=1.3)
    exact = computed(unfused, x, w, targets, *in_double(per_token), temperature=1.3)

    names = "loss", "log-probs", "dX", "dW"
    scales = [tensor.norm() for tensor in exact]
    scales[0] = exact[0].abs().clamp(min=0.5)  # w_t sum to about 1, A_t are about 1
    for name, result, other, truth, scale in zip(names, ours, plain, exact, scales):
        assert result.shape == truth.shape
        # a tenth more, because single roundings fall a little better or worse
        error, plain_error = (result - truth).norm(), (other - truth).norm()
        assert error <= 1e-6 * scale + 1.1 * plain_error, (name, error / scale, plain_error / scale)


@pytest.mark.parametrize("n, split", [
    (0, "whole"),
    (1, "whole"),
    (CHUNK, "whole"),
    (3 * CHUNK + 1, "whole"),
    (3 * CHUNK + 1, "even"),
])
def test_log_probs_and_entropies_are_those_of_all_logits(device, backend, monkeypatch, n, split):
    monkeypatch.setattr(linear, "SPLIT", split)
    hidden, weight, targets = head(n, 65, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    log_probs, entropy = kernels.linear_log_probs(
        hidden, weight, targets, 0.7, return_entropy=True, backend=backend,
    )
    logits = hidden.double() @ weight.double().T
    exact_log_probs, exact_entropy = kernels.gather_log_probs(
        logits, targets, 0.7, return_entropy=True, backend="reference",
    )
    assert torch.allclose(log_probs.double(), exact_log_probs, atol=1e-5)
    assert torch.allclose(entropy.double(), exact_entropy, atol=1e-5)
    assert not entropy.requires_grad
    assert log_probs.dtype == torch.float32

    upstream = torch.randn(n, device=device)
    ours = torch.autograd.grad(log_probs, (hidden, weight), upstream)
    exact = torch.autograd.grad(exact_log_probs, (hidden, weight), upstream.double())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, exact))

    with torch.no_grad():
        again = kernels.linear_log_probs(hidden, weight, targets, 0.7, backend=backend)
    assert torch.equal(again, log_probs)


def loss_of(hidden, weight, targets, backend):
    per_token = token_data(len(hidden), hidden.device)
    loss, _, _ = kernels.linear_repo_loss(
        hidden, weight, targets, *per_token, temperature=0.9, backend=backend,
    )
    return loss


@pytest.mark.parametrize("hidden_learns, weight_learns", [
    (True, False),
    (False, True),
    (False, False),
])
def test_a_frozen_head_or_frozen_hidden_states_have_no_gradient_and_change_no_other(
    device, backend, hidden_learns, weight_learns,
):
    hidden, weight, targets = head(2 * CHUNK + 3, 65, device=device)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    (2 * loss_of(x, w, targets, backend)).backward()

    hidden.requires_grad_(hidden_learns)
    weight.requires_grad_(weight_learns)
    loss = loss_of(hidden, weight, targets, backend)
    assert loss.requires_grad == (hidden_learns or weight_learns)
    if loss.requires_grad:
        (2 * loss).backward()
    for tensor, learns, both in ((hidden, hidden_learns, x), (weight, weight_learns, w)):
        assert (tensor.grad is not None) == learns
        assert not learns or torch.allclose(tensor.grad, both.grad)


def test_gradients_accumulate_and_a_kept_graph_gives_them_again(device, backend):
    hidden, weight, targets = head(2 * CHUNK + 3, 65, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    loss = loss_of(hidden, weight, targets, backend)
    loss.backward(retain_graph=True)
    hidden_once, weight_once = hidden.grad.clone(), weight.grad - 1
    (0.3 * loss).backward(retain_graph=True)
    loss.backward()
    assert torch.allclose(hidden.grad, 2.3 * hidden_once, rtol=1e-4)
    assert torch.allclose(weight.grad, 2.3 * weight_once + 1, rtol=1e-4)


def test_the_upstream_gradient_is_not_rounded_to_bf16(device):
    hidden, weight, targets = head(CHUNK, 65, dtype=torch.bfloat16, device=device)
    hidden.requires_grad_()
    loss = loss_of(hidden, weight, targets, "triton")
    whole, = torch.autograd.grad(loss, hidden, retain_graph=True)
    part, = torch.autograd.grad(0.3 * loss, hidden)
    assert torch.equal(part, (0.3 * whole.float()).bfloat16())


def test_same_inputs_same_bits(device, backend):
    inputs = head(2 * CHUNK + 3, 1000, dtype=torch.bfloat16, device=device)
    per_token = token_data(2 * CHUNK + 3, device)
    a, b = (
        computed(kernels.linear_repo_loss, *inputs, *per_token, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32(device):
    hidden, weight, targets = head(CHUNK + 3, 65, device=device)
    rest = targets, *token_data(CHUNK + 3, device)
    function = kernels.linear_repo_loss
    with torch.autocast(device, torch.bfloat16):
        cast = computed(function, hidden, weight, *rest, backend="triton")
    explicit = computed(function, hidden.bfloat16(), weight.bfloat16(), *rest, backend="triton")
    assert torch.equal(cast[0], explicit[0])
    assert torch.equal(cast[1], explicit[1])
    assert torch.allclose(cast[3], explicit[3], rtol=1e-2, atol=1e-6)
    assert not torch.equal(cast[3], explicit[3])  # the sum stays in fp32


def test_autocast_reaches_log_probs_too_and_the_entropy_is_a_tensor_of_its_own(device):
    hidden, weight, targets = head(CHUNK + 3, 65, device=device)
    hidden.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        cast, entropy = kernels.linear_log_probs(
            hidden, weight, targets, return_entropy=True, backend="triton",
        )
    explicit = kernels.linear_log_probs(
        hidden.bfloat16(), weight.bfloat16(), targets, backend="triton",
    )
    assert torch.equal(cast, explicit)

    expected, = torch.autograd.grad(explicit.sum(), hidden)
    entropy.zero_()
    gradient, = torch.autograd.grad((cast * 2).sum(), hidden)
    assert torch.allclose(gradient, 2 * expected, rtol=2e-2, atol=1e-3)


def test_loss_scaling_reaches_fp16(device):
    """Weights of 1 / 8192 and an upstream gradient of 65536, as a loss scaler gives it."""
    hidden, weight, targets = head(2 * CHUNK, 4096, dtype=torch.float16, device=device)
    x, w = hidden.double(), weight.double()
    per_token = token_data_around(kernels.gather_log_probs(x @ w.T, targets, 1.0))
    per_token[4] = torch.full_like(per_token[4], 1 / 8192)

    def gradients(function, hidden, weight, *per_token, **settings):
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
        loss = function(hidden, weight, targets, *per_token, **settings)[0]
        return in_double(torch.autograd.grad(65536 * loss, (hidden, weight)))

    ours = gradients(kernels.linear_repo_loss, hidden, weight, *per_token, backend="triton")
    exact = gradients(unfused, x, w, *in_double(per_token), temperature=1.0)
    assert all((a - b).norm() < 2e-3 * b.norm() for a, b in zip(ours, exact))


def test_a_chunks_rows_are_padded_to_128_bytes():
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(65, 8).bfloat16()
    (rows, logits), = linear.chunks(hidden, weight, weight_learns=True)
    assert rows == slice(0, 3)
    assert logits.shape == (3, 65) and logits.stride() == (128, 1)


def test_stats_are_those_of_the_loss(device, backend):
    inputs = head(2 * CHUNK + 3, 65, device=device)
    per_token = token_data(2 * CHUNK + 3, device)
    _, log_probs, stats = kernels.linear_repo_loss(*inputs, *per_token, backend=backend)
    assert not log_probs.requires_grad
    _, expected = kernels.repo_loss(log_probs, *per_token, backend=backend)
    assert stats.keys() == expected.keys()
    assert all(torch.allclose(stats[key], expected[key]) for key in stats)


PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_


class Watch(TorchDispatchMode):
    """Counts matrix products and the operations that write a tensor of a shape, and notes the
    bytes of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.products = self.largest = 0
        self.written = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "repo":  # one of our operators: watch its body
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in PRODUCTS
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
            if not function.is_view and "empty" not in function.name():
                self.written[tuple(result.shape)] += 1
        return result


def watched(function, hidden, weight, *arguments, **settings):
    """One forward and backward under the watch."""
    hidden.requires_grad_()
    weight.requires_grad_()
    with Watch() as watch:
        function(hidden, weight, *arguments, **settings)[0].backward()
    return watch


def log_probs_sum(*arguments, **settings):
    return [kernels.linear_log_probs(*arguments, **settings).sum()]


@pytest.mark.parametrize("split, v, slices", [("whole", 65, 1), ("even", 65, 2), ("even", 64, 1)])
def test_three_products_per_chunk_where_the_loss_is_known(device, monkeypatch, split, v, slices):
    monkeypatch.setattr(linear, "rows_per_chunk", lambda *_: CHUNK)
    monkeypatch.setattr(linear, "SPLIT", split)
    hidden, weight, targets = head(3 * CHUNK + 1, v, device=device)  # 4 chunks
    rest = targets, *token_data(3 * CHUNK + 1, device)
    watch = watched(kernels.linear_repo_loss, hidden, weight, *rest, backend="triton")
    assert watch.products == 3 * 4 * slices

    with Watch() as watch:  # a frozen head costs no third product
        loss = kernels.linear_repo_loss(hidden, weight.detach(), *rest, backend="triton")[0]
        loss.backward()
    assert watch.products == 2 * 4 * slices

    with torch.no_grad(), Watch() as watch:
        kernels.linear_repo_loss(hidden, weight, *rest, backend="triton")
    assert watch.products == 4 * slices


@pytest.mark.parametrize("chunks", [1, exhaustive(2), 4])
def test_a_heads_gradient_is_written_once_per_chunk(device, monkeypatch, chunks):
    """Nothing clears it before. The loss writes it once more, scaled by the upstream gradient."""
    monkeypatch.setattr(linear, "rows_per_chunk", lambda *_: CHUNK)
    hidden, weight, targets = head(chunks * CHUNK, 65, 24, device=device)
    per_token = token_data(chunks * CHUNK, device)
    watch = watched(log_probs_sum, hidden, weight, targets, backend="triton")
    assert watch.written[65, 24] == chunks
    weight.grad = None
    watch = watched(
        kernels.linear_repo_loss, hidden, weight, targets, *per_token, backend="triton",
    )
    assert watch.written[65, 24] == chunks + 1


def test_chunks_are_larger_where_the_head_learns_but_not_than_its_gradient():
    """By hand: n <= 2 H, from 1,024 to 4,096, and chunks of about the same length."""
    lengths = [linear.chunk_length(torch.empty(n, h, device="meta"), learns)
               for n, h, learns in [(8192, 4096, True), (8192, 1536, True), (8192, 64, True),
                                    (8192, 4096, False), (4200, 4096, True), (5, 4096, True),
                                    (0, 64, True)]]
    assert lengths == [4096, 2731, 1024, 1024, 2100, 5, 0]


def test_four_products_per_chunk_without_a_known_loss(device, backend):
    hidden, weight, targets = head(3 * CHUNK + 1, 65, device=device)
    assert watched(log_probs_sum, hidden, weight, targets, backend=backend).products == 4 * 4
    with torch.no_grad(), Watch() as watch:
        kernels.linear_log_probs(hidden, weight, targets, backend=backend)
    assert watch.products == 4


def test_an_update_on_the_cpu_takes_less_than_a_quarter_of_the_memory_of_all_logits():
    n, v = 2048, 16001
    hidden, weight, targets = head(n, v)
    rest = targets, *token_data_around(torch.full((n,), -10.0))

    def update(function, **settings):
        hidden.requires_grad_()
        weight.requires_grad_()
        function(hidden, weight, *rest, **settings)[0].backward()

    logits = 4 * n * v
    assert peak_memory(lambda: update(kernels.linear_repo_loss, backend="reference")) < logits / 4
    # the measure does see logits where there are any
    assert peak_memory(lambda: update(unfused, temperature=1.0)) > 2 * logits


def test_no_storage_of_all_logits_in_the_kernels_path(device, monkeypatch):
    monkeypatch.setattr(linear, "rows_per_chunk", lambda *_: 8)
    n, v = 32, 4099
    hidden, weight, targets = head(n, v, 16, device=device)
    rest = targets, *token_data(n, device, log_prob=-8.0)
    watch = watched(kernels.linear_repo_loss, hidden, weight, *rest, backend="triton")
    assert watch.largest <= weight.nbytes + 4 * 64 * 8 < n * v * 4  # the chunk's buffer is smaller
