# pytest tests/test_chats.py
"""Conversations in the templates of five families: what a policy reads and learns, what a score
model reads, what a function gets, where an answer ends, and which day it is."""

import copy
import json
import pickle

import pytest
from conftest import random_beaver, write_beaver, write_policy
from test_models import config_for
from test_prompts import TALK, write
from test_run import FEW
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import repo
from plumbing import settings
from plumbing.chats import Chat, messages_of, prompt_of, to_pair
from plumbing.data import (
    conversation_ids,
    conversation_texts,
    decode_responses,
    encode_pairs,
    encode_prompts,
    end_of_turn,
    hash_of_data,
    render_prompt,
)
from plumbing.errors import UserError
from plumbing.models import load_policy
from plumbing.preferences import load_preferences
from plumbing.scorers import Scorer
from tiny_configs import world

# ---- five families: a template, and the tokens that it writes

HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"]),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('user and assistant alone') }}{% endif %}{% endfor %}",
        []),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ " + HEADER.format("m.role")
        + " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + HEADER.format("'assistant'") + " }}{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m.role %}"
        "{% endif %}{% if role in ('user', 'model') %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"]),
    "beaver": (None, []),
}
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now(\"%d %b %Y\") %}"
    "{% endif %}{{ 'Today Date: ' + date_string + '\n\n' }}" + TEMPLATES["llama3"][0],
    TEMPLATES["llama3"][1])


def tokenizer_of(family: str, special: bool = True):
    """The tiny family's tokens and a family's own."""
    tokenizer = world.build_tokenizer()
    tokenizer.chat_template, tokens = DATED if family == "dated" else TEMPLATES[family]
    tokenizer.add_tokens(tokens, special_tokens=special)
    return tokenizer


def as_library(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


FAMILIES = pytest.mark.parametrize("family", TEMPLATES)
BEAVER = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:"
READ = {  # what a policy reads of "Hi", what a score model reads of its answer "(fine)"
    "chatml": ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "(fine)<|im_end|>\n"),
    "llama2": ("<s>[INST] Hi [/INST]", " (fine) </s>"),
    "llama3": ("<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n", "(fine)<|eot_id|>"),
    "gemma": ("<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
              "(fine)<end_of_turn>\n"),
    "beaver": (BEAVER.format("Hi"), "(fine)</s>"),
}


@FAMILIES
def test_a_conversation_as_each_reader_gets_it(family):
    tokenizer, (asked, answered) = tokenizer_of(family), READ[family]
    assert render_prompt("Hi", tokenizer) == asked
    whole, cut_off = conversation_texts(tokenizer, ["Hi"] * 2, ["(fine)"] * 2, [True, False])
    assert whole == asked + answered
    assert cut_off == asked + answered[:answered.index(")") + 1]

    [(prompt, answer)] = encode_pairs([("Hi", "(fine)")], tokenizer)
    assert [prompt] == encode_prompts(["Hi"], tokenizer)
    assert tokenizer.decode(prompt + answer).removeprefix("<s>") == (
        (asked + answered.rstrip("\n")).removeprefix("<s>"))
    assert answer[-1] == end_of_turn(tokenizer) and answer.count(answer[-1]) == 1
    [text] = decode_responses([answer], {answer[-1]}, tokenizer)
    assert text.strip() == "(fine)"


@FAMILIES
@pytest.mark.parametrize("answer", ["fine", "No. \n\nYes: (1) ", ""])
def test_a_score_model_reads_what_the_library_renders(family, answer):
    tokenizer = tokenizer_of(family)
    prompts, chat = [prompt_of(TALK)], [*TALK, {"role": "assistant", "content": answer}]
    [whole] = conversation_ids(tokenizer, prompts, [answer], [True])
    [cut_off] = conversation_ids(tokenizer, prompts, [answer], [False])
    if family == "beaver":
        text = BEAVER.format("one") + "two</s>USER: three ASSISTANT:" + answer
        assert (cut_off, whole) == (tokenizer(text).input_ids, tokenizer(text).input_ids + [1])
        return
    assert whole == as_library(tokenizer, chat)
    if answer == "fine":  # the library keeps a space that a template trims
        assert cut_off == as_library(tokenizer, chat, continue_final_message=True)


# ---- tokens at the border of prompt and answer


