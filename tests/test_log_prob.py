# pytest tests/test_log_prob.py
"""gather_log_probs against float64: Triton in the interpreter or on a GPU, and the reference."""
import itertools
import math

import pytest
import torch
from conftest import exhaustive, grid

import kernels
from kernels import log_prob
from kernels.log_prob import like_rows_of

# numpy's word for a sum that is still empty: exp(-inf) = 0
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


def random_rows(shape, dtype=torch.float32, scale=4.0, seed=0):
    """logits, targets and the upstream gradients of their log-probs."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    upstream = torch.randn(shape[:-1], generator=generator)
    return logits, targets, upstream


def exact(logits, targets, upstream, temperature):
    """(log-probs, gradient, entropy) by PyTorch's log_softmax in float64."""
    logits = logits.detach().cpu().double().requires_grad_()
    log_softmax = torch.log_softmax(logits / temperature, -1)
    log_probs = log_softmax.gather(-1, targets.cpu().long().unsqueeze(-1)).squeeze(-1)
    log_probs.backward(upstream.cpu().double())
    entropy = torch.special.entr(log_softmax.detach().exp()).sum(-1)
    return log_probs.detach(), logits.grad, entropy


def computed(logits, targets, upstream, temperature, backend):
    """(log-probs, gradient, entropy) by ours."""
    logits = logits.detach().requires_grad_()
    log_probs, entropy = kernels.gather_log_probs(
        logits, targets, temperature, return_entropy=True, backend=backend,
    )
    gradient, = torch.autograd.grad(log_probs, logits, upstream)
    return log_probs.detach(), gradient, entropy


def check(logits, targets, upstream, temperature, device):
    """The reference is near float64, and Triton no further from it than the reference.

    Returns what `computed` does by Triton.
    """
    inputs = logits.to(device), targets.to(device), upstream.to(device)
    unchanged = inputs[0].clone()
    ours = computed(*inputs, temperature, "triton")
    plain = computed(*inputs, temperature, "reference")
    assert torch.equal(inputs[0], unchanged)

    names = "log-probs", "gradient", "entropy"
    truths = exact(*inputs, temperature)
    for name, result, other, truth in zip(names, ours, plain, truths):
        assert result.shape == other.shape == truth.shape
        dtype = logits.dtype if name == "gradient" else torch.float32
        assert result.dtype == other.dtype == dtype
        if not truth.numel():
            continue
        error = (result.cpu().double() - truth).abs()
        plain_error = (other.cpu().double() - truth).abs().amax()
        scale = max(truth.abs().amax().item(), 1)
        largest = max(scale, logits.abs().amax().item())  # the reference loses these digits
        assert plain_error <= 8 * torch.finfo(dtype).eps * largest, (name, plain_error)
        tolerance = 4 * torch.finfo(torch.float32).eps * scale
        assert (error <= plain_error + tolerance).all(), (
            name, error.amax(), plain_error, tolerance,
        )
    return ours


@pytest.mark.parametrize("n, v", grid(
    [0, 1, 7, 9, 33],
    [1, 2, 63, 64, 65, 1000, 32001],
    telling=[
        (0, 65),
        (1, 1),
        (1, 64),     # whole groups alone
        (9, 65),     # a head and a tail
        (7, 32001),  # whole tiles, and rows that begin anywhere
    ],
))
@pytest.mark.parametrize("dtype, temperature", [
    (torch.float32, 0.7),
    exhaustive(torch.float32, 1.0),
    exhaustive(torch.bfloat16, 1.0),
    (torch.bfloat16, 1.3),
    (torch.float16, 0.7),
])
def test_values_gradients_and_entropies_at_odd_sizes(device, n, v, dtype, temperature):
    check(*random_rows((n, v), dtype), temperature, device)


