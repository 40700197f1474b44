"""The plan of a conversion: which stored tensor becomes which, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from c3_hf.conversion import key_table
from c3_hf.conversion.checkpoint import StoredTensor
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration


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


def expected_shapes(config: C3Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a C3 of this configuration stores, found on the meta device (zero bytes)."""
    with torch.device("meta"):
        model = C3ForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def plan_conversion(
    config: C3Config, main_tensors: Iterable[StoredTensor], encoder_tensors: Iterable[StoredTensor]
) -> WeightPlan:
    """Plan the conversion of a checkpoint in the released layout.

    Args:
        config: the configuration of the converted model.
        main_tensors: tensors of the main folder.
        encoder_tensors: tensors of the folder `llm1`.

    Returns:
        The plan. A head is still in it if the configuration says untied, or if one is stored.

    Raises:
        ValueError: if a tensor is missing, unexpected, given twice or of the wrong shape; all are named.
    """
    plan = WeightPlan()
    problems: list[str] = []
    halves = (
        ("main folder", main_tensors, key_table.MAIN_RENAMES, key_table.MAIN_DROPS),
        ("llm1", encoder_tensors, key_table.ENCODER_RENAMES, key_table.ENCODER_DROPS),
    )
    for half, tensors, renames, drops in halves:
        for tensor in tensors:
            reason = key_table.find_drop_reason(tensor.name, drops)
            target = key_table.find_target(tensor.name, renames)
            if reason is not None:
                plan.dropped.append((tensor, reason))
            elif target is None:
                problems.append(f"unexpected in {half}: {tensor.name} {list(tensor.shape)}")
            elif target in plan.sources:
                problems.append(f"given twice: {plan.sources[target].name} and {tensor.name} in {half} ({target})")
            else:
                plan.sources[target] = tensor
    if config.tie_word_embeddings and HEAD in plan.sources:
        plan.drop(HEAD, key_table.TIED_HEAD)
    problems += compare_shapes(expected_shapes(config), plan)
    raise_problems("the checkpoint does not fit its configuration", problems)
    return plan


def compare_shapes(expected: dict[str, tuple[int, ...]], plan: WeightPlan) -> list[str]:
    """List what is missing, surplus or of the wrong shape in `plan`, one line each."""
    problems = [
        f"missing: {key_table.original_name(name)} {list(shape)} (would be {name})"
        for name, shape in expected.items()
        if name not in plan.sources
    ]
    for name, source in plan.sources.items():
        if name not in expected:
            problems.append(f"unexpected: {source.name} {list(source.shape)} (would be {name})")
        elif source.shape != expected[name]:
            problems.append(f"wrong shape: {source.name} {list(source.shape)}, expected {list(expected[name])}")
    return problems


def raise_problems(what: str, problems: list[str]) -> None:
    """Raise a ValueError that lists `problems`, if there are any."""
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{what}; nothing was written:\n  {lines}")
