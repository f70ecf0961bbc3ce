"""From the files and hub data sets that users bring to prompts, supervised pairs and token ids.

A prompt is a string: what the user says, or, if there were turns before, a transcript
"\\n\\nHuman: ...\\n\\nAssistant: ...\\n\\nHuman: ...".
"""
import glob
import hashlib
import random
import re
import sys
from contextlib import suppress
from pathlib import Path

import datasets
import torch
from torch import Tensor

from plumbing.errors import blame, require, say
from plumbing.hub import check_hub
from plumbing.pictures import Pictured, undecoded, with_picture

# ---- Rows of many formats -> (prompt, answer)

TURN = re.compile(r"\n\n(Human|Assistant|System):[ ]?")
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def to_messages(prompt: str) -> list[dict]:
    """A prompt as a list of {"role": ..., "content": ...}."""
    before, *turns = TURN.split(prompt)
    if before.strip() or not turns:
        return [{"role": "user", "content": prompt}]
    return [{"role": ROLES[name], "content": content.strip()}
            for name, content in zip(turns[::2], turns[1::2])]


def to_pair(chat: str | list[dict], answer: str | None = None) -> tuple[str, str | None]:
    """Plain text, a transcript or a list of messages as (prompt, answer). If the last turn is the
    assistant's, it is the answer."""
    messages = list(map(as_text, chat)) if isinstance(chat, list) else to_messages(chat)
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"] or answer
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"], answer

    names = {role: name for name, role in ROLES.items()}
    turns = [f"\n\n{names[message['role']]}: {message['content']}"
             for message in messages if message["role"] in names]
    return "".join(turns), answer


def as_text(message: dict) -> dict:
    """A message whose content may be a list of parts, as text. Raises ValueError for parts that are
    not text; a picture comes from its column, see without_picture."""
    content = message["content"]
    if isinstance(content, list):
        if any(part["type"] != "text" for part in content):
            raise ValueError("a part that is no text")
        content = "\n".join(part["text"] for part in content)
    return {**message, "content": content}


def without_picture(message: dict) -> dict:
    """A message without the part that marks the place of the row's picture."""
    content = message["content"]
    if isinstance(content, list):
        content = [part for part in content if part["type"] != "image"]
    return {**message, "content": content}


def read_better_response(row: dict) -> tuple[str, str | None]:
    """PKU-SafeRLHF. The more helpful response is the answer."""
    return to_pair(row["prompt"], row[f"response_{int(row['better_response_id'])}"])


def read_instruction(row: dict) -> tuple[str, str | None]:
    """Alpaca. If there is an input, it follows the instruction on a new line."""
    parts = [row["instruction"], row.get("input")]
    return to_pair("\n".join(filter(None, parts)), row.get("output"))


def read_preference(row: dict) -> tuple[str, str | None]:
    """HH-RLHF."""
    return to_pair(row.get("prompt") or row["chosen"])


def read_behavior(row: dict) -> tuple[str, str | None]:
    """HarmBench. A context, if there is one, comes before the behavior."""
    parts = [row.get("ContextString"), row["Behavior"]]
    return to_pair("\n\n---\n\n".join(filter(None, parts)))


def columns_reader(prompt: str, answer: str | None = None):
    """A reader of two columns, or of one."""
    return lambda row: to_pair(row[prompt], row[answer] if answer else None)


FORMATS = {  # columns -> reader of a row; the first format whose columns are all present is used
    ("prompt", "response_0", "response_1", "better_response_id"): read_better_response,
    ("prompt", "response"): columns_reader("prompt", "response"),
    ("prompt", "completion"): columns_reader("prompt", "completion"),
    ("instruction", "output"): read_instruction,
    ("chosen", "rejected"): read_preference,
    ("prompt",): columns_reader("prompt"),
    ("messages",): columns_reader("messages"),
    ("instruction",): read_instruction,  # safety-tuned-llamas, whose lists become rows
    ("goal", "target"): columns_reader("goal"),  # AdvBench
    ("Goal",): columns_reader("Goal"),  # JailbreakBench, whose Behavior is a title
    ("Behavior",): read_behavior,
    ("forbidden_prompt",): columns_reader("forbidden_prompt"),  # StrongREJECT
    ("question", "types_of_harm"): columns_reader("question"),  # do-not-answer
    ("question", "image", "response"): columns_reader("question", "response"),  # BeaverTails-V
    ("question", "image"): columns_reader("question"),
    ("text",): columns_reader("text"),
}
LISTS = {"instructions", "inputs", "tags"}  # columns of a file that is one json object of lists
# Columns of a prompt's category; the first one present is used. "type" is XSTest's.
CATEGORIES = ("category", "Category", "SemanticCategory", "types_of_harm", "tags", "type")


