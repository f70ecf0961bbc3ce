# pytest tests/test_readme.py
"""What the README says of the code is so."""
import ast
import re

from conftest import ROOT

import repo
from kernels.bench import bench_parser

README = (ROOT / "README.md").read_text()


def test_every_link_to_a_line_leads_to_its_function():
    definitions = {}
    for node in ast.walk(ast.parse((ROOT / "repo.py").read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions.setdefault(node.name, node.lineno)
            definitions |= {f"{node.name}.{part.name}": part.lineno for part in node.body if isinstance(part, ast.FunctionDef)}
    links = re.findall(r"\[`([\w.]+)`\]\(repo\.py#L(\d+)\)", README)
    assert len(links) > 15 and all(definitions[name] == int(line) for name, line in links)


def test_every_setting_it_names_exists():
    settings = set(repo.Config.__dataclass_fields__) | {"config", "help"}
    bench = r"kernels\.bench([^`\n]*)"
    torchruns = r"torchrun --.*? repo\.py"  # the flags between are torchrun's own
    assert set(re.findall(r"--([a-z_0-9]+)", re.sub(f"{bench}|{torchruns}", "", README))) <= settings | {"algos", "seeds", "study", "out", "harmful_share"}  # compare.py's
    assert set(re.findall(r"--([a-z_0-9]+)", " ".join(re.findall(bench, README)))) <= {option.lstrip("-") for option in bench_parser("cpu")._option_string_actions}
