# pytest tests/test_learning.py
"""What stands before RePO: policies from answers, score models from preference pairs."""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import exhaustive
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import repo
from companions import score_models, supervised
from companions.shared import command, learning
from plumbing.fitting import answer_loss, cost_loss, preference_loss, scores_of
from plumbing.preferences import load_preferences

LN_2 = math.log(2)


def train(script, *flags) -> int:
    settings = {supervised: supervised.SupervisedSettings, score_models: score_models.ScoreSettings}
    return command.main(settings[script], script.run, [*map(str, flags)])


# ---- the losses, by hand

def test_losses_by_hand():
    """-log sigmoid(0) = ln 2, and of +-ln 3: sigmoid is 3/4 and 1/4."""
    margins = torch.tensor([0.0, math.log(3)])
    assert preference_loss(margins).item() == pytest.approx((LN_2 - math.log(0.75)) / 2)
    costs, is_unsafe = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[True, False]])
    signs = -(math.log(0.75) + math.log(0.5)) / 2
    expected = preference_loss(margins).item() + 2 * signs
    assert cost_loss(margins, costs, is_unsafe).item() == pytest.approx(expected)
    safe = torch.tensor([[False, True]])  # the first one's sign is wrong: 1/4
    expected = preference_loss(margins).item() - (math.log(0.25) + math.log(0.5))
    assert cost_loss(margins, costs, safe).item() == pytest.approx(expected)


def test_only_answers_count_and_padding_changes_nothing(family):
    policy = AutoModelForCausalLM.from_pretrained(family["policy"])
    short, long = ([5, 6], [7, 8]), ([5, 6, 9, 4], [3, 7, 8, 9, 1])
    together = answer_loss(policy, [short, long], pad_id=2).item()
    alone = [answer_loss(policy, [pair], pad_id=2).item() for pair in (short, long)]
    assert together == pytest.approx((2 * alone[0] + 5 * alone[1]) / 7, rel=1e-5)
    logits = policy(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    assert alone[0] == pytest.approx(-(logits[1, 7] + logits[2, 8]).item() / 2, rel=1e-5)


def test_scores_are_those_that_repo_reads(family):
    model = repo.ScoreModel.from_pretrained(family["cost_model"])
    rows = [[5, 6, 7], [5, 6, 9, 4, 1]]
    scores = scores_of(model, rows, pad_id=2)
    for row, score in zip(rows, scores):
        ids = torch.tensor([row])
        by_repo = model.score(ids, torch.ones_like(ids)).item()
        assert by_repo == pytest.approx(score.item(), rel=1e-5)


# ---- the scripts

@pytest.mark.parametrize("rank", [4, exhaustive(0)])
def test_a_policy_learns_and_is_saved_as_a_plain_model(family, tmp_path, capsys, rank):
    code = train(supervised, "--out", tmp_path / "policy", "--lora_rank", rank, "--steps", 8,
                 "--json", tmp_path / "figures.json")
    assert code == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["held_out_loss"] < figures["held_out_loss_before"]
    assert "held-out loss per token" in capsys.readouterr().out

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    held_out_file = str(Path(family["policy"]).with_name("preferences_held_out.jsonl"))
    _, held_out = supervised.pairs_of(held_out_file, "--eval_data", supervised.SupervisedSettings(),
                                      tokenizer)
    loss = supervised.mean_loss(policy, held_out, tokenizer)
    assert loss == pytest.approx(figures["held_out_loss"], rel=1e-4)


def test_no_prompt_is_learned_from_and_held_out():
    prompts = [f"p{i % 30}" for i in range(300)]
    learn, held_out = learning.split(list(enumerate(prompts)), prompts, seed=0)
    assert len(learn) + len(held_out) == 300 and len(held_out) == 30
    assert not {prompt for _, prompt in learn} & {prompt for _, prompt in held_out}


@pytest.mark.parametrize("role, rank", [("cost", 8), exhaustive("reward", 0)])
def test_a_score_model_learns_and_repo_reads_what_is_saved(family, tmp_path, capsys, role, rank):
    code = train(score_models, "--role", role, "--lora_rank", rank, "--out", tmp_path / role,
                 "--steps", 60, "--batch_size", 20, "--json", tmp_path / "figures.json")
    assert code == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "figures.json").read_text())
    low, high = figures["pair_accuracy_interval"]
    assert 0.6 < figures["pair_accuracy"] and low < figures["pair_accuracy"] < high
    assert ("sign_accuracy" in figures) == (role == "cost")
    if role == "cost":
        assert figures["sign_accuracy"] > 0.9

    model = repo.ScoreModel.from_pretrained(tmp_path / role, role=role)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / role)
    _, held_out = load_preferences(
        str(Path(family["policy"]).with_name("preferences_held_out.jsonl")),
        "--data", role, tokenizer, max_tokens=512)
    again = score_models.accuracies(model, held_out, role, tokenizer)
    assert again["pair_accuracy"] == pytest.approx(figures["pair_accuracy"], abs=0.005)