def read_rows(source: str, flag: str) -> datasets.Dataset:
    """A local file or a hub data set, with an optional :SPLIT. Raises UserError."""
    name, _, split = source.partition(":")
    if Path(source).exists():
        name, split = source, ""
    path = Path(name).expanduser()
    reader = READERS.get(Path(path.name.removesuffix(".gz")).suffix)

    if path.exists() or reader:
        require(path.exists(), f"{flag} {source}: no such file")
        require(path.is_file(), f"{flag} {source}: is a folder, not a file")
        require(reader, f"{flag} {source}: cannot tell its format, "
                        f"its ending is none of {', '.join(READERS)} (.gz)")
        require(path.stat().st_size, f"{flag} {source}: the file is empty")
        # escape: to the library a name is a pattern, and p[1].jsonl would read p1.jsonl
        where = {"path": reader, "data_files": glob.escape(str(path)), "split": "train"}
    else:
        check_hub()
        where = {"path": name, "split": split or "train"}

    with blame(f"{flag} {source}: cannot be read"):
        rows = undecoded(datasets.load_dataset(**where))
        is_lists = "instructions" in rows.column_names and LISTS >= set(rows.column_names)
        if is_lists and isinstance(rows[0]["instructions"], list):
            return datasets.Dataset.from_list([each for row in rows for each in unfolded(row)])
    return rows


def unfolded(lists: dict) -> list[dict]:
    """safety-tuned-llamas: {"instructions": [...], "inputs": [...], "tags": [...]}, as a row per
    instruction. The other lists may be empty, or tell something else."""
    instructions = lists["instructions"]
    columns = {"instruction": instructions}
    for name, column in (("inputs", "input"), ("tags", "tags")):
        values = lists.get(name) or []
        matches = len(values) == len(instructions)
        columns[column] = values if matches else [None] * len(instructions)
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def reader_of(rows: datasets.Dataset, prompt_column: str | None, source: str):
    """A function that makes (prompt, answer) of a row, the prompt with its picture if there is a
    column of pictures. None if no format fits. Raises UserError if only some rows have a
    picture."""
    names = set(rows.column_names)
    known = {columns: reader for columns, reader in FORMATS.items() if set(columns) <= names}
    if prompt_column:
        known = {(prompt_column,): columns_reader(prompt_column)} if prompt_column in names else {}
    if not known or not has_pictures(rows, source):
        return next(iter(known.values()), None)

    read, folder = next(iter(known.values())), Path(source).expanduser().parent

    def read_both(row: dict) -> tuple[str, str | None]:
        if "messages" in row:
            row = {**row, "messages": list(map(without_picture, row["messages"]))}
        prompt, answer = read(row)
        return with_picture(prompt, row["image"], folder), answer

    return read_both


def has_pictures(rows: datasets.Dataset, source: str) -> bool:
    """Whether rows have pictures. Raises UserError if only some rows have one."""
    require("images" not in rows.column_names,
            f"{source}: has a column images; a prompt has one picture, in a column image")
    if "image" not in rows.column_names:
        return False
    missing = rows.data.column("image").null_count
    require(missing in (0, len(rows)),
            f"{source}: {missing} of its {len(rows)} rows have no image; rows with a picture and "
            "rows without one must be in files of their own")
    return not missing


