"""The house rules that a linter of imports does not see: sizes that a reader can hold."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "timm_tickets"
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_no_folder_has_more_than_16_modules():
    folders = {path.parent for path in MODULES}
    counts = {f"{folder.relative_to(PACKAGE)}": len([*folder.glob("*.py")]) for folder in folders}
    assert {name: count for name, count in counts.items() if count > 16} == {}


@pytest.mark.parametrize(("under", "most"), [("", 350), ("methods", 120)])
def test_no_module_is_longer_than_a_reader_can_hold(under, most):
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lengths.items() if name.startswith(under) and count > most} == {}


def test_no_function_is_longer_than_70_lines():
    long = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body  # a docstring is no code
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > 70:
                    long[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert long == {}


def test_methods_hold_nothing_by_hand():
    """What a round ended with is the pruner's to let go of, and what is split or averaged is asked of run or subnet."""
    found = {}
    for path in (PACKAGE / "methods").rglob("*.py"):
        text = path.read_text()
        words = re.findall(r"\.clear\(\)|^ *del |DTensor|\brank\b|world_size|all_reduce", text, re.MULTILINE)
        if words:
            found[path.name] = words
    assert found == {}
