"""Run a training recipe: `python -m c3_hf.training.train recipe.yaml [--name value ...]`, or `c3-hf train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import set_seed
from transformers.utils import logging

from ..data.collator import C3DataCollator
from ..data.lengths import GrowthByAccuracy, LengthGroupedBatches, LengthSchedule
from ..data.records import RecordSource, StreamingSource, TrainingFile, parse_files, parse_training_files
from ..data.samples import ExampleMaker, MixtureDataset, StreamingMixtureDataset
from ..data.tasks import ASKING_TASKS, saved_prompts
from ..files import file_sha256, write_json
from .arguments import C3TrainingArguments, DataArguments, ModelArguments, parse_recipe
from .lookup import Lookup
from .losses import LatentReadout
from .measures import HeldOutFile, read_held_out
from .model import body, cast_model, checkpoint_dtype, compile_layers, prepare_model
from .trainer import C3Trainer


logger = logging.get_logger(__name__)


def train(model_args: ModelArguments, data_args: DataArguments, args: C3TrainingArguments) -> C3Trainer:
    """Train a C3 model and save it, with its processor, into `args.output_dir`.

    The folder also gets `log.jsonl` (loss, learning rate, tokens per second, held-out restoring), `data.json` (names,
    sizes and hashes of the training files) and the checkpoints. If it holds a complete checkpoint already, the run
    goes on from there, with the same samples it would have seen.

    Returns:
        The trainer, after training.
    """
    set_seed(args.seed)
    files = parse_training_files(data_args.train_files, data_args.data_dir)
    folder = data_args.eval_data_dir or data_args.data_dir
    held_out = [HeldOutFile(*found) for found in parse_files("eval_files", data_args.eval_files, folder, "kind")]
    source = StreamingSource(files, args.seed) if data_args.streaming else RecordSource(files)
    if args.process_index == 0:
        write_data_record(files, Path(args.output_dir) / "data.json")
    model, processor = prepare_model(model_args, mixed_precision=args.bf16 or args.fp16)
    readout = None
    if args.readout_weight > 0:
        readout = LatentReadout(body(model), args.readout_candidates)
        readout.attach(body(model))
    if args.compile_layers:
        compile_layers(model)
    lookup = Lookup(model, args) if args.lookup_weight > 0 else None
    processor.prompts |= saved_prompts(data_args.tasks)
    stride = model.config.latent_stride
    batches, growth = plan_lengths(data_args, args, None if stride is None else model.config.num_latents)
    maker = ExampleMaker(processor.tokenizer, batches.schedule, data_args.tasks, data_args.text_kinds, args.seed)
    dataset: MixtureDataset | StreamingMixtureDataset
    if isinstance(source, StreamingSource):
        dataset = StreamingMixtureDataset(source, maker, batches)
    else:
        dataset = MixtureDataset(source, maker)
    trainer = C3Trainer(
        model=model,
        args=args,
        processor=processor,
        data_collator=C3DataCollator(
            processor,
            max_context_tokens=data_args.max_context_tokens,
            max_prompt_tokens=data_args.max_prompt_tokens,
            token_noise=data_args.token_noise,
            noise_from_step=data_args.noise_from_step,
            teacher_inputs=args.distillation_weight > 0,
            pad_to_multiple_of=data_args.length_multiple,
            seed=args.seed,
            latent_stride=stride,
        ),
        train_dataset=dataset,
        batches=batches,
        eval_texts=read_held_out(held_out, processor, data_args.eval_ratios, data_args.eval_items),
        num_free_running=data_args.eval_free_running_items,
        growth=growth,
        readout=readout,
        lookup=lookup,
    )
    trainer.train_or_go_on()
    if readout is not None:
        readout.detach(body(model))
    if lookup is not None:
        lookup.detach()
    save_trained(trainer, model_args)
    return trainer


def plan_lengths(
    data_args: DataArguments, args: C3TrainingArguments, num_latents: int | None = None
) -> tuple[LengthGroupedBatches, GrowthByAccuracy | None]:
    """Lengths and batch sizes of the whole run, and what lets them wait if the recipe asks for it."""
    asking = sum(weight for task, weight in data_args.tasks.items() if task in ASKING_TASKS)
    schedule = LengthSchedule(
        min_tokens=data_args.min_context_tokens,
        ceiling=data_args.context_ceiling,
        multiple=data_args.length_multiple,
        long_share=data_args.long_share,
        seed=args.seed,
        num_latents=num_latents,
        stride_ceiling=data_args.stride_ceiling,
        low_stride_share=data_args.low_stride_share,
        full_share=data_args.full_share,
        asking_share=asking / (sum(data_args.tasks.values()) or 1),
        asking_stride_ceiling=data_args.asking_stride_ceiling,
    )
    batches = LengthGroupedBatches(
        schedule,
        num_steps=args.max_steps,
        micro_batches_per_step=args.gradient_accumulation_steps * args.world_size,
        batch_size=args.per_device_train_batch_size,
        batch_tokens=data_args.batch_tokens,
        max_batch_size=data_args.max_batch_size,
    )
    if data_args.growth_accuracy is None:
        return batches, None
    # Batches are drawn ahead of their step: one by accelerate, and those the workers prefetch.
    ahead = 2 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
    return batches, GrowthByAccuracy(schedule, data_args.growth_accuracy, steps_ahead=ahead)


def write_data_record(files: Sequence[TrainingFile], path: Path) -> None:
    """Write name, weight, bytes and SHA-256 of every training file as JSON."""
    records = [
        {
            "name": Path(file.path).name,
            "weight": file.weight,
            "bytes": os.path.getsize(file.path),
            "sha256": file_sha256(file.path),
        }
        for file in files
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, records)


def save_trained(trainer: C3Trainer, model_args: ModelArguments) -> None:
    """Save the trained model into the output folder; LoRA matrices are merged into it, in the checkpoint's dtype.

    What trained in full is saved as it trained, in float32: bfloat16 would round much of a short training away.
    """
    if not model_args.lora:
        trainer.save_model()
        return
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        cast_model(merged, checkpoint_dtype(model_args))
        merged.save_pretrained(trainer.args.output_dir)
        trainer.processor.save_pretrained(trainer.args.output_dir)


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Parse `recipe.yaml --name value ...` and train.

    Returns:
        The folder with the trained model; None on the processes that do not save.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m c3_hf.training.train recipe.yaml [--name value ...]")
    model_args, data_args, args = parse_recipe(arguments[0], arguments[1:])
    if args.process_index == 0:
        logger.info(f"Recipe:\n{yaml.safe_dump({**vars(model_args), **vars(data_args)}, sort_keys=False)}")
    train(model_args, data_args, args)
    return Path(args.output_dir) if args.should_save else None


if __name__ == "__main__":
    main()
