"""Runs one system over tasks."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tqdm import tqdm

from c3_hf.evaluation import catalogue
from c3_hf.evaluation.items import VARIANT, Item, QuestionItem, RestoreItem, TokenMeter
from c3_hf.evaluation.metrics.fox import wordnet_available
from c3_hf.evaluation.provenance import clean_commit, environment, weights_fingerprint
from c3_hf.evaluation.records import (
    SUMMARY,
    append_records,
    grouped,
    items_hash,
    make_record,
    open_run,
    read_records,
    summarise,
)
from c3_hf.evaluation.system import CheckpointSettings, System, SystemSettings, SystemUnavailable, load_meter
from c3_hf.files import write_json
from c3_hf.pipeline import check_device


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunSettings(CheckpointSettings):
    """What is run; together with the data it fixes every number but the seconds. Beside those of a checkpoint:

    Args:
        tasks: Names in the tables of `c3_hf.evaluation.tasks`.
        system: Name of a module of `c3_hf.evaluation.systems`.
        limit: Most texts or questions of a task, evenly spaced over it; `None` for all.
        segment_tokens: Most tokens of a segment of long text; `None` for as many as `compress` takes.
        cut: Restore texts longer than a segment in segments, instead of in one block as the paper does.
        device: Torch device; `"auto"` takes the one accelerate gives each process.
        hash_only: Regular expression; items whose id or source it finds are recorded with hashes in place of texts.
    """

    tasks: tuple[str, ...]
    system: str = "c3"
    limit: int | None = None
    segment_tokens: int | None = None
    cut: bool = False
    device: str = "auto"
    hash_only: str | None = None

    def __post_init__(self):
        for name in ("limit", "batch_size", "segment_tokens", "max_new_tokens", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, expected at least 1.")
        if self.device != "auto":
            check_device(self.device)
        if self.hash_only is not None:
            try:
                re.compile(self.hash_only)
            except re.error as error:
                raise ValueError(f"`hash_only` is {self.hash_only!r}, no regular expression ({error}).") from error
        if not self.tasks:
            raise ValueError(f"`tasks` is empty, expected some of: {', '.join(catalogue.names('tasks'))}.")


def run(settings: RunSettings, data: Path, output: Path, allow_changes: bool = False) -> dict:
    """Run `settings.system` over `settings.tasks`, going on where an earlier run into `output` stopped.

    Under `accelerate launch` the batches are divided among the processes.

    Args:
        data: Folder with the data files, searched to any depth; for `own_texts` and `own_questions` a file.
        output: Folder for `config.json`, `items*.jsonl` and `summary.json`.
        allow_changes: Record also from a checkout that differs from its commit; the record says so.

    Returns:
        The summary; on processes other than the first an empty dictionary.

    Raises:
        ValueError: If a name is unknown, the data are damaged or empty, `output` holds a run with another config or
            items of another run, or the checkout differs from its commit.
        FileNotFoundError: If a data file is missing.
    """
    from accelerate import PartialState

    load_system = catalogue.find("systems", settings.system)
    loaders = {task: catalogue.find("tasks", task) for task in settings.tasks}
    state = PartialState(cpu=settings.device == "cpu")
    config = _made_with(settings, allow_changes) if state.is_main_process else {}
    meteor = wordnet_available()
    meter = load_meter(settings.model, settings.segment_tokens)
    items = {task: _load_items(task, load, Path(data), meter, settings) for task, load in loaders.items()}
    if not any(items.values()):
        raise ValueError(f"{data} holds no item for {', '.join(settings.tasks)}.")
    wanted = {
        task: {"number": len(rows), "sha256": items_hash((item.id, item.inputs_hash) for item in rows)}
        for task, rows in items.items()
    }
    if state.is_main_process:
        numbers = {"num_latents": meter.num_latents, "segment_tokens": meter.segment_tokens, "items": wanted}
        said = "computed" if meteor else "skipped: nltk finds no WordNet corpus"
        open_run(output, {**config, **numbers, "meteor": said}, allow_changes)
    state.wait_for_everyone()
    before = read_records(output, wanted)
    _check_records(before, items, output)
    done = {(record["task"], record["id"]) for record in before}
    state.wait_for_everyone()
    batches = plan_batches(items, settings.batch_size)[state.process_index :: state.num_processes]
    skipped = None
    if any((task, row.id) not in done for task, rows in batches for row in rows):
        shared = {field.name: getattr(settings, field.name) for field in fields(CheckpointSettings)}
        shared["device"] = str(state.device) if settings.device == "auto" else settings.device
        try:
            system = load_system(SystemSettings(**shared, meter=meter))
        except SystemUnavailable as reason:
            logger.warning("system %s is skipped: %s", settings.system, reason)
            skipped = str(reason)
        else:
            _work_off(batches, done, system, settings, meter, meteor, output, state.process_index)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    records = {(record["task"], record["id"]): record for record in read_records(output, wanted)}
    ordered = [records[task, item.id] for task, rows in items.items() for item in rows if (task, item.id) in records]
    summary = {"system": settings.system, "skipped": skipped, **summarise(ordered)}
    write_json(output / SUMMARY, summary)
    return summary


def _load_items(
    task: str, load: Callable[[Path, TokenMeter], list[Item]], data: Path, meter: TokenMeter, settings: RunSettings
) -> list[Item]:
    items = load(data, meter)
    if len({item.id for item in items}) < len(items):
        twice = next(name for name, rows in grouped(items, lambda item: item.id).items() if len(rows) > 1)
        raise ValueError(f"{data} gives task {task!r} items with equal ids ({twice!r}); they must be unique.")
    items = _spaced(items, settings.limit)
    return [_cut(item, meter) for item in items] if settings.cut else items


def _spaced(items: list[Item], limit: int | None) -> list[Item]:
    """Items of at most `limit` texts, evenly spaced; a text that stands in several items keeps all of them."""
    if limit is None:
        return items
    texts = list(grouped(items, lambda item: item.id.partition(VARIANT)[0]).values())
    count = min(limit, len(texts))
    return [item for number in range(count) for item in texts[number * len(texts) // count]]


def _cut(item: Item, meter: TokenMeter) -> Item:
    """A text in one block as one in segments; what a task has cut itself stays as it is."""
    if isinstance(item, QuestionItem) or len(item.segments) != 1 or VARIANT in item.id:
        return item
    return replace(item, segments=tuple(meter.segments(item.text)) or item.segments)


def _check_records(records: Sequence[dict], items: dict[str, list[Item]], output: Path) -> None:
    """That what was recorded before is of these items, so that nothing is left out for another run's sake."""
    inputs = {(task, item.id): item.inputs_hash for task, rows in items.items() for item in rows}
    strange = [row["id"] for row in records if inputs.get((row["task"], row["id"])) != row["inputs_hash"]]
    if strange:
        raise ValueError(
            f"`output` {output.name!r} holds {len(strange)} items that are not of this run, such as {strange[0]!r}: "
            "left over from another one. Give a new folder."
        )


