# pytest tests/test_house.py
"""The house: imports go down its floors only, in no circle, and never from inside a function."""
import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = ["companions", "repo", "tiny_configs", "plumbing", "kernels"]
FILES = [ROOT / "repo.py", *(path for floor in FLOORS for path in ROOT.glob(f"{floor}/**/*.py"))]


def name_of(path) -> str:
    """kernels/__init__.py is kernels, plumbing/plan.py plumbing.plan."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in FILES}


def modules_in(node: ast.AST) -> set[str]:
    """The project's modules that an import statement names."""
    named = set()
    if isinstance(node, ast.Import):
        named = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            part = f"{node.module}.{alias.name}"
            named.add(part if part in NAMES else node.module)
    return named & NAMES


def imports_of(path) -> set[str]:
    return set().union(*map(modules_in, ast.walk(ast.parse(path.read_text()))))


def floor_of(module: str) -> int:
    return FLOORS.index(module.partition(".")[0])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_and_stand_at_the_top(path):
    module = name_of(path)
    for imported in imports_of(path):
        assert floor_of(imported) >= floor_of(module), f"{module} imports {imported}"
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            assert not set().union(*map(modules_in, ast.walk(function))), function.name


def test_no_circle():
    waiting = {name_of(path): imports_of(path) - {name_of(path)} for path in FILES}
    while waiting:
        free = [module for module, needed in waiting.items() if not needed & waiting.keys()]
        assert free, f"a circle among {sorted(waiting)}"
        for module in free:
            del waiting[module]


def test_only_what_the_design_names_is_at_the_top():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    allowed = {"repo.py", "kernels", "tiny_configs", "plumbing", "companions", "tests",
               "requirements.txt", "README.md", "LICENSE", "runs"}
    assert names - {"__pycache__"} <= allowed


@pytest.fixture(scope="session")
def beside_other_kernels(long_runs):
    """A process that has imported the project beside another package `kernels`, installed as far as
    transformers looks, in a version that it would take: see conftest.py."""
    return long_runs("beside_other_kernels")


def test_another_package_of_the_name_kernels_is_not_taken_for_ours(beside_other_kernels):
    """That the process has ended well is all."""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "tiny_configs.world"),
        ("repo.py", "--help"),
        ("-m", "companions.compare", "--help"),
        ("-m", "kernels.bench", "--help"),
        ("-m", "pytest", "--collect-only", "tests"),
    ],
    ids=" ".join,
)
def test_another_package_of_the_name_kernels_is_not_taken_for_ours_by(tmp_path, command):
    installed = tmp_path / "kernels-0.18.2.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
