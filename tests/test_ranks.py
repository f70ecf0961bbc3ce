# pytest tests/test_ranks.py
"""Several ranks under torchrun learn what one process learns, go on from each other's checkpoints, and end together."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
else:
    import pytest
    from conftest import ROOT, read_jsonl
    from test_run import stable

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import repo

VARIANTS = {  # batches of 5 do not divide by 2 ranks, of 1 leave a rank without rows
    "repo": {}, "ppo_lag": {"algo": "ppo_lag"}, "mask, passes": {"rectify": "mask", "update_iters": 2, "minibatch_size": 3}, "one prompt": {"batch_size": 1},
    "ptx": {"ptx_coeff": 0.5}, "lora": {"lora_rank": 4}, "lora, ptx, checkpointing": {"lora_rank": 4, "ptx_coeff": 0.5, "gradient_checkpointing": True},
    "checkpointing": {"gradient_checkpointing": True}, "functions": {"reward_model": f"{__file__}:brevity"}, "bfloat16": {"dtype": "bfloat16"}}


def brevity(prompts, responses):
    return [-len(response) / 10 for response in responses]


def learn_each_variant(file: str, family: dict) -> None:
    """What every process does: two steps of each variant; rank 0 writes rollouts, metrics, gathered weights."""
    results = {}
    for name, changes in VARIANTS.items():
        settings = {**family, "device": "cpu", "dtype": "float32", "steps": 2, "batch_size": 5, "micro_batch_size": 2, "max_response_length": 12,
                    "actor_lr": 1e-3, "critic_lr": 1e-3, "judge": None, **changes}
        config = repo.Config(**settings)
        torch.manual_seed(0)
        policy, tokenizer = repo.load_policy(config)
        prompts = repo.load_prompts(config.dataset)[:20]
        pairs = repo.load_ptx_pairs(config, tokenizer)[:30] if config.ptx_coeff else []
        state = repo.State(policy, tokenizer, config)
        rollouts, metrics = zip(*(repo.train_step(state, prompts, pairs, config) for _ in range(2)))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights = {key: value for model in repo.State.TRAINED for key, value in get_model_state_dict(getattr(state, model), options=options).items()}
        results[name] = [rollout.responses for rollout in rollouts], metrics, weights, state.lam
    if repo.RANK == 0:
        torch.save(results, file)


if __name__ == "__main__":
    if repo.RANKS > 1:
        distributed.init_process_group("gloo")
    learn_each_variant(sys.argv[1], json.loads(sys.argv[2]))
    sys.exit()


def start(ranks: int, *command, **options) -> subprocess.Popen:
    program = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen([*program, *map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


def finished(process: subprocess.Popen, code: int | None = 0) -> str:
    printed, _ = process.communicate(timeout=120)
    assert code is None or process.returncode == code, printed
    return printed


@pytest.fixture(scope="module")
def learned(tmp_path_factory, family):
    """{number of ranks: what learn_each_variant wrote}."""
    folder = tmp_path_factory.mktemp("learned")
    for process in [start(ranks, __file__, folder / str(ranks), json.dumps(family)) for ranks in (1, 2)]:
        finished(process)
    return {ranks: torch.load(folder / str(ranks), weights_only=True) for ranks in (1, 2)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_learn_what_one_learns(learned, variant):
    (responses, metrics, weights, lam), (same_responses, same_metrics, same_weights, same_lam) = (learned[ranks][variant] for ranks in (1, 2))
    tolerance = 2e-2 if variant == "bfloat16" else 1e-5  # bf16: norms are fp32 in one process, bf16 in FSDP, and the sums round differently
    if variant == "bfloat16":
        responses, same_responses = responses[:1], same_responses[:1]
        metrics, same_metrics = metrics[:1], same_metrics[:1]
    assert responses == same_responses
    for one, two in zip(stable(metrics), stable(same_metrics)):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=tolerance, abs=tolerance), key
    assert weights.keys() == same_weights.keys() and len(weights) > 20
    assert all((weights[key] - same_weights[key]).abs().max() < tolerance for key in weights) and same_lam == pytest.approx(lam, abs=tolerance)
