"""Writes the card and the attributions of c3-tiny from its measured results and its training files.

`python -m benchmarks.c3_tiny_card --data-dir TEXTS` fills `README.md` and `ATTRIBUTION.md` of the packaged checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import c3_hf
from c3_hf.data.tasks import FIND_PROMPT
from c3_hf.files import write_json

from .finding import GIVEN_TOKENS, NUM_TOKENS
from .record import ROOT


RESULTS = ROOT / "benchmarks" / "results" / "c3-tiny"
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

The model in the box of c3_hf: a Context Cascade Compression model ([C3,
arXiv 2511.15244](https://arxiv.org/abs/2511.15244)) of {million:.1f} million parameters that compresses a text
into {num_latents} latents and restores it, offline, on a CPU, in seconds. It was trained from scratch by the
project's own trainer, so that everything the package says about C3 can be tried anywhere.

```python
import c3_hf

model = c3_hf.C3ForConditionalGeneration.from_pretrained(c3_hf.tiny_model_path())
processor = c3_hf.C3Processor.from_pretrained(c3_hf.tiny_model_path())
```

## What it restores

Free-running greedy decoding from one block of {num_latents} latents; held-out documents cut to the length;
character precision is 1 - edit distance / length of the longer text, mean over N texts. {num_latents} latents
times the ratio is the number of tokens; one token of this vocabulary is about {chars_en:.1f} characters of
English or {chars_zh:.1f} of Chinese.

{table}

A latent stands for at most {tokens_per_latent} tokens; `compress` cuts texts into segments of at most {longest}.

## What it finds

A question to c3-tiny is the beginning of a sentence. Asked to find it, it is to go on as the text does:

```python
messages = [
    {{"role": "user", "content": [{{"type": "context", "text": text}}, {{"type": "text", "text": "{find_prompt}"}}]}},
    {{"role": "assistant", "content": "The access code of the depot at Bergen is"}},
]
inputs = processor.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
```

Generated facts ("The access code of the depot at Bergen is 482913.", crates on a ferry, the keeper of a lighthouse),
hidden in {question_tokens} tokens of held-out fiction, one asked for; right is the rest of the sentence to the letter:

{questions}

Sentences of held-out text, of which the first {given} tokens are given, from one block of {question_tokens} tokens:

{sentences}

Every text restored lies in `benchmarks/results/c3-tiny/items.jsonl` of the repository.

![character precision by ratio](curve.png)

## How it was trained

Two halves of the family {family} over one byte-level BPE vocabulary of {num_words:,} words, which holds the special
strings of the released model: an encoder of {encoder_layers} layers and a decoder of {decoder_layers}, width {width}.
They began as random numbers, and every parameter trained.

The recipe is `examples/recipes/c3_tiny.yaml`, the log of the run `benchmarks/results/c3-tiny/log.jsonl`, the hashes of
the training files `benchmarks/results/c3-tiny/data.json`.

Training text: OpenStax textbooks (CC BY 4.0), Standard Ebooks novels (public domain), children's stories (CC BY
4.0; TinyStories under CDLA-Sharing-1.0), Chinese vernacular novels (public domain). ATTRIBUTION.md names the
books and the authors. More than a third of the texts to restore are shuffled words, random tokens, digits, code-like
and other texts that cannot be guessed.

## What it is not

- Not the released C3: that one has 4.6 billion parameters and is measured at 20 to 40 tokens a latent.
- Not a language model: other prompts than those it was trained on get no sensible reply.
- Not lossless. A restored text can be wrong without looking wrong, more often the more tokens a latent stands for.
  Check before you rely on exact strings.
"""


def results_table(rows: list[dict]) -> str:
    """Markdown table: kinds down, ratios across, each cell with its number of texts."""
    ratios = sorted({row["ratio"] for row in rows})
    lines = ["| text | " + " | ".join(f"{ratio}x" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = {row["ratio"]: row for row in rows if row["kind"] == kind}
        shown = [
            f"{cells[ratio]['char_precision']:.1%} (N={cells[ratio]['num_items']})" if ratio in cells else ""
            for ratio in ratios
        ]
        lines.append(f"| {kind} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def questions_table(rows: list[dict]) -> str:
    """Markdown table of the right answers by the number of facts in the text."""
    lines = ["| facts in the text | right |", "|---|---|"]
    lines += [f"| {row['facts']} | {row['accuracy']:.0%} (N={row['questions']}) |" for row in rows]
    return "\n".join(lines)


def sentences_table(rows: list[dict]) -> str:
    """Markdown table of the sentences that came back."""
    following = f"next_{GIVEN_TOKENS}_tokens"
    lines = [f"| text | whole rest to the letter | the next {GIVEN_TOKENS} tokens |", "|---|---|---|"]
    lines += [f"| {row['kind']} (N={row['sentences']}) | {row['exact']:.0%} | {row[following]:.0%} |" for row in rows]
    return "\n".join(lines)


def write_card(folder: Path) -> None:
    """Write README.md and its picture into the checkpoint's folder."""
    summary = json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))
    items = [json.loads(line) for line in (RESULTS / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    config = c3_hf.C3Config.from_pretrained(folder)
    model = c3_hf.C3ForConditionalGeneration(config)
    rate = {
        kind: sum(item["num_chars"] for item in chosen) / sum(item["num_tokens"] for item in chosen)
        for kind in ("English fiction", "Chinese novel")
        for chosen in [[item for item in items if item["kind"] == kind]]
    }
    card = CARD.format(
        million=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        num_latents=config.num_latents,
        chars_en=rate["English fiction"],
        chars_zh=rate["Chinese novel"],
        table=results_table(summary["restoring"]),
        longest=config.longest_segment,
        tokens_per_latent=config.longest_segment // config.num_latents,
        family=config.text_config.model_type,
        num_words=config.text_config.vocab_size,
        find_prompt=FIND_PROMPT,
        question_tokens=NUM_TOKENS,
        questions=questions_table(summary["answering"]),
        given=GIVEN_TOKENS,
        sentences=sentences_table(summary["going_on"]),
        encoder_layers=config.encoder_config.num_hidden_layers,
        decoder_layers=config.text_config.num_hidden_layers,
        width=config.text_config.hidden_size,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(RESULTS / "curve.png", folder / "curve.png")
    write_json(folder / "curve.json", curve(summary))


def curve(summary: dict) -> dict:
    """What the page of the demo shows beside a visitor's text; see `recorded_trials` in `c3_hf.web.study`."""
    names = ("kind", "ratio", "num_items", "char_precision", "accuracy_by_position")
    return {
        "weights": summary["weights"],
        "restoring": [{name: row[name] for name in names} for row in summary["restoring"]],
    }


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
    arguments = parser.parse_args()
    folder = Path(c3_hf.tiny_model_path())
    write_card(folder)
    write_attribution(folder, arguments.data_dir)


if __name__ == "__main__":
    main()
