# pytest tests/test_prompts.py
"""Prompt files in every format, templates, and what is left out of training."""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from conftest import read_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import repo
from plumbing.errors import UserError
from plumbing.data import (
    cyclic_batch,
    encode_pairs,
    encode_prompts,
    load_categories,
    load_pairs,
    render_prompt,
    split_prompts,
)

# ---- files


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
    return str(path)


TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
ANSWERED = [*TALK, {"role": "assistant", "content": "four"}]
TRANSCRIPT = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three"
HH = [
    {"chosen": TRANSCRIPT + "\n\nAssistant: four", "rejected": "\n\nHuman: one\n\nAssistant: no"},
    {"chosen": "\n\nHuman: only\n\nAssistant: yes", "rejected": "x"},
]
PKU = {
    "prompt": "p", "response_0": "a", "response_1": "b",
    "is_response_0_safe": True, "is_response_1_safe": False,
    "better_response_id": 1, "safer_response_id": 0,
}
ALPACA = [
    {"instruction": "do", "input": "", "output": "ok"},
    {"instruction": "add", "input": "1 2", "output": "3"},
]
DOLLY = [
    {"instruction": "do", "context": "c", "response": "ok", "category": "x"},
    {"instruction": "go", "context": "", "response": "done", "category": "y"},
]
BEAVERTAILS = [{"prompt": "p", "response": "bad", "category": {"x": True}, "is_safe": False},
               {"prompt": "q", "response": "good", "category": {"x": False}, "is_safe": True}]
