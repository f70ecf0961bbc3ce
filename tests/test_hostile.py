# pytest tests/test_hostile.py
"""Files that try to do more than be read: their code does not run, nothing is written elsewhere,
and what they say cannot control a terminal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_beaver, write_beaver, write_policy, write_python
from test_run import FEW

import repo
from companions import compare
from companions.shared import command
from plumbing.checkpoints import damage_of, sha256
from plumbing.errors import UserError
from plumbing.models import check_sources, load_policy
from plumbing.training import State


def load_all(*flags) -> None:
    """What a run with these flags loads: the models."""
    config = repo.resolve_config(["--device", "cpu", *map(str, flags)])
    check_sources(config)
    State(*load_policy(config), config)


@pytest.fixture
def marker(tmp_path):
    """A file that exists as soon as a payload has run. A test ends without it."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


# ---- pickles


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(file: Path, marker: Path) -> None:
    with file.open("wb") as opened:
        torch.save({"weight": Payload(marker)}, opened)


def test_the_payload_works(tmp_path, marker):
    """Otherwise the tests below would prove nothing."""
    pickled(tmp_path / "x.pt", marker)
    torch.load(tmp_path / "x.pt", weights_only=False)
    marker.unlink()


@pytest.mark.parametrize("flag", ["--policy", "--reward_model"])
def test_pickles_instead_of_weights_are_refused(tmp_path, tokenizer, marker, flag):
    folder = write_policy(tmp_path / "model", tokenizer)
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin", marker)
    with pytest.raises(UserError, match=f"{flag} {folder}: cannot be loaded"):
        load_all(flag, folder)


def test_pickles_beside_weights_are_not_opened(tmp_path, tokenizer, marker):
    policy = write_policy(tmp_path / "policy", tokenizer)
    cost = write_beaver(tmp_path / "cost", tokenizer, random_beaver(tokenizer)[1])
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth",
                 "model.pt", ".metadata", "tokenizer.model", "vocab.pkl"):
        for folder in (policy, cost):
            pickled(folder / name, marker)
    load_all("--policy", policy, "--cost_model", cost)


@pytest.mark.parametrize("flag", ["--config", "--dataset", "--resume"])
def test_pickles_instead_of_other_files_are_refused(run, tmp_path, marker, flag):
    pickled(tmp_path / "x.json", marker)
    assert run(*FEW, flag, tmp_path / "x.json")[0] == 2


def test_pickles_in_a_checkpoint_do_not_run_even_if_its_manifest_lists_them(run, tmp_path, marker):
    flags = (*FEW, "--steps", 1, "--save_every", 1)
    _, out, _ = run(*flags)
    (out / "summary.json").unlink()
    checkpoint = out / "checkpoints" / "step-1"
    (checkpoint / ".DS_Store").touch()
    assert damage_of(checkpoint) is None
    pickles = [checkpoint / name for name in (".metadata", "__0_0.distcp", "optimizer.pt")]
    for file in pickles:
        pickled(file, marker)
    assert "does not belong to it" in damage_of(checkpoint)

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest |= {file.name: sha256(file) for file in pickles}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert run(*flags, "--resume")[0] == 0


# ---- code


