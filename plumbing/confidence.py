"""What the scores of some held-out prompts say about all such prompts: intervals, upper bounds.

Responses to one prompt resemble each other, so that prompts are counted, not responses.
"""
import math
from statistics import NormalDist, fmean, stdev

import torch


def wilson(share: float, count: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval, two-sided, of a share that was found in `count` prompts."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)


def bootstrapped(values: list[float], confidence: float,
                 draws: int = 4000) -> tuple[float, float] | None:
    """The interval, two-sided, of a mean: where it falls when prompts are drawn anew, with
    repetition; one value per prompt. None where all are equal, which shows no uncertainty."""
    if len(set(values)) == 1:
        return None
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[chosen].mean(1)            # [draws]
    edges = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = means.quantile(edges).tolist()
    return low, high


def largest_share(hits: int, count: int, confidence: float) -> float:
    """The largest share that `hits` of `count` prompts do not rule out, exact and one-sided
    (Clopper and Pearson): so few hits or fewer have the probability 1 - confidence there."""
    if hits == count:
        return 1.0

    def probability_of(k: int, share: float) -> float:
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)  # ln
        return math.exp(ways + k * math.log(share) + (count - k) * math.log1p(-share))

    low, high = 0.0, 1.0
    for _ in range(50):  # halved to the last bit, nearly
        middle = (low + high) / 2
        if sum(probability_of(k, middle) for k in range(hits + 1)) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def largest_mean(values: list[float], confidence: float) -> float | None:
    """The upper confidence bound of a mean, one-sided, by Student's t; one value per prompt. None
    for fewer than eleven, and where all are equal: zeros do not show that there is nothing else."""
    if len(values) < 11 or len(set(values)) == 1:
        return None
    return fmean(values) + student(confidence, len(values) - 1) * stdev(values) / len(values)**0.5


def student(confidence: float, degrees: int) -> float:
    """The quantile of Student's t, by its expansion around the normal one: within 0.001 from 10
    degrees of freedom on, at 0.99 and below."""
    z = NormalDist().inv_cdf(confidence)
    return (z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3))
