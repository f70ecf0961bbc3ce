"""Shared by all tests: the project on the path, no network, runs that many look at, and small
helpers that write checkpoints by hand.

`pytest` tests every property at least once; all sizes, instants and seeds are for
`pytest -m exhaustive`, which runs these alone.
"""

from __future__ import annotations  # so that names of packages not here may stand in them

import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import dedent

os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on a network; asking for one only takes time
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# One thread for this process and those it starts: the second core trains runs beside it, and
# threads that wait for each other beside them are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton decides at its import whether it compiles or interprets. Without a GPU the kernels' tests
# interpret; runs of repo.py keep plain PyTorch, because the variable is gone when they choose. With
# a GPU everything is compiled, unless the whole session is started with TRITON_INTERPRET=1.
INTERPRETED = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
with pytest.MonkeyPatch.context() as patch:
    if INTERPRETED:
        patch.setenv("TRITON_INTERPRET", "1")
    import kernels  # noqa: F401

# The interpreter cuts fp32 off to bf16 where every GPU rounds, which would hide a kernel that is
# really less accurate.
if INTERPRETED:
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_as_a_gpu_does(data, source, target, rounding_mode):
        if source.name == "fp32" and target.name == "bf16":
            return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_as_a_gpu_does

# A machine with a GPU but without `datasets` can still test the kernels of the four functions.
collect_ignore = []
if importlib.util.find_spec("datasets"):
    import plumbing  # noqa: F401  before transformers' models: see there
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    import repo
    from companions.shared.runs import tiny_run
    from plumbing.data import lay_out
    from tiny_configs import world
else:
    alone = {f"test_{name}.py" for name in
             ("bench", "kernels", "linear", "log_prob", "operators")}
    collect_ignore = [file.name for file in Path(__file__).parent.glob("test_*.py")
                      if file.name not in alone]


# ---- what is run when

MARKERS = (
    "cuda: needs a CUDA GPU, and is skipped only where there is none",
    "exhaustive: more of what another test shows; run with `pytest -m exhaustive` alone",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))

    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if "exhaustive" in item.keywords]
        items[:] = [item for item in items if "exhaustive" not in item.keywords]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=when)


# ---- long runs that many tests look at, made one after the other beside the tests that need none

LONG_RUNS = {  # by the fixture that returns them; sh runs them: "$0" is Python, "$1" a folder
    "by_ranks": """
        "$0" tests/test_ranks.py "$1" > "$1/one-rank.log" 2>&1
        "$0" -m torch.distributed.run --standalone --nproc_per_node 2 \\
            tests/test_ranks.py "$1" > "$1/two-ranks.log" 2>&1
    """,
    "half_runs": """
        "$0" repo.py --device cpu --steps 75 --algo ppo_lag \\
            --output_dir "$1/compared/ppo_lag-device-cpu-steps-75-0" > "$1/lag.log" 2>&1
        touch "$1/lag.done"
        "$0" -m companions.compare --algos ppo_lag repo --seeds 1 --device cpu --steps 75 \\
            --out "$1/compared" --json "$1/compared/table.json" \\
            > "$1/compared.txt" 2> "$1/compared.log"
    """,
    "one_rank_fails": """
        two="-m torch.distributed.run --standalone --nproc_per_node 2"
        few="--device cpu --steps 4 --batch_size 6 --max_eval_prompts 5 --eval_samples 1"
        few="$few --max_response_length 12"
        if "$0" $two repo.py $few --reward_model tests/one_rank_fails.py:no_licence \\
            --output_dir "$1/no-licence" > "$1/no-licence.txt" 2>&1; then exit 1; fi
        if "$0" $two --monitor_interval 2 tests/one_rank_fails.py $few \\
            --output_dir "$1/bug" > "$1/bug.txt" 2>&1; then exit 1; fi
    """,
    "compiled": """
        "$0" -m kernels.bench --compiled --targets sm_90,gfx942 \\
            --json "$1/compiled.json" > "$1/compiled.log" 2>&1
        "$0" tests/jit_path.py 90 > "$1/jit-90.txt" 2> "$1/jit.log"
    """,
    "interpreted": """
        for by in 0 1; do
            TRITON_INTERPRET=$by "$0" repo.py --device cpu --steps 2 --batch_size 4 \\
                --micro_batch_size 4 --max_response_length 8 --eval_samples 1 \\
                --max_eval_prompts 4 --output_dir "$1/by-$by" > "$1/by-$by.log" 2>&1
        done
    """,
    "without_datasets": """
        mkdir "$1/no"
        echo 'import sys; sys.modules["datasets"] = None' > "$1/no/sitecustomize.py"
        PYTHONPATH="$1/no" "$0" -m pytest -q --collect-only tests > "$1/collected.log"
    """,
    "beside_other_kernels": """
        installed="$1/other/kernels-0.18.2.dist-info"
        mkdir -p "$installed"
        printf "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n" > "$installed/METADATA"
        PYTHONPATH="$1/other" "$0" -c "import companions.compare, kernels.bench" \\
            > "$1/imports.log" 2>&1
    """,
}
BOTH_CORES = ("test_faults", "test_ranks")  # they start several processes at a time
LONG_RUN = pytest.StashKey[tuple[subprocess.Popen, Path]]()


