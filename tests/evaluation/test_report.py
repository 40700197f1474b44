"""The report: every table, picture and receipt from finished runs."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from c3_hf.cli import main
from c3_hf.evaluation import plots
from c3_hf.evaluation.catalogue import score_answer, score_restoration
from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.records import (
    FinishedRun,
    bootstrap_interval,
    grouped,
    items_hash,
    make_record,
    mean_of,
    with_interval,
)
from c3_hf.evaluation.report import difference, receipts_page, table, worst_items, write_report
from c3_hf.files import write_json


TEXT = "The lamp of the harbour went out before the last boat came in."


ITEM = RestoreItem("1", "textbook", "en", "written", "", (TEXT,))
METER = SimpleNamespace(encode=list, count=len)
SYSTEM = SimpleNamespace(slots=lambda text: 4)


def record(task, number, output, **labels):
    row = {"task": task, "id": f"{task}-{number}", "kind": "textbook", "lang": "en", "bin": "", "source": "written"}
    row |= {
        "inputs_hash": "0" * 64,
        "num_tokens": 64,
        "num_characters": 100,
        "slots": 4,
        "refused": not output,
        "reference": TEXT,
        "output": output,
        "seconds": 0.5,
    }
    return {**row, "metrics": score_restoration(output, TEXT, lambda text: text.split()), **labels}


def question(number, output):
    row = record("needles_single", number, output, kind="single", question="Which?", answers=["11"])
    del row["reference"]
    return {**row, "metrics": score_answer(output, ["11"])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs over restored and answered items, as `evaluate` leaves them, and one that was skipped."""
    folder = tmp_path_factory.mktemp("runs")
    pages = [record("fox_pages", n, TEXT[: 40 + n], kind="foxlike_en", bin=f"{n}00-{n + 1}00") for n in (6, 7, 12)]
    sweep = [record("ratio_sweep", n, TEXT[: 60 - 2 * n], bin=f"{2**n}x") for n in range(1, 6)]
    plain = [record("passages", n, TEXT.replace("o", "0") * n) for n in range(3)]  # the first was too long
    asked = [question(0, "11"), question(1, "It is 12.")]
    for label, records in (("c3", pages + sweep + plain + asked), ("truncation", pages[:2] + sweep), ("ocr", [])):
        (folder / label).mkdir()
        config = {
            "commit": "0" * 40,
            "items": {
                task: {"number": len(rows), "sha256": items_hash((row["id"], row["inputs_hash"]) for row in rows)}
                for task, rows in grouped(records, lambda row: row["task"]).items()
            },
            "settings": {"system": label, "model": "tiny", "limit": None, "cut": False},
            "weights": "a" * 64,
            "segment_tokens": 128,
            "meteor": "skipped: nltk finds no WordNet corpus",
            "environment": {"transformers": "5.0"},
        }
        write_json(folder / label / "config.json", config)
        lines = "".join(json.dumps(row) + "\n" for row in records)
        (folder / label / "items.jsonl").write_text(lines, encoding="utf-8")
        write_json(folder / label / "summary.json", {"skipped": None if records else "no weights"})
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    write_report([runs / "c3", runs / "truncation", runs / "ocr"], output, receipts=3)
    return output


def section(report, title):
    text = (report / "report.md").read_text(encoding="utf-8")
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_report_has_every_section_and_file(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "Runs",
        "Restoring",
        "The paper's Fig. 1",
        "Precision against ratio",
        "Forgetting curve",
        "Kinds of text (c3)",
        "Questions",
        "Receipts (c3)",
    ]
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (report / name).is_file(), name


def test_report_names_commit_weights_and_skipped_systems(report):
    rows = section(report, "Runs")
    assert "`000000000000`" in rows
    assert "`aaaaaaaaaaaa`" in rows
    assert "ocr, skipped: no weights" in rows


