"""What the measurements of compressed contexts share: arguments, the model, the texts, the record."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from c3_hf import C3Pipeline, tiny_model_path
from c3_hf.evaluation.provenance import clean_commit, weights_fingerprint
from c3_hf.latents.decoding import decode_tokens, generation_budget
from c3_hf.latents.measure import measure_margins
from c3_hf.modeling.positions_c3 import pad_rows

from . import shapes
from .record import Record, environment


RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every one of these benchmarks takes."""
    parsed = argparse.ArgumentParser(description=description)
    parsed.add_argument("--data", type=Path, required=True, help="the folder with eval/ and long/")
    parsed.add_argument("--model", default=tiny_model_path(), help="a C3 model; default: the bundled one")
    parsed.add_argument("--name", default="tiny", help="what the record calls the model")
    parsed.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parsed.add_argument("--device", default="cpu")
    parsed.add_argument("--batch-size", type=int, default=64)
    parsed.add_argument("--limit", type=int, help="texts of each kind; default: all")
    parsed.add_argument("--seed", type=int, default=0)
    parsed.add_argument("--allow-changes", action="store_true", help="record from a checkout with changes")
    parsed.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parsed


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and processor; before they are loaded, the commit that the record will name."""
    options.commit = clean_commit(options.allow_changes)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    return model.to(options.device).eval(), AutoProcessor.from_pretrained(options.model)


class Block(NamedTuple):
    """A text in one block of latents.

    Attributes:
        token_ids: What went in.
        margins: `(num_tokens + 1,)`, teacher-forced, see [`measure_margins`].
        new_ids: What came out, free running.
        text: The same as text.
    """

    token_ids: Sequence[int]
    margins: torch.Tensor
    new_ids: list[int]
    text: str


@torch.no_grad()
def restore_blocks(pipe: C3Pipeline, sequences: Sequence[Sequence[int]]) -> list[Block]:
    """Each text, as tokens, by itself in one block of latents of the model's dtype, however long it is.

    Where latents have a stride, the least that covers the text, or the largest there is: what is behind it is lost.
    """
    model, config = pipe.model, pipe.model.config
    ids, mask = pad_rows([torch.tensor(sequence) for sequence in sequences], left=False)
    strides = None
    if config.latent_stride is not None:
        least = [min(-(-len(sequence) // config.num_latents), config.latent_stride) for sequence in sequences]
        strides = torch.tensor(least, device=model.device)
    latents = model.get_context_features(
        ids[:, None].to(model.device), mask[:, None].to(model.device), None if strides is None else strides[:, None]
    )[:, 0]
    margins = measure_margins(pipe.restorer, latents, sequences, strides)
    new_ids = pipe.restorer.generate(latents, generation_budget(max(map(len, sequences))), strides)
    return [
        Block(sequence, values, ids, decode_tokens(pipe.processor, ids))
        for sequence, values, ids in zip(sequences, margins, new_ids)
    ]


def texts(options: argparse.Namespace, kind: str) -> list[str]:
    """Texts of one kind, at most `--limit`, evenly over the file."""
    return [record["text"] for record in records(options.data / "eval" / f"{kind}.jsonl.gz", options.limit)]


def records(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Records of a JSONL file, at most `limit`, evenly over it."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def data_hash(parts: Sequence[str]) -> str:
    """SHA-256 over texts, so that a record says what it was measured on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def write_record(
    name: str, options: argparse.Namespace, model: Any, started: float, measurements: list[dict[str, Any]], **more: Any
) -> Path:
    """Write the record and say where."""
    ignored = {
        "data",
        "output",
        "model",
        "name",
        "plot",
        "save",
        "child",
        "resume",
        "allow_changes",
        "commit",
        "engine_url",
        "vllm_python",
    }
    settings = {key: value for key, value in vars(options).items() if key not in ignored}
    described = shapes.describe("tiny", model)
    described.update(name=options.name, weights=weights_fingerprint(model))
    path = Record(
        benchmark=name,
        command=f"python -m benchmarks.{name} --data DATA",
        environment=environment(model.device),
        model=described,
        settings={**settings, **more},
        floors={},
        measurements=measurements,
        seconds=time.perf_counter() - started,
        commit=options.commit,
    ).write(options.output)
    print(f"{time.strftime('%H:%M:%S')} {path.name}", file=sys.stderr)
    return path
