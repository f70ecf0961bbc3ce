# pytest tests/test_rollout.py
"""The rollout's bookkeeping: masks, limits, log-probs, and what padding may not change."""

import copy
import json
import math

import pytest
import torch
from conftest import exhaustive, laid_out, write_policy, write_python
from transformers import CompileConfig

import repo
from plumbing.adapters import make_trainable
from plumbing.models import load_policy
from plumbing.data import encode_prompts
from plumbing.ranks import clip_gradients, micro_batches
from plumbing.training import State, backward
from repo import Draw, random_numbers


@pytest.fixture
def policy(tmp_path, tokenizer):
    """(policy, tokenizer, config) of random weights."""
    folder = str(write_policy(tmp_path / "policy", tokenizer))
    config = repo.Config(policy=folder, device="cpu", dtype="float32", micro_batch_size=2)
    return *load_policy(config), config


PROMPTS, RESPONSES = [[0, 4, 5, 6], [0, 9], [0, 11, 12]], [[7, 8, 1], [5], [1]]
PAD = 2


# ---- the layout


def test_layout_and_response_index():
    batch = laid_out(PROMPTS, RESPONSES)
    assert batch.input_ids.tolist() == [
        [0, 4, 5, 6, 7, 8, 1],
        [2, 2, 0, 9, 5, 2, 2],
        [2, 0, 11, 12, 1, 2, 2],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
    ]
    assert batch.response_mask.tolist() == [
        [True, True, True],
        [True, False, False],
        [True, False, False],
    ]
    row, state, targets = batch.response_tokens()
    assert row.tolist() == [0, 0, 0, 1, 2]
    assert targets.tolist() == [7, 8, 1, 5, 1]
    assert state.tolist() == [3, 4, 5, 3, 3]  # the last prompt token predicts y_1


class Positions:
    """A critic that gives every state its position in the row."""

    def values(self, input_ids, attention_mask, pixel_values=None):
        return torch.arange(input_ids.shape[1]).expand(input_ids.shape).float()


def test_a_value_is_that_of_the_state_before_the_token():
    batch = laid_out(PROMPTS, RESPONSES)
    assert repo.response_values(Positions(), batch).tolist() == [3, 4, 5, 3, 3]


def test_an_eos_inside_a_prompt_is_prompt():
    eos_and_pad = 1
    batch = laid_out([[0, 1, 4, 1]], [[5, 1]], eos_and_pad)
    assert batch.response_mask.tolist() == [[True, True]]
    assert batch.attention_mask.tolist() == [[1] * 6]


# ---- padding


def losses_with(policy, critic, pad: int, outside: float, config) -> torch.Tensor:
    """Both losses of one batch, with a number of our choice outside the response mask."""
    batch = laid_out(PROMPTS, RESPONSES, pad)

    def filled(value):
        return torch.full((3, 3), value).masked_fill(~batch.response_mask, outside)

    batch.log_probs, batch.lambdas = filled(-6.0), torch.ones(3)
    batch.reward_advantages, batch.cost_advantages = filled(1.5), filled(-0.5)
    weight = batch.response_mask / batch.response_mask.sum(1, keepdim=True) / 3
    policy_loss, _ = repo.policy_loss(policy, batch, weight, config)
    value_loss, _ = repo.value_loss(critic, batch, weight, filled(0.0), filled(2.0), config)
    return policy_loss + value_loss


def test_what_stands_outside_the_response_mask_changes_no_loss(policy):
    """Other pad tokens, and NaN in every per-token tensor outside the mask: same losses, same
    gradient."""
    policy, _, config = policy
    critic = repo.ScoreModel(policy.config, policy.base_model)
    weight = policy.model.layers[0].self_attn.q_proj.weight
    loss = losses_with(policy, critic, PAD, 0.0, config)
    same_loss = losses_with(policy, critic, 300, math.nan, config)
    (gradient,) = torch.autograd.grad(loss, weight)
    (same_gradient,) = torch.autograd.grad(same_loss, weight)
    assert torch.allclose(loss, same_loss)
    assert torch.allclose(gradient, same_gradient, atol=1e-7)
    assert gradient.abs().sum() > 0


# ---- limits


