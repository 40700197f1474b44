"""Conversion of checkpoints in the released layout: what is written, and what stops it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from c3_hf.conversion import released as source_files
from c3_hf.conversion import repository as repository_files
from c3_hf.conversion import verification, weights
from c3_hf.conversion.convert_c3_to_hf import convert
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_nothing_written(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def forward_agrees(record: dict, tolerance: float = 1e-6) -> bool:
    """Whether logits agree within a few roundings of the largest one, which is what another processor may change."""
    forward = record["verification"]["forward"]
    return forward["max_difference"] <= tolerance * forward["max_logit"]


@pytest.mark.parametrize(("main_shards", "encoder_shards"), [(1, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_arrives_under_its_new_name(released, tmp_path, main_shards, encoder_shards, dtype):
    source = released(dtype=dtype)
    folder = source.write(tmp_path / "source", main_shards, encoder_shards)
    record = convert(folder, tmp_path / "out", verify=True)
    written = load_all(tmp_path / "out")

    expected = {
        name.replace("model.Q.", "model.latent_queries.").replace("model.mm_projector.", "model.projector."): tensor
        for name, tensor in source.main.items()
    }
    expected = {
        name if name.startswith(("model.latent_queries", "model.projector")) else "model.language_model." + name[6:]: t
        for name, t in expected.items()
    }
    expected |= {"model.encoder." + name.removeprefix("model."): tensor for name, tensor in source.encoder.items()}
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor)
    assert record["verification"]["tensors_equal"] == len(expected)
    assert forward_agrees(record, {torch.float32: 1e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype])
    assert record["dropped"] == []


def test_config_keeps_the_facts_of_both_halves(released, tmp_path):
    source = released(num_latents=5, dtype=torch.bfloat16)
    source.main_config |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    convert(source.write(tmp_path / "source"), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.num_latents == 5
    assert config.text_config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings is True
    assert config.text_config.tie_word_embeddings is True
    assert config.context_token_id == source.main_config["im_patch_token"]
    assert config.inline_context_start_token_id == source.main_config["im_patch_token"] - 10
    assert str(config.dtype) == "torch.bfloat16"
    # Windows are off in the original's code, whatever its files say.
    assert config.text_config.use_sliding_window is False
    assert set(config.text_config.layer_types) == {"full_attention"}
    fields = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    for half, theta in (("text_config", 50000.0), ("encoder_config", 10000.0)):
        assert fields[half]["rope_theta"] == theta
        assert fields[half]["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert fields["auto_map"] == {
        "AutoConfig": "configuration_c3.C3Config",
        "AutoModel": "modeling_c3.C3ForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_c3.C3ForConditionalGeneration",
        "AutoProcessor": "processing_c3.C3Processor",
    }


def test_generation_stops_where_the_original_does(released, tmp_path):
    source = released()
    convert(source.write(tmp_path / "source"), tmp_path / "out")
    end_of_text = source.main_config["eos_token_id"]
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == [end_of_text + 2, end_of_text]
    assert config.pad_token_id == end_of_text
    assert config.do_sample is False
    assert config.max_new_tokens == 4096


def test_auto_classes_load_the_folder_and_saving_changes_no_file_that_counts(released, tmp_path):
    convert(released().write(tmp_path / "source"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__ == type(model).__name__
    assert tokenizer("the thing")["input_ids"] == processor.tokenizer("the thing")["input_ids"]
    assert tokenizer.padding_side == "left"
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    first, second = load_all(tmp_path / "out"), load_all(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    saved = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    for half in ("text_config", "encoder_config"):
        for key in ("rope_theta", "rope_parameters", "rope_scaling"):
            ours[half].pop(key, None)
            saved[half].pop(key, None)
    assert ours == saved


def test_code_files_are_copied_byte_for_byte(released, tmp_path):
    convert(released().write(tmp_path / "source"), tmp_path / "out")
    files = repository_files.code_files()
    assert {"configuration_c3.py", "modeling_c3.py", "processing_c3.py"} <= {path.name for path in files}
    for path in files:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_stored_head_equal_to_the_embedding_is_dropped(released, tmp_path):
    source = released()
    source.main["lm_head.weight"] = source.main["model.embed_tokens.weight"].clone()
    source.main_config["tie_word_embeddings"] = False
    record = convert(source.write(tmp_path / "source"), tmp_path / "out", verify=True)
    assert "lm_head.weight" not in load_all(tmp_path / "out")
    assert record["dropped"][0]["tensor"] == "model.safetensors:lm_head.weight"
    assert "equal to the embedding" in record["dropped"][0]["reason"]
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.tie_word_embeddings is True
    assert config.text_config.tie_word_embeddings is True


def test_stored_head_of_a_tied_model_is_ignored(released, tmp_path):
    source = released()
    source.main["lm_head.weight"] = torch.full_like(source.main["model.embed_tokens.weight"], 2.0)
    record = convert(source.write(tmp_path / "source"), tmp_path / "out", verify=True)
    assert "lm_head.weight" not in load_all(tmp_path / "out")
    assert "tie_word_embeddings is true" in record["dropped"][0]["reason"]


def test_untied_head_is_kept(released, tmp_path):
    source = released(tied=False)
    record = convert(source.write(tmp_path / "source"), tmp_path / "out", verify=True)
    assert torch.equal(load_all(tmp_path / "out")["lm_head.weight"], source.main["lm_head.weight"])
    assert forward_agrees(record)
    model = C3ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_leftovers_of_training_and_the_encoder_head_are_left_out(released, tmp_path):
    source = released()
    source.encoder["lm_head.weight"] = source.encoder["model.embed_tokens.weight"].clone()
    folder = source.write(tmp_path / "source", main_shards=2)
    for name in ("training_args.bin", "trainer_state.json", "modeling_C3.py", "optimizer.pt"):
        (folder / name).write_text("{}", encoding="utf-8")
    save_file({"state": torch.zeros(2)}, folder / "optimizer.safetensors")
    record = convert(folder, tmp_path / "out")
    assert [drop["tensor"] for drop in record["dropped"]] == ["llm1/model.safetensors:lm_head.weight"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({"training_args.bin", "trainer_state.json", "modeling_C3.py", "optimizer.pt"})


def test_one_folder_descendant_is_read_by_names(released, tmp_path):
    plain = released()
    convert(plain.write(tmp_path / "plain"), tmp_path / "expected")
    whole = released()
    whole.main |= {f"model.llm1.{name}": tensor for name, tensor in whole.encoder.items()}
    whole.main["model.llm1.lm_head.weight"] = whole.encoder["model.embed_tokens.weight"].clone()
    folder = whole.write(tmp_path / "whole")
    (folder / "llm1" / "model.safetensors").unlink()
    record = convert(folder, tmp_path / "out", verify=True)
    assert "never used" in record["dropped"][0]["reason"]
    expected, written = load_all(tmp_path / "expected"), load_all(tmp_path / "out")
    assert expected.keys() == written.keys()
    assert all(torch.equal(expected[name], written[name]) for name in expected)


def test_casting_changes_weights_and_configuration(released, tmp_path):
    source = released()
    record = convert(source.write(tmp_path / "source"), tmp_path / "out", dtype=torch.bfloat16, verify=True)
    assert {tensor.dtype for tensor in load_all(tmp_path / "out").values()} == {torch.bfloat16}
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert {str(config.dtype), str(config.text_config.dtype)} == {"torch.bfloat16"}
    assert record["cast_to"] == "bfloat16"
    assert record["verification"]["forward"]["dtype"] == "bfloat16"


def test_shards_keep_to_their_size_and_load(released, tmp_path):
    source = released()
    convert(source.write(tmp_path / "source"), tmp_path / "out", max_shard_size="20KB", verify=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files.keys()
    for tensors in files.values():
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for f in files.values() for t in f.values()
    )


def test_record_and_card_name_source_hashes_and_receipt(released, tmp_path):
    folder = released().write(tmp_path / "source")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Source\n", encoding="utf-8")
    record = convert(folder, tmp_path / "out", base_models=["owner/base"], verify=True)
    stored = json.loads((tmp_path / "out" / "conversion.json").read_text(encoding="utf-8"))
    assert stored == record
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert record["source_files"]["model.safetensors"] == digest
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == ["owner/base"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert digest in card.text
    assert "differ by at most 0" in card.text
    assert str(tmp_path) not in card.text + json.dumps(record)


@pytest.mark.parametrize("card", [None, "# No metadata", "---\nlicense: [a, b]\n---\n", "---\nlicense: [\n---\n"])
def test_a_licence_that_is_not_stated_is_not_made_up(released, tmp_path, card):
    folder = released().write(tmp_path / "source")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    convert(folder, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license is None
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")).get("license") is None


def test_files_are_readable_as_new_files_are(released, tmp_path):
    convert(released().write(tmp_path / "source"), tmp_path / "out")
    (tmp_path / "plain").write_text("", encoding="utf-8")
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {mode}


def test_without_a_tokenizer_there_is_no_processor_and_ids_follow_qwens_order(released, tmp_path):
    source = released()
    source.tiktoken = None
    record = convert(source.write(tmp_path / "source"), tmp_path / "out", verify=True)
    assert record["has_processor"] is False
    assert not list((tmp_path / "out").glob("*token*"))
    assert "takes token\nids" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    end_of_text = source.main_config["eos_token_id"]
    assert config.text_config.eos_token_id == [end_of_text + 2, end_of_text]
    assert config.inline_context_start_token_id is None


def test_without_a_tokenizer_a_list_of_stop_ids_is_taken_as_it_is(released, tmp_path):
    source = released(eos_token_id=[266, 264])
    source.tiktoken = None
    convert(source.write(tmp_path / "source"), tmp_path / "out")
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == [266, 264]
    assert config.pad_token_id == 264


def test_descendant_with_its_own_fast_tokenizer(released, tmp_path):
    """Trained further on a decoder whose tokenizer has the markers at other ids (Qwen2.5's, for example)."""
    source = released(im_patch_token=260, im_start_token=261, im_end_token=262, eos_token_id=256)
    source.tiktoken = None
    folder = source.write(tmp_path / "source")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "<imgpad>", "<img>", "</img>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    record = convert(folder, tmp_path / "out", verify=True)
    assert record["has_processor"]
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.text_config.eos_token_id == [258, 256]
    assert config.inline_context_start_token_id is None
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = processor.apply_chat_template(processor.restore_messages("<tool> <img>"))
    assert inputs["input_ids"][0].tolist().count(260) == 3
    assert inputs["context_input_ids"].max() < 256


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_scaled_rope_survives(released, tmp_path, scaling):
    source = released(rope_scaling=scaling)
    record = convert(source.write(tmp_path / "source"), tmp_path / "out", verify=True)
    assert forward_agrees(record)
    parameters = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["text_config"][
        "rope_parameters"
    ]
    assert parameters["rope_theta"] == 50000.0
    assert parameters["factor"] == scaling["factor"]


def test_a_hub_id_is_downloaded_and_its_commit_recorded(released, tmp_path, monkeypatch):
    folder = released().write(tmp_path / "snapshots" / "0123abc")
    asked = {}

    def download(name, **arguments):
        asked.update(name=name, **arguments)
        return str(folder)

    monkeypatch.setattr(source_files, "snapshot_download", download)
    record = convert(
        "owner/name", tmp_path / "out", revision="main", token="secret", cache_dir="cache", local_files_only=True
    )
    patterns = asked.pop("allow_patterns")
    assert asked == {
        "name": "owner/name",
        "revision": "main",
        "token": "secret",
        "cache_dir": "cache",
        "local_files_only": True,
    }
    assert {"*.safetensors", "llm1/*.json"} <= set(patterns)
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in patterns)
    assert (record["source"], record["revision"]) == ("owner/name", "0123abc")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["owner/name"]
    assert "at revision `0123abc`" in card.text
    assert "secret" not in json.dumps(record)


