# pytest tests/test_trial.py
"""What a user's checkpoint may hold or lack, point by point: each has the right value, or is
refused in one sentence before anything is written. tests/test_families.py tries whole families."""

import json
import re

import pytest
import torch
from conftest import (
    laid_out,
    random_beaver,
    read_jsonl,
    tiny_config,
    write_beaver,
    write_policy,
)
from safetensors.torch import load_file, save_file
from test_models import PROMPTS, RESPONSES, ROWS, config_for, padded, write_architecture
from test_run import FEW
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DebertaV2Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import repo
from plumbing import checkpoints, metrics, models, runs
from plumbing.errors import UserError
from plumbing.models import load_policy, save_policy
from plumbing.scorers import Scorer, save_critic, unsafe_label
from plumbing.trial import check_length

load_scorer = repo.ScoreModel.from_pretrained
IDS = torch.tensor([[0, 4, 5, 6, 7]])


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def change_weights(folder, **tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return folder


# ---- the saved policy is the trained one


def test_an_own_head_is_saved_whatever_the_config_says(tmp_path, tokenizer):
    folder = change_config(write_policy(tmp_path / "policy", tokenizer), tie_word_embeddings=True)
    config = config_for(tmp_path)
    policy, _ = load_policy(config)
    assert not torch.equal(policy.lm_head.weight, policy.model.embed_tokens.weight)
    save_policy(tmp_path / "saved", policy, policy.state_dict(), config)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved(IDS).logits, policy(IDS).logits)
    assert saved.config.tie_word_embeddings is False

    tied = write_policy(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    policy, _ = load_policy(config_for(tmp_path, policy=str(tied)))
    save_policy(tmp_path / "saved", policy, policy.state_dict(), config)
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    assert folder != tied


def test_a_saved_policy_that_is_not_the_trained_one_is_told_at_the_end(run, monkeypatch):
    def without_head(weights):
        return weights | {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}

    monkeypatch.setattr(checkpoints, "merged", lambda weights: (
        without_head(weights) if "lm_head.weight" in weights else weights))
    code, out, printed = run(*FEW, "--steps", 1)
    [error] = re.findall("error: .*final/actor: the saved policy is not the trained one: its "
                         r"logits are off by ([\d.]+)", printed)
    assert code == 2 and float(error) > 0.99  # of what is no longer there
    assert (out / "summary.json").exists() and (out / "final" / "actor").exists()


def test_the_trial_samples_after_a_shared_beginning_of_prompts(run, monkeypatch):
    """Several tokens of each prompt are left, which a model must not cut."""
    columns, cached_prompts = [], models.cached_prompts

    def watched(body, input_ids, attention_mask):
        states, cache = cached_prompts(body, input_ids, attention_mask)
        columns.append((input_ids.shape[1], 0 if cache is None else states.shape[1]))
        return states, cache

    monkeypatch.setattr(models, "cached_prompts", watched)
    assert run(*FEW, "--steps", 1)[0] == 0
    assert (27, 24) in columns


# ---- no dropout

DROPOUT = {  # family -> its config's names of it
    "opt": ("dropout", "attention_dropout"),
    "falcon": ("hidden_dropout", "attention_dropout"),
    "biogpt": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@pytest.mark.parametrize("name, fields", DROPOUT.items())
def test_the_first_ratio_is_1_with_dropout_in_the_config(run, tmp_path, tokenizer, name, fields):
    folder = write_architecture(tmp_path, tokenizer, name, **dict.fromkeys(fields, 0.1))
    flags = ("--policy", folder, "--gradient_checkpointing", "true", "--minibatch_size", 8)
    code, out, printed = run(*FEW, "--steps", 1, *flags)
    assert code == 0 and "ratio of the first update" not in printed
    [row] = read_jsonl(out / "metrics.jsonl")
    assert row["ratio_max"] == pytest.approx(1, abs=1e-4) and row["clip_fraction"] == 0
    saved = json.loads((out / "final" / "actor" / "config.json").read_text())
    assert [saved[field] for field in fields] == [0.1, 0.1]  # as it was published


def test_a_ratio_that_is_not_1_at_first_is_warned_of_once(run, tmp_path, tokenizer, monkeypatch):
    folder = write_architecture(tmp_path, tokenizer, "opt", dropout=0.3)
    monkeypatch.setattr(models, "set_dropout_to_0", lambda owner: None)
    flags = ("--policy", folder, "--gradient_checkpointing", "true")
    code, out, printed = run(*FEW, *flags)
    assert code == 2 and not out.exists()  # the trial finds it
    assert f"--policy {folder}: a row during an update gives other outputs than the row" in printed

    monkeypatch.setattr(runs, "try_models", lambda *_: None)
    code, out, printed = run(*FEW, "--steps", 2, *flags)
    warning = "warning: step 1: the largest ratio of the first update"
    assert code == 0 and printed.count(warning) == 1


def test_how_far_from_1_is_rounding():
    assert metrics.not_the_sampled_policy(1.009, "float32") is None
    assert "is 1.02, not 1" in metrics.not_the_sampled_policy(1.02, "float32")
    assert metrics.not_the_sampled_policy(1.4, "bfloat16") is None
    assert "is 1.6, not 1" in metrics.not_the_sampled_policy(1.6, "bfloat16")


# ---- content that has no place in the model

LAYER = "model.layers.0.self_attn."


@pytest.mark.parametrize("name", [
    f"{LAYER}q_proj.bias", f"{LAYER}q_proj.lora_A.weight", f"{LAYER}q_proj.weight_scale",
    "v_head.summary.weight",
])
def test_a_weight_without_a_place_is_refused_by_name(tmp_path, tokenizer, name):
    folder = write_policy(tmp_path / "policy", tokenizer)
    change_weights(folder, **{name: torch.ones(32)})
    with pytest.raises(UserError, match=f"--policy .*: has {name}, of which its config.json knows"):
        load_policy(config_for(tmp_path))


@pytest.mark.parametrize("name", [
    f"{LAYER}rotary_emb.inv_freq", f"{LAYER}masked_bias", "model.layers.0.attn.bias",
    "model.position_ids", f"{LAYER}causal_mask", "model.decoder.version",
])
def test_buffers_that_models_make_themselves_may_be_there(tmp_path, tokenizer, name):
    folder = write_policy(tmp_path / "policy", tokenizer)
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    change_weights(folder, **{name: torch.ones(32)})
    policy, _ = load_policy(config_for(tmp_path))
    assert torch.equal(policy(IDS).logits, expected)


def test_a_score_model_is_held_to_the_same(tmp_path, tokenizer):
    _, state = random_beaver(tokenizer)
    more = {f"{name}.weight": torch.ones(3, 32)  # a score is not made of them
            for name in ("lm_head", "v_head.summary", "mask_predictions.dense", "model.pooler.x")}
    load_scorer(write_beaver(tmp_path / "heads", tokenizer, state | more))
    more = {f"{LAYER}q_proj.bias": torch.ones(32)}
    with pytest.raises(UserError, match=f"--reward_model .*: has {LAYER}q_proj.bias, of which"):
        load_scorer(write_beaver(tmp_path / "bias", tokenizer, state | more))


def test_a_prefix_of_all_names_is_told(tmp_path, tokenizer):
    state = {f"module.{name}": weight for name, weight in random_beaver(tokenizer)[1].items()}
    with pytest.raises(UserError, match="; the file has it as module.model.embed_tokens.weight$"):
        load_scorer(write_beaver(tmp_path / "x", tokenizer, state))


def test_a_tied_head_of_another_shape_is_refused(tmp_path, tokenizer):
    folder = write_policy(tmp_path / "policy", tokenizer, tie_word_embeddings=True)
    change_weights(folder, **{"lm_head.weight": torch.ones(100, 32)})
    with pytest.raises(UserError, match="ties, lm_head.weight perhaps, and one has another shape"):
        load_policy(config_for(tmp_path))


@pytest.mark.parametrize("role", ["policy", "reward_model"])
def test_an_adapter_is_not_ignored(run, tmp_path, tokenizer, role):
    if role == "policy":
        folder = write_policy(tmp_path / "x", tokenizer)
    else:
        folder = write_beaver(tmp_path / "x", tokenizer, random_beaver(tokenizer)[1])
    (folder / "adapter_config.json").write_text("{}")
    code, out, printed = run(*FEW, f"--{role}", folder)
    assert code == 2 and not out.exists()
    assert f"error: --{role} {folder}: holds a LoRA adapter (adapter_config.json); merge" in printed


# ---- labels and scales of score models


@pytest.mark.parametrize("names, unsafe", [
    (("LABEL_0", "LABEL_1"), 1),
    (("safe", "unsafe"), 1),
    (("unsafe", "safe"), 0),
    (("Toxic", "non-toxic"), 0),
    (("not_harmful", "harmful"), 1),
    (("harmless", "LABEL_1"), 1),
    (("INJECTION", "other"), 0),
    (("not safe", "safe"), 0),
    (("malicious", "other"), 0),
    (("not acceptable", "acceptable"), 0),
    (("rejected", "chosen"), 0),
    (("LABEL_0", "unharmful"), 0),
    (("0", "1"), 1),
])
def test_the_unsafe_label_is_the_one_whose_name_says_so(capsys, names, unsafe):
    assert unsafe_label(names, "--cost_model x") == unsafe
    assert f"label {unsafe} is taken as unsafe" in capsys.readouterr().out


@pytest.mark.parametrize("names", [
    ("toxic", "hate"), ("safe", "not toxic"), ("toxic", "obscene"), ("UnsafeContent", "Content"),
    ("negative", "positive"),
])
def test_two_labels_that_mean_the_same_or_nothing_are_refused(names):
    with pytest.raises(UserError, match="do not tell which one is unsafe; correct id2label"):
        unsafe_label(names, "--cost_model x")


@pytest.mark.parametrize("role, name", [
    ("cost", "safe"), ("cost", "harmlessness"), ("cost", "nontoxic"), ("reward", "toxicity"),
])
def test_an_only_label_that_says_the_opposite_is_refused(tmp_path, tokenizer, role, name):
    write_classifier(tmp_path / "x", tokenizer, id2label={0: name})
    with pytest.raises(UserError, match=f"its label is '{name}', so a high score would be a low"):
        load_scorer(tmp_path / "x", role=role)
    other = {"cost": "reward", "reward": "cost"}[role]
    load_scorer(tmp_path / "x", role=other)


def write_classifier(folder, tokenizer, **changes):
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, **changes)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_cost_rises_with_the_unsafe_label(tmp_path, tokenizer):
    own = write_classifier(tmp_path / "x", tokenizer, id2label={0: "unsafe", 1: "safe"})
    inputs = padded(ROWS, "right")
    logits = own(*inputs).logits
    cost = load_scorer(tmp_path / "x", role="cost").score(*inputs)
    assert torch.allclose(cost, logits[:, 0] - logits[:, 1])


@pytest.mark.parametrize("role, mean", [("reward", 0.5), ("cost", 0.0)])
def test_a_configs_mean_and_deviation_are_applied(tmp_path, tokenizer, capsys, role, mean):
    kept = {"mean": 0.5, "std": 4.0}
    own = write_classifier(tmp_path / "x", tokenizer, num_labels=1, **kept)
    inputs = padded(ROWS, "right")
    score = load_scorer(tmp_path / "x", role=role).score(*inputs)
    assert torch.allclose(score, (own(*inputs).logits[:, 0] - mean) / 4)
    assert f"the run uses (score - {mean:g}) / 4" in capsys.readouterr().out

    _, state = random_beaver(tokenizer)
    beaver = load_scorer(write_beaver(tmp_path / "y", tokenizer, state, **kept), role=role)
    plain = load_scorer(write_beaver(tmp_path / "z", tokenizer, state), role=role)
    assert torch.allclose(beaver.score(*inputs), (plain.score(*inputs) - mean) / 4)
    save_critic(tmp_path / "critic", beaver, beaver.state_dict(), config_for(tmp_path))
    assert torch.equal(load_scorer(tmp_path / "critic").score(*inputs), plain.score(*inputs))


@pytest.mark.parametrize("changes, says", [
    ({"id2label": {"1": "a", "2": "b"}}, r"numbers the labels \[1, 2\]; it must begin with 0"),
    ({"mean": [0.5], "std": [2.0]}, r"has mean \[0.5\] and std \[2.0\]; a run can use two"),
    ({"mean": 0.5, "std": 0}, "has mean 0.5 and std 0; a run can use two numbers"),
    ({"mean": 0.5, "std": 2.0}, "for the only score of a model"),
])
def test_labels_and_scales_that_do_not_fit_are_refused(tmp_path, tokenizer, changes, says):
    write_classifier(tmp_path / "x", tokenizer, num_labels=2)
    with pytest.raises(UserError, match=f"--cost_model .*{says}"):
        load_scorer(change_config(tmp_path / "x", **changes), role="cost")


@pytest.mark.parametrize("pad_id", [None, -1])
def test_a_classifier_without_a_pad_id_gets_its_tokenizers(tmp_path, tokenizer, pad_id):
    own = write_classifier(tmp_path / "x", tokenizer, num_labels=1)
    change_config(tmp_path / "x", pad_token_id=pad_id)
    scorer = Scorer("reward", tokenizer, config_for(tmp_path, reward_model=str(tmp_path / "x")))
    scores = torch.tensor(scorer.score_rows(ROWS, ["p"] * 3))
    alone = torch.cat([own(torch.tensor([row])).logits[:, 0] for row in ROWS])
    assert torch.allclose(scores, alone, atol=1e-6)


# ---- lengths and ids


@pytest.mark.parametrize("model_config, says", [
    (LlamaConfig(max_position_embeddings=64), None),
    (LlamaConfig(max_position_embeddings=63), "error"),
    (GPT2Config(n_positions=63), "error"),
    (LlamaConfig(max_position_embeddings=63, rope_parameters={
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "warning"),
    (FalconConfig(max_position_embeddings=63, alibi=True), "warning"),
    (BloomConfig(), None),
    (Gemma3TextConfig(max_position_embeddings=63, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}), "warning"),
    (DebertaV2Config(max_position_embeddings=63), "error"),
    (DebertaV2Config(max_position_embeddings=63, position_biased_input=False), "warning"),
])
def test_a_length_that_was_not_learned(capsys, model_config, says):
    config = repo.Config(max_length=64)
    if says == "error":
        with pytest.raises(UserError, match="^--policy x: --max_length 64 is above its "
                                            "max_position_embeddings, 63; lower --max_length"):
            check_length(model_config, "--policy x", config)
    else:
        check_length(model_config, "--policy x", config)
        warned = "warning: --policy x: --max_length 64 is above" in capsys.readouterr().out
        assert warned == (says == "warning")


def test_the_longest_row_is_tried(run, tmp_path, tokenizer):
    """RoBERTa's positions begin at 2 after its pad id, so that of 673 it reads 670."""
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, pad_token_id=2, max_position_embeddings=673, num_labels=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "x")
    tokenizer.save_pretrained(tmp_path / "x")
    code, out, printed = run(*FEW, "--reward_model", tmp_path / "x")
    assert code == 2 and not out.exists()
    says = f"error: --reward_model {tmp_path / 'x'}: cannot read a row of --max_length 672"
    assert says in printed
    code, _, printed = run(*FEW, "--reward_model", tmp_path / "x", "--max_length", 670,
                           "--steps", 1)
    assert code == 0, printed


@pytest.mark.parametrize("head_knows", [True, False], ids=["fused", "whole"])
def test_ids_without_a_token_are_never_sampled(tmp_path, tokenizer, head_knows):
    rows = len(tokenizer) + 8
    folder = write_policy(tmp_path / "policy", tokenizer, vocab_size=rows)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    head[len(tokenizer):] = 20 * head[:8]  # likely, if they could be sampled
    change_weights(folder, **{"lm_head.weight": head})
    policy, _ = load_policy(config_for(tmp_path))
    assert policy.tokenless == list(range(len(tokenizer), rows)) and policy.fused_head
    if not head_knows:
        policy.fused_head = None

    config = config_for(tmp_path, max_response_length=20, temperature=0.7)
    responses = repo.generate(policy, tokenizer, PROMPTS * 10, config)
    assert max(map(max, responses)) < len(tokenizer)
    batch = laid_out(PROMPTS, RESPONSES)
    log_probs, entropy = repo.response_log_probs(policy, batch, 0.7, return_entropy=True)
    of_tokens = torch.cat([
        (policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1, :len(tokenizer)]
         / 0.7).log_softmax(-1) for prompt, response in zip(PROMPTS, RESPONSES)])
    expected = of_tokens[range(5), [id for response in RESPONSES for id in response]]
    assert torch.allclose(log_probs, expected, atol=1e-5)
    assert torch.allclose(entropy, torch.special.entr(of_tokens.exp()).sum(-1), atol=1e-5)


def test_ids_without_a_token_may_lie_between_the_others(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(models, "ids_without_token", lambda *_: [9])
    policy, _ = load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    assert policy.fused_head is None
    assert "policy: its token ids have gaps; so all logits" in capsys.readouterr().out
    batch = laid_out([[0, 4]], [[5, 8]])
    logits = policy(torch.tensor([[0, 4, 5, 8]])).logits[0, 1:-1]
    logits[:, 9] = -torch.inf
    expected = logits.log_softmax(-1)[range(2), [5, 8]]
    assert torch.allclose(repo.response_log_probs(policy, batch, 1.0), expected, atol=1e-5)


def test_a_configs_subconfigs_lose_their_dropout_too():
    config = LlavaConfig(text_config=LlamaConfig(attention_dropout=0.2))
    models.set_dropout_to_0(config)
    assert config.text_config.attention_dropout == 0.0
