"""The look-up: attention heads of the decoder that find a place of a text by its words, and what they are told.

Restoring is learnt without them, as each token comes from a known distance; finding a place by its words is not. So
some heads are told to look at the latent of the token that comes next, which they can find by the tokens in front of
it. What stands in front of the first token of a latent lies in the latent before, so heads of a lower layer are told
to look there and carry it over: the two kinds of head that make up an induction head (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, arXiv 2209.11895).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from ..modeling.configuration_c3 import C3Config
from .arguments import C3TrainingArguments
from .model import body


# Float32 tells 1 from 1 - 6e-8; less attention than this is taken for as much.
_LEAST_SHARE = 1e-7


class Lookup:
    """The heads of the look-up in a model that trains: drawn anew, left alone to train, and told what to do.

    Args:
        model: gets its drawn heads and its frozen parts at once, in place.
        arguments: `lookup_weight` and the fields behind it.

    Raises:
        ValueError: if the model does not suit the arguments.
    """

    def __init__(self, model: nn.Module, arguments: C3TrainingArguments) -> None:
        self._heads, self._previous = arguments.lookup_heads, arguments.previous_heads
        self._config = body(model).config
        self._num_places = arguments.lookup_places or sum(map(len, self._heads.values()))
        self._quiet_weight = arguments.quiet_weight
        check_lookup(self._config, self._heads, self._previous)
        draw_lookup_heads(model, arguments.draw_lookup_heads)
        if arguments.lookup_heads_alone:
            train_heads_alone(model, {**self._previous, **self._heads})
        self._said: dict[int, torch.Tensor] = {}
        self._hooks = list(self._listen(model)) if self._quiet_weight > 0 else []

    def detach(self) -> None:
        """Leave the model's modules as they were."""
        for hook in self._hooks:
            hook.remove()

    def loss(
        self, attentions: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, kept: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch that has just gone through the model, and counts as of [`lookup_loss`].

        Args:
            attentions: weights of each layer of the decoder, `(batch_size, num_heads, sequence_length,
                sequence_length)`.
            inputs: as in [`lookup_loss`], and `attention_mask`, `(batch_size, sequence_length)`.
            labels: `(batch_size, sequence_length)`, not shifted.
            kept: last positions that have logits.
        """
        looking = _attention_of(attentions, self._heads, kept)
        loss, counts = lookup_loss(looking, inputs, labels, self._config, self._num_places)
        if self._previous:
            carrying = _attention_of(attentions, self._previous, labels.shape[1])
            loss = loss + previous_loss(carrying, inputs, self._config, self._num_places)
        if self._quiet_weight > 0:
            chosen = inputs["attention_mask"].bool() & _crowded(inputs, self._num_places)[:, None]
            said = sum(share[chosen].sum() for share in self._said.values()) / chosen.sum().clamp(min=1)
            loss = loss + self._quiet_weight * said
        return loss, counts

    def _listen(self, model: nn.Module) -> Iterator[Any]:
        """Hooks that keep what the heads say, as a share of what the attention of their layer says."""
        half = body(model).language_model
        # No layer has heads of both kinds.
        for layer, heads in {**self._previous, **self._heads}.items():
            parts = _head_parts(half, {layer: heads}, "quiet_weight")
            spans = [where[1:] for name, _, where in parts if name == "o_proj.weight"]
            columns = [column for start, width in spans for column in range(start, start + width)]

            def keep(
                module: nn.Module, args: Any, output: torch.Tensor, layer: int = layer, columns: list[int] = columns
            ) -> None:
                said = functional.linear(args[0][..., columns], module.weight[:, columns])
                self._said[layer] = said.norm(dim=-1) / output.detach().norm(dim=-1).clamp(min=_LEAST_SHARE)

            yield half.layers[layer].self_attn.o_proj.register_forward_hook(keep)


def lookup_loss(
    attention: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    config: C3Config,
    num_places: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How little the heads look at the latents of the tokens that come next.

    It is asked for wherever a token and the labelled one behind it stand behind each other in a context as well, in
    whichever and however often. Each head has a place of a latent (see [`LatentReadout`]), and finds tokens at this
    alone: with `num_places` P the n-th head has the place n modulo P. If the second token stands there, the head shall
    look at its latent, or at those; if not, at none. Nothing is asked for where a token stands in the reply as far
    behind the beginning as in the contexts: that is restoring, where heads would learn the distance instead.

    A context is looked through if its latents stand for no more tokens than there are places. In a row without such a
    one the heads shall look at no latent at all, so that they say nothing into what is restored without them.

    Args:
        attention: weights of the heads, `(batch_size, num_heads, kept_length, sequence_length)`, at the last positions
            (`logits_to_keep`).
        inputs: `input_ids` of shape `(batch_size, sequence_length)`; `context_input_ids` and
            `context_attention_mask`, `(batch_size, num_contexts, context_length)`, padded right; `context_strides`,
            `(batch_size, num_contexts)`.
        labels: `(batch_size, sequence_length)`, not shifted.
        config: of the model.
        num_places: places that are told apart, 1 to the number of heads; with fewer several heads serve each and carry
            more of a token.

    Returns:
        Mean of -log of the attention where it shall be, over heads that shall look at a latent and positions, and
        likewise over those that shall not: the sum of the two in float32, 0 if it is asked for nowhere. And how many
        of the former heads look most at a latent they shall, of how many: int64 of shape `(2,)`.
    """
    length, kept = labels.shape[1], attention.shape[2]
    num_heads, num_latents = attention.shape[1], config.num_latents
    token, following = inputs["input_ids"][:, length - kept : -1], labels[:, length - kept + 1 :]
    ids, mask = inputs["context_input_ids"], inputs["context_attention_mask"].bool()
    # (batch_size, kept_length - 1, num_contexts, context_length - 1): where in the contexts the two stand.
    found = (ids[:, None, :, :-1] == token[:, :, None, None]) & (ids[:, None, :, 1:] == following[:, :, None, None])
    found &= mask[:, None, :, 1:]
    at, strides = torch.arange(1, ids.shape[2], device=ids.device), inputs["context_strides"].unsqueeze(-1)
    lengths = mask.sum(dim=2, keepdim=True)
    in_contexts, in_reply = lengths.cumsum(dim=1) - lengths + at, (following != -100).cumsum(dim=1) - 1
    restored = (found & (in_contexts[:, None] == in_reply[:, :, None, None])).flatten(2).any(dim=2)
    found &= ~restored[:, :, None, None] & (strides <= num_places)[:, None]
    # (batch_size, num_contexts, context_length - 1): the place of the second token, and its latent.
    place, latent = strides - 1 - at % strides, at // strides
    number = place.clamp(max=num_places - 1) * num_latents + latent.clamp(max=num_latents - 1)
    wanted = torch.zeros(*found.shape[:3], num_places * num_latents, dtype=torch.long, device=ids.device)
    wanted = wanted.scatter_add(3, number[:, None].expand(found.shape), found.long()).bool()
    # (batch_size, kept_length - 1, num_heads, latents of all contexts)
    wanted = wanted.unflatten(3, (num_places, num_latents)).transpose(2, 3).flatten(3)
    wanted = wanted[:, :, torch.arange(num_heads, device=ids.device) % num_places]
    # Where the latents stand in the prompt; a row with fewer contexts has fewer, and wants none of the others.
    is_latent = inputs["input_ids"] == config.context_token_id
    columns = (~is_latent).int().argsort(dim=1, stable=True)[:, : wanted.shape[3]]
    there = is_latent.gather(1, columns)[:, None, None]
    looked = attention[:, :, :-1].gather(3, columns[:, None, None].expand(-1, num_heads, kept - 1, -1)) * there
    # (positions, num_heads, latents), of the positions where it is asked for.
    crowded = _crowded(inputs, num_places)
    asked = wanted.flatten(2).any(dim=2) | (crowded[:, None] & (following != -100))
    wanted, looked = wanted[asked], looked.transpose(1, 2)[asked].float()
    looks = wanted.any(dim=2)
    right = wanted.gather(2, looked.argmax(dim=2, keepdim=True)).squeeze(2) & looks
    share = torch.where(looks, (looked * wanted).sum(dim=2), 1 - looked.sum(dim=2))
    missing = -share.clamp(min=_LEAST_SHARE).log()
    loss = sum(missing[chosen].sum() / chosen.sum().clamp(min=1) for chosen in (looks, ~looks))
    return loss, torch.stack([right.sum(), looks.sum()])


def previous_loss(
    attention: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: C3Config, num_places: int
) -> torch.Tensor:
    """How little the heads look from a latent at the one before it, of the same context.

    Where every latent of a row stands for more tokens than the look-up has places, they shall look at no latent.

    Args:
        attention: weights of the heads, `(batch_size, num_heads, sequence_length, sequence_length)`.
        inputs: as in [`lookup_loss`].
        config: of the model.
        num_places: places that the heads of the look-up tell apart.

    Returns:
        Mean of -log of the attention where it shall be, over heads and latents, in float32; 0 if there are none.
    """
    num_latents, counts = config.num_latents, inputs["context_attention_mask"].sum(dim=2)
    is_latent = inputs["input_ids"] == config.context_token_id
    row, column = is_latent.nonzero(as_tuple=True)
    number = (is_latent.cumsum(dim=1) - 1)[row, column]
    context, at = number // num_latents, number % num_latents
    crowded = _crowded(inputs, num_places)[row]
    used = at * inputs["context_strides"][row, context] < counts[row, context]
    chosen = used & (crowded | (at > 0))
    row, column, crowded = row[chosen], column[chosen], crowded[chosen]
    # (latents, num_heads, sequence_length)
    looked = attention[row, :, column].float()
    on_latents = (looked * is_latent[row][:, None]).sum(dim=2)
    previous = looked.gather(2, (column - 1).clamp(min=0)[:, None, None].expand(-1, looked.shape[1], 1)).squeeze(2)
    share = torch.where(crowded[:, None], 1 - on_latents, previous)
    return -share.clamp(min=_LEAST_SHARE).log().sum() / max(1, share.numel())


def _crowded(inputs: Mapping[str, torch.Tensor], num_places: int) -> torch.Tensor:
    """Rows with contexts whose every latent stands for more than `num_places` tokens, `(batch_size,)`."""
    there = inputs["context_attention_mask"].bool().any(dim=2)
    sparse = there & (inputs["context_strides"] <= num_places)
    return there.any(dim=1) & ~sparse.any(dim=1)


def _attention_of(attentions: Sequence[torch.Tensor], heads: Mapping[int, Sequence[int]], kept: int) -> torch.Tensor:
    """Weights of some heads, by layer, at the last positions: `(batch_size, num_heads, kept, sequence_length)`."""
    return torch.cat([attentions[layer][:, some, -kept:] for layer, some in heads.items()], dim=1)


def check_lookup(config: C3Config, heads: Mapping[int, Sequence[int]], previous: Mapping[int, Sequence[int]]) -> None:
    """Check that the decoder has the heads of the look-up, numbered by layer, and shows where they look.

    Args:
        heads: those that look up.
        previous: those that carry the latent before a latent over to it; may be none.

    Raises:
        ValueError: if it does not, or the model has no stride.
    """
    if config.latent_stride is None:
        raise ValueError(
            "`lookup_weight` needs a model with `latent_stride`: which latent stands for a token is known by it. Set "
            "`latent_stride` in the recipe, or leave `lookup_weight` out."
        )
    _check_heads(config, heads, "lookup_heads")
    if previous:
        _check_heads(config, previous, "previous_heads")
    implementation = config.text_config._attn_implementation
    if implementation != "eager":
        raise ValueError(
            f"`lookup_weight` reads the weights of the decoder's attention, which {implementation} "
            "attention does not return. Set `attn_implementation: eager`, or leave `lookup_weight` out."
        )


def _check_heads(config: C3Config, heads: Mapping[int, Sequence[int]], field: str) -> None:
    half = config.text_config
    known = {(layer, head) for layer in range(half.num_hidden_layers) for head in range(half.num_attention_heads)}
    named = {(layer, head) for layer, numbers in heads.items() for head in numbers}
    if not named or not named <= known:
        raise ValueError(
            f"`{field}` must name heads of the decoder by their layers, such as {{0: [0, 1]}}, and it has "
            f"{half.num_attention_heads} in each of {half.num_hidden_layers} layers, counted from 0, got "
            f"{dict(heads)}."
        )


def draw_lookup_heads(model: nn.Module, heads: Mapping[int, Sequence[int]]) -> None:
    """Draw the heads of the look-up, numbered by layer of the decoder, anew: without biases, at first without a say.

    Biases of queries and keys prefer distances, and a head that looks for a token has none to prefer; Adam would take
    them back by one learning rate a step, so wide ones (`spread_attention_biases`) for thousands of steps. What a head
    says begins at zero, as with LoRA, so that the others are not disturbed before it knows where to look. Keys and
    values that it shares with heads that are not drawn stay as they are.

    Raises:
        ValueError: if the decoder's layers are not like Llama's, with `self_attn` and four projections.
    """
    half = body(model).language_model
    for name, parameter, where in _head_parts(half, heads, "draw_lookup_heads"):
        part = parameter.data.narrow(*where)
        if name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            nn.init.normal_(part, std=half.config.initializer_range)
        else:
            nn.init.zeros_(part)


def train_heads_alone(model: nn.Module, heads: Mapping[int, Sequence[int]]) -> None:
    """Switch off the gradients of all but the given heads of the decoder, by layer.

    What the model does without them stays what it is, but for what they add to it. Heads share tensors, so gradients
    are cut, and not only parameters left out: it needs an optimizer that leaves a number alone whose gradient is zero.
    Keys and values that a head shares with others stay as they are.

    Raises:
        ValueError: if other parts are frozen already, the decoder's layers are not like Llama's, or its tensors are
            divided among processes.
    """
    if is_fsdp_enabled() or is_deepspeed_zero3_enabled():
        raise ValueError(
            "`lookup_heads_alone` cuts gradients of whole tensors, which FSDP and DeepSpeed ZeRO-3 divide among "
            "processes. Train with DDP or one process, or leave it out."
        )
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "`lookup_heads_alone` keeps all of the model as it is but these heads: `freeze`, `freeze_modules` and "
            "`lora` have nothing to say beside it. Leave them out, or it."
        )
    model.requires_grad_(False)
    parts: dict[nn.Parameter, list[tuple[int, int, int]]] = {}
    for _, parameter, where in _head_parts(body(model).language_model, heads, "lookup_heads_alone"):
        parts.setdefault(parameter, []).append(where)
    for parameter, places in parts.items():

        def cut(gradient: torch.Tensor, places: list[tuple[int, int, int]] = places) -> torch.Tensor:
            kept = torch.zeros_like(gradient)
            for where in places:
                kept.narrow(*where).copy_(gradient.narrow(*where))
            return kept

        parameter.requires_grad_(True)
        parameter.register_hook(cut)


