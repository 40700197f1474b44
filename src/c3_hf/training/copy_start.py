"""A start for new small models from which restoring is learnt at once: the addresses of a copy laid into the weights.

Restoring needs two addresses: a latent query must find its tokens, and the decoder must find the latent that holds the
token it is about to write, and the token's place in it. From random weights that takes a small model thousands of
steps, and jumps in length undo it. Here both halves are GPT-2s (learned absolute positions), and one attention layer
of each starts with k heads that do nothing else: head r of query j reads token k j + r into slot r of latent j, and at
text position i head i mod k of the decoder reads its slot of latent i // k. Everything is an ordinary weight, and
trains on; the other heads and layers start at random, as always, but write nothing yet. A further head of the decoder
ends a text that fills all latents. The decoder copies only if the prompt asks for the text: one head of its first
layer looks for the prompt's cue, so that other prompts start from nothing. Where things lie in a hidden state is said
in `c3_hf.training.laid_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..modeling.modeling_c3 import C3ForConditionalGeneration
from .find_start import SIGNS, check_finding, lay_finding
from .laid_weights import (
    ADDRESS,
    CONTENT,
    DIRECTION,
    FLAG,
    KEPT,
    LATENT_TAG,
    MATCH,
    MODE,
    QUERY_TAG,
    SINK,
    SLOT,
    Head,
    Layout,
    addresses,
    code_digits,
    lay_cue,
    lay_reader,
    make_codes,
)


# Of the mark of the position behind the last address: as long as an address, so that a norm leaves the same share to
# the rest.
END = 2**0.5 * ADDRESS
# Length of what a head writes into the content of the decoder, where the last word still stands.
COPY = 6.0
# Attention logits of a latent for a decoder head whose turn it is, and is not. The sink has their opposite (and more,
# as it holds nothing else).
OPEN, SHUT = 10.0, -30.0


def start_with_copying(
    model: C3ForConditionalGeneration,
    prompt_ids: Sequence[int],
    cue: int,
    end_id: int,
    tokens_per_latent: int,
    find_id: int | None = None,
) -> None:
    """Lay the addresses of a copy into a new model, in place.

    Texts of up to `tokens_per_latent * num_latents` tokens are copied from the start, and end there.

    Args:
        model: two GPT-2 halves of the same width and number of heads over one vocabulary.
        prompt_ids: the prompt that asks for the text back, up to where the text begins.
        cue: place in the prompt of a token that other prompts do not have there.
        end_id: the token behind the text.
        tokens_per_latent: k, fewer than there are heads.
        find_id: the token that another prompt has at `cue`, which asks to go on from words of the text; that is laid
            in too, see `c3_hf.training.find_start`.

    Raises:
        ValueError: if a half is no GPT-2, the halves differ in shape, or `tokens_per_latent` tokens do not fit into a
            latent or their addresses into a head.
    """
    config = model.config.text_config
    layout = Layout(
        width=config.hidden_size,
        head_size=config.hidden_size // config.num_attention_heads,
        tokens_per_latent=tokens_per_latent,
        num_latents=model.config.num_latents,
        signs=0 if find_id is None else SIGNS,
    )
    _check(model, layout)
    if find_id is not None:
        check_finding(model, layout)
    encoder, decoder = model.model.encoder, model.model.language_model
    with torch.no_grad():
        # In any order: frequent words have low numbers, and the same leading digits would give states a mean.
        num_codes = 2 ** code_digits(config.vocab_size)
        codes = make_codes(num_codes, layout.slot_size)[torch.randperm(num_codes)[: config.vocab_size]]
        codes /= layout.slot_size**0.5
        basis = torch.linalg.qr(torch.randn(layout.content, layout.content))[0]
        kept, rest = basis[: layout.slot_size], basis[layout.slot_size :]
        other = nn.functional.normalize(torch.randn(len(codes), len(rest)), dim=1)
        table = torch.zeros_like(decoder.wte.weight)
        table[:, : layout.content] = CONTENT * (KEPT * codes @ kept + (1 - KEPT**2) ** 0.5 * other @ rest)
        for half in (encoder, decoder):
            _silence(half)
            half.wte.weight.copy_(table)
        _lay_encoder(model, layout, kept, table[end_id])
        _lay_decoder(decoder, layout, kept, prompt_ids)
        _lay_end(decoder, layout, kept, table[end_id], first_text=len(prompt_ids) - 1)
        lay_cue(decoder, layout, prompt_ids[cue], cue, MODE, number=0)
        if find_id is not None:
            lay_finding(model, layout, kept, find_id, cue, _copying_layer(decoder))


def _silence(half: nn.Module) -> None:
    half.wpe.weight.zero_()
    for block in half.h:
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()


def _lay_positions(half: nn.Module, layout: Layout, first_text: int) -> None:
    """Address of the text token at each position: its latent, and its place there."""
    numbers = torch.arange(half.wpe.num_embeddings) - first_text
    inside = (numbers >= 0) & (numbers < layout.tokens_per_latent * layout.num_latents)
    latent, place = numbers // layout.tokens_per_latent, numbers % layout.tokens_per_latent
    half.wpe.weight[:, layout.own] = ADDRESS * addresses(latent.where(inside, -1), layout.latent_dims)
    half.wpe.weight[:, layout.place] = ADDRESS * addresses(place.where(inside, -1), layout.place_dims)


def _lay_encoder(model: C3ForConditionalGeneration, layout: Layout, kept: torch.Tensor, end: torch.Tensor) -> None:
    """The last layer reads: queries ask by their tags, tokens answer by their positions."""
    encoder, queries, projector = model.model.encoder, model.model.latent_queries.weight, model.model.projector
    _lay_positions(encoder, layout, first_text=0)
    # The token between a context and the queries is read as the one behind the text.
    encoder.wte.weight[model.config.context_start_token_id] = end
    queries.zero_()
    queries[:, layout.tag] = QUERY_TAG * addresses(torch.arange(len(queries)), layout.latent_dims)
    attention = encoder.h[-1].attn
    own_latent = torch.eye(layout.latent_dims)
    for place in range(layout.tokens_per_latent):
        lay_reader(Head(attention, layout, place), layout, own_latent, place, kept, into=layout.slot(place))
    latent = layout.norm(*layout.slot_lengths, ADDRESS, ADDRESS, QUERY_TAG)
    scales = torch.full((layout.width,), 1 / latent)
    scales[layout.own.start : layout.place.stop] = 0
    scales[layout.tag] *= LATENT_TAG / QUERY_TAG
    projector.weight.copy_(torch.diag(scales))
    projector.bias.zero_()
    projector.bias[layout.flag] = FLAG * DIRECTION


def _lay_decoder(decoder: nn.Module, layout: Layout, kept: torch.Tensor, prompt_ids: Sequence[int]) -> None:
    """The middle layer writes: positions in the text ask the tags, and heads whose turn it is not read the sink.

    The layers before it can find out what the prompt wants, and those behind it can think the answer over.
    """
    _lay_positions(decoder, layout, first_text=len(prompt_ids) - 1)
    # The sink, the first token, has nothing to say.
    decoder.wpe.weight[0] = -decoder.wte.weight[prompt_ids[0]]
    decoder.wpe.weight[0, layout.flag] = -SINK * DIRECTION
    attention = _copying_layer(decoder).attn
    token, latent = layout.text_norm, layout.latent_norm
    for place in range(layout.tokens_per_latent):
        head = Head(attention, layout, place).clear()
        head.query[layout.own, : layout.latent_dims] = torch.eye(layout.latent_dims) / (token * ADDRESS)
        head.key[layout.tag, : layout.latent_dims] = (
            MATCH * layout.root * torch.eye(layout.latent_dims) / (latent * LATENT_TAG)
        )
        head.query[layout.place, layout.latent_dims] = (OPEN - SHUT) * layout.place_address(place) / (token * ADDRESS)
        _lay_gate(head, layout, layout.latent_dims, token, latent)
        head.value[layout.slot(place), : layout.slot_size] = torch.eye(layout.slot_size)
        head.out[: layout.slot_size, : layout.content] = COPY / (latent * SLOT) * kept


def _lay_end(decoder: nn.Module, layout: Layout, kept: torch.Tensor, end: torch.Tensor, first_text: int) -> None:
    """A head of the same layer reads the end in the first latent's tag at the position behind the last address."""
    position, first = first_text + layout.tokens_per_latent * layout.num_latents, layout.latent_address(0)
    if position >= decoder.wpe.num_embeddings:
        return
    decoder.wpe.weight[position, layout.end] = END * DIRECTION
    word, latent = layout.norm(CONTENT, END, MODE), layout.latent_norm
    head = Head(_copying_layer(decoder).attn, layout, number=layout.tokens_per_latent).clear()
    head.query[layout.end, 0] = (OPEN - SHUT) * DIRECTION / (word * END)
    _lay_gate(head, layout, 0, word, latent)
    head.query_bias[1] = 1.0
    head.key[layout.tag, 1] = MATCH * layout.root * first / (latent * LATENT_TAG)
    # The sink has no tag, so that nothing is written elsewhere.
    head.value[layout.tag, 0] = first / (latent * LATENT_TAG)
    head.out[0, : layout.content] = COPY / (CONTENT * KEPT) * end[: layout.content] @ kept.T @ kept


