"""Writes the card and the attributions of c3-tiny from its measured results and its training files.

`python -m benchmarks.c3_tiny_card --data-dir TEXTS --machines "one H100" "one core of a CPU" ...` fills `README.md`
and `ATTRIBUTION.md` of the packaged checkpoint; a machine for each of `PARTS`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import c3_hf
from c3_hf.data.tasks import FIND_PROMPT, retrieval_questions
from c3_hf.files import write_json

from .c3_tiny_forty import KNOWN_STRIDE, NUM_LATENTS
from .finding import GIVEN_WORDS, NEXT_WORDS
from .record import ROOT


RESULTS = ROOT / "benchmarks" / "results" / "c3-tiny"
# Parts of its training done again with other seeds, and what the card says of them.
AGAIN = {
    RESULTS.with_name("c3-tiny-seed-1"): "a second training with other seeds, which ended with the second part below; "
    "where it is lower, at 16x above all, some blocks have words behind their end",
    RESULTS.with_name("c3-tiny-seed-6"): "the third and fourth part with other seeds, from the same second part: the "
    "heads with seed 6, and then the mean of two trainings again, with seeds 7 and 8",
}
# Both trainings of the last part, each measured alone; their mean; and the mean of the other two.
LAST_PART = {
    **{f"seed {seed}": RESULTS.with_name(f"c3-tiny-seed-{seed}") for seed in (4, 5)},
    "their mean, as shipped": RESULTS,
    "with other heads, the mean of seeds 7 and 8": RESULTS.with_name("c3-tiny-seed-6"),
}
# Its weights trained on at twice the tokens a latent that they claim.
FORTY = RESULTS.with_name("c3-tiny-forty")
# The parts of its training: log, recipe, what was trained; the weights are the mean of the last two.
PARTS = (
    ("log.jsonl", "c3_tiny.yaml", "all parameters, from random weights"),
    ("log_full_blocks.jsonl", "c3_tiny_full_blocks.yaml", "all, with blocks that are full and other scripts"),
    ("log_finding.jsonl", "c3_tiny_finding.yaml", "17 of the decoder's 48 heads, told where to look for a place"),
    ("log_whole_decoder.jsonl", "c3_tiny_whole_decoder.yaml", "all of the decoder, again by its words alone"),
    ("log_whole_decoder_5.jsonl", "c3_tiny_whole_decoder.yaml", "the same, seed 5"),
)
CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: [en, zh]
tags:
- c3
- context-compression
- arxiv:2511.15244
---

# c3-tiny

A Context Cascade Compression model ([C3, arXiv 2511.15244](https://arxiv.org/abs/2511.15244)) of {million:.1f} million
parameters that has learnt, from random weights, to compress a text into {num_latents} latents and to restore it,
offline, on a CPU. It makes mistakes: the tables below count them. It comes in the package of c3_hf, so that
everything there can be tried anywhere.

```python
import c3_hf

model = c3_hf.C3ForConditionalGeneration.from_pretrained(c3_hf.tiny_model_path())
processor = c3_hf.C3Processor.from_pretrained(c3_hf.tiny_model_path())
```

## What it restores

Free-running greedy decoding from one block of {num_latents} latents; pieces of held-out documents, and tokens drawn at
random. {num_latents} latents times the ratio is the number of tokens; one token of this vocabulary is about
{chars_en:.1f} characters of English or {chars_zh:.1f} of Chinese. In brackets 95 % bootstrap intervals over the texts.
Where N varies, the fewer are at 40x: few held-out texts are so long.

Character precision, 1 - edit distance / length of the longer text:

{precision}

Texts that came back whole, to the letter:

{whole}

Token by token, free running, and in brackets with the right text before each token (teacher-forced): how far apart the
two are says whether decoding loses its place.

{tokens}
{again}{last_part}
A latent stands for {tokens_per_latent} tokens at most (`latent_stride`), so that one block holds {longest}; of longer
texts the rest is lost. `compress` cuts texts into segments of at most {longest} tokens, and gives a shorter segment
the least stride that covers it; `ratio` and `target_fidelity` choose lower ones.
{forgetting}{found}
Every text measured has a line in `benchmarks/results/c3-tiny/items.jsonl` of the repository, with its hash.

![character precision by ratio](curve.png)

## How it was trained

Two {family} halves over one byte-level BPE vocabulary of {words:,} words, which holds the special strings of the
released model: an encoder of {encoder_layers} layers and a decoder of {decoder_layers}, width {width}. All parameters
have been trained, by the project's own trainer, in {num_parts} parts; the last one twice with other seeds, and the
weights are the mean of both:

{parts}

Logs are in `benchmarks/results/c3-tiny`, the hashes of the training files in `data.json` there.

Training text: OpenStax textbooks (CC BY 4.0), Standard Ebooks novels (public domain), children's stories (CC BY
4.0; TinyStories under CDLA-Sharing-1.0), Chinese vernacular novels (public domain). ATTRIBUTION.md names the
books and the authors. Half of the texts to restore are shuffled words, random tokens, digits, code-like and other
texts that cannot be guessed.

## What it is not

- Not the released C3: that one has 4.6 billion parameters and is measured at 20 to 40 tokens a latent.
- Not a language model: it knows nothing of the world, and prompts other than {prompts} get no
  sensible reply.
- Not for every language. It was trained on English, Chinese and, from its second part on, words of random letters of
  two dozen other scripts; on running text of another language it is not measured.
- Not lossless. Now and then a token is wrong, and a wrong word looks like a right one, the more often the higher the
  ratio. `compress(verify=True)` says which tokens would come back, `exact=True` stores what would not. The tokenizer
  normalises Unicode besides: a letter and its accent come back as one character.
"""
FORGETTING = """
## How it forgets

The weights end, in training as in use, where their claim ends, at {claimed} tokens a latent: at 40x above, half of
the text is cut off and the other half comes back. What becomes of more tokens a latent is seen in a training of its
own, on from these weights at up to {longest_stride} (`c3_tiny_forty.yaml`, {minutes:.0f} minutes of two cores; a block
has {num_latents} latents there and {longest} positions, as many as here). Its weights are not shipped, its record is
`benchmarks/results/{record}`. Character precision, free running:

{precision}

Tokens of a latent that come back, with the right text before each (teacher-forced); the weights that the training
began with held {claimed}:

{held}

At {longest_stride}x {end:.0%} of the last {claimed} tokens of a stretch come back, and {start:.0%} of those before
them, guesses included (mean of all kinds). So it forgets within each latent, and along the whole text alike: of the
first half of English fiction {first_half:.0%} come back free running at {longest_stride}x, of the second
{second_half:.0%}. Of C3 in the original's layout the paper reports that errors gather at the end of a text.
"""
FOUND = """
## What it finds

A question to c3-tiny is words of the text, and the reply goes on behind them as the text does. It has learnt that for
one and two tokens a latent, which `compress(text, ratio=2)` gives; above, what it finds is chance.

```python
pipe = c3_hf.C3Pipeline.from_pretrained()
context = pipe.compress(text, ratio=2)
pipe.ask(context, start="The access code of the depot at Bergen is")
```

Places of held-out text, {given} words given; right are the next word and the next {following}, to the letter. In
brackets 95 % intervals, N={places} each:

{words}

Generated facts ("The access code of the depot at Bergen is 482913.", crates on a ferry, the keeper of a lighthouse),
of {fact_tokens:.0f} tokens in the mean, hidden in held-out fiction of so many tokens, one asked for ("{find_prompt}",
and the beginning of its sentence); right is the rest of the sentence to the letter, and nothing else:

{questions}
"""


