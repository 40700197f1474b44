"""What the model leaves out, how it loads, and that transformers' own speed features work on it unchanged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, CompileConfig

from c3_hf import C3ForConditionalGeneration
from c3_hf.modeling import generation_c3, modeling_c3
from c3_hf.modeling.contexts_c3 import check_contexts
from factories import make_model, make_processor, sub_config


SOURCE = Path(__file__).parents[2] / "src"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model() -> C3ForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def inputs(processor):
    return processor.apply_chat_template([processor.restore_messages(text) for text in ("hello world", "ab")])


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def generate(model, inputs, **options) -> list[list[int]]:
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def record_calls(module, calls: list):
    """Append the arguments and the output of every call of `module`; returns the handle that ends it."""
    return module.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )


def test_the_encoder_runs_once_a_call_without_cache_logits_or_intermediate_states(model, inputs):
    calls = []
    handle = record_calls(model.model.encoder, calls)
    generate(model, inputs)
    handle.remove()
    assert len(calls) == 1
    output = calls[0][2]
    assert getattr(output, generation_c3.CACHE_NAME) is None
    assert output.hidden_states is None
    widths = {module.out_features for module in model.model.encoder.modules() if isinstance(module, torch.nn.Linear)}
    assert model.config.encoder_config.vocab_size not in widths


def test_the_projector_sees_the_latent_positions_only(model, inputs):
    calls = []
    handle = record_calls(model.model.projector, calls)
    generate(model, inputs)
    handle.remove()
    assert [call[0][0].shape[-2] for call in calls] == [model.config.num_latents]


def test_generate_computes_logits_of_one_position_a_step(model, inputs):
    calls = []
    handle = record_calls(model.lm_head, calls)
    generate(model, inputs)
    handle.remove()
    assert [call[2].shape[1] for call in calls] == [1] * NEW_TOKENS


def test_decode_steps_see_one_token_and_no_context(model, inputs):
    calls = []
    handle = record_calls(model.model, calls)
    generate(model, inputs)
    handle.remove()
    assert calls[0][1]["inputs_embeds"].shape[1] == inputs["input_ids"].shape[1]
    assert [call[1]["input_ids"].shape[1] for call in calls[1:]] == [1] * (NEW_TOKENS - 1)
    assert [call[1].get("context_latents") for call in calls] == [None] * NEW_TOKENS


def test_contexts_pass_one_gate_a_call(model, inputs, monkeypatch):
    """And there the device is waited for once: what is right is never read value by value."""
    passed = []

    def count(*args, **kwargs):
        with monkeypatch.context() as patch:
            for name in ("nonzero", "tolist", "item"):
                patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the device was asked again"))
            passed.append(check_contexts(*args, **kwargs))
        return passed[-1]

    for module in (modeling_c3, generation_c3):
        monkeypatch.setattr(module, "check_contexts", count)
    generate(model, inputs)
    assert len(passed) == 1
    model(**inputs, labels=inputs["input_ids"])
    assert len(passed) == 2


def compiled_options() -> dict:
    """Static cache and a compiled decode step, as generate() chooses by itself on a GPU."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    # transformers compiles on a CPU only when told to.
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def count_graphs(batches) -> int:
    """Graphs that dynamo makes while a fresh model generates for each batch; what it generates must not change."""
    one_layer = {"text_config": sub_config(num_hidden_layers=1)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder = make_model(**one_layer)
    compiled = [generate(decoder, batch, **compiled_options()) for batch in batches]
    assert compiled == [generate(decoder, batch) for batch in batches]
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# torch's compiler and what it traces use things that they themselves have deprecated.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_static_cache_and_a_compiled_step_cost_no_more_graphs_than_in_the_plain_decoder(processor):
    """Prompts that fit the cache share one graph; a longer one makes the cache anew, as in any model."""
    batches = []
    for length in (17, 40, 3):
        parts = [{"type": "context", "text": "c" * length}, {"type": "text", "text": "q" * length}]
        batches.append(processor.apply_chat_template([{"role": "user", "content": parts}]))
    plain = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    with_contexts = count_graphs(batches)
    assert with_contexts == count_graphs(plain)
    assert with_contexts <= 2


@pytest.mark.parametrize("option", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_cache_kinds_agree(model, inputs, option):
    assert generate(model, inputs, **option) == generate(model, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_reaches_both_halves(folder, dtype):
    loaded = C3ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_choice_reaches_both_halves(folder, inputs, model, attention):
    loaded = C3ForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    halves = (loaded.model.encoder, loaded.model.language_model)
    assert [half.config._attn_implementation for half in halves] == [attention, attention]
    assert generate(loaded, inputs) == generate(model, inputs)


def test_attention_choice_can_differ_between_the_halves(folder):
    loaded = C3ForConditionalGeneration.from_pretrained(
        folder, attn_implementation={"encoder_config": "eager", "text_config": "sdpa"}
    )
    halves = (loaded.model.encoder, loaded.model.language_model)
    assert [half.config._attn_implementation for half in halves] == ["eager", "sdpa"]


def test_the_encoder_may_have_another_dtype(folder, inputs):
    loaded = C3ForConditionalGeneration.from_pretrained(folder)
    loaded.model.encoder.to(torch.bfloat16)
    latents = loaded.get_context_features(inputs["context_input_ids"], inputs["context_attention_mask"])
    assert latents.dtype == torch.float32
    assert len(generate(loaded, inputs)[0]) == NEW_TOKENS


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")
def test_the_encoder_can_be_offloaded(folder, inputs, model, tmp_path):
    device_map = dict.fromkeys(("model.encoder", "model.latent_queries", "model.projector"), "disk")
    device_map |= dict.fromkeys(("model.language_model", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert next(loaded.model.encoder.parameters()).device.type == "meta"
    assert generate(loaded, inputs) == generate(model, inputs)


def test_an_automatic_device_map_splits_between_layers(folder, inputs, model, tmp_path):
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(0.9 * size)}, offload_folder=tmp_path
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    layers = [name for name in loaded.hf_device_map if ".layers." in name]
    assert all(name.split(".layers.")[1].isdigit() for name in layers)
    assert generate(loaded, inputs) == generate(model, inputs)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="the rotary embedding of transformers 4.57 opens an autocast context, which the meta device has not",
)
def test_the_halves_may_sit_on_different_devices(inputs):
    """The meta device stands in for a second accelerator: only what moves explicitly arrives there."""
    from accelerate import dispatch_model

    model = make_model()
    device_map = dict.fromkeys(("model.encoder", "model.latent_queries", "model.projector"), "cpu")
    device_map |= dict.fromkeys(("model.language_model", "lm_head"), "meta")
    dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    input_ids = inputs["input_ids"][:1]
    hidden = model.model(input_ids=input_ids, context_input_ids=inputs["context_input_ids"][:1]).last_hidden_state
    assert hidden.device.type == "meta"
    assert hidden.shape == (*input_ids.shape, model.config.text_config.hidden_size)


LOAD = """
import json, sys
import torch
from c3_hf import C3ForConditionalGeneration

def read(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

small, large = sys.argv[1:]
# What loading imports is not what the weights take.
C3ForConditionalGeneration.from_pretrained(small)
before = read("VmRSS")
model = C3ForConditionalGeneration.from_pretrained(large)
# Weights are mapped from the file: memory is taken when they are first read.
for parameter in model.parameters():
    parameter.sum()
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": read("VmHWM") - before, "kept": read("VmRSS") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_loading_takes_no_second_copy_of_the_weights(folder, tmp_path):
    halves = {
        "text_config": sub_config(hidden_size=256, vocab_size=60_000),
        "encoder_config": sub_config(hidden_size=192, vocab_size=60_000, head_dim=48),
    }
    make_model(**halves).save_pretrained(tmp_path, max_shard_size="30MB")
    output = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path)],
        env={"PYTHONPATH": str(SOURCE), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    memory = json.loads(output.stdout)
    assert memory["weights"] > 100e6
    assert memory["peak"] <= 1.1 * memory["weights"]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("half", ["encoder", "language_model", "both"])
def test_either_half_can_be_quantized_to_int8(folder, inputs, model, half):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kept = {"encoder": ["model.language_model"], "language_model": ["model.encoder"], "both": []}[half]
    quantization = TorchAoConfig(
        Int8WeightOnlyConfig(version=2), modules_to_not_convert=["lm_head", "model.projector", *kept]
    )
    loaded = C3ForConditionalGeneration.from_pretrained(folder, quantization_config=quantization)
    quantized = {
        name.split(".")[1]
        for name, parameter in loaded.named_parameters()
        if type(parameter) is not torch.nn.Parameter
    }
    assert quantized == ({"encoder", "language_model"} if half == "both" else {half})
    assert type(loaded.model.projector.weight) is torch.nn.Parameter
    assert type(loaded.lm_head.weight) is torch.nn.Parameter
    reference = model(**inputs).logits
    error = (loaded(**inputs).logits - reference).norm() / reference.norm()
    assert 0 < error < 0.1
    assert len(generate(loaded, inputs)[0]) == NEW_TOKENS
