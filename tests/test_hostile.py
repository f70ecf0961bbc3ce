# pytest tests/test_hostile.py
"""Files that would do more than be read: no code of theirs runs, nothing is written elsewhere, and
a terminal shows what it is told."""

import hashlib
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
from plumbing.checkpoints import damage_of

# ---- pickles


class Payload:
    """Whoever unpickles it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(file: Path, marker: Path) -> None:
    with file.open("wb") as opened:
        torch.save({"weight": Payload(marker)}, opened)


def test_the_payload_works(tmp_path):
    """Else the tests below would prove nothing."""
    pickled(tmp_path / "x.pt", tmp_path / "ran")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("flag", ["--policy", "--reward_model"])
def test_pickles_in_the_place_of_weights_are_refused(run, tmp_path, tokenizer, flag):
    folder, marker = write_policy(tmp_path / "model", tokenizer), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin", marker)
    code, out, printed = run(*FEW, flag, folder)
    assert code == 2 and f"error: {flag} {folder}: cannot be loaded" in printed
    assert not out.exists()
    assert not marker.exists()


BESIDE_WEIGHTS = (
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("model.pt", ".metadata", "tokenizer.model", "vocab.pkl"),
)


def test_pickles_beside_weights_are_not_even_opened(run, tmp_path, tokenizer):
    marker = tmp_path / "ran"
    policy = write_policy(tmp_path / "policy", tokenizer)
    cost = write_beaver(tmp_path / "cost", tokenizer, random_beaver(tokenizer)[1])
    for name in BESIDE_WEIGHTS:
        for folder in (policy, cost):
            pickled(folder / name, marker)
    assert run(*FEW, "--policy", policy, "--cost_model", cost)[0] == 0
    assert not marker.exists()


@pytest.mark.parametrize("flag", ["--config", "--dataset", "--resume"])
def test_pickles_in_the_place_of_other_files_are_refused(run, tmp_path, flag):
    pickled(tmp_path / "x.json", tmp_path / "ran")
    assert run(*FEW, flag, tmp_path / "x.json")[0] == 2
    assert not (tmp_path / "ran").exists()


def test_pickles_in_a_checkpoint_do_not_run_even_if_its_manifest_lists_them(run, tmp_path):
    assert run(*FEW, "--save_every", 2)[0] == 0
    checkpoint, marker = tmp_path / "out" / "checkpoints" / "step-4", tmp_path / "ran"
    (tmp_path / "out" / "summary.json").unlink()
    pickles = [checkpoint / name for name in (".metadata", "__0_0.distcp", "optimizer.pt")]
    for file in pickles:
        pickled(file, marker)
    code, _, printed = run(*FEW, "--save_every", 2, "--resume", checkpoint)
    assert code == 2 and "does not belong to it" in printed

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file in pickles:
        manifest[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert run(*FEW, "--save_every", 2, "--resume", checkpoint)[0] == 0
    assert not marker.exists()


# ---- code


@pytest.fixture
def own_code(tmp_path, tokenizer):
    """(a policy that brings its own Python code, what that code creates)."""
    folder, marker = write_policy(tmp_path / "own", tokenizer), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own_llama"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    source = f"""
        from transformers import LlamaConfig, LlamaForCausalLM
        open({str(marker)!r}, 'w')


        class OwnConfig(LlamaConfig):
            model_type = 'own_llama'


        class OwnModel(LlamaForCausalLM):
            config_class = OwnConfig
    """
    write_python(folder / "own.py", source)
    return folder, marker


def test_a_models_own_code_runs_with_the_flag_alone(run, tmp_path, own_code):
    folder, marker = own_code
    (tmp_path / "c.json").write_text('{"trust_remote_code": true}')
    for flags in ((), ("--config", tmp_path / "c.json")):
        code, out, printed = run(*FEW, "--policy", folder, *flags)
        assert code == 2 and "own: cannot be loaded" in printed and "custom code" in printed
        assert not marker.exists()
        assert not out.exists()
    assert run(*FEW, "--policy", folder, "--eval_only", "--trust_remote_code")[0] == 0
    assert marker.exists()


def test_a_run_from_elsewhere_cannot_switch_that_flag_on(run, tmp_path, own_code):
    folder, marker = own_code
    assert run(*FEW, out="theirs")[0] == 0
    config, actor = tmp_path / "theirs" / "config.json", tmp_path / "theirs" / "final" / "actor"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trust_remote_code": True}))
    shutil.rmtree(actor)
    shutil.copytree(folder, actor)
    code, _, printed = run("--eval_only", tmp_path / "theirs", "--device", "cpu")
    assert code == 2 and "custom code" in printed
    assert not marker.exists()


def test_a_chat_template_cannot_reach_python(run, tmp_path, tokenizer):
    folder, marker = write_policy(tmp_path / "policy", tokenizer), tmp_path / "ran"
    (folder / "chat_template.jinja").write_text(
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
        "{% if c.__name__ == '_wrap_close' %}"
        f"{{{{ c.__init__.__globals__['open']('{marker}', 'w') }}}}"
        "{% endif %}{% endfor %}"
    )
    code, _, printed = run(*FEW, "--policy", folder)
    assert code == 2 and "refused by the chat template (SecurityError" in printed
    assert not marker.exists()


def test_a_data_set_with_a_script_is_not_run(run, tmp_path):
    folder, marker = tmp_path / "data", tmp_path / "ran"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n' * 40)
    assert run(*FEW, "--dataset", folder)[0] == 2
    assert not marker.exists()


# ---- names and paths


def test_a_manifest_leads_to_no_other_file(tmp_path):
    endless = "../../../../../../../../../dev/zero"
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "manifest.json").write_text(json.dumps({endless: "0"}))
    assert damage_of(tmp_path / "step-2") == f"{endless} is missing"


NAN_IN_CALL_4 = """
    calls = []

    def score(p, r):
        calls.append(1)
        return [float('nan') if len(calls) == 4 else 1.0] * len(r)
