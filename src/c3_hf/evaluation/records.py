"""What is kept of one item: inputs' hash, output, metrics, cost."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from operator import itemgetter

from c3_hf.evaluation.interface import System
from c3_hf.evaluation.items import QuestionItem, RestoreItem
from c3_hf.evaluation.scoring import score_answer, score_restoration
from c3_hf.evaluation.summary import grouped, mean_of
from c3_hf.evaluation.tokens import TokenMeter


Item = RestoreItem | QuestionItem


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


def make_record(
    task: str,
    item: Item,
    answer: str | None,
    system: System,
    meter: TokenMeter,
    meteor: bool,
    hash_only: re.Pattern | None,
    seconds: float,
) -> dict:
    """The JSON line of one finished item.

    Args:
        task: Name of the task.
        item: What the system was given.
        answer: What it gave back; `None`, an item it cannot take, is scored as an empty output.
        system: Tells the slots.
        meter: Counts tokens, and gives the token metrics their ids.
        meteor: Compute METEOR in the Fox block.
        hash_only: Items whose id or source it finds keep hashes in place of texts.
        seconds: Wall-clock time of the item's batch over the number of its items.

    Returns:
        A record with the item's labels, `inputs_hash`, `num_tokens` and `slots` of the context, `reference` or
        `question` and `answers`, `refused` (too long for the system), `output`, `output_hash`, `metrics` and
        `seconds`.
    """
    texts: dict[str, object]
    output = answer or ""
    if isinstance(item, RestoreItem):
        segments: Sequence[str] = item.segments
        metrics = score_restoration(output, item.text, meter.encode, meteor)
        texts = {"reference": item.text}
    else:
        segments = [segment for context in item.contexts for segment in meter.segments(context)]
        metrics = score_answer(output, item.answers)
        texts = {"question": item.question, "answers": list(item.answers)}
    texts["output"] = output
    if hash_only is not None and (hash_only.search(item.id) or hash_only.search(item.source)):
        texts = dict.fromkeys(texts)
    return {
        "task": task,
        "id": item.id,
        "kind": item.kind,
        "lang": item.lang,
        "bin": item.bin,
        "source": item.source,
        "inputs_hash": item.inputs_hash,
        "num_tokens": sum(meter.count(segment) for segment in segments),
        "slots": sum(system.slots(segment) for segment in segments),
        "refused": answer is None,
        **texts,
        "output_hash": hashlib.sha256(output.encode("utf-8", "surrogatepass")).hexdigest(),
        "metrics": metrics,
        "seconds": round(seconds, 4),
    }


def summarise(records: Sequence[dict]) -> dict:
    """Means by task, and within a task by kind, language and bin.

    Args:
        records: Item records, in the order of the tasks' own items.

    Returns:
        `metrics`: what a repetition must give again, to the last digit; `seconds`: what it need not.
    """
    metrics, seconds = {}, {}
    for task, rows in grouped(records, itemgetter("task")).items():
        metrics[task] = {"all": _means(rows)}
        for key in ("kind", "lang", "bin"):
            groups = grouped(rows, itemgetter(key))
            metrics[task][f"by_{key}"] = {name: _means(group) for name, group in groups.items()}
        seconds[task] = round(sum(row["seconds"] for row in rows), 3)
    return {"metrics": metrics, "seconds": seconds}


def _means(rows: Sequence[dict]) -> dict:
    tokens, slots = (sum(row[key] for row in rows) for key in ("num_tokens", "slots"))
    return {
        "items": len(rows),
        "refused": sum(row["refused"] for row in rows),
        "compression_ratio": tokens / max(slots, 1),
        **mean_of([row["metrics"] for row in rows]),
    }