def merging_tokenizer(is_sentence_piece: bool):
    """Characters, and one token for a colon with a bracket."""
    letters = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *letters, ":("])}
    core = Tokenizer(models.BPE(vocabulary, [(":", "(")], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    if is_sentence_piece:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("is_sentence_piece", [False, True])
def test_a_token_across_the_border_takes_nothing_from_an_answer(is_sentence_piece):
    tokenizer = merging_tokenizer(is_sentence_piece)
    [prompt] = encode_prompts(["hi"], tokenizer)
    [whole] = conversation_ids(tokenizer, ["hi"], ["(yes)"], [True])
    assert len(whole) == len(prompt) + 5  # the library's tokens: ":(" and "yes)" and EOS
    [(same, answer)] = encode_pairs([("hi", "(yes)")], tokenizer)
    assert same == prompt
    assert tokenizer.convert_ids_to_tokens(answer) == [*"(yes)", "</s>"]


def thinking_tokenizer(opens: bool):
    """The prompt of DeepSeek's opens a thought, which its conversations leave out. Qwen's
    conversations have an empty one, which its prompt leaves out."""
    thought, empty = ("<think>\n", "") if opens else ("", "<think></think>")
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"][0].replace(
        "assistant\n'", f"assistant\n{thought}'").replace(
        "m.content", f"('{empty}' if m.role == 'assistant' else '') + m.content")
    return tokenizer, thought, empty


@pytest.mark.parametrize("opens", [False, True])
def test_a_template_that_thinks_first(opens):
    tokenizer, thought, empty = thinking_tokenizer(opens)
    [(prompt, answer)] = encode_pairs([("Hi", "(fine)")], tokenizer)
    assert tokenizer.decode(prompt) == READ["chatml"][0] + thought
    assert tokenizer.decode(answer) == f"{empty}(fine)<|im_end|>"


@pytest.mark.parametrize("after", ["\n\n", "", "</s></s>", "</s>\n</s>"])
def test_ptx_teaches_one_end_and_nothing_that_the_template_writes_around_it(after):
    tokenizer = tokenizer_of("beaver")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '" + after + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
    [(_, answer)] = encode_pairs([("Hi", "fine.")], tokenizer)
    assert tokenizer.decode(answer) == "fine.</s>"


# ---- score models beside a policy


def scorer_for(tmp_path, tokenizer, policy_tokenizer) -> Scorer:
    written = write_beaver(tmp_path / "score", tokenizer, random_beaver(tokenizer)[1])
    return Scorer("reward", policy_tokenizer, config_for(tmp_path, reward_model=str(written)))


def test_the_same_tokens_in_the_same_template_are_read_with_the_templates_end(tmp_path):
    """A policy may end with another token than its template writes."""
    tokenizer = tokenizer_of("chatml")
    scorer, turn = scorer_for(tmp_path, tokenizer, tokenizer), end_of_turn(tokenizer)
    [prompt] = encode_prompts(["Hi"], tokenizer)
    said = tokenizer("fi", add_special_tokens=False).input_ids
    assert scorer.same_tokens
    for last in (turn, tokenizer.eos_token_id):
        row = prompt + said + [last]
        [read] = scorer.encode([row], ["Hi"], ["fi"], [True])
        assert read == prompt + said + [turn] + tokenizer("\n", add_special_tokens=False).input_ids
    assert scorer.encode([row[:-1]], ["Hi"], ["fi"], [False]) == [row[:-1]]


@pytest.mark.parametrize("kind, answer", [
    ("opens", "fi"), ("closes", "fi"), ("gemma", " fi\n"), ("llama2", "fi")])
def test_the_same_tokens_are_read_anew_where_the_template_writes_an_answer_in_another_way(
    tmp_path, kind, answer
):
    tokenizer = tokenizer_of(kind) if kind in TEMPLATES else thinking_tokenizer(kind == "opens")[0]
    scorer = scorer_for(tmp_path, tokenizer, tokenizer)
    [prompt] = encode_prompts(["Hi"], tokenizer)
    row = prompt + tokenizer(answer, add_special_tokens=False).input_ids + [end_of_turn(tokenizer)]
    [read, cut_off] = scorer.encode([row, row[:-1]], ["Hi"] * 2, [answer] * 2, [True, False])
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    assert scorer.same_tokens and read == as_library(tokenizer, chat)
    assert [cut_off] == conversation_ids(tokenizer, ["Hi"], [answer], [False])


@pytest.mark.parametrize("changed", ["chat_template", "eos_token"])
def test_another_template_or_end_is_other_tokens(tmp_path, changed):
    tokenizer, other = tokenizer_of("chatml"), tokenizer_of("chatml")
    setattr(other, changed, {"chat_template": None, "eos_token": "<|im_end|>"}[changed])
    scorer = scorer_for(tmp_path, other, tokenizer)
    assert scorer.tokenizer.get_vocab() == tokenizer.get_vocab() and not scorer.same_tokens
    [read] = scorer.encode([[5]], ["Hi"], ["fine"], [True])
    assert read == conversation_ids(other, ["Hi"], ["fine"], [True])[0] != [5]


# ---- ends


def test_an_answer_ends_with_what_the_template_or_the_models_config_names(tmp_path):
    """If generation_config.json lists nothing."""
    tokenizer = tokenizer_of("gemma", special=False)
    folder = write_policy(tmp_path / "policy", tokenizer, eos_token_id=[1, 9])
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 9]
    (folder / "generation_config.json").unlink()
    policy, tokenizer = load_policy(config_for(tmp_path))
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert policy.stop_token_ids == {1, 9, turn}
    rows = [[20, turn], [20, 21], [turn]]
    assert "<end_of_turn>" in tokenizer.decode(rows[0], skip_special_tokens=True)
    texts = [tokenizer.decode(row) for row in ([20], [20, 21], [])]
    assert decode_responses(rows, policy.stop_token_ids, tokenizer) == texts


