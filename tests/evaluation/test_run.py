"""A run: config first, a line an item, resuming, and numbers that do not move."""

import gzip
import json
import shutil

import pytest
from transformers import GPT2Config

from c3_hf.cli import main
from c3_hf.evaluation import run as run_module
from c3_hf.evaluation.records import FinishedRun, append_records, read_config
from c3_hf.evaluation.records import read_records as read_expected
from c3_hf.evaluation.run import RunSettings, plan_batches
from c3_hf.files import read_jsonl


TASKS = ("edge_cases", "short_passages", "multidoc_qa", "needles_two_hop")


def settings(tiny_checkpoint, **changes):
    fixed = {"tasks": TASKS, "segment_tokens": 48, "max_new_tokens": 6, "answer_tokens": 4, "device": "cpu"}
    return RunSettings(model=str(tiny_checkpoint), **{**fixed, **changes})


def run(settings, data, output, allow_changes=True):
    """Tests run from trees that are being worked on."""
    return run_module.run(settings, data, output, allow_changes)


def read_records(output):
    return read_expected(output, read_config(output)["items"])


def numbers(output):
    """Everything of a run's records that a repetition must give again."""
    return {
        (record["task"], record["id"]): {key: value for key, value in record.items() if key != "seconds"}
        for record in read_records(output)
    }


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, data_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(settings(tiny_checkpoint), data_dir, output)
    return output


def test_run_leaves_config_items_and_summary(finished, tiny_checkpoint):
    config = read_config(finished)
    assert config["settings"]["model"] == tiny_checkpoint.name
    assert config["items"]["short_passages"]["number"] == 10
    assert config["environment"]["transformers"]
    assert str(tiny_checkpoint.parent) not in (finished / "config.json").read_text(encoding="utf-8")
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["metrics"]) == set(TASKS)
    assert summary["metrics"]["short_passages"]["all"]["items"] == 10
    assert summary["metrics"]["short_passages"]["by_kind"]["short_en"]["items"] == 5
    assert len(read_records(finished)) == 10 + 5 + 1 + 1


def test_record_holds_inputs_outputs_metrics_and_cost(finished):
    record = numbers(finished)["short_passages", "short_en-0"]
    assert record["reference"].startswith("The lamp of the harbour")
    assert record["num_tokens"] == len(record["reference"])
    assert record["slots"] == 4
    assert 0.0 <= record["metrics"]["char_precision"] < 1.0
    assert len(record["metrics"]["accuracy_by_position"]) == 10
    answer = numbers(finished)["multidoc_qa", "multidoc_qa-0"]
    assert answer["answers"] == ["Text 2"]
    assert answer["metrics"] == {"contains_answer": 0.0, "best_subspan_match": 0.0, "answer_f1": 0.0}


def test_text_too_long_for_the_model_is_recorded_as_refused(tiny_checkpoint, tmp_path):
    record = {"id": "long", "kind": "novel", "lang": "en", "source": "written", "text": "word " * 200}
    (tmp_path / "shuffled.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    summary = run(settings(tiny_checkpoint, tasks=("shuffled",)), tmp_path, tmp_path / "out")
    assert summary["metrics"]["shuffled"]["all"]["refused"] == 1
    assert summary["metrics"]["shuffled"]["all"]["char_precision"] == 0.0
    (kept,) = read_records(tmp_path / "out")
    assert kept["refused"] is True
    assert kept["output"] == ""


def test_same_settings_give_the_same_numbers(finished, tiny_checkpoint, data_dir, tmp_path):
    run(settings(tiny_checkpoint), data_dir, tmp_path / "again")
    assert numbers(tmp_path / "again") == numbers(finished)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished, tmp_path / "again")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_change_the_numbers(finished, tiny_checkpoint, data_dir, tmp_path, batch_size):
    chosen = settings(tiny_checkpoint, tasks=("short_passages",), batch_size=batch_size)
    run(chosen, data_dir, tmp_path)
    expected = {key: record for key, record in numbers(finished).items() if key[0] == "short_passages"}
    assert numbers(tmp_path) == expected


