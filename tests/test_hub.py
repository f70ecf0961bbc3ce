# pytest tests/test_hub.py
"""Everything between `--model alpaca-7b` and the first step, on a hub of the loopback: the two
presets from an empty cache to a finished run, fixed commits, parts of data sets, and one sentence
for each thing that goes wrong."""

import io
import json
import lzma
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import (
    PUBLISHED_FIELDS,
    exhaustive,
    write_policy,
    write_sharded_bin,
)
from huggingface_hub import close_session, constants
from huggingface_hub.constants import HUGGINGFACE_CO_URL_TEMPLATE
from safetensors.torch import save_file
from small_hub import TOKEN, SmallHub
from test_chats import tokenizer_of
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM

import repo
from plumbing import hub, runs, settings
from plumbing.errors import UserError
from plumbing.files import read_rows
from plumbing.models import check_sources, load_policy

# ---- a hub, and repositories in published layouts


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Inside it the libraries believe in a network without a proxy, and their cache is empty."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                        ("HF_TOKEN_PATH", str(tmp_path / "token"))):
        monkeypatch.setattr(constants, name, value)
    close_session()  # it remembers proxies
    hub.check_hub.cache_clear()
    hub.fix(None)
    yield
    hub.check_hub.cache_clear()
    close_session()


def point_to(address: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    path = HUGGINGFACE_CO_URL_TEMPLATE.partition("://")[2].partition("/")[2]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{path}")


@pytest.fixture
def served(online, monkeypatch):
    """A small hub, where the libraries look for the real one."""
    small = SmallHub()
    with small.serving() as address:
        point_to(address, monkeypatch)
        yield small


def llama_tokenizer(folder: Path) -> None:
    """Writes Llama's tokenizer as alpaca-7b-reproduced and the Beaver models have it, with no words
    but bytes."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False) for token in
        ("<unk>", "<s>", "</s>", "<pad>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 260}))
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "legacy": True, "model_max_length": 512, "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer"}))


LLAMA = {  # but for sizes as in the published files
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 260, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.2", "use_cache": True,
    "vocab_size": 261,
}
PUBLISHED_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 8, "max_position_embeddings": 131072, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}


def write_llama(folder: Path, shard_size: str = "5GB", **fields) -> dict:
    """Writes a small random Llama, with a config as published. Returns its weights."""
    torch.manual_seed(len(folder.name))
    config = LLAMA | fields
    model = LlamaForCausalLM(LlamaConfig(**config)).bfloat16()
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "config.json").write_text(json.dumps(config))
    return model.state_dict()


def write_alpaca(folder: Path) -> None:
    write_llama(folder, "20KB", architectures=["LlamaForCausalLM"])
    (folder / "generation_config.json").write_text(json.dumps({
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 260,
        "transformers_version": "4.36.2"}))
    llama_tokenizer(folder)


def write_beaver_of_llama(folder: Path, older: bool) -> None:
    """A reward or cost model; the older layout has two pickles instead of safetensors."""
    weights = write_llama(folder, **PUBLISHED_FIELDS | {"architectures": ["LlamaModelForScore"]})
    weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    weights |= {"score_head.weight": torch.randn(1, 32), "score_head.bias": torch.randn(1)}
    (folder / "model.safetensors").unlink()
    if older:
        write_sharded_bin(folder, weights)
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    llama_tokenizer(folder)


def write_llama_3(folder: Path) -> None:
    tokenizer = tokenizer_of("dated")
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|eot_id|>", "<|end_header_id|>"])
    write_llama(folder, **PUBLISHED_LLAMA_3 | {
        "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": ends,
        "pad_token_id": None})
    (folder / "generation_config.json").write_text(json.dumps({
        "bos_token_id": 0, "do_sample": True, "eos_token_id": ends, "temperature": 0.6,
        "top_p": 0.9, "transformers_version": "4.45.0.dev0"}))
    tokenizer.save_pretrained(folder)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_text("the same weights again")


def safe_rlhf(count: int, of: str) -> str:
    """Rows of PKU-SafeRLHF."""
    return "".join(json.dumps({
        "prompt": f"{of} {i}?", "response_0": "Yes.", "response_1": "No.",
        "prompt_source": "Alpaca3-8B", "response_0_source": of, "response_1_source": of,
        "is_response_0_safe": False, "is_response_1_safe": True,
        "response_0_harm_category": {"Violence": True}, "better_response_id": i % 2,
        "safer_response_id": 1}) + "\n" for i in range(count))


FOLDERS = {"alpaca-7b": "Alpaca-7B", "alpaca2-7b": "Alpaca2-7B", "alpaca3-8b": "Alpaca3-8B"}
CARD = "---\nlicense: cc-by-nc-4.0\nconfigs:\n" + "".join(
    f"- config_name: {name}\n  data_files:\n  - split: train\n    path:\n{train}"
    f"  - split: test\n    path:\n{test}" for name, train, test in (
        (name, *("".join(f"    - data/{folder}/{split}.jsonl\n" for folder in folders)
                 for split in ("train", "test")))
        for name, folders in {"default": FOLDERS.values(),
                              **{name: [folder] for name, folder in FOLDERS.items()}}.items())
) + "---\n# PKU-SafeRLHF\n"


def pku() -> dict[str, str]:
    return {"README.md": CARD, ".gitattributes": "*.jsonl text\n"} | {
        f"data/{folder}/{split}.jsonl": safe_rlhf(count, f"{folder} {split}")
        for folder in FOLDERS.values() for split, count in (("train", 8), ("test", 2))}


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


ALPACA = {
    "README.md": "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
                 "    path: data/train-*\n---\n",
    "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(
        [{"instruction": f"Count to {i}.", "input": "", "output": "1, 2.", "text": "Below is"}
         for i in range(12)]),
}
REPOSITORIES = {
    "alpaca-7b": ("PKU-Alignment/alpaca-7b-reproduced", write_alpaca),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", write_llama_3),
}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The files of a preset's models, written once."""
    folder = tmp_path_factory.mktemp("published")
    written = {}
    for name, write in [*REPOSITORIES.values(),
                        ("PKU-Alignment/beaver-7b-v1.0-reward",
                         lambda folder: write_beaver_of_llama(folder, older=True)),
                        ("PKU-Alignment/beaver-7b-v1.0-cost",
                         lambda folder: write_beaver_of_llama(folder, older=False))]:
        written[name] = folder / name
        written[name].mkdir(parents=True)
        write(written[name])
    return written


@pytest.fixture
def full(served, published):
    """A small hub with all that the two presets name."""
    for name, folder in published.items():
        served.push(name, folder)
    served.push("datasets/PKU-Alignment/PKU-SafeRLHF", pku())
    served.push("datasets/tatsu-lab/alpaca", ALPACA)
    return served


SMALL = ("--device", "cpu", "--steps", 2, "--batch_size", 2, "--max_response_length", 4,
         "--max_eval_prompts", 2, "--eval_samples", 1, "--lora_rank", 2, "--sample_every", 0,
         "--save_every", 1)


# ---- the presets


@pytest.mark.parametrize("preset", REPOSITORIES)
def test_a_preset_from_an_empty_cache_to_a_finished_run(run, full, preset):
    """One line for each repository, and only files that are read."""
    code, out, printed = run("--model", preset, *SMALL)
    assert code == 0, printed
    refs = {name: refs["main"] for name, refs in full.refs.items()}
    used = {name for name in refs if name not in [other for key, (other, _) in REPOSITORIES.items()
                                                  if key != preset]}
    lines = re.findall(r"^(model|dataset) (\S+): ([\d.]+k?B) to download, commit (\w+)$", printed,
                       re.MULTILINE)
    assert len(lines) == 5
    assert {"datasets/" * (kind == "dataset") + name: commit for kind, name, _, commit in lines} \
        == {name: refs[name] for name in used}
    commits = json.loads((out / "config.json").read_text())["commits"]
    assert dict(pair.split("=") for pair in commits.split()) == {name: refs[name] for name in used}
    assert "24 rows read (configuration default, split train, 3 files)" in printed
    assert "12 rows read (configuration default, split train, 1 file)" in printed
    assert not [line for line in full.log if "original" in line]
    saved = json.loads((out / "final" / "actor" / "generation_config.json").read_text())
    assert saved.get("top_p") == (0.9 if preset == "llama-3.2-3b" else None)


def test_a_run_keeps_the_commits_and_the_day_it_began_with(run, full, published, monkeypatch):
    """Also if the hub has other weights and other data when it is resumed or evaluated."""
    flags = "--model", "llama-3.2-3b", *SMALL
    code, out, _ = run(*flags)
    before, scores = (out / "config.json").read_text(), (out / "eval.jsonl").read_bytes()
    for name in full.refs:
        [files] = [files for (other, _), files in full.files.items() if other == name]
        changed = {"model.safetensors": b"damaged", "data/Alpaca-7B/train.jsonl": b"damaged"}
        full.push(name, files | {file: content for file, content in changed.items()
                                 if file in files} | {"new": b""})
    monkeypatch.setattr(settings, "date", type("Later", (settings.date,), {
        "today": classmethod(lambda cls: cls(2030, 1, 1))}))

    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-2")
    code, _, printed = run(*flags, "--resume")
    assert code == 0, printed
    assert (out / "eval.jsonl").read_bytes() == scores
    code, evaluated, printed = run("--eval_only", out, "--device", "cpu", out="evaluated")
    assert code == 0, printed
    assert (evaluated / "eval.jsonl").read_bytes() == scores
    names = "commits", "date"
    assert [json.loads((evaluated / "config.json").read_text())[name] for name in names] \
        == [json.loads(before)[name] for name in names]
    code, _, printed = run(*flags, out="new")
    assert code == 2 and "train.jsonl: cannot be read (JSONDecodeError" in printed


def test_dry_run_says_what_it_downloads_and_takes_no_weights(run, full):
    code, _, printed = run("--model", "alpaca-7b", *SMALL, "--dry_run")
    assert code == 0, printed
    said = re.findall(r"(\S+): ([\d.]+)kB to download", printed)
    sizes = {name: float(size) for name, size in said}
    content = full.files[POLICY, full.refs[POLICY]["main"]]
    small = sum(len(content[name]) for name in content if not name.endswith(".safetensors"))
    assert sizes[POLICY] == pytest.approx(small / 1000, abs=0.05) and len(sizes) == 5
    assert printed.index("to download") < printed.index("rows read") < printed.index("memory, in")
    assert not [line for line in full.log if re.search("safetensors$|bin$", line)]


def test_an_evaluation_needs_no_pairs(run, full):
    del full.refs["datasets/tatsu-lab/alpaca"]
    code, _, printed = run("--model", "alpaca-7b", *SMALL[:-2], "--eval_only")
    assert code == 0, printed
    assert not [line for line in full.log if "tatsu" in line]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_downloads_show_bars_on_a_terminal_alone(full, monkeypatch, capsys, is_terminal):
    with runs.Run():
        monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
        assert len(read_rows(PKU, "--dataset")) == 24
        assert ("Fetching 3 files" in capsys.readouterr().err) is is_terminal
        assert len(read_rows(PKU, "--dataset")) == 24
    assert "Fetching" not in capsys.readouterr().err


# ---- what a name stands for

POLICY = "PKU-Alignment/alpaca-7b-reproduced"
COST = "PKU-Alignment/beaver-7b-v1.0-cost"
PKU = "PKU-Alignment/PKU-SafeRLHF"
IMAGE = {"bytes": b"a picture", "path": "a.png"}
OTHERS = {
    "datasets/PKU-Alignment/BeaverTails": {
        "README.md": "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: 30k_train\n"
                     "    path: round0/30k/train.jsonl.xz\n  - split: 30k_test\n"
                     "    path: round0/30k/test.jsonl.xz\n---\n",
        "round0/30k/train.jsonl.xz": lzma.compress(safe_rlhf(5, "30k").encode()),
        "round0/30k/test.jsonl.xz": lzma.compress(safe_rlhf(3, "test").encode()),
    },
    "datasets/PKU-Alignment/BeaverTails-V": {
        "README.md": "---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: data/{name}/t-*\n"
            for name in ("animal_abuse", "self_harm")) + "---\n",
        "data/animal_abuse/t-0.parquet": parquet([{"question": "a", "image": IMAGE}]),
        "data/animal_abuse/t-1.parquet": parquet([{"question": q, "image": IMAGE} for q in "bc"]),
        "data/self_harm/t-0.parquet": parquet([{"question": "d", "image": IMAGE}] * 4),
    },
    "datasets/o/plain": {"train.csv": "prompt\na\nb\n", "test.csv": "prompt\nc\n",
                         "dataset_infos.json": "{}"},
    "datasets/o/one": {"harmful.jsonl": safe_rlhf(2, "x")},
    "datasets/o/both": {
        "README.md": "---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: a.csv\n"
            "  - split: x\n    path: a.csv\n" for name in ("default", "x")) + "---\n",
        "a.csv": "prompt\na\n"},
    "datasets/o/script": {"script.py": "raise SystemExit", "README.md": ""},
    "datasets/o/zip": {"train.arrow": "x"},
}


