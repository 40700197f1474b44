from __future__ import annotations

import pytest
import torch

import factories
from c3_hf import C3ForConditionalGeneration
from c3_hf.training.copy_start import position_features, shift_matrix, start_with_copying


def gpt2(layers, **changes):
    return {
        "model_type": "gpt2",
        "vocab_size": factories.VOCAB_SIZE,
        "n_embd": 256,
        "n_layer": layers,
        "n_head": 8,
        "n_inner": 512,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **changes,
    }


def start(tokens_per_latent=4, encoder=None, decoder=None):
    torch.manual_seed(0)
    halves = {"encoder_config": encoder or gpt2(2), "text_config": decoder or gpt2(2)}
    model = C3ForConditionalGeneration(factories.make_config(num_latents=16, tie_word_embeddings=True, **halves))
    processor = factories.make_processor(num_latents=16)
    prompt = processor.apply_chat_template(processor.restore_messages("x"))["input_ids"][0].tolist()
    start_with_copying(model, prompt, tokens_per_latent)
    return model.eval(), prompt


@pytest.mark.parametrize("tokens_per_latent", [1, 2, 4])
def test_an_untrained_model_copies_random_tokens_of_any_length(tokens_per_latent):
    model, prompt = start(tokens_per_latent)
    for length in (1, 7, 16 * tokens_per_latent - 1, 16 * tokens_per_latent):
        context = torch.randint(0, 256, (16, length))
        inputs = torch.cat([torch.tensor([prompt] * 16), context], dim=1)
        with torch.no_grad():
            logits = model(inputs, context_input_ids=context).logits[:, len(prompt) - 1 : -1]
        found = (logits.topk(5).indices == context[..., None]).any(-1).float().mean()
        # By chance it would be 5 of 264.
        assert found > 0.8


def test_shift_matrix_moves_features():
    frequencies = torch.tensor([1.0, 0.3, 0.01])
    features = position_features(torch.arange(5), frequencies)
    assert features.shape == (5, 8)
    moved = features[:, :6] @ shift_matrix(7, frequencies)
    torch.testing.assert_close(moved, position_features(torch.arange(7, 12), frequencies)[:, :6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": factories.sub_config(hidden_size=256)}, "`copy_start` is laid into GPT-2 halves, got 'qwen2'"),
        ({"encoder": gpt2(2, n_embd=128, n_head=4)}, "`copy_start` needs two halves with the same"),
        ({"tokens_per_latent": 3}, "`copy_start` must divide the number of heads, 8, got 3"),
        ({"tokens_per_latent": 0}, "`copy_start` must divide the number of heads, 8, got 0"),
        (
            {"encoder": gpt2(2, n_embd=128), "decoder": gpt2(2, n_embd=128)},
            "`copy_start` needs heads of at least 32 dimensions, got 16",
        ),
    ],
)
def test_models_it_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        start(**changes)
