# pytest tests/test_scan_and_draw.py
"""GAE as one scan and tokens as one launch, beside the lines of PyTorch whose place they take."""
import pytest
import torch
from conftest import grid
from test_equations import random_batch

import repo
from kernels import draw, scan
from plumbing.sampling import Draw

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


@pytest.mark.parametrize("shape, block", grid(
    [(1, 1), (5, 9), (3, 16), (4, 17), (2, 40)],
    [8, 16, 1024],
    telling=[((1, 1), 8), ((5, 9), 8), ((3, 16), 16), ((2, 40), 8), ((4, 17), 1024)],
))
def test_the_scan_is_the_loop(device, monkeypatch, shape, block):
    """In blocks that hold a response, end within one, or are followed by others."""
    monkeypatch.setattr(scan, "BLOCK", block)
    rewards, values, mask = (tensor.to(device) for tensor in random_batch(shape=shape))
    for gamma, lam in ((1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.5, 0.0)):
        ours = scan.gae(rewards.float(), values.float(), mask, gamma, lam)
        exact = repo.gae(rewards, values, mask, gamma, lam)
        for result, truth in zip(ours, exact):
            assert torch.allclose(result.double(), truth, atol=1e-5)
            assert not result[~mask].any()


def test_what_lies_outside_the_mask_is_not_read(device):
    rewards, values, mask = (tensor.to(device).float() for tensor in random_batch())
    clean = scan.gae(rewards, values, mask)
    for tensor in (rewards, values):
        tensor[mask == 0] = torch.nan
    assert all(map(torch.equal, scan.gae(rewards, values, mask), clean))


def drawn_by_pytorch(logits, uniform, temperature):
    sampler = Draw(uniform[:, None], 0, temperature)
    return sampler(torch.empty(len(logits), 0), logits.clone()).argmax(-1)


@pytest.mark.parametrize("vocab, temperature", grid(
    [1, 2, 63, 64, 65, 1000],
    [0.7, 1.0],
    telling=[(1, 0.7), (64, 1.0), (65, 0.7)],
))
def test_the_same_tokens_are_drawn(device, monkeypatch, vocab, temperature):
    """At numbers next to the borders between two tokens too."""
    monkeypatch.setattr(draw, "BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(1, vocab, generator=generator)).to(device)
    borders = (logits / temperature).double().softmax(-1).cumsum(-1).flatten()
    near = torch.cat([borders[-9:] + 1e-10, borders[-9:] - 1e-10]).clamp(1e-12, 1).cpu()
    uniform = torch.cat([1 - torch.rand(12, generator=generator, dtype=torch.float64), near])
    uniform = uniform.to(device)
    logits = logits.expand(len(uniform), -1)
    ours = draw.draw(logits, uniform, temperature)
    assert torch.equal(ours, drawn_by_pytorch(logits, uniform, temperature))


def test_draws_by_hand_and_of_forbidden_tokens(device):
    """Probabilities 0, 1/4, 0, 3/4."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, torch.tensor(3.0).log()]], device=device)
    uniform = torch.tensor([1e-9, 0.2499, 0.2501, 1.0], dtype=torch.float64, device=device)
    tokens = draw.draw(logits.expand(4, -1), uniform)
    assert tokens.tolist() == [1, 1, 3, 3]
    bad = draw.draw(torch.full((4, 4), torch.nan, device=device), uniform)
    assert ((bad >= 0) & (bad < 4)).all()  # a token, whose log-prob will be noticed


@pytest.mark.cuda
def test_the_script_takes_them_on_a_gpu(monkeypatch):
    rewards, values, mask = random_batch()
    calls = []
    monkeypatch.setattr(repo, "scan_gae", lambda *arguments: calls.append(arguments))
    repo.gae(rewards.float().cuda(), values.float().cuda(), mask.cuda())
    assert len(calls) == 1
