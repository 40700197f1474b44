"""The benchmarks of compressed contexts and of restoring by ratio run at toy size, on a model with local latents."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch
from benchmarks.finding import proportion_interval
from benchmarks.latents_setup import restore_blocks
from benchmarks.restoring_by_ratio import KINDS, RANDOM, held_out_items, pieces_of

from benchmarks import (
    c3_tiny_card,
    finding,
    latents_exact,
    latents_fidelity,
    latents_kill,
    latents_questions,
    latents_scaling,
    latents_target,
    restoring_by_ratio,
)
from c3_hf import C3Pipeline
from c3_hf.files import write_json
from factories import NUM_LATENTS, make_model, make_processor


STRIDE = 20
WORDS = "The keeper of the light counted the ships twice, as his father had. It rained for a week. "


@pytest.fixture(scope="module")
def pipe():
    return C3Pipeline(make_model(10, latent_stride=STRIDE, local_latents=True), make_processor())


@pytest.fixture(scope="module")
def model_path(pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("strided")
    pipe.model.save_pretrained(folder)
    pipe.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two records of each kind, and a book."""
    folder = tmp_path_factory.mktemp("data")
    kinds = {(file, kind or "any", lang) for _, file, kind, lang in KINDS}
    kinds |= {("random.jsonl.gz", "random_hex", "none"), ("edge.jsonl.gz", "edge", "none")}
    for name in sorted({file for file, *_ in kinds}):
        rows = [
            {"id": f"{kind}-{number}", "kind": kind, "lang": lang, "text": f"{kind} {number}. {WORDS * 3}"}
            for file, kind, lang in sorted(kinds)
            if file == name
            for number in range(2)
        ]
        write_lines(folder / "eval" / name, rows)
    book = {"title": "A book", "source": "networkx", "text": WORDS * 2000}
    write_lines(folder / "long" / "books_and_code.jsonl.gz", [book])
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def measured(benchmark, data, model_path, tmp_path, *arguments) -> tuple[int, list[dict]]:
    """Status and rows of one benchmark."""
    common = ["--data", str(data), "--model", model_path, "--output", str(tmp_path), "--allow-changes", *arguments]
    status = benchmark.main(common)
    (path,) = tmp_path.glob("latents_*.json")
    return status, json.loads(path.read_text(encoding="utf-8"))["measurements"]


def test_a_block_has_the_least_stride_that_covers_its_text_and_the_largest_there_is(pipe, monkeypatch):
    seen, ids = {}, pipe.processor.tokenize_context
    monkeypatch.setattr(
        pipe.restorer,
        "generate",
        lambda latents, budget, strides: seen.update(strides=strides) or [ids("a"), ids("b"), ids("c")],
    )
    lengths = (NUM_LATENTS, 3 * NUM_LATENTS + 1, 2 * STRIDE * NUM_LATENTS)
    blocks = restore_blocks(pipe, [ids("a") * length for length in lengths])
    assert seen["strides"].tolist() == [1, 4, STRIDE]
    assert [len(block.margins) for block in blocks] == [length + 1 for length in lengths]
    assert [(block.new_ids, block.text) for block in blocks] == [(ids(text), text) for text in "abc"]


def test_a_block_is_measured_as_compressing_measures_it(pipe):
    text = WORDS[:50]
    (block,) = restore_blocks(pipe, [pipe.processor.tokenize_context(text)])
    context = pipe.compress(text, latent_dtype="float32", verify=True)
    torch.testing.assert_close(block.margins, context.segment_margins(0).float(), atol=2e-2, rtol=1e-2)
    assert block.text == pipe.restore(context).text


def test_pieces_are_those_of_all_documents_before_the_next_of_one(pipe):
    records = [{"id": "a", "text": "a" * 25}, {"id": "b", "text": "b" * 11}, {"id": "c", "text": "c" * 10}]
    pieces = list(pieces_of(records, pipe.processor, 10))
    # The last piece of a document may be shorter than asked for, and is left out.
    assert pieces[:3] == [("a", "a" * 10), ("b", "b" * 10), ("a/1", "a" * 10)]
    # Then those that begin half a piece further on.
    assert pieces[3:] == [("a+5", "a" * 10)]