def forced(policy, tokens):
    """Makes the policy say these tokens, a row per prompt, whatever it is asked."""
    rows = dict(zip(map(tuple, PROMPTS), tokens))

    def generate(input_ids, attention_mask, **_):
        said = []
        for ids, mask in zip(input_ids, attention_mask):
            prompt = tuple(ids[mask.bool()].tolist())
            said.append(rows[prompt])
        return torch.cat([input_ids, torch.tensor(said)], 1)

    policy.generate = generate


def test_responses_end_at_eos_or_at_their_own_limit(policy):
    policy, tokenizer, config = policy
    config.max_length = 7  # leaves 3, 5 and 4 tokens to prompts of 4, 2 and 3

    forced(policy, [[7, 8, 1, 9, 9], [5, 5, 5, 5, 5], [1, 2, 2, 2, 2]])
    responses = repo.generate(policy, tokenizer, PROMPTS, config)
    assert responses == [[7, 8, 1], [5, 5, 5, 5, 5], [1]]

    forced(policy, [[7, 8, 9, 1, 9], [5, 5, 5, 5, 1], [5, 5, 5, 5, 1]])
    responses = repo.generate(policy, tokenizer, PROMPTS, config)
    assert responses == [[7, 8, 9], [5, 5, 5, 5, 1], [5, 5, 5, 5]]

    config.max_response_length = 2
    assert repo.generate(policy, tokenizer, PROMPTS, config) == [[7, 8], [5, 5], [5, 5]]


# ---- sampling

ASKED = ["How do I paint a boat?", "How do I steal a lamp?", "Hi"] * 4


def drawn(policy, tokenizer, config, prompts=ASKED, key=0):
    return repo.generate(policy, tokenizer, encode_prompts(prompts, tokenizer), config, key)


