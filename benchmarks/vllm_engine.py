"""Replies of vLLM's own servers, through the engine `vllm`, against the model's own; then one of two is killed.

`python -m benchmarks.vllm_engine --data DATA --vllm-python PYTHON`
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from c3_hf import C3Pipeline
from c3_hf.conversion.export import export
from c3_hf.serving.engine import ModelThread
from c3_hf.serving.protocol import Limits
from c3_hf.serving.replies import Prompt, Settings
from c3_hf.serving.vllm import VllmEngine

from .latents_setup import data_hash, load, parser, texts, write_record
from .serving import QUESTION
from .vllm_process import VllmProcess, make_readable_model


# Log-probabilities that are compared: those of the likeliest first tokens.
TOP = 5


@dataclass(frozen=True)
class Comparison:
    """One context asked of both.

    Attributes:
        text: What the server replied, through the engine.
        own: What the model replies here.
        difference: The largest difference of the likeliest first tokens' log-probabilities.
    """

    text: str
    own: str
    difference: float


async def compare(pipe: C3Pipeline, engine: VllmEngine, url: str, text: str, new_tokens: int) -> Comparison:
    """Ask about one text.

    Args:
        pipe: The model.
        engine: Its engine, started.
        url: The server that is asked for log-probabilities, which the engine does not pass on.
        text: What is compressed.
        new_tokens: Most tokens of the reply.
    """
    context = pipe.compress(text, latent_dtype=torch.float32)
    latents = context.project(pipe.model)
    chat = [{"role": "user", "content": [{"type": "context", "context": context}, {"type": "text", "text": QUESTION}]}]
    own = pipe(chat, max_new_tokens=new_tokens, do_sample=False)
    chat[0]["content"][0] = {"type": "context", "latents": latents}  # type: ignore[index]
    inputs = pipe.processor.apply_chat_template(chat)
    prompt = Prompt(inputs["input_ids"][0].tolist(), latents, messages=[("user", (latents, QUESTION))])
    reply = "".join([piece.text async for piece in engine.reply(prompt, Settings(new_tokens))])
    with torch.no_grad():
        expected = pipe.model(**inputs).logits[0, -1].float().log_softmax(-1)
    path, body = await engine._request(prompt, Settings(1))
    body |= {"stream": False, "logprobs": True, "top_logprobs": TOP, "return_tokens_as_token_ids": True}
    body.pop("stream_options")
    async with httpx.AsyncClient(timeout=600) as client:
        model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
        answer = (await client.post(url + path, json={**body, "model": model})).json()
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    differences = [
        abs(entry["logprob"] - float(expected[int(entry["token"].removeprefix("token_id:"))])) for entry in likeliest
    ]
    return Comparison(reply, str(own), max(differences))


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--vllm-python", help="of an environment that tests/serving/make_vllm_env.sh made")
    options.add_argument(
        "--engine-url",
        action="append",
        default=[],
        help="a server that runs; by default two are started, one is killed",
    )
    options.add_argument("--contexts", type=int, default=10)
    options.add_argument("--new-tokens", type=int, default=32)
    options.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    options.set_defaults(model=None, name="random-qwen2")
    options = options.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            options.model = folder / "model"
            make_readable_model(options.model)
        model, processor = load(options)
        export(options.model, folder / "decoder", "decoder")
        passages = texts(options, "passages_en")
        pieces = [passages[n % len(passages)][: 80 * (n + 1)] for n in range(options.contexts)]
        servers: list[VllmProcess] = []
        try:
            if not options.engine_url:
                for number in range(2):
                    log = folder / f"{number}.log"
                    servers.append(VllmProcess(options.vllm_python, folder / "decoder", log, "--enable-prompt-embeds"))
                for server in servers:
                    server.wait()
            urls = options.engine_url or [server.url for server in servers]
            version = httpx.get(f"{urls[0]}/version").json()["version"]
            rows = asyncio.run(_measure(C3Pipeline(model, processor), urls, servers, pieces, options.new_tokens))
        finally:
            for server in servers:
                server.kill()
    write_record("vllm_engine", options, model, started, rows, data_sha256=data_hash(pieces), vllm=version)
    return 0 if all(row["same_text"] for row in rows) else 1


async def _measure(
    pipe: C3Pipeline, urls: Sequence[str], servers: Sequence[VllmProcess], pieces: Sequence[str], new_tokens: int
) -> list[dict[str, Any]]:
    """A row for each text; with servers of our own, again after all but the first were killed."""
    thread = ModelThread()
    engine = VllmEngine(pipe, thread, urls, Limits())
    rows: list[dict[str, Any]] = []
    try:
        await engine.start()
        for alive in [len(urls), 1] if servers else [len(urls)]:
            for server in servers[alive:]:
                server.kill()
            for number, text in enumerate(pieces):
                found = await compare(pipe, engine, urls[0], text, new_tokens)
                rows.append(
                    {
                        "servers": alive,
                        "context": number,
                        "characters": len(text),
                        "same_text": found.text == found.own,
                        "largest_difference_of_first_log_probabilities": found.difference,
                    }
                )
                print(rows[-1], file=sys.stderr)
    finally:
        await engine.close()
        thread.close()
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
