"""README, docs and settings agree with each other and with the code."""

from __future__ import annotations

import configparser
import contextlib
import io
import os
import re
import shlex
import stat
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import c3_hf
from c3_hf.cli import build_parser


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg", encoding="utf-8")
FOLDERS = ("src", "tests", "docs", "examples", "benchmarks", ".github", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".cfg", ".yaml", ".yml", ".txt", ".json", ".jsonl", ".sh", ".html", ".csv", ""}


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def requirements(section: str, key: str) -> list[Requirement]:
    lines = (line.strip() for line in SETTINGS[section][key].splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def text_files():
    # In a second working tree of git, .git is a file that names the place of the first.
    for path in [
        *(path for path in ROOT.iterdir() if path.name != ".git"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")),
    ]:
        if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
            yield path


def test_no_file_names_a_machine_or_a_registry():
    # Put together from parts, so that this file passes its own test.
    folders = "|".join(["work", "root", "opt", "tmp", "home", "Users", "mnt"])
    machine = re.compile(rf"(?<![\w.:/<~$}}-])/(?:{folders})/[\w.-]+")
    registry = re.compile(
        "|".join(["pypi" + r"\.org", "python" + "hosted", "download" + r"\.pytorch", "extra-" + "index-url"])
    )
    wrong = []
    for path in text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in (machine, registry):
            wrong += [f"{path.relative_to(ROOT)}: {match}" for match in pattern.findall(text)]
    assert wrong == []


def test_links_between_documents_lead_somewhere():
    dead = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in DOCUMENTS
        for target in LINK.findall(document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert dead == []


def test_documents_that_the_code_names_exist():
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in text_files()
        if path.suffix in {".py", ".yaml", ".cfg", ".toml"}
        for name in re.findall(
            r"\b(?:docs|examples|benchmarks)/[\w./-]+\.(?:md|py|yaml)\b", path.read_text(encoding="utf-8")
        )
    }
    assert sorted((path, name) for path, name in named if not (ROOT / name).exists()) == []


def test_every_document_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        document = todo.pop()
        reached.add(document)
        targets = LINK.findall(document.read_text(encoding="utf-8"))
        found = {(document.parent / target).resolve() for target in targets if "://" not in target}
        todo += [target for target in found - reached if target.suffix == ".md" and target.is_file()]
    assert [str(document.relative_to(ROOT)) for document in DOCUMENTS if document not in reached] == []


def test_public_names_are_few_sorted_and_documented():
    names = c3_hf.__all__
    assert names == sorted(names)
    assert len(names) <= 15
    documents = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for name in names:
        assert getattr(c3_hf, name).__doc__, name
        assert re.search(rf"`(?:c3_hf\.)?{name}\b", documents) or f"c3_hf.{name}" in documents, name


def test_what_is_visible_in_the_package_is_what_is_public():
    modules = {path.stem for path in (ROOT / "src" / "c3_hf").iterdir() if path.is_dir() or path.suffix == ".py"}
    borrowed = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "Path"}
    visible = {name for name in dir(c3_hf) if not name.startswith("_")}
    assert visible - modules - borrowed == set(c3_hf.__all__)


def test_one_version():
    assert SETTINGS["metadata"]["version"] == "attr: c3_hf.__version__"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest.group(1) == c3_hf.__version__


def test_tested_versions_lie_in_the_supported_ranges():
    supported = requirements("options", "install_requires")
    for extra in SETTINGS["options.extras_require"]:
        supported += requirements("options.extras_require", extra)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin.specifier for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    for requirement in supported:
        if requirement.name in {"c3-hf", "llmlingua"}:
            continue
        assert requirement.name in pins, f"constraints.txt has no tested version of {requirement.name}"
        version = str(pins[requirement.name]).removeprefix("==")
        assert requirement.specifier.contains(Version(version)), f"{requirement} does not allow {version}"


def test_every_dependency_says_what_it_is_for():
    """In setup.cfg a comment stands above each requirement of the package and each extra."""
    lines = (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()
    for extra in SETTINGS["options.extras_require"]:
        assert lines[lines.index(f"{extra} =") - 1].startswith("# "), extra
    for requirement in requirements("options", "install_requires"):
        line = next(number for number, line in enumerate(lines) if re.match(rf"    {requirement.name}\W", line))
        assert lines[line - 1].startswith("    # "), requirement.name


def test_continuous_integration_runs_the_commands_of_the_readme_at_both_ends():
    script = ROOT / ".ci" / "run"
    assert os.stat(script).st_mode & stat.S_IXUSR
    text = script.read_text(encoding="utf-8")
    pattern = re.search(r"command=\$\(grep -E '([^']+pytest[^']*\$)' README\.md\)", text).group(1)
    assert len(re.findall(pattern, README, flags=re.MULTILINE)) == 1
    demo = re.search(r"command=\$\(grep -E '([^']+demo\$)' README\.md\)", text).group(1)
    assert len(re.findall(demo, README, flags=re.MULTILINE)) == 1
    oldest = re.search(r"oldest_transformers=(\S+)", text).group(1)
    (transformers,) = (r for r in requirements("options", "install_requires") if r.name == "transformers")
    (bound,) = (specifier.version for specifier in transformers.specifier if specifier.operator == ">=")
    assert Version(oldest).release[:2] == Version(bound).release[:2]


def test_continuous_integration_tries_the_newest_releases_and_does_so_every_week():
    """The newest end installs without the constraints, and leaves torch as it is: a newer one may be gigabytes."""
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (upgrade,) = (line for line in text.splitlines() if "--upgrade-strategy eager" in line)
    assert "constraints" not in upgrade
    assert '"torch==$torch"' in upgrade
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True]["schedule"]
    ends = workflow["jobs"]["ends"]["strategy"]["matrix"]["end"]
    assert ends == re.search(r"ends=\(([a-z ]+)\)", text).group(1).split()


def test_the_two_commands_are_single_lines_that_install_what_was_tested():
    commands = [block.strip() for block in code_blocks(README, "bash") if block.startswith("python3 -m venv")]
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert "-c constraints.txt" in command


def documented_commands():
    """The words of every `c3-hf` command in a block of a page, behind and in front of pipes."""
    for document in DOCUMENTS:
        for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL):
            block = re.sub(r"\\\n *", "", block)
            for command in re.findall(r"(?:^|\| )c3-hf (\w.*?)(?= \||  #|$)", block, flags=re.MULTILINE):
                yield pytest.param(shlex.split(command.split(">")[0]), id=f"{document.stem}: {command}")


