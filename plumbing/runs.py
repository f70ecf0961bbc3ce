"""A run, from the command line to summary.json: what repo.main does besides the method."""
import json
import logging
import math
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm

from plumbing import metrics
from plumbing.adapters import trainable
from plumbing.checkpoints import find_checkpoint, resume, save_after, save_checkpoint, save_final
from plumbing.reports import open_curves
from plumbing.data import (
    cyclic_batch,
    hash_of_data,
    load_categories,
    load_ptx_pairs,
    split_prompts,
)
from plumbing.errors import UserError, blame, ctrl_c_waits, printable, require, say
from plumbing.folder import (
    append,
    claim_output_dir,
    has_metrics,
    locked_folder,
    to_jsonl,
    write_whole,
)
from plumbing.functions import hashes_of_functions, load_function, verdicts_of
from plumbing.machines import check_machines
from plumbing.models import check_sources, load_policy, load_tokenizer
from plumbing.ranks import LOCAL_RANK, RANK, RANKS, all_reduce, has_lost_a_rank, join_ranks, sharded
from plumbing.reports import (
    bounds_text,
    by_category,
    categories_table,
    samples_table,
    scores_table,
    summarize,
    what_it_says,
)
from plumbing.training import State
from plumbing.trial import problem_of_saved, try_models


def check_still_held_out(training_prompts: list[str], config) -> None:
    """Raises UserError if prompts that the run of --eval_only held out now count as training
    prompts: then it has trained on those that are held out now."""
    before = Path(config.eval_only or "", "eval_before.jsonl")
    if config.eval_dataset or not has_metrics(config.eval_only) or not before.is_file():
        return
    with blame(f"{before}: cannot be read"):
        rows = [json.loads(line) for line in before.read_text().splitlines()]
    held_out = {row["prompt"] for row in rows if "image" not in row}
    moved = held_out.intersection(map(str, training_prompts))
    require(not moved,
            f"--eval_only {config.eval_only}: {len(moved)} prompts that it held out would be "
            "training prompts now, because --seed, --max_prompt_length or the data have changed; "
            "restore them, or give an --eval_dataset")


