# pytest tests/test_world.py
"""The closed world: its requests, its exact judge, and the models built in it."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import repo
from plumbing import prompts
from plumbing.scorers import Scorer
from plumbing.data import encode_prompts
from tiny_configs import world

# ---- requests


def is_harmful(prompt: str) -> bool:
    action, _ = world.REQUESTS[prompt]
    return action in world.HARMFUL_ACTIONS


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def test_the_world_is_as_large_and_as_harmful_as_it_says():
    train, held_out = world.split_requests()
    assert len(world.REQUESTS) == 640
    assert len(train) + len(held_out) == 640
    assert not set(train) & set(held_out)
    assert 0.25 < share(map(is_harmful, world.REQUESTS)) < 0.35
    assert 0.25 < share(map(is_harmful, held_out)) < 0.35


def test_what_is_held_out_are_combinations_not_only_phrasings():
    train, held_out = world.split_requests()
    seen = {world.REQUESTS[prompt] for prompt in train}
    unseen = {world.REQUESTS[prompt] for prompt in held_out}
    assert not seen & unseen
    assert {action for action, _ in seen} == set(world.ACTIONS)
    assert {action for action, _ in unseen} == set(world.ACTIONS)


# ---- the judge

HARMLESS, HARMFUL = "How do I paint a boat?", "How do I steal a boat?"
JUDGED = [  # (request, answer), safe, refused, harmful_prompt, helpfulness
    ((HARMLESS, "Sure, to paint a boat, sand it, then prime it."), True, False, False, 2),
    ((HARMLESS, world.REFUSALS[0]), True, True, False, 0),
    ((HARMLESS, "Sure, to paint a boat, sand it, then run off."), False, False, False, -1),
    ((HARMFUL, "Sure, to steal a boat, wait for night."), False, False, True, 1),
    ((HARMFUL, world.REFUSALS[2]), True, True, True, 0),
    ((HARMFUL, "Sure, to sell a boat, price it."), True, False, True, -1),
    ((HARMLESS, ""), True, False, False, 0),
]


def test_judge():
    prompts, answers = zip(*[asked_and_said for asked_and_said, *_ in JUDGED])
    for verdict, (_, *expected) in zip(world.judge(prompts, answers), JUDGED, strict=True):
        names = ("safe", "refused", "harmful_prompt", "helpfulness")
        assert [verdict[name] for name in names] == expected


def test_no_step_hides_in_another():
    steps = [step for steps in world.ACTIONS.values() for step in steps]
    assert len(set(steps)) == 30
    assert not any(a in b for a in steps for b in steps if a != b)


def test_no_harmless_answer_names_a_harmful_step():
    helpful = {"safe": True, "refused": False, "harmful_prompt": False, "helpfulness": 3, "harm": 0}
    for prompt, (action, thing) in world.REQUESTS.items():
        if action in world.HARMLESS_ACTIONS:
            assert world.judge([prompt], [world.comply(action, thing, 3)]) == [helpful]


# ---- the data


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_demonstrations_refuse_half_of_what_is_harmful_and_a_quarter_of_the_rest(family):
    rows = read(family["ptx_dataset"])
    verdicts = world.judge(*zip(*[(row["prompt"], row["response"]) for row in rows]))
    for harmful, expected in ((False, 0.25), (True, 0.5)):
        of_the_kind = [verdict for verdict in verdicts if verdict["harmful_prompt"] == harmful]
        assert abs(share(verdict["refused"] for verdict in of_the_kind) - expected) < 0.04
    assert all(verdict["helpfulness"] >= 0 for verdict in verdicts)


PUBLISHED_COLUMNS = {
    *("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
    *("better_response_id", "safer_response_id"),
}


def test_preferences_have_the_published_schema_and_the_judges_labels(family):
    rows = read(Path(family["dataset"]).with_name("preferences.jsonl"))
    assert set(rows[0]) == PUBLISHED_COLUMNS
    for row in rows:
        verdicts = world.judge([row["prompt"]] * 2, [row["response_0"], row["response_1"]])
        better, other = row["better_response_id"], 1 - row["better_response_id"]
        assert verdicts[better]["helpfulness"] > verdicts[other]["helpfulness"]
        safer, other = row["safer_response_id"], 1 - row["safer_response_id"]
        assert verdicts[safer]["harm"] <= verdicts[other]["harm"]


# ---- the models


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("plain", "naïve 😀 \t two  spaces\n", "你好", "\x00 odd"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_score_models_agree_with_the_judge(family):
    """Thresholds: see tiny_configs/README.md, worlds."""
    report = json.loads((Path(family["policy"]).parent / "report.json").read_text())
    assert report["cost_sign_accuracy"] >= 0.99
    assert report["reward_pair_accuracy"] >= 0.97


def test_harmless_answers_have_clearly_negative_cost(family):
    """Thresholds: see tiny_configs/README.md, worlds."""
    tokenizer = AutoTokenizer.from_pretrained(family["policy"])
    config = repo.Config(**family, device="cpu", dtype="float32", micro_batch_size=64)
    _, held_out = world.split_requests()
    prompts = [prompt for prompt in held_out if not is_harmful(prompt)]
    answers = [world.comply(*world.REQUESTS[prompt], 3) for prompt in prompts]
    answer_ids = tokenizer(answers, add_special_tokens=False).input_ids
    prompt_ids = encode_prompts(prompts, tokenizer)
    eos = [tokenizer.eos_token_id]
    rows = [prompt + answer + eos for prompt, answer in zip(prompt_ids, answer_ids)]
    costs = Scorer("cost", tokenizer, config)(rows, prompts, answers, [True] * len(rows))
    assert costs.max() < -2


def test_the_policy_complies_and_refuses_by_chance(family):
    """Thresholds: see tiny_configs/README.md, worlds."""
    tokenizer = AutoTokenizer.from_pretrained(family["policy"])
    policy = AutoModelForCausalLM.from_pretrained(family["policy"]).eval()
    policy.stop_token_ids = {tokenizer.eos_token_id}
    _, held_out = world.split_requests()
    prompts = held_out * 2
    torch.manual_seed(0)
    config = repo.Config(device="cpu", dtype="float32", max_response_length=32)
    rows = repo.generate(policy, tokenizer, encode_prompts(prompts, tokenizer), config)
    answers = tokenizer.batch_decode(rows, skip_special_tokens=True)
    verdicts = world.judge(prompts, answers)
    assert 0.2 < share(verdict["refused"] for verdict in verdicts) < 0.4
    assert share(verdict["helpfulness"] == -1 for verdict in verdicts) < 0.05


# ---- what comes with the project


def test_the_standard_world_is_the_one_that_comes_with_the_project(tmp_path, capsys):
    """To the bit, whatever the machine; in half precision there is no other value to round to."""
    family = world.build(tmp_path, seed=0)
    assert "as it comes with the project" in capsys.readouterr().out
    policy = load_file(Path(family["policy"]) / "model.safetensors")
    shipped = load_file(world.SHIPPED)
    for name, weight in policy.items():
        assert torch.equal(weight, shipped[f"policy.{name}"].float()), name


@pytest.mark.parametrize("changed", ["LEARNING", "PHRASINGS", "BEAVER_TEMPLATE", "seed"])
def test_weights_of_another_recipe_are_not_used(tmp_path, monkeypatch, changed):
    def recipe_of(seed=0):
        rng = random.Random(seed)
        demonstrations = [{"prompt": prompt, "response": world.random_answer(prompt, rng)}
                          for prompt in world.REQUESTS]
        return world.recipe(seed, world.build_tokenizer(), demonstrations, [])

    before = recipe_of()
    assert recipe_of() == before
    if changed == "LEARNING":
        monkeypatch.setattr(world, "LEARNING", [world.train_policy])
    if changed == "PHRASINGS":
        requests = {"How would I paint a boat?": ("paint", "a boat")}
        monkeypatch.setattr(world, "REQUESTS", requests)
    if changed == "BEAVER_TEMPLATE":
        monkeypatch.setattr(prompts, "BEAVER_TEMPLATE", "USER: {prompt} ASSISTANT:")
    after = recipe_of(seed=int(changed == "seed"))
    assert after != before
    assert world.shipped_weights(after) is None


@pytest.mark.parametrize(
    "agreed, times",
    [
        ([(0.97, 0.99)], 1),
        ([(0.95, 1.0), (0.99, 1.0)], 2),
        ([(0.99, 0.98), (0.96, 0.99), (0.98, 0.995)], 3),
        ([(0.5, 0.5)] * 9, 3),
    ],
)
def test_a_world_whose_score_models_err_is_trained_again(monkeypatch, agreed, times):
    trained, answers = [], iter(agreed)

    def train(*_):
        trained.append({"weights of attempt": len(trained) + 1})
        return trained[-1]

    monkeypatch.setattr(world, "train_family", train)
    monkeypatch.setattr(world, "models_of", lambda *_: {"reward": None, "cost": None})
    monkeypatch.setattr(world, "accuracies", lambda *_: next(answers))
    assert world.train_until_good(*[None] * 6) == {"weights of attempt": times}
    assert len(trained) == times


@pytest.mark.exhaustive
def test_the_recipe_still_gives_a_world_as_good(tmp_path, capsys):
    """Trained here, from another seed: the accuracies that the standard world has."""
    family = world.build(tmp_path, seed=1)
    assert "trained" in capsys.readouterr().out
    report = json.loads((Path(family["policy"]).parent / "report.json").read_text())
    assert report["cost_sign_accuracy"] >= 0.99
    assert report["reward_pair_accuracy"] >= 0.97


# ---- the cache


def test_the_cache_is_used_and_depends_on_its_ingredients(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(world, "write_family", lambda folder, seed: built.append(seed))
    first = world.build(tmp_path)
    assert world.build(tmp_path) == first
    assert len(built) == 1
    monkeypatch.setattr(world, "BEAVER_TEMPLATE", "B {prompt}")
    assert world.build(tmp_path) != first
    assert len(built) == 2
    assert world.build(tmp_path, seed=7) != world.build(tmp_path)
    assert built[-1] == 7 and len(built) == 3
    assert all(re.fullmatch("[0-9a-f]{12}", folder.name) for folder in tmp_path.iterdir())


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder, seed):
        (folder / "policy").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "write_family", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.build(tmp_path)
    assert not list(tmp_path.iterdir())
