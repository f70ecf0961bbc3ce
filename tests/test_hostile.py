# pytest tests/test_hostile.py
"""Files that would do more than be read: no code of theirs runs, nothing is written elsewhere, and a terminal shows what it is told."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_beaver, write_beaver, write_policy
from test_run import FEW

import repo
from tiny_configs.folder import damage_of


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
    assert code == 2 and f"error: {flag} {folder}: cannot be loaded" in printed and not out.exists() and not marker.exists()


def test_pickles_beside_weights_are_not_even_opened(run, tmp_path, tokenizer):
    marker = tmp_path / "ran"
    policy, cost = write_policy(tmp_path / "policy", tokenizer), write_beaver(tmp_path / "cost", tokenizer, random_beaver(tokenizer)[1])
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.pt", ".metadata", "tokenizer.model", "vocab.pkl"):
        for folder in (policy, cost):
            pickled(folder / name, marker)
    assert run(*FEW, "--policy", policy, "--cost_model", cost)[0] == 0 and not marker.exists()


@pytest.mark.parametrize("flag", ["--config", "--dataset", "--resume"])
def test_pickles_in_the_place_of_other_files_are_refused(run, tmp_path, flag):
    pickled(tmp_path / "x.json", tmp_path / "ran")
    assert run(*FEW, flag, tmp_path / "x.json")[0] == 2 and not (tmp_path / "ran").exists()


def test_pickles_in_a_checkpoint_do_not_run_even_if_its_manifest_lists_them(run, tmp_path):
    import hashlib
    assert run(*FEW, "--save_every", 2)[0] == 0
    checkpoint, marker = tmp_path / "out" / "checkpoints" / "step-4", tmp_path / "ran"
    (tmp_path / "out" / "summary.json").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
        pickled(checkpoint / name, marker)
    code, _, printed = run(*FEW, "--save_every", 2, "--resume", checkpoint)
    assert code == 2 and "does not belong to it" in printed
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
                                                                     for name in (".metadata", "__0_0.distcp", "optimizer.pt")}))
    assert run(*FEW, "--save_every", 2, "--resume", checkpoint)[0] == 0 and not marker.exists()


def test_a_manifest_leads_to_no_other_file(tmp_path):
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "manifest.json").write_text('{"../../../../../../../../../dev/zero": "0"}')  # which would never end
    assert damage_of(tmp_path / "step-2") == "../../../../../../../../../dev/zero is missing"


@pytest.fixture
def own_code(tmp_path, tokenizer):
    """(a policy that brings its own Python code, what that code creates)."""
    folder, marker = write_policy(tmp_path / "own", tokenizer), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"from transformers import LlamaConfig, LlamaForCausalLM\nopen({str(marker)!r}, 'w')\n\n\nclass OwnConfig(LlamaConfig):\n"
                                   "    model_type = 'own_llama'\n\n\nclass OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    return folder, marker


def test_a_models_own_code_runs_with_the_flag_alone(run, tmp_path, own_code):
    folder, marker = own_code
    (tmp_path / "c.json").write_text('{"trust_remote_code": true}')
    for flags in ((), ("--config", tmp_path / "c.json")):
        code, out, printed = run(*FEW, "--policy", folder, *flags)
        assert code == 2 and "own: cannot be loaded" in printed and "custom code" in printed and not marker.exists() and not out.exists()
    assert run(*FEW, "--policy", folder, "--eval_only", "--trust_remote_code")[0] == 0 and marker.exists()


def test_a_run_from_elsewhere_cannot_switch_that_flag_on(run, tmp_path, own_code):
    folder, marker = own_code
    assert run(*FEW, out="theirs")[0] == 0
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trust_remote_code": True}))
    shutil.rmtree(tmp_path / "theirs" / "final" / "actor")
    shutil.copytree(folder, tmp_path / "theirs" / "final" / "actor")
    code, _, printed = run("--eval_only", tmp_path / "theirs", "--device", "cpu")
    assert code == 2 and "custom code" in printed and not marker.exists()


def test_a_chat_template_cannot_reach_python(run, tmp_path, tokenizer):
    folder, marker = write_policy(tmp_path / "policy", tokenizer), tmp_path / "ran"
    (folder / "chat_template.jinja").write_text("{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
                                                f"{{{{ c.__init__.__globals__['open']('{marker}', 'w') }}}}{{% endif %}}{{% endfor %}}")
    code, _, printed = run(*FEW, "--policy", folder)
    assert code == 2 and "refused by the chat template (SecurityError" in printed and not marker.exists()


def test_nothing_is_written_outside_the_output_folder(run, tmp_path):
    names = ["../../escape", str(tmp_path / "escape"), "~/escape", "checkpoints/step-9/../../../escape", "CON", "a\x00b", "$(touch escape)", "; touch escape"]
    rows = [{"prompt": name, name.replace("\x00", ""): name, "id": name, "file_name": name, "path": name} for name in names for _ in range(4)]
    rows = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(rows)]
    keys = dict.fromkeys(key for row in rows for key in row)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({key: row.get(key, "") for key in keys}) + "\n" for row in rows))
    (tmp_path / "nan.py").write_text("calls = []\ndef score(p, r):\n    calls.append(1)\n    return [float('nan') if len(calls) == 4 else 1.0] * len(r)\n")
    before = {path for path in (*tmp_path.rglob("*"), *ROOT.iterdir(), *Path.home().iterdir())}
    code, out, printed = run(*FEW, "--dataset", tmp_path / "p.jsonl", "--reward_model", f"{tmp_path}/nan.py:score", "--save_every", 2, "--sample_every", 1)
    assert code == 0 and list(out.glob("bad-batch-*")), printed
    after = {path for path in (*tmp_path.rglob("*"), *ROOT.iterdir(), *Path.home().iterdir()) if out not in (path, *path.parents)}
    assert after == before


def test_a_data_set_with_a_script_is_not_run(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "data" / "p.jsonl").write_text('{"prompt": "a"}\n' * 40)
    assert run(*FEW, "--dataset", tmp_path / "data")[0] == 2 and not (tmp_path / "ran").exists()


def test_a_file_name_that_is_a_pattern_means_that_file(tmp_path):
    for name, prompt in (("p[1].jsonl", "mine"), ("p1.jsonl", "not mine"), ("**.jsonl", "stars")):
        (tmp_path / name).write_text(json.dumps({"prompt": prompt}) + "\n")
    assert repo.load_prompts(str(tmp_path / "p[1].jsonl")) == ["mine"]
    assert repo.load_prompts(str(tmp_path / "**.jsonl")) == ["stars"]


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eexe.\u2066\x00"
STEERING = {c for c in HOSTILE if not c.isprintable()}


def test_what_steers_a_terminal_is_spelled_out(run, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{HOSTILE} {i}"}) + "\n" for i in range(40)))
    for out in ("a", "b"):
        code, _, printed = run(*FEW, "--dataset", tmp_path / "p.jsonl", "--sample_every", 1, "--seed", len(out), out=out)
        assert code == 0 and "\\x1b" in printed and not set(printed) & STEERING - {"\r"}  # with which the progress bar begins
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"judge": HOSTILE}))  # settings in which two runs differ stand in the table
    seen = subprocess.run([sys.executable, "tiny_configs/compare.py", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "seen"], cwd=ROOT, capture_output=True, text=True)
    assert seen.returncode == 0 and "\\x1b" in seen.stdout and not set(seen.stdout) & STEERING
    (tmp_path / "bad.py").write_text(f"def score(p, r): raise ValueError({HOSTILE!r})\n")
    code, _, printed = run(*FEW, "--reward_model", f"{tmp_path}/bad.py:score", out="c")
    assert code == 2 and "\\x1b[2J" in printed and not set(printed) & STEERING