@pytest.mark.parametrize("v, temperature", grid(
    [2, 65, 1000],
    [0.7, 1.0, 1.3],
    telling=[(2, 0.7), (1000, 1.3)],
))
def test_logits_of_ten_thousand(device, v, temperature):
    logits, targets, upstream = random_rows((7, v))
    check(logits.sign() * 1e4 + logits, targets, upstream, temperature, device)
    check(torch.linspace(-1e4, 1e4, v).repeat(7, 1), targets, upstream, temperature, device)

    # a number that fp32 adds exactly to all logits changes nothing
    near = (logits * 256).round() / 256
    near, targets, upstream = near.to(device), targets.to(device), upstream.to(device)
    a = computed(near, targets, upstream, temperature, "triton")
    b = computed(near + 2.0 ** 13, targets, upstream, temperature, "triton")
    assert all(torch.allclose(x, y, atol=2e-6) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_all_but_certain(device, dtype):
    logits = torch.zeros(2, 65, dtype=dtype)
    targets, upstream = torch.tensor([40, 3]), torch.ones(2)
    logits[:, 40] = math.log(64 * 1e7)  # p = 1 - 1e-7 (bf16: about that)
    log_probs, gradient, _ = check(logits, targets, upstream, 1.0, device)
    assert -3e-7 < log_probs[0] <= 0
    assert 0 <= gradient[0, 40] < 3e-7

    logits[:, 40] = 9.0  # 1 - p = 0.8 %: a p rounded to bf16 first would make it 0.8 or 0.4 %
    inputs = logits.to(device), targets.to(device), upstream.to(device)
    _, gradient, _ = computed(*inputs, 1.0, "triton")
    one_minus_p = 64 / (64 + math.e ** 9)
    assert gradient[0, 40].item() == pytest.approx(one_minus_p, rel=1e-2)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_hand_computed(device, backend):
    # odds of 1 to 3 at temperature 3, and of 1 to 1
    logits = torch.tensor([[0.0, 3 * math.log(3)], [5.0, 5.0]], device=device)
    targets = torch.tensor([1, 0], device=device)
    upstream = torch.tensor([1.0, 6.0], device=device)
    log_probs, gradient, entropy = computed(logits, targets, upstream, 3.0, backend)
    assert log_probs.tolist() == pytest.approx([math.log(0.75), math.log(0.5)], abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-0.25 / 3, 0.25 / 3, 1.0, -1.0], abs=1e-6)
    entropies = [0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2)]
    assert entropy.tolist() == pytest.approx(entropies, abs=1e-6)


@pytest.mark.parametrize("dtype, first", grid(
    [torch.float32, torch.bfloat16],
    range(9),
    telling=[(torch.float32, 1), (torch.float32, 3), *((torch.bfloat16, n) for n in (0, 1, 3, 6))],
))
def test_rows_that_begin_anywhere(device, dtype, first):
    # 5,000 logits: one whole tile and a part of one in bf16, two in fp32
    base, targets, upstream = random_rows((3, 5200), dtype)
    logits = base.flatten()[first:first + 3 * 5000].view(3, 5000)
    gradient = check(logits, targets.clamp(max=4999), upstream, 0.7, device)[1]
    assert gradient.float().sum(-1).abs().amax() < 2e-2  # softmax's gradient sums to 0 over the row


@pytest.mark.parametrize("view", [
    lambda x: x[:, :-1],
    lambda x: x[:, 1:, 3:-2],
    lambda x: x.transpose(0, 1),
    lambda x: x[:, ::2],
    lambda x: x[..., ::2],
    lambda x: x[0].t(),
    lambda x: x[0],
    lambda x: x[0, 0],
    lambda x: x[:1].expand(3, -1, -1),
    lambda x: x.unflatten(0, (2, 2)),
    lambda x: x.unflatten(0, (2, 2)).transpose(0, 2),
])
@pytest.mark.parametrize("dtype", [exhaustive(torch.float32), torch.bfloat16])
def test_strides_and_dimensions_of_any_kind(device, view, dtype):
    logits = view(random_rows((4, 3, 35), dtype)[0].to(device))
    _, targets, upstream = random_rows(logits.shape, dtype)
    check(logits, targets, upstream, 1.3, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [
    lambda x: x,
    lambda x: x[:, 1:, 3:-2],
    lambda x: x[:, :-1],
    lambda x: x[..., :96],
])
def test_the_gradients_rows_lie_as_the_logits_rows_do(view, dtype):
    """A 16-byte store faults on an address that is not a multiple of 16."""
    logits = view(torch.zeros(3, 5, 101, dtype=dtype))
    gradient = like_rows_of(logits, logits.storage_offset())
    assert gradient.shape == logits.shape
    assert gradient.stride(2) == 1

    places = list(itertools.product(range(logits.shape[0]), range(logits.shape[1])))
    begins = [gradient[place].data_ptr() for place in places]
    assert [begin % 16 for begin in begins] == [logits[place].data_ptr() % 16 for place in places]
    assert gradient.is_contiguous() or not logits.is_contiguous()
    row_bytes = logits.shape[2] * logits.element_size()
    assert all(b - a >= row_bytes for a, b in itertools.pairwise(begins))