def test_a_chat_model_may_end_its_turn_in_several_ways(tmp_path, tokenizer):
    """As Gemma's and Phi's do: a turn ends with a token of the template's that is not EOS, and
    generation_config.json lists both."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content + '<end_of_turn>' }}{% endfor %}")
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    folder = write_policy(tmp_path / "policy", tokenizer, hidden_size=8, num_attention_heads=2)
    settings = json.dumps({"eos_token_id": [tokenizer.eos_token_id, turn]})
    (folder / "generation_config.json").write_text(settings)
    file = write_python(tmp_path / "f.py", """
        def count(prompts, responses):
            return [len(response) for response in responses]
    """)
    config = repo.Config(
        policy=str(folder), reward_model=f"{file}:count", cost_model=f"{file}:count",
        device="cpu", dtype="float32", max_response_length=200, temperature=3.0, steps=1)
    state = State(*load_policy(config), config)
    rollout = repo.collect(state, [f"number {i}" for i in range(64)], config)

    prompts, last = rollout.input_ids[:, :-rollout.response_mask.shape[1]], []
    assert ((prompts == turn).sum(1) == 1).all()  # which ends no response
    for ids, mask, finished in zip(rollout.input_ids, rollout.response_mask, rollout.finished):
        response = ids[-len(mask):][mask].tolist()
        ends = [token for token in response if token in (tokenizer.eos_token_id, turn)]
        assert ends == (response[-1:] if finished else [])
        last += ends
    assert {tokenizer.eos_token_id, turn} == set(last)
    for response in rollout.responses:
        assert "<end_of_turn>" not in response and tokenizer.eos_token not in response


def test_greedy_decoding_gives_the_tokens_of_the_plain_path(family):
    """At a temperature near zero the draw is the argmax: each prompt's tokens are those that the
    library finds for it alone."""
    settings = {"temperature": 1e-6, "max_response_length": 24}
    config = repo.Config(**family, **settings, device="cpu", dtype="float32")
    policy, tokenizer = load_policy(config)
    greedy = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": tokenizer.eos_token_id}
    prompts = repo.load_prompts(config.dataset)[:40]
    for prompt, response in zip(prompts, drawn(policy, tokenizer, config, prompts)):
        ids = torch.tensor(encode_prompts([prompt], tokenizer))
        plain = policy.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **greedy)
        assert response == plain[0, ids.shape[1] :].tolist()


def test_a_response_depends_on_its_prompt_key_and_place_alone(policy):
    policy, tokenizer, config = policy
    config.max_length = 40
    prompts = ["How do I paint a boat?", "How do I steal a very large lamp?", "Hi"]
    first = drawn(policy, tokenizer, config, prompts)
    torch.manual_seed(5)  # no other random state has a part in it
    assert drawn(policy, tokenizer, config, prompts) == first
    assert drawn(policy, tokenizer, config, prompts, key=1) != first
    assert drawn(policy, tokenizer, config, [*prompts, "Hi"])[:3] == first  # other rows neither
    assert len({tuple(row) for row in drawn(policy, tokenizer, config, ["Hi"] * 50)}) == 50


def test_draws_have_the_softmaxs_frequencies_at_the_temperature():
    count = 20_000
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 3.0, -2.0]])
    numbers = random_numbers("draws")
    uniform = 1 - torch.rand(count, 1, generator=numbers, dtype=torch.float64)
    draw = Draw(uniform, 7, temperature=2.0)
    scores = draw(torch.zeros(count, 7, dtype=torch.long), logits.expand(count, -1))
    shares = torch.bincount(scores.argmax(-1), minlength=5) / count
    weights = torch.tensor([1.0, math.e**0.5, 0.0, math.e**1.5, math.e**-1])
    assert shares[2] == 0
    # 3.5 standard deviations at the most
    assert torch.allclose(shares, weights / weights.sum(), atol=0.012)


def test_no_draw_is_a_token_of_probability_zero():
    uniform = torch.tensor([[2.0**-53], [1.0]], dtype=torch.float64)  # the smallest, the largest
    logits = torch.tensor([[-torch.inf, 0, 0, -torch.inf]] * 2)
    scores = Draw(uniform, 0, temperature=1.0)(torch.zeros(2, 0), logits)
    assert scores.argmax(-1).tolist() == [1, 2]


@pytest.mark.parametrize("rank, backend", [
    (4, "eager"), exhaustive(0, "inductor"), exhaustive(4, "inductor")])
def test_the_librarys_compiled_steps_give_the_same_tokens(family, rank, backend):
    """What generate() asks for on a GPU, a static cache and compiled steps, on this CPU. The eager
    backend traces the step as the other does, and makes no machine code."""
    settings = {"lora_rank": rank, "max_response_length": 12}
    config = repo.Config(**family, **settings, device="cpu", dtype="float32")
    policy, tokenizer = load_policy(config)
    policy = make_trainable(policy, config)
    plain, generate = drawn(policy, tokenizer, config), policy.generate
    compiled = CompileConfig(backend=backend)
    compiled._compile_all_devices = True

    def as_on_a_gpu(generation_config, **inputs):
        generation_config.cache_implementation = "static"
        generation_config.compile_config = compiled
        return generate(generation_config=generation_config, **inputs)

    policy.generate = as_on_a_gpu
    assert drawn(policy, tokenizer, config) == plain


def test_each_position_has_a_number_of_its_own():
    """Four tokens of equal probability: 0.1 falls on the first, 0.9 on the last."""
    draw = Draw(torch.tensor([[0.1, 0.9], [0.9, 0.1]]), prompt_length=3, temperature=1.0)
    first = draw(torch.zeros(2, 3), torch.zeros(2, 4)).argmax(-1)
    second = draw(torch.zeros(2, 4), torch.zeros(2, 4)).argmax(-1)
    assert first.tolist() == [0, 3] and second.tolist() == [3, 0]


def state_of(family, **changes):
    """(state, config, prompts): the tiny family's models, and its prompts."""
    settings = family | {"ptx_dataset": None, "steps": 1, "device": "cpu", "dtype": "float32"}
    config = repo.Config(**settings | changes)
    return State(*load_policy(config), config), config, repo.load_prompts(config.dataset)


def test_log_probs_are_of_the_distribution_that_was_sampled(family):
    """Of policy and reference, each against whole rows without padding."""
    state, config, prompts = state_of(family, max_response_length=6, temperature=2.0)
    with torch.no_grad():
        state.policy.lm_head.weight.mul_(1.5)  # so that the reference is another
    rollout = repo.collect(state, prompts[:3], config)
    for model, found in (
        (state.policy, rollout.log_probs),
        (state.reference, rollout.ref_log_probs),
    ):
        for i, prompt in enumerate(encode_prompts(rollout.prompts, state.tokenizer)):
            length = int(rollout.response_mask[i].sum())
            whole = rollout.input_ids[i][rollout.attention_mask[i].bool()][None]
            with torch.no_grad():
                logits = model(whole).logits[0, len(prompt) - 1:-1]
            log_probs = (logits / 2.0).log_softmax(-1)
            wanted = log_probs.gather(1, whole[0, len(prompt):, None])[:, 0]
            assert torch.allclose(found[i, :length], wanted, atol=1e-4)


