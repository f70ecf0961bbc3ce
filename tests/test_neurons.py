# pytest tests/test_neurons.py
"""Safety neurons: scores and patching by hand, neurons that were planted are found."""
import json

import pytest
import torch
from conftest import exhaustive, tiny_config, write_policy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from companions import neurons
from companions.shared import command, patching
from plumbing.errors import UserError
from plumbing.data import drawn, encode_prompts, load_prompts


def of_kind(kind: str, tokenizer, seed: int):
    """A small model of random weights."""
    torch.manual_seed(seed)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    if kind == "llama":
        model = LlamaForCausalLM(tiny_config(tokenizer))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **size))
    elif kind == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            **size))
    else:
        model = MptForCausalLM(MptConfig(d_model=32, n_layers=1, n_heads=2, **size))
    model.stop_token_ids = {1}
    return model.eval()


ROWS = [[0, 5, 6, 7], [0, 9], [0, 11, 12, 13, 14]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_patching_all_or_nothing(tokenizer, kind):
    """A model patched with itself, or with no neuron of another, writes what it writes alone; and
    greedy answers are the library's."""
    start, other = of_kind(kind, tokenizer, 0), of_kind(kind, tokenizer, 1)
    shape = patching.activations(start, torch.tensor([ROWS[0]])).shape
    every = torch.ones(shape[0], shape[2], dtype=torch.bool)
    alone = patching.answers(start, start, None, ROWS, tokenizer, 12)
    assert patching.answers(start, start, every, ROWS, tokenizer, 12) == alone
    assert patching.answers(start, other, ~every, ROWS, tokenizer, 12) == alone
    assert patching.answers(start, other, every, ROWS, tokenizer, 12) != alone
    for row, answer in zip(ROWS, alone):
        whole = start.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False,
                               eos_token_id=1, pad_token_id=2)[0].tolist()
        assert whole[len(row):] == answer


def test_a_model_whose_mlps_alone_differ_is_patched_into_the_other(tokenizer):
    """With every neuron patched, what neurons read no longer matters."""
    start, aligned = of_kind("llama", tokenizer, 0), of_kind("llama", tokenizer, 0)
    with torch.no_grad():
        for layer in aligned.model.layers:
            layer.mlp.gate_proj.weight.normal_(std=0.5)
    every = torch.ones(2, 48, dtype=torch.bool)
    alone = patching.answers(aligned, aligned, None, ROWS, tokenizer, 12)
    assert patching.answers(start, aligned, every, ROWS, tokenizer, 12) == alone
    assert patching.answers(start, start, None, ROWS, tokenizer, 12) != alone


def test_scores_by_hand(tokenizer):
    """A gate of silu(z) and up of u makes a = silu(z) u: with up's row doubled in the first layer
    the change there is a itself, and nowhere else in that layer."""
    start, aligned = of_kind("llama", tokenizer, 0), of_kind("llama", tokenizer, 0)
    with torch.no_grad():
        aligned.model.layers[0].mlp.up_proj.weight[7] *= 2
    rows = [([0, 5, 6], [7, 8, 1]), ([0, 9], [4])]
    scores = patching.change_scores(start, aligned, rows, of_prompts=False)
    seen = torch.cat([patching.activations(start, torch.tensor([p + a]))[0, len(p):, 7]
                      for p, a in rows])  # of the four answer tokens
    assert len(seen) == 4
    assert scores[0, 7].item() == pytest.approx((seen ** 2).mean().sqrt().item(), rel=1e-5)
    assert scores[0].count_nonzero() == 1 and scores[1].count_nonzero() > 1
    last = patching.change_scores(start, aligned, rows[:1], of_prompts=True)[0, 7].item()
    before = patching.activations(start, torch.tensor([[0, 5, 6]]))[0, -1, 7].abs().item()
    assert last == pytest.approx(before, rel=1e-5)


def test_the_top_share():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.2]])
    assert patching.top(scores, 0.5).tolist() == [[False, True], [True, False]]
    assert patching.top(scores, 1.0).all()