def test_restoring_by_ratio_measures_every_kind_and_writes_what_the_card_shows(
    pipe, model_path, data, tmp_path, monkeypatch
):
    items = list(held_out_items(data / "eval", pipe.processor, (4, 40), 3))
    assert {item.kind for item in items} == {RANDOM, *(kind for kind, *_ in KINDS)}
    lengths = {(item.kind, item.ratio): len(pipe.processor.tokenize_context(item.text)) for item in items}
    assert all(lengths[kind, ratio] == ratio * NUM_LATENTS for kind, *_ in KINDS for ratio in (4, 40))
    assert all(0 < lengths[RANDOM, ratio] <= ratio * NUM_LATENTS for ratio in (4, 40))
    arguments = ["--data-dir", str(data / "eval"), "--model", model_path, "--output", str(tmp_path / "measured")]
    monkeypatch.setattr(
        "sys.argv", ["restoring_by_ratio", *arguments, "--ratios", "4", "40", "--limit", "2", "--allow-changes"]
    )
    restoring_by_ratio.main()
    summary = json.loads((tmp_path / "measured" / "summary.json").read_text(encoding="utf-8"))
    assert [row["num_items"] for row in summary["restoring"]] == [2] * 2 * (len(KINDS) + 1)
    assert "answering" not in summary  # the model declares no prompt for it
    for row in summary["restoring"]:
        for name in ("char_precision", "exact", "teacher_forced", "free_running"):
            low, high = row["intervals"][name]
            assert 0 <= low <= row[name] <= high <= 1
    # One token a byte here, so that characters a latent are the ratio.
    assert summary["restoring"][0]["characters_a_latent"] == 4

    (tmp_path / "measured" / "log.jsonl").write_text('{"seconds": 90.0}\n{"seconds": 120.0}\n{"seconds": 60.0}\n')
    for log, *_ in c3_tiny_card.PARTS[1:]:
        (tmp_path / "measured" / log).write_text('{"seconds": 330.0}\n')
    monkeypatch.setattr(c3_tiny_card, "RESULTS", tmp_path / "measured")
    monkeypatch.setattr(c3_tiny_card, "AGAIN", {tmp_path / "measured": "all of it with other seeds"})
    other = json.loads(json.dumps(summary))
    other["restoring"][0] |= {"char_precision": 0.125, "exact": 0.5}
    (tmp_path / "c3-other").mkdir()
    (tmp_path / "c3-other" / "summary.json").write_text(json.dumps(other), encoding="utf-8")
    columns = {"seed 4": "measured", "seed 5": "c3-other", "their mean": "measured"}
    monkeypatch.setattr(c3_tiny_card, "LAST_PART", {head: tmp_path / name for head, name in columns.items()})
    stretches = [
        {"kind": "English fiction", "ratio": 40, "by_place_from_the_end": [1.0] * 20 + [0.1] * 20},
        {"kind": "tables", "ratio": 40, "by_place_from_the_end": [0.5] * 20 + [0.0] * 20},
        {"kind": "tables", "ratio": 24, "by_place_from_the_end": [1.0] * 20 + [0.0] * 4},
    ]
    forgetting = json.loads(json.dumps(summary))
    for row in forgetting["restoring"]:
        row |= {"ratio": {4: 24, 40: 40}[row["ratio"]], "accuracy_by_position": [0.25] * 5 + [0.75] * 5}
    (tmp_path / "c3-forty").mkdir()
    write_json(tmp_path / "c3-forty" / "summary.json", forgetting)
    write_json(tmp_path / "c3-forty" / "places.json", {"stretches": stretches})
    (tmp_path / "c3-forty" / "log.jsonl").write_text('{"seconds": 1800.0}\n')
    monkeypatch.setattr(c3_tiny_card, "FORTY", tmp_path / "c3-forty")
    folder = Path(model_path)
    c3_tiny_card.write_card(folder, ["one GPU", *["one core"] * (len(c3_tiny_card.PARTS) - 1)])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| `c3_tiny.yaml` | all parameters, from random weights | 3.0 | one GPU | `log.jsonl` |" in card
    assert card.count("| 5.5 | one core |") == len(c3_tiny_card.PARTS) - 1
    assert "| English fiction (N=2) | " in card
    assert 'prompts other than "Repeat the text: " get no' in card
    assert "of all of it with other seeds. Its weights are not shipped, its record" in card
    assert "What it finds" not in card
    told = " ".join(card.split("## How it forgets")[1].split("## How it was trained")[0].split())
    assert "(`c3_tiny_forty.yaml`, 30 minutes of two cores; a block has 16 latents there and 640 positions" in told
    assert "| tables | 20.0 | 10.0 | " in told
    assert "At 40x 75% of the last 20 tokens of a stretch come back, and 5% of those before them," in told
    assert "of the first half of English fiction 25% come back free running at 40x, of the second 75%." in told
    assert json.loads((folder / "curve.json").read_text(encoding="utf-8"))["weights"] == summary["weights"]
    lines = c3_tiny_card.last_part(4).splitlines()
    assert "(in `benchmarks/results`: `measured`, `c3-other`, `measured`)" in lines[1]
    assert lines[3:5] == ["| at 4x | seed 4 | seed 5 | their mean |", "|---|---|---|---|"]
    assert len(lines) == 5 + len(KINDS) + 1  # the kinds at 4x, and none of those at 40x
    first, second, mean = lines[5].split(" | ")[1:]
    assert second == "12.50%, 50% whole of 2"
    assert first == mean.removesuffix(" |") != second