def test_the_gradient_of_a_slice_reaches_its_whole(device):
    logits, targets, upstream = (tensor.to(device) for tensor in random_rows((2, 4, 33)))
    logits.requires_grad_()

    def gradient(backend):
        log_probs = kernels.gather_log_probs(logits[:, :-1], targets[:, 1:], backend=backend)
        return torch.autograd.grad(log_probs, logits, upstream[:, 1:])[0]

    ours = gradient("triton")
    assert torch.allclose(ours, gradient("reference"), atol=1e-6)
    assert not ours[:, -1].any()


def test_a_vocabulary_of_none_without_tokens(device):
    logits = torch.empty(0, 0, device=device)
    targets = torch.empty(0, dtype=torch.long, device=device)
    assert kernels.gather_log_probs(logits, targets, backend="triton").shape == (0,)


def test_targets_of_32_bits_and_upstream_of_stride_0(device):
    logits, targets, _ = random_rows((7, 100))
    logits = logits.to(device).requires_grad_()
    log_probs = kernels.gather_log_probs(logits, targets.int().to(device), backend="triton")
    log_probs.sum().backward()  # sum's upstream is one number, expanded
    exact_log_probs, exact_gradient, _ = exact(logits, targets, torch.ones(7), 1.0)
    assert torch.allclose(log_probs.cpu().double(), exact_log_probs, atol=1e-5)
    assert torch.allclose(logits.grad.cpu().double(), exact_gradient, atol=1e-6)


def test_same_inputs_same_bits(device):
    rows = random_rows((5, 5000), torch.bfloat16)
    logits, targets, upstream = (tensor.to(device) for tensor in rows)
    logits.requires_grad_()
    a, b = (kernels.gather_log_probs(logits, targets, 0.7, backend="triton") for _ in range(2))
    assert torch.equal(a, b)
    first, = torch.autograd.grad(a, logits, upstream, retain_graph=True)
    second, = torch.autograd.grad(a, logits, upstream)
    assert torch.equal(first, second)


def test_ids_outside_the_vocabulary_and_nan_logits_give_nan(device):
    logits, _, _ = random_rows((4, 1000))

    def are_nan(targets):
        log_probs = kernels.gather_log_probs(logits.to(device), targets, backend="triton")
        return log_probs.isnan().tolist()

    targets = torch.tensor([1000, -1, -100, 999], device=device)
    assert are_nan(targets) == [True, True, True, False]
    logits[2, 7] = float("nan")
    assert are_nan(targets.fill_(1)) == [False, False, True, False]


@pytest.mark.parametrize("forbidden", [torch.finfo(torch.float32).min, float("-inf")])
def test_forbidden_tokens_have_no_gradient_and_no_part_in_the_entropy(device, forbidden):
    logits, targets, upstream = random_rows((4, 5000))
    logits[:, 7:4900] = forbidden
    _, gradient, entropy = check(logits, targets.fill_(2), upstream, 1.0, device)
    assert not gradient[:, 7:4900].any()
    assert torch.isfinite(entropy).all()


def test_more_than_two_to_the_31_logits(device):
    """The last row begins 2^31 logits after the first. The memory between is never touched."""
    v = 1000
    storage = torch.empty(2 ** 31 + 8 * v, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, v), (2 ** 30 + 1, 1))
    values, targets, upstream = random_rows((3, v), torch.bfloat16)
    logits.copy_(values)
    check(logits, targets, upstream, 1.0, device)


def compiled_binaries():
    """How many there are of the two kernels in this process."""
    count = 0
    for kernel in (log_prob.forward_kernel, log_prob.backward_kernel):
        for cache in kernel.device_caches.values():
            count += len(cache[0])
    return count


@pytest.mark.cuda
def test_no_compilation_when_sizes_and_temperature_change():
    def random(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    def ids(*shape):
        return torch.zeros(*shape, dtype=torch.long, device="cuda")

    def use(n, v, temperature):
        kernels.gather_log_probs(random(n, v), ids(n), temperature).sum().backward()

    use(5, 1000, 0.7)
    before = compiled_binaries()
    use(1, 1, 1.0)
    use(16, 16, 1)
    use(33, 32001, 1.3)
    use(64, 4096, 2)
    use(1025, 33, 1)
    use(1026, 33, 1)
    kernels.gather_log_probs(random(4, 65, 77)[:, 1:, 3:], ids(4, 64)).sum().backward()
    for n in (1024, 1025, 1026):
        kernels.linear_log_probs(random(n, 8).detach(), random(33, 8).detach(), ids(n))
    assert compiled_binaries() == before
