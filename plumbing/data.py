"""From the files and hub data sets that users bring to prompts, supervised pairs and token ids."""
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime

import torch
from torch import Tensor

from plumbing.chats import MARKS, messages_of, require_turns, to_pair, without_picture
from plumbing.errors import blame, require, say
from plumbing.files import Rows, read_rows
from plumbing.pictures import Pictured, with_picture

# ---- Rows of many formats -> (prompt, answer)


def read_better_response(row: dict) -> tuple[str, str | None]:
    """PKU-SafeRLHF. The more helpful response is the answer."""
    if row["better_response_id"] is None:
        return to_pair(filled(row["prompt"]))
    return to_pair(filled(row["prompt"]), row[f"response_{float(row['better_response_id']):g}"])


def read_instruction(row: dict) -> tuple[str, str | None]:
    """Alpaca and Dolly. An input or context, if there is one, follows the instruction on a new
    line."""
    parts = [row["instruction"], row.get("input") or row.get("context")]
    return to_pair("\n".join(filter(None, parts)), row.get("output") or row.get("response"))


def read_preference(row: dict) -> tuple[str, str | None]:
    """HH-RLHF. Without a prompt apart, it is what comes before the answer in `chosen`."""
    if row.get("prompt") or not row["chosen"]:
        return to_pair(row.get("prompt") or "")
    require_turns(row["chosen"])
    return to_pair(row["chosen"])


def read_behavior(row: dict) -> tuple[str, str | None]:
    """HarmBench. A context, if there is one, comes before the behavior."""
    parts = [row.get("ContextString"), row["Behavior"]]
    return to_pair("\n\n---\n\n".join(filter(None, parts)))


def read_message(row: dict):
    """OASST."""
    raise ValueError("it is one message of a conversation; bring each conversation as one row, "
                     "with a list of messages")


def columns_reader(prompt: str, answer: str | None = None):
    """A reader of two columns, or of one."""
    return lambda row: to_pair(filled(row[prompt]), row[answer] if answer else None)


def read_conversation(row: dict) -> tuple[str, str | None]:
    """A column of messages; in csv files a cell is JSON."""
    messages = filled(row["messages"])
    return to_pair(json.loads(messages) if isinstance(messages, str) and messages else messages)


def filled(cell):
    """An empty cell is an empty prompt."""
    return "" if cell is None else cell


FORMATS = {  # columns -> reader of a row; the first format whose columns are all present is used
    ("prompt", "response_0", "response_1", "better_response_id"): read_better_response,
    ("prompt", "response"): columns_reader("prompt", "response"),
    ("prompt", "completion"): columns_reader("prompt", "completion"),
    ("instruction", "output"): read_instruction,
    ("instruction", "response"): read_instruction,
    ("chosen", "rejected"): read_preference,
    ("prompt",): columns_reader("prompt"),
    ("messages",): read_conversation,
    ("instruction",): read_instruction,  # safety-tuned-llamas, whose lists become rows
    ("goal", "target"): columns_reader("goal"),  # AdvBench
    ("Goal",): columns_reader("Goal"),  # JailbreakBench, whose Behavior is a title
    ("Behavior",): read_behavior,
    ("forbidden_prompt",): columns_reader("forbidden_prompt"),  # StrongREJECT
    ("question", "types_of_harm"): columns_reader("question"),  # do-not-answer
    ("question", "image", "response"): columns_reader("question", "response"),  # BeaverTails-V
    ("question", "image"): columns_reader("question"),
    ("role", "text"): read_message,
    ("text",): columns_reader("text"),
}
UNREAD = ("system", "system_prompt", "history", "tools")
# Columns of a prompt's category; the first one present is used. "type" is XSTest's.
CATEGORIES = ("category", "Category", "SemanticCategory", "types_of_harm", "tags", "type")
# Labels of safety, as files of many formats write them.
TRUTHS = {"true": True, "yes": True, "1": True, "1.0": True,
          "false": False, "no": False, "0": False, "0.0": False}


def reader_of(rows: Rows, prompt_column: str | None, source: str):
    """A function that makes (prompt, answer) of a row, the prompt with its picture if there is a
    column of pictures. None if no format fits. Raises UserError if only some rows have a
    picture."""
    names = set(rows.columns)
    known = {columns: reader for columns, reader in FORMATS.items() if set(columns) <= names}
    if prompt_column:
        known = {(prompt_column,): columns_reader(prompt_column)} if prompt_column in names else {}
    else:
        check_columns(rows, source)
    if not known or not has_pictures(rows, source):
        return next(iter(known.values()), None)

    read, folder = next(iter(known.values())), rows.folder

    def read_both(row: dict) -> tuple[str, str | None]:
        if "messages" in row:
            row = {**row, "messages": list(map(without_picture, row["messages"]))}
        prompt, answer = read(row)
        return with_picture(prompt, row["image"], folder), answer

    return read_both