PROBLEMS = {
    "missing": (lambda s: s.main.pop("model.Q.weight"), r"missing: model\.Q\.weight \[3, 8\]"),
    "missing in llm1": (lambda s: s.encoder.pop("model.norm.weight"), r"missing: llm1/model\.norm\.weight \[8\]"),
    "unexpected": (
        lambda s: s.main.update({"model.extra.weight": torch.zeros(2)}),
        r"unexpected in main folder: model\.extra\.weight \[2\]",
    ),
    "unexpected layer": (
        lambda s: s.encoder.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(12, 8)}),
        r"unexpected: model\.layers\.9\.mlp\.up_proj\.weight \[12, 8\]",
    ),
    "wrong shape": (
        lambda s: s.main.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(23, 16)}),
        r"wrong shape: model\.layers\.1\.mlp\.up_proj\.weight \[23, 16\], expected \[24, 16\]",
    ),
    "non-finite": (
        lambda s: s.encoder["model.layers.0.mlp.up_proj.weight"].view(-1)[3:5].fill_(float("nan")),
        r"non-finite: model\.layers\.0\.mlp\.up_proj\.weight \(model\.safetensors\), 2 of 96",
    ),
    "infinite": (
        lambda s: s.main["model.mm_projector.bias"].view(-1)[0].fill_(float("inf")),
        r"non-finite: model\.mm_projector\.bias .*, 1 of 16",
    ),
    "number of latents": (
        lambda s: s.main_config.update(latent_token_len=4),
        r"model\.Q\.weight is \[3, 8\], but the files say \[4, 8\]",
    ),
    "encoder width": (
        lambda s: s.main_config.update(contexts_compression_llm_hidden_size=9),
        r"`contexts_compression_llm_hidden_size` is 9, but `hidden_size` of llm1 is 8",
    ),
    "projector": (
        lambda s: s.main.update({"model.mm_projector.weight": torch.zeros(15, 8)}),
        r"model\.mm_projector\.weight is \[15, 8\], but the files say \[16, 8\]",
    ),
    "placeholder id": (
        lambda s: (setattr(s, "tiktoken", None), s.main_config.update(im_patch_token=481)),
        r"`im_patch_token` is 481, outside the decoder's vocabulary of 481",
    ),
    "start id in the encoder": (
        lambda s: s.encoder_config.update(vocab_size=300),
        r"`im_start_token` is 478, outside the vocabulary of llm1 \(300\)",
    ),
    "vocabulary": (
        lambda s: s.main_config.update(vocab_size=480),
        r"`vocab_size` is 480, but the tokenizer has 481 entries",
    ),
    "marker of the tokenizer": (
        lambda s: s.main_config.update(im_end_token=470),
        r"`im_end_token` is 470, but </img> has the id 479 in the tokenizer",
    ),
    "not released": (lambda s: s.main_config.pop("latent_token_len"), "`latent_token_len`"),
    "no ids": (lambda s: s.main_config.pop("hidden_size"), "`hidden_size` is absent from config.json"),
    "no encoder width": (lambda s: s.encoder_config.pop("hidden_size"), "`hidden_size` is absent from llm1"),
    "no clue to the stop ids": (
        lambda s: (setattr(s, "tiktoken", None), s.main_config.update(eos_token_id=None)),
        "`eos_token_id` in .* is None",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_is_named_and_nothing_is_written(released, tmp_path, problem):
    source = released()
    bend, message = PROBLEMS[problem]
    bend(source)
    folder = source.write(tmp_path / "source")
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "target" / "out")
    assert_nothing_written(tmp_path / "target")


