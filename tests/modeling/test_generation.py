"""Every decoding mode with contexts, each against the simple path: greedy, one row, merged embeddings by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList

from c3_hf import C3ForConditionalGeneration
from factories import make_model, sub_config


TEXTS = ["hello world", "a longer text, to be padded", ""]
NEW = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def inputs(processor):
    return processor.apply_chat_template([processor.restore_messages(text) for text in TEXTS])


@pytest.fixture(scope="module")
def expected(model, processor):
    """Greedy ids of each row alone, by a plain loop over forward() without a cache."""
    return [greedy_loop(model, processor.apply_chat_template(processor.restore_messages(text))) for text in TEXTS]


@torch.no_grad()
def greedy_loop(model, inputs, steps=10):
    ids, new = inputs["input_ids"], []
    contexts = {name: inputs[name] for name in inputs if name.startswith("context")}
    while len(new) < steps:
        new.append(model(ids, **contexts).logits[0, -1].argmax().item())
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
        if new[-1] in model.generation_config.eos_token_id:
            break
    return new


def new_ids(outputs, inputs):
    """New ids of each row without what fills finished rows."""
    rows = outputs[:, inputs["input_ids"].shape[1] :].tolist()
    cuts = [next((i + 1 for i, token in enumerate(row) if token in (256, 258)), len(row)) for row in rows]
    return [row[:cut] for row, cut in zip(rows, cuts)]


def test_the_simple_paths_differ(expected):
    assert len({tuple(row) for row in expected}) == len(TEXTS)


def test_greedy_batch_equals_single_rows(model, inputs, expected):
    assert new_ids(model.generate(**inputs, **NEW), inputs) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 1, "return_dict_in_generate": True, "output_scores": True},
        {"max_new_tokens": None, "max_length": "prompt + 10"},
    ],
    ids=["no cache", "prompt lookup", "static cache", "dict", "max_length"],
)
def test_options_that_do_not_change_greedy(model, processor, expected, options):
    options = dict(options)
    for text, row in zip(TEXTS, expected):
        inputs = processor.apply_chat_template(processor.restore_messages(text))
        if "max_length" in options:
            options["max_length"] = inputs["input_ids"].shape[1] + 10
        outputs = model.generate(**inputs, **{**NEW, **options})
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        # Assisted decoding of transformers 4.57 can overshoot `max_new_tokens` by an accepted candidate.
        assert new_ids(outputs, inputs)[0][:10] == row


@pytest.mark.slow
def test_compiled_static_cache_equals_greedy(processor, expected):
    model = make_model()
    for text, row in zip(TEXTS, expected):
        inputs = processor.apply_chat_template(processor.restore_messages(text))
        outputs = model.generate(**inputs, **NEW, cache_implementation="static")
        assert new_ids(outputs, inputs) == [row]


def test_beams_and_returned_sequences(model, inputs, processor):
    """Beam search of a batch equals that of single rows, and of the same prompt with ready-made latents."""
    options = {**NEW, "num_beams": 3, "num_return_sequences": 2}
    outputs = model.generate(**inputs, **options)
    assert len(outputs) == 2 * len(TEXTS)
    for i, text in enumerate(TEXTS):
        single = processor.apply_chat_template(processor.restore_messages(text))
        assert new_ids(model.generate(**single, **options), single) == new_ids(outputs[2 * i : 2 * i + 2], inputs)


def test_the_encoder_runs_once(model, inputs):
    calls = []
    hook = model.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=3)
    hook.remove()
    assert len(calls) == 1


def test_sampling_is_reproducible_and_sees_the_context(model, processor):
    def sample(text):
        torch.manual_seed(3)
        inputs = processor.apply_chat_template(processor.restore_messages(text))
        return new_ids(model.generate(**inputs, do_sample=True, top_k=50, max_new_tokens=10), inputs)

    assert sample("hello world") == sample("hello world") != sample("another text")


def test_given_latents_equal_contexts(model, inputs, expected):
    latents = model.get_context_features(inputs["context_input_ids"], inputs["context_attention_mask"])
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert new_ids(model.generate(**prompt, context_latents=latents, **NEW), inputs) == expected


def test_one_context_serves_many_prompts(model, processor):
    messages = processor.restore_messages("hello world")
    single = processor.apply_chat_template(messages)
    many = processor.apply_chat_template([messages] * 3)
    contexts = {name: single[name] for name in ("context_input_ids", "context_attention_mask")}
    outputs = model.generate(many["input_ids"], attention_mask=many["attention_mask"], **contexts, **NEW)
    assert new_ids(outputs, many) == 3 * new_ids(model.generate(**single, **NEW), single)


def test_inputs_embeds_with_and_without_ids(model, processor, expected):
    inputs = processor.apply_chat_template(processor.restore_messages(TEXTS[0]))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    contexts = {name: inputs[name] for name in ("context_input_ids", "context_attention_mask", "attention_mask")}
    only_new = model.generate(inputs_embeds=embeds, **contexts, **NEW)
    assert only_new[0].tolist() == expected[0]
    both = model.generate(inputs["input_ids"], inputs_embeds=embeds, **contexts, **NEW)
    assert new_ids(both, inputs) == [expected[0]]


def test_assisted_by_another_c3(model, processor, expected):
    """An assistant with the decoder's width reads the same latents; greedy output does not change."""
    assistant = make_model(seed=5, encoder_config=sub_config(hidden_size=8, head_dim=2))
    inputs = processor.apply_chat_template(processor.restore_messages(TEXTS[1]))
    assert new_ids(model.generate(**inputs, **NEW, assistant_model=assistant), inputs) == [expected[1]]