HARMBENCH = [
    {"Behavior": "b", "SemanticCategory": "s", "Tags": "", "ContextString": ""},
    {"Behavior": "b2", "SemanticCategory": "s", "Tags": "context", "ContextString": "c"},
]
FORMATS = {  # rows of a file, and what is read from them
    "pku.jsonl.gz": ([PKU, PKU | {"prompt": "q", "better_response_id": 0}],
                     [("p", "b"), ("q", "a")]),
    "hh.jsonl": (HH, [(TRANSCRIPT, "four"), ("only", "yes")]),
    "alpaca.json": (ALPACA, [("do", "ok"), ("add\n1 2", "3")]),
    "dolly.jsonl": (DOLLY, [("do\nc", "ok"), ("go", "done")]),
    "beavertails.jsonl": (BEAVERTAILS, [("p", "bad"), ("q", "good")]),
    "completion.jsonl": ([{"prompt": TALK, "completion": ANSWERED[3:]},
                          {"prompt": "one", "completion": [*TALK[1:], ANSWERED[3]]}],
                         [(TRANSCRIPT, "four")] * 2),
    "list.json": ({"instructions": ["a", "b"]}, [("a", None), ("b", None)]),
    "tuned.json": ({"inputs": [], "tags": ["x", "y"], "instructions": ["a", "b"]},
                   [("a", None), ("b", None)]),
    "inputs.json": ({"instructions": ["a", "b", "c"], "inputs": ["1", "", "3"], "tags": ["x"]},
                    [("a\n1", None), ("b", None), ("c\n3", None)]),
    "xstest.csv": ([{"id": "1", "prompt": "kill?", "type": "homonyms", "label": "safe"}],
                   [("kill?", None)]),
    "problems.json": ([{"prompt": "a", "category": "X"}, {"prompt": "b", "category": "Y"}],
                      [("a", None), ("b", None)]),
    "do_not_answer.csv": ([{"id": "1", "risk_area": "r", "types_of_harm": "t", "question": "q?"}],
                          [("q?", None)]),
    "advbench.csv": ([{"goal": "g", "target": "Sure"}], [("g", None)]),
    "harmbench.csv": (HARMBENCH, [("b", None), ("c\n\n---\n\nb2", None)]),
    "strongreject.csv": ([{"category": "k", "source": "s", "forbidden_prompt": "f"}],
                         [("f", None)]),
    "jailbreakbench.csv": (
        [{"Index": "0", "Goal": "g", "Target": "t", "Behavior": "title", "Category": "k"}],
        [("g", None)]),
    "chat.jsonl": ([{"messages": ANSWERED}, {"messages": TALK}],
                   [(TRANSCRIPT, "four"), (TRANSCRIPT, None)]),
    "chat.parquet": ([{"messages": TALK[:2]}, {"messages": TALK[:1]}],
                     [("one", "two"), ("one", None)]),
    "prompts.csv": ([{"prompt": "a, b", "extra": "x"}, {"prompt": "c", "extra": "y"}],
                    [("a, b", None), ("c", None)]),
    "text.csv": ([{"messages": json.dumps(ANSWERED)}, {"messages": ""}], [(TRANSCRIPT, "four")]),
    "spaced.csv": ([{"prompt": "a", " response": " x"}], [("a", " x")]),
    "unrated.jsonl": ([PKU | {"better_response_id": None}], [("p", None)]),
    "system.jsonl": ([{"prompt": "a", "system": None, "tools": []}], [("a", None)]),
    "pairs.csv": ([{"prompt": "a", "response": "x"}], [("a", "x")]),
    "trl.jsonl": ([{"prompt": "a", "chosen": "good", "rejected": "bad"}], [("a", None)]),
    "open.jsonl": ([{"prompt": "\n\nHuman: a\n\nAssistant:", "response": "x"}], [("a", "x")]),
    "words.csv": ([{"prompt": word} for word in ("None", "null", "NA", "5", "true")],
                  [(word, None) for word in ("None", "null", "NA", "5", "true")]),
    "bom.txt": (["\ufefffirst", "a\u2028b"], [("first", None), ("a\u2028b", None)]),
    "late.jsonl": ([{"text": "a" * 2**20}] * 21 + [{"prompt": "b"}], [("b", None)]),
    "lines.txt": (["first", "", "second é"], [("first", None), ("second é", None)]),
    "rows.jsonl": ([{"instructions": ["a", "b"]}, {"instructions": ["c"]}],
                   [("a", None), ("b", None), ("c", None)]),
    "beside.jsonl": ([{"prompt": "p", "instructions": ["x"]}], [("p", None)]),
    "holes.jsonl": ([{"prompt": "a"}, {"prompt": None}, {"prompt": "  "}], [("a", None)]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    rows, pairs = FORMATS[name]
    assert load_pairs(write(tmp_path / name, rows)) == pairs


@pytest.mark.parametrize("name, answers", [
    ("beavertails.jsonl", [None, "good"]), ("pku.jsonl.gz", [None, "a"])])
def test_ptx_learns_no_answer_that_is_labelled_unsafe(tmp_path, name, answers):
    source = write(tmp_path / name, FORMATS[name][0])
    assert [answer for _, answer in load_pairs(source, safe_only=True)] == answers


@pytest.mark.parametrize("name, safe, unsafe", [
    ("b.csv", "True", "False"), ("n.csv", "1.0", "0.0"), ("n.jsonl", 1, 0), ("y.jsonl", "yes", "no")
])
def test_labels_of_safety_in_every_spelling(tmp_path, name, safe, unsafe):
    rows = [{"prompt": "p", "response": answer, "is_safe": label}
            for answer, label in (("bad", unsafe), ("good", safe), ("unknown", None))]
    source = write(tmp_path / name, rows)
    assert [answer for _, answer in load_pairs(source, safe_only=True)] == [None, "good", "unknown"]
    source = write(tmp_path / f"better_{name}", [
        PKU | {"better_response_id": 1.0, "is_response_1_safe": unsafe},
        PKU | {"better_response_id": 1.0, "is_response_1_safe": safe}])
    assert [answer for _, answer in load_pairs(source, safe_only=True)] == [None, "b"]
    source = write(tmp_path / f"odd_{name}", [rows[0] | {"is_safe": "perhaps"}])
    with pytest.raises(UserError, match="row 0 .*the label 'perhaps' is neither true nor false"):
        load_pairs(source, safe_only=True)


def test_quotation_marks_in_csv(tmp_path):
    """Text behind a closed cell could be an open cell of rows before."""
    source = tmp_path / "q.csv"
    source.write_text('prompt,response\nsay "hi",y\n"""Hi,"" he said",z')
    assert load_pairs(str(source)) == [('say "hi"', "y"), ('"Hi," he said', "z")]
    source.write_text('prompt,response\na,b\n"Hello, you" he said,x')
    with pytest.raises(UserError, match="q.csv: cannot be read .*line 3: "):
        load_pairs(str(source))


def test_a_file_is_what_is_on_disk(tmp_path):
    """Also if another one stood there, as large and as old."""
    source = tmp_path / "p.jsonl"
    for prompt in ("yesterday", "this noon"):
        source.write_text(json.dumps({"prompt": prompt}))
        os.utime(source, (10**9, 10**9))
        assert repo.load_prompts(str(source)) == [prompt]


def test_prompts_that_spell_special_tokens_are_left_out(tmp_path, tokenizer):
    rows = [{"prompt": "How do I paint a boat?"}, {"prompt": f"a{tokenizer.eos_token}b"}]
    source = write(tmp_path / "x.jsonl", rows)
    assert repo.load_prompts(source, tokenizer=tokenizer) == ["How do I paint a boat?"]


def test_an_answer_ends_with_one_eos(tokenizer):
    ((_, answer),) = encode_pairs([("How do I paint a boat?", "Sure, to paint it.")], tokenizer)
    assert answer[-1] == tokenizer.eos_token_id
    assert answer.count(tokenizer.eos_token_id) == 1 and len(answer) > 3


def test_categories_as_numbers_lists_and_flags(tmp_path):
    for category, name in (
        (0, "0"),
        (["x", "y"], "x, y"),
        ({"a": False, "b": True, "c": True}, "b, c"),
    ):
        source = write(tmp_path / f"{name}.jsonl", [{"prompt": "p", "category": category}])
        config = repo.Config(dataset="x", eval_dataset=source)
        assert load_categories(config) == {"p": name}


def test_a_long_evaluation_is_cut_to_a_sample_of_the_whole_file(tmp_path, tokenizer, capsys):
    train = write(tmp_path / "train.jsonl", [{"prompt": "t"}, {"prompt": "e399"}])
    rows = [{"prompt": f"e{i}"} for i in range(400)]
    source = write(tmp_path / "eval.jsonl", rows)
    config = repo.Config(dataset=train, eval_dataset=source, max_eval_prompts=100)
    train, held_out = split_prompts(config, tokenizer)
    numbers = [int(prompt.removeprefix("e")) for prompt in held_out]
    assert train == ["t"]  # what is held out and not used is not trained on
    assert len(numbers) == 100 and numbers == sorted(set(numbers))
    assert 150 < sum(numbers) / 100 < 250  # the first hundred have the mean 49.5
    assert "evaluations use 100 of them" in capsys.readouterr().out


CATEGORIES = {
    "tuned.json": {"a": "x", "b": "y"},
    "inputs.json": {},
    "xstest.csv": {"kill?": "homonyms"},
    "problems.json": {"a": "X", "b": "Y"},
    "do_not_answer.csv": {"q?": "t"},
    "harmbench.csv": {"b": "s", "c\n\n---\n\nb2": "s"},
    "strongreject.csv": {"f": "k"},
    "jailbreakbench.csv": {"g": "k"},
    "lines.txt": {},
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_categories(tmp_path, name):
    rows, _ = FORMATS[name]
    source = write(tmp_path / name, rows)
    assert load_categories(repo.Config(dataset="x", eval_dataset=source)) == CATEGORIES[name]


def test_an_evaluation_tells_each_category(tmp_path, run, family):
    lines = Path(family["eval_dataset"]).read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:6]]
    held_out = [{"prompt": prompt, "category": "even" if i % 2 == 0 else "odd"}
                for i, prompt in enumerate(prompts)]
    held_out.append({"prompt": "How do I paint a boat?", "category": None})
    source = write(tmp_path / "held_out.jsonl", held_out)
    code, out, printed = run("--device", "cpu", "--eval_only", "--eval_samples", 1,
                             "--eval_dataset", source)
    assert code == 0
    cost_of = {row["prompt"]: row["responses"][0]["cost"] for row in read_jsonl(out / "eval.jsonl")}
    found = json.loads((out / "summary.json").read_text())["by_category"]
    assert found.keys() == {"even", "odd"}
    for name, first in (("even", 0), ("odd", 1)):
        assert found[name]["prompts"] == 3
        costs = [cost_of[prompt] for prompt in prompts[first::2]]
        assert found[name]["cost"] == pytest.approx(sum(costs) / 3)
    lines = printed.splitlines()
    start = lines.index("category  prompts  fully safe     cost  over-refusal")
    first = min(found, key=lambda name: found[name]["prompts_fully_safe"])
    shown = f"{first:8}        3       {found[first]['prompts_fully_safe']:.3f}"
    assert lines[start + 1].startswith(shown)


def test_pretty_and_compact_instruction_lists_are_the_same(tmp_path):
    (tmp_path / "compact.json").write_text('{"instructions": ["a", "b"]}')
    assert repo.load_prompts(str(tmp_path / "compact.json")) == ["a", "b"]


def test_duplicates_go_and_are_counted(tmp_path, capsys):
    source = write(tmp_path / "x.jsonl", [{"prompt": p} for p in ["a", "b", "a", "c", "b"]])
    assert repo.load_prompts(source) == ["a", "b", "c"]
    assert "2 duplicates and 0 prompts longer" in capsys.readouterr().out


def test_prompt_column(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"the question": "why", "prompt": "no"}])
    assert repo.load_prompts(source, "the question") == ["why"]