def test_every_part_of_the_training_has_its_machine_and_its_recipe():
    assert all((c3_tiny_card.ROOT / "examples" / "recipes" / recipe).is_file() for _, recipe, _ in c3_tiny_card.PARTS)
    with pytest.raises(ValueError):
        c3_tiny_card.parts_table(["one GPU"])


PLACES = "One two three four five six seven eight nine ten eleven twelve. "


@pytest.fixture
def finder(pipe, monkeypatch):
    """Goes on as the text does; the contexts and the words that were given."""
    seen: list[tuple[list[str], str]] = []

    def go_on(asked, contexts, given, max_new_tokens):
        assert asked is pipe
        seen.append((contexts, given))
        (context,) = [text for text in contexts if given in text]
        # As generating does, the reply ends in the middle of a word.
        return context.partition(given)[2][:max_new_tokens]

    monkeypatch.setattr(finding, "go_on", go_on)
    return seen


def test_places_are_asked_for_by_three_words_and_the_words_behind_them_counted(pipe, finder, monkeypatch):
    row = finding.measure_places(pipe, [PLACES * 2, PLACES * 3], 16, 5)
    assert row == {
        "ratio": 16,
        "places": 5,
        "next_word": 1.0,
        "next_word_interval": proportion_interval(5, 5),
        "next_4_words": 1.0,
    }
    assert all(len(given.split()) == 3 and given == given.strip() for _, given in finder)
    # One token a byte.
    assert all([len(context)] == [16 * NUM_LATENTS] for (context,), _ in finder)
    monkeypatch.setattr(finding, "go_on", lambda *_: " nowhere")
    assert finding.measure_places(pipe, [PLACES * 3], 16, 5)["next_word"] == 0


def test_texts_without_room_for_a_place_are_refused(pipe):
    with pytest.raises(ValueError, match="pieces of 4 tokens hardly ever have 7 words"):
        finding.measure_places(pipe, [PLACES], 1, 5)