@pytest.mark.parametrize("words", list(documented_commands()))
def test_the_command_takes_what_the_pages_show(words):
    assert build_parser().parse_args(words).run


def test_the_snippet_of_the_readme_prints_what_the_readme_shows():
    (snippet,) = code_blocks(README, "python")
    (shown,) = code_blocks(README, "text")
    assert len(snippet.strip().splitlines()) <= 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    assert printed.getvalue() == shown


@pytest.mark.parametrize("name", ["modeling", "conversion"])
def test_the_folders_at_the_root_are_links_into_the_package(name):
    assert os.readlink(ROOT / name) == f"src/c3_hf/{name}"


# What other libraries and protocols call so.
FOREIGN = re.compile(
    r"\b(torch|transformers|huggingface_hub)\.[\w.]*utils"
    r"|decompressobj|\w+\.decompress\(|prefill_chunk_size|chunked prefill"
)


def test_words_the_glossary_does_without_are_not_used(repository):
    page = (repository / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.search(r"^Not used for these(.+?)\. What other libraries", page, re.MULTILINE | re.DOTALL)
    words = re.findall(r"\*([^*]+)\*", listed[1])
    assert len(words) > 5
    pattern = re.compile(rf"(?<![a-z])({'|'.join(words)})(s|d|ed|ing)?(?![a-z])".replace(" ", r"[\s_]"), re.IGNORECASE)
    found = []
    pages = [*(repository / "docs").glob("*.md"), repository / "README.md", *(repository / "src").rglob("*.py")]
    for path in pages:
        # OpenAI's stream comes in chunks; the log speaks of what is gone.
        if "serving" in str(path.relative_to(repository)) or path.name == "log.md":
            continue
        text = path.read_text(encoding="utf-8").replace(listed[0], "")
        found += [f"{path.name}: {match[0]!r}" for match in pattern.finditer(FOREIGN.sub("", text))]
    assert found == []