def _head_parts(
    half: nn.Module, heads: Mapping[int, Sequence[int]], field: str
) -> Iterator[tuple[str, nn.Parameter, tuple[int, int, int]]]:
    """What belongs to `heads` alone: names, parameters, and where in these, as dimension, start and length; `field` of
    the recipe wants it."""
    num_heads = half.config.num_attention_heads
    num_keys = getattr(half.config, "num_key_value_heads", num_heads)
    size = num_heads // num_keys
    for number, chosen in heads.items():
        attention = getattr(half.layers[number], "self_attn", None) if hasattr(half, "layers") else None
        if not all(hasattr(attention, f"{name}_proj") for name in "qkvo"):
            raise ValueError(
                f"`{field}` knows heads in layers q_proj, k_proj, v_proj and o_proj, and a decoder of the type "
                f"{half.config.model_type!r} has none. Leave it out: the heads learn from what they are."
            )
        keys = [key for key in range(num_keys) if {*range(key * size, (key + 1) * size)} <= {*chosen}]
        for name, some in (("q_proj", chosen), ("k_proj", keys), ("v_proj", keys), ("o_proj", chosen)):
            dim, count = int(name == "o_proj"), num_heads if name in ("q_proj", "o_proj") else num_keys
            projection = getattr(attention, name)
            width = projection.weight.shape[dim] // count
            for head in some:
                yield f"{name}.weight", projection.weight, (dim, head * width, width)
                if projection.bias is not None and not dim:
                    yield f"{name}.bias", projection.bias, (0, head * width, width)