def load_pairs(source: str, prompt_column: str | None = None,
               flag: str = "--dataset") -> list[tuple[str, str | None]]:
    """(prompt, answer or None) of every row that has a prompt.

    Raises UserError for a missing column, an unknown format, or no prompt.
    """
    rows = read_rows(source, flag)
    read = reader_of(rows, prompt_column, source)
    require(read, f"{flag} {source}: has the columns {', '.join(rows.column_names)}, "
                  f"but not {prompt_column or 'those of any known format'}; "
                  "--prompt_column names the one that holds the prompt")
    with blame(f"{flag} {source}: cannot be read"):  # decodes text
        rows = rows.to_list()

    pairs = []
    for number, row in enumerate(rows):
        try:
            prompt, answer = read(row)
            if prompt.strip():
                pairs.append((prompt, text_or_none(answer)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            require(None in row.values(),  # a row with an empty cell is dropped
                    f"{flag} {source}: row {number} does not hold what its columns promise "
                    f"({', '.join(row)})")

    require(pairs, f"{flag} {source}: none of its {len(rows)} rows has a prompt")
    say(f"{flag} {source}: {len(rows):,} rows read, "
        f"{len(rows) - len(pairs):,} without a prompt dropped")
    return pairs


def text_or_none(answer) -> str | None:
    if not isinstance(answer, str | None):
        raise TypeError(f"{answer!r} is no text")
    return answer


# ---- Prompts -> what a model reads

BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"  # the answer, then EOS


def render_prompt(prompt: str, tokenizer) -> str:
    """A prompt as a model reads it: in the tokenizer's chat template if it has one, else in the
    template of the Beaver family. Raises UserError if the template refuses the prompt."""
    messages = to_messages(prompt)
    if getattr(tokenizer, "sight", None):
        messages = for_eyes(messages, isinstance(prompt, Pictured), tokenizer)
    if tokenizer.chat_template:
        with blame(f"the prompt {prompt[:60]!r}: refused by the chat template"):
            return tokenizer.apply_chat_template(messages, tokenize=False,
                                                 add_generation_prompt=True)
    joints = {
        "user": " ASSISTANT:",
        "assistant": f"{tokenizer.eos_token}USER: ",
        "system": "\n\n",
    }
    text = "".join(message["content"] + joints[message["role"]] for message in messages)
    return BEAVER_TEMPLATE.format(prompt=text.removesuffix(" ASSISTANT:"))


def for_eyes(messages: list[dict], has_picture: bool, tokenizer) -> list[dict]:
    """Messages in the form that the chat template of a model with pictures expects. The picture
    comes at the start of the user's first message."""
    in_parts = "image" in (tokenizer.chat_template or "")  # such a template reads lists of parts
    place_holder = tokenizer.sight.place_holder
    seen = []
    for message in messages:
        content = tokenizer.sight.without_place_holder(message["content"])
        parts = [{"type": "text", "text": content}]
        if has_picture and message["role"] == "user":
            parts = [{"type": "image"}, *parts]
            content = f"{place_holder}\n{content}"
            has_picture = False
        seen.append({**message, "content": parts if in_parts else content})
    require(not has_picture, f"{messages[0]['content'][:60]!r}: has a picture, but no message of "
                             "the user to put it into")
    return seen


def encode_prompts(prompts: list[str], tokenizer, answers: list[str] | None = None) -> list[list]:
    """Token ids of the rendered prompts, each followed by its answer in the same text. They start
    with the BOS of tokenizer or template, and never end with an EOS."""
    texts = [render_prompt(prompt, tokenizer) for prompt in prompts]
    sight = getattr(tokenizer, "sight", None)
    if sight:  # as many place-holders as the model makes states of a picture
        texts = [text.replace(sight.place_holder, sight.place_holder * sight.count)
                 for text in texts]
        answers = answers and [sight.without_place_holder(answer) for answer in answers]
    if answers:
        texts = [text + answer for text, answer in zip(texts, answers)]
    adds_special = not tokenizer.chat_template
    rows = tokenizer(texts, add_special_tokens=adds_special).input_ids
    if adds_special and tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        return [row[:-1] for row in rows]
    return rows


def encode_pairs(pairs: list[tuple[str, str | None]], tokenizer) -> list[tuple[list, list]]:
    """(prompt ids, answer ids with EOS) of supervised pairs. A missing answer counts as empty."""
    prompts = [prompt for prompt, _ in pairs]
    answers = [answer or "" for _, answer in pairs]
    prompt_ids = encode_prompts(prompts, tokenizer)
    whole_ids = encode_prompts(prompts, tokenizer, answers)
    return [(prompt, whole[len(prompt):] + [tokenizer.eos_token_id])
            for prompt, whole in zip(prompt_ids, whole_ids)]


def pad_rows(prompts: list[list], responses: list[list], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both [B, P+T]: prompts padded on the left to P tokens, responses
    padded on the right to T tokens."""
    longest_prompt = max(map(len, prompts))                              # P
    longest_response = max(map(len, responses))                          # T
    ids, mask = [], []
    for prompt, response in zip(prompts, responses):
        left = longest_prompt - len(prompt)
        right = longest_response - len(response)
        ids.append([pad_id] * left + prompt + response + [pad_id] * right)
        mask.append([0] * left + [1] * len(prompt + response) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask)                         # [B, P+T], [B, P+T]


def lay_out(prompts: list[list], responses: list[list], pad_id: int,
            device) -> tuple[Tensor, Tensor, Tensor]:
    """pad_rows on a device, and where the response tokens are: (input_ids [B, P+T], attention_mask
    [B, P+T], response_mask [B, T])."""
    input_ids, attention_mask = pad_rows(prompts, responses, pad_id)     # [B, P+T] each
    response_mask = attention_mask[:, max(map(len, prompts)):].bool()    # [B, T]
    return input_ids.to(device), attention_mask.to(device), response_mask.to(device)


def lay_out_pairs(pairs: list, tokenizer, device) -> tuple:
    """Supervised (prompt ids, answer ids, prompt) as lay_out has them, and their pictures."""
    prompt_ids, answer_ids, prompts = zip(*pairs)
    return (*lay_out(prompt_ids, answer_ids, tokenizer.pad_token_id, device),
            pixels_for(tokenizer, prompts, device))


def pixels_for(tokenizer, prompts: list[str], device="cpu") -> Tensor | None:
    """The prompts' pictures, as the tokenizer's model takes them: [B, 3, S, S], or None."""
    sight = getattr(tokenizer, "sight", None)
    pixel_values = sight.pixels(prompts) if sight else None
    return pixel_values if pixel_values is None else pixel_values.to(device)


# ---- A run's prompts and pairs

def load_prompts(source: str, prompt_column: str | None = None, flag: str = "--dataset",
                 tokenizer=None, max_length: int = sys.maxsize) -> list[str]:
    """The distinct prompts of a file or hub data set, in order, of at most max_length tokens. Says
    which ones it drops. Raises UserError if no prompt is left."""
    pairs = load_pairs(source, prompt_column, flag)
    distinct = list(dict.fromkeys(prompt for prompt, _ in pairs))
    plain, lengths = distinct, [0] * len(distinct)
    if tokenizer:
        plain = without_special_tokens(distinct, tokenizer, f"{flag} {source}")
        lengths = [len(row) for row in encode_prompts(plain, tokenizer)]
        require_sight(plain, tokenizer, f"{flag} {source}")
    kept = [prompt for prompt, length in zip(plain, lengths) if length <= max_length]
    require(kept, f"{flag} {source}: every prompt is longer than --max_prompt_length "
                  f"{max_length}; the shortest has {min(lengths)} tokens")

    steering = ""
    if len(plain) < len(distinct):
        steering = f", {len(distinct) - len(plain):,} prompts that spell special tokens"
    say(f"{flag}: {len(pairs) - len(distinct):,} duplicates{steering} and "
        f"{len(plain) - len(kept):,} prompts longer than --max_prompt_length dropped, "
        f"{len(kept):,} left")
    return kept


def require_sight(prompts: list[str], tokenizer, source: str) -> None:
    """Raises UserError for prompts with pictures if the model reads no pictures."""
    has_pictures = isinstance(prompts[0], Pictured)
    require(not has_pictures or getattr(tokenizer, "sight", None),
            f"{source}: its prompts have pictures, but the model reads none")


def without_special_tokens(prompts: list[str], tokenizer, source: str) -> list[str]:
    """The prompts without special tokens of the tokenizer, which could end the turn and start
    another. Raises UserError if no prompt is left."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values()
               if token.special and token.content]
    if not special:
        return prompts
    spelled = re.compile("|".join(map(re.escape, special)))
    kept = [prompt for prompt in prompts if not spelled.search(prompt)]
    require(kept, f"{source}: every prompt contains one of the tokenizer's special tokens, "
                  f"{', '.join(special[:9])}")
    return kept


def split_prompts(config, tokenizer) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts), distinct and disjoint. Held-out prompts come from
    --eval_dataset, or are a seeded share of --dataset. Raises UserError if no training prompt is
    left."""
    prompts = load_prompts(config.dataset, config.prompt_column, "--dataset",
                           tokenizer, config.max_prompt_length)
    if config.eval_dataset:
        held_out = load_prompts(config.eval_dataset, config.prompt_column, "--eval_dataset",
                                tokenizer, config.max_prompt_length)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(prompts), generator=generator).tolist()
        count = max(16, round(0.05 * len(prompts)))
        held_out = [prompts[i] for i in order[:count]]

    unseen = set(held_out)
    train = [prompt for prompt in prompts if prompt not in unseen]
    require(train, f"--dataset {config.dataset}: its {len(prompts)} prompts are all held out, by "
                   "--eval_dataset or as the 16 at least; bring more, or other ones to hold out")
    say(f"prompts: {len(train):,} for training, {len(held_out):,} held out")
    if len(held_out) > config.max_eval_prompts:  # drawn, because files are often sorted
        chosen = random.Random(0).sample(range(len(held_out)), config.max_eval_prompts)
        held_out = [held_out[i] for i in sorted(chosen)]
        say(f"evaluations use {len(held_out):,} of them, drawn at random (--max_eval_prompts)")
    return train, held_out


def load_categories(config) -> dict[str, str]:
    """{held-out prompt: its category}, if the data set has a column of them."""
    flag = "--eval_dataset" if config.eval_dataset else "--dataset"
    rows = read_rows(config.eval_dataset or config.dataset, flag)
    column = next((name for name in CATEGORIES if name in rows.column_names), None)
    read = reader_of(rows, config.prompt_column, config.eval_dataset or config.dataset)
    categories = {}
    for row in rows.to_list() if column else []:
        with suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):  # empty cells
            prompt, _ = read(row)
            names = names_in(row[column])
            if names:
                categories.setdefault(prompt, ", ".join(names))
    return categories


def names_in(category) -> list[str]:
    """The names in one category, in a list, or in a dict {name: whether it holds}."""
    if isinstance(category, dict):
        category = [name for name, holds in category.items() if holds]
    names = category if isinstance(category, list) else [category]
    return [str(name) for name in names if name not in (None, "")]


def load_ptx_pairs(config, tokenizer) -> list[tuple[list[int], list[int], str]]:
    """Supervised (prompt ids, answer ids with EOS, prompt) that fit --max_length. Raises
    UserError."""
    texts = load_pairs(config.ptx_dataset, flag="--ptx_dataset")
    require_sight(texts[0], tokenizer, f"--ptx_dataset {config.ptx_dataset}")
    pairs = encode_pairs(texts, tokenizer)
    kept = [(ids, answer, prompt) for (ids, answer), (prompt, _) in zip(pairs, texts)
            if len(answer) > 1 and len(ids) + len(answer) <= config.max_length]
    require(kept, f"--ptx_dataset {config.ptx_dataset}: no row has both a prompt and an answer "
                  f"within --max_length {config.max_length}")
    say(f"--ptx_dataset {config.ptx_dataset}: {len(kept):,} pairs; {len(pairs) - len(kept):,} "
        "without an answer or too long (--max_length) dropped")
    return kept


def hash_of_data(prompts: list[str], held_out: list[str], ptx_pairs: list) -> str:
    """A hash that differs if a run's data differ. The repr of a prompt contains its picture's
    hash."""
    pairs = [pair if isinstance(pair[2], Pictured) else pair[:2] for pair in ptx_pairs]
    return hashlib.sha256(repr((prompts, held_out, pairs)).encode()).hexdigest()


def cyclic_batch(items: list, step: int, size: int, seed: int) -> list:
    """The items of a step (from 0): epoch after epoch, each in its own order. They depend on the
    step alone, so a checkpoint need not hold them."""
    chosen, orders = [], {}
    for n in range(step * size, (step + 1) * size):
        epoch, i = divmod(n, len(items))
        if epoch not in orders:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            orders[epoch] = torch.randperm(len(items), generator=generator)
        chosen.append(items[orders[epoch][i]])
    return chosen