@pytest.fixture
def more(full):
    """A small hub with other data sets too."""
    for name, files in OTHERS.items():
        full.push(name, files)
    full.push("datasets/o/script", {"default/train/0.parquet": parquet([{"prompt": "p"}])},
              ref="refs/convert/parquet")
    return full


NAME_ONE = "name one of its parts, as NAME:CONFIG:SPLIT; it has "


@pytest.mark.parametrize("source, says", [
    (PKU, "24 rows read (configuration default, split train, 3 files)"),
    (f"{PKU}:test", "6 rows read (configuration default, split test, 3 files)"),
    (f"{PKU}:alpaca-7b", "8 rows read (configuration alpaca-7b, split train, 1 file)"),
    (f"{PKU}:alpaca-7b:test", "2 rows read (configuration alpaca-7b, split test, 1 file)"),
    (f"{PKU}:default:test", "6 rows read (configuration default, split test, 3 files)"),
    (f"{PKU}:nope", NAME_ONE + "default:train, default:test, alpaca-7b:train, "),
    ("PKU-Alignment/BeaverTails:30k_test", "3 rows read (configuration default, split 30k_test, "),
    ("PKU-Alignment/BeaverTails", NAME_ONE + "default:30k_train, default:30k_test"),
    ("PKU-Alignment/BeaverTails-V", NAME_ONE + "animal_abuse:train, self_harm:train"),
    ("PKU-Alignment/BeaverTails-V:animal_abuse",
     "3 rows read (configuration animal_abuse, split train, 2 files)"),
    ("o/plain:test", "1 rows read (configuration default, split test, 1 file)"),
    ("o/one", "2 rows read (configuration default, split train, 1 file)"),
    ("o/both:x", NAME_ONE + "default:train, default:x, x:train, x:x"),
    ("o/script", "is read by a Python script of its own, which never runs; try NAME@refs/convert/"),
    ("o/script@refs/convert/parquet", "1 rows read (configuration default, split train, 1 file)"),
    ("o/zip", "train.arrow: cannot tell its format"),
])
def test_a_part_of_a_data_set(more, tmp_path, capsys, source, says):
    """From the hub and, if it is there, from the cache without a network. A downloaded folder is
    the same."""
    def read(source: str) -> str:
        try:
            repo.load_prompts(source)
        except UserError as error:
            return str(error)
        return capsys.readouterr().out

    assert f"--dataset {source}: {says}" in read(source)
    name, _, part = source.partition(":")
    repository, _, revision = f"datasets/{name}".partition("@")
    folder = tmp_path / "downloaded" / Path(name).name
    for file, content in more.files[repository, more.refs[repository][revision or "main"]].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    there = f"{folder}:{part}".rstrip(":")
    assert f"--dataset {there}: {says}" in read(there)
    constants.HF_HUB_OFFLINE = True
    hub.check_hub.cache_clear()
    hub.fix(None)
    assert f"--dataset {source}: {says}" in read(source)


