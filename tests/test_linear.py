# pytest tests/test_linear.py
"""LM head, log-prob and loss in one: both backends against float64; memory, number of products, and what autograd asks of it."""
import sys

import pytest
import torch

import kernels
from kernels.bench import peak_memory
from tiny_configs.plan import Alive

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
CHUNK = 8


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch) -> str:
    """Both, with chunks of 8 tokens (of 65 logits): the interpreter takes its time for each."""
    monkeypatch.setattr(sys.modules["kernels.linear"], "ROWS_PER_CHUNK", CHUNK)
    monkeypatch.setattr(sys.modules["kernels.reference"], "LOGITS_PER_CHUNK", CHUNK * 65)
    return request.param


def head(n, v, h=64, dtype=torch.float32, device="cpu", seed=0):
    """hidden, weight, target_ids: logits of about +-1."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, h, generator=generator).to(device, dtype) for size in (n, v))
    return hidden, weight / h ** 0.5, torch.randint(v, (n,), generator=generator).to(device)


def tokens_near(log_probs, seed=0):
    """old_log_probs around the given ones, advantages, penalty, token_weight."""
    generator = torch.Generator().manual_seed(seed)
    n = len(log_probs)
    random = [torch.randn(n, generator=generator).to(log_probs.device) for _ in range(5)]
    return [log_probs.float() + random[0] * 0.2, random[1], random[2], random[3].abs(), random[4].abs() / max(n, 1)]


def computed(function, hidden, weight, *arguments, **settings):
    """(loss, log-probs, dX, dW) in float64 on the CPU, with an upstream factor of 2, which rounds nothing."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
    loss, log_probs, _ = function(hidden, weight, *arguments, **settings)
    gradients = torch.autograd.grad(2 * loss, (hidden, weight))
    assert [gradient.dtype for gradient in gradients] == [hidden.dtype, weight.dtype]
    return [tensor.detach().cpu().double() for tensor in (loss, log_probs, *gradients)]


def unfused(hidden, weight, target_ids, *tokens, temperature):
    """The plain composition, in the type of its inputs."""
    log_probs = kernels.gather_log_probs(hidden @ weight.T, target_ids, temperature, backend="reference")
    loss, stats = kernels.repo_loss(log_probs, *tokens, backend="reference")
    return loss, log_probs.detach(), stats


