# pytest tests/test_models.py
"""Score models in every layout, critics, policies, and what is refused."""
import json

import pytest
import torch
from conftest import random_beaver, tiny_config, write_beaver, write_policy
from transformers import LlamaForSequenceClassification, LlamaModel

import repo
from tiny_configs import world


def by_hand(model: LlamaModel, state: dict, rows: list[list[int]]) -> torch.Tensor:
    """Each row alone, without padding: head applied to the last hidden state after the final norm."""
    with torch.no_grad():
        last = torch.cat([model(torch.tensor([row])).last_hidden_state[:, -1] for row in rows])
    return (last @ state["score_head.weight"].T).squeeze(1) + state.get("score_head.bias", 0.0)


ROWS = [[0, 5, 6, 7], [0, 9, 8, 7, 6, 5, 4, 1], [0, 3]]


def padded(rows, side):
    width = max(map(len, rows))
    fill = [[2] * (width - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for f, row in zip(fill, rows)]
    mask = [[0] * len(f) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(f) for f, row in zip(fill, rows)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("sharded_bin", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForScore", "LlamaModelForScore"])
def test_beaver_layout_scores_as_by_hand(tmp_path, tokenizer, sharded_bin, architecture):
    model, state = random_beaver(tokenizer)
    score_model = repo.ScoreModel.from_pretrained(write_beaver(tmp_path / "x", tokenizer, state, sharded_bin, architectures=[architecture]))
    for side in ("left", "right"):
        with torch.no_grad():
            scores = score_model.score(*padded(ROWS, side))
        assert scores.dtype == torch.float32 and torch.allclose(scores, by_hand(model, state, ROWS), atol=1e-5)


def test_the_head_stays_fp32_in_a_bf16_model(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    score_model = repo.ScoreModel.from_pretrained(write_beaver(tmp_path / "x", tokenizer, state), dtype=torch.bfloat16)
    assert score_model.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(score_model.score_head.weight, state["score_head.weight"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert score_model.score(*padded(ROWS, "right")).dtype == torch.float32


def test_a_missing_bias_is_zero_whatever_the_config_says(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    del state["score_head.bias"]
    score_model = repo.ScoreModel.from_pretrained(write_beaver(tmp_path / "x", tokenizer, state))
    with torch.no_grad():
        assert torch.allclose(score_model.score(*padded(ROWS, "right")), by_hand(model, state, ROWS), atol=1e-5)


@pytest.mark.parametrize("lost", ["score_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_weight_is_refused_by_name(tmp_path, tokenizer, lost):
    _, state = random_beaver(tokenizer)
    del state[lost]
    with pytest.raises(repo.UserError, match=rf"--cost_model .*broken.*{lost}"):
        repo.ScoreModel.from_pretrained(write_beaver(tmp_path / "broken", tokenizer, state), role="cost")


def test_a_language_model_is_no_score_model(tmp_path, tokenizer):
    with pytest.raises(repo.UserError, match="score_head.weight"):
        repo.ScoreModel.from_pretrained(write_policy(tmp_path / "lm", tokenizer))


def test_normalizers_apply_by_role(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    state |= {"normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0]), "normalizer.count": torch.tensor([100])}
    raw, inputs = by_hand(model, state, ROWS), padded(ROWS, "left")
    on = write_beaver(tmp_path / "on", tokenizer, state, do_normalize=True)
    off = write_beaver(tmp_path / "off", tokenizer, state, do_normalize=False)
    with torch.no_grad():
        assert torch.allclose(repo.ScoreModel.from_pretrained(on, role="reward").score(*inputs), (raw - 0.5) / 2, atol=1e-5)
        assert torch.allclose(repo.ScoreModel.from_pretrained(on, role="cost").score(*inputs), raw / 2, atol=1e-5)
        assert torch.allclose(repo.ScoreModel.from_pretrained(off, role="cost").score(*inputs), raw, atol=1e-5)
    with pytest.raises(repo.UserError, match="normalizer.mean"):
        repo.ScoreModel.from_pretrained(write_beaver(tmp_path / "none", tokenizer, random_beaver(tokenizer)[1], do_normalize=True))


def write_classifier(folder, tokenizer, labels):
    torch.manual_seed(labels)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=labels)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_sequence_classifiers(tmp_path, tokenizer):
    inputs = padded(ROWS, "right")
    one, two = write_classifier(tmp_path / "one", tokenizer, 1), write_classifier(tmp_path / "two", tokenizer, 2)
    write_classifier(tmp_path / "three", tokenizer, 3)
    with torch.no_grad():
        assert torch.allclose(repo.ScoreModel.from_pretrained(tmp_path / "one").score(*inputs), one(*inputs).logits[:, 0])
        logits = two(*inputs).logits
        assert torch.allclose(repo.ScoreModel.from_pretrained(tmp_path / "two", role="cost").score(*inputs), logits[:, 1] - logits[:, 0])
    with pytest.raises(repo.UserError, match="3 labels"):
        repo.ScoreModel.from_pretrained(tmp_path / "three")
    (tmp_path / "lm").mkdir()
    write_policy(tmp_path / "lm", tokenizer)
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(repo.UserError, match="score.weight"):
        repo.ScoreModel.from_pretrained(tmp_path / "lm")


def test_a_classifiers_own_pad_id_fills_its_batches(tmp_path, tokenizer):
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1, pad_token_id=9)).save_pretrained(tmp_path / "x")
    tokenizer.save_pretrained(tmp_path / "x")
    scorer = repo.Scorer("reward", tokenizer, config_for(tmp_path, reward_model=str(tmp_path / "x"), micro_batch_size=3))
    together = scorer([[0, 5, 6, 7], [0, 8], [0, 3, 4]], ["p"] * 3, ["r"] * 3, [True] * 3)
    alone = [scorer([row], ["p"], ["r"], [True]).item() for row in ([0, 5, 6, 7], [0, 8], [0, 3, 4])]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_an_answer_is_tokenised_in_one_text_with_its_prompt(tmp_path):
    """A tokenizer that puts a space before every text (as SentencePiece does) must not put one between ASSISTANT: and the answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "▁BEGINNING▁OF▁CONVERSATION:▁USER:▁hi▁ASSISTANT:Yes": 2, "▁Yes": 3}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme="always", split=False), decoders.Metaspace()
    spacing = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    assert spacing("Yes").input_ids == [3]
    assert repo.encode_prompts(["hi"], spacing, ["Yes"]) == [[2]]


# ---- scorers: what text a model gets to read

def config_for(tmp_path, **changes):
    return repo.Config(**{"device": "cpu", "dtype": "float32", "micro_batch_size": 2, "policy": str(tmp_path / "policy"), **changes})


def other_tokenizer():
    return world.build_tokenizer("### Instruction: {prompt}\n### Response:")


def test_same_tokens_are_scored_as_they_are_and_others_are_re_encoded(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    same = repo.Scorer("reward", tokenizer, config_for(tmp_path, reward_model=str(write_beaver(tmp_path / "same", tokenizer, state))))
    assert same.same_tokens
    assert torch.allclose(same(ROWS, ["p"] * 3, ["r"] * 3, [True] * 3), by_hand(model, state, ROWS), atol=1e-5)

    own = other_tokenizer()
    model, state = random_beaver(own)
    other = repo.Scorer("cost", tokenizer, config_for(tmp_path, cost_model=str(write_beaver(tmp_path / "other", own, state))))
    assert not other.same_tokens
    read = [own("BEGINNING OF CONVERSATION: USER: hi ASSISTANT:").input_ids + own(text, add_special_tokens=False).input_ids + eos
            for text, eos in (("Sure.", [1]), ("No, pl", []))]
    assert torch.allclose(other([[0], [0]], ["hi", "hi"], ["Sure.", "No, pl"], [True, False]), by_hand(model, state, read), atol=1e-5)


def test_critics_start_from_the_score_model_or_from_the_policy(tmp_path, tokenizer):
    policy, _ = repo.load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    _, state = random_beaver(tokenizer, seed=1)
    config = config_for(tmp_path, reward_model=str(write_beaver(tmp_path / "same", tokenizer, state)),
                        cost_model=str(write_beaver(tmp_path / "other", other_tokenizer(), random_beaver(other_tokenizer())[1])))
    from_scores = repo.make_critic(repo.Scorer("reward", tokenizer, config), policy, config)
    assert all(torch.equal(from_scores.state_dict()[name], value) for name, value in state.items())
    from_policy = repo.make_critic(repo.Scorer("cost", tokenizer, config), policy, config)
    assert all(torch.equal(from_policy.model.state_dict()[name], value) for name, value in policy.base_model.state_dict().items())
    with torch.no_grad():
        assert from_policy.values(*padded(ROWS, "left")).abs().sum() == 0
    assert all(p.requires_grad for critic in (from_scores, from_policy) for p in critic.parameters())
    classifier = write_classifier(tmp_path / "classifier", tokenizer, 1)
    from_classifier = repo.make_critic(repo.Scorer("reward", tokenizer, config_for(tmp_path, reward_model=str(tmp_path / "classifier"))), policy, config)
    assert all(torch.equal(from_classifier.model.state_dict()[name], value) for name, value in classifier.model.state_dict().items())


@pytest.mark.parametrize("body, says", [
    ("def score(prompts, responses): return [len(r) for r in responses]", None),
    ("def score(prompts, responses): return ['high'] * len(responses)", "'high', not a number"),
    ("def score(prompts, responses): return [1.0]", "returned 1 results for 2 responses"),
    ("def score(prompts, responses): raise KeyError('no such key')", "KeyError: 'no such key'"),
    ("def other(prompts, responses): pass", "has no function score"),
    ("def broken(", "cannot be loaded.*SyntaxError"),
])
def test_python_functions(tmp_path, tokenizer, body, says):
    (tmp_path / "f.py").write_text(body)
    config = config_for(tmp_path, reward_model=f"{tmp_path}/f.py:score")
    if says is None:
        assert repo.Scorer("reward", tokenizer, config)([], ["p", "q"], ["ab", "abc"], [True, True]).tolist() == [2.0, 3.0]
    else:
        with pytest.raises(repo.UserError, match=f"--reward_model .*f.py:score.*{says}"):
            repo.Scorer("reward", tokenizer, config)([], ["p", "q"], ["ab", "abc"], [True, True])


# ---- policies

def test_policies_that_cannot_work_are_refused(tmp_path, tokenizer):
    folder = write_policy(tmp_path / "policy", tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({name: value for name, value in settings.items() if name != "eos_token"}))
    with pytest.raises(repo.UserError, match="policy.*no EOS token.*tokenizer_config.json"):
        repo.load_policy(config_for(tmp_path))
    write_policy(folder, tokenizer, vocab_size=len(tokenizer) - 5)
    with pytest.raises(repo.UserError, match=f"{len(tokenizer)} tokens, the model only {len(tokenizer) - 5}"):
        repo.load_policy(config_for(tmp_path))
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(repo.UserError, match="policy: cannot be loaded"):
        repo.load_policy(config_for(tmp_path))


def test_a_checkpoints_own_sampling_settings_do_not_leak_in_but_its_stop_tokens_do(tmp_path, tokenizer):
    folder = write_policy(tmp_path / "policy", tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "eos_token_id": [1, 7]}))
    policy, tokenizer = repo.load_policy(config_for(tmp_path))
    assert policy.stop_token_ids == {1, 7} and policy.published_generation_config.top_k == 1
    prompts = [repo.encode_prompts(["hi"], tokenizer)[0]] * 40
    config = config_for(tmp_path, max_response_length=1)
    torch.manual_seed(0)
    assert len({tuple(row) for row in repo.generate(policy, tokenizer, prompts, config)}) > 20  # a random model, sampled from its whole softmax


@pytest.mark.parametrize("name, plain, changes", [
    ("llama", True, {}), ("gpt2", True, {}),  # tied to the embeddings, with learned absolute positions
    ("gemma2", False, {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 30.0}),
    ("gptj", False, {"rotary_dim": 8}),  # a bias, zero until it is trained
    ("granite", False, {"num_key_value_heads": 2, "logits_scaling": 4.0}), ("cohere", False, {"num_key_value_heads": 2, "logit_scale": 0.25})])
def test_the_real_loading_code_meets_other_architectures(tmp_path, tokenizer, capsys, name, plain, changes):
    """Padding must not move positions, log-probs must be the model's own, and a head that is more than a matrix must be noticed, and told of."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    width = {"n_embd": 32, "n_layer": 1, "n_head": 2} if name.startswith("gpt") else {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **width, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    policy, own = repo.load_policy(config_for(tmp_path, policy=str(tmp_path / name)))
    assert repo.has_plain_head(policy.bfloat16()) == plain and repo.has_plain_head(policy.float()) == plain
    assert policy.has_plain_head == plain and capsys.readouterr().out.count("bias, cap or scale") == (not plain)
    prompts, responses = [[0, 4, 5, 6], [0, 9]], [[7, 8, 1], [5, 1]]
    batch = repo.lay_out(prompts, responses, own.pad_token_id, "cpu")
    with torch.no_grad():
        log_probs = repo.response_log_probs(policy, batch, 0.7)
        alone = [(policy(torch.tensor([p + r])).logits[0, len(p) - 1:-1] / 0.7).log_softmax(-1)[range(len(r)), r] for p, r in zip(prompts, responses)]
    assert torch.allclose(log_probs, torch.cat(alone), atol=1e-4)


def test_with_a_plain_head_whole_logits_are_never_made_and_the_loss_is_the_same(tmp_path, tokenizer, monkeypatch):
    policy, own = repo.load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    config = config_for(tmp_path, temperature=0.7)
    batch = repo.lay_out([[0, 4, 5, 6], [0, 9]], [[7, 8, 1], [5, 1]], own.pad_token_id, "cpu")
    mask = batch.response_mask
    for name in ("log_probs", "reward_advantages", "cost_advantages"):
        setattr(batch, name, torch.randn(mask.shape))
    batch.log_probs, batch.penalty = batch.log_probs * 0.1 - 6, torch.rand(2)
    results = []
    for plain in (True, False):
        policy.has_plain_head = plain
        calls = []
        hook = policy.get_output_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss, stats = repo.policy_loss(policy, batch, mask / 5, config)
        (loss + repo.ptx_loss(policy, batch, 5)[0]).backward()
        repo.response_log_probs(policy, batch, 0.7, with_entropy=True)
        assert bool(calls) != plain
        results.append([loss.detach(), *stats.values(), *[parameter.grad.clone() for parameter in policy.parameters()]])
        policy.zero_grad()
        hook.remove()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


def test_loading_names_a_folder_that_is_not_there(tmp_path):
    for source in (str(tmp_path / "none"), "alpaca7b"):
        with pytest.raises(repo.UserError, match=f"{source}: is none of tiny, alpaca-7b, llama-3.2-3b, no folder here") as error:
            repo.load_policy(repo.Config(model=source, policy=source, device="cpu"))
        assert "\n" not in str(error.value)