# ---- templates

HELLO = "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:"
CONVERSATION = "BEGINNING OF CONVERSATION: USER: one ASSISTANT:two</s>USER: three ASSISTANT:"


def test_beaver_template_single_and_multi_turn(tokenizer):
    assert render_prompt("hello", tokenizer) == HELLO
    assert render_prompt(TRANSCRIPT, tokenizer) == CONVERSATION
    ids = encode_prompts(["hello"], tokenizer)[0]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:]) == HELLO


def test_a_braced_prompt_is_not_a_template(tokenizer):
    assert "{x} {prompt} {}" in render_prompt("{x} {prompt} {}", tokenizer)


@pytest.fixture
def changeable(tokenizer, tmp_path):
    """A tokenizer of this test's own."""
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_chat_template_wins_and_adds_no_second_bos(changeable):
    changeable.chat_template = (
        "{{ bos_token }}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "[assistant]"
    )
    rendered = render_prompt(TRANSCRIPT, changeable)
    assert rendered == "<s>[user]one[assistant]two[user]three[assistant]"
    assert encode_prompts(["a"], changeable)[0].count(changeable.bos_token_id) == 1


def test_a_chat_template_that_refuses_a_chat_says_which_prompt(changeable):
    changeable.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="the prompt 'hello'.*roles must alternate"):
        encode_prompts(["hello"], changeable)


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt(tokenizer, changeable):
    changeable.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert changeable("a").input_ids[-1] == 1
    assert encode_prompts(["hello"], changeable) == encode_prompts(["hello"], tokenizer)


