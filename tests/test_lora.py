# pytest tests/test_lora.py
"""Low-rank adapters: three backbones hold six models, and only adapters and heads are trained, saved and resumed."""
import json
from functools import partial

import pytest
import torch
from conftest import random_beaver, read_checkpoint, read_jsonl, write_beaver, write_policy
from test_run import FEW, stable
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import repo
from kernels.bench import peak_memory

RANK = 3


@pytest.fixture
def state(tmp_path, tokenizer):
    """Policy, reference, two score models and two critics on random checkpoints."""
    write_policy(tmp_path / "policy", tokenizer)
    for role in ("reward", "cost"):
        write_beaver(tmp_path / role, tokenizer, random_beaver(tokenizer)[1])
    config = repo.Config(policy=str(tmp_path / "policy"), reward_model=str(tmp_path / "reward"), cost_model=str(tmp_path / "cost"), device="cpu",
                         dtype="float32", lora_rank=RANK, actor_lr=1e-2, critic_lr=1e-2, steps=4, max_response_length=8, max_length=200)
    torch.manual_seed(0)
    return repo.State(*repo.load_policy(config), config), config


IDS = torch.tensor([[0, 4, 5, 6, 7, 8]])


def tune(state):
    """Gives every factor B something to say."""
    for name in repo.State.TRAINED:
        for key, parameter in repo.trainable(getattr(state, name)).items():
            if key.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.1)


def test_it_begins_as_the_layer_it_replaces_to_the_bit(state):
    state, _ = state
    with torch.no_grad():
        assert torch.equal(state.policy(IDS).logits, state.reference(IDS).logits)
        for role in ("reward", "cost"):
            critic, scorer = getattr(state, f"{role}_critic"), getattr(state, role).model
            assert torch.allclose(critic.values(IDS, torch.ones_like(IDS)), scorer.values(IDS, torch.ones_like(IDS)), atol=1e-5)  # its head is a copy


def test_three_backbones_hold_six_models_and_no_adapter_touches_another(state):
    state, _ = state
    families = [("policy", state.policy, state.reference), ("reward", state.reward_critic, state.reward.model), ("cost", state.cost_critic, state.cost.model)]
    for name, trained, frozen in families:
        own = {weight.data_ptr() for weight in frozen.base_model.parameters()}
        shared = {weight.data_ptr() for key, weight in trained.base_model.named_parameters() if "lora" not in key}
        assert own == shared, name
    with torch.no_grad():
        before = [state.reference(IDS).logits, *[getattr(state, role).model.score(IDS, torch.ones_like(IDS)) for role in ("reward", "cost")]]
        tune(state)
        after = [state.reference(IDS).logits, *[getattr(state, role).model.score(IDS, torch.ones_like(IDS)) for role in ("reward", "cost")]]
        assert all(torch.equal(a, b) for a, b in zip(before, after)) and not torch.allclose(state.policy(IDS).logits, before[0], atol=1e-3)


def test_what_is_trained_and_its_optimiser_state_by_hand(state):
    """Hidden 32, MLP 48, 2 layers, 4 heads: q, k, v, o of 32 x 32, gate and up of 48 x 32, down of 32 x 48; a head of 32 weights and a bias."""
    state, config = state
    adapters = 2 * RANK * (4 * (32 + 32) + 3 * (32 + 48))
    expected = {"policy": adapters, "reward_critic": adapters + 33, "cost_critic": adapters + 33}
    for name, count in expected.items():
        assert sum(parameter.numel() for parameter in repo.trainable(getattr(state, name)).values()) == count
    frozen = {name: {key: value.clone() for key, value in getattr(state, name).state_dict().items() if "lora" not in key and "score_head" not in key}
              for name in expected}
    repo.train_step(state, ["How do I paint a boat?"] * 16, [], config)
    repo.train_step(state, ["How do I paint a boat?"] * 16, [], config)
    moments = sum(value.nbytes for entry in state.optimizer.state.values() for key, value in entry.items() if key.startswith("exp_avg"))
    assert moments == 2 * 4 * sum(expected.values())  # Adam's two fp32 moments, of adapters and heads alone
    for name, weights in frozen.items():
        now = getattr(state, name).state_dict()
        assert all(torch.equal(now[key], value) for key, value in weights.items()) and any(value.abs().max() > 0 for key, value in now.items() if "lora_b" in key)


def test_merged_logits_are_the_unmerged_ones(state):
    state, _ = state
    tune(state)
    with torch.no_grad():
        unmerged = state.policy(IDS).logits
        plain = LlamaForCausalLM(state.policy.config).eval()
        assert not torch.allclose(state.reference(IDS).logits, unmerged, atol=1e-3)
        plain.load_state_dict(repo.merged(state.policy.state_dict()))
        assert torch.allclose(plain(IDS).logits, unmerged, atol=1e-5)


