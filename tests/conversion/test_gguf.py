"""A GGUF file as half of a new model."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from c3_hf.cli import main
from c3_hf.conversion.halves import load_half
from c3_hf.conversion.repository import load_model


gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `gguf`)")
TEMPLATE = "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] }}{% endfor %}"


def permuted(weight, heads):
    """Rows of queries or keys in the order of llama.cpp, whose rotary pairs are neighbours."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, 2, width // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def stock(pairs):
    return pairs("llama", kind="words")


@pytest.fixture(scope="module")
def file(stock, tmp_path_factory):
    """The model `stock` as a GGUF file."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stock), AutoTokenizer.from_pretrained(stock)
    config, path = model.config, tmp_path_factory.mktemp("gguf") / "half.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    # The beginning is another token than the end, in the place of one that no text here has.
    writer.add_token_list(["<|begin|>", *tokenizer.convert_ids_to_tokens(range(1, len(tokenizer)))])
    writer.add_token_types([3, *[1] * (len(tokenizer) - 2), 3])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            part = name.split(".")[-2]
            tensor = permuted(tensor, heads[part]) if part in heads else tensor
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_both_halves_may_be_gguf_files(file, stock, tmp_path):
    words = ["new", str(tmp_path / "out"), "--encoder", str(file), "--decoder", str(file), "--num-latents", "2"]
    assert main(words) == 0
    model, processor = load_model(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(stock)
    size = plain.config.vocab_size
    for half in (model.model.encoder, model.model.language_model):
        for name, tensor in plain.model.state_dict().items():
            assert torch.equal(half.state_dict()[name][: len(tensor)], tensor), name
    # transformers 4.57 puts the first token in front of text read from a GGUF file, unless it is told not to.
    read = {"return_tensors": "pt", "add_special_tokens": False}
    ids = AutoTokenizer.from_pretrained(stock)("the cat sat on the mat", **read)["input_ids"]
    assert torch.equal(processor.tokenizer("the cat sat on the mat", **read)["input_ids"], ids)
    torch.testing.assert_close(model(input_ids=ids).logits[..., :size], plain(input_ids=ids).logits)
    chat = [{"role": "user", "content": "the cat"}]
    assert processor.apply_chat_template(chat, chat_template="decoder", tokenize=False) == "[user]the cat"
    # The file's path and its quantisation are no part of the model.
    for path in (tmp_path / "out").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(file.parent) not in text
        assert "quantization" not in text
    assert processor.tokenizer.eos_token == AutoTokenizer.from_pretrained(stock).eos_token
    assert model.generation_config.eos_token_id == [
        processor.tokenizer.convert_tokens_to_ids("<|im_end|>"),
        processor.tokenizer.eos_token_id,
    ]


def test_a_file_that_is_absent_or_no_gguf_is_named(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf` is absent\. Give a GGUF file on this disk"):
        load_half(tmp_path / "absent.gguf", "auto")
    broken = shutil.copyfile(file, tmp_path / "broken.gguf")
    broken.write_bytes(b"GGUX" + file.read_bytes()[4:])
    with pytest.raises(ValueError, match=r"broken\.gguf is no whole GGUF file, it begins with"):
        load_half(broken, "auto")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no gguf, but words of a text", b"GGUF\3" + b"\xff" * 40])
def test_a_file_that_is_none_or_cut_short(content, tmp_path, capsys):
    (tmp_path / "\u00e9.GGUF").write_bytes(content)
    words = ["--encoder", str(tmp_path / "\u00e9.GGUF"), "--decoder", str(tmp_path / "\u00e9.GGUF")]
    assert main(["new", str(tmp_path / "out"), *words]) == 1
    said = capsys.readouterr().err
    assert re.search(r"\u00e9\.GGUF(:| is no whole GGUF file, it begins with b'.*'\. Fetch it again)", said)
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