@pytest.fixture
def own_code(tmp_path, tokenizer, marker):
    """A policy that brings its own Python code."""
    folder = write_policy(tmp_path / "own", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed = config | {"model_type": "own_llama", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(changed))
    source = f"""
        from transformers import LlamaConfig, LlamaForCausalLM
        open({str(marker)!r}, 'w')


        class OwnConfig(LlamaConfig):
            model_type = 'own_llama'


        class OwnModel(LlamaForCausalLM):
            config_class = OwnConfig
    """
    write_python(folder / "own.py", source)
    return folder


def test_a_models_own_code_runs_only_with_the_flag(tmp_path, own_code, marker):
    (tmp_path / "c.json").write_text('{"trust_remote_code": true}')
    for flags in ((), ("--config", tmp_path / "c.json")):
        with pytest.raises(UserError, match="own: cannot be loaded .*custom code"):
            load_all("--policy", own_code, *flags)
        assert not marker.exists()
    load_all("--policy", own_code, "--trust_remote_code")
    marker.unlink()


def test_a_run_from_elsewhere_cannot_turn_that_flag_on(run, tmp_path, own_code):
    theirs = tmp_path / "theirs"
    shutil.copytree(own_code, theirs / "final" / "actor")
    (theirs / "metrics.jsonl").touch()
    (theirs / "config.json").write_text('{"trust_remote_code": true}')
    code, _, printed = run("--eval_only", theirs, "--device", "cpu")
    assert code == 2 and "custom code" in printed


def test_a_chat_template_cannot_reach_python(tmp_path, tokenizer, marker):
    folder = write_policy(tmp_path / "policy", tokenizer)
    (folder / "chat_template.jinja").write_text(
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
        "{% if c.__name__ == '_wrap_close' %}"
        f"{{{{ c.__init__.__globals__['open']('{marker}', 'w') }}}}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"its chat template fails \(SecurityError"):
        load_all("--policy", folder)


def test_a_data_set_with_a_script_is_not_run(tmp_path, marker):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "data" / "p.jsonl").write_text('{"prompt": "a"}\n' * 40)
    with pytest.raises(UserError, match="a Python script of its own, which never runs"):
        repo.load_prompts(str(tmp_path / "data"))


# ---- names and paths


def test_a_manifest_leads_to_no_other_file(tmp_path):
    endless = "../../../../../../../../../dev/zero"
    (tmp_path / "manifest.json").write_text(json.dumps({endless: "0"}))
    assert damage_of(tmp_path) == f"{endless} is missing"


NAN_IN_CALL_3 = """
    calls = []

    def score(p, r):
        calls.append(1)
        return [float('nan') if len(calls) == 3 else 1.0] * len(r)
"""


def test_nothing_is_written_outside_the_output_folder(run, tmp_path):
    """Four prompts for each odd name, which is also wherever a row could hold a path."""
    def files():
        return {*tmp_path.rglob("*"), *ROOT.iterdir(), *Path.home().iterdir()}

    names = ["../../escape", str(tmp_path / "escape"), "~/escape", "CON", "a\x00b",
             "checkpoints/step-9/../../../escape", "$(touch escape)", "; touch escape"]
    columns = dict.fromkeys([name.replace("\x00", "") for name in names], "")
    rows = [columns | {"prompt": f"{name} {i}", name.replace("\x00", ""): name, "id": name,
                       "file_name": name, "path": name} for name in names for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_python(tmp_path / "nan.py", NAN_IN_CALL_3)
    before = files()
    code, out, printed = run(
        *(*FEW, "--steps", 2, "--save_every", 1, "--sample_every", 1),
        *("--dataset", tmp_path / "p.jsonl", "--reward_model", f"{tmp_path}/nan.py:score"))
    assert code == 0 and (out / "bad-batch-2.jsonl").exists(), printed
    assert {path for path in files() if out not in (path, *path.parents)} == before


def test_a_file_name_that_is_a_pattern_means_that_file(tmp_path):
    for name, prompt in (("p[1].jsonl", "mine"), ("p1.jsonl", "not mine"), ("**.jsonl", "stars")):
        (tmp_path / name).write_text(json.dumps({"prompt": prompt}) + "\n")
    assert repo.load_prompts(str(tmp_path / "p[1].jsonl")) == ["mine"]
    assert repo.load_prompts(str(tmp_path / "**.jsonl")) == ["stars"]


# ---- what is shown

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eexe.\u2066\x00"
STEERING = {character for character in HOSTILE if not character.isprintable()}


def test_what_steers_a_terminal_is_spelled_out(run, tmp_path, capsys, monkeypatch):
    rows = [json.dumps({"prompt": f"{HOSTILE} {i}"}) + "\n" for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    flags = (*FEW, "--steps", 1)
    code, _, printed = run(*flags, "--dataset", tmp_path / "p.jsonl", out="a")
    assert code == 0 and "\\x1b" in printed
    assert not set(printed) & STEERING - {"\r"}  # with which the progress bar begins

    monkeypatch.setattr(compare, "drawn", lambda groups: {})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = tmp_path / "a" / "config.json"  # the table shows settings in which two runs differ
    config.write_text(json.dumps(json.loads(config.read_text()) | {"judge": HOSTILE}))
    words = [tmp_path / "a", tmp_path / "b", "--out", tmp_path / "seen"]
    assert command.main(compare.CompareSettings, compare.run, [*map(str, words)]) == 0
    seen = capsys.readouterr().out
    assert "\\x1b" in seen and not set(seen) & STEERING

    (tmp_path / "bad.py").write_text(f"def score(p, r): raise ValueError({HOSTILE!r})\n")
    code, _, printed = run(*flags, "--reward_model", f"{tmp_path}/bad.py:score", out="c")
    assert code == 2 and "\\x1b[2J" in printed and not set(printed) & STEERING
