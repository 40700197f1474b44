"""Generate the text of contexts back: free running, or with corrections forced so that it cannot lose its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, ProcessorMixin

from .decoding import ForcedTokens, generate_in_stretches
from .fingerprints import restoring_prompt_ids
from .guessing import FIRST_BLOCK, guess_in_blocks, has_full_attention


# Tokens guessed at a step from what the text has said before, where one text is restored alone: the checked guesses
# give the same tokens in fewer steps (docs/log.md). transformers does it for a batch of one only.
_DRAFTED_TOKENS = 3
# Generation settings that greedy decoding does not look at, or that are given here.
_NOT_GREEDY = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams"),
    *("repetition_penalty", "no_repeat_ngram_size", "output_attentions", "output_hidden_states"),
    *("transformers_version", "_from_model_config"),
}


class Restorer:
    """A model and the prompt that asks it for one context back.

    Attributes:
        prompt_ids: `(prompt_length,)` int64, with the block of placeholders.
        stop_ids: Ids that end a generated text.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model, self.processor = model, processor
        self.prompt_ids = torch.tensor(restoring_prompt_ids(processor), device=model.device)
        self.stop_ids = stop_token_ids(model)
        # Whether guessing blocks pays for this model; None until it was tried.
        self._guesses: bool | None = None if self._can_guess() else False

    @property
    def room(self) -> int:
        """Tokens that the decoder has positions for behind the prompt."""
        return decoder_positions(self.model) - len(self.prompt_ids)

    def generate(
        self,
        context_latents: torch.Tensor,
        max_new_tokens: int,
        forced: Sequence[Sequence[tuple[int, int]]] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Greedy decoding from latents.

        Args:
            context_latents: `(batch_size, 1, num_latents, text_hidden_size)`.
            max_new_tokens: Where to stop at the latest, or at the decoder's last position.
            forced: For each row the token ids to force, as (step, id).
            lengths: With `forced`, after how many tokens each row stops.

        Returns:
            The new ids of each row, without the stop token and what follows it.
        """
        batch_size = len(context_latents)
        steps = None
        if forced is not None and lengths is not None:
            steps = torch.full((batch_size, max(lengths) + 1), -1)
            for row, (corrections, length) in enumerate(zip(forced, lengths)):
                for step, token_id in corrections:
                    steps[row, step] = token_id
                steps[row, length] = self.stop_ids[0]
        prompts = self.prompt_ids.expand(batch_size, -1)
        max_new_tokens = min(max_new_tokens, self.room)
        new_ids: list[list[int]] = [[] for _ in range(batch_size)]
        if self._guesses is None:
            # One row and few tokens say it: how a model finds its place does not depend on the text.
            tried = min(max_new_tokens, FIRST_BLOCK)
            first = guess_in_blocks(self.model, prompts[:1], context_latents[:1], tried, steps, self.stop_ids)
            self._guesses = not self._waiting(first, tried)
        if self._guesses:
            new_ids = guess_in_blocks(self.model, prompts, context_latents, max_new_tokens, steps, self.stop_ids)
        waiting = self._waiting(new_ids, max_new_tokens)
        if self._guesses:
            given_up = sum(len(rows) for count, rows in waiting.items() if count < FIRST_BLOCK)
            self._guesses = given_up <= batch_size // 2
        for count, rows in waiting.items():
            known = torch.tensor([new_ids[row] for row in rows], dtype=torch.long, device=prompts.device)
            rest = self._decode(
                torch.cat([prompts[rows], known.reshape(len(rows), count)], dim=1),
                context_latents[rows],
                max_new_tokens - count,
                None if steps is None else steps[rows, count:],
            )
            for row, ids in zip(rows, rest):
                new_ids[row] += ids
        if lengths is not None:
            return [row[:length] for row, length in zip(new_ids, lengths)]
        return [_until_stop(row, self.stop_ids) for row in new_ids]

    def _waiting(self, new_ids: Sequence[Sequence[int]], max_new_tokens: int) -> dict[int, list[int]]:
        """Rows that are not done, by the number of their new ids."""
        waiting: dict[int, list[int]] = {}
        for row, ids in enumerate(new_ids):
            if len(ids) < max_new_tokens and not set(ids[-1:]) & set(self.stop_ids):
                waiting.setdefault(len(ids), []).append(row)
        return waiting

    def _on_cpu(self) -> bool:
        # Under autocast keys and values may differ in dtype, which a static cache does not take.
        return self.model.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def _can_guess(self) -> bool:
        """Whether the greedy choice is the likeliest token and nothing else, and guesses can be taken back."""
        settings = self.model.generation_config.to_diff_dict()
        on_cpu = self.model.device.type == "cpu"
        return on_cpu and settings.keys() <= _NOT_GREEDY and has_full_attention(self.model)

    def _decode(
        self, prompts: torch.LongTensor, latents: torch.Tensor, max_new_tokens: int, forced: torch.LongTensor | None
    ) -> list[list[int]]:
        """Greedy decoding token by token: the new ids of each row, with the stop token and what follows it."""
        chosen = self.model.generation_config.cache_implementation
        # A static cache cannot take guesses back.
        drafts = len(prompts) == 1 and forced is None and chosen is None
        # Spelled out, because what is left open comes from the checkpoint's own generation settings.
        settings = {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.stop_ids[0],
            "prompt_lookup_num_tokens": _DRAFTED_TOKENS if drafts else None,
        }
        # On a GPU transformers would compile a step for each size of the batch and the cache.
        if len(prompts) > 1 and chosen is None and self._on_cpu():
            return generate_in_stretches(self.model, prompts, latents, max_new_tokens, forced, settings)
        output = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            context_latents=latents,
            logits_processor=LogitsProcessorList([] if forced is None else [ForcedTokens(forced)]),
            max_new_tokens=max_new_tokens,
            **settings,
        )
        return output[:, prompts.shape[1] :].tolist()


def context_room(model: PreTrainedModel) -> int:
    """Tokens of a context that the encoder has positions for, beside the queries and their marker."""
    return model.config.encoder_config.max_position_embeddings - model.config.num_latents - 1


def decoder_positions(model: PreTrainedModel) -> int:
    """Positions of the decoder, for prompt and reply together."""
    return model.config.text_config.max_position_embeddings


def stop_token_ids(model: PreTrainedModel) -> list[int]:
    """Ids that end a generated text, from the model's generation settings.

    Raises:
        ValueError: If it has none.
    """
    stop = model.generation_config.eos_token_id
    if stop is None:
        raise ValueError("`model` has no `generation_config.eos_token_id`: set it to the ids that end a reply.")
    return [stop] if isinstance(stop, int) else list(stop)


def context_batch(
    sequences: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and mask, each `(batch_size, 1, longest)`, padded right."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros((len(sequences), 1, longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, 0, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, 0, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions of `lengths` in batches of like lengths, longest first, so that memory peaks at the start.

    Raises:
        ValueError: If `batch_size` is not positive.
    """
    check_at_least_1("batch_size", batch_size)
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def check_at_least_1(name: str, value: object) -> None:
    """Raise ValueError or TypeError unless the argument called `name` is a number of things."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an int of at least 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def generation_budget(num_tokens: int) -> int:
    """New tokens allowed for restoring `num_tokens`: an eighth more than needed, and some."""
    return num_tokens + num_tokens // 8 + 16


@torch.no_grad()
def restore_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Iterable[str],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: bool = False,
) -> list[str]:
    """Compress each text into one block of latents and generate it back, greedily.

    Texts of like length run together. Decoding stops at either stop token. An empty text comes back empty without the
    model being asked.

    Args:
        model: A `C3ForConditionalGeneration`.
        processor: Its processor.
        texts: The texts; each is one context, however long.
        batch_size: Texts in one batch.
        max_new_tokens: Most tokens of a reply; by default those of its text, an eighth more, and 16.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        What came back, in the order of `texts`, not stripped.

    Raises:
        ValueError: If `batch_size` or `max_new_tokens` is not positive, the model has no stop token, or a text is
            longer than the encoder has positions for.
        TypeError: If `texts` is a single string, or one of the two is no int.
    """
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of strings, got a single str. Wrap it in a list.")
    check_at_least_1("batch_size", batch_size)
    if max_new_tokens is not None:
        check_at_least_1("max_new_tokens", max_new_tokens)
    texts = list(texts)
    sequences = [ids for ids, _ in processor.encoder_reader.read_plain(texts)]
    longest = max(map(len, sequences), default=0)
    if longest > context_room(model):
        raise ValueError(
            f"`texts` has one of {longest} tokens, the encoder has positions for {context_room(model)}. Cut it into "
            "segments, as `compress` does."
        )
    lengths = [len(sequence) for sequence in sequences]
    if processor.encoder_tokenizer is not processor.tokenizer:
        lengths = [len(ids) for ids, _ in processor.reader.read_plain(texts)]
    wanted = [index for index, sequence in enumerate(sequences) if sequence]
    restored = [""] * len(texts)
    restorer = Restorer(model, processor)
    groups = batches_by_length([lengths[index] for index in wanted], batch_size)
    for group in tqdm(groups, unit="batch", disable=None if progress else True):
        rows = [wanted[position] for position in group]
        ids, mask = context_batch([sequences[row] for row in rows], model.device)
        latents = model.get_context_features(ids, mask)
        budget = max_new_tokens or generation_budget(max(lengths[row] for row in rows))
        for row, new_ids in zip(rows, restorer.generate(latents, budget)):
            # Each row stops at its own budget, so that what comes back does not depend on its neighbours.
            own = max_new_tokens or generation_budget(lengths[row])
            restored[row] = decode_tokens(processor, new_ids[:own])
    return restored


def decode_tokens(processor: ProcessorMixin, token_ids: Sequence[int]) -> str:
    """Text of token ids as they are: nothing cleaned up, special tokens dropped."""
    return processor.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _until_stop(token_ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for position, token_id in enumerate(token_ids):
        if token_id in stop_ids:
            return token_ids[:position]
    return token_ids