def test_a_next_word_is_right_to_the_letter(pipe, finder, monkeypatch):
    right = finding.go_on
    monkeypatch.setattr(finding, "go_on", lambda *asked: f"{right(*asked).split()[0]} nowhere")
    row = finding.measure_places(pipe, [PLACES * 3], 16, 5)
    # Without its blank it is another word.
    assert (row["next_word"], row["next_4_words"]) == (0, 0)
    monkeypatch.setattr(finding, "go_on", lambda *asked: f" {right(*asked).split()[0]} nowhere")
    row = finding.measure_places(pipe, [PLACES * 3], 16, 5)
    assert (row["next_word"], row["next_4_words"]) == (1, 0)


def test_a_question_is_answered_by_the_rest_of_its_sentence_and_nothing_else(pipe, finder, monkeypatch):
    right = finding.go_on
    monkeypatch.setattr(finding, "go_on", lambda *asked: right(*asked).partition(". ")[0] + ".")
    rows = finding.measure_questions(pipe, [PLACES * 3], 12, 40, "answer_segments")
    assert sum(row["questions"] for row in rows) == 12
    assert {(row["prose_tokens"], row["accuracy"]) for row in rows} == {(40, 1.0)}
    assert {len(contexts) for contexts, _ in finder} <= {2, 3, 4}
    monkeypatch.setattr(finding, "go_on", lambda *asked: right(*asked).partition(". ")[0] + ". And")
    assert {row["accuracy"] for row in finding.measure_questions(pipe, [PLACES * 3], 12, 40)} == {0.0}


def test_the_card_of_a_model_that_finds_shows_every_ratio_and_length(pipe, finder, data, monkeypatch):
    # Replies of the toy are none: only what is asked, and what the card makes of it, is looked at.
    monkeypatch.setattr(finding, "go_on", lambda *_: "")
    monkeypatch.setattr(restoring_by_ratio, "ASKED_RATIOS", (16, 20))
    options = argparse.Namespace(data_dir=data / "eval", places=2, questions=12)
    measured = restoring_by_ratio.finding(pipe, options)
    assert [(row["kind"], row["ratio"]) for row in measured["places"]] == [
        (kind[0], ratio) for kind in restoring_by_ratio.ASKED_KINDS for ratio in (16, 20)
    ]
    card = c3_tiny_card.what_it_finds(measured, pipe.processor)
    assert "| English fiction | 0% [0, 66], 0% | 0% [0, 66], 0% |" in card
    for length in finding.PROSE_TOKENS:
        for facts in (1, 2, 3):
            assert f"| {length} | {facts} | 0% [0, " in card


def test_a_reply_is_begun_and_its_contexts_have_the_least_stride_that_covers_them(pipe, monkeypatch):
    seen = {}

    def generate(**inputs):
        seen.update(inputs)
        more = torch.tensor([pipe.processor.tokenize_context(" here")])
        return torch.cat([inputs["input_ids"], more], dim=1)

    monkeypatch.setattr(pipe.model, "generate", generate)
    contexts = ["a" * NUM_LATENTS, "b" * (NUM_LATENTS + 1)]
    assert finding.go_on(pipe, contexts, "What was", 9) == " here"
    assert seen["context_strides"].tolist() == [[1, 2]]
    assert (seen["max_new_tokens"], seen["do_sample"]) == (9, False)
    assert pipe.processor.tokenizer.decode(seen["input_ids"][0]).endswith("What was")


def test_shares_of_right_answers_have_wilsons_interval():
    # The ends of prop.test(..., correct = FALSE) in R.
    assert proportion_interval(1, 10) == (0.0179, 0.4042)
    assert proportion_interval(0, 10) == (0.0, 0.2775)
    assert proportion_interval(10, 10) == (0.7225, 1.0)