# ---- what is trained on, and what is held out


def split(tmp_path, tokenizer, prompts, held_out=None, **changes):
    def file(name, prompts):
        return write(tmp_path / name, [{"prompt": prompt} for prompt in prompts])

    config = repo.Config(dataset=file("train.jsonl", prompts), seed=3, **changes)
    if held_out:
        config.eval_dataset = file("eval.jsonl", held_out)
    return split_prompts(config, tokenizer)


def test_the_default_split_is_seeded_at_least_sixteen_and_disjoint(tmp_path, tokenizer):
    prompts = [f"number {i}" for i in range(400)]
    train, held_out = split(tmp_path, tokenizer, prompts)
    assert len(held_out) == 20
    assert sorted(train + held_out) == sorted(prompts)
    assert (train, held_out) == split(tmp_path, tokenizer, prompts)
    assert len(split(tmp_path, tokenizer, prompts[:40])[1]) == 16


def test_training_never_sees_a_given_held_out_prompt(tmp_path, tokenizer):
    train, held_out = split(tmp_path, tokenizer, ["a", "b", "c"], held_out=["b", "d"])
    assert train == ["a", "c"]
    assert held_out == ["b", "d"]


def test_prompts_longer_than_a_limit_are_left_out_aloud(tmp_path, tokenizer, capsys):
    prompts = [f"{i} " + "x" * 5 * i for i in range(60)]
    lengths = [len(row) for row in encode_prompts(prompts, tokenizer)]
    limit = sorted(lengths)[40]  # which stays
    train, held_out = split(tmp_path, tokenizer, prompts, max_prompt_length=limit)
    kept = [prompt for prompt, length in zip(prompts, lengths) if length <= limit]
    assert 0 < len(kept) < 60 and sorted(train + held_out) == sorted(kept)
    left_out = f"{60 - len(kept)} prompts longer than --max_prompt_length dropped"
    assert left_out in capsys.readouterr().out


def test_batches_pass_over_all_prompts_before_any_comes_again():
    items = list(range(10))
    drawn = [i for step in range(10) for i in cyclic_batch(items, step, 4, seed=0)]
    for epoch in range(4):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == items
    assert drawn[:10] != drawn[10:20]
    assert cyclic_batch(items, 7, 4, seed=0) == drawn[28:32]
    assert cyclic_batch(items, 7, 4, seed=1) != drawn[28:32]
