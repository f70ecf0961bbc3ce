# pytest tests/test_lora.py
"""Low-rank adapters: three backbones hold six models, and only adapters and heads are trained,
saved and resumed."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import random_beaver, read_checkpoint, read_jsonl, write_beaver, write_policy
from test_models import other_tokenizer
from test_run import FEW, stable
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import repo
from kernels.bench import peak_memory
from plumbing.adapters import LowRankLinear, merged, trainable
from plumbing.models import load_policy
from plumbing.training import State

RANK = 3
IDS = torch.tensor([[0, 4, 5, 6, 7, 8]])
ALL = torch.ones_like(IDS)
PROMPTS = ["How do I paint a boat?"] * 16


def write_models(folder, policy_tokenizer, scorer_tokenizer, **changes) -> repo.Config:
    """Random checkpoints of a policy and two score models, and the settings that name them."""
    write_policy(folder / "policy", policy_tokenizer, **changes)
    for role in ("reward", "cost"):
        write_beaver(folder / role, scorer_tokenizer, random_beaver(scorer_tokenizer)[1])
    return repo.Config(
        policy=str(folder / "policy"),
        reward_model=str(folder / "reward"),
        cost_model=str(folder / "cost"),
        device="cpu",
        dtype="float32",
        lora_rank=RANK,
        actor_lr=1e-2,
        critic_lr=1e-2,
        steps=4,
        max_response_length=8,
        max_length=200,
    )


@pytest.fixture
def config(tmp_path, tokenizer):
    return write_models(tmp_path, tokenizer, tokenizer)


@pytest.fixture
def state(config):
    """Policy, reference, two score models and two critics."""
    torch.manual_seed(0)
    return State(*load_policy(config), config)


def tune(state):
    """Gives every factor B something to say."""
    for name in state.trained:
        for key, parameter in trainable(getattr(state, name)).items():
            if key.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.1)


# ---- the layers


def test_factor_a_is_scaled_by_inputs_and_rank():
    """2 sqrt(400) / 50 = 0.8; 20,000 numbers tell their deviation to 1 %."""
    torch.manual_seed(0)
    layer = LowRankLinear(torch.nn.Linear(400, 3), 50)
    assert layer.lora_a.std().item() == pytest.approx(0.8, rel=0.03)
    assert layer.lora_b.abs().max() == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5)])
def test_it_is_the_merged_layer_and_its_gradients_finite_differences(shape, bias):
    layer = LowRankLinear(torch.nn.Linear(5, 4, bias=bias), 2).double().requires_grad_(False)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    merged_weight = layer.weight + layer.lora_b @ layer.lora_a
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, merged_weight, layer.bias))

    def output(x, a, b):
        return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    factors = [factor.clone().requires_grad_() for factor in (layer.lora_a, layer.lora_b)]
    assert torch.autograd.gradcheck(output, (x, *factors))


class Made(TorchDispatchMode):
    """How many tensors of each shape operations make."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not function.name().endswith("_"):
            self.shapes[tuple(result.shape)] += 1
        return result


def test_small_products_add_into_the_large_ones():
    """One [n, out] and one [n, in] come into being, where a sum of two would make three each."""
    layer = LowRankLinear(torch.nn.Linear(50, 40), 2)
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
    x = torch.randn(30, 50, requires_grad=True)
    with Made() as made:
        y = layer(x)
    assert made.shapes == {(30, 40): 1, (30, 2): 1}

    upstream = torch.randn_like(y)
    with Made() as made:
        torch.autograd.grad(y, (x, layer.lora_a, layer.lora_b), upstream)
    assert made.shapes == {(30, 50): 1, (30, 2): 1, (2, 50): 1, (40, 2): 1}


def test_it_begins_as_the_layer_it_replaces_to_the_bit(state):
    with torch.no_grad():
        assert torch.equal(state.policy(IDS).logits, state.reference(IDS).logits)
        for role in ("reward", "cost"):
            critic, scorer = getattr(state, f"{role}_critic"), getattr(state, f"{role}_model").model
            # Its head is a copy.
            assert torch.allclose(critic.values(IDS, ALL), scorer.values(IDS, ALL), atol=1e-5)


def test_merged_logits_are_the_unmerged_ones(state):
    tune(state)
    with torch.no_grad():
        plain = LlamaForCausalLM(state.policy.config).eval()
        plain.load_state_dict(merged(state.policy.state_dict()))
        assert torch.allclose(plain(IDS).logits, state.policy(IDS).logits, atol=1e-5)


# ---- the models that share a backbone


def test_three_backbones_hold_six_models(state):
    families = {
        "policy": (state.policy, state.reference),
        "reward": (state.reward_critic, state.reward_model.model),
        "cost": (state.cost_critic, state.cost_model.model),
    }
    for name, (trained, frozen) in families.items():
        of_the_frozen = {weight.data_ptr() for weight in frozen.base_model.parameters()}
        of_the_trained = {
            weight.data_ptr()
            for key, weight in trained.base_model.named_parameters()
            if "lora" not in key
        }
        assert of_the_frozen == of_the_trained, name


@torch.no_grad()
def test_no_adapter_touches_another_model(state):
    def frozen_outputs():
        scores = [scorer.model.score(IDS, ALL) for scorer in (state.reward_model, state.cost_model)]
        return [state.reference(IDS).logits, *scores]

    before = frozen_outputs()
    tune(state)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen_outputs()))
    assert not torch.allclose(state.policy(IDS).logits, before[0], atol=1e-3)