# ---- gradients


def test_ptx_adds_its_weight_times_the_mean_over_all_answer_tokens(policy):
    """Against the library's cross-entropy of whole rows, each without padding."""
    policy, tokenizer, config = policy
    make_trainable(policy, config)
    answers = [[7, 8, 9, 1], [5, 1], [4, 1]]
    total = 0.0
    for prompt, answer in zip(PROMPTS, answers):
        logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    loss = total / 8  # tokens
    weights = list(policy.parameters())
    wanted = torch.autograd.grad(0.25 * loss, weights)

    config.ptx_coeff = 0.25
    batch, found = laid_out(PROMPTS, answers), 0.0
    for part in micro_batches(batch, torch.arange(3), 2):
        part_loss, _ = backward(policy, repo.ptx_loss, part, batch.response_mask.sum(),
                                config=config, scale=config.ptx_coeff)
        found += part_loss
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for weight, gradient in zip(weights, wanted):
        assert torch.allclose(weight.grad, gradient, atol=1e-6)


def test_gradients_are_cut_to_a_norm_of_one_and_only_then():
    model = torch.nn.Linear(2, 1, bias=False)
    for gradient, norm, cut in (([3.0, 4.0], 5.0, [0.6, 0.8]), ([0.3, 0.4], 0.5, [0.3, 0.4])):
        model.weight.grad = torch.tensor([gradient])
        assert clip_gradients(model) == pytest.approx(norm)
        assert torch.allclose(model.weight.grad, torch.tensor([cut]), atol=1e-5)


# ---- steps


def test_each_pass_goes_through_all_rows_in_an_order_of_its_own():
    config = repo.Config(update_iters=3, minibatch_size=8)
    rows = repo.minibatch_rows(32, 5, config)
    assert [len(each) for each in rows] == [8] * 12
    passes = [torch.cat(rows[start:start + 4]).tolist() for start in (0, 4, 8)]
    assert all(sorted(each) == list(range(32)) for each in passes)
    assert len(set(map(tuple, passes))) == 3
    again, next_step = (repo.minibatch_rows(32, step, config) for step in (5, 6))
    assert all(map(torch.equal, rows, again)) and not all(map(torch.equal, rows, next_step))


COMPARED = (
    *("actor_loss", "reward_critic_loss", "cost_critic_loss", "policy_grad_norm"),
    *("clip_fraction", "approx_kl", "kl", "reward"),
)


def test_micro_batches_change_memory_not_results(family):
    results = []
    for size in (3, 16):
        state, config, prompts = state_of(family, max_response_length=12, micro_batch_size=size)
        state.optimizer = torch.optim.SGD(state.policy.parameters(), lr=1.0)
        state.schedule = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda _: 1.0)
        _, metrics = repo.train_step(state, prompts[:10], [], config)
        results.append((metrics, list(state.policy.parameters())))
    (metrics, weights), (same_metrics, same_weights) = results
    for name in COMPARED:
        assert metrics[name] == pytest.approx(same_metrics[name], abs=1e-5), name
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, same_weights))

    # An unchanged policy has ratio 1, and the reference is the starting policy.
    assert same_metrics["clip_fraction"] == 0 and same_metrics["approx_kl"] < 1e-6
    assert same_metrics["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert same_metrics["kl"] == pytest.approx(0, abs=1e-4)


def test_a_step_uses_its_lambda_and_then_updates_it(family):
    """By hand: all eight cost 4, which is 3 above d, so with alpha 0.25 lambda rises by 0.75."""
    state, config, prompts = state_of(
        family, max_response_length=4, lambda_init=2.0, lambda_lr=0.25, threshold=1.0)
    state.cost_model = lambda ids, prompts, *_: torch.full((len(prompts),), 4.0)
    rollout, metrics = repo.train_step(state, prompts[:8], [], config)
    assert metrics["lambda"] == 2.0 and set(rollout.lambdas.tolist()) == {2.0}
    assert metrics["rectified_cost"] == 3.0
    assert state.lam == pytest.approx(2.75)