def test_streamer_gives_the_new_text(model, processor, inputs):
    single = processor.apply_chat_template(processor.restore_messages(TEXTS[1]))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    outputs = model.generate(**single, **NEW, streamer=streamer)
    assert "".join(streamer) == processor.batch_decode(outputs[:, single["input_ids"].shape[1] :])[0]


def test_logits_processors_run(model, inputs, expected):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, expected[0][0]] = float("-inf")
            return scores

    outputs = model.generate(**inputs, **NEW, logits_processor=LogitsProcessorList([Forbid()]))
    assert expected[0][0] not in outputs[:, inputs["input_ids"].shape[1] :]


def test_second_turn_on_a_kept_cache(model, processor):
    """A second turn with a new context on the first turn's cache gives what a fresh call gives."""
    first = processor.restore_messages("hello world")
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = processor.apply_chat_template(first)
    model.generate(**inputs, **NEW, past_key_values=cache)
    cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())
    turns = [*first, {"role": "assistant", "content": "hi"}, *processor.restore_messages("a second context")]
    both = processor.apply_chat_template(turns)
    assert both["context_input_ids"].shape[1] == 2
    assert cache.get_seq_length() > 0
    kept = model.generate(**both, **NEW, past_key_values=cache)
    assert new_ids(kept, both) == new_ids(model.generate(**both, **NEW), both)


