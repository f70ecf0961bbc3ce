# pytest tests/test_readme.py
"""What the README says of the code is so."""
import ast
import re

from conftest import ROOT

import repo

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
    settings = set(repo.Config.__dataclass_fields__) | {"config", "help", "version"}
    assert set(re.findall(r"--([a-z_]+)", README)) <= settings