"""


def write_prompts_with(file: Path, names: list[str]) -> None:
    """Four prompts for each name, and the name wherever a row could hold a path."""
    rows = []
    for i, name in enumerate(name for name in names for _ in range(4)):
        row = {"prompt": f"{name} {i}", name.replace("\x00", ""): name}
        rows.append(row | {"id": name, "file_name": name, "path": name})
    columns = dict.fromkeys(column for row in rows for column in row)
    lines = [json.dumps({column: row.get(column, "") for column in columns}) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))


def test_nothing_is_written_outside_the_output_folder(run, tmp_path):
    def files():
        return {*tmp_path.rglob("*"), *ROOT.iterdir(), *Path.home().iterdir()}

    escapes = ["../../escape", str(tmp_path / "escape"), "~/escape"]
    escapes += ["checkpoints/step-9/../../../escape"]
    odd = ["CON", "a\x00b", "$(touch escape)", "; touch escape"]
    write_prompts_with(tmp_path / "p.jsonl", escapes + odd)
    write_python(tmp_path / "nan.py", NAN_IN_CALL_4)
    before = files()
    code, out, printed = run(
        *FEW,
        *("--dataset", tmp_path / "p.jsonl", "--reward_model", f"{tmp_path}/nan.py:score"),
        *("--save_every", 2, "--sample_every", 1),
    )
    assert code == 0 and list(out.glob("bad-batch-*")), printed
    assert {path for path in files() if out not in (path, *path.parents)} == before


def test_a_file_name_that_is_a_pattern_means_that_file(tmp_path):
    for name, prompt in (("p[1].jsonl", "mine"), ("p1.jsonl", "not mine"), ("**.jsonl", "stars")):
        (tmp_path / name).write_text(json.dumps({"prompt": prompt}) + "\n")
    assert repo.load_prompts(str(tmp_path / "p[1].jsonl")) == ["mine"]
    assert repo.load_prompts(str(tmp_path / "**.jsonl")) == ["stars"]


# ---- what is shown

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eexe.\u2066\x00"
STEERING = {character for character in HOSTILE if not character.isprintable()}


def test_what_steers_a_terminal_is_spelled_out(run, tmp_path, capsys):
    rows = [json.dumps({"prompt": f"{HOSTILE} {i}"}) + "\n" for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    flags = (*FEW, "--dataset", tmp_path / "p.jsonl", "--sample_every", 1, "--seed", 1)
    code, _, printed = run(*flags, out="a")
    assert code == 0 and "\\x1b" in printed
    assert not set(printed) & STEERING - {"\r"}  # with which the progress bar begins

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = tmp_path / "a" / "config.json"  # the table shows settings in which two runs differ
    config.write_text(json.dumps(json.loads(config.read_text()) | {"judge": HOSTILE}))
    words = [tmp_path / "a", tmp_path / "b", "--out", tmp_path / "seen"]
    assert command.main(compare.CompareSettings, compare.run, [*map(str, words)]) == 0
    seen = capsys.readouterr().out
    assert "\\x1b" in seen
    assert not set(seen) & STEERING

    (tmp_path / "bad.py").write_text(f"def score(p, r): raise ValueError({HOSTILE!r})\n")
    code, _, printed = run(*FEW, "--reward_model", f"{tmp_path}/bad.py:score", out="c")
    assert code == 2 and "\\x1b[2J" in printed
    assert not set(printed) & STEERING
