"""Make what `examples/recipes/c3_tiny_forty.yaml` trains: c3-tiny with latents that may stand for forty tokens.

`python -m benchmarks.c3_tiny_forty --data-dir HELD_OUT FOLDER` writes its weights with two changes:

- A block has 16 latents instead of 32, the first ones. 16 times 40 positions are as many as 32 times 20, so that a
  reply is as far from its latents as the decoder has learnt, and up to twenty tokens a latent nothing changes.
- Heads without which the model restores at twenty tokens a latent (they are found by leaving them out) begin anew,
  with distances of their own and silent. Each place of a latent takes a head of either half, and heads that all look
  at one of the first twenty places have no gradient that would move them to another.

`--measure MODEL` writes `places.json` into the folder instead: which tokens of the stretch that a latent stands for
come back from a trained one, by their distance from its end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import c3_hf
from c3_hf.evaluation.provenance import clean_commit, weights_fingerprint
from c3_hf.files import write_json
from c3_hf.latents.measure import measure_margins
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration
from c3_hf.modeling.positions_c3 import pad_rows
from c3_hf.modeling.processing_c3 import C3Processor
from c3_hf.pipeline import C3Pipeline

from .record import environment
from .restoring_by_ratio import held_out_items, held_out_records


NUM_LATENTS, STRIDE = 16, 40
KNOWN_STRIDE = 20
# Heads are left out while so many tokens of so many full blocks come back.
LEAST_ACCURACY, NUM_BLOCKS = 0.97, 4
# Of the biases that a head begins with, as in c3_tiny.yaml.
SPREADS = {"encoder": 5.0, "language_model": 3.0}
QUERY_KEY_STD, VALUE_STD = 0.025, 0.05
SEED = 9
RATIOS = (20, 24, 28, 32, 36, 40)
MOST_ITEMS = 40


def with_fewer_latents() -> C3Pipeline:
    """c3-tiny with `NUM_LATENTS` latents that stand for up to `STRIDE` tokens; what it was not trained for is gone."""
    path = c3_hf.tiny_model_path()
    model = C3ForConditionalGeneration.from_pretrained(path, dtype=torch.float32, latent_stride=STRIDE)
    queries = model.model.latent_queries.weight.data[:NUM_LATENTS]
    model.model.latent_queries = nn.Embedding.from_pretrained(queries.clone(), freeze=False)
    model.config.num_latents = NUM_LATENTS
    tokenizer = C3Processor.from_pretrained(path).tokenizer
    return C3Pipeline(model, C3Processor(tokenizer, num_latents=NUM_LATENTS))


def spare_heads(pipe: C3Pipeline, half: nn.Module, sequences: list[list[int]]) -> list[tuple[int, int]]:
    """Layers and numbers of the heads of a half that can be left out together, the least needed first."""

    def lost(layer: int, head: int) -> float:
        with silenced(half, layer, head):
            return 1 - accuracy(pipe, sequences)

    heads = [(n, head) for n in range(len(half.layers)) for head in range(half.config.num_attention_heads)]
    spare: list[tuple[int, int]] = []
    with ExitStack() as left_out:
        for _, layer, head in sorted((round(100 * lost(layer, head), 1), layer, head) for layer, head in heads):
            with ExitStack() as tried:
                tried.enter_context(silenced(half, layer, head))
                if accuracy(pipe, sequences) >= LEAST_ACCURACY:
                    left_out.enter_context(tried.pop_all())
                    spare.append((layer, head))
    return spare


@contextmanager
def silenced(half: nn.Module, layer: int, head: int) -> Iterator[None]:
    """Let a head say nothing for a while."""
    part = half.layers[layer].self_attn.o_proj.weight.data[:, rows_of(half, head)]
    kept = part.clone()
    part.zero_()
    try:
        yield
    finally:
        part.copy_(kept)


def rows_of(half: nn.Module, head: int) -> slice:
    """Where a head lies in the projections of its layer."""
    return slice(head * half.config.head_dim, (head + 1) * half.config.head_dim)


def accuracy(pipe: C3Pipeline, sequences: Sequence[Sequence[int]]) -> float:
    """Share of the tokens that come back, teacher-forced, at `KNOWN_STRIDE` tokens a latent."""
    return float(torch.cat(come_back(pipe, sequences, KNOWN_STRIDE)).float().mean())


@torch.no_grad()
def come_back(pipe: C3Pipeline, sequences: Sequence[Sequence[int]], stride: int) -> list[torch.Tensor]:
    """Which tokens of each text come back, teacher-forced, from one block of latents of `stride` tokens each."""
    ids, mask = pad_rows([torch.tensor(sequence) for sequence in sequences], left=False)
    strides = torch.full((len(sequences),), stride)
    latents = pipe.model.get_context_features(ids[:, None], mask[:, None], strides[:, None])[:, 0]
    return [margins[:-1] > 0 for margins in measure_margins(pipe.restorer, latents, sequences, strides)]


def measure_stretches(pipe: C3Pipeline, data_dir: Path) -> list[dict[str, Any]]:
    """By kind and ratio the share of the tokens at each place of a stretch that come back, its last one first."""
    items = list(held_out_items(data_dir, pipe.processor, RATIOS, MOST_ITEMS))
    rows = []
    for kind, ratio in dict.fromkeys((item.kind, item.ratio) for item in items):
        texts = [item.text for item in items if (item.kind, item.ratio) == (kind, ratio)]
        sequences = [pipe.processor.tokenize_context(text)[: ratio * NUM_LATENTS] for text in texts]
        right: list[list[bool]] = [[] for _ in range(ratio)]
        for found in come_back(pipe, sequences, ratio):
            for index, token in enumerate(found.tolist()):
                right[ratio - 1 - index % ratio].append(token)
        shares = [round(sum(place) / len(place), 4) for place in right]
        rows.append({"kind": kind, "ratio": ratio, "num_items": len(texts), "by_place_from_the_end": shares})
    return rows


def draw_anew(half: nn.Module, heads: list[tuple[int, int]], spread: float, generator: torch.Generator) -> None:
    """Give heads random distances to look at; they say nothing at first, so that the others go on as before."""
    for layer, head in heads:
        attention, rows = half.layers[layer].self_attn, rows_of(half, head)
        for projection in (attention.q_proj, attention.k_proj):
            bias, weight = projection.bias.data[rows], projection.weight.data[rows]
            bias.copy_(torch.randn(bias.shape, generator=generator) * spread)
            weight.copy_(torch.randn(weight.shape, generator=generator) * QUERY_KEY_STD)
        weight = attention.v_proj.weight.data[rows]
        weight.copy_(torch.randn(weight.shape, generator=generator) * VALUE_STD)
        attention.v_proj.bias.data[rows] = 0
        attention.o_proj.weight.data[:, rows] = 0


def write_start(folder: Path, data_dir: Path) -> None:
    """Find the heads, draw them anew, write the model and which heads they are."""
    pipe = with_fewer_latents()
    records = held_out_records(data_dir, "passages_en.jsonl.gz", None, "en")
    stream = (token for record in records for token in pipe.processor.tokenize_context(record["text"]))
    sequences = [list(islice(stream, NUM_LATENTS * KNOWN_STRIDE)) for _ in range(NUM_BLOCKS)]
    halves = {name: getattr(pipe.model.model, name) for name in SPREADS}
    heads = {name: spare_heads(pipe, half, sequences) for name, half in halves.items()}
    generator = torch.Generator().manual_seed(SEED)
    for name, half in halves.items():
        draw_anew(half, heads[name], SPREADS[name], generator)
    pipe.model.save_pretrained(folder)
    pipe.processor.save_pretrained(folder)
    write_json(folder / "drawn_heads.json", heads)


def main() -> None:
    """Write the start of the training, or measure what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the held-out files")
    parser.add_argument("--measure", metavar="MODEL", help="measure this trained model instead")
    parser.add_argument("--allow-changes", action="store_true", help="record from a checkout with changes")
    parser.add_argument("folder", type=Path, help="where to write")
    arguments = parser.parse_args()
    if arguments.measure is None:
        write_start(arguments.folder, arguments.data_dir)
        return
    commit = clean_commit(arguments.allow_changes)
    pipe = C3Pipeline.from_pretrained(arguments.measure, dtype="float32")
    found = {
        "commit": commit,
        "weights": weights_fingerprint(pipe.model),
        "stretches": measure_stretches(pipe, arguments.data_dir),
        "environment": environment(torch.device("cpu")),
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_json(arguments.folder / "places.json", found)


if __name__ == "__main__":
    main()
