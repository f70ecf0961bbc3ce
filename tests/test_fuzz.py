# pytest tests/test_fuzz.py
"""Properties that hold for whatever hypothesis thinks of: files, templates, advantages, kernels'
strides, settings. Seeded, and bounded in time; `pytest -m exhaustive` tries many more examples."""

import csv
import json

import datasets
import pytest

pytest.importorskip("hypothesis", reason="pip install hypothesis")
import torch
from conftest import exhaustive
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kernels
import repo
from plumbing.data import TURN, encode_prompts, load_pairs, render_prompt, to_messages
from tiny_configs import world

settings.register_profile(
    "seeded",
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("seeded")


def is_prompt(text: str) -> bool:
    return bool(text.strip()) and not TURN.search(text)


def is_turn(text: str) -> bool:
    return bool(text) and not TURN.search("\n\n" + text)


CHARACTERS = st.characters(exclude_categories=["Cs"])  # lone surrogates, which no file can hold
TEXT = st.text(CHARACTERS, min_size=1, max_size=40)
PLAIN = TEXT.filter(is_prompt)
TURNS = st.lists(PLAIN.map(str.strip).filter(is_turn), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**31)


def examples(few: int, many: int):
    """Runs a test with a few examples, and with many if all is to be tried."""
    return pytest.mark.parametrize("count", [few, exhaustive(many)])


# ---- prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def write(file, prompts):
    if file.suffix == ".jsonl":
        spelled = len(prompts) % 2 == 0  # either way of writing what is not ASCII
        rows = [json.dumps({"prompt": prompt}, ensure_ascii=spelled) for prompt in prompts]
        file.write_text("".join(row + "\n" for row in rows))
    elif file.suffix == ".parquet":
        datasets.Dataset.from_dict({"prompt": prompts}).to_parquet(file)
    else:
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([["prompt"], *[[prompt] for prompt in prompts]])
    return str(file)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
@examples(10, 100)
def test_prompts_come_out_of_a_file_as_they_went_in(folder, ending, count):
    @settings(max_examples=count)
    @given(prompts=st.lists(PLAIN, min_size=1, max_size=6))
    def check(prompts):
        if ending == ".csv":  # there NA, null and 5 are no text
            prompts = [f"p {prompt}" for prompt in prompts]
        distinct = list(dict.fromkeys(prompts))
        assert repo.load_prompts(write(folder / f"p{ending}", prompts)) == distinct

    check()


@examples(20, 100)
def test_a_conversation_is_the_same_as_transcript_and_as_messages(folder, count):
    @settings(max_examples=count)
    @given(turns=TURNS)
    def check(turns):
        if len(turns) > 1 and len(turns) % 2 == 0:  # the user has the last word
            turns = turns[:-1]
        messages, transcript = [], ""
        for i, turn in enumerate(turns):
            messages.append({"role": ("user", "assistant")[i % 2], "content": turn})
            transcript += f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}"
        (folder / "m.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        ((prompt, _),) = load_pairs(str(folder / "m.jsonl"))
        assert prompt == (turns[0] if len(turns) == 1 else transcript)
        assert repo.load_prompts(write(folder / "t.jsonl", [transcript])) == [prompt]
        assert len(turns) == 1 or to_messages(prompt) == messages

    check()


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


@pytest.fixture(scope="module")
def templates():
    """(tokenizer, what stands before a prompt, what behind): the Beaver family's template, and one
    that a tokenizer brings."""
    chatty = world.build_tokenizer()
    chatty.chat_template = CHAT_TEMPLATE
    return [
        (world.build_tokenizer(), "BEGINNING OF CONVERSATION: USER: ", " ASSISTANT:"),
        (chatty, "<s><user>", "<assistant>"),
    ]


@examples(40, 400)
def test_what_the_model_reads_contains_the_prompt_once_between_its_template(templates, count):
    @settings(max_examples=count)
    @given(prompt=PLAIN)
    @example(prompt="{prompt}")
    @example(prompt=" ASSISTANT:")
    @example(prompt="{{ bos_token }}{% raw %}")
    def check(prompt):
        for tokenizer, before, after in templates:
            assert render_prompt(prompt, tokenizer) == before + prompt + after
            if any(token in prompt for token in tokenizer.all_special_tokens):
                continue
            ids = encode_prompts([prompt], tokenizer)[0]
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.eos_token_id not in ids
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix("<s>")
            assert text == before.removeprefix("<s>") + prompt + after

    check()


# ---- token rewards and costs, advantages

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 7), SEEDS)


