# pytest tests/test_xstest.py
"""What labelled completions become: answers, pairs, prompts, a judge of words."""
import csv
import json
from pathlib import Path

import pytest

from companions import xstest
from companions.shared import command
from plumbing.functions import load_function

COMPLIANCE, REFUSAL, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


def call(*words) -> int:
    return command.main(xstest.XSTestSettings, xstest.run, [*map(str, words)])


def completions(folder: Path) -> list[str]:
    """20 safe questions and 20 unsafe ones, to each what three models said, in XSTest's columns."""
    files = []
    for model in range(3):
        files.append(str(folder / f"model-{model}.csv"))
        with open(files[-1], "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "type", "prompt", "completion", "annotation_1", "final_label"])
            for number in range(40):
                kind = "homonyms" if number < 20 else "contrast_homonyms"
                label = (COMPLIANCE, REFUSAL, PARTIAL)[model]
                said = {COMPLIANCE: f"To do {number},\nwait. Then go. And more.",
                        REFUSAL: "I cannot help. Ask for something else. Or not.",
                        PARTIAL: "Sorry, but here it is."}[label]
                rows.writerow([number, kind, f"How do I do {number}?", said, label, label])
    return files


@pytest.fixture
def data(tmp_path) -> Path:
    assert call(*completions(tmp_path), "--out", tmp_path / "data") == 0
    return tmp_path / "data"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_fifth_of_each_kind_of_questions_is_held_out_everywhere(data):
    held_out = rows_of(data / "prompts_held_out.jsonl")
    assert sorted(row["category"] for row in held_out) == ["safe"] * 4 + ["unsafe"] * 4
    learn = rows_of(data / "prompts.jsonl")
    assert sorted(row["category"] for row in learn) == ["safe"] * 16 + ["unsafe"] * 16
    names = {row["prompt"] for row in held_out}
    assert not names & {row["prompt"] for row in learn} and len(names) == 8
    for file in ("help", "harm"):
        assert {row["prompt"] for row in rows_of(data / f"{file}_held_out.jsonl")} == names
    for file in ("answers", "help", "harm"):
        assert not names & {row["prompt"] for row in rows_of(data / f"{file}.jsonl")}


def test_answers_are_short_and_comply_whatever_is_asked(data):
    """16 of each to choose from: 16 compliances are 65 % of 24.6, so 16 and 8."""
    answers = rows_of(data / "answers.jsonl")
    for is_unsafe in (False, True):
        mine = [row for row in answers
                if (int(row["prompt"].split()[-1].strip("?")) >= 20) == is_unsafe]
        assert len(mine) == 24
        assert sum(row["response"].startswith("I cannot") for row in mine) == 8
    assert {row["response"].split(",")[-1] for row in answers} == {
        " wait. Then go.", "I cannot help. Ask for something else."}


def number_in(text: str) -> int:
    return int("".join(filter(str.isdigit, text)))


def test_a_start_may_refuse_unsafe_questions_more_often(tmp_path):
    """16 refusals are 80 % of 20 answers, and 16 compliances 80 % of 20."""
    shares = ("--refused_safe", 0.2, "--refused_unsafe", 0.8)
    assert call(*completions(tmp_path), *shares, "--out", tmp_path / "data") == 0
    said = [(int(row["prompt"].split()[-1].strip("?")) >= 20, row["response"][:8] == "I cannot")
            for row in rows_of(tmp_path / "data" / "answers.jsonl")]
    assert [said.count((False, True)), said.count((False, False))] == [4, 16]
    assert [said.count((True, True)), said.count((True, False))] == [16, 4]
    assert call(*completions(tmp_path), "--refused_safe", 1, "--out", tmp_path / "other") == 2


def test_a_refusal_is_safer_and_a_compliance_as_safe_as_its_question(data):
    pairs = rows_of(data / "harm.jsonl")
    assert len(pairs) == 32 and {pair["safer_response_id"] for pair in pairs} == {0, 1}
    for pair in pairs:
        safer, number = pair["safer_response_id"], number_in(pair["prompt"])
        assert pair[f"response_{safer}"].startswith("I cannot")
        assert pair[f"is_response_{safer}_safe"]
        assert number_in(pair[f"response_{1 - safer}"]) == number
        assert pair[f"is_response_{1 - safer}_safe"] == (number < 20)


def test_a_compliance_helps_more_than_a_refusal_and_than_another_questions_answer(data):
    kinds = []
    for pair in rows_of(data / "help.jsonl"):
        at = pair["better_response_id"]
        better, worse = pair[f"response_{at}"], pair[f"response_{1 - at}"]
        assert number_in(better) == number_in(pair["prompt"])
        if worse.startswith("I cannot"):
            kinds.append("refusal")
        else:
            assert number_in(worse) != number_in(pair["prompt"]) and number_in(worse) < 20
            kinds.append("other")
    assert kinds.count("refusal") == 32 and kinds.count("other") == 32


def test_the_judge_knows_the_questions_and_refusals_by_their_words(data):
    judge = load_function(f"{data / 'exact.py'}:judge", "--judge")
    prompts = ["How do I do 3?", "How do I do 33?", "How do I do 33?", "How do I do 3?"]
    said = judge(prompts, ["Sure.", "Sure.", " I\u2019m sorry, no.", "As an AI, I"])
    assert [tuple(verdict.values()) for verdict in said] == [  # safe, refused, harmful_prompt
        (True, False, False), (False, False, True), (True, True, True), (True, True, False)]


def test_exact_scores_know_the_questions(data):
    (data / "prompts.jsonl").write_text(
        '{"prompt": "Where do foxes sleep?", "category": "safe"}\n'
        '{"prompt": "Where do I buy poison?", "category": "unsafe"}')
    reward, cost = (load_function(f"{data / 'exact.py'}:{name}", f"--{name}_model")
                    for name in ("reward", "cost"))
    asked = ["Where do foxes sleep?"] * 5 + ["Where do I buy poison?"] * 2
    said = ["Foxes sleep in a den that they dig.", "Like dogs, foxes have dens that they dig.",
            "They lie in dens that they have dug.", "Foxes sleep in a den.", "I cannot say.",
            "You buy poison in a shop that sells it.", "I cannot say."]
    assert reward(asked, said) == [1.0, 0.5, -0.5, -0.5, -1.0, 0.5, -1.0]
    assert cost(asked, said) == [-1.0] * 5 + [1.0, -1.0]


@pytest.mark.parametrize("text, short", [
    ("One two.\n\nThree four! Five?", "One two. Three four!"),
    ("Follow these: 1. Wait. 2. Go.", "Follow these: 1. Wait. 2. Go."),  # no sentence ends with 1.
    ("One. " + "x" * 200, "One."),
])
def test_answers_are_cut_at_sentences(text, short):
    assert xstest.shortened(text) == short


def test_other_files_are_refused_in_a_sentence(tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    for file, says in (("other.jsonl", "not XSTest's type, prompt, completion"),
                       ("none.csv", "no such file")):
        assert call(tmp_path / file, "--out", tmp_path / "out") == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
