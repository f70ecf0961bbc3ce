"""What goes wrong on one rank alone, for test_ranks.py: a score function, and a run with a bug.

    torchrun --nproc_per_node 2 tests/one_rank_fails.py [settings of repo.py]
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

calls = []


def score(prompts, responses):
    """Four calls of the evaluation go well, and the first step's; on rank 1 not the second's."""
    calls.append(1)
    assert os.environ["RANK"] == "0" or len(calls) < 6, "no licence"
    return [0.0] * len(responses)


if __name__ == "__main__":
    import repo
    from plumbing.ranks import RANK

    learn = repo.learn
    repo.learn = lambda *arguments: learn(*arguments) if RANK == 0 else 1 / 0
    sys.exit(repo.main())