def test_all_problems_are_named_at_once(released, tmp_path):
    source = released()
    del source.main["model.norm.weight"]
    source.encoder["model.stray"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"(?s)unexpected in llm1: model\.stray.*missing: model\.norm\.weight"):
        convert(source.write(tmp_path / "source"), tmp_path / "out")


def test_values_that_a_cast_would_lose_stop_it(released, tmp_path):
    source = released()
    source.main["model.Q.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match=r"overflow: model\.Q\.weight .*, 1 values do not fit into torch\.float16"):
        convert(source.write(tmp_path / "source"), tmp_path / "out", dtype=torch.float16)


def test_a_file_that_was_cut_short_is_named(released, tmp_path):
    folder = released().write(tmp_path / "source", main_shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is no complete safetensors file"):
        convert(folder, tmp_path / "out")


def test_absent_shards_and_files_are_named(released, tmp_path):
    folder = released().write(tmp_path / "source", main_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are absent: model-00002-of-00002\.safetensors"):
        convert(folder, tmp_path / "out")
    (folder / "llm1" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"llm1/config\.json` is absent"):
        convert(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is no folder, and no Hub id"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_an_index_that_contradicts_its_files_is_named(released, tmp_path):
    folder = released().write(tmp_path / "source", main_shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"disagree about 1 tensors: model\.ghost\.weight"):
        convert(folder, tmp_path / "out")


DEEP = "[" * 100_000 + "]" * 100_000
# What an index may hold in place of the file of each tensor, and what the message says of it.
BAD_INDEXES = {
    "none": ("{}", "`weight_map` is None"),
    "null": ('{"weight_map": null}', "`weight_map` is None"),
    "empty": ('{"weight_map": {}}', r"`weight_map` is \{\}"),
    "list": ('{"weight_map": ["a"]}', r"`weight_map` is \['a'\]"),
    "no object": ("[1]", "holds a JSON list, expected an object"),
    "null in it": ('{"weight_map": {"model.norm.weight": null}}', r"gives None for model\.norm\.weight"),
    "number in it": ('{"weight_map": {"model.norm.weight": 7}}', r"gives 7 for model\.norm\.weight"),
    "list in it": ('{"weight_map": {"model.norm.weight": ["a"]}}', r"gives \['a'\] for model\.norm\.weight"),
    "no name": ('{"weight_map": {"model.norm.weight": ""}}', r"gives '' for model\.norm\.weight"),
    "other folder": (
        '{"weight_map": {"model.norm.weight": "../other/model.safetensors"}}',
        r"gives '\.\./other/model\.safetensors' for model\.norm\.weight",
    ),
    "nested": ('{"weight_map": ' + DEEP + "}", "is JSON nested too deep"),
    "cut short": ('{"weight_map": {"model', "is not JSON"),
}


@pytest.mark.parametrize("half", ["main", "llm1"])
def test_a_damaged_index_is_named_with_its_entry(released, tmp_path, half):
    folder = released().write(tmp_path / "main", main_shards=2, encoder_shards=2)
    index = (folder if half == "main" else folder / half) / "model.safetensors.index.json"
    for content, message in BAD_INDEXES.values():
        index.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"(?s){half}/model\.safetensors\.index\.json.*{message}"):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


WHOLE = "expected a whole number from 1 to"
BAD_ENTRIES = {
    "num_attention_heads": [(0, WHOLE), (-2, WHOLE), (None, "absent"), (3, "does not divide `hidden_size`")],
    "num_key_value_heads": [(0, WHOLE), ([], WHOLE), (3, r"2, no multiple of `num_key_value_heads` \(3\)")],
    "num_hidden_layers": [(100_000, "weights hold 2 layers"), (10**30, WHOLE), (True, WHOLE), ("2", WHOLE)],
    "hidden_size": [("16", WHOLE), (16.0, WHOLE), (0, WHOLE), ({"a": 1}, WHOLE)],
    "vocab_size": [(-1, WHOLE), (10**12, WHOLE)],
    "intermediate_size": [("x" * 1000, WHOLE), (10**15, WHOLE)],
    "max_position_embeddings": [(0, WHOLE), ("512", WHOLE)],
    "rms_norm_eps": [("small", "expected a positive number"), (0, "expected a positive number")],
    "rope_theta": [(-1.0, "expected a positive number"), (float("nan"), "expected a positive number")],
    "rope_scaling": [(5, "expected an object"), ({"rope_type": "none such"}, "an object whose type is default, ")],
    "torch_dtype": [("int7", "expected one of float32"), (32, "expected one of float32")],
    "pad_token_id": [("x", "expected a token id"), (10**9, "outside its vocabulary of"), (1.5, "a token id")],
    "tie_word_embeddings": [("yes", "expected true or false")],
    "hidden_act": [("none such", "expected an activation"), (3, "expected an activation")],
    "eos_token_id": [("</s>", "expected a token id or a list"), ([None], "expected a token id or a list")],
}


@pytest.mark.parametrize("key", BAD_ENTRIES)
def test_an_entry_that_cannot_be_is_named_with_its_file(released, tmp_path, key):
    source = released()
    for number, (value, message) in enumerate(BAD_ENTRIES[key]):
        # One half after the other.
        half, where = [("main_config", "config.json"), ("encoder_config", "llm1/config.json")][number % 2]
        right = getattr(source, half).get(key)
        getattr(source, half)[key] = value
        folder = source.write(tmp_path / f"source-{number}")
        with pytest.raises(ValueError, match=message) as caught:
            convert(folder, tmp_path / "out")
        getattr(source, half)[key] = right
        for words in (str(folder), where, key):
            assert words in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert not (tmp_path / "out").exists()


def test_entries_that_say_nothing_of_the_model_are_no_work(released, tmp_path):
    source = released()
    for config in (source.main_config, source.encoder_config):
        config |= {"num_labels": 10**12, "id2label": [1], "architectures": 3, "quantization_config": "x"}
    convert(source.write(tmp_path / "source"), tmp_path / "out")
    assert "num_labels" not in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value"), [("latent_token_len", 0), ("latent_token_len", True), ("im_patch_token", -1)]
)
def test_the_numbers_of_c3_itself_are_looked_at_too(released, tmp_path, key, value):
    source = released(**{key: value})
    with pytest.raises(ValueError, match=rf"`{key}` in config\.json is {value}, expected"):
        convert(source.write(tmp_path / "source"), tmp_path / "out")


UNREADABLE = [b'{"a": "\xe9"}', b"\xff\xfe{\x00", DEEP.encode(), b"", b'{"a": ' + b"1" * 5000 + b"}"]


@pytest.mark.parametrize("name", ["config.json", "llm1/config.json"])
def test_a_config_that_cannot_be_read_is_named(released, tmp_path, name):
    folder = released().write(tmp_path / "source")
    for content in UNREADABLE:
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"source/{name}` is (not JSON|not UTF-8|JSON nested too deep)"):
            convert(folder, tmp_path / "out")


def test_a_damaged_tokenizer_is_named(released, tmp_path):
    source = released()
    source.tiktoken = "caf\u00e9 0\n" + source.tiktoken
    with pytest.raises(ValueError, match=r"qwen\.tiktoken, line 1: expected '<base64> <rank>'"):
        convert(source.write(tmp_path / "source"), tmp_path / "out")
    source.tiktoken = None
    folder = source.write(tmp_path / "fast")
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"fast/tokenizer\.json` is not JSON"):
        convert(folder, tmp_path / "out")


