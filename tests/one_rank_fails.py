"""What goes wrong on one rank alone, for test_ranks.py: score functions, and a run with a bug.

    torchrun --nproc_per_node 2 tests/one_rank_fails.py [settings of repo.py]

A run calls a score function once in its first evaluation and once in each step.
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

calls = []


def is_call(number: int) -> bool:
    """Whether this is rank 1, which calls for the number-th time."""
    calls.append(1)
    return os.environ["RANK"] == "1" and len(calls) == number


def brevity(prompts, responses):
    """A reward that works."""
    return [-len(response) / 10 for response in responses]


def no_licence(prompts, responses):
    assert not is_call(3), "no licence"
    return [0.0] * len(responses)


def ctrl_c(prompts, responses):
    if is_call(3):
        os.kill(os.getpid(), signal.SIGINT)
    return [0.0] * len(responses)


def bad_number(prompts, responses):
    return [float("nan") if is_call(4) else 0.0] + [0.0] * (len(responses) - 1)


if __name__ == "__main__":
    import repo

    update = repo.update
    repo.update = lambda *arguments: update(*arguments) if os.environ["RANK"] == "0" else 1 / 0
    sys.exit(repo.main())
