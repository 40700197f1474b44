"""The Space as it lies in examples/space, and the words of `c3-hf demo --web`."""

from __future__ import annotations

import ast
import configparser
import sys

import pytest
import yaml
from packaging.requirements import Requirement

from c3_hf.cli import main


def listed(lines):
    stripped = (line.strip() for line in lines.splitlines())
    return sorted(str(Requirement(line)) for line in stripped if line and not line.startswith("#"))


def test_the_space_asks_for_what_the_package_and_its_extra_ask_for(repository):
    settings = configparser.ConfigParser()
    settings.read(repository / "setup.cfg", encoding="utf-8")
    wanted = settings["options"]["install_requires"] + "\n" + settings["options.extras_require"]["demo"]
    assert listed((repository / "examples/space/requirements.txt").read_text("utf-8")) == listed(wanted)


def test_the_front_matter_is_what_a_space_reads(repository):
    _, front, _ = (repository / "examples/space/README.md").read_text("utf-8").split("---\n", 2)
    entries = yaml.safe_load(front)
    assert (entries["sdk"], entries["app_file"], entries["license"]) == ("gradio", "app.py", "apache-2.0")
    assert len(entries["short_description"]) <= 60
    pins = (repository / "constraints.txt").read_text("utf-8").splitlines()
    assert f"gradio=={entries['sdk_version']}" in pins


@pytest.mark.parametrize("name", ["examples/space/app.py", "src/c3_hf/web/app.py"])
def test_the_app_is_short_and_uses_the_public_object(repository, name):
    text = (repository / name).read_text("utf-8")
    assert len(text.splitlines()) < 200
    names = [
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert "C3Pipeline" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--web", "a", "--model", "b"], "`--web` and `--model` both name a model; give one of them"),
        (["--web", "--time-limit", "0"], "`--time-limit` must be a positive number of seconds, got 0.0"),
        (["--web", "--time-limit", "nan"], "`--time-limit` must be a positive number of seconds, got nan"),
        (["--web", "--port", "70000"], "`--port` must be 0 to 65535, got 70000"),
        (["--web", "--host", ""], "`--host` is empty. Give an address, such as 127.0.0.1"),
        (["--web", "--ratio", "8"], "`--ratio` means nothing with `--web`, where the page has a control for it"),
        (["--port", "7860"], "`--port` means nothing without `--web`; add it, or leave this out"),
        (["no-such-file.txt", "--web"], "no-such-file.txt: No such file or directory"),
    ],
)
def test_what_the_page_cannot_be_started_with_is_refused(arguments, message, capsys):
    assert main(["demo", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "c3_hf.web.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--web"]) == 1
    assert 'pip install ".[demo]"' in capsys.readouterr().err
