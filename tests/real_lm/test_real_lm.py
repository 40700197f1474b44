"""What a C3 model made of a real language model still is without a context: that language model, to the bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from c3_hf import C3ForConditionalGeneration, C3Pipeline
from c3_hf.training.arguments import parse_recipe
from c3_hf.training.train import train


pytestmark = pytest.mark.real_lm
CHAT = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def stock(decoder):
    return AutoModelForCausalLM.from_pretrained(decoder).eval()


@pytest.fixture(scope="module")
def stock_tokenizer(decoder):
    return AutoTokenizer.from_pretrained(decoder)


@pytest.fixture(scope="module")
def pipe(made):
    return C3Pipeline.from_pretrained(made)


@pytest.fixture(scope="module")
def chat_ids(stock_tokenizer):
    return chat_inputs(stock_tokenizer, CHAT)["input_ids"]


def chat_inputs(tokenizer, chat):
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@pytest.fixture(scope="module")
def reply(stock, chat_ids):
    """What the stock model answers."""
    new_ids = stock.generate(chat_ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, chat_ids.shape[1] :]
    return new_ids.tolist()


def test_the_model_speaks(reply, stock_tokenizer):
    assert "Paris" in stock_tokenizer.decode(reply)


@pytest.mark.parametrize("side", ["plain", "exported"])
def test_logits_without_a_context_are_those_of_the_decoder(side, stock, pipe, exported, chat_ids):
    model = pipe.model if side == "plain" else AutoModelForCausalLM.from_pretrained(exported).eval()
    with torch.inference_mode():
        expected, found = (each(input_ids=chat_ids, output_hidden_states=True) for each in (stock, model))
    # The table has new rows for the markers behind those of the stock model; a product of another shape may round
    # otherwise, though it does not where these figures were measured.
    assert torch.equal(found.hidden_states[-1], expected.hidden_states[-1])
    logits = found.logits[..., : expected.logits.shape[-1]]
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-4)
    print(f"largest difference of a logit: {float((logits - expected.logits).abs().max()):.3g}")


def test_chat_without_a_context_is_the_decoders(pipe, exported, stock_tokenizer, chat_ids, reply):
    ours = pipe.processor.apply_chat_template(CHAT, chat_template="decoder")["input_ids"]
    assert torch.equal(ours, chat_ids)
    text = stock_tokenizer.decode(reply, skip_special_tokens=True)
    assert pipe(CHAT, chat_template="decoder", max_new_tokens=NEW_TOKENS) == text
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    inputs = chat_inputs(tokenizer, CHAT)
    assert torch.equal(inputs["input_ids"], chat_ids)
    assert model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, chat_ids.shape[1] :].tolist() == reply


def test_special_strings_stay_text(pipe, exported):
    chat = [{"role": "user", "content": "Hi <|im_end|> there"}]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for ids in (
        pipe.processor.apply_chat_template(chat, chat_template="decoder")["input_ids"][0].tolist(),
        chat_inputs(tokenizer, chat)["input_ids"][0].tolist(),
    ):
        # One end of a turn each: the system's and the user's.
        assert ids.count(tokenizer.eos_token_id) == 2
        assert "Hi <|im_end|> there" in tokenizer.decode(ids)


def test_what_new_writes(made, decoder):
    texts = {path.name: path.read_text(encoding="utf-8") for path in [*made.glob("*.json"), made / "README.md"]}
    assert [name for name, text in texts.items() if str(decoder) in text] == []
    stop_ids = json.loads(texts["generation_config.json"])["eos_token_id"]
    assert len(stop_ids) == len(set(stop_ids))
    assert "**Untrained:**" in texts["README.md"]


def test_the_server_answers_on_it(made, pipe, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(made), "--port", str(port), "--store", str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-m", "c3_hf.cli", *words], env=environment) as server:
        try:
            wait_until_it_listens(server, port)
            answer = post(port, "chat/completions", messages=CHAT, max_tokens=NEW_TOKENS)
            assert answer["choices"][0]["message"]["content"] == pipe(CHAT, max_new_tokens=NEW_TOKENS)
            context = post(port, "contexts", text="The night train left the harbour a little after nine.")
            content = [{"type": "context", "id": context["id"]}, {"type": "text", "text": "Repeat the text: "}]
            asked = post(port, "chat/completions", messages=[{"role": "user", "content": content}], max_tokens=4)
            # An untrained model has nothing right to say, but it says something.
            assert asked["usage"]["completion_tokens"] >= 1
        finally:
            server.terminate()


def wait_until_it_listens(server, port):
    for _ in range(600):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError("the server did not come up")


def post(port, route, **fields):
    fields.setdefault("model", "smol-c3")
    if route == "contexts":
        del fields["model"]
    body, kind = json.dumps(fields).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/v1/{route}", body, kind)) as answer:
        return json.load(answer)


@pytest.mark.filterwarnings("default")
def test_the_harness_gives_decoder_and_c3_the_same_figures(decoder, made, exported, load_example):
    example = load_example("lm_eval_plain_prompts.py", "lm_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = {folder.name: example.evaluate(str(folder)) for folder in (decoder, made, exported)}
    figures = {name: figures_of(results) for name, results in scores.items()}
    print(figures)
    first, *others = figures.values()
    assert others == [first] * 2
    # Nothing that chooses at random.
    assert first["choose_the_ending"]["acc,none"] >= 0.75


def figures_of(results):
    return {
        task: {name: value for name, value in scores.items() if name in ("acc,none", "exact_match,none")}
        for task, scores in results.items()
    }


# transformers 5 has a new name for this property, which peft does not know yet.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_leaves_a_decoder_that_can_be_switched_back(made, pipe, chat_ids, tmp_path):
    peft = pytest.importorskip("peft", reason="peft comes with the extra `train`")
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    recipe = {
        "model_name_or_path": str(made),
        "lora": ["encoder", "decoder"],
        "lora_rank": 4,
        "train_files": [str(tmp_path / "text.jsonl")],
        "min_context_tokens": 8,
        "context_ceiling": [[0, 16]],
        "length_multiple": 8,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    train(*parse_recipe(str(tmp_path / "recipe.json")))

    adapted = C3ForConditionalGeneration.from_pretrained(made)
    adapted = peft.PeftModel.from_pretrained(adapted, tmp_path / "run" / "checkpoint-3").eval()
    with torch.inference_mode():
        before = pipe.model(input_ids=chat_ids).logits
        trained = adapted(input_ids=chat_ids).logits
        with adapted.disable_adapter():
            switched = adapted(input_ids=chat_ids).logits
        again = adapted(input_ids=chat_ids).logits
    assert not torch.equal(trained, before)
    assert torch.equal(switched, before)
    assert torch.equal(again, trained)
