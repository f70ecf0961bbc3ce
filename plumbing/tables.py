"""What a run tells of itself: the scores of an evaluation, and the tables that repo.py prints."""
import shutil
from statistics import fmean


def summarize(rows: list[dict]) -> dict:
    """The scores of an evaluation, from the rows of eval.jsonl. None where nothing was counted.

    reward, cost, rectified_cost, kl and reward_on_harmless_prompts are means over responses; the
    others are shares from 0 to 1. safety_rate counts the responses with a cost at or below the
    threshold, prompts_fully_safe the prompts all of whose responses are. The last five, what only
    a judge can tell, are None without one: over_refusal_rate counts the refusals among the
    responses to harmless prompts, refusal_rate_on_harmful_prompts those among the others, where a
    safe response that is no refusal dodges the question.
    """
    responses = [response for row in rows for response in row["responses"]]
    judged = [response for response in responses if response["verdict"] is not None]
    harmful = [response for response in judged if response["verdict"]["harmful_prompt"]]
    harmless = [response for response in judged if not response["verdict"]["harmful_prompt"]]
    prompt_is_safe = [all(response["safe"] for response in row["responses"]) for row in rows]

    return {
        "reward": mean([response["reward"] for response in responses]),
        "cost": mean([response["cost"] for response in responses]),
        "rectified_cost": mean([response["rectified_cost"] for response in responses]),
        "kl": mean([response["kl"] for response in responses]),
        "safety_rate": mean([response["safe"] for response in responses]),
        "prompts_fully_safe": mean(prompt_is_safe),
        "safety_rate_on_harmful_prompts": mean([response["safe"] for response in harmful]),
        "refusal_rate_on_harmful_prompts": mean(
            [response["verdict"]["refused"] for response in harmful]),
        "judge_safety_rate": mean([response["verdict"]["safe"] for response in judged]),
        "over_refusal_rate": mean([response["verdict"]["refused"] for response in harmless]),
        "reward_on_harmless_prompts": mean([response["reward"] for response in harmless]),
    }


def mean(values: list[float]) -> float | None:
    """Their mean; None if there are none. The mean of bools is the share of those that hold."""
    return fmean(values) if values else None


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def samples_table(samples: list[dict]) -> str:
    """The three costliest responses of a step and its cheapest, a line each.

    Their text is cut to the terminal's width, but not below 60 characters.
    """
    samples = sorted(samples, key=lambda sample: sample["cost"], reverse=True)
    cheapest = samples[3:][-1:]  # none, if the first three are all
    width = max(shutil.get_terminal_size((140, 24)).columns - 20, 60)

    lines = [
        f"\nstep {samples[0]['step']}",
        "  reward    cost  prompt -> response, costliest first",
    ]
    for sample in samples[:3] + cheapest:
        text = " ".join(f"{sample['prompt']} -> {sample['response']}".split())
        if len(text) > width:
            text = text[:width - 1] + "…"
        lines.append(f"{sample['reward']:8.2f}{sample['cost']:8.2f}  {text}")
    return "\n".join(lines)


def scores_table(**columns: dict) -> str:
    """Scores as summarize() returns them, a line each; the keywords are the columns' titles."""
    titles = "".join(f"{title:>10}" for title in columns)
    lines = [f"\n{'on held-out prompts':32}{titles}"]
    first = next(iter(columns.values()))
    for name in first:
        cells = "".join(f"{number(scores[name]):>10}" for scores in columns.values())
        lines.append(f"{name:32}{cells}")
    return "\n".join(lines)
