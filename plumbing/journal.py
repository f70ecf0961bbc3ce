"""What a run says and writes down as it goes: its models, each step, samples, scores, a summary."""
import json
import time
import warnings
from pathlib import Path

import torch

from plumbing.checkpoints import save_checkpoint
from plumbing.checks import bad_batch, collapse, destruction, drift
from plumbing.errors import UserError, say
from plumbing.functions import verdicts_of
from plumbing.models import trainable
from plumbing.plan import peak_memory_mib
from plumbing.ranks import RANK
from plumbing.run_folder import append, to_jsonl, write_whole
from plumbing.tables import (
    bounds_text,
    by_category,
    categories_table,
    samples_table,
    scores_table,
    summarize,
    what_it_says,
)


def introduce(state, config) -> None:
    """Says what will be trained, and what the score models read."""
    trained = 0
    if not config.eval_only:
        trained = sum(parameter.numel() for parameter in trainable(state.policy).values())
    place = f"{config.dtype} on {config.device}"
    if config.device == "cpu":
        place += f", threads: {torch.get_num_threads()}"
    say(f"policy {config.policy}: {state.policy.num_parameters():,} parameters, {trained:,} of "
        f"them trained; {place}")
    for scorer in (state.reward_model, state.cost_model):
        reads = "tokens of the policy" if scorer.same_tokens else "tokens of its own"
        if scorer.function:
            reads = "a function"
        say(f"{scorer.flag} {scorer.source}: {reads}")


def log(state, out: Path, name: str, rows: list[dict]) -> None:
    """Adds to a log, and to the copy of it that a checkpoint holds."""
    text = to_jsonl(rows)
    state.logs[name] += text.splitlines(keepends=True)
    if RANK == 0:
        append(out / name, text)
    if state.curves and name == "metrics.jsonl":
        for row in rows:
            state.curves.log(numbers_of(row), row["step"])


def numbers_of(row: dict) -> dict:
    """What of a row can be a curve. Its step is where the curve has it."""
    return {name: value for name, value in row.items()
            if type(value) in (int, float) and name != "step"}


def warn_once(state, of: str, sign: str | None) -> None:
    if sign and of not in state.warned:
        say(f"warning: step {state.step}: {sign}")
        state.warned.add(of)


def keep_step(state, out: Path, rollout, metrics: dict, judge, config) -> None:
    """A step's line in metrics.jsonl; samples and a checkpoint if it is time for them; warnings,
    each once."""
    sign = collapse(rollout.responses, metrics["entropy"])
    warn_once(state, "collapse", sign and f"{sign}; the policy may have collapsed")
    warn_once(state, "destruction", destruction(metrics))
    log(state, out, "metrics.jsonl", [metrics])
    is_last = state.step == config.steps
    if config.sample_every and (is_last or state.step % config.sample_every == 0):
        samples = [{"step": state.step, **record} for record in rollout.records(config.threshold)]
        say(samples_table(samples))
        log(state, out, "samples.jsonl", samples)
        if judge and "drift" not in state.warned:
            try:
                warn_once(state, "drift", drift(verdicts_of(rollout, judge, config)))
            except UserError:  # a judge may know the held-out prompts alone, and need not tell
                state.warned.add("drift")
    if config.save_every:
        # Counted, because a bad step on a multiple saves none.
        saved = (state.saved_step or 0) // config.save_every
        if state.step // config.save_every > saved:
            save_checkpoint(state, out, config)


def skip_step(state, out: Path, problem: str, rollout, config) -> None:
    """After BadNumbers: the step ends there, lambda stays, the next prompts come, and the batch
    goes into a file."""
    state.step += 1
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        state.schedule.step()  # in the first step torch misses the optimiser's
    log(state, out, "metrics.jsonl", [{"step": state.step, "lambda": state.lam, "bad": problem}])
    name = f"bad-batch-{state.step}.jsonl"
    if RANK == 0:
        write_whole(out / name, to_jsonl(bad_batch(rollout, config.threshold)))
    say(f"step {state.step}: {problem}; this update is left out, prompts, responses and scores are "
        f"in {name}")


def too_many(bad_steps: int, state, out: Path, config) -> UserError:
    """What to say after --max_bad_steps in a row. There is a checkpoint to go on from, then."""
    if state.saved_step:
        last = out / "checkpoints" / f"step-{state.saved_step}"
    else:
        last = save_checkpoint(state, out, config)
    return UserError(f"stopped after {bad_steps} such steps in a row (--max_bad_steps); mend the "
                     f"cause and --resume from {last}; a lower learning rate or a higher "
                     "--kl_coeff needs a new run", code=3)


def report(state, rows: list[dict], out: Path, config) -> None:
    """Writes eval.jsonl and summary.json, and prints the scores."""
    seconds = time.perf_counter() - state.started
    write_whole(out / "eval.jsonl", to_jsonl(rows))
    metrics = [json.loads(line) for line in state.logs["metrics.jsonl"]]
    bad_steps = sum("bad" in step for step in metrics)
    peaks = [value for step in metrics for name, value in step.items()
             if name.startswith("peak_mib")]
    scores, said = summarize(rows), what_it_says(rows, config.confidence)
    summary = {
        "algo": config.algo,
        "rectify": config.rectify,
        "baseline": config.baseline,
        "seed": config.seed,
        "steps": state.step,
        "bad_steps": bad_steps,
        **scores,
        "lambda": state.lam,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
        "wall_seconds": seconds,
        "peak_memory_mib": max([peak_memory_mib(), *peaks]),
        "before": state.before,
        **said,
    }
    categories = by_category(rows)
    if categories:
        summary["by_category"] = categories
    write_whole(out / "summary.json", json.dumps(summary, indent=2))
    if state.curves:
        last = {f"summary/{name}": value for name, value in numbers_of(summary).items()}
        state.curves.log(last, state.step)
        state.curves.close()
    if config.eval_only:
        say(scores_table(said, now=scores))
    else:
        say(scores_table(said, before=state.before, after=scores))
    say("\n" + bounds_text(said, config.threshold))
    if categories:
        say(categories_table(categories))
    left_out = f" ({bad_steps} of them with bad numbers, left out)" if bad_steps else ""
    say(f"\n{state.step} steps of {config.algo}{left_out} in {seconds:.0f} s; "
        f"everything is in {out}")