def check_columns(rows: Rows, source: str) -> None:
    """Raises UserError for columns that belong to a prompt and are in no format."""
    unread = [name for name in UNREAD if any(row.get(name) for row in rows)]
    require(not unread,
            f"{source}: has a column {', '.join(unread)}, which is not read; put it into a list of "
            "messages, or take it out (--prompt_column reads one column alone)")


def has_pictures(rows: Rows, source: str) -> bool:
    """Whether rows have pictures. Raises UserError if only some rows have one."""
    require("images" not in rows.columns,
            f"{source}: has a column images; a prompt has one picture, in a column image")
    if "image" not in rows.columns:
        return False
    missing = sum(row["image"] is None for row in rows)
    require(missing in (0, len(rows)),
            f"{source}: {missing} of its {len(rows)} rows have no image; rows with a picture and "
            "rows without one must be in files of their own")
    return not missing


def load_pairs(source: str, prompt_column: str | None = None, flag: str = "--dataset",
               tokenizer=None, safe_only: bool = False) -> list[tuple[str, str | None]]:
    """(prompt, answer or None) of every row that has a prompt. With safe_only an answer that is
    labelled unsafe counts as missing.

    Raises UserError for a missing column, an unknown format, no prompt, or turns that the
    tokenizer's template does not write.
    """
    rows = read_rows(source, flag)
    read = reader_of(rows, prompt_column, f"{flag} {source}")
    require(read, f"{flag} {source}: has the columns {', '.join(rows.columns)}, "
                  f"but not {prompt_column or 'those of any known format'}; "
                  "--prompt_column names the one that holds the prompt")
    pairs, places = [], []
    for number, row in enumerate(rows):
        place = f"{flag} {source}: row {number}"
        try:
            prompt, answer = read(row)
            if prompt.strip():
                answer = None if safe_only and is_labelled_unsafe(row) else answer
                f"{prompt}{text_or_none(answer)}".encode()  # raises ValueError for half a character
                pairs.append((prompt, answer))
                places.append(place)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            require(False, f"{place} does not hold what its columns promise ({', '.join(row)})"
                           + f": {error}" * isinstance(error, ValueError))

    require(pairs, f"{flag} {source}: none of its {len(rows)} rows has a prompt")
    marked = [prompt for prompt, _ in pairs if MARKS.match(prompt)]
    if marked:
        say(f"warning: {flag} {source}: {len(marked):,} prompts begin with a mark of a turn, "
            f"which is read as the user's words: {marked[0][:30]!r}")
    if tokenizer:
        check_turns(zip(places, (prompt for prompt, _ in pairs)), tokenizer)
    say(f"{flag} {source}: {len(rows):,} rows read{rows.part}, "
        f"{len(rows) - len(pairs):,} without a prompt dropped")
    return pairs


def is_labelled_unsafe(row: dict) -> bool:
    """Whether a row's answer is: BeaverTails, PKU-SafeRLHF. Raises ValueError for a label that is
    neither true nor false."""
    better = row.get("better_response_id")
    label = row.get("is_safe" if better is None else f"is_response_{float(better):g}_safe")
    return label is not None and not truth_of(label)


def truth_of(label) -> bool:
    """A label as a bool. Raises ValueError for one that is neither true nor false."""
    word = str(label.item() if hasattr(label, "item") else label).strip().lower()
    if word not in TRUTHS:
        raise ValueError(f"the label {label!r} is neither true nor false")
    return TRUTHS[word]


def text_or_none(answer) -> str | None:
    if not isinstance(answer, str | None):
        raise TypeError(f"{answer!r} is no text")
    return answer


# ---- Prompts -> what a model reads

CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"  # the answer, then EOS


def render(messages: list[dict], tokenizer, has_picture: bool = False,
           add_generation_prompt: bool = True) -> str:
    """Messages in the tokenizer's chat template if it has one, else in the template of the Beaver
    family. Raises whatever the template raises."""
    if getattr(tokenizer, "sight", None):
        messages = for_eyes(messages, has_picture, tokenizer)
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            messages, chat_template=dated_template(tokenizer), tokenize=False,
            add_generation_prompt=add_generation_prompt)
    before, after = BEAVER_TEMPLATE.split("{prompt}")
    joints = {
        "user": after,
        "assistant": f"{tokenizer.eos_token or ''}USER: ",
        "system": "\n\n",
    }
    text = before + "".join(message["content"] + joints[message["role"]] for message in messages)
    if add_generation_prompt:
        return text.removesuffix(after) + after
    return text.removesuffix("USER: ")  # the last turn is an answer


