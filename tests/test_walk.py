# pytest tests/test_walk.py
"""The walk through one prompt: its printed numbers follow from each other with a pencil."""
import json
import re

import pytest

from companions import walk
from companions.shared.command import main


@pytest.fixture(scope="module")
def printed(family, tmp_path_factory) -> tuple[str, dict, dict]:
    """(what it prints, the printed numbers by name, those of --json)."""
    file = tmp_path_factory.mktemp("walk") / "numbers.json"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(walk, "say", lines.append)
        assert main(walk.WalkSettings, walk.run, ["--json", str(file)]) == 0
    text = "\n".join(lines)
    numbers, name = {}, None
    for line in text.splitlines():
        is_first = re.match(r".{26}\[[\d, ]+\] ", line)
        if is_first:
            name = line[:26].strip()
            numbers[name] = []
        if is_first or line.startswith(" " * 35):
            numbers[name] += map(float, line[35:].split())
    return text, numbers, json.loads(file.read_text())


@pytest.fixture(scope="module")
def numbers(printed) -> dict[str, list[float]]:
    return printed[1]


def close(value: float):
    """What is computed from numbers with four decimals."""
    return pytest.approx(value, abs=4e-4)


def test_every_tensor_has_a_line_with_its_equation_and_shape(printed):
    text, numbers, file = printed
    assert max(map(len, text.splitlines())) <= 100
    assert numbers.keys() == file.keys()
    for name, values in file.items():
        assert numbers[name] == pytest.approx(values, abs=6e-5), name
    assert {name[:3] for name in numbers if name.startswith("(")} == {
        f"({number})" for number in range(2, 9)}
    count = len(numbers["log_probs"])
    for name in ("(4) token rewards", "(5) token costs", "(6) cost_returns"):
        assert re.search(rf"^{re.escape(name)} +\[1, {count}\] ", text, re.M)
        assert len(numbers[name]) == count


def test_the_response_is_unsafe_and_rho_leaves_the_clip(numbers):
    assert numbers["cost"][0] > 1
    assert numbers["(2) rectified cost"] == numbers["cost"]
    assert 1.0 in numbers["(8) outside the clip"] and 0.0 in numbers["(8) outside the clip"]


def test_token_rewards_and_costs_of_the_first_and_the_last_token(numbers):
    """beta 0.2."""
    kl = [0.2 * (new - old) for new, old in zip(numbers["log_probs"], numbers["ref_log_probs"])]
    assert abs(kl[0]) > 0.01
    rewards, costs = numbers["(4) token rewards"], numbers["(5) token costs"]
    assert rewards[0] == close(-kl[0]) and costs[0] == close(kl[0])
    assert rewards[-1] == close(numbers["reward"][0] - kl[-1])
    assert costs[-1] == close(numbers["cost"][0] + kl[-1])


@pytest.mark.parametrize("kind, score", [("reward", "(4) token rewards"),
                                         ("cost", "(5) token costs")])
def test_advantages_of_the_last_two_tokens(numbers, kind, score):
    given, values = numbers[score], numbers[f"(6) {kind}_values"]
    advantages, returns = numbers[f"(6) {kind}_advantages"], numbers[f"(6) {kind}_returns"]
    last = given[-1] - values[-1]
    assert advantages[-1] == close(last)
    before = given[-2] + values[-1] - values[-2] + 0.95 * last
    assert advantages[-2] == close(before)
    assert returns[-2] == close(before + values[-2])


def test_the_combined_advantage_the_clip_and_the_sums(numbers):
    """Of the first token, whose rho is below 0.8 and whose advantage is negative."""
    lam = numbers["(2) lambda_i"][0]
    combined = (numbers["(6) reward_advantages"][0]
                - lam * numbers["(6) cost_advantages"][0]) / (1 + lam)
    assert numbers["(7) advantages"][0] == close(combined) and combined < 0
    count = len(numbers["log_probs"])
    assert sum(numbers["(8) weights w"]) == pytest.approx(1, abs=1e-3)
    assert numbers["(8) losses"][0] == close(-combined / count)

    assert numbers["(8) outside the clip"][0] == 1 and numbers["(8) ratios rho after"][0] < 0.8
    assert numbers["(8) losses after"][0] == close(-0.8 * combined / count)
    for sums, losses in zip(numbers["(8) sums, as learned from"], ("losses", "losses after")):
        assert sum(numbers[f"(8) {losses}"]) == pytest.approx(sums, abs=2e-3)


def test_lambda_takes_its_step(numbers):
    """alpha 0.2, the cap 10 not reached; a step uses its lambda, then updates it."""
    lam, following = numbers["(3) lambda, and the next"]
    assert lam == numbers["(2) lambda_i"][0]
    assert following == close(lam + 0.2 * numbers["(2) rectified cost"][0])


@pytest.mark.parametrize("words, sentence", [
    (("--prompt", " "), "--prompt: is empty"),
    (("--prompt", "word " * 700), "--prompt: has 2110 tokens, and at most 640 are allowed"),
])
def test_what_cannot_be_walked_is_refused_in_one_sentence(words, sentence, family, capsys):
    assert main(walk.WalkSettings, walk.run, [*words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"