def test_critics_sit_on_the_policys_backbone_where_tokens_differ(tmp_path, tokenizer):
    config = write_models(tmp_path, tokenizer, other_tokenizer())
    state = State(*load_policy(config), config)
    layers = [model.base_model.layers[0].mlp.up_proj
              for model in (state.reference, state.policy, state.reward_critic, state.cost_critic)]
    assert all(layer.weight is layers[0].weight for layer in layers)
    assert len({layer.lora_a.data_ptr() for layer in layers[1:]}) == 3
    assert state.reward_critic.values(IDS, ALL).abs().max() == 0


# ---- what is trained

# Hidden 32, MLP 48, 2 layers, 4 heads: q, k, v, o of 32 x 32, gate and up of 48 x 32, down of
# 32 x 48; a head of 32 weights and a bias.
ADAPTERS = 2 * RANK * (4 * (32 + 32) + 3 * (32 + 48))
HEAD = 33
COUNTS = {"policy": ADAPTERS, "reward_critic": ADAPTERS + HEAD, "cost_critic": ADAPTERS + HEAD}


def test_what_is_trained_and_its_optimiser_state_by_hand(state, config):
    frozen = {}
    for name, count in COUNTS.items():
        model = getattr(state, name)
        assert sum(parameter.numel() for parameter in trainable(model).values()) == count
        frozen[name] = {key: weight.clone() for key, weight in model.state_dict().items()
                        if "lora" not in key and "score_head" not in key}

    repo.train_step(state, PROMPTS, [], config)
    repo.train_step(state, PROMPTS, [], config)
    moments = sum(value.nbytes for entry in state.optimizer.state.values()
                  for key, value in entry.items() if key.startswith("exp_avg"))
    assert moments == 2 * 4 * sum(COUNTS.values())  # Adam's two fp32 moments

    for name in COUNTS:
        now = getattr(state, name).state_dict()
        assert all(torch.equal(now[key], value) for key, value in frozen[name].items())
        assert any(value.abs().max() > 0 for key, value in now.items() if "lora_b" in key)


@pytest.mark.parametrize("rank", [0, RANK])
def test_gradient_checkpointing_changes_memory_not_results(tmp_path, tokenizer, rank):
    config = write_models(tmp_path, tokenizer, tokenizer, num_hidden_layers=6)
    config.lora_rank = rank
    config.actor_lr = config.critic_lr = 1e-3
    config.max_response_length, config.micro_batch_size = 32, 16
    results, peaks = [], []

    def step(state):
        _, metrics = repo.train_step(state, PROMPTS, [], config)
        results.append(metrics)

    for checkpointing in (False, True):
        config.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        state = State(*load_policy(config), config)
        peaks.append(peak_memory(partial(step, state)))
    without, with_checkpointing = stable(results)
    for key, value in without.items():
        assert with_checkpointing[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert peaks[1] < 0.7 * peaks[0]


# ---- runs


def test_a_run_resumes_exactly_from_adapters_alone_and_saves_a_plain_model(run, few_pairs):
    flags = (*FEW, "--lora_rank", 4, "--ptx_coeff", 0.1, "--ptx_dataset", few_pairs)
    code, whole, printed = run(*flags, "--save_every", 2, out="whole")
    assert code == 0 and " of them trained" in printed
    tensors, _ = read_checkpoint(whole / "checkpoints" / "step-2")
    other = {name for name in tensors if "optimizer" not in name and "lora" not in name}
    assert other == {
        *("reward_critic.score_head.weight", "reward_critic.score_head.bias"),
        *("cost_critic.score_head.weight", "cost_critic.score_head.bias"),
    }

    code, half, _ = run(*flags, "--resume", whole / "checkpoints" / "step-2", out="half")
    assert code == 0
    metrics = [stable(read_jsonl(out / "metrics.jsonl")) for out in (whole, half)]
    assert metrics[0] == metrics[1]
    assert (half / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    actor, same = (
        AutoModelForCausalLM.from_pretrained(out / "final" / "actor").state_dict().values()
        for out in (whole, half)
    )
    assert all(torch.equal(a, b) for a, b in zip(actor, same))

    saved = json.loads((whole / "final" / "actor" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert not list((whole / "final" / "actor").glob("*adapter*"))


def test_a_model_without_linear_layers_is_refused_in_one_sentence(run, tmp_path, tokenizer):
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    gpt2 = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=1))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    code, out, printed = run(*FEW, "--policy", tmp_path / "gpt2", "--lora_rank", 4)
    assert code == 2 and "--lora_rank 4: GPT2Model has no linear layers" in printed
    assert not out.exists()


def test_bfloat16_keeps_frozen_weights_in_bfloat16_and_adapters_in_fp32(run):
    flags = ("--lora_rank", 4, "--dtype", "bfloat16", "--steps", 1, "--batch_size", 4)
    code, out, _ = run(*FEW, *flags)
    assert code == 0
    # Adapters of 0 on the reference's own weights.
    assert abs(read_jsonl(out / "metrics.jsonl")[0]["kl"]) < 1e-6
    assert json.loads((out / "summary.json").read_text())["before"]["kl"] == 0
    actor = AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto")
    assert actor.dtype == torch.bfloat16
