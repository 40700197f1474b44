"""Every task yields its items, from data in the layout of the shared folder."""

import gzip

import pytest

import factories
from c3_hf.evaluation import catalogue
from c3_hf.evaluation.items import QuestionItem, TokenMeter, find_file, lines_of
from c3_hf.evaluation.tasks.books import excerpts
from c3_hf.evaluation.tasks.fox_pages import length_bin
from c3_hf.evaluation.tasks.needles import insert_needles


OWN = ("own_texts", "own_questions")
TASKS = [name for name in catalogue.names("tasks") if name not in OWN]


def load(task, data, meter):
    return catalogue.find("tasks", task)(data, meter)


@pytest.fixture(scope="module")
def meter():
    return TokenMeter(factories.make_tokenizer(), num_latents=4, segment_tokens=32)


@pytest.mark.parametrize("name", TASKS)
def test_task_yields_items_with_unique_ids_and_labels(name, data_dir, meter):
    items = load(name, data_dir, meter)
    assert items
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert item.kind
        assert item.source
        assert len(item.inputs_hash) == 64
        assert not isinstance(item, QuestionItem) or (item.answers and item.contexts and item.question)


SHARED_ITEMS = {
    "code": 40,
    "edge_cases": 20,
    "fox_pages": 80,
    "json_logs": 40,
    "kv_retrieval": 40,
    "long_restoring": 10,
    "multidoc_qa": 100,
    "needles_multi": 24,
    "needles_single": 45,
    "needles_two_hop": 8,
    "passages": 200,
    "random_strings": 40,
    "ratio_sweep": 140,
    "short_passages": 200,
    "shuffled": 40,
    "tables": 40,
}


@pytest.mark.parametrize("name", TASKS)
def test_task_reads_the_shared_data(name, shared_dir, meter):
    assert len(load(name, shared_dir / "data", meter)) == SHARED_ITEMS[name]


def test_passages_keep_text_kind_and_bin(data_dir, meter):
    item = load("passages", data_dir, meter)[0]
    assert item.text.startswith("The lamp of the harbour")
    assert (item.kind, item.bin, item.segments) == ("textbook", "32-64", (item.text,))


def test_fox_pages_bin_by_tokens_and_keep_official_and_look_alike_apart(data_dir, meter):
    pages = {item.kind: item for item in load("fox_pages", data_dir, meter)}
    assert set(pages) == {"fox_en", "foxlike_en"}
    assert pages["foxlike_en"].bin == "1200-1300"
    assert pages["fox_en"].bin == "0-100"


def test_fox_pages_missing(tmp_path, meter):
    with pytest.raises(FileNotFoundError, match=r"`data_dir` .* holds no file"):
        load("fox_pages", tmp_path, meter)


def test_ratio_sweep_cuts_one_text_into_full_segments(data_dir, meter):
    items = load("ratio_sweep", data_dir, meter)
    first = [item for item in items if item.id.startswith("book-0/0@")]
    assert [item.bin for item in first] == ["2x", "4x", "5x", "8x", "10x", "20x", "40x"]
    assert len({item.text for item in first}) == 1
    assert [len(item.segments) for item in first] == [20, 10, 8, 5, 4, 2, 1]
    assert all(meter.count(segment) == 8 for segment in first[0].segments)


def test_long_restoring_segments_are_within_bounds(data_dir, meter):
    for item in load("long_restoring", data_dir, meter):
        assert len(item.segments) >= 16
        assert max(map(meter.count, item.segments)) <= 32


def test_needle_is_inserted_at_the_sentence_end_behind_its_depth():
    haystack = "One two. Three four. Five."
    needle = {"text": "Here.", "depth": 0.4, "lang": "en"}
    assert insert_needles(haystack, [needle]) == "One two. Three four.  Here. Five."
    assert insert_needles(haystack, [{**needle, "depth": 0.98}]) == haystack + " Here. "
    assert insert_needles("一二。三四。", [{"text": "针。", "depth": 0.0, "lang": "zh"}]) == "一二。针。三四。"


def test_needles_of_a_group_stand_together(data_dir, meter):
    single = load("needles_single", data_dir, meter)
    assert [item.answers for item in single] == [("11",)]
    assert "Oslo" not in single[0].contexts[0]
    multi = load("needles_multi", data_dir, meter)
    assert [item.answers for item in multi] == [("22",), ("33",)]
    assert all("Oslo is 22" in item.contexts[0] and "Lima is 33" in item.contexts[0] for item in multi)


def test_two_hop_asks_once_for_the_sentence_with_the_answer(data_dir, meter):
    (item,) = load("needles_two_hop", data_dir, meter)
    assert item.id == "needle-4"
    assert item.contexts[0].index("door 44") < item.contexts[0].index("to Cork")


def test_multidoc_contexts_are_the_documents(data_dir, meter):
    (item,) = load("multidoc_qa", data_dir, meter)
    assert [context.split("]")[0] for context in item.contexts] == ["Document [1", "Document [2"]
    assert item.contexts[0].endswith("Second paragraph.")


@pytest.mark.parametrize("text", ["abc", "雨下了一整夜。", "👩‍👩‍👧 e\u0301\u0301", "a\r\nb\x00"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_cutting_loses_nothing(meter, text, size):
    assert "".join(meter.cut(text, size)) == text
    assert all(meter.cut(text, size))


def test_cutting_into_nothing_is_refused(meter):
    with pytest.raises(ValueError, match="`num_tokens` is 0, expected at least 1 token"):
        meter.cut("abc", 0)
    assert meter.cut("", 3) == []


def test_excerpts_begin_at_lines(meter):
    text = "".join(f"line {number}\n" for number in range(50))
    found = excerpts(text, 12, 3, meter)
    assert len(found) == 3
    assert all(excerpt.startswith("line ") and meter.count(excerpt) == 12 for excerpt in found)


def test_files_are_found_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no file 'a\.jsonl\.gz'"):
        find_file(tmp_path, "a.jsonl.gz")
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"holds 2 files 'a\.jsonl\.gz', expected one"):
        find_file(tmp_path, "a.jsonl.gz")


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"id": 1}\n{"id": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz`, line 2, is not JSON"):
        list(lines_of(path))


def test_length_bins():
    assert [length_bin(tokens) for tokens in (0, 99, 600, 699, 1300)] == [
        "0-100",
        "0-100",
        "600-700",
        "600-700",
        "1300-1400",
    ]
