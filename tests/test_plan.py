# pytest tests/test_plan.py
"""--dry_run: what it shows, that it loads nothing, and that its plan of the memory is what a run
takes."""
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import exhaustive, tiny_config, write_beaver, write_policy
from transformers import LlamaModel

import repo
from kernels.bench import peak_memory
from plumbing import models, plan, ranks, settings
from plumbing.models import load_policy
from plumbing.training import Models, State

SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32001,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "model_type": "llama",
    "torch_dtype": "bfloat16",
}
SCORE_MODEL = {"score_dim": 1, "bias": False, "score_bias": True}
PUBLISHED = {
    "policy": {"architectures": ["LlamaForCausalLM"]},
    "reward": SCORE_MODEL | {
        "architectures": ["LlamaForScore"], "score_type": "reward", "do_normalize": True},
    "cost": SCORE_MODEL | {"architectures": ["LlamaModelForScore"], "score_type": "cost"},
}


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory, tokenizer):
    """Folders with the published configs and a small tokenizer, and not one weight."""
    folder = tmp_path_factory.mktemp("seven_b")
    for name, published in PUBLISHED.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(SEVEN_B | published))
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"How do I paint boat {n}?"} for n in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def dry_run(seven_b, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sources = ["--model", seven_b / "policy", "--reward_model", seven_b / "reward",
               "--cost_model", seven_b / "cost", "--dataset", seven_b / "prompts.jsonl"]
    return lambda *flags: run("--dry_run", *sources, *flags)


def test_one_card_of_80_gib_is_enough_with_adapters_and_not_without(dry_run):
    code, out, printed = dry_run("--lora_rank", 64)
    assert code == 0 and not out.exists()

    found = re.findall(r"^(reference|reward model|cost model) +[\d,]+ +([\d,.]+) ", printed, re.M)
    weights = {name: float(mib.replace(",", "")) * 2**20 for name, mib in found}
    assert weights["reference"] == pytest.approx(6.74e9 * 2, rel=0.01) and len(weights) == 3
    for value in weights.values():  # a score model has no LM head
        assert value == pytest.approx(6.74e9 * 2, rel=0.02)
    backbones = {"policy": "reference", "reward critic": "reward model",
                 "cost critic": "cost model"}
    for trained, backbone in backbones.items():
        row = rf"^{trained} .* 159,9\d\d,\d\d\d  shares the weights of: {backbone}$"
        assert re.search(row, printed, re.M), trained

    fits = r"^rank 64, checkpointing: 4\d\.\d GiB, fits on a GPU of 80GiB$"
    assert re.search(fits, printed, re.M)
    does_not = (r"^full fine-tuning, checkpointing: 3\d\d\.\d GiB, "
                r"does not fit on a GPU of 80GiB$")
    assert re.search(does_not, printed, re.M)

    assert printed.count("a prompt of ") == 3
    assert "'BEGINNING OF CONVERSATION: USER: How do I paint boat " in printed
    assert printed.count("reads the tokens of the policy: ") == 2 and "--kl_coeff 0.01" in printed


@pytest.mark.parametrize("flags, says", [
    (("--lora_rank", 64, "--gpu_memory", "24GB"),
     r"rank 64, checkpointing needs 4\d\.\d GiB, a GPU of 24GB has 22\.4; "
     r"the largest term is weights, 39\.\d GiB; take a larger"),
    (("--lora_rank", 0),
     r"full fine-tuning, checkpointing needs 3\d\d\.\d GiB, .* "
     r"the largest term is optimiser, 1\d\d\.\d GiB; use --lora_rank 64 --gradient_check"),
    (("--lora_rank", 64, "--gpu_memory", "plenty"),
     r"--gpu_memory plenty: not a size such as 80GiB or 24GB"),
])
def test_what_does_not_fit_is_refused_with_the_largest_term_and_what_to_do(dry_run, flags, says):
    code, out, printed = dry_run(*flags)
    assert code == 2 and not out.exists() and re.search(rf"^error: {says}", printed, re.M)


def test_eight_cards_of_80_gib_are_enough_for_full_fine_tuning(dry_run, monkeypatch):
    """By hand, 8 ranks, 6,738,423,808 parameters, 16 bytes for each of a trained model, 4 of the
    reference, 2 of a score model, and the whole policy while it samples."""
    for module in (plan, ranks, settings):
        monkeypatch.setattr(module, "RANKS", 8)
    code, out, printed = dry_run("--lora_rank", 0)
    assert code == 0 and not out.exists()
    assert "each of the 8 ranks holds 1/8" in printed and "shares" not in printed

    table = re.findall(r"^(\S.*?) {2,}([\d.]+) ", printed, re.M)
    rows = {name: float(gib) for name, gib in table}
    by_hand = 6.66e9 * (3 * 16 + 4 + 2 * 2) / 8 / 2**30
    held = rows["weights"] + rows["optimiser"] + rows["gradients"]
    assert held == pytest.approx(by_hand, rel=0.02)
    assert rows["weights in use, sampling"] == pytest.approx(6738423808 * 2 / 2**30, abs=0.01)
    fits = (r"^full fine-tuning, checkpointing: 5[012]\.\d GiB per rank, "
            r"fits on a GPU of 80GiB$")
    assert re.search(fits, printed, re.M)


def test_the_first_thing_that_would_fail_is_found_without_weights(seven_b, run):
    code, _, printed = run(
        "--dry_run", "--model", seven_b / "policy", "--reward_model", seven_b / "reward",
        "--cost_model", seven_b / "cost", "--dataset", seven_b / "prompts.jsonl",
        "--prompt_column", "question")
    assert code == 2 and "question" in printed.splitlines()[-1]


def test_all_names_that_cannot_be_reached_are_named_at_once(run):
    for flags in ((), ("--dry_run",)):
        code, out, printed = run("--model", "alpaca-7b", *flags)
        sentence = printed.splitlines()[-1]
        assert code == 2 and not out.exists() and "hf download" in sentence
        for name in (
            "--policy PKU-Alignment/alpaca-7b-reproduced",
            "--reward_model PKU-Alignment/beaver-7b-v1.0-reward",
            "--cost_model PKU-Alignment/beaver-7b-v1.0-cost",
            "--dataset PKU-Alignment/PKU-SafeRLHF",
        ):
            assert name in sentence


def test_a_dry_run_of_the_tiny_family_on_this_computer(run):
    code, out, printed = run("--dry_run", "--device", "cpu")
    assert code == 0 and not out.exists()
    assert "full fine-tuning*" in printed and "fits on this computer" in printed


SHAPES = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    },
    "100M": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
    },
}


