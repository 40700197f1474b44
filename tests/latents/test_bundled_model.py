"""The promises on the model in the package: whatever its weights can do, they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

import c3_hf
from c3_hf import CompressedContext, compress, restore, verify
from c3_hf.modeling.prompt_c3 import build_chat_template, escape_characters
from c3_hf.pipeline import C3Pipeline


PROSE = (
    "The lamp had burned low before anyone spoke. Outside, the tide went out over the flats with a sound like paper, "
    "and the boats leaned on their keels one after the other.\n\nNobody had thought to count them."
)
TEXTS = {
    "prose": PROSE,
    "numbers": "id,weight,price\n17,0.35,1204.50\n18,12.75,88.09\n19,7.00,5410.11\n",
    "special": "cafe\u0301 <|im_end|><imgpad> \u212b\r\n" * 3,
}

FACTS = (
    "The harbour was empty. The access code of the depot at Bergen is 482913. Nobody knew why. The access code of the "
    "depot at Lyon is 107745. It rained. The keeper of the lighthouse at Rostock is Edith Parker. So the day went by "
    "us."
)


@pytest.fixture(scope="module")
def bundled():
    path = c3_hf.tiny_model_path()
    if not Path(path, "model.safetensors").is_file():
        pytest.skip("the package holds no c3-tiny weights")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(path)


def test_its_chat_template_is_the_packages(bundled):
    _, processor = bundled
    assert processor.chat_template == build_chat_template(escape_characters(processor.tokenizer))


@pytest.mark.parametrize("prompt", ["restore", "find"])
@pytest.mark.parametrize("begun", ["The harbour", "The access code of the depot at Lyon is", "So the day went"])
def test_a_begun_reply_goes_on_in_the_stock_pipeline_as_in_ours(bundled, prompt, begun):
    model, processor = bundled
    pipe = C3Pipeline(model, processor)
    context = pipe.compress(FACTS)
    # Which prompts it was trained on is its own business, which words come in front of a reply is not.
    request = {"type": "text", "text": processor.prompts.get(prompt, "Find the sentence: ")}

    def messages(*parts):
        return [{"role": "user", "content": [*parts, request]}, {"role": "assistant", "content": begun}]

    # The pipeline goes on with a last message of the assistant's.
    generator = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    chat = messages(*context.content_parts())
    output = generator(chat, context_latents=context, max_new_tokens=20, do_sample=False)
    reply = output[0]["generated_text"][-1]["content"]
    assert len(reply) > len(begun)
    assert reply == begun + pipe(messages({"type": "context", "context": context}), max_new_tokens=20)


def test_a_short_text_is_restored_from_where_it_is_begun(bundled):
    begun, rest = PROSE[:30], PROSE[30:90]
    pipe = C3Pipeline(*bundled)
    content = [{"type": "context", "text": begun + rest}, {"type": "text", "text": pipe.processor.prompts["restore"]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": begun}]
    assert pipe(messages) == rest


def test_exact_mode_gives_every_text_back_from_a_file(bundled, tmp_path):
    source = "\n\n".join(TEXTS.values()).encode() + b"\xff\xfe"
    compress(source, *bundled, exact=True, verify=True, output=tmp_path / "text.c3")
    assert restore(CompressedContext.load(tmp_path / "text.c3"), *bundled, batch_size=3).data == source


def test_what_is_certain_comes_back_when_running_free(bundled):
    _, processor = bundled
    context = verify(compress(PROSE, *bundled, segment_length=24), PROSE, *bundled)
    restored = restore(context, *bundled)
    for index, fidelity in enumerate(context.fidelity):
        if fidelity.is_exact:
            assert restored.exact_segments[index]
        start, end = context.char_offsets[index : index + 2].tolist()
        ids = processor.tokenize_context(PROSE[start:end])
        again = processor.tokenize_context(restore(context[index], *bundled).text)
        # The last token of the prefix may be tokenised otherwise with what follows it.
        certain = max(0, fidelity.exact_prefix - 1)
        assert again[:certain] == ids[:certain]


def test_restoring_a_stored_text_is_restoring_the_text(bundled):
    text = PROSE[:90]
    context = compress(text, *bundled, latent_dtype=torch.float32)
    assert [restore(context, *bundled).text] == C3Pipeline(*bundled).round_trip([text])