def test_killed_run_goes_on_where_it_was(finished, tiny_checkpoint, data_dir, tmp_path):
    output = tmp_path / "killed"
    output.mkdir()
    (output / "config.json").write_bytes((finished / "config.json").read_bytes())
    lines = (finished / "items.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(lines[:4])
    (output / "items.jsonl").write_text(kept + lines[4][:37], encoding="utf-8")
    run(settings(tiny_checkpoint), data_dir, output)
    assert (output / "items.jsonl").read_text(encoding="utf-8").startswith(kept)
    assert len(read_records(output)) == len(lines)
    assert numbers(output) == numbers(finished)
    assert (
        json.loads((output / "summary.json").read_text())["metrics"]
        == (json.loads((finished / "summary.json").read_text())["metrics"])
    )


def test_finished_run_is_not_computed_again(finished, tiny_checkpoint, data_dir):
    before = (finished / "items.jsonl").read_bytes()
    summary = run(settings(tiny_checkpoint), data_dir, finished)
    assert (finished / "items.jsonl").read_bytes() == before
    assert summary["metrics"]["edge_cases"]["all"]["items"] == 5


def test_other_settings_do_not_go_into_the_same_folder(finished, tiny_checkpoint, data_dir):
    with pytest.raises(
        ValueError, match=r"`output` 'finished' holds a run with another config \(differs in: settings"
    ):
        run(settings(tiny_checkpoint, answer_tokens=5), data_dir, finished)


def test_limit_takes_evenly_spaced_items(tiny_checkpoint, data_dir, tmp_path):
    run(settings(tiny_checkpoint, tasks=("short_passages",), limit=5), data_dir, tmp_path)
    assert sorted(record["id"] for record in read_records(tmp_path)) == [
        "short_en-0",
        "short_en-2",
        "short_en-4",
        "short_zh-1",
        "short_zh-3",
    ]


def test_limit_keeps_all_items_of_a_text(tiny_checkpoint, data_dir, tmp_path):
    run(settings(tiny_checkpoint, tasks=("ratio_sweep",), limit=1, max_new_tokens=1), data_dir, tmp_path)
    assert [record["id"].partition("@")[0] for record in read_records(tmp_path)] == ["book-0/0"] * 7


def test_cut_restores_long_texts_in_segments(tiny_checkpoint, data_dir, tmp_path):
    run(settings(tiny_checkpoint, tasks=("short_passages",), cut=True, segment_tokens=16), data_dir, tmp_path)
    record = numbers(tmp_path)["short_passages", "short_en-0"]
    assert record["slots"] == 4 * 5
    assert record["num_tokens"] == len(record["reference"]) == 63


def test_cut_leaves_the_ratio_sweep_at_its_ratios(tiny_checkpoint, data_dir, tmp_path):
    chosen = settings(tiny_checkpoint, tasks=("ratio_sweep",), limit=1, max_new_tokens=1, cut=True)
    run(chosen, data_dir, tmp_path)
    slots = {record["bin"]: record["slots"] for record in read_records(tmp_path)}
    assert slots == {"2x": 80, "4x": 40, "5x": 32, "8x": 20, "10x": 16, "20x": 8, "40x": 4}


def test_hash_only_keeps_texts_out_of_the_files(tiny_checkpoint, data_dir, tmp_path):
    chosen = settings(tiny_checkpoint, tasks=("short_passages",), hash_only=r"\(short_en\)")
    run(chosen, data_dir, tmp_path)
    records = numbers(tmp_path)
    assert records["short_passages", "short_en-0"]["reference"] is None
    assert records["short_passages", "short_en-0"]["output"] is None
    assert len(records["short_passages", "short_en-0"]["output_hash"]) == 64
    assert records["short_passages", "short_zh-2"]["reference"] == "雨下了一整夜。"
    lines = (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert not any("harbour" in line for line in lines if '"short_en-' in line)


def test_batches_do_not_mix_tasks_and_do_not_depend_on_what_is_done(finished):
    from c3_hf.evaluation.items import RestoreItem

    rows = [RestoreItem(str(n), "k", "en", "s", "", ("x" * n,)) for n in (5, 1, 4, 2, 3)]
    plan = plan_batches({"a": rows, "b": rows[:1]}, batch_size=2)
    assert [(task, [item.id for item in batch]) for task, batch in plan] == [
        ("a", ["1", "2"]),
        ("a", ["3", "4"]),
        ("a", ["5"]),
        ("b", ["5"]),
    ]


def test_records_of_all_processes_are_read_and_a_torn_line_is_dropped(finished, tmp_path):
    lines = list(read_jsonl(finished / "items.jsonl"))
    lines[0]["source"] = "a\u2028b"
    append_records(tmp_path, 0, lines[:1])
    append_records(tmp_path, 1, lines[1:3])
    with (tmp_path / "items.rank1.jsonl").open("a") as file:
        file.write('{"id": 4, "te')
    expected = read_config(finished)["items"]
    assert read_expected(tmp_path, expected) == lines[:3]
    append_records(tmp_path, 1, lines[3:4])
    assert read_expected(tmp_path, expected) == lines[:4]


def copy_of(finished, folder):
    shutil.copytree(finished, folder)
    return folder


def test_an_item_that_is_there_twice_is_refused(finished, tiny_checkpoint, data_dir, tmp_path):
    for name in ("items.rank1.jsonl", "items.copy.jsonl", "items.jsonl"):
        folder = copy_of(finished, tmp_path / name)
        lines = (finished / "items.jsonl").read_text(encoding="utf-8")
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(lines)
        with pytest.raises(
            ValueError, match=r"holds item '.*' of task '.*' again, which is in .*jsonl line 1 already"
        ):
            FinishedRun.read(folder)
        with pytest.raises(ValueError, match="Remove the file that does not belong to this run"):
            run(settings(tiny_checkpoint), data_dir, folder)


def test_items_that_are_missing_surplus_or_others_are_refused(finished, tmp_path):
    rows = (finished / "items.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    record = json.loads(rows[0])
    changes = {
        "fewer": (rows[:-1], r"holds \d+ items of task '.*', its config\.json says \d+"),
        "more": ([*rows, json.dumps({**record, "id": "new"}) + "\n"], r"holds \d+ items of task '.*', its config"),
        "others": ([json.dumps({**record, "id": "new"}) + "\n", *rows[1:]], "holds other items of task"),
        "inputs": ([json.dumps({**record, "inputs_hash": "0"}) + "\n", *rows[1:]], "holds other items of task"),
        "task": (
            [json.dumps({**record, "task": "code"}) + "\n", *rows[1:]],
            "an item of task 'code', which the run's",
        ),
        "field": ([json.dumps({**record, "slots": "4"}) + "\n", *rows[1:]], r"line 1 is no record .* `slots` is '4'"),
        "no JSON": (["{\n", *rows[1:]], r"items\.jsonl`, line 1, is not JSON"),
    }
    for name, (lines, message) in changes.items():
        folder = copy_of(finished, tmp_path / name)
        (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            FinishedRun.read(folder)
    assert len(FinishedRun.read(finished).records) == len(rows)


@pytest.mark.parametrize(
    "items", [None, [], {"short_passages": 10}, {"short_passages": {"number": "10", "sha256": ""}}]
)
def test_a_config_without_its_items_is_named(finished, tmp_path, items):
    folder = copy_of(finished, tmp_path / "run")
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, "items": items}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: `items` does not give each task's number"):
        FinishedRun.read(folder)


def test_leftovers_of_a_run_over_other_items_stop_a_run(finished, tiny_checkpoint, data_dir, tmp_path):
    folder = copy_of(finished, tmp_path / "run")
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    record = {**json.loads(lines[0]), "inputs_hash": "0" * 64}
    (folder / "items.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"`output` 'run' holds 1 items that are not of this run"):
        run(settings(tiny_checkpoint), data_dir, folder)


def test_another_commit_does_not_go_on_with_a_run(finished, tiny_checkpoint, data_dir, tmp_path, monkeypatch):
    folder = copy_of(finished, tmp_path / "run")
    monkeypatch.setattr(run_module, "clean_commit", lambda allow_changes: "0" * 40)
    with pytest.raises(ValueError, match=r"another config \(differs in: commit\)"):
        run(settings(tiny_checkpoint), data_dir, folder, allow_changes=False)
    assert run(settings(tiny_checkpoint), data_dir, folder, allow_changes=True)["metrics"]


def test_system_that_cannot_run_is_recorded_as_skipped(tiny_checkpoint, data_dir, tmp_path, caplog):
    summary = run(settings(tiny_checkpoint, system="deepseek_ocr"), data_dir, tmp_path)
    assert "no OCR checkpoint is given" in summary["skipped"]
    assert summary["metrics"] == {}
    assert "system deepseek_ocr is skipped" in caplog.text


@pytest.mark.parametrize("name", ["limit", "batch_size", "segment_tokens", "max_new_tokens", "answer_tokens"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, expected at least 1"):
        RunSettings(model="m", tasks=("passages",), **{name: 0})


def test_unknown_names_list_the_known_ones(tiny_checkpoint, data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"`tasks` is empty, expected some of: code, edge_cases"):
        RunSettings(model="m", tasks=())
    with pytest.raises(ValueError, match="`tasks` has no 'pasages', expected one of: code, edge_cases"):
        run(settings(tiny_checkpoint, tasks=("pasages",)), data_dir, tmp_path)
    with pytest.raises(ValueError, match="`systems` has no 'c4', expected one of: c3, deepseek_ocr"):
        run(settings(tiny_checkpoint, system="c4"), data_dir, tmp_path)


def test_equal_ids_are_refused(tiny_checkpoint, data_dir, tmp_path):
    doubled = tmp_path / "data"
    doubled.mkdir()
    for name in ("passages_en", "passages_zh"):
        (doubled / f"{name}.jsonl.gz").write_bytes((data_dir / "eval" / "passages_en.jsonl.gz").read_bytes())
    with pytest.raises(ValueError, match="gives task 'passages' items with equal ids"):
        run(settings(tiny_checkpoint, tasks=("passages",)), doubled, tmp_path / "out")


def test_missing_run_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        read_config(tmp_path)


def test_command_runs_and_prints_a_line_a_task(tiny_checkpoint, data_dir, tmp_path, capsys):
    words = ["evaluate", "--model", str(tiny_checkpoint), "--data-dir", str(data_dir), "--output", str(tmp_path)]
    words += ["--tasks", "edge_cases", "multidoc_qa", "--max-new-tokens", "4", "--answer-tokens", "4"]
    assert main([*words, "--device", "cpu", "--segment-tokens", "48", "--allow-changes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("edge_cases          5 items")
    assert " characters a slot  char_precision " in lines[0]
    assert "best_subspan_match 0.0000" in lines[1]


OWN = [
    {"text": "The lamp of the harbour went out."},
    {"text": "雨下了一整夜。", "id": 70, "kind": "diary", "lang": "zh", "source": "mine", "bin": "short"},
    {"text": "The code of Rome is 11.", "question": "Code of Rome?", "answers": ["11"], "id": "rome"},
    {"contexts": ["A.", "The code of Oslo is 22."], "question": "Code of Oslo?", "answers": ["22", "twenty-two"]},
]


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_texts_and_questions_of_ones_own(tiny_checkpoint, tmp_path, capsys, name):
    data = ("\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in OWN)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    words = ["evaluate", "--model", str(tiny_checkpoint), "--data-file", str(tmp_path / name), "--device", "cpu"]
    words += ["--output", str(tmp_path / "out"), "--max-new-tokens", "4", "--answer-tokens", "4", "--allow-changes"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["own_texts", "2"], ["own_questions", "2"]]
    records = numbers(tmp_path / "out")
    first = records["own_texts", "1"]
    assert (first["kind"], first["lang"], first["source"], first["bin"]) == ("mine", "-", name, "")
    assert first["num_characters"] == len(OWN[0]["text"])
    own = records["own_texts", "70"]
    assert (own["kind"], own["lang"], own["source"], own["bin"]) == ("diary", "zh", "mine", "short")
    # Without an id of its own a line is known by its number; empty lines count.
    assert records["own_questions", "7"]["answers"] == ["22", "twenty-two"]
    assert records["own_questions", "rome"]["question"] == "Code of Rome?"
    assert main(["report", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| own_texts | out | 2 |" in report
    assert main([*words, "--tasks", "code"]) == 1
    assert "`--tasks` goes with `--data-dir`" in capsys.readouterr().err


BAD_LINES = [
    ("{}", r"mine\.jsonl line 2 has no `text`, expected str"),
    ('{"text": 7}', r"mine\.jsonl line 2 has 7 as `text`, expected str"),
    ('{"text": null}', r"line 2 has no `text`, expected str"),
    ('{"text": "\\ud800"}', r"line 2: `text` holds half a surrogate pair"),
    ('{"text": "a", "id": [1]}', r"line 2 has \[1\] as `id`, expected str or int"),
    ('{"text": "a", "id": true}', r"line 2 has True as `id`, expected str or int"),
    ('{"text": "a", "id": 1}', r"gives task 'own_texts' items with equal ids \('1'\)"),
    ('{"text": "a", "kind": 3}', r"line 2 has 3 as `kind`, expected str"),
    ('{"text": "a", "question": "?"}', r"line 2 has no `answers`, expected list"),
    ('{"text": "a", "question": "?", "answers": []}', r"line 2 has an empty `answers`, expected at least one text"),
    ('{"text": "a", "question": "?", "answers": [1]}', r"line 2 has 1 as `answers`, expected str"),
    ('{"question": "?", "answers": ["a"]}', r"line 2 has no `text`, expected str"),
    ('{"contexts": "a", "question": "?", "answers": ["a"]}', r"line 2 has 'a' as `contexts`, expected list"),
    ('["a"]', r"line 2, holds a list, expected an object"),
    ('"a"', r"line 2, holds a str, expected an object"),
    ('{"text": "a"', r"line 2, is not JSON"),
    ("[" * 100_000, r"line 2, is JSON nested too deep"),
    ('{"text": ' + "1" * 5000 + "}", r"line 2, is not JSON that can be read"),
]


def test_a_line_of_ones_own_that_cannot_be_is_named(tiny_checkpoint, tmp_path):
    tasks = settings(tiny_checkpoint, tasks=("own_texts", "own_questions"))
    for line, message in BAD_LINES:
        (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            run(tasks, tmp_path / "mine.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_ones_own_that_cannot_be_are_named(tiny_checkpoint, tmp_path):
    tasks = settings(tiny_checkpoint, tasks=("own_texts", "own_questions"))
    whole = gzip.compress(b'{"text": "a"}\n' * 10_000)
    contents = {
        "empty.jsonl": (b"\n\n", "has no line, expected one JSON object a line"),
        "latin.jsonl": (b'{"text": "caf\xe9"}', r"latin\.jsonl`, line 1, is not UTF-8"),
        "plain.jsonl.gz": (b'{"text": "a"}', r"plain\.jsonl\.gz` is damaged behind line 0"),
        "torn.jsonl.gz": (whole[: len(whole) // 2], r"torn\.jsonl\.gz` is damaged behind line \d+"),
    }
    for name, (data, message) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            run(tasks, tmp_path / name, tmp_path / "out")
    for name in ("absent.jsonl", ""):
        with pytest.raises(FileNotFoundError, match="is no file, expected a JSON Lines file of your own texts"):
            run(tasks, tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("device", ["foo", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(ValueError, match=f"`device` '{device}' cannot be used here"):
        RunSettings(model="m", tasks=("passages",), device=device)


def test_a_model_that_is_no_c3_is_refused(data_dir, tmp_path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="is a model of type 'gpt2', not a C3 model"):
        run(settings(tmp_path / "gpt2"), data_dir, tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere: no C3 model can be loaded from there"):
        run(settings(tmp_path / "nowhere"), data_dir, tmp_path / "out")


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"`hash_only` is '\(', no regular expression"):
        RunSettings(model="m", tasks=("passages",), hash_only="(")
