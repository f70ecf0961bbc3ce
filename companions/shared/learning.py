"""What the commands that train from files share: settings, the split, training, saving."""
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from companions.shared.command import ModelSettings
from plumbing.adapters import make_trainable, merged, trainable
from plumbing.errors import blame, require, say
from plumbing.fitting import fit
from plumbing.folder import renamed_when_complete
from plumbing.models import load_policy, save_tokenizer
from plumbing.scorers import save_score_model
from plumbing.settings import option
from tiny_configs import world


@dataclass
class LearningSettings(ModelSettings):
    """Settings of learning from a file."""

    model: str = option("tiny", "a causal LM: folder, .gguf file or hub name")
    data: str | None = option(None, "what to learn from: json, jsonl, csv or parquet, or a hub "
                                    "name[:SPLIT]")
    eval_data: str | None = option(None, "held-out rows; default: those of a seeded 10 %% of the "
                                         "prompts")
    out: str | None = option(None, "the new model's folder")
    lora_rank: int = option(0, "train low-rank adapters instead of all weights")
    lr: float = option(2e-5, "the peak learning rate, annealed to zero")
    batch_size: int = option(16, "rows per step")
    steps: int | None = option(None, "default: two passes over the rows")
    max_prompt_tokens: int = option(256, "rows with longer prompts are left out")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of computing; default: bfloat16 on a GPU that has it, else float32")

    TINY = {}  # what --model tiny learns from, and how; its files lie beside the tiny policy

    def check(self) -> None:
        if self.model == "tiny":
            self.learn_in_tiny_world()
        else:
            for name in ("data", "out"):
                require(getattr(self, name) is not None, f"--{name} is missing")
        super().check()
        check_out(self.out)

    def learn_in_tiny_world(self) -> None:
        """Fills in what the command line leaves open."""
        policy = Path(world.build()["policy"])
        self.model = str(policy)
        for name, value in self.TINY.items():
            if getattr(self, name) == getattr(type(self), name):
                is_file = name in ("data", "eval_data")
                setattr(self, name, str(policy.with_name(value)) if is_file else value)


def check_out(out: str | None) -> None:
    """Raises UserError if a new folder cannot have that name: nothing there is overwritten."""
    if out is None:
        return
    place = Path(out)
    is_free = not place.exists() or place.is_dir() and not any(place.iterdir())
    require(place.name and is_free, f"--out {out}: is there already; name a new folder")


def load_body(settings: LearningSettings):
    """A causal LM that can be trained, its tokenizer, and the settings that load and save it."""
    run = settings.as_run(settings.model, lora_rank=settings.lora_rank, dtype=settings.dtype)
    policy, tokenizer = load_policy(run)
    return make_trainable(policy, run).to(run.device), tokenizer, run


def learn_and_held_out(load, settings: LearningSettings) -> tuple[list, list]:
    """Rows to learn from and held-out rows. load(source, flag) returns (prompts, rows)."""
    prompts, rows = load(settings.data, "--data")
    if settings.eval_data:
        _, held_out = load(settings.eval_data, "--eval_data")
        return rows, held_out
    return split(rows, prompts, settings.seed)


def split(rows: list, prompts: list[str], seed: int) -> tuple[list, list]:
    """(rows to learn from, held-out rows). No prompt is in both."""
    distinct = list(dict.fromkeys(prompts))
    random.Random(seed).shuffle(distinct)
    held_out = set(distinct[:max(len(distinct) // 10, 1)])
    learn = [row for row, prompt in zip(rows, prompts) if prompt not in held_out]
    return learn, [row for row, prompt in zip(rows, prompts) if prompt in held_out]


def teach(model, loss_of, rows: list, settings: LearningSettings, run) -> None:
    """Trains what can be trained, in the compute dtype. loss_of(batch of rows) is a scalar. Raises
    UserError if the training has diverged."""
    size = settings.batch_size
    require(len(rows) >= size, f"--data {settings.data}: {len(rows)} rows to learn from are fewer "
                               f"than --batch_size {size}")

    def loss(batch):
        with run.autocast():
            return loss_of(batch)

    steps = settings.steps or max(2 * len(rows) // size, 1)
    weights = list(trainable(model).values())
    fit(weights, loss, rows, size, steps, settings.lr, random.Random(settings.seed), bar=True)
    require(all(weight.isfinite().all() for weight in weights),
            f"--lr {settings.lr}: the weights are not finite after {steps} steps; lower it")


def save(out: str | None, model, tokenizer, write) -> None:
    """Writes a folder as a whole or not at all. write(folder, merged weights) writes the model."""
    if not out:
        return
    with renamed_when_complete(Path(out)) as folder, blame(f"--out {out}: cannot be written"):
        write(folder, merged(model.state_dict()))
        save_tokenizer(tokenizer, folder)
    say(f"saved in {out}")


def save_scorer(out: str | None, model, tokenizer, run) -> None:
    """The same for a score model, in the compute dtype."""
    save(out, model, tokenizer, lambda folder, weights: save_score_model(
        folder, model, weights, getattr(torch, run.dtype)))
