# pytest tests/test_fuzz.py
"""Properties that hold for whatever hypothesis thinks of: files, templates, advantages, kernels' strides, settings. Seeded, and bounded in time."""
import csv
import json

import datasets
import pytest

pytest.importorskip("hypothesis", reason="pip install hypothesis")
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kernels
import repo
from tiny_configs import world
from tiny_configs.inputs import TURN

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
settings.load_profile("seeded")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)  # any Unicode but lone surrogates, which no file can hold
PLAIN = TEXT.filter(lambda text: text.strip() and not TURN.search(text))
TURNS = st.lists(PLAIN.map(str.strip).filter(lambda text: text and not TURN.search("\n\n" + text)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def write(file, prompts):
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"prompt": prompt}, ensure_ascii=len(prompts) % 2 == 0) + "\n" for prompt in prompts))
    elif file.suffix == ".parquet":
        datasets.Dataset.from_dict({"prompt": prompts}).to_parquet(file)
    else:
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([["prompt"], *[[prompt] for prompt in prompts]])
    return str(file)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
@settings(max_examples=100)
@given(prompts=st.lists(PLAIN, min_size=1, max_size=6))
def test_prompts_come_out_of_a_file_as_they_went_in(folder, ending, prompts):
    prompts = [f"p {prompt}" for prompt in prompts] if ending == ".csv" else prompts  # there NA, null and 5 are no text
    assert repo.load_prompts(write(folder / f"p{ending}", prompts)) == list(dict.fromkeys(prompts))


@settings(max_examples=100)
@given(turns=TURNS)
def test_a_conversation_is_the_same_as_transcript_and_as_messages(folder, turns):
    turns = turns if len(turns) % 2 else turns[:-1] or turns
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    transcript = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))
    (folder / "m.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (prompt, _), = repo.load_pairs(str(folder / "m.jsonl"))
    assert prompt == (turns[0] if len(turns) == 1 else transcript)
    assert repo.load_prompts(write(folder / "t.jsonl", [transcript])) == [prompt]
    assert len(turns) == 1 or repo.to_messages(prompt) == messages


@pytest.fixture(scope="module")
def tokenizers():
    """With the Beaver family's template, and with one of its own."""
    plain, chatty = (world.build_tokenizer(repo.BEAVER_TEMPLATE) for _ in range(2))
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return plain, chatty


@given(prompt=PLAIN)
@example(prompt="{prompt}")
@example(prompt=" ASSISTANT:")
@example(prompt="{{ bos_token }}{% raw %}")
def test_what_the_model_reads_contains_the_prompt_once_between_its_template(tokenizers, prompt):
    for tokenizer, before, after in zip(tokenizers, ("BEGINNING OF CONVERSATION: USER: ", "<s><user>"), (" ASSISTANT:", "<assistant>")):
        assert repo.render_prompt(prompt, tokenizer) == before + prompt + after
        if not any(token in prompt for token in tokenizer.all_special_tokens):
            ids = repo.encode_prompts([prompt], tokenizer)[0]
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in ids
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix("<s>") == before.removeprefix("<s>") + prompt + after


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**31))


def batch(shape, scale=3.0):
    """Random rewards, values [B, T], and a mask of right-padded rows of 1 to T tokens."""
    rows, width, seed = shape
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=chance)
    rewards, values, more = (scale * torch.randn(rows, width, generator=chance, dtype=torch.float64) for _ in range(3))
    return rewards, values, more, torch.arange(width) < lengths


@given(shape=SHAPES, lam=st.floats(0, 1))
def test_advantages_ignore_padding_add_up_and_tell_the_return(shape, lam):
    rewards, values, more, mask = batch(shape)
    advantages, returns = repo.gae(rewards, values, mask, lam=lam)
    assert not advantages[~mask].any() and not returns[~mask].any()
    dirty = [torch.where(mask, tensor, torch.nan) for tensor in (rewards, values)]
    assert all(torch.equal(a, b) for a, b in zip(repo.gae(*dirty, mask, lam=lam), (advantages, returns)))  # what lies in the padding has no part
    double, _ = repo.gae(rewards + more, values, mask, lam=lam)
    alone, _ = repo.gae(more, 0 * values, mask, lam=lam)
    assert torch.allclose(double, advantages + alone)  # linear in the rewards
    _, exact = repo.gae(rewards, values, mask, lam=1.0)
    future = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(exact, future)  # with lambda 1 the return is what comes, whatever the critic says
    row, length = 0, int(mask[0].sum())
    cut = repo.gae(rewards[row:1, :length], values[row:1, :length], mask[row:1, :length], lam=lam)[0]
    assert torch.allclose(cut, advantages[row:1, :length])  # nor has the padding's width