def test_prompts_that_spell_a_token_of_the_template_are_left_out(tmp_path, capsys):
    """But not those with added tokens that are words of it."""
    rows = [{"prompt": "a model, if"}, {"prompt": "a<end_of_turn>b"}, {"prompt": "<start_of_turn>"}]
    source, tokenizer = write(tmp_path / "p.jsonl", rows), tokenizer_of("gemma", special=False)
    tokenizer.add_tokens(["model", "if"])
    assert repo.load_prompts(source, tokenizer=tokenizer) == ["a model, if"]
    assert "2 prompts that spell special tokens" in capsys.readouterr().out
    assert len(repo.load_prompts(source, tokenizer=tokenizer_of("beaver"))) == 3


# ---- messages

QUOTE = "Go on:\n\nHuman: is it?\n\nAssistant: Yes, and here is how"
CHATS = {
    "a transcript in one message": [{"role": "user", "content": "\n\nHuman: a\n\nAssistant: b"}],
    "a quote": [{"role": "system", "content": "s"}, {"role": "user", "content": QUOTE}],
    "spaces": [*TALK[:2], {"role": "user", "content": " three\n"}],
    "other roles": [{"role": "developer", "content": "d"}, *TALK],
    "plain": TALK[:1],
}


@pytest.mark.parametrize("name", CHATS)
def test_messages_come_to_the_template_as_they_are_in_the_file(tmp_path, name):
    tokenizer, chat = tokenizer_of("chatml"), CHATS[name]
    source = write(tmp_path / "c.jsonl", [{"messages": chat}])
    [prompt] = repo.load_prompts(source, tokenizer=tokenizer)
    assert messages_of(prompt) == chat
    assert encode_prompts([prompt], tokenizer) == [
        as_library(tokenizer, chat, add_generation_prompt=True)]
    assert isinstance(prompt, Chat) == (name != "plain")
    for same in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert same == prompt and hash(same) == hash(prompt) and messages_of(same) == chat
    text = json.loads(json.dumps({"prompt": prompt}))["prompt"]  # of a log
    assert text == str(prompt) and chat[-1]["content"] in text
    if name != "plain":
        assert text != prompt and hash_of_data([text], [], []) != hash_of_data([prompt], [], [])


TOOL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
ODD_CHATS = [
    ([*TALK[:1], TOOL], "chatml", "row 1 .*of role assistant calls a tool or has no text"),
    ([*TALK[:1], {"role": "assistant", "content": None}, *TALK[:1]], "chatml", "row 1 .*no text"),
    ([*TALK[:1], {**TOOL, "content": ""}], "chatml", "row 1 .*calls a tool"),
    ([*TALK, {"role": "tool", "content": "t"}], "gemma",
     "row 1: has a turn of role tool, which the chat template leaves out"),
    ([{"role": "system", "content": "s"}, *TALK], "llama2",
     r"row 1: the chat template refuses its turns \(system, user.*user and assistant alone"),
    ([{"role": "human", "content": "q"}], "chatml",
     "row 1 .*a message has the role human; name the roles user and assistant"),
    ([*TALK, {"role": "function", "content": "t"}], "beaver", "row 1: .*refuses its turns .*func"),
]


@pytest.mark.parametrize("chat, family, says", ODD_CHATS)
def test_turns_that_a_template_does_not_write_are_refused_with_their_row(
    tmp_path, chat, family, says
):
    source = write(tmp_path / "c.jsonl", [{"messages": TALK, "x": 1}, {"messages": chat}])
    with pytest.raises(UserError, match=says):
        repo.load_prompts(source, tokenizer=tokenizer_of(family))