def when(item) -> int:
    """A test's place in the order: first what one core is enough for, last what has to wait."""
    if not LONG_RUNS.keys().isdisjoint(item.fixturenames):
        return 2
    return 1 if item.path.stem in BOTH_CORES else 0


def pytest_collection_finish(session):
    needed = {name for item in session.items for name in item.fixturenames}
    script = [f'(set -e{commands}touch "$1/{name}.done")\n'
              for name, commands in LONG_RUNS.items() if name in needed]
    if script and not session.config.option.collectonly:
        folder = Path(tempfile.mkdtemp())
        is_exhaustive = "exhaustive" in session.config.option.markexpr
        all_variants = {"ALL_VARIANTS": "1"} if is_exhaustive else {}
        process = subprocess.Popen(
            ["sh", "-c", "".join(script), sys.executable, folder],
            cwd=ROOT,
            env=os.environ | all_variants,
            start_new_session=True,
        )
        session.config.stash[LONG_RUN] = process, folder


def pytest_unconfigure(config):
    if LONG_RUN in config.stash:
        process, folder = config.stash[LONG_RUN]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def exhaustive(*values, **options):
    """A test's parameters for `pytest -m exhaustive` alone."""
    return pytest.param(*values, marks=pytest.mark.exhaustive, **options)


def grid(*columns, telling: list[tuple]) -> list:
    """All combinations as a test's parameters; those that are not telling are exhaustive."""
    combinations = list(itertools.product(*columns))
    assert set(telling) <= set(combinations)
    return [each if each in telling else exhaustive(*each) for each in combinations]


# ---- what is shared


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch) -> str:
    """Where Triton's kernels are tried: on the GPU, or in the interpreter on the CPU."""
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


@pytest.fixture(scope="session")
def family() -> dict:
    """Paths of the tiny family, built once into the project's cache."""
    return world.build()


@pytest.fixture(scope="session")
def few_pairs(family, tmp_path_factory) -> Path:
    """40 of the tiny family's PTX pairs: to read all takes longer than a short run."""
    lines = Path(family["ptx_dataset"]).read_text().splitlines(keepends=True)
    file = tmp_path_factory.mktemp("pairs") / "few.jsonl"
    file.write_text("".join(lines[:40]))
    return file


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny family's tokenizer, without its models."""
    return world.build_tokenizer()