@given(shape=SHAPES, beta=st.floats(0, 2))
def test_token_rewards_and_costs_add_up_to_the_scores(shape, beta):
    log_probs, ref_log_probs, scores, mask = batch(shape)
    reward, cost = scores[:, 0], scores[:, -1].abs()
    rewards, costs = repo.shape_rewards_and_costs(reward, cost, log_probs, torch.where(mask, ref_log_probs, torch.inf), mask, beta, clip_range_score=1e9)
    assert not rewards[~mask].any() and not costs[~mask].any()
    assert torch.allclose((rewards + costs).sum(1), reward + cost)  # the KL penalty stands in both, with either sign
    kl = ((log_probs - ref_log_probs) * mask).sum(1)
    assert torch.allclose(costs.sum(1), cost + beta * kl)
    clipped, _ = repo.shape_rewards_and_costs(reward, cost, log_probs, ref_log_probs, mask, beta, clip_range_score=0.5)
    assert clipped.abs().max() <= 0.5 and torch.equal(clipped, rewards.clamp(-0.5, 0.5))


def strided(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same numbers in another layout."""
    if kind == "sliced":
        wide = torch.randn(*tensor.shape[:-1], tensor.shape[-1] + 5, dtype=torch.float32).to(tensor.dtype)
        wide[..., 2:-3] = tensor
        return wide[..., 2:-3]
    if kind == "every other row":
        return torch.stack([tensor, 0 * tensor], 1).flatten(0, 1)[::2]
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


LAYOUTS = st.sampled_from(["plain", "sliced", "every other row", "transposed"])


@pytest.mark.parametrize("backend, examples", [("reference", 400), ("triton", 80)])
def test_log_probs_at_any_shape_stride_and_temperature(device, backend, examples):
    @settings(max_examples=examples)
    @given(rows=st.integers(1, 5), vocab=st.integers(1, 70), layout=LAYOUTS, dtype=st.sampled_from([torch.float32, torch.bfloat16]),
           temperature=st.floats(0.1, 10), scale=st.sampled_from([0.0, 1.0, 100.0]), seed=st.integers(0, 2**31))
    def check(rows, vocab, layout, dtype, temperature, scale, seed):
        chance = torch.Generator().manual_seed(seed)
        logits = strided((scale * torch.randn(rows, vocab, generator=chance)).to(dtype), layout).to(device).requires_grad_(True)
        targets, upstream = torch.randint(vocab, (rows,), generator=chance).to(device), torch.randn(rows, generator=chance).to(device)
        result = kernels.gather_log_probs(logits, targets, temperature, backend=backend)
        result.backward(upstream)
        exact = logits.detach().double().requires_grad_(True)
        expected = (exact / temperature).log_softmax(-1)[torch.arange(rows), targets]
        expected.backward(upstream.double())
        assert result.dtype == torch.float32 and logits.grad.shape == logits.shape
        assert torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-5 * max(scale / temperature, 1))
        assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4 / temperature)
    check()


@pytest.mark.parametrize("backend, examples", [("reference", 400), ("triton", 80)])
def test_the_loss_at_any_length_and_stride(device, backend, examples):
    @settings(max_examples=examples)
    @given(tokens=st.integers(1, 40), stride=st.integers(1, 3), clip_range=st.floats(0.01, 0.9), seed=st.integers(0, 2**31))
    def check(tokens, stride, clip_range, seed):
        chance = torch.Generator().manual_seed(seed)
        columns = [torch.randn(tokens * stride, generator=chance)[::stride] for _ in range(6)]
        columns[1] = columns[0] + 0.3 * columns[1]
        columns[4:] = [columns[4].abs(), columns[5].abs()]
        columns = [column.to(device) for column in columns]
        log_probs = columns[0].clone().requires_grad_(True)
        loss, stats = kernels.repo_loss(log_probs, *columns[1:], clip_range, backend=backend)
        loss.backward()
        assert 0 <= stats["clip_fraction"] <= 1 and stats["approx_kl"] >= -1e-6 and stats["ratio_max"] > 0
        parts = [torch.split(column, [tokens // 2, tokens - tokens // 2]) for column in (log_probs.detach(), *columns[1:])]
        halves = [kernels.repo_loss(*half, clip_range, backend=backend)[0] for half in zip(*parts) if len(half[0])]
        assert torch.allclose(sum(halves), loss, rtol=1e-4, atol=1e-5)  # a sum over tokens
        no_weight = [*columns[:5], 0 * columns[5]]
        assert kernels.repo_loss(*no_weight, clip_range, backend=backend)[0] == 0 and log_probs.grad.isfinite().all()
        gain, harm = columns[2] > 0, columns[2] < 0  # without a penalty the reward's advantage alone says where to go, if it is not clipped
        free = columns[0].clone().requires_grad_(True)
        kernels.repo_loss(free, columns[0], columns[2], columns[3], 0 * columns[4], columns[5] + 0.1, clip_range, backend=backend)[0].backward()
        assert (free.grad[gain] < 0).all() and (free.grad[harm] > 0).all()
    check()


@pytest.mark.parametrize("backend, examples", [("reference", 100), ("triton", 25)])
def test_the_linear_functions_are_the_others_on_logits(device, backend, examples):
    @settings(max_examples=examples)
    @given(tokens=st.integers(1, 20), width=st.integers(1, 24), vocab=st.integers(2, 50), layout=LAYOUTS, head=LAYOUTS, temperature=st.floats(0.3, 3), seed=st.integers(0, 2**31))
    def check(tokens, width, vocab, layout, head, temperature, seed):
        chance = torch.Generator().manual_seed(seed)
        hidden = strided(torch.randn(tokens, width, generator=chance), layout).to(device).requires_grad_(True)
        weight = strided(torch.randn(vocab, width, generator=chance), head).to(device).requires_grad_(True)
        targets = torch.randint(vocab, (tokens,), generator=chance).to(device)
        old, rewards, costs, penalty, token_weight = (torch.randn(tokens, generator=chance).to(device) for _ in range(5))
        columns = [old * 0.1 - 3, rewards, costs, penalty.abs(), token_weight.abs()]
        loss, log_probs, _ = kernels.linear_repo_loss(hidden, weight, targets, *columns, 0.2, temperature, backend=backend)
        loss.backward()
        exact, exact_weight = (tensor.detach().double().requires_grad_(True) for tensor in (hidden, weight))
        expected_log_probs = kernels.gather_log_probs(exact @ exact_weight.T, targets, temperature, backend="reference")
        expected, _ = kernels.repo_loss(expected_log_probs, *columns, 0.2, backend="reference")
        expected.backward()
        assert torch.allclose(log_probs.double(), expected_log_probs.double(), atol=1e-4) and torch.allclose(loss.double(), expected.double(), rtol=1e-3, atol=1e-4)
        at_the_edge = ((log_probs - columns[0]).exp() - 1).abs().sub(0.2).abs().min() < 1e-4  # of the clip, where rounding decides on a token's gradient
        assert at_the_edge or all(torch.allclose(a.grad.double(), b.grad, rtol=1e-3, atol=1e-3 * max(b.grad.abs().max().item(), 1)) for a, b in ((hidden, exact), (weight, exact_weight)))
        assert torch.allclose(kernels.linear_log_probs(hidden.detach(), weight.detach(), targets, temperature, backend=backend), log_probs, atol=1e-5)
    check()


NUMBERS = {"kl_coeff": st.floats(0, 10), "lambda_init": st.floats(0, 10), "lambda_lr": st.floats(0, 1), "threshold": st.floats(-5, 5), "clip_range": st.floats(0.01, 1),
           "steps": st.integers(1, 10**6), "cost_window": st.integers(1, 10**4), "seed": st.integers(0, 2**31), "actor_lr": st.floats(1e-9, 1), "eval_samples": st.integers(1, 9),
           "tf32": st.booleans(), "algo": st.sampled_from(["repo", "ppo_lag", "ppo"]), "rectify": st.sampled_from(["return", "mask"]), "sample_every": st.integers(0, 99)}
SETTINGS = st.fixed_dictionaries({}, optional=NUMBERS)


@settings(max_examples=100)
@given(from_file=SETTINGS, from_flags=SETTINGS)
def test_the_last_word_wins_flags_then_file_then_preset_then_default(folder, family, from_file, from_flags):
    (folder / "c.json").write_text(json.dumps(from_file))
    flags = [f"--{name}={value}" for name, value in from_flags.items()]
    config = repo.resolve_config([*flags[:1], "--config", str(folder / "c.json"), *flags[1:]])
    untouched = repo.resolve_config([])
    assert all(getattr(config, name) == {**from_file, **from_flags}.get(name, getattr(untouched, name)) for name in NUMBERS)
    (folder / "again.json").write_text(json.dumps({name: value for name, value in vars(config).items() if name != "output_dir"}))
    again = repo.resolve_config(["--config", str(folder / "again.json")])
    assert {**vars(again), "output_dir": None} == {**vars(config), "output_dir": None}  # what a run writes down starts the same run