def write_models(folder, tokenizer, shape: dict) -> dict:
    """A policy and two score models with random weights; the settings that name them."""
    write_policy(folder / "policy", tokenizer, **shape)
    for role in ("reward", "cost"):
        body = LlamaModel(tiny_config(tokenizer, **shape))
        weights = {f"model.{name}": value for name, value in body.state_dict().items()}
        weights["score_head.weight"] = torch.randn(1, body.config.hidden_size)
        weights["score_head.bias"] = torch.zeros(1)
        write_beaver(folder / role, tokenizer, weights, **shape)
    return {"policy": str(folder / "policy"), "reward_model": str(folder / "reward"),
            "cost_model": str(folder / "cost")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the CPU's allocator")
@pytest.mark.parametrize("size, rank, checkpointing", [
    ("tiny", 0, False),
    exhaustive("tiny", 0, True),
    exhaustive("tiny", 8, False),
    ("tiny", 8, True),
    exhaustive("100M", 8, True),
    exhaustive("100M", 0, False),
])
def test_the_plan_is_what_a_step_takes(
    tmp_path, tokenizer, monkeypatch, size, rank, checkpointing
):
    """Weights and optimiser by their tensors, the rest by PyTorch's allocator over a whole step;
    the responses of a random policy run to their limit. Prompts that begin alike would take less:
    a plan does not count on them."""
    monkeypatch.setattr(models, "MIN_SHARED", math.inf)
    count, length = (64, 32) if size == "tiny" else (2, 12)
    sources = write_models(tmp_path, tokenizer, SHAPES[size])
    config = repo.Config(
        **sources, device="cpu", dtype="float32", lora_rank=rank, steps=4, batch_size=count,
        micro_batch_size=min(count, 32), max_response_length=length, max_length=400,
        gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    prompts = ["How do I paint a very old boat in the middle of the winter night?"] * count

    state = State(*load_policy(config), config)
    repo.train_step(state, prompts, [], config)  # makes the optimiser's state
    held = {weight.data_ptr(): weight.nbytes
            for model in plan.models_of(state).values() for weight in model.parameters()}
    moments = sum(value.nbytes for entry in state.optimizer.state.values()
                  for value in entry.values() if isinstance(value, torch.Tensor))
    in_a_step = peak_memory(lambda: repo.train_step(state, prompts, [], config))
    measured = sum(held.values()) + moments + in_a_step

    on_meta = replace(config, device="meta", dry_run=True)
    tokenizer = state.tokenizer
    policy, _ = load_policy(on_meta)
    shapes = Models(policy, tokenizer, on_meta)
    longest = plan.longest_rows(prompts, [], tokenizer, on_meta)
    terms = plan.memory_terms(
        shapes, replace(on_meta, device="cpu"), longest, checkpointing)
    assert plan.total(terms) == pytest.approx(measured, rel=0.15), (
        plan.total(terms) / 2**20, measured / 2**20, terms)
