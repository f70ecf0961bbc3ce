# pytest tests/test_log_prob.py
"""The Triton log-prob gather against float64, in the interpreter and, where there is one, on a GPU."""
import itertools
import math

import pytest
import torch

import kernels
from kernels.log_prob import like_rows_of

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's word for a sum that is still empty: exp(-inf) = 0


def random_rows(shape, dtype=torch.float32, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator), torch.randn(shape[:-1], generator=generator)


def exact(logits, targets, upstream, temperature):
    """(log-probs, gradient, entropy) by torch's own log_softmax in float64."""
    logits = logits.detach().cpu().double().requires_grad_()
    log_softmax = torch.log_softmax(logits / temperature, -1)
    log_probs = log_softmax.gather(-1, targets.cpu().long().unsqueeze(-1)).squeeze(-1)
    log_probs.backward(upstream.cpu().double())
    return log_probs.detach(), logits.grad, torch.special.entr(log_softmax.detach().exp()).sum(-1)


def computed(logits, targets, upstream, temperature, backend):
    logits = logits.detach().requires_grad_()
    log_probs, entropy = kernels.gather_log_probs(logits, targets, temperature, return_entropy=True, backend=backend)
    return log_probs.detach(), torch.autograd.grad(log_probs, logits, upstream)[0], entropy


def check(logits, targets, upstream, temperature, device):
    """Errors against float64 no larger than plain PyTorch's at the same precision, plus a small tolerance."""
    logits, targets, upstream = logits.to(device), targets.to(device), upstream.to(device)
    unchanged = logits.clone()
    ours, plain = (computed(logits, targets, upstream, temperature, backend) for backend in ("triton", "reference"))
    assert torch.equal(logits, unchanged)
    assert ours[0].dtype == ours[2].dtype == torch.float32 and ours[1].dtype == logits.dtype
    for what, result, other, truth in zip(("log-probs", "gradient", "entropy"), ours, plain, exact(logits, targets, upstream, temperature)):
        assert result.shape == truth.shape
        error, plain_error = ((tensor.cpu().double() - truth).abs() for tensor in (result, other))
        tolerance = 4 * torch.finfo(torch.float32).eps * max(truth.abs().amax().item() if truth.numel() else 0, 1)
        assert (error <= plain_error.amax() + tolerance).all() if truth.numel() else True, (what, error.amax(), plain_error.amax(), tolerance)
    return ours


@pytest.mark.parametrize("v", [1, 2, 63, 64, 65, 1000, 32001])
@pytest.mark.parametrize("n", [0, 1, 7, 33])
@pytest.mark.parametrize("dtype, temperature", [*((dtype, t) for dtype in (torch.float32, torch.bfloat16) for t in (0.7, 1.0, 1.3)), (torch.float16, 0.7)])
def test_values_gradients_and_entropies_at_odd_sizes(device, n, v, dtype, temperature):
    check(*random_rows((n, v), dtype), temperature, device)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("v", [2, 65, 1000])
def test_logits_of_ten_thousand(device, v, temperature):
    logits, targets, upstream = random_rows((7, v))
    check(logits.sign() * 1e4 + logits, targets, upstream, temperature, device)
    check(torch.linspace(-1e4, 1e4, v).repeat(7, 1), targets, upstream, temperature, device)
    # shifted by a number that fp32 adds exactly, the result may not move: a large common part is taken off before anything is rounded
    near, shift = (logits * 256).round() / 256, 2.0 ** 13
    a, b = (computed((near + x).to(device), targets.to(device), upstream.to(device), temperature, "triton") for x in (0.0, shift))
    assert all(torch.allclose(x, y, atol=2e-6) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_all_but_certain(device, dtype):
    logits = torch.zeros(2, 65, dtype=dtype)
    logits[:, 40] = math.log(64 * 1e7)  # p = 1 - 1e-7 (bf16: about that)
    log_probs, gradient, _ = check(logits, torch.tensor([40, 3]), torch.ones(2), 1.0, device)
    assert -3e-7 < log_probs[0] <= 0 and 0 <= gradient[0, 40] < 3e-7
    logits[:, 40] = 9.0  # 1 - p = 0.8 %: a p rounded to bf16 first would make it 0.8 or 0.4 %
    gradient = computed(logits.to(device), torch.tensor([40, 3], device=device), torch.ones(2, device=device), 1.0, "triton")[1]
    one_minus_p = 64 / (64 + math.e ** 9)
    assert gradient[0, 40].item() == pytest.approx(one_minus_p, rel=1e-2)


def test_hand_computed(device):
    logits = torch.tensor([[0.0, 3 * math.log(3)], [5.0, 5.0]], device=device)  # odds of 1 to 3 at temperature 3, and of 1 to 1
    log_probs, gradient, entropy = computed(logits, torch.tensor([1, 0], device=device), torch.tensor([1.0, 6.0], device=device), 3.0, "triton")
    assert log_probs.tolist() == pytest.approx([math.log(0.75), math.log(0.5)], abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-0.25 / 3, 0.25 / 3, 1.0, -1.0], abs=1e-6)
    assert entropy.tolist() == pytest.approx([0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2)], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", range(9))
