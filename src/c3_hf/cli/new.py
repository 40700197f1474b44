"""`c3-hf new`: a C3 model from any two causal language models, or an existing one changed."""

from __future__ import annotations

import argparse

from ..files import check_new_folder
from .loading import add_dtype_argument


DEFAULT_NUM_LATENTS = 32


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("new", help="make a model to train from two language models, or change one")
    parser.add_argument("output", help="folder to make; it appears complete or not at all")
    parser.add_argument("--encoder", help="folder, Hub id or GGUF file of the language model that reads contexts")
    parser.add_argument("--decoder", help="folder, Hub id or GGUF file of the language model that answers")
    parser.add_argument(
        "--from",
        dest="model",
        metavar="MODEL",
        help="change this C3 model: its number of latents, or a half for another of the same shape",
    )
    parser.add_argument("--num-latents", type=int, help="latents a context becomes (default: 32, or as in MODEL)")
    parser.add_argument(
        "--latent-stride",
        type=int,
        metavar="TOKENS",
        help="with --encoder and --decoder: most tokens that a latent stands for, whose positions it keeps (default: "
        "positions count up by one, as in the original)",
    )
    parser.add_argument("--new-queries", action="store_true", help="with --from: draw all latent queries anew")
    add_dtype_argument(parser, "auto", " (default: the decoder's)", "auto")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new parts (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make or change a model, save it, and say what was decided."""
    output = check_new_folder(args.output)

    import torch

    from c3_hf.conversion.repository import save_model

    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.model is not None:
        if args.latent_stride is not None:
            raise ValueError("`--latent-stride` is of a new model: give it with `--encoder` and `--decoder`.")
        model, processor, notes, untrained = _change(args, dtype)
    elif args.encoder is None or args.decoder is None:
        raise ValueError("give `--encoder` and `--decoder`, or `--from` with what to change.")
    elif args.new_queries:
        raise ValueError("`--new-queries` goes with `--from`: a new model's queries are drawn anew in any case.")
    else:
        model, processor, notes, untrained = _make(args, dtype)
    save_model(model, processor, output, untrained)
    print(
        f"{args.output}: {model.config.num_latents} latents, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    for note in notes:
        print(f"  {note}")
    return 0


def _make(args: argparse.Namespace, dtype: object) -> tuple:
    from c3_hf.conversion.new_model import from_encoder_decoder_pretrained

    num_latents = DEFAULT_NUM_LATENTS if args.num_latents is None else args.num_latents
    made = from_encoder_decoder_pretrained(
        args.encoder, args.decoder, num_latents, latent_stride=args.latent_stride, dtype=dtype, seed=args.seed
    )
    vocabulary = (
        "one vocabulary: both tokenizers agree on ordinary text"
        if made.shared_vocabulary
        else "two vocabularies: contexts are read with the encoder's tokenizer, and cannot be written in line"
    )
    notes = [vocabulary]
    if isinstance(made.processor.chat_template, dict):
        notes.append("two chat templates: C3's, and the decoder's own by the name `decoder`")
    notes.append("queries and projector are new: train before use")
    return made.model, made.processor, notes, "its latent queries and its projector are drawn at random"


def _change(args: argparse.Namespace, dtype: object) -> tuple:
    from c3_hf.conversion.new_model import replace_halves, resize_latents
    from c3_hf.conversion.repository import load_model

    if args.num_latents is None and not args.new_queries and args.encoder is None and args.decoder is None:
        raise ValueError("`--from` needs something to change: `--num-latents`, `--new-queries`, a half, or several.")
    model, processor = load_model(args.model, dtype)
    notes, untrained = [], None
    if args.encoder is not None or args.decoder is not None:
        replace_halves(model, args.encoder, args.decoder)
        notes.append("weights replaced: " + ", ".join(n for n in ("encoder", "decoder") if getattr(args, n)))
    if args.num_latents is not None or args.new_queries:
        num_latents = model.config.num_latents if args.num_latents is None else args.num_latents
        done = resize_latents(model, num_latents, reinitialise=args.new_queries, seed=args.seed)
        notes.append(done)
        untrained = f"its latent queries were changed ({done})"
        if processor is not None:
            processor.num_latents = num_latents
    return model, processor, notes, untrained
