# pytest tests/test_readme.py
"""What the front page and the longer pages say of the code is so."""

import ast
import re

import pytest
from conftest import ROOT

import repo
from companions import (
    compare,
    guard,
    monitor,
    neurons,
    page,
    score_models,
    shiftdc,
    supervised,
    walk,
    xstest,
)
from companions.shared.command import Settings
from kernels.bench import bench_parser

FRONT = "README.md"
PAGES = [FRONT, *(f"{room}/README.md" for room in ("kernels", "tiny_configs", "plumbing"))]
PAGES += sorted(f"companions/{page.name}" for page in (ROOT / "companions").glob("*.md"))


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def lines_of_definitions(file) -> dict[str, int]:
    """{"function", "Class" or "Class.method": its line}."""
    lines = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            lines |= {f"{node.name}.{method.name}": method.lineno for method in methods}
    return lines


# ---- links


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_line_leads_to_its_function(page):
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)", text_of(page))
    for name, path, line in links:
        definitions = lines_of_definitions((ROOT / page).parent / path)
        assert definitions.get(name) == int(line), f"{name} in {path}"
    every_link = re.findall(r"\.py#L", text_of(page))
    assert len(links) == len(every_link)  # none in another form
    if page == FRONT:
        assert len(links) > 15


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, _ = target.partition("#")
        is_elsewhere = re.match(r"\w+:", target) is not None
        assert is_elsewhere or not path or ((ROOT / page).parent / path).exists(), target


# ---- settings

BENCH = r"kernels\.bench([^`\n]*)"  # and the settings it is called with
TORCHRUN = r"torchrun --.*? repo\.py"  # the settings between are torchrun's own
SHIP = r"python -m tiny_configs\.world --ship"
PIP = r"pip install [^\n`]*"


def settings_in(text: str) -> set[str]:
    return set(re.findall(r"--([a-z_0-9]+)", text))


COMMANDS = (compare, guard, monitor, neurons, page, score_models, shiftdc, supervised, walk, xstest)


def settings_of_companions() -> set[str]:
    classes = [value for module in COMMANDS for value in vars(module).values()
               if isinstance(value, type) and issubclass(value, Settings)]
    return {name for settings in classes for name in settings.__dataclass_fields__}


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_it_names_exists(page):
    text = text_of(page).replace("\\\n", " ")  # a command may go on in the next line
    of_the_bench = {word.lstrip("-") for word in bench_parser("cpu")._option_string_actions}
    assert settings_in(" ".join(re.findall(BENCH, text))) <= of_the_bench

    others = re.sub(f"{BENCH}|{TORCHRUN}|{SHIP}|{PIP}", "", text)
    known = set(repo.Config.__dataclass_fields__) | {"config", "help"} | settings_of_companions()
    assert settings_in(others) <= known


# ---- their size


def test_every_companion_has_a_page_in_the_index():
    index = text_of("companions/README.md")
    for file in (ROOT / "companions").glob("[!_]*.py"):
        assert f"[`{file.stem}`]({file.stem}.md)" in index


def test_the_pages_of_companions_are_short():
    words = [text_of(page).split() for page in PAGES if page.startswith("companions/")]
    assert sum(map(len, words)) <= 3150


def test_the_front_page_is_short_and_narrow():
    lines = text_of(FRONT).splitlines()
    assert len(lines) <= 250
    wide = [n for n, line in enumerate(lines, 1) if len(line) > 140 and not line.startswith("|")]
    assert not wide