def test_shards_without_an_index_are_read_but_not_twice(released, tmp_path):
    folder = released().write(tmp_path / "source", main_shards=2)
    (folder / "model.safetensors.index.json").unlink()
    convert(folder, tmp_path / "out")
    save_file({"model.norm.weight": torch.ones(16)}, folder / "model-00003-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is in two files"):
        convert(folder, tmp_path / "out2")


def test_other_weight_formats_are_refused(released, tmp_path):
    folder = released().write(tmp_path / "source")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors file"):
        convert(folder, tmp_path / "out")


def test_quantised_types_are_refused(released, tmp_path):
    source = released()
    source.main["model.norm.weight"] = torch.zeros(16, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight has type F8_E4M3"):
        convert(source.write(tmp_path / "source"), tmp_path / "out")


def test_a_config_that_is_no_json_is_named(released, tmp_path):
    folder = released().write(tmp_path / "source")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json` is not JSON"):
        convert(folder, tmp_path / "out")
    (folder / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds a JSON list, expected an object"):
        convert(folder, tmp_path / "out")


def test_taken_output_and_bad_sizes_are_refused(released, tmp_path):
    folder = released().write(tmp_path / "source")
    (tmp_path / "out").mkdir()
    convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"`output` .* exists and is not an empty folder"):
        convert(folder, tmp_path / "out")
    for size in ("5 apples", "-3GB", "9" * 400 + "GB", 0):
        with pytest.raises(ValueError, match="`max_shard_size` must be a number of bytes"):
            convert(folder, tmp_path / "new", max_shard_size=size)


def test_a_failure_half_way_leaves_nothing(released, tmp_path, monkeypatch):
    folder = released().write(tmp_path / "source")
    (tmp_path / "target").mkdir()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(repository_files, "copy_code", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "target" / "out")
    assert_nothing_written(tmp_path / "target")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["weights.write_shards", "verify_forward", "write_converted_card"])
def test_after_a_kill_there_is_nothing_to_load(released, tmp_path, victim, repository):
    folder = released().write(tmp_path / "source")
    script = f"""
import os, sys
from c3_hf.conversion import convert_c3_to_hf as module
owner, _, name = "module.{victim}".rpartition(".")
owner = eval(owner)
real = getattr(owner, name)
def killed(*args, **kwargs):
    real(*args, **kwargs)
    os.kill(os.getpid(), 9)
setattr(owner, name, killed)
module.convert(sys.argv[1], sys.argv[2], verify=True)
"""
    target = tmp_path / "target"
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(target / "out")],
        env={**os.environ, "PYTHONPATH": str(repository / "src")},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == -9
    assert not (target / "out").exists()
    (left,) = target.iterdir()
    assert not (left / "config.json").exists()
    # Without a config.json transformers 4.57 looks for the name of a model in the path: this test's name has none.
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(left)


def test_verification_notices_a_changed_tensor(released, tmp_path):
    source = released()
    folder = source.write(tmp_path / "source")
    convert(folder, tmp_path / "out")
    tensors = {tensor.name: tensor for tensor in weights.list_tensors(tmp_path / "out")}
    digests = weights.scan_weights(tensors)
    path = tmp_path / "out" / "model.safetensors"
    changed = load_file(path)
    changed["model.projector.bias"][0] += 1
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors on disk are not those of the source: model\.projector\.bias"):
        verification.verify_tensors(tmp_path / "out", digests)


def test_verification_notices_a_model_that_computes_something_else(released, tmp_path, monkeypatch):
    folder = released().write(tmp_path / "source")
    real = verification.reference_logits
    monkeypatch.setattr(verification, "reference_logits", lambda *args: [logits + 1 for logits in real(*args)])
    with pytest.raises(ValueError, match="verification failed: logits differ by up to 1"):
        convert(folder, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_script_runs_by_its_path(released, tmp_path, repository):
    folder = released().write(tmp_path / "source")
    result = subprocess.run(
        [sys.executable, "conversion/convert_c3_to_hf.py", str(folder), str(tmp_path / "out"), "--verify"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "verified:" in result.stdout
    assert (tmp_path / "out" / "config.json").is_file()