def test_gradients_equal_finite_differences():
    layer = repo.LowRankLinear(torch.nn.Linear(5, 4), 2).double()
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,)), (layer.lora_a, layer.lora_b))
    assert torch.allclose(layer(x), x @ (layer.weight + layer.lora_b @ layer.lora_a).T + layer.bias)


def test_critics_sit_on_the_policys_backbone_where_tokens_differ(tmp_path, tokenizer):
    from test_models import other_tokenizer
    write_policy(tmp_path / "policy", tokenizer)
    other = other_tokenizer()
    for role in ("reward", "cost"):
        write_beaver(tmp_path / role, other, random_beaver(other)[1])
    config = repo.Config(policy=str(tmp_path / "policy"), reward_model=str(tmp_path / "reward"), cost_model=str(tmp_path / "cost"), device="cpu",
                         dtype="float32", lora_rank=RANK, actor_lr=1e-2, critic_lr=1e-2, steps=1)
    state = repo.State(*repo.load_policy(config), config)
    weight = state.reference.base_model.layers[0].mlp.up_proj.weight
    bodies = state.policy.base_model, state.reward_critic.base_model, state.cost_critic.base_model
    assert all(body.layers[0].mlp.up_proj.weight is weight for body in bodies) and len({body.layers[0].mlp.up_proj.lora_a.data_ptr() for body in bodies}) == 3
    assert state.reward_critic.values(IDS, torch.ones_like(IDS)).abs().max() == 0


def test_a_run_resumes_exactly_from_adapters_alone_and_saves_a_plain_model(run, tmp_path):
    flags = (*FEW, "--lora_rank", 4, "--ptx_coeff", 0.1)
    code, whole, printed = run(*flags, "--save_every", 2, out="whole")
    assert code == 0 and " of them trained" in printed
    names = [name for name in read_checkpoint(whole / "checkpoints" / "step-2")[0] if "optimizer" not in name and "lora" not in name]
    assert sorted(names) == [f"{critic}_critic.score_head.{part}" for critic in ("cost", "reward") for part in ("bias", "weight")]
    code, half, _ = run(*flags, "--resume", whole / "checkpoints" / "step-2", out="half")
    assert code == 0 and stable(read_jsonl(half / "metrics.jsonl")) == stable(read_jsonl(whole / "metrics.jsonl"))
    assert (half / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    actors = [AutoModelForCausalLM.from_pretrained(out / "final" / "actor") for out in (whole, half)]
    assert all(torch.equal(a, b) for a, b in zip(*(actor.state_dict().values() for actor in actors)))
    names = json.loads((whole / "final" / "actor" / "config.json").read_text())
    assert names["architectures"] == ["LlamaForCausalLM"] and not list((whole / "final" / "actor").glob("*adapter*"))


def test_a_model_without_linear_layers_is_refused_in_one_sentence(run, tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    code, out, printed = run(*FEW, "--policy", tmp_path / "gpt2", "--lora_rank", 4)
    assert code == 2 and not out.exists() and "--lora_rank 4: GPT2Model has no linear layers" in printed


def test_bfloat16_keeps_frozen_weights_in_bfloat16_and_adapters_in_fp32(run):
    code, out, _ = run(*FEW, "--lora_rank", 4, "--dtype", "bfloat16", "--steps", 1, "--batch_size", 4)
    assert code == 0 and abs(read_jsonl(out / "metrics.jsonl")[0]["kl"]) < 1e-6  # adapters of 0 on the reference's own weights
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["kl"] == 0
    assert AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [0, RANK])
def test_gradient_checkpointing_changes_memory_not_results(tmp_path, tokenizer, rank):
    write_policy(tmp_path / "policy", tokenizer, num_hidden_layers=6)
    for role in ("reward", "cost"):
        write_beaver(tmp_path / role, tokenizer, random_beaver(tokenizer)[1])
    results, peaks = [], []
    for checkpointing in (False, True):
        config = repo.Config(policy=str(tmp_path / "policy"), reward_model=str(tmp_path / "reward"), cost_model=str(tmp_path / "cost"), device="cpu",
                             dtype="float32", lora_rank=rank, actor_lr=1e-3, critic_lr=1e-3, steps=4, max_response_length=64, max_length=200,
                             gradient_checkpointing=checkpointing, micro_batch_size=16)
        torch.manual_seed(0)
        state = repo.State(*repo.load_policy(config), config)
        step = partial(repo.train_step, state, ["How do I paint a boat?"] * 16, [], config)
        results.append(stable([step()[1]]))
        peaks.append(peak_memory(step))
    for a, b in zip(*results):
        assert all(b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5) for key in a)
    assert peaks[1] < 0.7 * peaks[0]