def dated_template(tokenizer) -> str:
    """The chat template with the tokenizer's `date` in the clock's place, so that midnight changes
    nothing. Raises ValueError if it asks the clock in an unknown way."""
    template, day = tokenizer.get_chat_template(), getattr(tokenizer, "date", None)
    if day is None:
        return template
    day = datetime.fromisoformat(day)
    template = CLOCK.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if "strftime_now(" in template:
        raise ValueError("it writes a date in a form that cannot be kept for the whole run")
    return template


def render_prompt(prompt: str, tokenizer) -> str:
    """A prompt as a model reads it before it answers. Raises UserError if the template refuses the
    prompt."""
    with blame(f"the prompt {prompt[:60]!r}: refused by the chat template"):
        return render(messages_of(prompt), tokenizer, isinstance(prompt, Pictured))


def conversation_texts(tokenizer, prompts: list[str], answers: list[str | None],
                       finished: list[bool]) -> list[str]:
    """Prompts with their answers as a score model reads them: both rendered together by the
    tokenizer's template. Where an answer was cut off, the text ends with it, without what the
    template writes after an answer. Raises UserError if the template refuses a prompt."""
    texts, end = [], closing(tokenizer)
    for prompt, answer, ended in zip(prompts, answers, finished):
        messages = [*messages_of(prompt), {"role": "assistant", "content": answer or ""}]
        with blame(f"the prompt {prompt[:60]!r}: refused by the chat template, with an answer"):
            text = render(messages, tokenizer, isinstance(prompt, Pictured), False)
        texts.append(text if ended else text.removesuffix(end))
    return texts


def closing(tokenizer) -> str:
    """What the template writes after an answer: an end of turn, perhaps a line break."""
    trial = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    with blame(f"the tokenizer of {tokenizer.name_or_path}: its chat template fails"):
        _, answer, end = render(trial, tokenizer, add_generation_prompt=False).rpartition("Yes")
    require(answer, f"the tokenizer of {tokenizer.name_or_path}: its chat template leaves the "
                    "assistant's turns out")
    return end


def check_turns(placed: Iterable[tuple[str, str]], tokenizer) -> None:
    """Raises UserError for the first of (place, prompt) with turns that the template refuses or
    leaves out. It tries each sequence of roles once, with other words."""
    tried = set()
    for place, prompt in placed:
        roles = tuple(message["role"] for message in messages_of(prompt))
        if roles in tried:
            continue
        tried.add(roles)
        words = {f"turn {i}.": role for i, role in enumerate(roles)}
        with blame(f"{place}: the chat template refuses its turns ({', '.join(roles)})"):
            text = render([{"role": role, "content": word} for word, role in words.items()],
                          tokenizer)
        lost = [role for word, role in words.items() if word not in text]
        require(not lost, f"{place}: has a turn of role {', '.join(lost)}, which the chat template "
                          "leaves out")


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


