"""Imports go one way, and the Hub files stand alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[2] / "src" / "c3_hf"

# A package of the library, or a module at its root -> the packages and modules of the library it may import. A place
# may be empty: `pipeline`, `serving` and `files` have one before they are written.
MAY_IMPORT = {
    "files": set(),
    "options": set(),
    "modeling": set(),
    "_auto_classes": {"modeling"},
    "conversion": {"modeling", "files"},
    "data": {"modeling", "files"},
    "latents": {"modeling", "files", "options"},
    "pipeline": {"modeling", "latents", "files", "options"},
    "training": {"modeling", "data", "latents", "pipeline", "files"},
    "evaluation": {"modeling", "data", "latents", "pipeline", "files"},
    "serving": {"modeling", "latents", "pipeline", "files"},
    "web": {"modeling", "data", "latents", "pipeline", "evaluation", "files", "options"},
    "cli": {
        "modeling",
        "conversion",
        "data",
        "latents",
        "pipeline",
        "training",
        "evaluation",
        "serving",
        "web",
        "files",
        "options",
    },
}
# What needs no place: the version for records, the folder of the bundled model.
ROOT_NAMES = {"__version__", "tiny_model_path"}
HUB_FILES = sorted((SOURCE / "modeling").glob("*_c3.py"))
# tokenizers is a requirement of transformers itself.
HUB_IMPORTS = {"tokenizers", "torch", "transformers"}


def imported_modules(path: Path) -> list[str]:
    """Absolute dotted names of everything a module imports, at any depth; what it does as a script is left out."""
    package = ("c3_hf", *path.relative_to(SOURCE).parent.parts)
    statements = [node for node in parse(path).body if not is_script_part(node)]
    names = []
    for node in ast.walk(ast.Module(statements, [])):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parts, node.module] if node.module else parts)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_script_part(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def layer_of(path: Path) -> str:
    """The package, or the module at the root, that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


LAYERS = sorted({layer_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"})


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_lies_below_it(layer):
    assert layer in MAY_IMPORT, f"{layer} has no place among the layers"
    allowed = MAY_IMPORT[layer] | {layer} | ROOT_NAMES
    wrong = [
        f"{path.relative_to(SOURCE)}: {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if layer_of(path) == layer
        for name in imported_modules(path)
        if name.startswith("c3_hf.") and name.split(".")[1] not in allowed
    ]
    assert wrong == []


def test_imports_go_one_way():
    """The table itself has no circle: what a layer may import is laid before the layer."""
    laid = set()
    for layer in MAY_IMPORT:
        assert MAY_IMPORT[layer] <= laid, layer
        laid.add(layer)
    assert {"modeling", "cli"} <= set(LAYERS)


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_import_the_standard_library_torch_transformers_and_siblings(path):
    siblings = {hub_file.stem for hub_file in HUB_FILES}
    wrong = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            # `from .sibling import name`, one level deep: the only relative form that remote code loads everywhere.
            roots = set() if node.level == 1 and node.module in siblings else {ast.unparse(node)}
        elif isinstance(node, ast.ImportFrom):
            roots = {node.module.split(".")[0]}
        else:
            continue
        wrong += sorted(roots - HUB_IMPORTS - sys.stdlib_module_names)
    assert wrong == []


@pytest.mark.parametrize("name", ["configuration_c3", "modeling_c3", "processing_c3"])
def test_files_of_auto_classes_import_themselves_all_that_they_need(name):
    """From a local folder transformers 4.57 copies what a file imports, and not what that imports in turn."""

    def siblings(stem: str) -> set[str]:
        tree = parse(SOURCE / "modeling" / f"{stem}.py")
        return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}

    direct = siblings(name)
    needed = set(direct)
    while more := set().union(*map(siblings, needed)) - needed:
        needed |= more
    assert needed - {name} == direct


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_have_no_text_that_reads_like_an_import(path):
    """Remote code finds relative imports by a regular expression, in docstrings too."""
    tree = parse(path)
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    lines = [line.strip() for string in strings for line in string.splitlines()]
    assert [line for line in lines if line.startswith(("import .", "from ."))] == []


def test_nothing_imports_the_links_at_the_root_as_modules(repository):
    for link in ("modeling", "conversion"):
        assert (repository / link).is_symlink()
        assert (repository / link).resolve() == (SOURCE / link).resolve()
    files = [
        *SOURCE.rglob("*.py"),
        *(path for folder in ("tests", "examples", "benchmarks") for path in (repository / folder).rglob("*.py")),
    ]
    # Most files need no parsing to see that they do not.
    line = re.compile(r"\b(?:from|import)\b.*(?<!\.)\b(?:modeling|conversion)\b")
    wrong = []
    for path in files:
        if not line.search(path.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            wrong += [f"{path}: {name}" for name in names if name.split(".")[0] in {"modeling", "conversion"}]
    assert wrong == []


def test_commands_load_with_the_standard_library_alone():
    """`c3-hf --help` answers before torch is loaded: command modules import what is heavy inside `run`."""
    wrong = []
    for path in sorted((SOURCE / "cli").glob("*.py")):
        for statement in parse(path).body:
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
                names = [statement.module]
            else:
                continue
            wrong += [
                f"{path.name}: {name}"
                for name in names
                if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith("c3_hf.cli")
            ]
    assert wrong == []


@pytest.mark.slow
def test_importing_the_package_adds_less_than_a_fifth_to_importing_the_auto_classes():
    """Both are timed in one fresh process, so that the machine's load falls on both."""
    code = """
import time
start = time.process_time()
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
middle = time.process_time()
import c3_hf
print((time.process_time() - middle) / (middle - start))
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE.parent), "PATH": ""},
    )
    assert float(process.stdout) < 0.2


# Each is a fresh process that loads everything; tests/cli/test_main.py has the quick part, that nothing loads torch.
@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    ["import c3_hf", "from c3_hf.modeling.configuration_c3 import C3Config", "from c3_hf import compress"],
)
def test_the_auto_classes_know_c3_whatever_is_imported_first(first):
    code = f"""
import importlib.util, sys
import c3_hf.cli
assert not {{"torch", "transformers"}} & set(sys.modules)
# To ask whether transformers is there is not to import it.
importlib.util.find_spec("transformers")
{first}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
config = AutoConfig.for_model("c3")
print(type(config).__module__, AutoModel._model_mapping[type(config)].__name__)
print(c3_hf.C3Config is type(config), AutoModelForCausalLM._model_mapping[type(config)].__name__)
print(sorted(set(c3_hf.__all__) - set(dir(c3_hf))), type(sys.modules["transformers"].__spec__.loader).__name__)
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE.parent), "PATH": "", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdout.splitlines() == [
        "c3_hf.modeling.configuration_c3 C3ForConditionalGeneration",
        "True C3ForConditionalGeneration",
        "[] SourceFileLoader",
    ]


def test_a_public_name_that_is_none_is_an_attribute_error():
    import c3_hf

    with pytest.raises(AttributeError, match=r"module 'c3_hf' has no attribute 'nothing'"):
        _ = c3_hf.nothing
