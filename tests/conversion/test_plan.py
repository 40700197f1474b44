"""The plan at the real size, with no weights in memory, and memory use at a smaller width."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from c3_hf.conversion import plan as key_table
from c3_hf.conversion.plan import plan_conversion
from c3_hf.conversion.weights import StoredTensor, list_tensors, read_header, write_file
from c3_hf.modeling.configuration_c3 import C3Config


# The released model (behaviour of the original: 437 tensors in the main folder, 338 in llm1).
RELEASED_MAIN = {
    "vocab_size": 151860,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
RELEASED_ENCODER = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def released_shapes(main: dict, encoder: dict, num_latents: int = 32) -> tuple[dict, dict]:
    """Names and shapes of the two folders, from stock Qwen2 models on the meta device."""
    with torch.device("meta"):
        halves = [Qwen2ForCausalLM(Qwen2Config(**fields)) for fields in (main, encoder)]
        connection = {
            "model.Q": nn.Embedding(num_latents, encoder["hidden_size"]),
            "model.mm_projector": nn.Linear(encoder["hidden_size"], main["hidden_size"]),
        }
    shapes = [
        {name: tuple(t.shape) for name, t in half.state_dict().items() if name != "lm_head.weight"} for half in halves
    ]
    for prefix, module in connection.items():
        shapes[0] |= {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return shapes[0], shapes[1]


def as_stored(shapes: dict) -> list[StoredTensor]:
    return [StoredTensor(name, torch.bfloat16, shape, Path("absent"), 0) for name, shape in shapes.items()]


def test_real_tensor_list_is_planned_whole():
    main, encoder = (as_stored(shapes) for shapes in released_shapes(RELEASED_MAIN, RELEASED_ENCODER))
    assert len(main) == 437
    assert len(encoder) == 338
    assert sum(tensor.num_elements for tensor in main) == 3_088_979_968
    assert sum(tensor.num_elements for tensor in encoder) == 1_543_714_304
    plan = plan_conversion(C3Config(text_config=RELEASED_MAIN, encoder_config=RELEASED_ENCODER), main, encoder)
    assert len(plan.sources) == 437 + 338
    assert plan.dropped == []
    assert sum(tensor.num_bytes for tensor in plan.sources.values()) == 2 * (3_088_979_968 + 1_543_714_304)


def test_a_tensor_given_twice_is_named():
    main, encoder = (as_stored(shapes) for shapes in released_shapes(RELEASED_MAIN, RELEASED_ENCODER))
    twin = StoredTensor("model.llm1.model.norm.weight", torch.bfloat16, (1536,), Path("absent"), 0)
    config = C3Config(text_config=RELEASED_MAIN, encoder_config=RELEASED_ENCODER)
    with pytest.raises(
        ValueError, match=r"given twice: model\.llm1\.model\.norm\.weight and model\.norm\.weight in llm1"
    ):
        plan_conversion(config, [*main, twin], encoder)


def test_rotary_leftovers_are_dropped_with_a_reason():
    main, encoder = (as_stored(shapes) for shapes in released_shapes(RELEASED_MAIN, RELEASED_ENCODER))
    old = StoredTensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.float32, (64,), Path("absent"), 0)
    plan = plan_conversion(
        C3Config(text_config=RELEASED_MAIN, encoder_config=RELEASED_ENCODER), [*main, old], [*encoder, old]
    )
    assert [reason for _, reason in plan.dropped] == ["rotary frequencies are computed from the configuration"] * 2


def test_key_tables_are_each_others_inverse():
    for shapes, there, back in (
        (0, key_table.MAIN_RENAMES, key_table.ORIGINAL_MAIN_RENAMES),
        (1, key_table.ENCODER_RENAMES, key_table.ORIGINAL_ENCODER_RENAMES),
    ):
        for name in released_shapes(RELEASED_MAIN, RELEASED_ENCODER)[shapes]:
            assert key_table.find_target(key_table.find_target(name, there), back) == name


def test_written_file_is_what_the_library_writes(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "b.half": torch.randn(3, 5).half(),
        "a.bfloat": torch.randn(7).bfloat16(),
        "z.float": torch.randn(2, 2),
        "m.double": torch.randn(1).double(),
        "i.long": torch.arange(4),
        "n.int": torch.arange(3, dtype=torch.int32),
        "n.short": torch.arange(3, dtype=torch.int16),
        "u.byte": torch.arange(3, dtype=torch.uint8),
        "s.byte": torch.arange(3, dtype=torch.int8),
        "t.bool": torch.tensor([True, False]),
        "e.empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    stored = read_header(tmp_path / "library")
    write_file(tmp_path / "ours", [(tensor.name, tensor.dtype, tensor) for tensor in stored])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


# Prints the peak of resident memory above its start, in bytes: of a conversion, then of holding all weights at once.
MEASURE = """
import re, sys
from pathlib import Path
from safetensors.torch import load_file
from c3_hf.conversion import convert_c3_to_hf as module

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def peak_of(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    kept = action()
    return memory("VmHWM") - before

source, output, small = map(Path, sys.argv[1:])
# What any conversion loads is there before the measurement: the weights are what is measured.
module.convert(small, output / "small")
print(peak_of(lambda: module.convert(source, output / "large", max_shard_size=SHARD)))
print(peak_of(lambda: [{n: t + 0 for n, t in load_file(p).items()} for p in source.rglob("*.safetensors")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_stays_below_one_shard(released, tmp_path, repository):
    """The real tensor list at an eighth of its width: 269 MB in bfloat16, in output shards of 50 MB."""
    narrow = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    main = {key: value // narrow.get(key, 1) for key, value in RELEASED_MAIN.items()} | {"num_key_value_heads": 1}
    encoder = {key: value // narrow.get(key, 1) for key, value in RELEASED_ENCODER.items()} | {
        "num_key_value_heads": 1
    }
    main["num_attention_heads"], encoder["num_attention_heads"] = 2, 2
    main["tie_word_embeddings"] = encoder["tie_word_embeddings"] = True
    source, small = tmp_path / "source", released().write(tmp_path / "small")
    total = 0
    common = {"model_type": "qwen2", "eos_token_id": 151643, "torch_dtype": "bfloat16", "rope_theta": 1e6}
    extra = {"im_start_token": 151857, "im_end_token": 151858, "im_patch_token": 151859, "latent_token_len": 32}
    shapes = released_shapes(main, encoder)
    for folder, half, config in ((source, shapes[0], main | extra), (source / "llm1", shapes[1], encoder)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | common), encoding="utf-8")
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in half.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert len(list_tensors(source)) == 437
    assert len(list_tensors(source / "llm1")) == 338
    shard = 50_000_000
    assert total > 2 * shard
    script = MEASURE.replace("SHARD", str(shard))
    result = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out"), str(small)],
        env={**os.environ, "PYTHONPATH": str(repository / "src")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak, control = map(int, result.stdout.split())
    assert control > 0.9 * total, "the instrument does not see memory"
    assert len(list((tmp_path / "out" / "large").glob("*.safetensors"))) > 2
    assert peak <= 1.1 * shard, f"peak {peak / 1e6:.0f} MB"
