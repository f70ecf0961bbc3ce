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
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import (
    PUBLISHED_FIELDS,
    exhaustive,
    random_beaver,
    tiny_config,
    write_beaver,
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
from plumbing import hub
from plumbing.data import encode_prompts
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


# ---- scratch

def first_look(*flags):
    config = repo.resolve_config(["--model", "alpaca-7b", "--device", "cpu", *map(str, flags)])
    hub.check_hub.cache_clear()
    check_sources(config)
    load_policy(config)
    return config

POLICY = "PKU-Alignment/alpaca-7b-reproduced"

def test_scratch(full, published, monkeypatch, tmp_path):
    def look(what, *flags):
        t = time.time()
        try:
            first_look(*flags); print(what, "-> OK", round(time.time()-t, 1))
        except BaseException as e:
            print(what, "->", type(e).__name__, e, round(time.time()-t, 1))
        constants.HF_HUB_OFFLINE = False
    look("no such", "--policy", "a/b", "--dataset", "a/c", "--reward_model", "gpt3")
    look("rev", "--policy", POLICY + "@v9", "--dataset", "PKU-Alignment/PKU-SafeRLHF:nope", )
    look("split", "--dataset", "PKU-Alignment/PKU-SafeRLHF:nope", )
    full.gated = {POLICY, "datasets/tatsu-lab/alpaca"}
    look("gated")
    monkeypatch.setenv("HF_TOKEN", "hf_other"); look("refused")
    monkeypatch.setenv("HF_TOKEN", "hf_bad"); look("bad")
    monkeypatch.setenv("HF_TOKEN", TOKEN); look("ok")
    full.gated = set()
    monkeypatch.delenv("HF_TOKEN")
    for status in (429, 503):
        full.faults = [("PKU-SafeRLHF", status)]; look("partial cached %s" % status)
    full.faults = [("api", 503)]; look("all warm")
    shutil.rmtree(tmp_path / "cache"); look("all cold")



    full.faults = []; look("again")
    files = {f.name: f.read_bytes() for f in published[POLICY].glob("*")}
    full.push("a/script", {"script.py": "x", "README.md": "hi"} ) ; full.push("datasets/a/script", {"script.py": "x", "README.md": "hi"} )
    look("script", "--dataset", "a/script")
    full.push("a/own", files | {"own.py": "", "config.json": json.dumps(json.loads(files["config.json"]) | {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})})
    look("own", "--policy", "a/own")
    full.push("a/arch", files | {"config.json": json.dumps(json.loads(files["config.json"]) | {"model_type": "mamba9"})})
    look("arch", "--policy", "a/arch")
    full.push("a/nothing", {"README.md": ""})
    look("nothing", "--policy", "a/nothing")
    full.push("a/noweights", {k: v for k, v in files.items() if "safetensors" not in k})
    look("noweights", "--policy", "a/noweights")
    full.push("a/gen", files | {"generation_config.json": "{"})
    look("gen", "--policy", "a/gen")
    full.push("a/sp", {k: v for k, v in files.items() if k != "tokenizer.json"} | {"tokenizer.model": b"x"})
    look("sp", "--policy", "a/sp")
    full.push("a/sp2", {k: v for k, v in files.items() if k not in ("tokenizer.json", "tokenizer_config.json")} | {"tokenizer.model": b"x"})
    look("sp2", "--policy", "a/sp2")
    n = "model-00002-of-00004.safetensors"
    full.push("a/dam", files | {n: b"\xff" * 8 + files[n][8:]})
    look("damaged at origin", "--policy", "a/dam")
    blob = next((tmp_path / "cache").glob("models--PKU-Alignment--alpaca-7b-reproduced/snapshots/*/" + n)).resolve()
    blob.write_bytes(b"\xff" * 8 + files[n][8:]); look("damaged in cache")
    blob.unlink(); look("advice followed")
    t = blob.parent.parent.glob("snapshots/*/tokenizer.json"); b2 = next(t).resolve(); b2.write_bytes(b"{"); look("damaged tokenizer")
    b2.unlink()
    c = next(blob.parent.parent.glob("snapshots/*/config.json")).resolve(); c.write_bytes(b"{"); look("damaged config")
    c.unlink()
    read_rows("tatsu-lab/alpaca", "--x");     c = next((tmp_path / "cache").glob("datasets--tatsu*/snapshots/*/data/*")).resolve(); c.write_bytes(c.read_bytes()[:-5])
    try: read_rows("tatsu-lab/alpaca", "--x")
    except UserError as e: print(e)
    assert 0
