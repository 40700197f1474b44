"""forward() and the parts around it: padding, several contexts, loss, embeddings, devices, saving, mistakes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from c3_hf import C3ForConditionalGeneration, C3Model
from c3_hf.modeling.contexts_c3 import find_inline_contexts
from factories import NUM_LATENTS, VOCAB_SIZE, make_model, sub_config


def block(model):
    config = model.config
    return [config.context_start_token_id, *[config.context_token_id] * NUM_LATENTS, config.context_end_token_id]


def padded(rows, left=False):
    """Ids and mask `(batch_size, length)`; what fills the padding is arbitrary."""
    length = max(map(len, rows))
    ids = [[9] * (length - len(r)) + r if left else r + [9] * (length - len(r)) for r in rows]
    mask = [[0] * (length - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (length - len(r)) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.fixture
def prompt(model):
    return [1, *block(model), 2, 3]


class TestContexts:
    @torch.no_grad()
    def test_left_and_right_padding_and_single_rows_agree(self, model):
        rows = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
        singles = torch.cat([model.get_context_features(torch.tensor([row])) for row in rows])
        for left in (True, False):
            torch.testing.assert_close(model.get_context_features(*padded(rows, left)), singles)

    @torch.no_grad()
    def test_features_are_the_projected_encoder_latents(self, model):
        ids = torch.tensor([[[1, 2], [3, 4]]])
        latents = model.get_encoder_latents(ids)
        assert latents.shape == (1, 2, NUM_LATENTS, 24)
        torch.testing.assert_close(model.model.projector(latents), model.get_context_features(ids))
        assert model.get_context_features(ids).shape == (1, 2, NUM_LATENTS, 32)

    @torch.no_grad()
    def test_several_contexts_anywhere_take_their_own_blocks(self, model):
        first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
        ids = torch.tensor([[*block(model), 7, *block(model)]])
        output = model(ids, context_input_ids=torch.stack([first, second], dim=1))
        latents = torch.cat([model.get_context_features(first), model.get_context_features(second)], dim=1)
        torch.testing.assert_close(output.context_latents, latents)
        embeds = model.get_input_embeddings()(ids)
        embeds[:, 1 : 1 + NUM_LATENTS] = latents[:, 0]
        embeds[:, NUM_LATENTS + 4 : 2 * NUM_LATENTS + 4] = latents[:, 1]
        torch.testing.assert_close(output.logits, model(inputs_embeds=embeds).logits)

    @torch.no_grad()
    def test_ragged_rows_equal_single_rows(self, model, prompt):
        """Rows with two, one and no contexts in one batch."""
        rows = [[1, *block(model), 2, *block(model)], [1, 2, 3, *block(model)], [1, 2, 3, 4]]
        ids, mask = padded(rows, left=True)
        context_ids = torch.tensor([[[5, 6], [7, 8]], [[9, 10], [0, 0]], [[0, 0], [0, 0]]])
        context_mask = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]])
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        batch = model(ids, attention_mask=mask, position_ids=position_ids, context_input_ids=context_ids,
                      context_attention_mask=context_mask).logits[:, -1]  # fmt: skip
        for i, (row, contexts) in enumerate(zip(rows, [[[5, 6], [7, 8]], [[9, 10]], []])):
            given = {"context_input_ids": torch.tensor([contexts])} if contexts else {}
            torch.testing.assert_close(batch[i], model(torch.tensor([row]), **given).logits[0, -1])

    @torch.no_grad()
    def test_one_context_for_all_and_given_latents(self, model, prompt):
        ids = torch.tensor([prompt, prompt])
        context = torch.tensor([[5, 6, 7]])
        shared = model(ids, context_input_ids=context)
        torch.testing.assert_close(shared.logits, model(ids, context_input_ids=context.repeat(2, 1)).logits)
        latents = model.get_context_features(context)
        torch.testing.assert_close(shared.logits, model(ids, context_latents=latents).logits)

    @torch.no_grad()
    def test_surplus_placeholders_keep_their_embedding(self, model, prompt):
        pad = model.config.context_token_id
        with_surplus = torch.tensor([[*prompt, pad, pad]])
        context = torch.tensor([[5, 6]])
        latents = model.get_context_features(context)
        embeds = model.get_input_embeddings()(with_surplus)
        embeds[:, 2 : 2 + NUM_LATENTS] = latents[:, 0]
        expected = model(inputs_embeds=embeds).logits
        torch.testing.assert_close(model(with_surplus, context_input_ids=context).logits, expected)

    @torch.no_grad()
    def test_placeholders_are_found_in_embeddings(self, model, prompt):
        ids, context = torch.tensor([prompt]), torch.tensor([[5, 6]])
        by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids), context_input_ids=context)
        torch.testing.assert_close(by_embeds.logits, model(ids, context_input_ids=context).logits)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"input_ids": [[1, 2]], "context_input_ids": [[5]]}, "row 0 of the prompts has 0 context placeholders"),
            (
                {"context_input_ids": [[[5], [6]]]},
                "row 0 of the prompts has 4 context placeholders, its contexts need 8",
            ),
            ({"context_input_ids": [[5], [6]]}, "`context_input_ids` has batch size 2 for 1 prompts"),
            ({"context_input_ids": [5]}, r"`context_input_ids` must have shape .* got \(1,\)"),
            (
                {"context_input_ids": [[5]], "context_attention_mask": [[1, 1]]},
                r"the shape of `context_input_ids`, \(1, 1\)",
            ),
            ({"context_attention_mask": [[1]]}, "`context_attention_mask` was given without `context_input_ids`"),
            ({"context_input_ids": [[261]]}, "row 0, context 0, holds the context start marker 261"),
            (
                {"context_input_ids": [[5, 264]]},
                "row 0, context 0, has the id 264, outside the encoder's vocabulary of 264",
            ),
            (
                {"context_input_ids": [[5, -100]], "context_attention_mask": [[1, 0]]},
                "context 0, has the id -100, outside",
            ),
            (
                {"input_ids": [[261, 263, 263, 263, 263, 262, 262]], "context_input_ids": [[5]]},
                "a stray context marker",
            ),
            ({"input_ids": None}, "exactly one of `input_ids` and `inputs_embeds` must be given, got neither"),
        ],
    )
    def test_bad_input(self, model, prompt, arguments, message):
        arguments = {"input_ids": [prompt], **arguments}
        tensors = {name: None if value is None else torch.tensor(value) for name, value in arguments.items()}
        with pytest.raises(ValueError, match=message):
            model(**tensors)

    def test_bad_latents(self, model, prompt):
        ids = torch.tensor([prompt])
        good = torch.ones(1, 1, NUM_LATENTS, 32)
        with pytest.raises(ValueError, match="`context_input_ids` and `context_latents` exclude each other"):
            model(ids, context_input_ids=torch.tensor([[5]]), context_latents=good)
        with pytest.raises(
            ValueError, match=r"must have shape \(batch_size, num_contexts, 4, 32\).* got \(1, 1, 4, 24\)"
        ):
            model(ids, context_latents=good[..., :24])
        with pytest.raises(ValueError, match="`context_latents` has batch size 3 for 1 prompts"):
            model(ids, context_latents=good.repeat(3, 1, 1, 1))
        with pytest.raises(ValueError, match="row 0 of the prompts has 4 context placeholders, its contexts need 8"):
            model(ids, context_latents=good.repeat(1, 2, 1, 1))
        with pytest.raises(ValueError, match=r"`context_input_ids` holds no context: its shape is \(1, 0, 3\)"):
            model(ids, context_input_ids=torch.zeros(1, 0, 3, dtype=torch.long))

    def test_empty_batch(self, model):
        with pytest.raises(ValueError, match="the batch is empty"):
            model(torch.zeros(0, 4, dtype=torch.long))

    def test_both_ids_and_embeddings(self, model, prompt):
        ids = torch.tensor([prompt])
        with pytest.raises(ValueError, match=r"got both\. Drop one of them"):
            model(ids, inputs_embeds=model.get_input_embeddings()(ids))

    def test_long_contexts_warn(self, caplog):
        model = make_model(encoder_config=sub_config(hidden_size=24, head_dim=6, max_position_embeddings=16))
        with caplog.at_level("WARNING"):
            model.get_context_features(torch.ones(1, 40, dtype=torch.long))
        assert "more than the 16 positions the context encoder was made for" in caplog.text

    def test_inline_contexts_in_forward(self, model, caplog):
        start, end = model.config.inline_context_start_token_id, model.config.inline_context_end_token_id
        ids = torch.tensor([[1, start, 5, 6, end, 2]])
        assert find_inline_contexts(model.config, ids) == [(0, 1, 4)]
        with pytest.raises(ValueError, match=r"holds contexts in line, but only `generate.*` splits them: this loss"):
            model(ids, labels=ids)
        with caplog.at_level("WARNING"):
            model(ids)
        assert "forward() reads them as raw text" in caplog.text


class TestTraining:
    def test_loss_and_gradients(self, prompt):
        model = make_model().train()
        ids = torch.tensor([prompt])
        labels = torch.tensor([[-100] * (len(prompt) - 2) + prompt[-2:]])
        output = model(ids, context_input_ids=torch.tensor([[5, 6]]), labels=labels)
        log_probabilities = output.logits[0].float().log_softmax(-1)
        expected = -(log_probabilities[-3, prompt[-2]] + log_probabilities[-2, prompt[-1]])
        torch.testing.assert_close(output.loss, expected / 2)
        by_items = model(ids, context_input_ids=torch.tensor([[5, 6]]), labels=labels, num_items_in_batch=8)
        torch.testing.assert_close(by_items.loss, expected / 8)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    # The new names are unknown to 4.57.
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
    def test_gradient_checkpointing_changes_nothing(self, prompt):
        gradients = []
        for checkpointing in (False, True):
            model = make_model().train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                assert model.model.encoder.is_gradient_checkpointing
                assert model.model.language_model.is_gradient_checkpointing
            ids = torch.tensor([prompt])
            model(ids, context_input_ids=torch.tensor([[5, 6]]), labels=ids).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for plain, checkpointed in zip(*gradients):
            torch.testing.assert_close(plain, checkpointed)


class TestModelSurface:
    def test_without_a_context_the_encoder_does_not_run(self, model):
        hook = model.model.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder ran"))
        model(torch.tensor([[1, 2, 3]]))
        hook.remove()

    def test_tuples_and_hidden_states(self, model, prompt):
        output = model(torch.tensor([prompt]), context_input_ids=torch.tensor([[5]]), output_hidden_states=True)
        assert len(output.hidden_states) == 3
        as_tuple = model(torch.tensor([prompt]), context_input_ids=torch.tensor([[5]]), return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], output.logits)

    def test_logits_to_keep(self, model, prompt):
        ids = torch.tensor([prompt])
        full = model(ids).logits
        # Products of other shapes: equal up to the order of sums, which depends on the processor.
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:], atol=1e-5, rtol=1e-5)
        kept = model(ids, logits_to_keep=torch.tensor([0, 3])).logits
        torch.testing.assert_close(kept, full[:, [0, 3]], atol=1e-5, rtol=1e-5)

    def test_transformers_finds_the_parts_of_the_whole_model(self):
        model = make_model(tie_word_embeddings=False)
        halves, table, head = model.model, torch.nn.Embedding(9, 32), torch.nn.Linear(32, 9, bias=False)
        assert (model.get_encoder(), model.get_decoder()) == (halves.encoder, halves.language_model)
        assert (model.get_input_embeddings(), model.get_output_embeddings()) == (
            halves.language_model.get_input_embeddings(),
            model.lm_head,
        )
        model.set_input_embeddings(table)
        model.set_output_embeddings(head)
        assert (halves.language_model.get_input_embeddings(), model.lm_head) == (table, head)

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_and_untied_heads_survive_saving(self, tmp_path, tied):
        model = make_model(tie_word_embeddings=tied)
        shared = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert shared == tied
        model.save_pretrained(tmp_path)
        loaded = C3ForConditionalGeneration.from_pretrained(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert (loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()) == tied

    @pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gpt2"])
    def test_families(self, tmp_path, family, prompt):
        """Tying, saving and a context, whatever the halves call their parts."""
        if family == "gpt2":
            shape = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB_SIZE,
                     "bos_token_id": 256, "eos_token_id": 256}  # fmt: skip
        else:
            shape = sub_config(family)
        model = make_model(text_config=shape, encoder_config=sub_config("llama", hidden_size=24, head_dim=6))
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
        ids, context = torch.tensor([prompt]), torch.tensor([[5, 6]])
        with torch.no_grad():
            logits = model(ids, context_input_ids=context).logits
            torch.testing.assert_close(loaded(ids, context_input_ids=context).logits, logits)
            assert not torch.allclose(loaded(ids, context_input_ids=context + 1).logits, logits, atol=1e-3)

    def test_dtype_and_attention_reach_both_halves(self, tmp_path):
        make_model().save_pretrained(tmp_path)
        loaded = C3ForConditionalGeneration.from_pretrained(
            tmp_path, dtype=torch.bfloat16, attn_implementation={"encoder_config": "eager", "text_config": "sdpa"}
        )
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert loaded.model.encoder.config._attn_implementation == "eager"
        assert loaded.model.language_model.config._attn_implementation == "sdpa"
        both = C3ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
        assert both.model.encoder.config._attn_implementation == "eager"
        assert both.model.language_model.config._attn_implementation == "eager"

    def test_resizing_embeddings(self):
        model = make_model()
        model.resize_token_embeddings(VOCAB_SIZE + 8)
        assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == VOCAB_SIZE + 8
        assert model.model.encoder.get_input_embeddings().weight.shape[0] == VOCAB_SIZE
        model.resize_encoder_token_embeddings(VOCAB_SIZE + 16)
        assert model.config.encoder_config.vocab_size == VOCAB_SIZE + 16
        assert model(torch.tensor([[VOCAB_SIZE + 7]])).logits.shape[-1] == VOCAB_SIZE + 8

    def test_parts(self, model):
        assert model.get_decoder() is model.model.language_model
        assert model.get_encoder() is model.model.encoder
        assert model.get_input_embeddings() is model.model.language_model.embed_tokens
        assert model.get_output_embeddings() is model.lm_head
        assert isinstance(model.model, C3Model)

    def test_auto_classes(self, tmp_path, processor):
        make_model().save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        for auto_class in (AutoModel, AutoModelForCausalLM):
            assert type(auto_class.from_pretrained(tmp_path)) is C3ForConditionalGeneration
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer("a<|im_end|>")["input_ids"] == processor.tokenizer("a<|im_end|>")["input_ids"]