def test_report_says_when_runs_are_not_of_one_measurement(runs, report, tmp_path):
    assert "Not of one measurement" not in section(report, "Runs")
    for label, changes in (("c3", {"commit": "1" * 40 + "+"}), ("truncation", {"weights": "b" * 64})):
        shutil.copytree(runs / label, tmp_path / label)
        config = json.loads((tmp_path / label / "config.json").read_text(encoding="utf-8"))
        write_json(tmp_path / label / "config.json", {**config, **changes})
    write_report([tmp_path / "c3", tmp_path / "truncation"], tmp_path / "report")
    said = (
        "**Not of one measurement:** these runs were made at 2 commits, 1 of them with changes that were not committed"
    )
    assert f"{said}, of 2 sets of weights." in section(tmp_path / "report", "Runs")


def test_figure_1_has_published_and_measured_columns(report):
    row = next(line for line in section(report, "The paper's Fig. 1").splitlines() if line.startswith("| 1200-1300"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["93.3", "98.4", "97.5", "59.1", "87.1"]
    assert cells[6] == "1 (16.0×)"
    assert cells[8] == f"{100 * 52 / len(TEXT):.1f}"
    assert cells[9:] == ["0", "–", "–"]
    assert "not those of the paper" in section(report, "The paper's Fig. 1")


def test_means_in_the_tables_are_those_of_the_records(report, runs):
    run = FinishedRun.read(runs / "c3")
    expected = with_interval(run.of("passages"), "char_precision")
    assert f"| passages | c3 | 3, 1 too long | 16.0× | 25.0 | {expected}" in section(report, "Restoring")
    assert "| needles_single | single | c3 | 2 | 16.0× | 25.0 | 0.50 [0.00, 1.00]" in section(report, "Questions")


@pytest.mark.parametrize("name", ["figure_1.png", "ratio.png", "forgetting.png", "kinds.png"])
def test_pictures_are_drawn(report, name):
    with Image.open(report / name) as picture:
        assert min(picture.size) > 150
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, instead of saving them."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_runs_stand_beside_the_published_curves_and_beside_each_other(runs, drawn):
    finished = [FinishedRun.read(runs / label) for label in ("c3", "truncation")]
    plots.plot_figure_1(finished, "foxlike_en", Path("unused"))
    plots.plot_ratio(finished, Path("unused"))
    (published, own), (ratio,) = (figure.axes for figure in drawn)
    assert [line.get_label() for line in published.lines] == list(plots.FIGURE_1)
    for axes in (own, ratio):
        assert [line.get_label().split(" (")[0] for line in axes.lines] == ["c3", "truncation"]
        # Nothing is joined, and equal values do not cover each other.
        assert {line.get_linewidth() for line in axes.lines} == {0}
        one, other = (set(line.get_xdata()) for line in axes.lines)
        assert not one & other
    for total in (1, 2, 7):
        places = [plots.beside(number, total) for number in range(total)]
        assert len(set(places)) == total
        assert max(map(abs, places)) < 0.5


def test_shares_by_tenths_are_written_out_and_never_rounded_to_all_or_nothing(runs, drawn):
    plots.plot_forgetting([FinishedRun.read(runs / "c3")], ["fox_pages", "passages"], Path("unused"))
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fox_pages", "passages"]
    assert len(axes.texts) == 20
    assert [plots._percent(share) for share in (0, 0.004, 0.555, 0.999, 1)] == ["0", "<1", "55", "99", "100"]


def test_kinds_that_all_come_back_are_no_picture(runs, tmp_path):
    shutil.copytree(runs / "truncation", tmp_path / "whole")
    rows = [record("passages", number, TEXT, kind=f"kind_{number}") for number in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "whole" / "items.jsonl").write_text(lines, encoding="utf-8")
    config = json.loads((tmp_path / "whole" / "config.json").read_text(encoding="utf-8"))
    items = {"passages": {"number": 4, "sha256": items_hash((row["id"], row["inputs_hash"]) for row in rows)}}
    write_json(tmp_path / "whole" / "config.json", {**config, "items": items})
    write_report([tmp_path / "whole"], tmp_path / "report")
    assert not (tmp_path / "report" / "kinds.png").exists()
    assert "kinds.png" not in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_pictures_of_equal_runs_are_equal_files(report, runs, tmp_path):
    write_report([runs / "c3", runs / "truncation", runs / "ocr"], tmp_path, receipts=3)
    for path in report.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


class Tags(HTMLParser):
    """Collects tags in order and checks that each is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_receipts_show_the_worst_items_first_as_valid_html(report):
    page = (report / "receipts.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("section") == 3
    assert page.index("passages / passages-0") < page.index("passages / passages-2")
    assert "http" not in page


def test_difference_marks_what_was_lost_and_what_was_added():
    assert difference("a lamp went", "a lamb went out") == ("a <del>lamp</del><ins>lamb</ins> went<ins> out</ins>")
    assert difference("雨下了", "雨下") == "雨下<del>了</del>"
    assert difference("same", "same") == "same"


def test_difference_escapes_markup_and_shows_control_characters():
    assert difference("<b>\x00", "<b>\x00") == "&lt;b&gt;\u2400"
    assert difference("a\n", "a") == "a<del>\u21b5\n</del>"
    page = receipts_page("<t>", [record("t", 0, "<script>alert(1)</script>", id="<i>")], 1)
    assert "<script>" not in page
    assert "<i>" not in page


def test_a_text_that_came_back_whole_is_kept_once_and_shown_whole():
    kept = make_record("t", ITEM, TEXT, SYSTEM, METER, False, None, 0.5)
    assert kept["output"] is None
    assert kept["metrics"]["exact_match"] == 1.0
    assert f'<div class="text">{TEXT}</div>' in receipts_page("t", [kept], 1)
    assert make_record("t", ITEM, TEXT[1:], SYSTEM, METER, False, None, 0.5)["output"] == TEXT[1:]


def test_worst_items_leave_out_hashed_texts():
    rows = [record("a", 0, TEXT), record("a", 1, ""), record("a", 2, "", reference=None)]
    assert [row["id"] for row in worst_items(rows, 5)] == ["a-1", "a-0"]


def test_unfinished_run_is_refused(runs, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "config.json").write_bytes((runs / "c3" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"`runs` has 'half' with 0 items and no summary.json: it is not finished"):
        write_report([folder], tmp_path)


def test_runs_without_items_and_runs_of_one_name_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"`runs` has no run with items: ocr: no weights"):
        write_report([runs / "ocr"], tmp_path)
    with pytest.raises(ValueError, match="`runs` has folders of one name"):
        write_report([runs / "c3", runs / "c3"], tmp_path)


def test_command_writes_into_the_first_run_by_default(runs, capsys):
    assert main(["report", str(runs / "truncation")]) == 0
    assert capsys.readouterr().out.strip() == str(runs / "truncation" / "report.md")
    assert (runs / "truncation" / "ratio.png").is_file()


def test_intervals_are_those_of_the_mean_and_repeat():
    values = [0.0, 1.0] * 50
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert low == pytest.approx(0.4, abs=0.03)
    assert high == pytest.approx(0.6, abs=0.03)
    assert bootstrap_interval([0.5]) == (0.5, 0.5)


def test_intervals_of_nothing_and_impossible_confidence_are_refused():
    with pytest.raises(ValueError, match="`values` is empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"`confidence` is 95, expected a share between 0 and 1"):
        bootstrap_interval([1.0], confidence=95)


def test_means_average_curves_place_by_place():
    rows = [{"a": 1.0, "c": [1.0, None, None]}, {"a": 0.0, "c": [0.0, 0.5, None]}, {"b": 3.0}]
    assert mean_of(rows) == {"a": 0.5, "c": [0.5, 0.5, None], "b": 3.0}


def test_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
