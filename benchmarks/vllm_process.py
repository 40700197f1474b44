"""vLLM's own server of an exported decoder, as a process, and a model for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import torch
from transformers import AutoTokenizer

from c3_hf import C3Config, C3ForConditionalGeneration, C3Processor, tiny_model_path


# Seconds in which a server must be up; loading vLLM takes most of it.
START_SECONDS = 1800


class VllmProcess:
    """A server on the cores that this process may use.

    Args:
        python: Of the environment with vLLM.
        folder: The exported decoder.
        log: File for what the server prints.
        words: Further arguments of its command.
    """

    def __init__(self, python: str, folder: Path, log: Path, *words: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)),
            # No compiling, and what the model itself is compared in.
            *("--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "16"),
            *words,
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            # GiB; and the cores by their numbers, else it takes others than this process may use.
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            # vLLM compiles a function for log-probabilities even with --enforce-eager, by a C++ compiler.
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as file:
            # A group of its own: the server has children that hold the port and the memory.
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=60).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM did not start:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(1)

    def kill(self) -> None:
        """End it and its children at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def make_readable_model(folder: Path, model_type: str = "qwen2") -> None:
    """Write a model whose decoder vLLM runs: by default the released architecture; heads of 64 dimensions, no stride.

    Random weights from a fixed seed behind the bundled tokenizer, larger than at the start of a training, so that
    replies vary with the context. They are printable: the rows of all other tokens in the head are 0.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    stop, end = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    bundled = C3Config.from_pretrained(tiny_model_path()).to_dict()
    half = {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    ids = {name: value for name, value in bundled.items() if name.endswith("_token_id")}
    config = C3Config(
        text_config=half, encoder_config=half, num_latents=8, segment_length=64, tie_word_embeddings=False, **ids
    )
    torch.manual_seed(0)
    model = C3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
        for token in range(len(tokenizer)):
            text = tokenizer.decode(token, skip_special_tokens=True)
            if token != stop and not (text and text.isascii() and text.isprintable()):
                model.lm_head.weight[token] = 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [stop, end], end
    model.save_pretrained(folder)
    C3Processor(tokenizer, num_latents=config.num_latents).save_pretrained(folder)