def results_table(rows: list[dict], cell: Callable[[dict], str]) -> str:
    """Markdown table: kinds down, with the number of texts, ratios across."""
    numbers: dict[str, set[int]] = {}
    for row in rows:
        numbers.setdefault(row["kind"], set()).add(row["num_items"])
    heads = {
        kind: f"{kind} (N={min(found)})" if len(found) == 1 else f"{kind} (N={min(found)} to {max(found)})"
        for kind, found in numbers.items()
    }
    return table_by_ratio([{**row, "kind": heads[row["kind"]]} for row in rows], cell)


def table_by_ratio(rows: list[dict], cell: Callable[[dict], str]) -> str:
    """Markdown table: kinds down, ratios across."""
    ratios = sorted({row["ratio"] for row in rows})
    lines = ["| text | " + " | ".join(f"{ratio}x" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = {row["ratio"]: row for row in rows if row["kind"] == kind}
        shown = [cell(cells[ratio]) if ratio in cells else "" for ratio in ratios]
        lines.append(f"| {kind} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def with_interval(name: str) -> Callable[[dict], str]:
    """What shows a mean, 99.12 % [98.20, 99.71]."""

    def show(row: dict) -> str:
        low, high = row["intervals"][name]
        return f"{row[name]:.2%} [{100 * low:.2f}, {100 * high:.2f}]"

    return show


def questions_table(one: list[dict], several: list[dict]) -> str:
    """Markdown table of the right answers by length and the number of facts, from one context and from several."""
    lines = ["| tokens of prose | facts | in one context | in two to four contexts |", "|---|---|---|---|"]
    for row, other in zip(one, several):
        shares = [share_right(cell["accuracy"], cell["interval"], cell["questions"]) for cell in (row, other)]
        lines.append(f"| {row['prose_tokens']} | {row['facts']} | {' | '.join(shares)} |")
    return "\n".join(lines)


def share_right(share: float, interval: tuple[float, float], number: int) -> str:
    """What shows a share, its interval, and of how many it is one, 3% [1, 10] (N=71)."""
    return f"{share_between(share, interval)} (N={number})"


def share_between(share: float, interval: tuple[float, float]) -> str:
    """What shows a share and its interval, 3% [1, 10]."""
    low, high = interval
    return f"{share:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def places_table(rows: list[dict]) -> str:
    """Markdown table of the places whose next word, and next words, came back: kinds down, ratios across."""
    following = f"next_{NEXT_WORDS}_words"
    return table_by_ratio(
        rows, lambda row: f"{share_between(row['next_word'], row['next_word_interval'])}, {row[following]:.0%}"
    )


def write_card(folder: Path, machines: Sequence[str]) -> None:
    """Write README.md and its picture into the checkpoint's folder."""
    summary = summary_of(RESULTS)
    items = [json.loads(line) for line in (RESULTS / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    pipe = c3_hf.C3Pipeline.from_pretrained(folder)
    config, rows = pipe.model.config, summary["restoring"]
    rate = {
        kind: sum(item["num_chars"] for item in chosen) / sum(item["num_tokens"] for item in chosen)
        for kind in ("English fiction", "Chinese novel")
        for chosen in [[item for item in items if item["kind"] == kind]]
    }
    card = CARD.format(
        million=sum(parameter.numel() for parameter in pipe.model.parameters()) / 1e6,
        num_latents=config.num_latents,
        chars_en=rate["English fiction"],
        chars_zh=rate["Chinese novel"],
        precision=results_table(rows, with_interval("char_precision")),
        whole=results_table(rows, with_interval("exact")),
        tokens=results_table(rows, lambda row: f"{row['free_running']:.2%} ({row['teacher_forced']:.2%})"),
        again=trained_again(),
        last_part=last_part(config.longest_segment // config.num_latents),
        longest=config.longest_segment,
        tokens_per_latent=config.longest_segment // config.num_latents,
        forgetting=how_it_forgets(),
        found=what_it_finds(summary, pipe.processor) if "answering" in summary else "",
        family=config.text_config.model_type.capitalize(),
        words=config.text_config.vocab_size,
        num_parts=len({recipe for _, recipe, _ in PARTS}),
        parts=parts_table(machines),
        encoder_layers=config.encoder_config.num_hidden_layers,
        decoder_layers=config.text_config.num_hidden_layers,
        width=config.text_config.hidden_size,
        prompts=", ".join(f'"{prompt}"' for prompt in pipe.processor.prompts.values()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(RESULTS / "curve.png", folder / "curve.png")
    write_json(folder / "curve.json", curve(summary))


def summary_of(folder: Path) -> dict:
    """What `restoring_by_ratio` measured into `folder`."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def trained_again() -> str:
    """The tables of parts of the training that were done again, of which `AGAIN` has the records."""
    return "".join(
        f"\nCharacter precision of {what}. Its weights are not shipped, its record is "
        f"`benchmarks/results/{folder.name}`.\n\n"
        f"{results_table(summary_of(folder)['restoring'], with_interval('char_precision'))}\n"
        for folder, what in AGAIN.items()
    )


def last_part(ratio: int) -> str:
    """The table of the trainings of the last part and of their means: what is restored at `ratio`, what is found."""
    summaries = [summary_of(folder) for folder in LAST_PART.values()]
    lines = [f"| at {ratio}x | {' | '.join(LAST_PART)} |", "|---" * (len(summaries) + 1) + "|"]
    for rows in zip(*(summary["restoring"] for summary in summaries), strict=True):
        if rows[0]["ratio"] == ratio:
            cells = [f"{row['char_precision']:.2%}, {row['exact']:.0%} whole of {row['num_items']}" for row in rows]
            lines.append(f"| {rows[0]['kind']} | {' | '.join(cells)} |")
    for rows in zip(*(summary.get("places", []) for summary in summaries), strict=True):
        if rows[0]["ratio"] == 1:
            cells = [share_between(row["next_word"], row["next_word_interval"]) for row in rows]
            lines.append(f"| next word, at 1x: {rows[0]['kind']} | {' | '.join(cells)} |")
    records = ", ".join(f"`{folder.name}`" for folder in LAST_PART.values())
    return (
        "\nThe last part below was done twice, with other seeds. What each restores (character precision) and finds "
        "by itself, what the mean of their weights does, and, behind a third part with another seed, the mean of two "
        f"others (in `benchmarks/results`: {records}):\n\n" + "\n".join(lines) + "\n"
    )


def how_it_forgets() -> str:
    """The section on the training at more tokens a latent than are claimed, of which `FORTY` has the records."""
    stretches = json.loads((FORTY / "places.json").read_text(encoding="utf-8"))["stretches"]
    rows = [row for row in summary_of(FORTY)["restoring"] if row["ratio"] >= KNOWN_STRIDE]
    longest = max(row["ratio"] for row in rows)
    places = np.mean([row["by_place_from_the_end"] for row in stretches if row["ratio"] == longest], axis=0)
    tenths = next(row for row in rows if row["ratio"] == longest)["accuracy_by_position"]
    return FORGETTING.format(
        claimed=KNOWN_STRIDE,
        longest_stride=longest,
        minutes=training_minutes(FORTY / "log.jsonl"),
        num_latents=NUM_LATENTS,
        longest=longest * NUM_LATENTS,
        record=FORTY.name,
        precision=results_table(rows, with_interval("char_precision")),
        held=table_by_ratio(stretches, lambda row: f"{sum(row['by_place_from_the_end']):.1f}"),
        end=places[:KNOWN_STRIDE].mean(),
        start=places[KNOWN_STRIDE:].mean(),
        # A tenth is not a whole number of stretches, a half is.
        first_half=np.mean(tenths[:5]),
        second_half=np.mean(tenths[5:]),
    )


def parts_table(machines: Sequence[str]) -> str:
    """Markdown table of the parts of the training, each on its machine."""
    lines = ["| recipe, in `examples/recipes` | trained | minutes | on | log |", "|---|---|---|---|---|"]
    for (log, recipe, trained), machine in zip(PARTS, machines, strict=True):
        lines.append(f"| `{recipe}` | {trained} | {training_minutes(log):.1f} | {machine} | `{log}` |")
    return "\n".join(lines)


def what_it_finds(summary: dict, processor: Any) -> str:
    """The section of a model that was trained to find places."""
    facts = [
        f"{question} {value}. "
        for number in range(100)
        for question, value in retrieval_questions(np.random.default_rng(number))
    ]
    return FOUND.format(
        fact_tokens=np.mean([len(processor.tokenize_context(fact)) for fact in facts]),
        find_prompt=FIND_PROMPT,
        given=GIVEN_WORDS,
        following=NEXT_WORDS,
        places=summary["places"][0]["places"],
        words=places_table(summary["places"]),
        questions=questions_table(summary["answering"], summary["answering_over_segments"]),
    )


def curve(summary: dict) -> dict:
    """What the page of the demo shows beside a visitor's text; see `recorded_trials` in `c3_hf.web.study`."""
    names = ("kind", "ratio", "num_items", "char_precision", "accuracy_by_position")
    return {
        "weights": summary["weights"],
        "restoring": [{name: row[name] for name in names} for row in summary["restoring"]],
    }


def training_minutes(log: str | Path) -> float:
    """Minutes a training took, from its log; each process that went on with it counts from 0."""
    lines = (RESULTS / log).read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return sum(now for now, later in zip(seconds, [*seconds[1:], 0.0]) if later < now) / 60


def records(path: Path) -> Iterator[dict]:
    """Records of a gzip JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_attribution(folder: Path, data_dir: Path) -> None:
    """Write ATTRIBUTION.md: the OpenStax books with their commits, and every story with its author and licence."""
    books = sorted({record["source"].split(":")[0] for record in records(data_dir / "en_textbook.jsonl.gz")})
    novels = sorted({record["source"].split(":")[0] for record in records(data_dir / "en_fiction.jsonl.gz")})
    stories, tiny_stories = [], 0
    for record in records(data_dir / "en_children.jsonl.gz"):
        match = re.search(r"\(CC BY 4\.0; text: (.*)\)$", record["source"])
        if match is None:
            tiny_stories += 1
            continue
        stories.append(f"- {record['text'].splitlines()[0].strip()}, by {match[1]}")
    lines = [
        "# What c3-tiny was trained on, and by whom",
        "",
        "## OpenStax textbooks, CC BY 4.0",
        "",
        "Text of the following books (OpenStax, <https://openstax.org>) without figures, tables, exercises and",
        "mathematics, each at a commit under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/):",
        "",
        *(f"- OpenStax, {book}" for book in books),
        "",
        "## Children's stories, CC BY 4.0",
        "",
        "From Pratham Books' StoryWeaver and the African Storybook",
        "([CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)):",
        "",
        *stories,
        "",
        f"And {tiny_stories} stories of TinyStories, CDLA-Sharing-1.0.",
        "",
        "## Public domain",
        "",
        "Chinese vernacular novels whose authors died over 70 years ago (NiuTrans/Classical-Modern,",
        "tennessine/corpus), and novels from Standard Ebooks (mark-up CC0 1.0):",
        "",
        *(f"- {novel}" for novel in novels),
        "",
    ]
    (folder / "ATTRIBUTION.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the training files")
    parser.add_argument(
        "--machines", required=True, nargs=len(PARTS), help="what each part was trained on, such as 'one H100'"
    )
    arguments = parser.parse_args()
    folder = Path(c3_hf.tiny_model_path())
    write_card(folder, arguments.machines)
    write_attribution(folder, arguments.data_dir)


if __name__ == "__main__":
    main()