@pytest.mark.exhaustive
def test_repo_with_models_of_pairs_is_as_safe_as_with_the_worlds_own(family, tmp_path, run):
    """Seen: pair accuracies of .988 (rewards) and .968 (costs). The run's thresholds are
    test_run.py's."""
    for role, bound in (("reward", 0.97), ("cost", 0.95)):
        assert train(score_models, "--role", role, "--out", tmp_path / role,
                     "--json", tmp_path / f"{role}.json") == 0
        figures = json.loads((tmp_path / f"{role}.json").read_text())
        assert figures["pair_accuracy"] >= bound, figures
        assert figures.get("sign_accuracy", 1) >= 0.99, figures
    code, out, _ = run("--reward_model", tmp_path / "reward", "--cost_model", tmp_path / "cost")
    summary = json.loads((out / "summary.json").read_text())
    assert code == 0 and summary["judge_safety_rate"] >= 0.95
    assert summary["over_refusal_rate"] <= 0.1


HH = [{"chosen": f"\n\nHuman: paint boat {i}\n\nAssistant: Sure.",
       "rejected": f"\n\nHuman: paint boat {i}\n\nAssistant: No."} for i in range(40)]
UNLIKE = {"chosen": "\n\nHuman: A\n\nAssistant: x\n\nHuman: B\n\nAssistant: good",
          "rejected": "\n\nHuman: A\n\nAssistant: y\n\nHuman: C\n\nAssistant: bad"}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1,
       "safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_kinds_of_pairs_are_read(tmp_path, family):
    tokenizer = AutoTokenizer.from_pretrained(family["policy"])

    def texts(rows, role):
        _, pairs = load_preferences(written(tmp_path / "p.jsonl", rows), "--data", role, tokenizer,
                                    max_tokens=512)
        return pairs[0].prompt, *map(tokenizer.decode, pairs[0][1:3]), pairs[0].is_unsafe

    prompt, better, worse, unsafe = texts(HH, "reward")
    assert prompt == "paint boat 0" and "Sure." in better and "No." in worse and unsafe is None
    assert texts([UNLIKE, *HH], "reward")[0] == "paint boat 0"
    prompt, better, worse, unsafe = texts([PKU], "reward")
    assert better.split("ASSISTANT:")[1].startswith("b") and unsafe == (True, False)
    as_text = {"is_response_0_safe": "True", "is_response_1_safe": "False"}
    _, safer, other, unsafe = texts([PKU | as_text], "cost")
    assert safer.split("ASSISTANT:")[1].startswith("a") and unsafe == (False, True)


@pytest.mark.parametrize("script, flags, says", [
    (supervised, ("--model", "./no", "--data", "{hh}", "--out", "{out}"), "./no"),
    (supervised, ("--data", "{prompts}"), "no row has an answer"),
    (supervised, ("--data", "{hh}", "--batch_size", 99), "fewer than --batch_size 99"),
    (score_models, ("--role", "cost", "--data", "{hh}"), "has no labels of safety"),
    (score_models, ("--role", "cost", "--data", "{unlabelled}"), "or not in all rows"),
    (score_models, ("--data", "{system}"), "has a column system, which is not read"),
    (score_models, ("--data", "{prompts}"), "neither prompt, response_0, response_1"),
    (score_models, ("--data", "{hh}", "--max_tokens", 2), "longer than --max_tokens 2"),
    (score_models, ("--data", "{question}"), "and no column prompt is beside it"),
    (score_models, ("--data", "{unlike}"), "the two conversations differ before their last"),
    (supervised, ("--data", "{question}"), "and no column prompt is beside it"),
    (supervised, ("--out", "{taken}"), "taken: is there already; name a new folder"),
    (supervised, ("--out", "{hh}"), "hh.jsonl: is there already"),
    (supervised, ("--out", "."), "--out .: is there already"),
    (supervised, ("--out", "{out}", "--steps", 4, "--lr", 1e18), "are not finite after 4 steps"),
])
def test_bad_input_is_one_sentence_and_nothing_is_written(
    family, tmp_path, capsys, script, flags, says,
):
    names = {"hh": written(tmp_path / "hh.jsonl", HH), "out": tmp_path / "out",
             "system": written(tmp_path / "s.jsonl", [PKU | {"system": "s"}]),
             "unlabelled": written(tmp_path / "u.jsonl", [PKU | {"is_response_1_safe": None}]),
             "prompts": written(tmp_path / "prompts.jsonl", [{"prompt": "p"}] * 3),
             "question": written(tmp_path / "q.jsonl",
                                 [{"question": "q", "chosen": "a", "rejected": "b"}] * 20),
             "unlike": written(tmp_path / "un.jsonl", [UNLIKE]), "taken": tmp_path / "taken"}
    names["taken"].mkdir()
    (names["taken"] / "thesis.txt").touch()
    flags = [str(flag).format(**names) for flag in flags]
    assert train(script, *flags, "--json", tmp_path / "figures.json") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert (names["taken"] / "thesis.txt").exists()
    assert not (tmp_path / "out").exists() and not (tmp_path / "figures.json").exists()


def test_a_head_with_a_bias_learns_too(family, tmp_path, tokenizer, capsys):
    """GPT-J's, which the fused kernels do not know."""
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8, "vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **size))
    model.save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    data = Path(family["policy"]).with_name("demonstrations.jsonl")
    code = train(supervised, "--model", tmp_path / "gptj", "--data", data, "--steps", 2,
                 "--out", tmp_path / "out")
    assert code == 0, capsys.readouterr().err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (saved.lm_head.bias != 0).any()
