"""The compressed context in memory: a sequence that keeps its offsets, checksums and promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from c3_hf import CompressedContext, restore
from c3_hf.latents.context import dequantize, quantize
from c3_hf.latents.file import ContextHeader, write_file
from c3_hf.latents.fingerprints import fingerprint_model, fingerprint_processor
from c3_hf.options import LATENT_DTYPES
from factories import make_model, make_processor


def assert_same(first, second):
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.parametrize("dtype", LATENT_DTYPES)
def test_slices_put_together_are_the_whole(compressed, dtype):
    context = compressed(latent_dtype=dtype, verify=True, exact=True)
    assert len(context) > 5
    middle = context[2:4]
    assert (len(middle), int(middle.char_offsets[0])) == (2, int(context.char_offsets[2]))
    middle.check()
    for joined in (
        CompressedContext.concatenate([context[:2], middle, context[4:]]),
        CompressedContext.concatenate(context),
        context[:3] + context[3:],
    ):
        joined.check()
        assert_same(joined, context)
        assert joined.header.text_sha256 is None
    assert [len(segment) for segment in context] == [1] * len(context)
    assert_same(context[-1], context[len(context) - 1])
    assert len(context[3:3]) == 0


def test_offsets_point_into_the_text(compressed, text):
    context = compressed()
    data = text.encode()
    for index in range(len(context)):
        start, end = context.char_offsets[index : index + 2].tolist()
        first, last = context.byte_offsets[index : index + 2].tolist()
        assert text[start:end].encode() == data[first:last]
    assert (int(context.char_offsets[-1]), int(context.byte_offsets[-1])) == (len(text), len(data))
    assert context.num_tokens == context.token_offsets[-1]
    part = context[2:4]
    assert part.num_characters == int(context.char_offsets[4] - context.char_offsets[2])
    assert (context.num_characters, part.total_latents) == (len(text), 2 * 4)


def test_the_token_accuracy_of_all_segments(compressed):
    assert compressed().token_accuracy is None
    context = compressed(verify=True)
    positions = context.num_tokens + len(context)
    wrong = sum(segment.num_errors for segment in context.fidelity)
    assert wrong > 0
    assert context.token_accuracy == 1 - wrong / positions
    assert context[:0].token_accuracy == 1


def test_latents_are_what_generate_takes(compressed, model, processor, text):
    context = compressed()
    latents = context.context_latents(model)
    assert latents.shape == (1, len(context), 4, 32)
    start, end = context.char_offsets[1:3].tolist()
    ids = torch.tensor([processor.tokenize_context(text[start:end])])
    torch.testing.assert_close(latents[0, 1], model.get_context_features(ids)[0, 0], atol=1e-5, rtol=1e-4)
    parts = [*context.content_parts(model), {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert "context_input_ids" not in inputs
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_the_same_answer_from_latents_as_from_the_text(compressed, model, processor):
    text = "A single segment."
    question = {"type": "text", "text": "Who?"}
    parts = compressed(text).content_parts(model)
    stored = processor.apply_chat_template([{"role": "user", "content": [*parts, question]}])
    fresh = processor.apply_chat_template([{"role": "user", "content": [{"type": "context", "text": text}, question]}])
    answers = [model.generate(**inputs, max_new_tokens=8, do_sample=False) for inputs in (stored, fresh)]
    assert answers[0].tolist() == answers[1].tolist()


def test_an_empty_text_has_no_segments(compressed, model, processor):
    context = compressed("", verify=True, exact=True)
    assert (len(context), context.num_tokens, context.fidelity) == (0, 0, [])
    assert context.content_parts(model) == []
    assert restore(context, model, processor).data == b""


def test_to_changes_the_latents_dtype(compressed):
    context = compressed(verify=True)
    smaller = context.to(torch.int8)
    assert (smaller.latents.dtype, smaller.margins) == (torch.int8, None)
    smaller.check()
    assert smaller.nbytes < context.nbytes
    torch.testing.assert_close(smaller.dense_latents(), context.dense_latents(), atol=0.05, rtol=0)
    assert context.to(torch.float32) is context
    assert context.to(device="cpu").latents.device.type == "cpu"


@pytest.mark.parametrize("dtype", LATENT_DTYPES)
def test_quantized_latents_are_close_and_zero_stays_zero(dtype):
    latents = torch.randn(3, 4, 16) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1)
    latents[1, 2] = 0
    dtype = getattr(torch, dtype)
    stored, scales = quantize(latents, dtype)
    assert stored.dtype == dtype
    bound = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.int8: 0.5 / 127}[dtype]
    error = (dequantize(stored, scales).float() - latents).abs()
    assert (error <= bound * latents.abs().amax(-1, keepdim=True) * 1.001).all()


def test_repr_says_what_there_is(compressed):
    text = repr(compressed(verify=True, exact=True))
    assert text.startswith("CompressedContext(")
    for part in (f"{compressed().num_tokens:,} tokens in", "float32 × 24", "token accuracy 0.0", "byte-exact"):
        assert part in text


def test_fingerprints_tell_models_and_tokenizers_apart(model, processor):
    found = fingerprint_model(model)
    assert found == fingerprint_model(make_model())
    assert found == fingerprint_model(make_model().to(torch.bfloat16).float().to(torch.bfloat16))
    for name in ("model.encoder.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.projector.bias"):
        other = make_model()
        with torch.no_grad():
            other.get_parameter(name).flatten()[3] += 1
        assert fingerprint_model(other) != found
    assert fingerprint_processor(processor) == fingerprint_processor(make_processor())
    changed = make_processor()
    changed.tokenizer.add_tokens(["naïve"])
    assert fingerprint_processor(changed) != fingerprint_processor(processor)


def test_what_does_not_fit_is_refused(compressed, model, processor, tmp_path):
    context, exact = compressed(), compressed(exact=True)
    stranger = make_model(seed=1)
    strange = make_processor()
    strange.tokenizer.add_tokens(["naïve"])
    with pytest.raises(ValueError, match=r"`model` has the fingerprint .* latents mean nothing to another model"):
        context.context_latents(stranger)
    with pytest.raises(ValueError, match=r"`model` has the fingerprint"):
        restore(context, stranger, processor)
    with pytest.raises(ValueError, match=r"`processor` has the fingerprint .* restoring prompt is another one"):
        restore(context, model, strange)
    with pytest.raises(ValueError, match=r"`model` has the parameter .* on the meta device"):
        fingerprint_model(make_model().to("meta"))
    with pytest.raises(ValueError, match=r"`dtype` must be one of .* got torch.float16"):
        context.to(torch.float16)
    with pytest.raises(ValueError, match=r"`dtype`: a byte-exact context stays torch.float32, .* got torch.int8"):
        exact.to(torch.int8)
    with pytest.raises(ValueError, match=r"`contexts` differ in `exact_margin`"):
        context + exact
    with pytest.raises(ValueError, match=r"`contexts` differ in dtype: torch.float32 and torch.int8"):
        context + compressed(latent_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"`contexts`: only one of them has \['margins'\]"):
        context + compressed(verify=True)
    with pytest.raises(ValueError, match=r"`contexts` is empty"):
        CompressedContext.concatenate([])
    with pytest.raises(ValueError, match=r"`index` must be a slice of step 1, .* got 2"):
        context[::2]
    with pytest.raises(IndexError):
        context[len(context)]
    with pytest.raises(ValueError, match=r"holds no fidelity: compress with `verify=True`"):
        context.segment_margins(0)
    with pytest.raises(ValueError, match=r"is not byte-exact: compress with `exact=True`"):
        context.segment_residual(0)
    with pytest.raises(ValueError, match=r"`header` lacks \['model'\]"):
        ContextHeader.from_entries({"tokenizer": "", "num_latents": 4, "hidden_size": 24, "segment_length": 9}, "it")
    header = {**dataclasses.asdict(context.header), "num_latents": 5}
    write_file(tmp_path / "other.c3", header, lambda: [context.tensors()])
    with pytest.raises(ValueError, match=r"`header` says 5 latents of width 24, the tensor has \(4, 24\)"):
        CompressedContext.load(tmp_path / "other.c3")


def test_damage_in_memory_is_noticed(compressed, model):
    context = compressed()
    context.latents[2, 1, 5] += 1
    with pytest.raises(ValueError, match=r"segment 2 of this compressed context \(and 0 more\) is damaged"):
        context.context_latents(model)
