# pytest tests/test_models.py
"""Score models in every layout, critics, policies, and what is refused."""

import json

import pytest
import torch
from conftest import laid_out, random_beaver, tiny_config, write_beaver, write_policy, write_python
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.cache_utils import DynamicCache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

import repo
from plumbing.models import Head, find_head
from plumbing.errors import UserError
from plumbing.models import generate, has_plain_cache, hidden_states, load_policy, model_inputs
from plumbing.scorers import Scorer, save_critic
from plumbing.training import make_critic
from plumbing.data import conversation_ids, encode_prompts, pad_rows
from tiny_configs import world

load_scorer = repo.ScoreModel.from_pretrained
ROWS = [[0, 5, 6, 7], [0, 9, 8, 7, 6, 5, 4, 1], [0, 3]]


def by_hand(model: LlamaModel, state: dict, rows: list[list[int]]) -> torch.Tensor:
    """Each row alone, without padding: the head applied to its last hidden state after the norm."""
    with torch.no_grad():
        last = torch.cat([model(torch.tensor([row])).last_hidden_state[:, -1] for row in rows])
    return (last @ state["score_head.weight"].T).squeeze(1) + state.get("score_head.bias", 0.0)


def padded(rows, side):
    """(ids, mask), [B, L] both."""
    if side == "left":
        return pad_rows(rows, [[]] * len(rows), 2)
    return pad_rows([[]] * len(rows), rows, 2)


# ---- score models in the Beaver layout


@pytest.mark.parametrize("sharded_bin", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForScore", "LlamaModelForScore"])
def test_beaver_layout_scores_as_by_hand(tmp_path, tokenizer, sharded_bin, architecture):
    model, state = random_beaver(tokenizer)
    written = write_beaver(
        tmp_path / "x", tokenizer, state, sharded_bin, architectures=[architecture]
    )
    score_model = load_scorer(written)
    for side in ("left", "right"):
        with torch.no_grad():
            scores = score_model.score(*padded(ROWS, side))
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, by_hand(model, state, ROWS), atol=1e-5)