@pytest.mark.parametrize("v", [1, 65, 1000, 32001])
@pytest.mark.parametrize("n", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_composition(device, backend, n, v, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.reference"], "LOGITS_PER_CHUNK", CHUNK * v)
    hidden, weight, targets = head(n, v, dtype=dtype, device=device)
    double = hidden.double(), weight.double(), targets
    tokens = tokens_near(kernels.gather_log_probs(double[0] @ double[1].T, targets, 1.3))
    ours = computed(kernels.linear_repo_loss, hidden, weight, targets, *tokens, temperature=1.3, backend=backend)
    plain = computed(unfused, hidden, weight, targets, *tokens, temperature=1.3)
    exact = computed(unfused, *double, *[tensor.double() for tensor in tokens], temperature=1.3)
    scales = [exact[0].abs().clamp(min=0.5), *(tensor.norm() for tensor in exact[1:])]  # w_t sum to about 1, A_t are about 1
    for name, result, other, truth, scale in zip(("loss", "log-probs", "dX", "dW"), ours, plain, exact, scales):
        assert result.shape == truth.shape
        # a tenth more, for luck in rounding: the same number of roundings falls a little better or worse
        error, plain_error = (result - truth).norm(), (other - truth).norm()
        assert error <= 1e-6 * scale + 1.1 * plain_error, (name, error / scale, plain_error / scale)


@pytest.mark.parametrize("n", [0, 1, CHUNK, 3 * CHUNK + 1])
def test_log_probs_and_entropies_are_those_of_all_logits(device, backend, n):
    hidden, weight, targets = head(n, 65, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    log_probs, entropy = kernels.linear_log_probs(hidden, weight, targets, 0.7, return_entropy=True, backend=backend)
    whole = kernels.gather_log_probs(hidden.double() @ weight.double().T, targets, 0.7, return_entropy=True, backend="reference")
    upstream = torch.randn(n, device=device)
    assert torch.allclose(log_probs.double(), whole[0], atol=1e-5) and torch.allclose(entropy.double(), whole[1], atol=1e-5)
    assert not entropy.requires_grad and log_probs.dtype == torch.float32
    for ours, exact in zip(torch.autograd.grad(log_probs, (hidden, weight), upstream), torch.autograd.grad(whole[0], (hidden, weight), upstream.double())):
        assert torch.allclose(ours, exact, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(kernels.linear_log_probs(hidden, weight, targets, 0.7, backend=backend), log_probs)


def loss_of(hidden, weight, targets, backend, n=2 * CHUNK + 3):
    tokens = [tensor.to(hidden.device) for tensor in tokens_near(torch.full((n,), -4.0))]
    return kernels.linear_repo_loss(hidden, weight, targets, *tokens, temperature=0.9, backend=backend)[0]


@pytest.mark.parametrize("learns", [(True, False), (False, True), (False, False)])
def test_a_frozen_head_or_frozen_hidden_states_have_no_gradient_and_change_no_other(device, backend, learns):
    hidden, weight, targets = head(2 * CHUNK + 3, 65, device=device)
    both = computed(lambda *a: (loss_of(*a, backend), hidden[:, 0], None), hidden, weight, targets)[2:]
    hidden.requires_grad_(learns[0])
    weight.requires_grad_(learns[1])
    loss = loss_of(hidden, weight, targets, backend)
    assert loss.requires_grad == any(learns)
    if any(learns):
        (2 * loss).backward()
    for tensor, does, gradient in zip((hidden, weight), learns, both):
        assert (tensor.grad is not None) == does and (not does or torch.allclose(tensor.grad.cpu().double(), gradient))


def test_existing_gradients_are_added_to_and_a_kept_graph_gives_the_same_again(device, backend):
    hidden, weight, targets = head(2 * CHUNK + 3, 65, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    loss = loss_of(hidden, weight, targets, backend)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad - 1
    (0.3 * loss).backward(retain_graph=True)
    loss.backward()
    assert torch.allclose(hidden.grad, 2.3 * once[0], rtol=1e-4) and torch.allclose(weight.grad, 2.3 * once[1] + 1, rtol=1e-4)


def test_tied_embeddings_get_both_gradients(device, backend):
    """The hidden states come out of the same matrix: its gradient is the sum of both uses."""
    _, weight, targets = head(2 * CHUNK + 3, 65, device=device)
    ids = targets.flip(0)
    separate = [weight.clone().requires_grad_() for _ in range(2)]
    loss_of(separate[0][ids].tanh(), separate[1], targets, backend).backward()
    weight.requires_grad_()
    loss_of(weight[ids].tanh(), weight, targets, backend).backward()
    assert torch.allclose(weight.grad, separate[0].grad + separate[1].grad, atol=1e-6)


def test_same_inputs_same_bits(device, backend):
    hidden, weight, targets = head(2 * CHUNK + 3, 1000, dtype=torch.bfloat16, device=device)
    tokens = [tensor.to(device) for tensor in tokens_near(torch.full((len(hidden),), -4.0))]
    a, b = (computed(kernels.linear_repo_loss, hidden, weight, targets, *tokens, backend=backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32(device):
    hidden, weight, targets = head(CHUNK + 3, 65, device=device)
    tokens = [tensor.to(device) for tensor in tokens_near(torch.full((len(hidden),), -4.0))]
    with torch.autocast(device, torch.bfloat16):
        cast = computed(kernels.linear_repo_loss, hidden, weight, targets, *tokens, backend="triton")
    explicit = computed(kernels.linear_repo_loss, hidden.bfloat16(), weight.bfloat16(), targets, *tokens, backend="triton")
    assert torch.equal(cast[0], explicit[0]) and torch.equal(cast[1], explicit[1])
    assert torch.allclose(cast[3], explicit[3], rtol=1e-2, atol=1e-6) and not torch.equal(cast[3], explicit[3])  # the sum stays in fp32


def test_autocast_reaches_log_probs_too_and_the_entropy_is_a_tensor_of_its_own(device):
    hidden, weight, targets = head(CHUNK + 3, 65, device=device)
    hidden.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        cast, entropy = kernels.linear_log_probs(hidden, weight, targets, return_entropy=True, backend="triton")
    explicit = kernels.linear_log_probs(hidden.bfloat16(), weight.bfloat16(), targets, backend="triton")
    assert torch.equal(cast, explicit)
    expected, = torch.autograd.grad(explicit.sum(), hidden)
    entropy.zero_()
    cast = cast * 2
    assert torch.allclose(torch.autograd.grad(cast.sum(), hidden)[0], 2 * expected, rtol=2e-2, atol=1e-3)


def test_loss_scaling_reaches_fp16(device):
    """Weights of 1 / 8192 and an upstream factor of 65536: the gradient is as good as that of plain fp16 with the same factor."""
    hidden, weight, targets = head(CHUNK, 4096, dtype=torch.float16, device=device)
    tokens = tokens_near(kernels.gather_log_probs(hidden.double() @ weight.double().T, targets, 1.0))
    tokens[4] = torch.full_like(tokens[4], 1 / 8192)
    def gradients(function, hidden, weight, *some, **settings):
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
        found = torch.autograd.grad(65536 * function(hidden, weight, targets, *some, **settings)[0], (hidden, weight))
        return [gradient.double() for gradient in found]
    ours = gradients(kernels.linear_repo_loss, hidden, weight, *tokens, backend="triton")
    exact = gradients(unfused, hidden.double(), weight.double(), *[tensor.double() for tensor in tokens], temperature=1.0)
    assert all((a - b).norm() < 2e-3 * b.norm() for a, b in zip(ours, exact))


def test_a_chunks_rows_are_padded_to_128_bytes():
    linear = sys.modules["kernels.linear"]
    rows, logits = next(linear.chunks(torch.randn(3, 8).bfloat16(), torch.randn(65, 8).bfloat16()))
    assert rows == slice(0, 3) and logits.shape == (3, 65) and logits.stride() == (128, 1)


def test_stats_are_those_of_the_loss(device, backend):
    hidden, weight, targets = head(2 * CHUNK + 3, 65, device=device)
    tokens = [tensor.to(device) for tensor in tokens_near(torch.full((len(hidden),), -4.0))]
    _, log_probs, stats = kernels.linear_repo_loss(hidden, weight, targets, *tokens, backend=backend)
    _, expected = kernels.repo_loss(log_probs, *tokens, backend=backend)
    assert not log_probs.requires_grad and stats.keys() == expected.keys() and all(torch.allclose(stats[key], expected[key]) for key in stats)


class Watch(Alive):
    """Matrix products too."""

    def __init__(self, known=()):
        super().__init__(known)
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return super().__torch_dispatch__(function, types, args, kwargs)


def watched(function, hidden, weight, *arguments, **settings):
    """One forward and backward under the watch; what existed before does not count."""
    hidden.requires_grad_()
    weight.requires_grad_()
    with Watch((hidden, weight, *arguments)) as watch:
        function(hidden, weight, *arguments, **settings)[0].backward()
    return watch


def test_three_products_per_chunk_and_four_without_a_known_loss(device, backend):
    hidden, weight, targets = head(3 * CHUNK + 1, 65, device=device)
    tokens = [tensor.to(device) for tensor in tokens_near(torch.full((len(hidden),), -4.0))]
    if backend == "triton":
        assert watched(kernels.linear_repo_loss, hidden, weight, targets, *tokens, backend=backend).products == 3 * 4
        with Watch() as watch:  # a frozen head costs no third product
            kernels.linear_repo_loss(hidden, weight.detach(), targets, *tokens, backend=backend)[0].backward()
        assert watch.products == 2 * 4
        with torch.no_grad(), Watch() as watch:
            kernels.linear_repo_loss(hidden, weight, targets, *tokens, backend=backend)
        assert watch.products == 4
    log_probs = watched(lambda *a, **s: [kernels.linear_log_probs(*a, **s).sum()], hidden, weight, targets, backend=backend)
    assert log_probs.products == 4 * 4
    with torch.no_grad(), Watch() as watch:
        kernels.linear_log_probs(hidden, weight, targets, backend=backend)
    assert watch.products == 4


def test_all_logits_never_exist_and_an_update_takes_less_than_a_quarter_of_their_memory(capsys):
    """On the CPU's own path, by PyTorch's allocator: N = 2048 tokens, V = 32001, H = 64."""
    n, v = 2048, 32001
    hidden, weight, targets = head(n, v)
    tokens = tokens_near(torch.full((n,), -10.0))

    def update(function, **settings):
        function(hidden.requires_grad_(), weight.requires_grad_(), targets, *tokens, **settings)[0].backward()
    logits, peak = 4 * n * v, peak_memory(lambda: update(kernels.linear_repo_loss, backend="reference"))
    largest = watched(kernels.linear_repo_loss, hidden, weight, targets, *tokens, backend="reference").largest
    with capsys.disabled():
        print(f"\n  an update at N = {n}, V = {v}, H = 64: peak {peak / 2 ** 20:.1f} MiB, largest tensor {largest / 2 ** 20:.1f} MiB; "
              f"the fp32 logits alone {logits / 2 ** 20:.1f} MiB")
    assert weight.nbytes <= largest < peak < logits / 4
    assert peak_memory(lambda: update(unfused, temperature=1.0)) > 2 * logits  # the measure does see logits where there are any


def test_no_storage_of_all_logits_in_the_kernels_path(device, monkeypatch):
    n, v = 64, 4099
    hidden, weight, targets = head(n, v, 16, device=device)
    monkeypatch.setattr(sys.modules["kernels.linear"], "ROWS_PER_CHUNK", 8)
    tokens = [tensor.to(device) for tensor in tokens_near(torch.full((n,), -8.0))]
    watch = watched(kernels.linear_repo_loss, hidden, weight, targets, *tokens, backend="triton")
    assert watch.largest <= weight.nbytes + 4 * 64 * 8 < n * v * 4  # dW, no more; the chunk's buffer is smaller