class Run:
    """A run's settings, data, state and folder. As a context it turns an error into one sentence
    and an exit code, `code`; after an interruption it saves a checkpoint."""

    def __init__(self):
        self.code = 0
        self.bad_steps = 0        # in a row
        self.is_training = False  # and can save a checkpoint
        self.stopped = False      # by Ctrl-C, after a whole step
        self.has_kept = False     # a step, in this session
        self.warned = set()       # what it has warned of
        self.judge = self.curves = None
        self.resources = ExitStack()

    # ---- From the command line to the first step

    def open(self, resolve, argv: list[str]):
        """resolve(argv) gives the settings. The run's folder belongs to this process from here
        on. Raises UserError."""
        join_ranks()
        self.config = resolve(argv)
        self.resources.enter_context(locked_folder(self.config))
        return self.config

    def load(self) -> None:
        """Loads data and models. Raises UserError before a file has changed."""
        config, started = self.config, time.perf_counter()
        torch.manual_seed(config.seed)
        torch.backends.cuda.matmul.allow_tf32 = config.tf32

        check_sources(config)
        tokenizer = load_tokenizer(config)
        self.prompts, self.held_out = split_prompts(config, tokenizer)
        check_still_held_out(self.prompts, config)
        self.ptx_pairs = load_ptx_pairs(config, tokenizer) if config.needs_pairs() else []
        self.categories = load_categories(config)
        if config.judge and RANK == 0:  # verdicts are for files, and only rank 0 writes files
            self.judge = load_function(config.judge, "--judge")
        config.steps = config.steps or math.ceil(len(self.prompts) / config.batch_size)
        data = hash_of_data(self.prompts, self.held_out, self.ptx_pairs)
        check_machines(data, config)
        self.checkpoint = find_checkpoint(config) if config.resume else None

        self.state = State(*load_policy(config), config)
        self.state.started, self.state.data = started, data
        if RANK == 0:  # a judge's file may be on its machine alone
            self.state.functions = hashes_of_functions(config)
        for scorer in (self.state.reward_model, self.state.cost_model):
            scorer.check_prompts(self.prompts + self.held_out)
        if has_metrics(config.eval_only):
            # The policy that the run started from, loaded above, is the reference. The policy that
            # it trained is the one to score.
            trained = replace(config, policy=str(Path(config.eval_only, "final", "actor")))
            self.state.policy = sharded(load_policy(trained)[0], config)
        try_models(self.state, config)
        introduce(self.state, config)

    def start(self, evaluate) -> None:
        """Scores the starting policy and claims the run's folder, or goes on from a checkpoint."""
        state, config = self.state, self.config
        if config.eval_only:
            return
        if self.checkpoint:
            self.out = resume(state, self.checkpoint, config)
        else:
            rows = self.scored(evaluate)
            state.before = summarize(rows)
            self.out = claim_output_dir(config)
            if RANK == 0:
                write_whole(self.out / "eval_before.jsonl", to_jsonl(rows))
        self.curves = open_curves(state.step, self.out, config)
        self.is_training = True

    # ---- Steps

    def steps(self):
        """(prompts, PTX pairs) of each step that is left. After Ctrl-C it finishes the step, then
        raises KeyboardInterrupt; a second Ctrl-C kills."""
        state, config = self.state, self.config
        if config.eval_only:
            return
        responses = config.batch_size * config.samples_per_prompt
        with (
            ctrl_c_waits() as pressed,
            tqdm(total=config.steps, initial=state.step, unit="step", dynamic_ncols=True,
                 disable=RANK > 0) as self.bar,
        ):
            while True:
                self.stopped = bool(all_reduce(torch.tensor(len(pressed), device=config.device)))
                if self.stopped or state.step >= config.steps:
                    break
                pairs = []
                if self.ptx_pairs:
                    pairs = cyclic_batch(self.ptx_pairs, state.step, responses, config.seed)
                yield (cyclic_batch(self.prompts, state.step, config.batch_size, config.seed),
                       pairs)
                self.bar.update()
        if self.stopped:
            raise KeyboardInterrupt

    @contextmanager
    def one_step(self):
        """A step with numbers that are not finite is left out. Raises UserError after
        --max_bad_steps of them in a row."""
        try:
            yield
        except metrics.BadNumbers as error:
            self.leave_out(*error.args)

    def keep(self, rollout, row: dict) -> None:
        """Writes a step's row, warns of what is wrong, shows samples and saves a checkpoint if it
        is time for them."""
        state, config = self.state, self.config
        self.bad_steps = 0
        sign = metrics.collapse(rollout.responses, row["entropy"])
        if not self.has_kept:
            self.warn_once("ratio", metrics.not_the_sampled_policy(
                state.first_ratio_max, config.dtype))
        self.has_kept = True
        self.warn_once("collapse", sign and f"{sign}; the policy may have collapsed")
        self.warn_once("cut off", metrics.cut_off(rollout, config))
        self.warn_once("destruction", metrics.destruction(row))
        self.log("metrics.jsonl", [row])
        is_last = state.step == config.steps
        if config.sample_every and (is_last or state.step % config.sample_every == 0):
            records = metrics.records(rollout, config.threshold)
            samples = [{"step": state.step, **record} for record in records]
            say(samples_table(samples))
            self.log("samples.jsonl", samples)
            self.warn_of_drift(rollout)
        if config.save_every:
            # Counted, because a bad step on a multiple of --save_every saves none.
            saved = (state.saved_step or 0) // config.save_every
            if state.step // config.save_every > saved:
                save_checkpoint(state, self.out, config)
        self.bar.set_postfix_str(f"reward {row['reward']:.2f}, cost {row['cost']:.2f}, "
                                 f"unsafe {row['unsafe_rate']:.0%}, lambda {row['lambda']:.2f}")

    def leave_out(self, problem: str, rollout) -> None:
        """The next prompts follow, lambda stays, and the batch goes into a file."""
        state, out = self.state, self.out
        state.optimizer.zero_grad()
        state.step += 1
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            state.schedule.step()  # torch warns if the optimiser has not stepped yet
        self.log("metrics.jsonl", [{"step": state.step, "lambda": state.lam, "bad": problem}])
        name = f"bad-batch-{state.step}.jsonl"
        if RANK == 0:
            write_whole(out / name, to_jsonl(metrics.bad_batch(rollout, self.config.threshold)))
        say(f"step {state.step}: {problem}; the rest of this step is skipped; {name} holds its "
            "prompts, responses and scores")
        self.bad_steps += 1
        if self.bad_steps < self.config.max_bad_steps:
            return
        last = out / "checkpoints" / f"step-{state.saved_step}"
        if not state.saved_step:
            last = save_checkpoint(state, out, self.config)
        raise UserError(f"stopped after {self.bad_steps} such steps in a row (--max_bad_steps); "
                        f"mend the cause and --resume from {last}; a lower learning rate or a "
                        "higher --kl_coeff needs a new run", code=3)

    def warn_once(self, of: str, sign: str | None) -> None:
        if sign and of not in self.warned:
            say(f"warning: step {self.state.step}: {sign}")
            self.warned.add(of)

    def warn_of_drift(self, rollout) -> None:
        if not self.judge or "drift" in self.warned:
            return
        try:
            verdicts = verdicts_of(rollout.prompts, rollout.responses, self.judge, self.config)
            self.warn_once("drift", metrics.drift(verdicts))
        except UserError:  # a judge may know the held-out prompts alone
            self.warned.add("drift")

    def log(self, name: str, rows: list[dict]) -> None:
        """Adds rows to a log, and to the copy of it that a checkpoint holds."""
        text = to_jsonl(rows)
        self.state.logs[name] += text.splitlines(keepends=True)
        if RANK == 0:
            append(self.out / name, text)
        if self.curves and name == "metrics.jsonl":
            for row in rows:
                self.curves.log(numbers_of(row), row["step"])

    # ---- The end

    def finish(self, evaluate) -> None:
        """Saves final/, scores the trained policy, writes eval.jsonl and summary.json."""
        state, config, problem = self.state, self.config, None
        if self.is_training:
            if RANKS > 1:  # one rank alone may fail from here on, and then none can save
                save_checkpoint(state, self.out, config)
            save_final(state, self.out, config)
            problem = problem_of_saved(state, self.out / "final" / "actor", config)
        rows = self.scored(evaluate)
        self.is_training = False
        if config.eval_only:
            self.out = claim_output_dir(config)
        if RANK == 0:
            self.report(rows)
        require(not problem, problem)

    def scored(self, evaluate) -> list[dict]:
        """The rows of eval.jsonl, one per held-out prompt. Raises UserError for bad numbers."""
        config = self.config
        try:
            records = evaluate(self.state, self.held_out, config)
        except metrics.BadNumbers as error:
            raise UserError(error.args[0]) from None
        prompts = [prompt for prompt in self.held_out for _ in range(config.eval_samples)]
        verdicts = verdicts_of(prompts, [record["response"] for record in records], self.judge,
                               config)
        records = [record | {"verdict": verdict}
                   for record, verdict in zip(records, verdicts)]
        rows = []
        for i, prompt in enumerate(self.held_out):
            responses = records[i * config.eval_samples:(i + 1) * config.eval_samples]
            row = {"prompt": prompt, "responses": responses}
            if "image" in responses[0]:
                row["image"] = responses[0]["image"]
            if prompt in self.categories:
                row["category"] = self.categories[prompt]
            rows.append(row)
        return rows

    def report(self, rows: list[dict]) -> None:
        """Writes eval.jsonl and summary.json, and prints the scores."""
        state, config, out = self.state, self.config, self.out
        seconds = time.perf_counter() - state.started
        write_whole(out / "eval.jsonl", to_jsonl(rows))
        steps = [json.loads(line) for line in state.logs["metrics.jsonl"]]
        bad_steps = sum("bad" in step for step in steps)
        peaks = [value for step in steps for name, value in step.items()
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
            "peak_memory_mib": max([metrics.peak_memory_mib(), *peaks]),
            "before": state.before,
            **said,
        }
        categories = by_category(rows)
        if categories:
            summary["by_category"] = categories
        write_whole(out / "summary.json", json.dumps(summary, indent=2))
        if self.curves:
            last = {f"summary/{name}": value for name, value in numbers_of(summary).items()}
            self.curves.log(last, state.step)
            self.curves.close()

        columns = {"before": state.before, "after": scores}
        say(scores_table(said, **({"now": scores} if config.eval_only else columns)))
        say("\n" + bounds_text(said, config.threshold))
        if categories:
            say(categories_table(categories))
        left_out = f" ({bad_steps} of them with bad numbers, left out)" if bad_steps else ""
        say(f"\n{state.step} steps of {config.algo}{left_out} in {seconds:.0f} s; "
            f"everything is in {out}")

    # ---- Errors

    def __enter__(self):
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        logging.disable(logging.ERROR)  # a UserError says what libraries would log
        warnings.filterwarnings("ignore", module="torch.distributed")
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        with self.resources:
            if self.is_training and isinstance(error, KeyboardInterrupt | UserError | OSError):
                try:
                    save_after(error, self.stopped, self.state, self.out, self.config)
                except (Exception, KeyboardInterrupt) as other:
                    error = other
        if error is None:
            return False
        self.code, sentence = outcome(error)
        if isinstance(error, UserError | OSError) and LOCAL_RANK > 0:
            time.sleep(5)  # rank 0 of this machine says it first, and torchrun ends the others
        if sentence:
            print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
        if self.code is None:
            raise error
        return True


def outcome(error: BaseException) -> tuple[int | None, str]:
    """(exit code, what to say) after an error; no code for a mistake of our own."""
    if isinstance(error, UserError | OSError):  # the second: a path that cannot be read
        return getattr(error, "code", 2), str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, torch.OutOfMemoryError):
        what = str(error).partition(".")[0]
        return 1, (f"{what}; use a smaller --micro_batch_size, --dry_run plans it; "
                   "--resume continues from the newest checkpoint")
    if isinstance(error, RuntimeError) and has_lost_a_rank(error):
        return 1, (f"rank {RANK} has lost another rank; see what that rank printed, or its exit "
                   "code below; if it says nothing, its machine or the network does not answer")
    return None, ""


def introduce(state, config) -> None:
    """Says what is trained, and what the score models read."""
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


def numbers_of(row: dict) -> dict:
    """What of a row can be a curve, without its step."""
    return {name: value for name, value in row.items()
            if type(value) in (int, float) and name != "step"}