def test_the_head_stays_fp32_in_a_bf16_model(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    written = write_beaver(tmp_path / "x", tokenizer, state)
    score_model = load_scorer(written, dtype=torch.bfloat16)
    assert score_model.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(score_model.score_head.weight, state["score_head.weight"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert score_model.score(*padded(ROWS, "right")).dtype == torch.float32


def test_a_missing_bias_is_zero_whatever_the_config_says(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    del state["score_head.bias"]
    score_model = load_scorer(write_beaver(tmp_path / "x", tokenizer, state))
    with torch.no_grad():
        scores = score_model.score(*padded(ROWS, "right"))
    assert torch.allclose(scores, by_hand(model, state, ROWS), atol=1e-5)


@pytest.mark.parametrize("lost", ["score_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_weight_is_refused_by_name(tmp_path, tokenizer, lost):
    _, state = random_beaver(tokenizer)
    del state[lost]
    written = write_beaver(tmp_path / "broken", tokenizer, state)
    with pytest.raises(UserError, match=rf"--cost_model .*broken.*{lost}"):
        load_scorer(written, role="cost")


def test_normalizers_apply_by_role(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    state["normalizer.mean"] = torch.tensor([0.5])
    state["normalizer.var"] = torch.tensor([4.0])
    state["normalizer.count"] = torch.tensor([100])
    raw, inputs = by_hand(model, state, ROWS), padded(ROWS, "left")
    on = write_beaver(tmp_path / "on", tokenizer, state, do_normalize=True)
    off = write_beaver(tmp_path / "off", tokenizer, state, do_normalize=False)
    with torch.no_grad():
        reward = load_scorer(on, role="reward").score(*inputs)
        cost = load_scorer(on, role="cost").score(*inputs)
        plain = load_scorer(off, role="cost").score(*inputs)
    assert torch.allclose(reward, (raw - 0.5) / 2, atol=1e-5)
    assert torch.allclose(cost, raw / 2, atol=1e-5)
    assert torch.allclose(plain, raw, atol=1e-5)


def test_a_normalizer_that_is_promised_must_be_there(tmp_path, tokenizer):
    _, state = random_beaver(tokenizer)
    written = write_beaver(tmp_path / "none", tokenizer, state, do_normalize=True)
    with pytest.raises(UserError, match="normalizer.mean"):
        load_scorer(written)


# ---- sequence classifiers


def write_classifier(folder, tokenizer, labels):
    torch.manual_seed(labels)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=labels)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_classifiers_score_is_its_label_or_the_difference_of_two(tmp_path, tokenizer):
    one = write_classifier(tmp_path / "one", tokenizer, 1)
    two = write_classifier(tmp_path / "two", tokenizer, 2)
    inputs = padded(ROWS, "right")
    with torch.no_grad():
        label = one(*inputs).logits[:, 0]
        logits = two(*inputs).logits
        score = load_scorer(tmp_path / "one").score(*inputs)
        cost = load_scorer(tmp_path / "two", role="cost").score(*inputs)
    assert torch.allclose(score, label)
    assert torch.allclose(cost, logits[:, 1] - logits[:, 0])


def test_a_classifier_must_bring_its_head(tmp_path, tokenizer):
    file = write_policy(tmp_path / "lm", tokenizer) / "config.json"
    architecture = {"architectures": ["LlamaForSequenceClassification"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | architecture))
    with pytest.raises(UserError, match="score.weight"):
        load_scorer(tmp_path / "lm")


def test_a_classifiers_own_pad_id_fills_its_batches(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = tiny_config(tokenizer, num_labels=1, pad_token_id=9)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "x")
    tokenizer.save_pretrained(tmp_path / "x")
    config = config_for(tmp_path, reward_model=str(tmp_path / "x"), micro_batch_size=3)
    scorer = Scorer("reward", tokenizer, config)
    rows = [[0, 5, 6, 7], [0, 8], [0, 3, 4]]
    together = scorer(rows, ["p"] * 3, ["r"] * 3, [True] * 3)
    alone = [scorer([row], ["p"], ["r"], [True]).item() for row in rows]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


# ---- scorers: what text a model gets to read


def config_for(tmp_path, **changes):
    settings = {"device": "cpu", "dtype": "float32", "micro_batch_size": 2}
    return repo.Config(**settings | {"policy": str(tmp_path / "policy")} | changes)


def other_tokenizer():
    """Of the tiny family's kind, but trained on other text, so that it has other tokens."""
    corpus = [f"### Instruction: {prompt}\n### Response:" for prompt in world.REQUESTS]
    corpus += world.REFUSALS
    for action in world.ACTIONS:
        corpus += [world.comply(action, thing, 3) for thing in world.OBJECTS]
    return world.build_tokenizer().train_new_from_iterator(corpus, 640, show_progress=False)


def test_an_answer_is_tokenised_in_one_text_with_its_prompt(tmp_path):
    """A tokenizer that puts a space before every text (as SentencePiece does) must not put one
    between ASSISTANT: and the answer."""
    whole = "▁BEGINNING▁OF▁CONVERSATION:▁USER:▁hi▁ASSISTANT:Yes"
    vocabulary = {"<unk>": 0, "</s>": 1, whole: 2, "▁Yes": 3}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace()
    spacing = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    assert spacing("Yes").input_ids == [3]
    assert conversation_ids(spacing, ["hi"], ["Yes"], [False]) == [[2]]


def test_the_policys_tokens_are_scored_as_they_are(tmp_path, tokenizer):
    model, state = random_beaver(tokenizer)
    written = write_beaver(tmp_path / "same", tokenizer, state)
    scorer = Scorer("reward", tokenizer, config_for(tmp_path, reward_model=str(written)))
    assert scorer.same_tokens
    scores = scorer(ROWS, ["p"] * 3, ["r"] * 3, [False, True, False])
    assert torch.allclose(scores, by_hand(model, state, ROWS), atol=1e-5)


def test_for_other_tokens_the_text_is_encoded_again(tmp_path, tokenizer, capsys):
    other = other_tokenizer()
    model, state = random_beaver(other)
    written = write_beaver(tmp_path / "other", other, state)
    scorer = Scorer("cost", tokenizer, config_for(tmp_path, cost_model=str(written)))
    assert not scorer.same_tokens
    prompt = other("BEGINNING OF CONVERSATION: USER: hi ASSISTANT:").input_ids
    finished = prompt + other("Sure.", add_special_tokens=False).input_ids + [1]
    cut_off = prompt + other("No, pl", add_special_tokens=False).input_ids
    scores = scorer([[0], [0]], ["hi", "hi"], ["Sure.", "No, pl"], [True, False])
    assert torch.allclose(scores, by_hand(model, state, [finished, cut_off]), atol=1e-5)

    scorer.model.config.max_position_embeddings = len(cut_off) - 1
    for _ in range(2):
        scorer([[0], [0]], ["hi", "hi"], ["Sure.", "No, pl"], [True, False])
    assert capsys.readouterr().out.count(f"a row has {len(cut_off)} of its tokens, and") == 1


def test_a_python_function_reads_texts(tmp_path, tokenizer):
    file = write_python(tmp_path / "f.py", """
        def score(prompts, responses):
            return [len(asked) + 10 * len(said) for asked, said in zip(prompts, responses)]
    """)
    scorer = Scorer("reward", tokenizer, config_for(tmp_path, reward_model=f"{file}:score"))
    assert scorer([], ["p", "pq"], ["ab", "abc"], [True, True]).tolist() == [21.0, 32.0]


# ---- critics


def holds(model, weights: dict) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_critics_start_from_the_score_model_or_from_the_policy(tmp_path, tokenizer):
    policy, _ = load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    _, state = random_beaver(tokenizer, seed=1)
    other = other_tokenizer()
    same_tokens = write_beaver(tmp_path / "same", tokenizer, state)
    other_tokens = write_beaver(tmp_path / "other", other, random_beaver(other)[1])
    config = config_for(tmp_path, reward_model=str(same_tokens), cost_model=str(other_tokens))

    from_scores = make_critic(Scorer("reward", tokenizer, config), policy, config)
    assert holds(from_scores, state)
    from_policy = make_critic(Scorer("cost", tokenizer, config), policy, config)
    assert holds(from_policy.model, policy.base_model.state_dict())
    with torch.no_grad():
        assert from_policy.values(*padded(ROWS, "left")).abs().sum() == 0
    for critic in (from_scores, from_policy):
        assert all(parameter.requires_grad for parameter in critic.parameters())


def test_a_critic_starts_from_a_classifiers_body(tmp_path, tokenizer):
    policy, _ = load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    classifier = write_classifier(tmp_path / "classifier", tokenizer, 1)
    config = config_for(tmp_path, reward_model=str(tmp_path / "classifier"))
    critic = make_critic(Scorer("reward", tokenizer, config), policy, config)
    assert holds(critic.model, classifier.model.state_dict())


def test_a_critic_is_saved_without_its_score_models_normaliser(tmp_path, tokenizer):
    """It has learned scores that were normalised: its values are not to be normalised again."""
    _, state = random_beaver(tokenizer)
    normalizer = {"normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0])}
    written = write_beaver(tmp_path / "on", tokenizer, state | normalizer, do_normalize=True)
    config = config_for(tmp_path)
    critic = load_scorer(written)
    save_critic(tmp_path / "critic", critic, critic.state_dict(), config)
    names = load_file(tmp_path / "critic" / "model.safetensors")
    assert not [name for name in names if "normalizer" in name]
    saved = load_scorer(tmp_path / "critic")
    assert holds(saved, state)
    inputs = padded(ROWS, "right")
    with torch.no_grad():
        last = critic.values(*inputs)[range(len(ROWS)), [len(row) - 1 for row in ROWS]]
        assert torch.equal(saved.score(*inputs), last)


# ---- policies


def test_a_checkpoints_own_sampling_settings_do_not_leak_in_but_its_stop_tokens_do(
    tmp_path, tokenizer
):
    folder = write_policy(tmp_path / "policy", tokenizer)
    greedy = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1}
    settings = json.dumps({**greedy, "eos_token_id": [1, 7]})
    (folder / "generation_config.json").write_text(settings)
    policy, tokenizer = load_policy(config_for(tmp_path))
    assert policy.stop_token_ids == {1, 7}
    assert policy.published_generation_config.top_k == 1

    prompts = encode_prompts(["hi"], tokenizer) * 40
    config = config_for(tmp_path, max_response_length=1)
    torch.manual_seed(0)
    responses = repo.generate(policy, tokenizer, prompts, config)
    # A random model, sampled from its whole softmax.
    assert len({tuple(row) for row in responses}) > 20


PROMPTS, RESPONSES = [[0, 4, 5, 6], [0, 9]], [[7, 8, 1], [5, 1]]


def write_architecture(folder, tokenizer, name, **changes):
    """A causal language model of some architecture, with random weights: folder / name."""
    torch.manual_seed(0)
    if name.startswith("gpt"):
        size = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    else:
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **size, **changes))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


ONE_KEY = {"num_key_value_heads": 1, "head_dim": 16}
TWO_KEYS = {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    "name, head, changes",
    [
        ("llama", Head(), {}),
        ("gpt2", Head(), {}),  # tied to the embeddings, with learned absolute positions
        ("gemma2", Head(1.0, 3.0), ONE_KEY | {"final_logit_softcapping": 3.0}),
        ("mistral", Head(), ONE_KEY | {"sliding_window": 8}),
        ("gptj", None, {"rotary_dim": 8}),  # a bias, zero until it is trained
        ("granite", Head(0.25), TWO_KEYS | {"logits_scaling": 4.0}),
        ("cohere", Head(0.25), TWO_KEYS | {"logit_scale": 0.25}),
    ],
)
@pytest.mark.parametrize("begins_with", [[], list(range(5, 29))], ids=["", "shared"])
def test_the_real_loading_code_meets_other_architectures(
    tmp_path, tokenizer, capsys, name, head, changes, begins_with
):
    """Padding must not move positions, log-probs must be the model's own, whether or not all
    prompts begin with the same tokens, and a head that is more than the kernels know must be
    noticed, and told of."""
    write_architecture(tmp_path, tokenizer, name, **changes)
    policy, tokenizer = load_policy(config_for(tmp_path, policy=str(tmp_path / name)))
    assert policy.fused_head == head
    assert capsys.readouterr().out.count("a scale or a soft cap") == (head is None)
    assert find_head(policy.bfloat16()) == head
    assert find_head(policy.float()) == head

    prompts = [begins_with + prompt for prompt in PROMPTS]
    batch = laid_out(prompts, RESPONSES, tokenizer.pad_token_id)
    alone = []
    with torch.no_grad():
        log_probs = repo.response_log_probs(policy, batch, 0.7)
        for prompt, response in zip(prompts, RESPONSES):
            logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            alone.append((logits / 0.7).log_softmax(-1)[range(len(response)), response])
    assert torch.allclose(log_probs, torch.cat(alone), atol=1e-4)


def assert_as_a_reading_of_all(states, model, inputs, mask):
    """States [tokens, H] and their gradients are those of rows that share nothing."""
    whole = model(**model_inputs(*inputs)).last_hidden_state[mask]
    assert torch.allclose(states, whole, atol=1e-5)
    direction = torch.randn_like(whole)
    for one, other in zip(torch.autograd.grad((states * direction).sum(), model.parameters()),
                          torch.autograd.grad((whole * direction).sum(), model.parameters())):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count, reads", [
    (30, [(1, 24), (2, 13)]),    # 31 in whole eights; the longer row has 37 tokens
    (14, [(2, 21)]),             # so few that it would not pay
])
def test_what_all_rows_begin_with_is_read_once(tokenizer, count, reads):
    """With the same states and gradients as a reading of all; layers that recompute do that."""
    torch.manual_seed(0)
    model = LlamaModel(tiny_config(tokenizer)).eval()
    beginning = torch.randint(4, 60, (count,)).tolist()
    batch = laid_out([beginning + prompt for prompt in PROMPTS], RESPONSES, 2)
    inputs, mask = (batch.input_ids, batch.attention_mask), batch.attention_mask.bool()
    states = hidden_states(model, *inputs)[mask]                                 # [tokens, H]
    assert_as_a_reading_of_all(states, model, inputs, mask)

    seen = []
    model.register_forward_pre_hook(lambda _, ids, more: seen.append(
        tuple((ids or [more["input_ids"]])[0].shape)), with_kwargs=True)
    hidden_states(model, *inputs)
    assert seen == reads
    hidden_states(model, *(part[:1] for part in inputs))
    assert seen.pop() == (1, inputs[0].shape[1])  # of one row nothing is shared
    model.gradient_checkpointing_enable()
    model.layers[0].training = True  # as recomputing() sets it
    hidden_states(model, *inputs)
    assert len(seen) == len(reads) + 1 and seen[-1] == tuple(batch.input_ids.shape)


def of_two_prompts():
    """Prompts of 25 and 23 tokens with eight responses, of 2 to 9 tokens."""
    beginning = torch.randint(4, 60, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [beginning + PROMPTS[row] for row in (0, 1, 1, 0, 1, 1, 0, 0)]
    return prompts, [[7 + row, 8, *range(9, 9 + row)] for row in range(8)]


def test_a_prompt_of_several_rows_is_read_once(tokenizer):
    """With the same states and gradients as a reading of all."""
    torch.manual_seed(0)
    model, seen = LlamaModel(tiny_config(tokenizer)).eval(), []
    assert has_plain_cache(model)
    batch = laid_out(*of_two_prompts(), 2)
    inputs, mask = (batch.input_ids, batch.attention_mask), batch.attention_mask.bool()
    model.register_forward_pre_hook(lambda _, ids, more: seen.append(
        tuple((ids or [more["input_ids"]])[0].shape)), with_kwargs=True)
    states = hidden_states(model, *inputs)[mask]                                 # [tokens, H]
    assert seen == [(1, 16), (2, 9), (8, 9)]
    assert_as_a_reading_of_all(states, model, inputs, mask)


def test_responses_to_one_prompt_are_sampled_from_one_reading_of_it(tmp_path, tokenizer):
    policy, _ = load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    prompts, expected = of_two_prompts()[0], []
    config, seen = config_for(tmp_path, max_response_length=6), []
    for rows in ([0, 1], range(8)):  # two prompts are read whole
        draw = repo.Draw(torch.full((len(rows), 6), 0.4, dtype=torch.float64), 25, 1.0)
        sampled = generate(policy, tokenizer, [prompts[i] for i in rows], draw, 6, config)
        expected = expected or [sampled[prompts[i] == prompts[1]] for i in range(8)]
        policy.model.register_forward_pre_hook(lambda _, ids, more: seen.append(
            tuple((ids or [more["input_ids"]])[0].shape)), with_kwargs=True)
    assert sampled == expected
    assert seen[:4] == [(1, 16), (2, 8), (8, 1), (8, 1)]


def test_a_row_that_begins_in_the_last_column_is_read_beside_a_shared_prompt(tokenizer):
    model = LlamaModel(tiny_config(tokenizer)).eval()
    inputs = pad_rows([[0, *range(4, 30)]] * 7 + [[9]], [[]] * 8, 2)
    mask = inputs[1].bool()
    whole = model(**model_inputs(*inputs)).last_hidden_state[mask]
    assert torch.allclose(hidden_states(model, *inputs)[mask], whole, atol=1e-5)


def test_rows_of_one_token_are_read(tokenizer):
    model, ids = LlamaModel(tiny_config(tokenizer)).eval(), torch.tensor([[7], [8]])
    assert hidden_states(model, ids, torch.ones_like(ids)).shape[:2] == (2, 1)


def test_a_cache_that_keeps_more_than_keys_and_values_is_not_shared(tokenizer):
    """MiniMax's keeps states beside its layers, into which padding would go."""
    class OwnCache(DynamicCache):
        pass

    class OwnModel(LlamaModel):
        def forward(self, *inputs, use_cache=False, **more):
            cache = OwnCache(config=self.config) if use_cache else None
            return super().forward(*inputs, past_key_values=cache, use_cache=use_cache, **more)

    model = OwnModel(tiny_config(tokenizer)).eval()
    assert not has_plain_cache(model)
    batch = laid_out(*of_two_prompts(), 2)
    inputs, mask = (batch.input_ids, batch.attention_mask), batch.attention_mask.bool()
    whole = model(**model_inputs(*inputs)).last_hidden_state[mask]
    assert torch.equal(hidden_states(model, *inputs)[mask], whole)


def test_rows_that_are_all_alike_keep_a_token_of_their_own(tokenizer):
    model = LlamaModel(tiny_config(tokenizer)).eval()
    ids = torch.randint(4, 60, (1, 24)).expand(2, 24)
    whole = model(**model_inputs(ids, torch.ones_like(ids))).last_hidden_state
    assert torch.allclose(hidden_states(model, ids, torch.ones_like(ids)), whole, atol=1e-5)


def test_what_a_config_says_of_the_head_is_held_against_the_model(tmp_path, tokenizer):
    """A Llama has neither a scale nor a cap, whatever its config says."""
    policy, _ = load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    assert policy.fused_head == Head()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        setattr(policy.config, name, 2.0)
        assert find_head(policy) is None
        for nothing in (None, "inv_sqrt_d_model"):  # MPT's are no numbers, and mean no such scale
            setattr(policy.config, name, nothing)
            assert find_head(policy) == Head()


@pytest.mark.parametrize("head", [Head(), None])
def test_with_a_plain_head_whole_logits_are_never_made(tmp_path, tokenizer, head):
    policy, _ = load_policy(config_for(write_policy(tmp_path / "policy", tokenizer).parent))
    policy.fused_head, calls = head, []
    policy.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    batch = laid_out(PROMPTS, RESPONSES)
    repo.response_log_probs(policy, batch, 0.7).sum().backward()
    repo.response_log_probs(policy, batch, 0.7, return_entropy=True)
    assert bool(calls) == (head is None)


def test_a_critic_whose_class_is_in_no_list_is_saved_all_the_same(tmp_path, tokenizer):
    """Such classes come with checkpoints, by --trust_remote_code."""
    class OwnConfig(LlamaConfig):
        model_type = "own"

    class OwnModel(LlamaModel):
        config_class = OwnConfig

    settings = tiny_config(tokenizer).to_dict() | {"model_type": "own"}
    critic = repo.ScoreModel(OwnConfig(**settings), OwnModel(OwnConfig(**settings)))
    save_critic(tmp_path / "critic", critic, critic.state_dict(), repo.Config(dtype="float32"))
    saved = load_file(tmp_path / "critic" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in critic.state_dict().items())
