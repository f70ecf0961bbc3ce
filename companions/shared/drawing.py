"""Pictures of a comparison, where matplotlib is installed."""
import io
import itertools
from statistics import fmean

from companions.shared.runs import CURVES, Run, curves, sorted_costs
from plumbing.errors import say

# Light to dark, thick to thin: equal lines stay visible, and a picture can be read in grey too.
STYLES = [
    {"color": "#e0a0d0", "ls": "-", "lw": 5},
    {"color": "#00916f", "ls": (0, (4, 2)), "lw": 3.5},
    {"color": "#b23c00", "ls": (0, (1, 1)), "lw": 2.5},
    {"color": "#14306b", "ls": (0, (7, 2, 1, 2)), "lw": 1.5},
    {"color": "#000000", "ls": (0, (3, 3)), "lw": 1},
    {"color": "#8a8a8a", "ls": "-", "lw": 1},
]


def drawn(groups: dict[str, list[Run]]) -> dict[str, bytes]:
    """{file name: png} of grouped runs. Without matplotlib it prints a sentence and draws none."""
    try:
        from matplotlib.figure import Figure  # optional
    except ImportError:
        say("no pictures: matplotlib is not installed (pip install matplotlib)")
        return {}
    pictures = {}
    for name, draw in (("compensation.png", draw_compensation), ("curves.png", draw_curves)):
        figure, file = Figure(layout="constrained"), io.BytesIO()
        draw(figure, groups)
        figure.savefig(file, format="png", dpi=150)
        pictures[name] = file.getvalue()
    return pictures


def draw_curves(figure, groups: dict[str, list[Run]]) -> None:
    """Training: the mean over seeds. The band goes from the lowest to the highest seed."""
    figure.set_size_inches(17, 3.4)
    axes = figure.subplots(1, len(CURVES))
    for (metric, title), axis in zip(CURVES.items(), axes):
        for (name, runs), style in zip(groups.items(), itertools.cycle(STYLES)):
            by_step = curves(runs, metric)
            steps = range(1, len(by_step) + 1)
            axis.plot(steps, [fmean(values) for values in by_step], label=name, **style)
            axis.fill_between(steps, [*map(min, by_step)], [*map(max, by_step)],
                              color=style["color"], alpha=0.15, lw=0)
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)


def draw_compensation(figure, groups: dict[str, list[Run]]) -> None:
    """Every held-out prompt's mean cost, sorted, in each group's first run: what a mean over
    prompts hides."""
    figure.set_size_inches(9, 5.2)
    axis = figure.subplots()
    first_runs = [runs[0] for runs in groups.values()]
    limits = {run.config["threshold"] for run in first_runs}

    for name, run, style in zip(groups, first_runs, itertools.cycle(STYLES)):
        percents, costs = zip(*sorted_costs(run.prompts))
        mean, threshold = fmean(costs), run.config["threshold"]
        side = "below" if mean <= threshold else "above"
        unsafe = sum(cost > threshold for cost in costs) / len(costs)
        label = (f"{name} (seed {run.config['seed']}): mean cost {mean:.1f}, {side} the limit"
                 f"{f' {threshold:g}' if len(limits) > 1 else ''}; "
                 f"{unsafe:.0%} of the prompts above it")
        axis.plot(percents, costs, label=label, **style)

    top = max(axis.get_ylim()[1], max(limits) + 1)
    bottom = axis.get_ylim()[0]
    for threshold in limits:
        if len(limits) == 1:
            axis.axhspan(threshold, top, color="0.9", zorder=0)
        axis.axhline(threshold, color="0.2", lw=1)
        axis.text(1, threshold + 0.02 * (top - bottom),
                  f"unsafe: cost above the limit d = {threshold:g}", va="bottom")
    axis.set(
        title="Safety compensation: a mean below the limit says nothing about single prompts",
        xlabel="held-out prompts, sorted by cost (percent)", xlim=(0, 100),
        ylabel="cost (mean of a prompt's responses)", ylim=(None, top),
    )
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
