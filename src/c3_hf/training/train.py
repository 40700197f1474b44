"""Run a training recipe: `python -m c3_hf.training.train recipe.yaml [--name value ...]`, or `c3-hf train`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import ProcessorMixin, set_seed
from transformers.utils import logging

from ..data.collator import C3DataCollator
from ..data.lengths import LengthGroupedBatches, LengthSchedule
from ..data.mixture import ExampleMaker, MixtureDataset, StreamingMixtureDataset
from ..data.sources import RecordSource, StreamingSource, TrainingFile, parse_training_files
from .arguments import C3TrainingArguments, DataArguments, ModelArguments, parse_recipe
from .checkpoints import complete_checkpoints
from .curriculum import AdaptiveCurriculum
from .held_out import HeldOutText, parse_held_out_files, read_held_out
from .model import body, cast_model, checkpoint_dtype, compile_layers, prepare_model
from .readout import LatentReadout, without_readout
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
    if args.process_index == 0:
        write_data_record(files, Path(args.output_dir) / "data.json")
    model, processor = prepare_model(model_args, mixed_precision=args.bf16 or args.fp16)
    readout = None
    if args.readout_weight > 0:
        readout = LatentReadout(body(model), share=args.readout_share)
        readout.attach(body(model))
    if args.compile_layers:
        compile_layers(model)
    batches = plan_batches(data_args, args)
    curriculum = make_curriculum(data_args, args, batches.schedule)
    checkpoints = complete_checkpoints(args.output_dir) if args.resume else []
    if checkpoints and curriculum is not None:
        curriculum.load(checkpoints[-1])
    trainer = C3Trainer(
        model=model,
        args=args,
        processor=processor,
        data_collator=make_collator(data_args, args, processor, batches.schedule, body(model).config.latent_stride),
        train_dataset=make_dataset(data_args, args, processor, files, batches),
        batches=batches,
        eval_texts=held_out_texts(data_args, processor),
        num_free_running=data_args.eval_free_running_items,
        curriculum=curriculum,
        readout=readout,
    )
    if checkpoints:
        logger.warning(f"Resuming from {checkpoints[-1].name} in `output_dir`.")
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if readout is not None:
        readout.detach(body(model))
    save_trained(trainer, model_args)
    return trainer


def plan_batches(data_args: DataArguments, args: C3TrainingArguments) -> LengthGroupedBatches:
    """Lengths and batch sizes of the whole run."""
    schedule = LengthSchedule(
        min_tokens=data_args.min_context_tokens,
        ceiling=data_args.context_ceiling,
        multiple=data_args.length_multiple,
        long_share=data_args.long_share,
        seed=args.seed,
    )
    return LengthGroupedBatches(
        schedule,
        num_steps=args.max_steps,
        micro_batches_per_step=args.gradient_accumulation_steps * args.world_size,
        batch_size=args.per_device_train_batch_size,
        batch_tokens=data_args.batch_tokens,
        max_batch_size=data_args.max_batch_size,
    )


def make_curriculum(
    data_args: DataArguments, args: C3TrainingArguments, schedule: LengthSchedule
) -> AdaptiveCurriculum | None:
    """The rule that raises the ceiling, if the recipe asks for one."""
    if data_args.curriculum_accuracy is None:
        return None
    # Batches are drawn ahead of their step: one by accelerate, and those the workers prefetch.
    ahead = 2 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
    return AdaptiveCurriculum(
        schedule,
        accuracy=data_args.curriculum_accuracy,
        growth=data_args.curriculum_growth,
        max_tokens=data_args.curriculum_max_tokens,
        steps_ahead=ahead,
    )


def make_collator(
    data_args: DataArguments,
    args: C3TrainingArguments,
    processor: ProcessorMixin,
    schedule: LengthSchedule,
    latent_stride: int | None,
) -> C3DataCollator:
    """The collator the recipe asks for."""
    return C3DataCollator(
        processor,
        max_context_tokens=data_args.max_context_tokens,
        max_prompt_tokens=data_args.max_prompt_tokens,
        token_noise=data_args.token_noise,
        noise_from_step=data_args.noise_from_step,
        teacher_inputs=args.distillation_weight > 0,
        pad_to_multiple_of=data_args.length_multiple,
        seed=args.seed,
        latent_stride=latent_stride,
        schedule=schedule,
    )


def make_dataset(
    data_args: DataArguments,
    args: C3TrainingArguments,
    processor: ProcessorMixin,
    files: Sequence[TrainingFile],
    batches: LengthGroupedBatches,
) -> MixtureDataset | StreamingMixtureDataset:
    """The training set, map-style or streaming.

    Raises:
        ValueError: if `streaming` comes with `batch_tokens`: a streamed batch has a fixed number of samples.
    """
    maker = ExampleMaker(processor.tokenizer, batches.schedule, data_args.tasks, data_args.text_kinds, args.seed)
    if not data_args.streaming:
        return MixtureDataset(RecordSource(files), maker)
    if data_args.batch_tokens is not None:
        raise ValueError(
            f"`batch_tokens` is {data_args.batch_tokens}, but with `streaming` batches have a fixed size. Leave "
            "`batch_tokens` out and set `per_device_train_batch_size`."
        )
    return StreamingMixtureDataset(StreamingSource(files, args.seed), maker, batches)


def held_out_texts(data_args: DataArguments, processor: ProcessorMixin) -> list[HeldOutText]:
    """The texts restored during training."""
    files = parse_held_out_files(data_args.eval_files, data_args.eval_data_dir or data_args.data_dir)
    return read_held_out(files, processor, data_args.eval_ratios, data_args.eval_items)


def write_data_record(files: Sequence[TrainingFile], path: Path) -> None:
    """Write name, weight, bytes and SHA-256 of every training file as JSON."""
    records = []
    for file in files:
        digest = hashlib.sha256()
        with open(file.path, "rb") as content:
            for block in iter(lambda: content.read(1 << 20), b""):
                digest.update(block)
        size = os.path.getsize(file.path)
        records.append(
            {"name": Path(file.path).name, "weight": file.weight, "bytes": size, "sha256": digest.hexdigest()}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
        merged.save_pretrained(trainer.args.output_dir, state_dict=without_readout(merged.state_dict()))
        trainer.processor.save_pretrained(trainer.args.output_dir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse `recipe.yaml --name value ...` and train."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m c3_hf.training.train recipe.yaml [--name value ...]")
    model_args, data_args, args = parse_recipe(arguments[0], arguments[1:])
    if args.process_index == 0:
        logger.info(f"Recipe:\n{yaml.safe_dump({**vars(model_args), **vars(data_args)}, sort_keys=False)}")
    train(model_args, data_args, args)


if __name__ == "__main__":
    main()