def test_only_the_files_of_the_part_are_fetched(more):
    read_rows(f"{PKU}:alpaca-7b:test", "--dataset")
    fetched = {line.partition("/data/")[2] for line in more.log if "/data/" in line}
    assert fetched == {"Alpaca-7B/test.jsonl"}


def test_a_part_of_which_the_cache_has_only_some_files_is_not_read(more):
    read_rows(f"{PKU}:alpaca-7b:train", "--dataset")
    constants.HF_HUB_OFFLINE = True
    hub.check_hub.cache_clear()
    assert len(read_rows(f"{PKU}:alpaca-7b:train", "--dataset")) == 8
    with pytest.raises(UserError, match=r"answer \(HF_HUB_OFFLINE is set\), and the cache"):
        read_rows(PKU, "--dataset")


def test_a_revision_can_be_named(served, tmp_path, tokenizer):
    write_policy(tmp_path / "one", tokenizer, seed=1)
    write_policy(tmp_path / "two", tokenizer, seed=2)
    first = served.push("o/policy", tmp_path / "one", ref="v1")
    second, weights = served.push("o/policy", tmp_path / "two"), []
    for source, commit in (("o/policy", second), ("o/policy@v1", first),
                           (f"o/policy@{first}", first)):
        config = repo.resolve_config(["--device", "cpu", "--policy", source])
        check_sources(config)
        assert config.commits == f"{source}={commit}"
        weights.append(load_policy(config)[0].lm_head.weight)
    assert not weights[0].equal(weights[1]) and weights[1].equal(weights[2])


