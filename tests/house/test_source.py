"""What the style guide asks of every file of the library, where a program can see it."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[2] / "src" / "c3_hf"
FILES = sorted(SOURCE.rglob("*.py"))
LIBRARY = [path for path in FILES if path.relative_to(SOURCE).parts[0] != "cli"]
MAX_MODULE, MAX_FUNCTION = 600, 60


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(SOURCE)}:{node.lineno}"


def functions(tree: ast.Module):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_modules_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {str(path): length for path, length in lengths.items() if length > MAX_MODULE} == {}


def test_functions_are_short():
    """Lines of code: a docstring may be as long as its table of shapes needs."""
    long = []
    for path in FILES:
        for node in functions(parse(path)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            if length > MAX_FUNCTION:
                long.append(f"{where(path, node)} {node.name} has {length} lines")
    assert long == []


def test_the_library_raises_and_logs_instead_of_asserting_and_printing():
    wrong = []
    for path in LIBRARY:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Assert):
                wrong.append(f"{where(path, node)} assert")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{where(path, node)} print")
    assert wrong == []


def test_no_error_is_swallowed():
    wrong = []
    for path in FILES:
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "BaseException")
            broad = broad or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            raises_again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if silent or (broad and not raises_again):
                wrong.append(where(path, node))
    assert wrong == []


def test_nothing_is_left_to_do():
    wrong = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            marked = token.type == tokenize.COMMENT and any(word in token.string for word in ("TODO", "FIXME", "XXX"))
            if marked or (token.type == tokenize.NAME and token.string == "NotImplementedError"):
                wrong.append(f"{path.relative_to(SOURCE)}:{token.start[0]}")
    assert wrong == []


def test_modules_and_public_functions_say_what_they_are():
    silent = []
    for path in FILES:
        tree = parse(path)
        if ast.get_docstring(tree) is None and path.name != "__init__.py":
            silent.append(str(path.relative_to(SOURCE)))
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                silent.append(f"{where(path, node)} {node.name}")
    assert silent == []


@pytest.mark.parametrize("word", ["utils", "helpers", "manager", "misc", "v2"])
def test_no_module_has_a_name_that_says_nothing(word):
    assert [path for path in FILES if word in path.stem.split("_")] == []


def test_hub_files_keep_annotations_evaluated():
    """Transformers reads them at run time, so the future import that makes strings of them stays out."""
    files = [path for path in FILES if path.stem.endswith("_c3")]
    assert files
    assert [path.name for path in files if "from __future__" in path.read_text(encoding="utf-8")] == []