def batch(shape, scale=3.0):
    """Three times random numbers [B, T], and a mask of right-padded rows of 1 to T tokens."""
    rows, width, seed = shape
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=chance)
    numbers = [
        scale * torch.randn(rows, width, generator=chance, dtype=torch.float64) for _ in range(3)
    ]
    return *numbers, torch.arange(width) < lengths


@examples(100, 400)
def test_advantages_ignore_what_lies_in_the_padding_and_how_wide_it_is(count):
    @settings(max_examples=count)
    @given(shape=SHAPES, lam=st.floats(0, 1))
    def check(shape, lam):
        rewards, values, _, mask = batch(shape)
        advantages, returns = repo.gae(rewards, values, mask, lam=lam)
        assert not advantages[~mask].any()
        assert not returns[~mask].any()

        dirty = [torch.where(mask, tensor, torch.nan) for tensor in (rewards, values)]
        same_advantages, same_returns = repo.gae(*dirty, mask, lam=lam)
        assert torch.equal(same_advantages, advantages)
        assert torch.equal(same_returns, returns)

        length = int(mask[0].sum())
        first = [tensor[:1, :length] for tensor in (rewards, values, mask)]
        cut, _ = repo.gae(*first, lam=lam)
        assert torch.allclose(cut, advantages[:1, :length])

    check()


@examples(100, 400)
def test_advantages_are_linear_in_the_rewards(count):
    @settings(max_examples=count)
    @given(shape=SHAPES, lam=st.floats(0, 1))
    def check(shape, lam):
        rewards, values, more, mask = batch(shape)
        advantages, _ = repo.gae(rewards, values, mask, lam=lam)
        both, _ = repo.gae(rewards + more, values, mask, lam=lam)
        alone, _ = repo.gae(more, 0 * values, mask, lam=lam)
        assert torch.allclose(both, advantages + alone)

    check()


@examples(100, 400)
def test_with_lambda_one_the_return_is_what_comes_whatever_the_critic_says(count):
    @settings(max_examples=count)
    @given(shape=SHAPES)
    def check(shape):
        rewards, values, _, mask = batch(shape)
        _, returns = repo.gae(rewards, values, mask, lam=1.0)
        future = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
        assert torch.allclose(returns, future)

    check()


@examples(100, 400)
def test_token_rewards_and_costs_add_up_to_the_scores(count):
    @settings(max_examples=count)
    @given(shape=SHAPES, beta=st.floats(0, 2))
    def check(shape, beta):
        log_probs, ref_log_probs, scores, mask = batch(shape)
        reward, cost = scores[:, 0], scores[:, -1].abs()
        beside = torch.where(mask, ref_log_probs, torch.inf)
        rewards, costs = repo.shape_rewards_and_costs(
            reward, cost, log_probs, beside, mask, beta, clip_range_score=1e9
        )
        assert not rewards[~mask].any()
        assert not costs[~mask].any()
        # The KL lambdas stands in both, with either sign.
        assert torch.allclose((rewards + costs).sum(1), reward + cost)
        kl = ((log_probs - ref_log_probs) * mask).sum(1)
        assert torch.allclose(costs.sum(1), cost + beta * kl)

        clipped, _ = repo.shape_rewards_and_costs(
            reward, cost, log_probs, ref_log_probs, mask, beta, clip_range_score=0.5
        )
        assert clipped.abs().max() <= 0.5
        assert torch.equal(clipped, rewards.clamp(-0.5, 0.5))

    check()


# ---- the kernels