# ---- what goes wrong


def refused(*flags) -> str:
    """What the first look and the loaders say."""
    config = repo.resolve_config(["--model", "alpaca-7b", "--device", "cpu", *map(str, flags)])
    with pytest.raises(UserError) as error:
        check_sources(config)
        load_policy(config)
    return str(error.value)


ABSENT = "no such folder here and no such name on the hub; correct it"
LOG_IN = "is gated; ask for access on its page on the hub, then log in (hf auth login)"


def change(hub: SmallHub, name: str, **files) -> None:
    """Makes a commit with other files; None for a file that is left out."""
    old = hub.files[name, hub.refs[name]["main"]]
    files = {file.replace("__", "."): content for file, content in files.items()}
    hub.push(name, {file: content for file, content in (old | files).items()
                    if content is not None})


def own_code(hub: SmallHub) -> None:
    config = json.loads(hub.files[POLICY, hub.refs[POLICY]["main"]]["config.json"])
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(hub, POLICY, own__py="", config__json=json.dumps(
        config | {"model_type": "own", "auto_map": names}))


@pytest.mark.parametrize("flags, prepare, says", [
    ("--policy a/b --dataset a/c --eval_dataset a/d:test --ptx_dataset a/e", None,
     f"--policy a/b, --dataset a/c, --eval_dataset a/d, --ptx_dataset a/e: {ABSENT}"),
    (f"--cost_model {COST}@v9", None, f"--cost_model {COST}@v9: has no such revision on the hub"),
    ("", lambda hub: hub.gated.update([POLICY, f"datasets/{PKU}"]),
     f"--policy {POLICY}, --dataset {PKU}, --eval_dataset {PKU}: {LOG_IN}"),
    ("hf_other", lambda hub: hub.gated.add(POLICY),
     f"--policy {POLICY}: is gated, and your account has no access"),
    ("hf_bad", None, "the hub refuses your token; log in again"),
    ("", lambda hub: hub.faults.append((f"api/models/{POLICY}", 403)),
     f"--policy {POLICY}: the hub refuses access"),
    ("", lambda hub: hub.faults.append((f"api/models/{POLICY}", 429)),
     f"--policy {POLICY}: the hub answers 429; run again later"),
    ("", lambda hub: hub.faults.append(("", 503)),
     f"--policy {POLICY}, --reward_model PKU-Alignment/beaver-7b-v1.0-reward, --cost_model {COST}, "
     f"--dataset {PKU}, --eval_dataset {PKU}, --ptx_dataset tatsu-lab/alpaca: no such folder here, "
     "the hub does not answer (it answers 503), and the cache has not all of it; run again later"),
    ("", own_code, f"--policy {POLICY}: cannot be loaded without its custom code; read that code"),
    ("", lambda hub: change(hub, POLICY, config__json='{"model_type": "new"}'),
     f"--policy {POLICY}: cannot be loaded: transformers {transformers.__version__} does not know"),
    ("", lambda hub: change(hub, POLICY, config__json=None), "cannot be loaded (ValueError: Unrec"),
    ("", lambda hub: change(hub, POLICY, generation_config__json="{"),
     "generation_config.json: cannot be read (OSError"),
    ("", lambda hub: change(hub, POLICY, tokenizer__json=None, tokenizer__model="x"),
     "its tokenizer is a tokenizer.model; reading that takes two more packages (pip install "),
])
def test_one_sentence_for_each_cause(full, monkeypatch, flags, prepare, says):
    if flags.startswith("hf_"):
        monkeypatch.setenv("HF_TOKEN", flags)
        flags = ""
    if prepare:
        prepare(full)
    monkeypatch.setattr(hub, "is_sentencepiece_available", lambda: False)
    assert says in refused(*flags.split())


