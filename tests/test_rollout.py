# pytest tests/test_rollout.py
"""The rollout's bookkeeping: masks, limits, log-probs, and what padding may not change."""
import pytest
import torch
from conftest import write_policy

import repo


@pytest.fixture
def policy(tmp_path, tokenizer):
    config = repo.Config(policy=str(write_policy(tmp_path / "policy", tokenizer)), device="cpu", dtype="float32", micro_batch_size=2)
    return (*repo.load_policy(config), config)


PROMPTS, RESPONSES = [[0, 4, 5, 6], [0, 9], [0, 11, 12]], [[7, 8, 1], [5], [1]]


def test_layout_and_response_index():
    batch = repo.lay_out(PROMPTS, RESPONSES, 2, "cpu")
    assert batch.input_ids.tolist() == [[0, 4, 5, 6, 7, 8, 1], [2, 2, 0, 9, 5, 2, 2], [2, 0, 11, 12, 1, 2, 2]]
    assert batch.attention_mask.tolist() == [[1] * 7, [0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert batch.response_mask.tolist() == [[True, True, True], [True, False, False], [True, False, False]]
    row, state, targets = batch.response_index()
    assert row.tolist() == [0, 0, 0, 1, 2] and targets.tolist() == [7, 8, 1, 5, 1]
    assert state.tolist() == [3, 4, 5, 3, 3]  # the last prompt token predicts y_1


def test_an_eos_inside_a_prompt_is_prompt():
    batch = repo.lay_out([[0, 1, 4, 1]], [[5, 1]], 1, "cpu")  # and the pad token may be the EOS token
    assert batch.response_mask.tolist() == [[True, True]] and batch.attention_mask.tolist() == [[1] * 6]


def test_log_probs_of_a_padded_batch_are_those_of_each_row_alone(policy):
    policy, tokenizer, _ = policy
    with torch.no_grad():
        together = repo.response_log_probs(policy, repo.lay_out(PROMPTS, RESPONSES, 2, "cpu"), 1.3)
        alone = torch.cat([repo.response_log_probs(policy, repo.lay_out([p], [r], 2, "cpu"), 1.3) for p, r in zip(PROMPTS, RESPONSES)])
        direct = [(policy(torch.tensor([p + r])).logits[0] / 1.3).log_softmax(-1)[len(p) - 1 + t, token] for p, r in zip(PROMPTS, RESPONSES)
                  for t, token in enumerate(r)]
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(together, torch.stack(direct), atol=1e-5)


def test_what_stands_outside_the_response_mask_changes_no_loss(policy):
    """Other pad tokens, and NaN in every per-token tensor outside the mask: same losses, same gradient."""
    policy, _, config = policy
    critic = repo.ScoreModel(policy.config, policy.base_model)
    losses = []
    for pad, outside in ((2, 0.0), (300, float("nan"))):
        batch = repo.lay_out(PROMPTS, RESPONSES, pad, "cpu")
        fill = lambda value: torch.full((3, 3), value).masked_fill(~batch.response_mask, outside)  # noqa: B023, E731
        batch.log_probs, batch.reward_advantages, batch.cost_advantages, batch.penalty = fill(-6.0), fill(1.5), fill(-0.5), torch.ones(3)
        weight = batch.response_mask / batch.response_mask.sum(1, keepdim=True) / 3
        loss = repo.policy_loss(policy, batch, weight, config)[0] + repo.value_loss(critic, batch, fill(0.0), fill(2.0), weight, config)[0]
        losses.append((loss.detach(), torch.autograd.grad(loss, policy.model.layers[0].self_attn.q_proj.weight)[0]))
    assert torch.allclose(losses[0][0], losses[1][0]) and torch.allclose(losses[0][1], losses[1][1], atol=1e-7) and losses[0][1].abs().sum() > 0


def forced(policy, tokens):
    """Makes the policy say these tokens, a row per prompt, whatever it is asked."""
    rows = dict(zip(map(tuple, PROMPTS), tokens))

    def generate(input_ids, attention_mask, **_):
        asked = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask)]
        return torch.cat([input_ids, torch.tensor([rows[prompt] for prompt in asked])], 1)
    policy.generate = generate


def test_responses_end_at_eos_or_at_their_own_limit(policy):
    policy, tokenizer, config = policy
    config.max_length = 7
    forced(policy, [[7, 8, 1, 9, 9], [5, 5, 5, 5, 5], [1, 2, 2, 2, 2]])
    assert repo.generate(policy, tokenizer, PROMPTS, config) == [[7, 8, 1], [5, 5, 5, 5, 5], [1]]  # prompts of 4, 2, 3: budgets 3, 5, 4
    forced(policy, [[7, 8, 9, 1, 9], [5, 5, 5, 5, 1], [5, 5, 5, 5, 1]])
    assert repo.generate(policy, tokenizer, PROMPTS, config) == [[7, 8, 9], [5, 5, 5, 5, 1], [5, 5, 5, 5]]
    config.max_response_length = 2
    assert repo.generate(policy, tokenizer, PROMPTS, config) == [[7, 8], [5, 5], [5, 5]]