def encode(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of rendered texts. They start with the BOS of tokenizer or template; the tokenizer
    adds no EOS."""
    sight = getattr(tokenizer, "sight", None)
    if sight:  # as many place-holders as the model makes states of a picture
        texts = [text.replace(sight.place_holder, sight.place_holder * sight.count)
                 for text in texts]
    adds_special = not tokenizer.chat_template
    rows = tokenizer(texts, add_special_tokens=adds_special).input_ids
    if adds_special and tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        return [row[:-1] for row in rows]
    return rows


def encode_prompts(prompts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of prompts, as a model reads them before it answers."""
    return encode([render_prompt(prompt, tokenizer) for prompt in prompts], tokenizer)


def conversation_ids(tokenizer, prompts: list[str], answers: list[str | None],
                     finished: list[bool]) -> list[list[int]]:
    """conversation_texts as token ids."""
    return encode(conversation_texts(tokenizer, prompts, answers, finished), tokenizer)


def closing_ids(tokenizer) -> list[int]:
    """The tokens that the template writes after an answer."""
    cut_off, whole = conversation_ids(tokenizer, ["Hi"] * 2, ["Yes"] * 2, [False, True])
    return whole[len(cut_off):]


def end_of_turn(tokenizer) -> int:
    """The token that ends an answer: of those that the template writes after one the first that is
    no part of a text, or EOS if there is none."""
    tokens = [token for token in closing_ids(tokenizer) if token in tokenizer.added_tokens_decoder]
    return tokens[0] if tokens else tokenizer.eos_token_id


def encode_pairs(pairs: list[tuple[str, str | None]], tokenizer) -> list[tuple[list, list]]:
    """(prompt ids, answer ids with the end of the turn) of supervised pairs. A missing answer
    counts as empty.

    The prompt's ids are those that sampling sees. The answer's ids are those that follow in the
    whole conversation. If it begins with other ids, because a token reaches across the border or
    the template writes an answered prompt in another way, the answer is tokenised anew behind the
    prompt's ids.
    """
    if not pairs:
        return []
    prompts, answers = zip(*pairs)
    prompt_ids, end, encoded = encode_prompts(prompts, tokenizer), end_of_turn(tokenizer), []
    ends = closing_ids(tokenizer).count(end)  # if 0, the end comes right after the answer
    texts = conversation_texts(tokenizer, prompts, answers, [ends > 0] * len(pairs))
    for (prompt, said), ids, text, whole in zip(pairs, prompt_ids, texts, encode(texts, tokenizer)):
        answer = whole[len(ids):]
        if whole[:len(ids)] != ids:
            before = render_prompt(prompt, tokenizer)
            after = (said or "") + closing(tokenizer) * (ends > 0)
            if text.startswith(before):
                after = text.removeprefix(before)
            answer = ids_after(ids, after, tokenizer)
        for _ in range(min(ends, answer.count(end))):  # what follows the first is never sampled
            answer = answer[:len(answer) - answer[::-1].index(end) - 1]
        encoded.append((ids, [*answer, end]))
    return encoded


def ids_after(ids: list[int], text: str, tokenizer) -> list[int]:
    """Token ids of a text that follow some ids. Behind a line break, because some tokenizers put a
    space before a text that stands alone; alone if the break would merge with the text."""
    for before in ("\n", ""):
        left_out = len(tokenizer(before, add_special_tokens=False).input_ids)
        found = tokenizer(before + text, add_special_tokens=False).input_ids[left_out:]
        if tokenizer.decode(ids + found) == tokenizer.decode(ids) + text:
            break
    return found


def decode_responses(responses: list[list[int]], stop_token_ids: set[int], tokenizer) -> list[str]:
    """Responses as text, without special tokens and without the token that ended them."""
    return tokenizer.batch_decode(
        [ids[:-1] if ids and ids[-1] in stop_token_ids else ids for ids in responses],
        skip_special_tokens=True)


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
    pairs = load_pairs(source, prompt_column, flag, tokenizer)
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
    """The prompts without special tokens of the tokenizer and without tokens, other than words,
    that its template writes in a conversation: they could end the turn and start another. Raises
    UserError if no prompt is left."""
    [written] = conversation_ids(tokenizer, ["Hi"], ["Yes"], [True])
    special = [token.content for number, token in tokenizer.added_tokens_decoder.items()
               if token.content.strip()
               and (token.special or number in written and not token.content.isalnum())]
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
    if len(held_out) > config.max_eval_prompts:
        held_out = drawn(held_out, config.max_eval_prompts)
        say(f"evaluations use {len(held_out):,} of them, drawn at random (--max_eval_prompts)")
    return train, held_out


def drawn(prompts: list[str], count: int) -> list[str]:
    """At most `count` of the prompts, in their order, the same in every run. They are drawn at
    random because files are often sorted."""
    chosen = random.Random(0).sample(range(len(prompts)), min(count, len(prompts)))
    return [prompts[i] for i in sorted(chosen)]


def load_categories(config) -> dict[str, str]:
    """{held-out prompt: its category}, if the data set has a column of them."""
    flag = "--eval_dataset" if config.eval_dataset else "--dataset"
    rows = read_rows(config.eval_dataset or config.dataset, flag)
    column = next((name for name in CATEGORIES if name in rows.columns), None)
    read = reader_of(rows, config.prompt_column, config.eval_dataset or config.dataset)
    categories = {}
    for row in rows if column else []:
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
    """Supervised (prompt ids, answer ids with the end of the turn, prompt) that fit --max_length.
    Raises UserError."""
    texts = load_pairs(config.ptx_dataset, flag="--ptx_dataset", tokenizer=tokenizer,
                       safe_only=True)
    require_sight(texts[0], tokenizer, f"--ptx_dataset {config.ptx_dataset}")
    pairs = encode_pairs(texts, tokenizer)
    kept = [(ids, answer, prompt) for (ids, answer), (prompt, said) in zip(pairs, texts)
            if said and len(ids) + len(answer) <= config.max_length]
    require(kept, f"--ptx_dataset {config.ptx_dataset}: no row has both a prompt and an answer "
                  f"within --max_length {config.max_length}")
    say(f"--ptx_dataset {config.ptx_dataset}: {len(kept):,} pairs; {len(pairs) - len(kept):,} "
        "without a safe answer or too long (--max_length) dropped")
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