def test_an_account_with_access_may_read_what_is_gated(full, monkeypatch):
    full.gated.update(full.refs)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_sources(repo.resolve_config(["--model", "alpaca-7b", "--device", "cpu"]))


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors",
                                  exhaustive("tokenizer.json")])
def test_a_damaged_file_is_named_and_the_remedy_works(full, tmp_path, name):
    config = repo.resolve_config(["--model", "alpaca-7b", "--device", "cpu"])
    load_policy(config)
    [file] = (tmp_path / "cache").glob(f"*alpaca-7b-reproduced/snapshots/*/{name}")
    file.resolve().write_bytes(b"\xff" * 9 + file.read_bytes()[9:])
    told = re.search(f": could not be loaded, because {name} is damaged; delete (.*) and run again",
                     refused())
    Path(told[1]).unlink()
    load_policy(config)


@pytest.mark.parametrize("fault, says", [
    exhaustive(("cdn.*model-00002", slice(0, 9)), "the download broke off (RemoteProtocolError)"),
    exhaustive(("HEAD.*model-00002", 503), "the hub answers 503; run again later"),
])
def test_a_download_that_breaks_off_goes_on_in_the_next_run(full, fault, says):
    full.faults.append(fault)
    assert says in refused()
    full.faults.clear()
    full.log.clear()
    load_policy(repo.resolve_config(["--model", "alpaca-7b", "--device", "cpu"]))
    assert not [line for line in full.log if "model-00001" in line]


