"""`c3-hf serve`: compressed contexts and OpenAI's chat interface over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from typing import TYPE_CHECKING

from ..files import parse_size
from .loading import add_dtype_argument, check_address
from .messages import FAILED, check_text, say


if TYPE_CHECKING:
    from c3_hf.serving.protocol import Limits


KEY_VARIABLE, ENGINE_KEY_VARIABLE = "C3_API_KEY", "C3_ENGINE_API_KEY"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve compressed contexts and OpenAI's chat interface over HTTP",
        description="Serve a model: POST /v1/contexts compresses a text once, /v1/chat/completions asks it from any "
        "OpenAI client. See docs/serving.md.",
    )
    parser.add_argument(
        "model", nargs="?", help="a C3 model, folder or Hub id (default: the bundled c3-tiny, offline)"
    )
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: %(default)s)")
    add_dtype_argument(parser, "float32")
    parser.add_argument("--store", default="c3-contexts", help="folder of the contexts (default: %(default)s)")
    parser.add_argument("--store-size", default="10GB", help="most bytes in it (default: %(default)s)")
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"ask clients for this key; may be repeated (default: {KEY_VARIABLE}, which no list of processes shows)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="what makes replies"
    )
    parser.add_argument(
        "--engine-url", action="append", default=[], metavar="URL",
        help="with --engine vllm: a server of the exported decoder, its key in "
        f"{ENGINE_KEY_VARIABLE}; may be repeated",
    )  # fmt: skip
    limits = parser.add_argument_group("limits", "what a client may ask for")
    limits.add_argument("--max-body", default="32MB", help="bytes of a request (default: %(default)s)")
    limits.add_argument("--max-text", default="16MB", help="bytes of text of a request (default: %(default)s)")
    limits.add_argument("--max-contexts", type=int, default=64, help="contexts of a request (default: %(default)s)")
    limits.add_argument("--max-waiting", type=int, default=64, help="replies waiting or made (default: %(default)s)")
    limits.add_argument("--max-jobs", type=int, default=8, help="texts compressed or restored (default: %(default)s)")
    limits.add_argument("--max-batch", type=int, default=16, help="replies made together (default: %(default)s)")
    limits.add_argument("--time-limit", type=float, default=600, help="seconds for a request (default: %(default)s)")
    # What the library calls otherwise.
    parser.typed |= {"seconds": "--time-limit", "folder": "--store", "urls": "--engine-url"}
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    _check_words(args)
    store_size, limits = _size("store_size", args.store_size), read_limits(args)

    import uvicorn
    from transformers.utils import logging as transformers_logging

    from c3_hf.pipeline import C3Pipeline
    from c3_hf.serving.app import create_app
    from c3_hf.serving.engine import ModelThread, TransformersEngine
    from c3_hf.serving.gate import Metrics
    from c3_hf.serving.replies import Engine
    from c3_hf.serving.store import ContextStore
    from c3_hf.serving.vllm import VllmEngine

    transformers_logging.disable_progress_bar()
    _log_requests()
    pipe = C3Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    pipe.name = args.name or pipe.name
    store = ContextStore(args.store, pipe.compress(b""), store_size)
    thread, metrics = ModelThread(), Metrics()
    engine: Engine
    if args.engine == "vllm":
        engine = VllmEngine(pipe, thread, args.engine_url, limits, api_key=os.environ.get(ENGINE_KEY_VARIABLE))
    else:
        engine = TransformersEngine(pipe, thread, limits, metrics.batch.observe)
    keys = args.api_key or [key for key in [os.environ.get(KEY_VARIABLE)] if key]
    app = create_app(pipe, thread, store, engine, limits, metrics=metrics, api_keys=keys)
    config = uvicorn.Config(
        app,
        args.host,
        args.port,
        log_config=None,
        access_log=False,
        # Connections, those included that only listen: readers of texts, for one.
        limit_concurrency=4 * (args.max_waiting + args.max_jobs),
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)

    async def serve() -> None:
        # Here, where what it refuses is said in one line.
        await engine.start()
        say(args, f"{pipe.name} on http://{args.host}:{args.port}/v1, {len(store.ids())} contexts in {args.store}")
        await server.serve()

    try:
        asyncio.run(serve())
    except SystemExit:
        return FAILED  # uvicorn's, where it cannot listen at the address; its log has said why
    return 0 if server.started else FAILED


def _check_words(args: argparse.Namespace) -> None:
    """Raise ValueError for what can be seen to be wrong before anything is loaded."""
    check_address(args)
    if not args.store:
        raise ValueError("`--store` is empty. Name a folder, or leave it out for the default.")
    for key in args.api_key:
        check_text("--api-key", key)
        if not key.strip():
            raise ValueError("`--api-key` is empty, which no client can give. Give a key, or leave it out for none.")
    if (args.engine == "vllm") != bool(args.engine_url):
        raise ValueError("`--engine vllm` and `--engine-url` go together: name the servers that run vLLM.")


def _log_requests() -> None:
    """Show the log of the server on stderr, and what uvicorn warns of.

    uvicorn's own way of doing that closes the handlers of everybody else in the process.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("c3_hf.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        log = logging.getLogger(name)
        log.addHandler(handler)
        log.setLevel(level)


def read_limits(args: argparse.Namespace) -> Limits:
    """What clients may ask for, from the command line."""
    from c3_hf.serving.protocol import Limits

    return Limits(
        max_body=_size("max_body", args.max_body),
        max_text=_size("max_text", args.max_text),
        max_contexts=args.max_contexts,
        max_waiting=args.max_waiting,
        max_jobs=args.max_jobs,
        max_batch=args.max_batch,
        seconds=args.time_limit,
    )


def _size(name: str, text: str) -> int:
    """Bytes, from words such as "10GB"."""
    size = parse_size(text)
    if size < 1:
        raise ValueError(f"`{name}` must be a size such as 500MB or 10GB, got {text!r}.")
    return size