def plan_batches(items: dict[str, list[Item]], batch_size: int) -> list[tuple[str, list[Item]]]:
    """Batches of one task each, texts of like length together.

    The plan depends on items and batch size alone, so a run that goes on forms the batches it had before.
    """
    batches = []
    for task, rows in items.items():
        ordered = sorted(rows, key=_length)
        size = 1 if rows and isinstance(rows[0], QuestionItem) else batch_size
        batches += [(task, ordered[start : start + size]) for start in range(0, len(ordered), size)]
    return batches


def _length(item: Item) -> int:
    return sum(map(len, item.contexts if isinstance(item, QuestionItem) else item.segments))


def _work_off(
    batches: list[tuple[str, list[Item]]],
    done: set[tuple[str, str]],
    system: System,
    settings: RunSettings,
    meter: TokenMeter,
    meteor: bool,
    output: Path,
    rank: int,
) -> None:
    """Run the batches with items that are not recorded yet, and record those."""
    hash_only = re.compile(settings.hash_only) if settings.hash_only else None
    total = sum(len(rows) for _, rows in batches)
    with tqdm(total=total, unit="item", disable=None if rank == 0 else True, desc=settings.system) as bar:
        for task, rows in batches:
            waiting = [row for row in rows if (task, row.id) not in done]
            if waiting:
                bar.set_postfix_str(task)
                begin = time.perf_counter()
                # The whole batch again: texts that come together give what they gave before.
                outputs = dict(zip((row.id for row in rows), run_batch(system, rows)))
                seconds = (time.perf_counter() - begin) / len(rows)
                records = [
                    make_record(task, row, outputs[row.id], system, meter, meteor, hash_only, seconds)
                    for row in waiting
                ]
                append_records(output, rank, records)
            bar.update(len(rows))


def run_batch(system: System, items: Sequence[Item]) -> list[str | None]:
    """The system's outputs for `items` of one kind, restored or answered; `None` for an item it cannot take."""
    questions = [item for item in items if isinstance(item, QuestionItem)]
    if questions:
        return [system.answer(item.contexts, item.question) for item in questions]
    texts = [item for item in items if isinstance(item, RestoreItem)]
    pieces = iter(system.restore([segment for item in texts for segment in item.segments]))
    return [_joined([next(pieces) for _ in item.segments]) for item in texts]


def _joined(pieces: list[str | None]) -> str | None:
    known = [piece for piece in pieces if piece is not None]
    return "".join(known) if len(known) == len(pieces) else None


def _made_with(settings: RunSettings, allow_changes: bool) -> dict:
    """Settings, code, weights and environment. Folders are recorded by name and hash, not by their place here."""
    named = {**asdict(settings), "tasks": list(settings.tasks)}
    for key in ("model", "system_model", "font"):
        value = named[key]
        named[key] = Path(value).name if value and Path(value).exists() else value
    return {
        "commit": clean_commit(allow_changes),
        "settings": named,
        "environment": environment(),
        "weights": weights_fingerprint(settings.model),
    }