# ---- no answer


@pytest.mark.parametrize("status", [exhaustive(429), 503])
def test_a_hub_in_trouble_is_asked_once_and_the_cache_is_used(full, capsys, status):
    before, after = (repo.resolve_config(["--model", "alpaca-7b", "--device", "cpu"])
                     for _ in range(2))
    check_sources(before)
    load_policy(before)
    full.faults.append(("", status))
    full.log.clear()
    hub.check_hub.cache_clear()
    hub.fix(None)
    check_sources(after)
    load_policy(after)
    assert after.commits == before.commits
    printed = capsys.readouterr().out
    assert f"does not answer (it answers {status}); only the cache is used" in printed
    assert len(full.log) == 1


def test_a_hub_that_never_answers_is_asked_once(run, online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        threading.Timer(5, silent.close).start()  # a run that waits for it fails, and soon
        begin = time.monotonic()
        code, out, printed = run("--model", "alpaca-7b", "--device", "cpu")
    assert code == 2 and f"error: --policy {POLICY}, --reward_model PKU-" in printed
    assert "the hub does not answer (no answer within 0.5 seconds), and the cache" in printed
    assert not out.exists() and time.monotonic() - begin < 5


def test_a_cache_that_cannot_be_written_is_named(full, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cache, cannot be written .*; set HF_HOME to an"):
        read_rows(PKU, "--dataset")


def test_commits_in_another_form_are_refused():
    with pytest.raises(UserError, match="--commits abc: must be NAME=COMMIT NAME=COMMIT"):
        repo.resolve_config(["--device", "cpu", "--commits", "abc"])


def test_any_other_answer_will_do(served):
    served.faults.append(("", 404))
    assert hub.check_hub() is None
    assert not constants.is_offline_mode()
