# pytest tests/test_confidence.py
"""Intervals and upper bounds: published and hand-computed values, coverage counted exactly."""
import math

import pytest
from test_compare import evaluation
from test_run import FEW, summary_of

from plumbing.reports import bootstrapped, largest_mean, largest_share, wilson
from plumbing.reports import bounds_text, scores_table, summarize, what_it_says
from repo import resolve_config


@pytest.mark.parametrize("share, count, low, high", [
    # By hand: z^2 = 3.84146; (0.8 + 0.19207 +- 1.95996 sqrt(0.016 + 0.0096036)) / 1.384146
    (0.8, 10, 0.49016, 0.94332),
    (0.0, 80, 0.0, 0.04582),
    (1.0, 80, 0.95418, 1.0),
])
def test_wilsons_interval(share, count, low, high):
    assert wilson(share, count, 0.95) == pytest.approx((low, high), abs=1e-5)


def test_none_of_eighty_is_at_most_3_7_percent():
    assert largest_share(0, 80, 0.95) == pytest.approx(1 - 0.05 ** (1 / 80), abs=1e-9)
    assert largest_share(5, 10, 0.95) == pytest.approx(0.777559, abs=1e-6)  # as tables have it
    assert largest_share(10, 10, 0.95) == 1.0
    half = largest_share(600, 1200, 0.95)  # the normal one: 0.5 + 1.645 sqrt(0.25 / 1200)
    assert half == pytest.approx(0.5237, abs=1e-3)


@pytest.mark.parametrize("share", [0.01, 0.037, 0.2, 0.5, 0.93])
def test_the_bound_of_a_share_holds_as_often_as_it_says(share):
    """All outcomes of 20 prompts, each with its probability."""
    holds = 0.0
    for hits in range(21):
        probability = math.comb(20, hits) * share**hits * (1 - share) ** (20 - hits)
        holds += probability * (largest_share(hits, 20, 0.9) >= share)
    assert holds >= 0.9


def test_a_bootstrapped_mean_is_as_uncertain_as_the_normal_one():
    values = [0.0, 1.0] * 200  # standard error 0.025
    low, high = bootstrapped(values, 0.95)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.005)
    assert largest_mean(values, 0.95) == pytest.approx(0.5 + 1.645 * 0.025, abs=0.005)
    assert bootstrapped([2.0, 2.0], 0.95) is None and largest_mean([2.0, 2.0], 0.95) is None


def test_safe_on_eighty_prompts_is_no_proof_and_is_not_told_as_one():
    rows = evaluation([[-1.0, -3.0]] * 40 + [[-2.0, -1.0]] * 40, [[1.0, 2.0]] * 80)
    said = what_it_says(rows, 0.95)
    text = bounds_text(said, 0.0)
    assert "0 of 80 prompts had an unsafe response, at most 3.7 % of all such prompts do" in text
    assert "(95 % confidence, one-sided)" in text
    assert "the mean cost is at most -1.7" in text and ": within the limit 0" in text
    assert "rectified" not in text and said["rectified_cost_at_most"] is None
    assert said["intervals"]["rectified_cost"] is None
    table = scores_table(said, before=summarize(rows), after=summarize(rows))
    (line,) = [line for line in table.splitlines() if line.startswith("prompts_fully_safe")]
    assert line.split() == ["prompts_fully_safe", "1.000", "1.000", "0.954", "to", "1.000"]


def test_compensation_passes_the_test_of_the_mean_and_not_of_the_rectified_one():
    """Of 20 prompts 5 cost 2 and 15 cost -6. When they are drawn anew, Bin(20, 1/4) of them cost 2,
    and at most 8 with 95 %: the mean is (8 * 2 - 12 * 6) / 20, the rectified mean 8 * 2 / 20."""
    rows = evaluation([[2.0]] * 5 + [[-6.0]] * 15, [[1.0]] * 20)
    text = bounds_text(what_it_says(rows, 0.95), 0.0)
    assert "the mean cost is at most -2.800: within the limit 0" in text
    assert "the mean rectified cost is at most 0.800: above the limit 0" in text


def test_a_run_says_it(run):
    code, out, printed = run(*FEW, "--steps", 1, "--confidence", 0.9)
    assert code == 0
    summary = summary_of(out)
    assert summary["confidence"] == 0.9 and summary["prompts"] == 8
    assert summary["intervals"]["reward"] and summary["intervals"]["prompts_fully_safe"]
    for name, edges in summary["intervals"].items():
        if edges:
            assert edges[0] - 1e-9 <= summary[name] <= edges[1] + 1e-9, name
    assert "90 % interval" in printed and "(90 % confidence, one-sided)" in printed


def test_a_threshold_may_be_below_zero_and_a_confidence_may_not_be_one(run):
    assert resolve_config(["--threshold", "-3"]).threshold == -3.0
    code, _, printed = run(*FEW, "--confidence", 1)
    assert code == 2 and "--confidence 1.0: must be above 0.5, and at most 0.9999" in printed
