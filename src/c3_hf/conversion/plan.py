"""The plan of a conversion: which stored tensor becomes which, checked before anything is written.

The tables say which original tensor becomes which of ours, and which are left out for what reason. A source pattern is
a regular expression that must match a whole tensor name; the target may use its groups. The tables are read from the
top, the first match counts. A descendant of the original that differs by names only is one more row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from c3_hf.conversion.weights import StoredTensor, raise_problems
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration


# The main folder of the release: decoder, latent queries, projector.
MAIN_RENAMES = {
    r"model\.Q\.weight": r"model.latent_queries.weight",
    r"model\.mm_projector\.(weight|bias)": r"model.projector.\1",
    r"model\.((?:embed_tokens|layers|norm)\..+)": r"model.language_model.\1",
    r"(lm_head\.weight)": r"\1",
    # Descendants that save the whole model in one folder, as a plain save_pretrained of the original's class does.
    r"model\.llm1\.model\.((?:embed_tokens|layers|norm)\..+)": r"model.encoder.\1",
}
# The subfolder llm1: the encoder as a causal language model.
ENCODER_RENAMES = {r"model\.((?:embed_tokens|layers|norm)\..+)": r"model.encoder.\1"}

_ROTARY_DROP = {r".*\.rotary_emb\.inv_freq": "rotary frequencies are computed from the configuration"}
_UNUSED_HEAD = "the encoder's head is never used: only its hidden states are read"
MAIN_DROPS = {r"model\.llm1\.lm_head\.weight": _UNUSED_HEAD, **_ROTARY_DROP}
ENCODER_DROPS = {r"lm_head\.weight": _UNUSED_HEAD, **_ROTARY_DROP}
TIED_HEAD = "tie_word_embeddings is true: the head is the embedding table"
EQUAL_HEAD = "equal to the embedding table, byte for byte: the head is tied"

# Ours back to the original's two folders.
ORIGINAL_MAIN_RENAMES = {
    r"model\.latent_queries\.weight": r"model.Q.weight",
    r"model\.projector\.(weight|bias)": r"model.mm_projector.\1",
    r"model\.language_model\.(.+)": r"model.\1",
    r"(lm_head\.weight)": r"\1",
}
ORIGINAL_ENCODER_RENAMES = {r"model\.encoder\.(.+)": r"model.\1"}

HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


@dataclass
class WeightPlan:
    """What is written from what.

    Attributes:
        sources: target name to stored tensor, in source order.
        dropped: stored tensors left out, each with its reason.
    """

    sources: dict[str, StoredTensor] = field(default_factory=dict)
    dropped: list[tuple[StoredTensor, str]] = field(default_factory=list)

    def drop(self, target: str, reason: str) -> None:
        """Leave the tensor planned as `target` out."""
        self.dropped.append((self.sources.pop(target), reason))


@contextmanager
def naming(what: str | Path) -> Iterator[None]:
    """Say of which file it is that transformers cannot build something.

    Raises:
        ValueError: in place of what transformers and huggingface_hub raise on entries that they do not expect.
    """
    try:
        yield
    except (
        StrictDataclassError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{what}: transformers cannot build a model of these entries ({type(error).__name__}: {reason}). "
            "Compare them with those of the model it was made from, or download the file again."
        ) from error


def find_absent_layers(stated: int, names: Iterable[str], where: str) -> list[str]:
    """Compare a number of layers with the layers that tensor names show, before anything is built by it.

    Args:
        stated: `num_hidden_layers`.
        names: names of one half's tensors; the first number in a name is that of its layer.
        where: what states it, for the message.
    """
    held = {match[1] for name in names if (match := re.search(r"\.(\d+)\.", name))}
    if stated <= len(held):
        return []
    return [f"`num_hidden_layers` in {where} is {stated}, but its weights hold {len(held)} layers"]


def expected_shapes(config: C3Config, where: str | Path = "config.json") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a C3 of this configuration stores, found on the meta device (zero bytes).

    Raises:
        ValueError: if no model can be built; the message names `where`, the configuration's file.
    """
    with naming(where), torch.device("meta"):
        model = C3ForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def plan_conversion(
    config: C3Config,
    main_tensors: Iterable[StoredTensor],
    encoder_tensors: Iterable[StoredTensor],
    where: str = "config.json",
) -> WeightPlan:
    """Plan the conversion of a checkpoint in the released layout.

    Args:
        where: the files the configuration was made of, for messages.

    Returns:
        The plan. A head is still in it if the configuration says untied, or if one is stored.

    Raises:
        ValueError: if a tensor is missing, unexpected, given twice or of the wrong shape; all are named.
    """
    plan = WeightPlan()
    problems: list[str] = []
    halves = (
        ("main folder", main_tensors, MAIN_RENAMES, MAIN_DROPS),
        ("llm1", encoder_tensors, ENCODER_RENAMES, ENCODER_DROPS),
    )
    for half, tensors, renames, drops in halves:
        for tensor in tensors:
            reason = find_target(tensor.name, drops)
            target = find_target(tensor.name, renames)
            if reason is not None:
                plan.dropped.append((tensor, reason))
            elif target is None:
                problems.append(f"unexpected in {half}: {tensor.name} {list(tensor.shape)}")
            elif target in plan.sources:
                problems.append(f"given twice: {plan.sources[target].name} and {tensor.name} in {half} ({target})")
            else:
                plan.sources[target] = tensor
    if config.tie_word_embeddings and HEAD in plan.sources:
        plan.drop(HEAD, TIED_HEAD)
    problems += compare_shapes(expected_shapes(config, where), plan)
    raise_problems("the checkpoint does not fit its configuration", problems)
    return plan


def compare_shapes(expected: dict[str, tuple[int, ...]], plan: WeightPlan) -> list[str]:
    """List what is missing, surplus or of the wrong shape in `plan`, one line each."""
    problems = [
        f"missing: {original_name(name)} {list(shape)} (would be {name})"
        for name, shape in expected.items()
        if name not in plan.sources
    ]
    for name, source in plan.sources.items():
        if name not in expected:
            problems.append(f"unexpected: {source.name} {list(source.shape)} (would be {name})")
        elif source.shape != expected[name]:
            problems.append(f"wrong shape: {source.name} {list(source.shape)}, expected {list(expected[name])}")
    return problems


def original_name(name: str) -> str:
    """The original's name of our tensor `name`, with its folder: "model.Q.weight", "llm1/model.norm.weight"."""
    encoder_name = find_target(name, ORIGINAL_ENCODER_RENAMES)
    if encoder_name is not None:
        return f"llm1/{encoder_name}"
    return find_target(name, ORIGINAL_MAIN_RENAMES) or name


def find_target(name: str, table: dict[str, str]) -> str | None:
    """What a table says of the tensor `name`: the name it is stored under, or why it is left out; None for nothing."""
    for pattern, target in table.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    return None
