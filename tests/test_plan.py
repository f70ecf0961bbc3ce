# pytest tests/test_plan.py
"""--dry_run: what it shows, that it loads nothing, and that its plan of the memory is what a run takes."""
import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, write_beaver, write_policy
from transformers import LlamaModel

import repo
from kernels.bench import peak_memory
from tiny_configs import plan, ranks

SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
           "vocab_size": 32001, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "model_type": "llama", "torch_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory, tokenizer):
    """Folders with the published configs and a small tokenizer, and not one weight."""
    folder = tmp_path_factory.mktemp("seven_b")
    for name, published in {"policy": {"architectures": ["LlamaForCausalLM"]},
                            "reward": {"architectures": ["LlamaForScore"], "score_dim": 1, "bias": False, "score_bias": True, "score_type": "reward", "do_normalize": True},
                            "cost": {"architectures": ["LlamaModelForScore"], "score_dim": 1, "bias": False, "score_bias": True, "score_type": "cost"}}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(SEVEN_B | published))
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"How do I paint boat {n}?"}) + "\n" for n in range(40)))
    return folder


@pytest.fixture
def dry_run(seven_b, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sources = [word for name in ("reward", "cost") for word in (f"--{name}_model", seven_b / name)]
    return lambda *flags: run("--dry_run", "--model", seven_b / "policy", *sources, "--dataset", seven_b / "prompts.jsonl", *flags)


def test_one_card_of_80_gib_is_enough_with_adapters_and_not_without(dry_run):
    code, out, printed = dry_run("--lora_rank", 64)
    assert code == 0 and not out.exists()
    weights = {name: float(mib.replace(",", "")) * 2 ** 20 for name, mib in re.findall(r"^(reference|reward model|cost model) +[\d,]+ +([\d,.]+) ", printed, re.M)}
    assert weights["reference"] == pytest.approx(6.74e9 * 2, rel=0.01) and len(weights) == 3
    assert all(value == pytest.approx(6.74e9 * 2, rel=0.02) for value in weights.values())  # a score model has no LM head
    for trained, backbone in (("policy", "reference"), ("reward critic", "reward model"), ("cost critic", "cost model")):
        assert re.search(rf"^{trained} .* 159,9\d\d,\d\d\d  shares the weights of: {backbone}$", printed, re.M), trained
    assert re.search(r"^rank 64, checkpointing: 4\d\.\d GiB, fits on a GPU of 80GiB$", printed, re.M)
    assert re.search(r"^full fine-tuning, checkpointing: 3\d\d\.\d GiB, does not fit on a GPU of 80GiB$", printed, re.M)
    assert printed.count("a prompt of ") == 3 and "'BEGINNING OF CONVERSATION: USER: How do I paint boat " in printed
    assert printed.count("reads the tokens of the policy: ") == 2 and "--kl_coeff 0.01" in printed


@pytest.mark.parametrize("flags, says", [
    (("--lora_rank", 64, "--gpu_memory", "24GB"), r"rank 64, checkpointing needs 4\d\.\d GiB, a GPU of 24GB has 22\.4; the largest term is weights, 39\.\d GiB; take a larger"),
    (("--lora_rank", 0), r"full fine-tuning, checkpointing needs 3\d\d\.\d GiB, .* the largest term is optimiser, 1\d\d\.\d GiB; use --lora_rank 64 --gradient_check"),
    (("--lora_rank", 64, "--gpu_memory", "plenty"), r"--gpu_memory plenty: not a size such as 80GiB or 24GB")])
def test_what_does_not_fit_is_refused_with_the_largest_term_and_what_to_do(dry_run, flags, says):
    code, out, printed = dry_run(*flags)
    assert code == 2 and not out.exists() and re.search(rf"^error: {says}", printed, re.M)


def test_eight_cards_of_80_gib_are_enough_for_full_fine_tuning(dry_run, monkeypatch):
    """By hand, 8 ranks, 6,738,423,808 parameters, 16 bytes for each of a trained model, 4 of the reference, 2 of a score model, and the whole policy while it samples."""
    for module in (repo, plan, ranks):
        monkeypatch.setattr(module, "RANKS", 8)
    code, out, printed = dry_run("--lora_rank", 0)
    assert code == 0 and not out.exists() and "each of the 8 ranks holds 1/8" in printed and "shares" not in printed
    rows = {name: float(gib) for name, gib in re.findall(r"^(\S.*?) {2,}([\d.]+) ", printed, re.M)}
    assert rows["weights"] + rows["optimiser"] + rows["gradients"] == pytest.approx(6.66e9 * (3 * 16 + 4 + 2 * 2) / 8 / 2 ** 30, rel=0.02)
    assert rows["weights in use, sampling"] == pytest.approx(6738423808 * 2 / 2 ** 30, abs=0.01)
    assert re.search(r"^full fine-tuning, checkpointing: 5[012]\.\d GiB per rank, fits on a GPU of 80GiB$", printed, re.M)


def test_the_first_thing_that_would_fail_is_found_without_weights(seven_b, run, tmp_path, tokenizer):
    code, _, printed = run("--dry_run", "--model", seven_b / "policy", "--reward_model", seven_b / "reward", "--cost_model", seven_b / "cost",
                           "--dataset", seven_b / "prompts.jsonl", "--prompt_column", "question")
    assert code == 2 and "question" in printed.splitlines()[-1]


def test_all_names_that_cannot_be_reached_are_named_at_once(run):
    for flags in ((), ("--dry_run",)):
        code, out, printed = run("--model", "alpaca-7b", *flags)
        sentence = printed.splitlines()[-1]
        assert code == 2 and not out.exists() and "hf download" in sentence
        assert all(name in sentence for name in ("--policy PKU-Alignment/alpaca-7b-reproduced", "--reward_model PKU-Alignment/beaver-7b-v1.0-reward",
                                                 "--cost_model PKU-Alignment/beaver-7b-v1.0-cost", "--dataset PKU-Alignment/PKU-SafeRLHF"))


def test_a_dry_run_of_the_tiny_family_on_this_computer(run):
    code, out, printed = run("--dry_run", "--device", "cpu")
    assert code == 0 and not out.exists() and "full fine-tuning*" in printed and "fits on this computer" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the CPU's allocator")
@pytest.mark.parametrize("size, rank, checkpointing", [("tiny", 0, False), ("tiny", 0, True), ("tiny", 8, False), ("tiny", 8, True), ("100M", 8, True), ("100M", 0, False)])
def test_the_plan_is_what_a_step_takes(tmp_path, tokenizer, size, rank, checkpointing):
    """Weights and optimiser by their tensors, the rest by PyTorch's allocator over a whole step; the responses of a random policy run to their limit."""
    shape = {"tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
             "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}}[size]
    count, length = (64, 32) if size == "tiny" else (2, 12)
    write_policy(tmp_path / "policy", tokenizer, **shape)
    for role in ("reward", "cost"):
        body = LlamaModel(tiny_config(tokenizer, **shape))
        weights = {f"model.{name}": value for name, value in body.state_dict().items()}
        write_beaver(tmp_path / role, tokenizer, weights | {"score_head.weight": torch.randn(1, body.config.hidden_size), "score_head.bias": torch.zeros(1)}, **shape)
    config = repo.Config(policy=str(tmp_path / "policy"), reward_model=str(tmp_path / "reward"), cost_model=str(tmp_path / "cost"), device="cpu", dtype="float32",
                         lora_rank=rank, steps=4, batch_size=count, micro_batch_size=min(count, 32), max_response_length=length, max_length=400,
                         gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    prompts = ["How do I paint a very old boat in the middle of the winter night?"] * count
    state = repo.State(*repo.load_policy(config), config)
    repo.train_step(state, prompts, [], config)  # makes the optimiser's state
    held = {weight.data_ptr(): weight.nbytes for model in plan.models_of(state).values() for weight in model.parameters()}
    moments = sum(value.nbytes for entry in state.optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor))
    measured = sum(held.values()) + moments + peak_memory(lambda: repo.train_step(state, prompts, [], config))
    shapes = replace(config, device="meta", dry_run=True)
    tokenizer = state.tokenizer
    state = repo.State(repo.load_policy(shapes)[0], tokenizer, shapes)
    terms = plan.memory_terms(state, shapes, "cpu", repo, plan.longest_rows(prompts, [], tokenizer, shapes, repo), checkpointing)
    assert plan.total(terms) == pytest.approx(measured, rel=0.15), (plan.total(terms) / 2 ** 20, measured / 2 ** 20, terms)
