"""Every option counts: what it changes, what makes an output out of date, and what out of range it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch

from c3_hf import CompressedContext, CompressionOptions, compress
from c3_hf.cli import build_parser, main
from c3_hf.cli.compress import options_of


# What the command was called with, each time differing from the time before.
RUNS = [
    ["--segment-length", "40"],
    [],
    ["--segment-length", "41"],
    ["--latent-dtype", "float32"],
    ["--verify"],
    ["--exact", "--no-check"],
    ["--exact"],
    ["--exact", "--exact-margin", "3"],
    ["--exact", "--verify"],
    ["--target-fidelity", "0.5"],
    ["--target-fidelity", "0.6"],
    ["--dtype", "bfloat16"],
]


def test_every_option_that_changes_the_result_makes_it_anew(run, here, capsys):
    (here / "in").mkdir()
    (here / "in" / "a.txt").write_bytes(b"Some text of more than forty tokens, one for each byte of it.\n")
    (here / "in" / "b.txt").write_bytes(b"Another.")
    for options in RUNS:
        assert run("compress", "in", "-o", "out", *options) == 0
        assert "up to date" not in capsys.readouterr().err, options
    assert run("compress", "in", "-o", "out", *RUNS[-1], "--batch-size", "1") == 0
    assert capsys.readouterr().err.count("up to date") == 2


def test_the_default_segment_length_by_name_is_up_to_date(run, here, model, capsys):
    (here / "b.txt").write_bytes(b"Another.")
    assert run("compress", "a.txt", "b.txt", "-o", "out") == 0
    capsys.readouterr()
    length = CompressedContext.load(here / "out" / "a.txt.c3").header.segment_length
    assert run("compress", "a.txt", "b.txt", "-o", "out", "--segment-length", length) == 0
    assert capsys.readouterr().err.count("up to date") == 2


def test_an_unfinished_run_goes_on_with_its_own_options_only(model, processor, tmp_path):
    class Killed(Exception):
        pass

    def pieces():
        yield from itertools.repeat("Some words of a text. ", 40)
        raise Killed

    options = {"output": tmp_path / "a.c3", "segment_length": 16, "batch_size": 1}
    with pytest.raises(Killed):
        compress(pieces(), model, processor, **options)
    assert (tmp_path / "a.c3.journal").exists()
    for other in ({"latent_dtype": torch.float32}, {"verify": True}, {"exact": True, "exact_check": False}):
        with pytest.raises(ValueError, match=r"holds an unfinished run with other settings"):
            compress("Some words of a text. " * 40, model, processor, **options, **other)
    compress("Some words of a text. " * 40, model, processor, **options)


def test_the_options_of_the_command_are_those_of_compressing():
    fields = {field.name: field.default for field in dataclasses.fields(CompressionOptions)}
    # What is not given is the field's own default; batches have the same size in every command.
    assert options_of(build_parser().parse_args(["compress", "a.txt"])) == {"batch_size": fields["batch_size"]}
    values = [10, 40, "int8", True, True, 0.5, 20, 1.5, False, 3]
    given = dict(zip(fields, values, strict=True))
    words = "--ratio 10 --segment-length 40 --latent-dtype int8 --verify --exact --target-fidelity 0.5"
    words += " --min-segment-length 20 --exact-margin 1.5 --no-check --batch-size 3"
    assert options_of(build_parser().parse_args(["compress", "a.txt", *words.split()])) == given


def test_the_help_of_an_option_is_what_its_class_says_of_it(capsys):
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--latent-dtype {float32,bfloat16,int8} how latents are stored" in shown
    assert "(default: bfloat16)" in shown
    assert "Only with --exact (default: on)" in shown
    assert "`" not in shown


@pytest.mark.parametrize("command", ["demo", "compress", "restore", "inspect", "ask", "convert", "new", "evaluate"])
def test_one_word_for_what_is_computed_in(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--dtype \{[\w,]+\} dtype of the model's weights, in which it computes", shown)


def test_the_margin_of_exactness_is_an_option(run, here):
    for margin in ("0", "1.5"):
        assert run("compress", "a.txt", "--exact", "--exact-margin", margin) == 0
        assert CompressedContext.load(here / "a.txt.c3").header.exact_margin == float(margin)


@pytest.mark.parametrize("margin", ["-1", "nan", "inf"])
def test_a_margin_out_of_range(margin, run, here, capsys):
    assert run("compress", "a.txt", "--exact", f"--exact-margin={margin}") == 1
    assert "`--exact-margin` must not be negative" in capsys.readouterr().err
    assert not (here / "a.txt.c3").exists()


@pytest.mark.parametrize("size", ["0", "-1"])
@pytest.mark.parametrize(
    "words",
    [
        ["compress", "a.txt"],
        ["restore", "a.c3", "-o", "b.txt"],
        ["inspect", "a.c3", "--text", "a.txt"],
        ["ask", "a.c3", "Who?"],
        ["demo"],
    ],
    ids=lambda words: words[0],
)
def test_a_batch_size_below_one(words, size, run, here, capsys):
    assert run("compress", "a.txt", "-o", "a.c3") == 0
    capsys.readouterr()
    assert run(*words, f"--batch-size={size}") == 1
    assert f"`--batch-size` must be at least 1, got {size}." in capsys.readouterr().err
    assert not (here / "b.txt").exists()


def test_numbers_below_one(run, here, capsys):
    (here / "a.c3").write_bytes(b"x")
    assert run("ask", "a.c3", "Who?", "--max-new-tokens", "0") == 1
    assert "`--max-new-tokens` must be at least 1, got 0" in capsys.readouterr().err
    assert main(["report", "run", "--receipts", "0"]) == 1
    assert "`--receipts` must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("output", [[], ["-o", "b.txt"]])
def test_strict_gives_out_what_is_exact_or_nothing(output, run, here, capfdbinary):
    text = (here / "a.txt").read_bytes()
    assert run("compress", "a.txt", "-o", "lossy.c3") == 0
    assert run("compress", "a.txt", "-o", "exact.c3", "--exact") == 0
    capfdbinary.readouterr()
    assert run("restore", "lossy.c3", *output, "--strict") == 1
    shown = capfdbinary.readouterr()
    assert b"lossy.c3: 0 of 1 segments exact, and with --strict nothing else is given out" in shown.err
    assert shown.out == b""
    assert not (here / "b.txt").exists()
    assert run("restore", "exact.c3", *output, "--strict") == 0
    assert ((here / "b.txt").read_bytes() if output else capfdbinary.readouterr().out) == text