def drawn(policy, tokenizer, config, prompts=("How do I paint a boat?", "How do I steal a lamp?", "Hi") * 4, key=0):
    return repo.generate(policy, tokenizer, repo.encode_prompts(list(prompts), tokenizer), config, key)


def test_greedy_decoding_gives_the_tokens_of_the_plain_path(family):
    """At a temperature near zero the draw is the argmax: each prompt's tokens are those that the library finds for it alone."""
    config = repo.Config(**family, device="cpu", dtype="float32", temperature=1e-6, max_response_length=24)
    policy, tokenizer = repo.load_policy(config)
    prompts = repo.load_prompts(config.dataset)[:40]
    for prompt, response in zip(prompts, drawn(policy, tokenizer, config, prompts)):
        ids = torch.tensor(repo.encode_prompts([prompt], tokenizer))
        plain = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=tokenizer.eos_token_id, pad_token_id=2)
        assert response == plain[0, ids.shape[1]:].tolist()


def test_a_response_depends_on_its_prompt_key_and_place_alone(policy):
    policy, tokenizer, config = policy
    config.max_length = 40
    prompts = ["How do I paint a boat?", "How do I steal a very large lamp?", "Hi"]
    first = drawn(policy, tokenizer, config, prompts)
    torch.manual_seed(5)  # no other random state has a part in it
    assert drawn(policy, tokenizer, config, prompts) == first != drawn(policy, tokenizer, config, prompts, 1)
    assert drawn(policy, tokenizer, config, [*prompts, "Hi"])[:3] == first  # other rows neither
    assert len({tuple(row) for row in drawn(policy, tokenizer, config, ["Hi"] * 50)}) == 50


def test_draws_have_the_softmaxs_frequencies_at_the_temperature():
    logits, count = torch.tensor([[0.0, 1.0, -torch.inf, 3.0, -2.0]]), 20_000
    uniform = 1 - torch.rand(count, 1, generator=repo.random_numbers("draws"), dtype=torch.float64)
    draw = repo.Draw(uniform, 7, temperature=2.0)
    tokens = draw(torch.zeros(count, 7, dtype=torch.long), logits.expand(count, -1)).argmax(-1)
    weights = torch.tensor([1.0, 2.718281828 ** 0.5, 0.0, 2.718281828 ** 1.5, 2.718281828 ** -1])
    shares = torch.bincount(tokens, minlength=5) / count
    assert shares[2] == 0 and torch.allclose(shares, weights / weights.sum(), atol=0.012)  # 3.5 standard deviations at the most
    smallest, largest = repo.Draw(torch.tensor([[2.0 ** -53], [1.0]], dtype=torch.float64), 0, 1.0)(torch.zeros(2, 0), torch.tensor([[-torch.inf, 0, 0, -torch.inf]] * 2)).argmax(-1)
    assert (smallest, largest) == (1, 2)  # never a token of probability 0


@pytest.mark.parametrize("rank", [0, 4])
def test_the_librarys_compiled_steps_give_the_same_tokens(family, rank):
    """What generate() asks for on a GPU, a static cache and compiled steps, on this CPU."""
    from transformers import CompileConfig, GenerationConfig
    config = repo.Config(**family, device="cpu", dtype="float32", lora_rank=rank, max_response_length=12)
    policy, tokenizer = repo.load_policy(config)
    policy = repo.make_trainable(policy, config)
    plain, generate = drawn(policy, tokenizer, config), policy.generate
    compiled = CompileConfig()
    compiled._compile_all_devices = True

    def as_on_a_gpu(generation_config: GenerationConfig, **inputs):
        generation_config.cache_implementation, generation_config.compile_config = "static", compiled
        return generate(generation_config=generation_config, **inputs)
    policy.generate = as_on_a_gpu
    assert drawn(policy, tokenizer, config) == plain


def test_micro_batches_change_memory_not_results(tmp_path, tokenizer, family):
    config = repo.Config(**{**family, "ptx_dataset": None}, device="cpu", dtype="float32", steps=1, max_response_length=12)
    prompts, results = repo.load_prompts(config.dataset)[:10], []
    for size in (3, 16):
        config.micro_batch_size = size
        policy, own = repo.load_policy(config)
        state = repo.State(policy, own, config)
        torch.manual_seed(0)
        state.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        state.schedule = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda _: 1.0)
        _, metrics = repo.train_step(state, prompts, [], config)
        results.append((metrics, [p.detach().clone() for p in policy.parameters()]))
    (a, weights_a), (b, weights_b) = results
    for name in ("actor_loss", "reward_critic_loss", "cost_critic_loss", "policy_grad_norm", "clip_fraction", "approx_kl", "kl", "reward"):
        assert a[name] == pytest.approx(b[name], abs=1e-5), name
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(weights_a, weights_b))


def test_an_unchanged_policy_has_ratio_one(family):
    config = repo.Config(**family, device="cpu", dtype="float32", steps=1, max_response_length=12, micro_batch_size=16)
    policy, own = repo.load_policy(config)
    torch.manual_seed(0)
    _, metrics = repo.train_step(repo.State(policy, own, config), repo.load_prompts(config.dataset)[:16], [], config)
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] < 1e-6 and metrics["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)  # the reference is the starting policy