def test_what_a_table_says_without_a_gain():
    row = {"safe": 1.0, "helpful": 2.0, "restored": None}
    said = neurons.table({"start": (1.0, 2.0), "aligned": (1.0, 2.0), "top": {0.05: row},
                          "random": {0.05: [row] * 5}})
    assert said.count("random 5%") == 5 and "nan" not in said


def call(*flags) -> int:
    return command.main(neurons.NeuronSettings, neurons.run, [*map(str, flags)])


def test_two_models_from_the_command_line(family, tmp_path, tokenizer, capsys):
    """The scores are of the prompts' last tokens, and only of those."""
    other = write_policy(tmp_path / "other", tokenizer, hidden_size=64, intermediate_size=192)
    code = call(family["policy"], other, "--dataset", family["eval_dataset"],
                "--cost_model", family["cost_model"], "--reward_model", family["reward_model"],
                "--share", 0.1, 1.0, "--max_prompts", 4, "--max_response_length", 4,
                "--tokens", "prompt_last", "--device", "cpu", "--json", tmp_path / "figures.json")
    printed = capsys.readouterr().out
    assert code == 0 and "top 10%" in printed and printed.count("random 10%") == 5
    kept = json.loads((tmp_path / "figures.json").read_text())["neurons"]
    scores = [score for _, _, score in kept]
    assert scores == sorted(scores, reverse=True)
    assert {(layer, index) for layer, index, _ in kept} == {
        (layer, index) for layer in range(2) for index in range(192)}
    models = [LlamaForCausalLM.from_pretrained(path) for path in (family["policy"], other)]
    squares = []
    for prompt in encode_prompts(drawn(load_prompts(family["eval_dataset"]), 4), tokenizer):
        one, two = (patching.activations(model, torch.tensor([prompt]))[:, -1]
                    for model in models)
        squares.append((one - two) ** 2)
    assert scores[0] == pytest.approx(torch.stack(squares).mean(0).sqrt().max().item(), rel=1e-4)


def test_models_without_such_neurons_are_refused_by_name(tokenizer):
    with pytest.raises(UserError, match="MptForCausalLM has no mlp.down_proj, mlp.c_proj"):
        patching.down_projections(of_kind("mpt", tokenizer, 0), "x")


@pytest.mark.parametrize("flags, says", [
    (["x"], "name two models"),
    (["{policy}", "{small}"], "--dataset is missing"),
    (["{policy}", "{small}", "--dataset", "{data}", "--cost_model", "{cost}",
      "--reward_model", "{cost}"], "have MLPs of different shapes"),
    (["{policy}", "{other}", "--dataset", "{data}", "--cost_model", "{cost}",
      "--reward_model", "{cost}"], "have different tokenizers"),
    (["--share", "2"], "--share 2.0: must be above 0"),
])
def test_what_cannot_work_is_refused_in_a_sentence(
    family, tmp_path, tokenizer, capsys, flags, says
):
    names = {"policy": family["policy"], "data": family["eval_dataset"],
             "cost": family["cost_model"],
             "small": write_policy(tmp_path / "small", tokenizer),
             "other": write_policy(tmp_path / "other", tokenizer.train_new_from_iterator(
                 ["other text"], 300, show_progress=False))}
    assert call(*(flag.format(**names) for flag in flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error


@pytest.mark.parametrize("seed", [exhaustive(0), exhaustive(1)])
def test_itself_in_the_tiny_world(tmp_path, demonstrated, seed):
    """Seen on seeds 0 to 3 where prompts end: 19 of 19 found and 1.00 restored each time, random 0
    to .07 in the mean. Over the answers: 17 found each time, and .33 to 2.00 restored."""
    file = tmp_path / "figures.json"
    assert call("--run", demonstrated(seed), "--seed", seed, "--json", file) == 0
    figures = json.loads(file.read_text())
    planted = figures["planted"]
    assert planted["planted"] == 19
    assert planted["found"] >= 15 and planted["restored_top"] >= 0.85
    assert sum(planted["restored_random"]) / len(planted["restored_random"]) <= 0.3
    assert planted["by_completion"]["found"] >= 15