def test_second_turn_without_a_new_context(model, processor):
    first = processor.restore_messages("hello world")
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = processor.apply_chat_template(first)
    model.generate(**inputs, **NEW, past_key_values=cache)
    cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())
    turns = [*first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
    second = processor.apply_chat_template(turns)
    fresh = new_ids(model.generate(**second, **NEW), second)
    prompt = {name: second[name] for name in ("input_ids", "attention_mask")}
    assert new_ids(model.generate(**prompt, **NEW, past_key_values=cache), second) == fresh


def test_contexts_in_line(model, processor, inputs, expected):
    """Contexts in `input_ids` itself, in a padded batch with and without contexts, several and none in a row."""
    tokenizer = processor.tokenizer
    texts = [
        tokenizer.apply_chat_template(processor.restore_messages(text), tokenize=False, add_generation_prompt=True)
        for text in TEXTS
    ]
    inline = tokenizer([*texts, "no context here"], padding=True, return_tensors="pt", return_token_type_ids=False)
    outputs = model.generate(**inline, **NEW)
    assert torch.equal(outputs[:, : inline["input_ids"].shape[1]], inline["input_ids"])
    assert new_ids(outputs, inline)[:3] == expected
    plain = tokenizer("no context here", return_tensors="pt", return_token_type_ids=False)
    assert new_ids(outputs, inline)[3] == new_ids(model.generate(**plain, **NEW), plain)[0]
    length = inline["input_ids"].shape[1]
    by_max_length = model.generate(**inline, max_length=length + 10, do_sample=False)
    assert torch.equal(by_max_length, outputs)
    in_dict = model.generate(inline["input_ids"], attention_mask=inline["attention_mask"], **NEW,
                             return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(in_dict.sequences, outputs)


def test_in_line_equals_the_processor_for_several_contexts(model, processor):
    content = [
        {"type": "text", "text": "compare "},
        {"type": "context", "text": "the first <img> text"},
        {"type": "context", "text": "the second"},
        {"type": "text", "text": "please"},
    ]
    messages = [{"role": "user", "content": content}]
    tensors = processor.apply_chat_template(messages)
    inline = processor.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert new_ids(model.generate(**inline, **NEW), inline) == new_ids(model.generate(**tensors, **NEW), tensors)


def test_unpaired_inline_markers_are_ordinary_tokens(model, processor):
    start, end = model.config.inline_context_start_token_id, model.config.inline_context_end_token_id
    inputs = {"input_ids": torch.tensor([[5, end, 7, start, 8]])}
    decoder_only = model.generate(**inputs, **NEW)
    assert decoder_only[0, :5].tolist() == [5, end, 7, start, 8]


def test_no_repeat_ngram_does_not_forbid_the_copy(model, processor, expected):
    """Over the raw text it would forbid what the text holds; over the compressed prompt it sees placeholders."""
    text = "".join(processor.tokenizer.decode(expected[0], skip_special_tokens=True)) or "x"
    inline = processor.tokenizer.apply_chat_template(
        processor.restore_messages(text * 3), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tensors = processor.apply_chat_template(processor.restore_messages(text * 3))
    options = {**NEW, "no_repeat_ngram_size": 2}
    assert new_ids(model.generate(**inline, **options), inline) == new_ids(
        model.generate(**tensors, **options), tensors
    )


def test_without_a_context_it_is_the_plain_decoder(model, processor, tmp_path):
    from transformers import Qwen2ForCausalLM

    decoder = Qwen2ForCausalLM(model.config.text_config).eval()
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.tie_weights()
    ids = torch.tensor([[1, 2, 3, 4], [256, 256, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        ours, theirs = model(ids, attention_mask=mask), decoder(ids, attention_mask=mask)
    assert torch.equal(ours.logits, theirs.logits)
    options = {**NEW, "eos_token_id": [256, 258], "pad_token_id": 256}
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **options), decoder.generate(ids, attention_mask=mask, **options)
    )


class TestRefusals:
    def test_in_line_and_tensors(self, model, processor, inputs):
        inline = processor.tokenizer.apply_chat_template(
            processor.restore_messages("x"), return_dict=True, return_tensors="pt"
        )
        with pytest.raises(ValueError, match="`input_ids` holds contexts in line and `context_input_ids` was given"):
            model.generate(**inline, context_input_ids=torch.tensor([[1, 2]]))
        embeds = model.get_input_embeddings()(inline["input_ids"])
        with pytest.raises(ValueError, match="holds contexts in line and `inputs_embeds` was given"):
            model.generate(inline["input_ids"], inputs_embeds=embeds)

    def test_prompt_without_room(self, model, processor):
        with pytest.raises(ValueError, match="row 0 of the prompts has 0 context placeholders, its contexts need 4"):
            model.generate(torch.tensor([[1, 2, 3]]), context_input_ids=torch.tensor([[5, 6]]))
        with pytest.raises(ValueError, match="contexts were given without a prompt"):
            model.generate(context_input_ids=torch.tensor([[5, 6]]))

    @pytest.mark.parametrize("option", [{"prefill_chunk_size": 8}, {"cache_implementation": "paged"}])
    def test_options_that_would_lose_contexts(self, model, inputs, option):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}`=.* cannot be combined with contexts"):
            model.generate(**inputs, **option)

    def test_continuous_batching_with_contexts(self, model, processor):
        ids = processor.tokenizer.apply_chat_template(processor.restore_messages("x"), return_dict=True)["input_ids"]
        with pytest.raises(ValueError, match="`generate_batch` cannot serve contexts, got in-line contexts"):
            model.generate_batch([ids])

    def test_stray_marker(self, model):
        start = model.config.context_start_token_id
        block = [start, *[model.config.context_token_id] * 4, model.config.context_end_token_id]
        with pytest.raises(ValueError, match="row 0 of the prompts has a stray context marker"):
            model.generate(torch.tensor([[*block, start, 3]]), context_input_ids=torch.tensor([[5, 6]]))


def test_generate_is_found_on_the_public_class():
    assert C3ForConditionalGeneration.can_generate()