@pytest.fixture
def run(tmp_path, capsys):
    """The script's main in this process: run(*flags) -> (exit code, output folder, its output)."""

    def call(*flags, out="out"):
        code = repo.main([*map(str, flags), "--output_dir", str(tmp_path / out)])
        printed = capsys.readouterr()
        return code, tmp_path / out, printed.out + printed.err

    return call


@pytest.fixture(scope="session")
def long_runs(pytestconfig):
    """long_runs(fixture) -> the folder of all runs, once they have ended and those of the fixture
    have gone well."""
    process, folder = pytestconfig.stash[LONG_RUN]
    process.wait(timeout=900)

    def of(fixture: str) -> Path:
        logs = "".join(log.read_text() for log in folder.glob("*.log"))
        assert (folder / f"{fixture}.done").exists(), logs
        return folder

    return of


@pytest.fixture(scope="session")
def demonstrated(tmp_path_factory):
    """demonstrated(seed) -> the run that companions show themselves on, made once for all tests."""
    folder, made = tmp_path_factory.mktemp("demonstrated"), {}

    def run(seed: int) -> str:
        if seed not in made:
            made[seed] = tiny_run(str(folder / str(seed)), seed)
        return made[seed]

    return run


@pytest.fixture(scope="session")
def half_runs(long_runs) -> dict[str, Path]:
    """Folders of a run with half of the default's steps, and of PPO-Lag's. The second was there
    when companions.compare made the first, and a table of both. Whole runs are exhaustive."""
    folder = long_runs("half_runs") / "compared"
    return {name: folder / f"{name}-device-cpu-steps-75-0" for name in ("repo", "ppo_lag")}


# A server that has everything imported and nothing begun: a process starts in no time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["repo"])


def laid_out(prompts: list[list], responses: list[list], pad_id: int = 2) -> repo.Rollout:
    """Token ids as a rollout on the CPU, with nothing but ids and masks."""
    return repo.Rollout(*lay_out(prompts, responses, pad_id, "cpu"))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(tensors by name, numbers) of a checkpoint that one rank wrote."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file), json.loads((folder / "state.json").read_text())["state"]


def write_python(file: Path, source: str) -> Path:
    """Writes a file of Python, given as an indented block."""
    file.write_text(dedent(source).lstrip("\n"))
    return file


def tiny_config(tokenizer, **changes) -> LlamaConfig:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**settings | changes)


def write_policy(folder: Path, tokenizer, seed: int = 0, dtype=torch.float32, **changes) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(tokenizer, **changes)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_beaver(tokenizer, seed: int = 0) -> tuple[LlamaModel, dict]:
    """(the backbone, the whole state dict in the Beaver layout) with random weights."""
    torch.manual_seed(seed)
    model = LlamaModel(tiny_config(tokenizer)).eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["score_head.weight"] = torch.randn(1, 32)
    state["score_head.bias"] = torch.tensor([0.25])
    return model, state


# As published Beaver configs have them; some contradict the weights beside them.
PUBLISHED_FIELDS = {
    "architectures": ["LlamaForScore"],
    "score_dim": 1,
    "bias": False,
    "score_bias": True,
    "score_type": "reward",
    "do_normalize": False,
    "normalizer_type": None,
    "momentum": None,
}


def write_beaver(folder: Path, tokenizer, state: dict, sharded_bin=False, **published) -> Path:
    """Writes the layout by hand, with the contradictory fields that published configs have."""
    folder.mkdir(parents=True)
    config = tiny_config(tokenizer).to_dict() | PUBLISHED_FIELDS | published
    (folder / "config.json").write_text(json.dumps(config))
    if sharded_bin:
        write_sharded_bin(folder, state)
    else:
        weights = {name: value.contiguous() for name, value in state.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def write_sharded_bin(folder: Path, state: dict) -> None:
    """Two files of the older kind, and the index that says which weight is in which."""
    names = list(state)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:5],
        "pytorch_model-00002-of-00002.bin": names[5:],
    }
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, folder / file)
    file_of = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
