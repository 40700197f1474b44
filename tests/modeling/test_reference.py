"""The model against an independent re-statement, in float64, on random shapes and prompts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from factories import SPECIAL_TOKENS, VOCAB_SIZE, make_model, sub_config


IDS = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
THETA = 5000.0


def shapes():
    def build(kv_heads, groups, half_dim, layers, intermediate, eps):
        heads = kv_heads * groups
        return {
            "hidden_size": 2 * half_dim * heads,
            "head_dim": 2 * half_dim,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": layers,
            "intermediate_size": intermediate,
            "rms_norm_eps": eps,
            "rope_theta": THETA,
        }

    return st.builds(
        build,
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(3, 40),
        st.sampled_from([1e-6, 1e-5, 1e-3]),
    )


@settings(max_examples=20, deadline=None)
@given(
    encoder=shapes(),
    decoder=shapes(),
    num_latents=st.integers(1, 9),
    tied=st.booleans(),
    contexts=st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1, max_size=3),
    words=st.lists(st.lists(st.integers(0, 255), max_size=6), min_size=4, max_size=4),
)
def test_logits_equal_the_restatement(encoder, decoder, num_latents, tied, contexts, words):
    model = make_model(
        encoder_config=sub_config(**encoder),
        text_config=sub_config(**{**decoder, "tie_word_embeddings": tied}),
        num_latents=num_latents,
    ).double()
    block = [IDS["<img>"], *[IDS["<imgpad>"]] * num_latents, IDS["</img>"]]
    prompt = [*words[0], *(token for i, _ in enumerate(contexts) for token in [*block, *words[i + 1], 7])]
    length = max(len(ids) for ids in contexts)
    context_ids = torch.tensor([[ids + [0] * (length - len(ids)) for ids in contexts]], dtype=torch.long)
    mask = torch.tensor([[[1] * len(ids) + [0] * (length - len(ids)) for ids in contexts]], dtype=torch.long)
    with torch.no_grad():
        output = model(torch.tensor([prompt]), context_input_ids=context_ids, context_attention_mask=mask)
    expected = reference.logits(
        model.state_dict(),
        {"encoder": encoder, "decoder": decoder, "start_id": IDS["<img>"], "placeholder_id": IDS["<imgpad>"]},
        prompt,
        contexts,
    )
    assert output.logits.shape == (1, len(prompt), VOCAB_SIZE)
    # Rotary tables are float32 in transformers whatever the model's dtype: hence not 1e-12.
    torch.testing.assert_close(output.logits[0], expected, atol=2e-5, rtol=2e-4)