def test_questions_over_segments_have_their_own_column():
    rows = [{"prose_tokens": 20, "facts": 1, "questions": 10, "accuracy": 0.1, "interval": [0.0179, 0.4042]}]
    table = c3_tiny_card.questions_table(rows, [{**rows[0], "accuracy": 0.0, "interval": [0.0, 0.2775]}])
    assert table.splitlines()[-1] == "| 20 | 1 | 10% [2, 40] (N=10) | 0% [0, 28] (N=10) |"


def test_places_have_a_column_for_each_ratio():
    cell = {"kind": "prose", "places": 10, "next_word": 0.1, "next_word_interval": [0.0179, 0.4042], "next_4_words": 0}
    rows = [{**cell, "ratio": 2}, {**cell, "ratio": 1, "next_4_words": 0.25}]
    lines = c3_tiny_card.places_table(rows).splitlines()
    assert lines[0] == "| text | 1x | 2x |"
    assert lines[-1] == "| prose | 10% [2, 40], 25% | 10% [2, 40], 0% |"


def test_fidelity_fits_one_half_of_the_texts_and_saves_what_it_fitted(data, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_fidelity, "KINDS", ("passages_en", "code", "tables"))
    seen = []
    monkeypatch.setattr(
        latents_fidelity, "fit", lambda items: seen.extend(items) or latents_fidelity.Calibration(0.5, 0.25)
    )
    arguments = ("--lengths", "16", "100", "--limit", "1", "--plot", str(tmp_path / "plot"), "--save")
    status, rows = measured(latents_fidelity, data, model_path, tmp_path, *arguments)
    assert status == 0
    assert rows[0]["segments"] == 6
    # Of three texts the first and the third are fitted, each with both of its lengths.
    assert [(item["kind"], item["length"]) for item in seen] == [
        (kind, length) for length in (16, 100) for kind in ("passages_en", "tables")
    ]
    assert [row["held_out"] for row in rows[:1]] == [2]
    assert (tmp_path / "plot" / "fidelity_calibration.png").is_file()
    saved = json.loads((Path(model_path) / "processor_config.json").read_text(encoding="utf-8"))
    assert saved["calibration"] == {"derail": 0.5, "floor": 0.25}
    assert saved["num_latents"] == NUM_LATENTS


def test_targets_are_compared_with_fixed_lengths(data, model_path, tmp_path):
    arguments = ("--characters", "40", "--fixed-lengths", "16", "80", "--targets", "0.5", "--longest", "80")
    status, rows = measured(latents_target, data, model_path, tmp_path, *arguments)
    assert status == 0
    assert [row.get("target") for row in rows[:3]] == [None, None, 0.5]
    assert {"fixed_latents_for_the_same_worst", "passes"} <= rows[2].keys()


def test_every_byte_comes_back(data, model_path, tmp_path):
    arguments = ("--limit", "1", "--fuzz", "4", "--segment-length", "16", "--batch-size", "8")
    status, rows = measured(latents_exact, data, model_path, tmp_path, *arguments)
    assert status == 0
    assert all(row["identical"] == row["sources"] for row in rows)
    assert {"fuzzed: bytes", "eval/code", "eval/edge"} <= {row["kind"] for row in rows}


def test_questions_are_counted(data, model_path, tmp_path):
    arguments = ("--lengths", "60", "--segment-length", "32", "--repeats", "1", "--new-tokens", "1")
    status, rows = measured(latents_questions, data, model_path, tmp_path, *arguments)
    assert status == 0
    assert rows[0]["segments"] >= 2


@pytest.mark.slow
def test_killed_runs_lose_nothing(data, model_path, tmp_path):
    status, rows = measured(latents_kill, data, model_path, tmp_path, "--limit", "2", "--kills", "1")
    assert (status, rows[0]["groups_lost"]) == (0, 0)


@pytest.mark.slow
def test_compressing_is_measured_in_a_process_of_its_own(data, model_path, tmp_path):
    arguments = ("--lengths", "200", "400", "--segment-length", "40")
    status, rows = measured(latents_scaling, data, model_path, tmp_path, *arguments)
    assert status == 0
    assert "time_exponent" in rows[1]