def _lay_gate(head: Head, layout: Layout, dim: int, position: float, latent: float) -> None:
    """Latents are read in the mode of the text where the query's `dim` says that it is the head's turn; else the sink.

    Without the cue every gate is shut, as far as a head's whose turn it is not. `position` and `latent` are the norms
    of the states that ask and answer.
    """
    head.query[layout.mode, dim] = (OPEN - SHUT) * DIRECTION / (position * MODE)
    head.query_bias[dim] = SHUT - (OPEN - SHUT)
    head.key[layout.flag, dim] = layout.root * DIRECTION / (latent * FLAG)


def _copying_layer(decoder: nn.Module) -> nn.Module:
    return decoder.h[len(decoder.h) // 2]


def _check(model: C3ForConditionalGeneration, layout: Layout) -> None:
    encoder, decoder = model.config.encoder_config, model.config.text_config
    if {encoder.model_type, decoder.model_type} != {"gpt2"}:
        raise ValueError(
            f"`copy_start` is laid into GPT-2 halves, got {encoder.model_type!r} and {decoder.model_type!r}. Leave it "
            "out, or give both configurations `model_type: gpt2`."
        )
    names = ("hidden_size", "num_attention_heads", "vocab_size")
    shapes = [tuple(getattr(config, name) for name in names) for config in (encoder, decoder)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"`copy_start` needs two halves with the same {names}, got {shapes[0]} and {shapes[1]}.")
    if not 1 <= layout.tokens_per_latent < decoder.num_attention_heads:
        raise ValueError(
            f"`copy_start` may be 1 to {decoder.num_attention_heads - 1}, one less than the number of heads, got "
            f"{layout.tokens_per_latent}."
        )
    if decoder.num_hidden_layers < 2:
        raise ValueError(
            f"`copy_start` needs a decoder of 2 layers or more, one for the prompt and one for the copy, got "
            f"{decoder.num_hidden_layers}."
        )
    if layout.head_size < layout.latent_dims + 1:
        raise ValueError(
            f"`copy_start` needs heads of at least {layout.latent_dims + 1} dimensions for {layout.num_latents} "
            f"latents, got {layout.head_size}. Take a wider model, fewer heads or fewer latents."
        )