def test_a_transcript_may_lack_its_first_blank_line():
    for text in ("Human: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant:"):
        assert to_pair(text)[0] == "q"
    assert to_pair("Human: the species")[0] == "Human: the species"
    assert messages_of("Human: q\n\nAssistant: a\n\nHuman: r") == [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"}]


def test_marks_that_are_not_read_are_told(tmp_path, capsys):
    rows = [{"text": "### Human: q### Assistant: a"}, {"text": "# Human rights"}, {"text": "plain"}]
    repo.load_prompts(write(tmp_path / "g.jsonl", rows))
    assert "1 prompts begin with a mark of a turn, " in capsys.readouterr().out


def test_a_score_models_template_is_tried_on_all_prompts_before_a_step(tmp_path):
    scorer = scorer_for(tmp_path, tokenizer_of("gemma"), tokenizer_of("chatml"))
    scorer.check_prompts([prompt_of(TALK)])
    with pytest.raises(UserError, match="score: the prompt .*has a turn of role system"):
        scorer.check_prompts([prompt_of(TALK), prompt_of(CHATS["a quote"])])


@pytest.mark.parametrize("row", [
    {"chosen": "\n\nHuman: one\n\nAssistant: a", "rejected": "\n\nHuman: one\n\nAssistant: b"},
    {"prompt": "one", "chosen": "a", "rejected": "b"},
    {"prompt": TALK[:1], "chosen": [{"role": "assistant", "content": "a"}],
     "rejected": [{"role": "assistant", "content": "b"}]},
    {"prompt": "one", "chosen": [*TALK[:1], {"role": "assistant", "content": "a"}],
     "rejected": [*TALK[:1], {"role": "assistant", "content": "b"}]},
])
def test_preferences_are_learned_as_score_models_read_them(tmp_path, row):
    tokenizer = tokenizer_of("chatml")
    source = write(tmp_path / "p.jsonl", [row])
    [prompt], [pair] = load_preferences(source, "--data", "reward", tokenizer, 99)
    assert prompt == "one" and [pair.better, pair.worse] == conversation_ids(
        tokenizer, ["one"] * 2, ["a", "b"], [True] * 2)


# ---- the day


def test_midnight_changes_nothing(run, tmp_path, monkeypatch):
    """In a template that prints the date, as Llama-3.2's: a run that is resumed or evaluated on
    another day reads the day on which it began."""
    class Day(settings.date):
        day = "2020-02-03"

        @classmethod
        def today(cls):
            return cls.fromisoformat(cls.day)

    monkeypatch.setattr(settings, "date", Day)
    policy = write_policy(tmp_path / "policy", tokenizer_of("dated"))
    flags = *FEW, "--policy", policy, "--steps", 2, "--save_every", 1
    code, whole, _ = run(*flags, out="whole")
    _, out, _ = run(*flags)
    [tokenizer] = [load_policy(repo.resolve_config([*map(str, flags), "--resume", str(folder)]))[1]
                   for folder in [out / "checkpoints" / "step-1"]]
    Day.day = "2020-02-04"
    assert "Today Date: 03 Feb 2020\n" in render_prompt("hi", tokenizer)

    for name in ("summary.json", "checkpoints/step-2/manifest.json"):
        (out / name).unlink()
    code, _, printed = run(*flags, "--resume")
    assert code == 0 and "trying the one before it" in printed
    files = "eval.jsonl", "samples.jsonl", "final/actor/model.safetensors"
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in files)
    assert json.loads((out / "config.json").read_text())["date"] == "2020-02-03"
    [evaluated, new] = [repo.resolve_config([*map(str, words)]) for words in (
        ["--device", "cpu", "--eval_only", out], flags)]
    assert (evaluated.date, new.date) == ("2020-02-03", "2020-02-04")
    code, _, printed = run(*flags, "--resume", whole / "checkpoints/step-1", "--date", "2020-02-05",
                           out="other")
    assert code == 2 and "was saved with --date 2020-02-03, not 2020-02-05" in printed


def test_a_date_that_cannot_be_kept_is_refused():
    tokenizer = tokenizer_of("dated")
    tokenizer.date = "2020-02-03"
    assert tokenizer.chat_template == DATED[0]  # which is what is saved
    tokenizer.chat_template = "{% set day = '%d' %}{{ strftime_now(day) }}"
    with pytest.raises(UserError, match="a date in a form that cannot be kept"):
        render_prompt("hi", tokenizer)
    with pytest.raises(UserError, match="--date today: must be a day, as 2026-11-30"):
        repo.resolve_config(["--device", "cpu", "--date", "today"])
