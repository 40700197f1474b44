"""`c3-hf ask`: questions to compressed contexts."""

from __future__ import annotations

import argparse
import contextlib

from .loading import add_context_arguments, context_path, load_model


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "ask",
        help="ask a question about compressed contexts",
        description="Put compressed contexts and a question in front of the model; the answer is printed as it comes. "
        "The text itself is not needed, and the encoder does not run.",
    )
    add_context_arguments(parser)
    parser.add_argument("question", help="the prompt, in quotation marks")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="most tokens of the answer (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer while it is generated."""
    if args.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens` must be at least 1, got {args.max_new_tokens}.")

    from transformers import TextStreamer

    from c3_hf.latents import CompressedContext
    from c3_hf.latents.restoring import decoder_positions

    model, processor = load_model(args)
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(context_path(name)) for name in args.files]
        parts = [part for path in paths for part in CompressedContext.load(path).content_parts(model)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": args.question}]}]
    inputs = processor.apply_chat_template(messages).to(model.device)
    room = decoder_positions(model) - inputs["input_ids"].shape[1]
    if room < 1:
        raise ValueError(
            f"`FILE.c3`: contexts and question take {inputs['input_ids'].shape[1]:,} positions, the model has "
            f"{decoder_positions(model):,}. Ask fewer files, or some segments of one in Python."
        )
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=min(args.max_new_tokens, room), do_sample=False, streamer=streamer)
    return 0
