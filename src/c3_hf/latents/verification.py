"""One teacher-forced pass over (latents, text): which tokens would come back, and by what margin."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .context import CompressedContext
from .fidelity import to_margin_dtype
from .fingerprints import check_processor
from .residual import lost_characters
from .restoring import Restorer, batches_by_length, check_at_least_1, decode_tokens
from .segmentation import Segment, Source, TextReader, read_segment


# Rows of logits computed at a time: 256 of the released vocabulary are 155 MB in float32.
_LOGIT_ROWS = 256


@torch.no_grad()
def measure_margins(
    restorer: Restorer, context_latents: torch.Tensor, sequences: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logit of the right token less the largest other logit, at every position, as if all before had been right.

    Args:
        restorer: The model and its restoring prompt.
        context_latents: `(batch_size, 1, num_latents, text_hidden_size)`.
        sequences: For each row the token ids that should come back.

    Returns:
        For each row a float32 tensor `(num_tokens + 1,)` on the CPU. The last is the stop token's: the best stop token
        against the best other one.
    """
    model, prompt = restorer.model, restorer.prompt_ids
    longest = max(len(sequence) for sequence in sequences)
    # Padding on the right is never seen by what is in front of it, so any id that is no placeholder will do.
    input_ids = torch.full((len(sequences), longest), restorer.stop_ids[0])
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    input_ids = torch.cat([prompt.expand(len(sequences), -1), input_ids.to(prompt.device)], dim=1)
    hidden = model.model(input_ids=input_ids, context_latents=context_latents, use_cache=False).last_hidden_state
    hidden = hidden[:, len(prompt) - 1 :]
    lengths = [len(sequence) + 1 for sequence in sequences]
    flat = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)])
    targets = torch.cat([torch.tensor([*sequence, -1], dtype=torch.long) for sequence in sequences]).to(flat.device)
    margins = [
        _margins(model.lm_head(rows).float(), row_targets, restorer)
        for rows, row_targets in zip(flat.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS))
    ]
    return list(torch.cat(margins).cpu().split(lengths))


def _margins(logits: torch.Tensor, targets: torch.Tensor, restorer: Restorer) -> torch.Tensor:
    """Margins of logits `(num_rows, vocab_size)`; a target of -1 stands for any stop token."""
    stops = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    stops[restorer.stop_ids] = True
    right = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, targets.clamp(min=0).unsqueeze(1), True)
    right = torch.where((targets < 0).unsqueeze(1), stops, right)
    return logits.masked_fill(~right, -torch.inf).amax(1) - logits.masked_fill(right, -torch.inf).amax(1)


def count_lost(processor: ProcessorMixin, segments: Sequence[Segment]) -> torch.Tensor:
    """Characters of each segment that decoding its own tokens does not give, `(num_segments,)` int64."""
    decoded = [decode_tokens(processor, segment.token_ids) for segment in segments]
    counts = [len(lost_characters(text, segment.text)) for text, segment in zip(decoded, segments)]
    return torch.tensor(counts, dtype=torch.int64)


def verify(
    context: CompressedContext,
    source: Source,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> CompressedContext:
    """Measure the fidelity of a compressed context against the text it was made from.

    Args:
        context: The whole compressed text, not a slice of it.
        source: That text; see [`compress`].
        model: The model that compressed it.
        processor: Its processor.
        batch_size: Segments in one batch.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        The same context with margins, so that `context.fidelity` tells what comes back.

    Raises:
        ValueError: If the model, the processor or the text is another one than the context was made from.
    """
    check_at_least_1("batch_size", batch_size)
    check_processor(context.header.tokenizer, processor, context.name)
    latents = context.context_latents(model)[0]
    segments = read_segments(context, TextReader(source), processor)
    restorer = Restorer(model, processor)
    margins = [torch.empty(0)] * len(segments)
    groups = batches_by_length([len(segment.token_ids) for segment in segments], batch_size)
    for group in tqdm(groups, unit="batch", disable=None if progress else True):
        sequences = [segments[index].token_ids for index in group]
        for index, values in zip(group, measure_margins(restorer, latents[group].unsqueeze(1), sequences)):
            margins[index] = values
    joined = to_margin_dtype(torch.cat([torch.empty(0), *margins]))
    lost = count_lost(processor, segments)
    return dataclasses.replace(context, margins=joined, lost_characters=lost, checksums=None)


def read_segments(context: CompressedContext, reader: TextReader, processor: ProcessorMixin) -> list[Segment]:
    """The segments of `context`, read from the text it was made from.

    Raises:
        ValueError: If the text differs from the one that was compressed, or the segments are not all of it.
    """
    segments = []
    whole = hashlib.sha256()
    for index, length in enumerate(context.char_offsets.diff().tolist()):
        text = reader.take(length)
        segment = Segment(text, tuple(read_segment(processor.reader, text)[0]))
        if segment.digest != bytes(context.digests[index].tolist()):
            raise ValueError(
                f"`source` differs from the text that was compressed, in {context.place(index)} (characters "
                f"{int(context.char_offsets[index]):,} to {int(context.char_offsets[index + 1]):,}). Give the same "
                "text, or compress this one."
            )
        whole.update(segment.data)
        segments.append(segment)
    if reader.peek(1):
        raise ValueError(
            f"`source` goes on behind the {len(segments)} segments of {context.name}, which ends at character "
            f"{int(context.char_offsets[-1]):,}. Give the same text, or append the rest."
        )
    context.check_whole(whole.hexdigest())
    return segments
