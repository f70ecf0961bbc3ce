# pytest tests/test_plan.py
"""--dry_run: what it shows, that it loads nothing, and that its plan of the memory is what a run
takes."""
import json
import math
import re

import pytest
import torch
from conftest import exhaustive, write_policy, write_python

import repo
from kernels.bench import peak_memory
from plumbing import models, plan, ranks, settings
from plumbing.models import load_policy
from plumbing.training import State

SEVEN_B = {  # Llama's defaults say the rest
    "vocab_size": 32001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "model_type": "llama",
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

    for flags, verdict in (("64", r"4\d\.\d GiB, fits"), ("0", r"3\d\d\.\d GiB, does not fit")):
        line = f"^--lora_rank {flags} --gradient_checkpointing true: {verdict} on a GPU of 80GiB$"
        assert re.search(line, printed, re.M)

    assert printed.count("a prompt of ") == 3
    assert "'BEGINNING OF CONVERSATION: USER: How do I paint boat " in printed
    reads = (r"reads the tokens of the policy: 'BEGINNING OF CONVERSATION: USER: How do I paint "
             r"boat \d+\? ASSISTANT:RESPONSE</s>', and without '</s>' where ")
    assert len(re.findall(reads, printed)) == 2 and "--kl_coeff 0.01" in printed


@pytest.mark.parametrize("flags, says", [
    (("--lora_rank", 64, "--gpu_memory", "24GB"),
     r"--lora_rank 64 --gradient_checkpointing true: needs 4\d\.\d GiB, but a GPU of 24GB has "
     r"22\.4 GiB; the largest part is weights, 39\.\d GiB; take a larger"),
    (("--lora_rank", 0),
     r"--lora_rank 0 --gradient_checkpointing true: needs 3\d\d\.\d GiB, .* "
     r"the largest part is optimiser, 1\d\d\.\d GiB; use --lora_rank 64 --gradient_check"),
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

    gib = {name: float(number)
           for name, number in re.findall(r"^(\S.*?) {2,}([\d.]+)$", printed, re.M)}
    by_hand = 6.66e9 * (3 * 16 + 4 + 2 * 2) / 8 / 2**30
    held = gib["weights"] + gib["optimiser"] + gib["learning: gradients"]
    assert held == pytest.approx(by_hand, rel=0.02)
    assert gib["sampling: copies of weights"] == pytest.approx(6738423808 * 2 / 2**30, abs=0.01)
    assert 50 < gib["at most"] < 53


def test_the_first_thing_that_would_fail_is_found_without_weights(dry_run):
    code, _, printed = dry_run("--prompt_column", "question")
    assert code == 2 and "question" in printed.splitlines()[-1]


@pytest.mark.parametrize("family, of_a_token", [
    ({"model_type": "mamba"}, 0),
    ({"model_type": "gemma4_text", "layer_types": ["sliding_attention", "full_attention"],
      "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 128,
      "intermediate_size": 64, "vocab_size_per_layer_input": 600}, 2 * (2 * 64 + 2 * 128)),
], ids=["no attention", "layers of different widths"])
def test_the_cache_is_planned_layer_by_layer(dry_run, tmp_path, tokenizer, family, of_a_token):
    """Keys and values of 16 responses, in fp32."""
    sizes = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2}
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps(family | sizes))
    tokenizer.save_pretrained(tmp_path / "policy")
    code, _, printed = dry_run("--model", tmp_path / "policy", "--device", "cpu", "--lora_rank", 4)
    [mib] = re.findall(r"^sampling: KV cache +([\d.]+)$", printed, re.M)
    [row] = re.findall(r"A padded row has up to (\d+) tokens", printed)
    divisor = 2**30 if "memory, in GiB" in printed else 2**20
    assert float(mib) == round(of_a_token * 4 * 16 * int(row) / divisor, 2)


def test_a_sequence_classifier_is_planned(dry_run, tmp_path, tokenizer):
    classifier = SEVEN_B | {"architectures": ["LlamaForSequenceClassification"],
                            "id2label": {"0": "score"}, "vocab_size": 600}
    (tmp_path / "config.json").write_text(json.dumps(classifier))
    tokenizer.save_pretrained(tmp_path)
    code, _, printed = dry_run("--reward_model", tmp_path, "--lora_rank", 64)
    assert code == 0 and re.search(r"^reward model +6,\d+,\d+,\d+ ", printed, re.M), printed


def test_scoring_with_a_larger_model_than_the_policy_is_planned(seven_b, tokenizer, tmp_path):
    """Rows that begin alike are read with a cache. Here 32 rows of up to 1,100 tokens: the 7B
    scorer's keys and values take 2 x 32 layers x 4,096 numbers x 2 bytes a token."""
    write_policy(tmp_path / "policy", tokenizer)
    config = repo.Config(
        policy=str(tmp_path / "policy"), reward_model=str(seven_b / "reward"),
        cost_model=str(seven_b / "cost"), device="cpu", dtype="bfloat16", batch_size=64,
        micro_batch_size=32, baseline="group", samples_per_prompt=2, lora_rank=2, dry_run=True)
    shapes = plan.load_shapes(config)
    terms = plan.memory_terms(shapes, config, (100, 1100), checkpointing=True)
    assert terms["scoring: KV cache"] == 32 * 1100 * 2**19
    always = sum(terms[name] for name in ("weights", "optimiser", "reserve"))
    assert plan.total(terms) == always + terms["scoring: KV cache"]


def test_all_names_that_cannot_be_reached_are_named_at_once(run):
    for flags in ((), ("--dry_run",)):
        code, out, printed = run("--model", "alpaca-7b", *flags)
        sentence = printed.splitlines()[-1]
        assert code == 2 and not out.exists() and "hf download" in sentence
        for flag, name in (
            ("policy", "alpaca-7b-reproduced"), ("reward_model", "beaver-7b-v1.0-reward"),
            ("cost_model", "beaver-7b-v1.0-cost"), ("dataset", "PKU-SafeRLHF"),
        ):
            assert f"--{flag} PKU-Alignment/{name}" in sentence


SHAPES = {  # hidden size, MLP, layers, heads
    "tiny": (64, 128, 2, 4),
    "100M": (768, 2048, 12, 12),
}


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
    """Weights and optimiser by their tensors, the rest by PyTorch's allocator over a whole step.
    The responses of a random policy run to their limit. Prompts that begin alike would take less,
    and a plan does not count on them."""
    monkeypatch.setattr(models, "MIN_SHARED", math.inf)
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    write_policy(tmp_path / "policy", tokenizer, **dict(zip(names, SHAPES[size])))
    write_python(tmp_path / "one.py", "def score(prompts, responses): return [1.0] * len(prompts)")
    score = f"{tmp_path}/one.py:score"
    count, length = (64, 32) if size == "tiny" else (2, 12)
    config = repo.Config(
        policy=str(tmp_path / "policy"), reward_model=score, cost_model=score, device="cpu",
        dtype="float32", lora_rank=rank, steps=4, batch_size=count,
        micro_batch_size=min(count, 32), max_response_length=length, max_length=400,
        gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    prompts = ["How do I paint a very old boat in the middle of the winter night?"] * count

    state = State(*load_policy(config), config)
    held = {weight.data_ptr(): weight.nbytes
            for model in plan.models_of(state).values() for weight in model.parameters()}
    moments = sum(value.nbytes for entry in state.optimizer.state.values()
                  for value in entry.values())
    in_a_step = peak_memory(lambda: repo.train_step(state, prompts, [], config))
    measured = sum(held.values()) + moments + in_a_step

    config.dry_run = True
    lengths = plan.longest_rows(prompts, [], state.tokenizer, config)
    planned = plan.total(
        plan.memory_terms(plan.load_shapes(config), config, lengths, checkpointing))
    assert planned == pytest.approx(measured, rel=0.15)