def strided(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same numbers in another layout."""
    if kind == "sliced":
        wide = torch.randn(*tensor.shape[:-1], tensor.shape[-1] + 5, dtype=torch.float32)
        wide = wide.to(tensor.dtype)
        wide[..., 2:-3] = tensor
        return wide[..., 2:-3]
    if kind == "every other row":
        return torch.stack([tensor, 0 * tensor], 1).flatten(0, 1)[::2]
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


LAYOUTS = st.sampled_from(["plain", "sliced", "every other row", "transposed"])


EXAMPLES = [
    ("reference", 50),
    ("triton", 15),
    exhaustive("reference", 400),
    exhaustive("triton", 80),
]


@pytest.mark.parametrize("backend, count", EXAMPLES)
def test_log_probs_at_any_shape_stride_and_temperature(device, backend, count):
    @settings(max_examples=count)
    @given(
        rows=st.integers(1, 5),
        vocab=st.integers(1, 70),
        layout=LAYOUTS,
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        temperature=st.floats(0.1, 10),
        scale=st.sampled_from([0.0, 1.0, 100.0]),
        seed=SEEDS,
    )
    def check(rows, vocab, layout, dtype, temperature, scale, seed):
        chance = torch.Generator().manual_seed(seed)
        logits = (scale * torch.randn(rows, vocab, generator=chance)).to(dtype)
        logits = strided(logits, layout).to(device).requires_grad_(True)
        targets = torch.randint(vocab, (rows,), generator=chance).to(device)
        upstream = torch.randn(rows, generator=chance).to(device)
        result = kernels.gather_log_probs(logits, targets, temperature, backend=backend)
        result.backward(upstream)

        exact = logits.detach().double().requires_grad_(True)
        expected = (exact / temperature).log_softmax(-1)[torch.arange(rows), targets]
        expected.backward(upstream.double())

        assert result.dtype == torch.float32
        assert logits.grad.shape == logits.shape
        atol = 1e-5 * max(scale / temperature, 1)
        assert torch.allclose(result.double(), expected, rtol=1e-5, atol=atol)
        rtol, atol = 1e-2 if dtype == torch.bfloat16 else 1e-4, 1e-4 / temperature
        assert torch.allclose(logits.grad.double(), exact.grad, rtol=rtol, atol=atol)

    check()


@pytest.mark.parametrize("backend, count", EXAMPLES)
def test_the_loss_at_any_length_and_stride(device, backend, count):
    @settings(max_examples=count)
    @given(
        tokens=st.integers(1, 40),
        stride=st.integers(1, 3),
        clip_range=st.floats(0.01, 0.9),
        seed=SEEDS,
    )
    def check(tokens, stride, clip_range, seed):
        def loss_of(*columns):
            return kernels.repo_loss(*columns, clip_range, backend=backend)

        chance = torch.Generator().manual_seed(seed)
        new, moved, reward, cost, lambdas, weight = (
            torch.randn(tokens * stride, generator=chance)[::stride] for _ in range(6)
        )
        old = new + 0.3 * moved
        rest = [column.to(device) for column in (old, reward, cost, lambdas.abs(), weight.abs())]
        old, reward, cost, lambdas, weight = rest
        new = new.to(device)
        log_probs = new.clone().requires_grad_(True)
        loss, stats = loss_of(log_probs, *rest)
        loss.backward()
        assert log_probs.grad.isfinite().all()
        assert 0 <= stats["clip_fraction"] <= 1
        assert stats["approx_kl"] >= -1e-6
        assert stats["ratio_max"] > 0

        # A sum over tokens, each with its weight.
        columns = (log_probs.detach(), *rest)
        halves = [
            loss_of(*(column[part] for column in columns))[0]
            for part in (slice(0, tokens // 2), slice(tokens // 2, tokens))
            if part.stop > part.start
        ]
        assert torch.allclose(sum(halves), loss, rtol=1e-4, atol=1e-5)
        assert loss_of(new, old, reward, cost, lambdas, 0 * weight)[0] == 0

        # Without a lambdas the reward's advantage alone says where to go, if it is not clipped.
        free = new.clone().requires_grad_(True)
        loss_of(free, new, reward, cost, 0 * lambdas, weight + 0.1)[0].backward()
        assert (free.grad[reward > 0] < 0).all()
        assert (free.grad[reward < 0] > 0).all()

    check()


def is_close_to(gradient, exact) -> bool:
    atol = 1e-3 * max(exact.abs().max().item(), 1)
    return torch.allclose(gradient.double(), exact, rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    "backend, count",
    [("reference", 25), ("triton", 8), exhaustive("reference", 100), exhaustive("triton", 25)],
)
def test_the_linear_functions_are_the_others_on_logits(device, backend, count):
    @settings(max_examples=count)
    @given(
        tokens=st.integers(1, 8),
        width=st.integers(1, 24),
        vocab=st.integers(2, 50),
        layout=LAYOUTS,
        head=LAYOUTS,
        temperature=st.floats(0.3, 3),
        seed=SEEDS,
    )
    def check(tokens, width, vocab, layout, head, temperature, seed):
        chance = torch.Generator().manual_seed(seed)
        hidden = strided(torch.randn(tokens, width, generator=chance), layout)
        hidden = hidden.to(device).requires_grad_(True)
        weight = strided(torch.randn(vocab, width, generator=chance), head)
        weight = weight.to(device).requires_grad_(True)
        targets = torch.randint(vocab, (tokens,), generator=chance).to(device)
        old, rewards, costs, lambdas, token_weight = (
            torch.randn(tokens, generator=chance).to(device) for _ in range(5)
        )
        old = old * 0.1 - 3
        columns = [old, rewards, costs, lambdas.abs(), token_weight.abs()]
        loss, log_probs, _ = kernels.linear_repo_loss(
            hidden, weight, targets, *columns, 0.2, temperature, backend=backend
        )
        loss.backward()

        exact_hidden = hidden.detach().double().requires_grad_(True)
        exact_weight = weight.detach().double().requires_grad_(True)
        logits = exact_hidden @ exact_weight.T
        exact_log_probs = kernels.gather_log_probs(
            logits, targets, temperature, backend="reference"
        )
        exact_loss, _ = kernels.repo_loss(exact_log_probs, *columns, 0.2, backend="reference")
        exact_loss.backward()

        assert torch.allclose(log_probs.double(), exact_log_probs.double(), atol=1e-4)
        assert torch.allclose(loss.double(), exact_loss.double(), rtol=1e-3, atol=1e-4)
        # At the edge of the clip rounding decides on a token's gradient.
        from_the_edge = ((log_probs - old).exp() - 1).abs() - 0.2
        if from_the_edge.abs().min() >= 1e-4:
            assert is_close_to(hidden.grad, exact_hidden.grad)
            assert is_close_to(weight.grad, exact_weight.grad)

        alone = kernels.linear_log_probs(
            hidden.detach(), weight.detach(), targets, temperature, backend=backend
        )
        assert torch.allclose(alone, log_probs, atol=1e-5)

    check()


# ---- settings

NUMBERS = {
    "kl_coeff": st.floats(0, 10),
    "lambda_init": st.floats(0, 10),
    "lambda_lr": st.floats(0, 1),
    "threshold": st.floats(-5, 5),
    "clip_range": st.floats(0.01, 1),
    "steps": st.integers(1, 10**6),
    "cost_window": st.integers(1, 10**4),
    "seed": SEEDS,
    "actor_lr": st.floats(1e-9, 1),
    "eval_samples": st.integers(1, 9),
    "tf32": st.booleans(),
    "algo": st.sampled_from(["repo", "ppo_lag", "ppo"]),
    "rectify": st.sampled_from(["return", "mask"]),
    "sample_every": st.integers(0, 99),
}
SETTINGS = st.fixed_dictionaries({}, optional=NUMBERS)


def without_output_dir(config) -> dict:
    return {name: value for name, value in vars(config).items() if name != "output_dir"}


@examples(20, 100)
def test_the_last_word_wins_flags_then_file_then_preset_then_default(folder, family, count):
    file, again = folder / "c.json", folder / "again.json"
    untouched = repo.resolve_config([])

    @settings(max_examples=count)
    @given(from_file=SETTINGS, from_flags=SETTINGS)
    def check(from_file, from_flags):
        file.write_text(json.dumps(from_file))
        flags = [f"--{name}={value}" for name, value in from_flags.items()]
        config = repo.resolve_config([*flags[:1], "--config", str(file), *flags[1:]])
        given_settings = from_file | from_flags
        for name in NUMBERS:
            assert getattr(config, name) == given_settings.get(name, getattr(untouched, name))

        # What a run writes down starts the same run.
        again.write_text(json.dumps(without_output_dir(config)))
        config_again = repo.resolve_config(["--config", str(again)])
        assert without_output_dir(config_again) == without_output_dir(config)

    check()