def test_rows_that_begin_anywhere(device, dtype, first):
    base, targets, upstream = random_rows((3, 5200), dtype)  # one whole tile and a part of one in bf16, two in fp32
    logits = base.flatten()[first:first + 3 * 5000].view(3, 5000)
    gradient = check(logits, targets.clamp(max=4999), upstream, 0.7, device)[1]
    assert gradient.float().sum(-1).abs().amax() < 2e-2  # softmax's gradient sums to 0 over the row


@pytest.mark.parametrize("view", [
    lambda x: x[:, :-1], lambda x: x[:, 1:, 3:-2], lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., ::2], lambda x: x[0].t(),
    lambda x: x[0], lambda x: x[0, 0], lambda x: x[:1].expand(3, -1, -1), lambda x: x.unflatten(0, (2, 2)), lambda x: x.unflatten(0, (2, 2)).transpose(0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_dimensions_of_any_kind(device, view, dtype):
    logits = view(random_rows((4, 5, 35), dtype)[0].to(device))
    check(logits, *random_rows(logits.shape, dtype)[1:], 1.3, device)


def test_the_gradients_rows_lie_as_the_logits_rows_do():
    """16-byte stores fault on an address that is no multiple of 16: where a row of logits lies, its gradient's row must lie too, and rows may not overlap."""
    for dtype, view in itertools.product([torch.float32, torch.bfloat16], [lambda x: x, lambda x: x[:, 1:, 3:-2], lambda x: x[:, :-1], lambda x: x[..., :96]]):
        logits = view(torch.zeros(3, 5, 101, dtype=dtype))
        gradient = like_rows_of(logits)
        assert gradient.shape == logits.shape and gradient.stride(2) == 1
        rows = [gradient[i, j] for i, j in itertools.product(*map(range, logits.shape[:2]))]
        assert [row.data_ptr() % 16 for row in rows] == [logits[i, j].data_ptr() % 16 for i, j in itertools.product(*map(range, logits.shape[:2]))]
        assert all(b.data_ptr() - a.data_ptr() >= logits.shape[2] * logits.element_size() for a, b in itertools.pairwise(rows))
    assert like_rows_of(torch.zeros(3, 5, 101)).is_contiguous()


def test_the_gradient_of_a_slice_reaches_its_whole(device):
    logits, targets, upstream = (tensor.to(device) for tensor in random_rows((2, 4, 33)))
    logits.requires_grad_()
    ours, plain = (torch.autograd.grad(kernels.gather_log_probs(logits[:, :-1], targets[:, 1:], backend=backend), logits, upstream[:, 1:])[0]
                   for backend in ("triton", "reference"))
    assert torch.allclose(ours, plain, atol=1e-6) and not ours[:, -1].any()


def test_a_vocabulary_of_none_without_tokens(device):
    assert kernels.gather_log_probs(torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.long, device=device), backend="triton").shape == (0,)


def test_targets_of_32_bits_and_upstream_of_stride_0(device):
    logits, targets, _ = random_rows((7, 100))
    logits = logits.to(device).requires_grad_()
    log_probs = kernels.gather_log_probs(logits, targets.int().to(device), backend="triton")
    log_probs.sum().backward()  # sum's upstream is one number, expanded
    truth = exact(logits, targets, torch.ones(7), 1.0)
    assert torch.allclose(log_probs.cpu().double(), truth[0], atol=1e-5) and torch.allclose(logits.grad.cpu().double(), truth[1], atol=1e-6)


def test_backward_twice_and_retained(device):
    logits, targets, upstream = (tensor.to(device) for tensor in random_rows((5, 1000), torch.bfloat16))
    logits.requires_grad_()
    log_probs = kernels.gather_log_probs(logits, targets, 0.7, backend="triton")
    first, = torch.autograd.grad(log_probs, logits, upstream, retain_graph=True)
    second, = torch.autograd.grad(log_probs, logits, upstream)
    assert torch.equal(first, second)


def test_same_inputs_same_bits(device):
    inputs = [tensor.to(device) for tensor in random_rows((33, 5000), torch.bfloat16)]
    a, b = (computed(*inputs, 0.7, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_forbidden_tokens_and_what_is_no_token(device):
    logits, targets, upstream = random_rows((4, 1000))
    logits[:, 5:900] = float("-inf")  # generation's way to forbid a token
    log_probs, gradient, entropy = check(logits, targets.fill_(2), upstream, 1.0, device)
    assert not gradient[:, 5:900].any() and torch.isfinite(entropy).all()
    targets = torch.tensor([1000, -1, -100, 999], device=device)  # outside the vocabulary: no log-prob of another token, no memory of another row
    assert torch.equal(kernels.gather_log_probs(logits.to(device), targets, backend="triton").isnan().cpu(), torch.tensor([True, True, True, False]))
    logits[2, 7] = float("nan")
    assert kernels.gather_log_probs(logits.to(device), targets.fill_(1), backend="triton").isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("forbidden", [torch.finfo(torch.float32).min, -1e38, -1e9, float("-inf")])
def test_any_way_to_forbid_tokens_leaves_the_entropy_of_the_others(device, forbidden):
    logits, targets, upstream = random_rows((4, 5000))
    logits[:, 7:4900] = forbidden
    check(logits, targets.fill_(2), upstream, 1.0, device)


def test_more_than_two_to_the_31_logits(device):
    """Rows 2^31 logits apart: in 32 bits the second one would be the first, or nothing at all. The memory between is never touched."""
    v = 1000
    storage = torch.empty(2 ** 31 + 8 * v, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, v), (2 ** 30 + 1, 1))
    values, targets, upstream = random_rows((3, v), torch.bfloat16)
    logits.copy_(values)
    check(logits, targets, upstream, 1.0, device)


@pytest.mark.cuda
def test_no_compilation_when_sizes_and_temperature_change():
    from kernels import log_prob
    def compiled():
        return sum(len(cache[0]) for kernel in (log_prob.forward_kernel, log_prob.backward_kernel) for cache in kernel.device_caches.values())
    def use(n, v, temperature):
        logits = torch.randn(n, v, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        kernels.gather_log_probs(logits, torch.zeros(n, dtype=torch.long, device="cuda"), temperature).sum().backward()
    use(5, 1000, 0.7)
    before = compiled()
    for n, v, temperature in ((1, 1, 1.0), (16, 16, 1), (33, 32001, 1.3), (64, 4096, 2), (1025, 33, 1), (1026, 33, 1)):
        use(n, v, temperature)
    logits = torch.randn(4, 65, 77, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    kernels.gather_log_probs(logits[:, 1:, 3:], torch.zeros(4, 64, dtype=torch.long, device="cuda")).sum().backward()
    for n in (1024, 1025, 1026):
        hidden, weight, targets = torch.randn(n, 8, dtype=torch.bfloat16, device="cuda"), torch.randn(33, 8, dtype=torch.bfloat16, device="cuda"), torch.zeros(n, dtype=torch.long, device="cuda")
        kernels.linear_log_probs(hidden, weight, targets)
    assert compiled() == before
