# pytest tests/test_fuzz.py
"""Properties of whatever prompts, templates and settings hypothesis makes. Seeded and bounded in
time; `pytest -m exhaustive` tries many more examples."""

import csv
import json

import datasets
import pytest

pytest.importorskip("hypothesis", reason="pip install hypothesis")
from conftest import exhaustive
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import repo
from plumbing.chats import TURN, messages_of
from plumbing.data import encode_prompts, load_pairs, render_prompt
from tiny_configs import world

settings.register_profile(
    "seeded",
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("seeded")


def is_prompt(text: str) -> bool:
    return bool(text.strip()) and not TURN.search(text)


def is_turn(text: str) -> bool:
    return bool(text) and not TURN.search("\n\n" + text)


CHARACTERS = st.characters(exclude_categories=["Cs"])  # lone surrogates, which no file can hold
TEXT = st.text(CHARACTERS, min_size=1, max_size=40)
PLAIN = TEXT.filter(is_prompt)
TURNS = st.lists(PLAIN.map(str.strip).filter(is_turn), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**31)


def examples(few: int, many: int):
    """Runs a test with a few examples, and with many if all is to be tried."""
    return pytest.mark.parametrize("count", [few, exhaustive(many)])


# ---- prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def write(file, prompts):
    if file.suffix == ".jsonl":
        spelled = len(prompts) % 2 == 0  # either way of writing what is not ASCII
        rows = [json.dumps({"prompt": prompt}, ensure_ascii=spelled) for prompt in prompts]
        file.write_text("".join(row + "\n" for row in rows))
    elif file.suffix == ".parquet":
        datasets.Dataset.from_dict({"prompt": prompts}).to_parquet(file)
    else:
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([["prompt"], *[[prompt] for prompt in prompts]])
    return str(file)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
@examples(10, 100)
def test_prompts_come_out_of_a_file_as_they_went_in(folder, ending, count):
    @settings(max_examples=count)
    @given(prompts=st.lists(PLAIN, min_size=1, max_size=6))
    def check(prompts):
        distinct = list(dict.fromkeys(prompts))
        assert repo.load_prompts(write(folder / f"p{ending}", prompts)) == distinct

    check()


@examples(20, 100)
def test_a_conversation_is_the_same_as_transcript_and_as_messages(folder, count):
    @settings(max_examples=count)
    @given(turns=TURNS)
    def check(turns):
        if len(turns) > 1 and len(turns) % 2 == 0:  # the user has the last word
            turns = turns[:-1]
        messages, transcript = [], ""
        for i, turn in enumerate(turns):
            messages.append({"role": ("user", "assistant")[i % 2], "content": turn})
            transcript += f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}"
        (folder / "m.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        ((prompt, _),) = load_pairs(str(folder / "m.jsonl"))
        assert prompt == (turns[0] if len(turns) == 1 else transcript)
        assert repo.load_prompts(write(folder / "t.jsonl", [transcript])) == [prompt]
        assert len(turns) == 1 or messages_of(prompt) == messages

    check()


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


@pytest.fixture(scope="module")
def templates():
    """(tokenizer, what stands before a prompt, what behind): the Beaver family's template, and one
    that a tokenizer brings."""
    chatty = world.build_tokenizer()
    chatty.chat_template = CHAT_TEMPLATE
    return [
        (world.build_tokenizer(), "BEGINNING OF CONVERSATION: USER: ", " ASSISTANT:"),
        (chatty, "<s><user>", "<assistant>"),
    ]


@examples(40, 400)
def test_what_the_model_reads_contains_the_prompt_once_between_its_template(templates, count):
    @settings(max_examples=count)
    @given(prompt=PLAIN)
    @example(prompt="{prompt}")
    @example(prompt=" ASSISTANT:")
    @example(prompt="{{ bos_token }}{% raw %}")
    def check(prompt):
        for tokenizer, before, after in templates:
            assert render_prompt(prompt, tokenizer) == before + prompt + after
            if any(token in prompt for token in tokenizer.all_special_tokens):
                continue
            ids = encode_prompts([prompt], tokenizer)[0]
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.eos_token_id not in ids
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix("<s>")
            assert text == before.removeprefix("<s>") + prompt + after

    check()


# ---- settings

NUMBERS = {
    "kl_coeff": st.floats(0, 10),
    "lambda_init": st.floats(0, 10),
    "lambda_lr": st.floats(0, 1),
    "threshold": st.floats(-5, 5),
    "clip_range": st.floats(0.01, 1),
    "steps": st.integers(1, 10**6),
    "cost_window": st.integers(1, 10**4),
    "seed": SEEDS,
    "actor_lr": st.floats(1e-9, 1),
    "eval_samples": st.integers(1, 9),
    "tf32": st.booleans(),
    "algo": st.sampled_from(["repo", "ppo_lag", "ppo"]),
    "rectify": st.sampled_from(["return", "mask"]),
    "sample_every": st.integers(0, 99),
}
SETTINGS = st.fixed_dictionaries({}, optional=NUMBERS)


def without_output_dir(config) -> dict:
    return {name: value for name, value in vars(config).items() if name != "output_dir"}


@examples(20, 100)
def test_the_last_word_wins_flags_then_file_then_preset_then_default(folder, family, count):
    file, again = folder / "c.json", folder / "again.json"
    untouched = repo.resolve_config([])

    @settings(max_examples=count)
    @given(from_file=SETTINGS, from_flags=SETTINGS)
    def check(from_file, from_flags):
        file.write_text(json.dumps(from_file))
        flags = [f"--{name}={value}" for name, value in from_flags.items()]
        config = repo.resolve_config([*flags[:1], "--config", str(file), *flags[1:]])
        given_settings = from_file | from_flags
        for name in NUMBERS:
            assert getattr(config, name) == given_settings.get(name, getattr(untouched, name))

        # What a run writes down starts the same run.
        again.write_text(json.dumps(without_output_dir(config)))
        config_again = repo.resolve_config(["--config", str(again)])
        assert without_output_dir(config_again) == without_output_dir(config)

    check()
