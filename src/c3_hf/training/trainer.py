"""A thin layer over transformers' Trainer: batches by length, two learning rates, distillation, whole checkpoints."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import ProcessorMixin, Trainer
from transformers.utils import logging

from ..data.collator import C3DataCollator
from ..data.lengths import GrowthByAccuracy, LengthGroupedBatches
from .arguments import PARTS, C3TrainingArguments
from .lookup import Lookup
from .losses import LatentReadout, count_right, distillation_loss, token_loss, without_readout
from .measures import HeldOutText, JsonlLog, TrainingMeter, free_running, token_accuracy


logger = logging.get_logger(__name__)

STAGING_FOLDER = ".saving"


class C3Trainer(Trainer):
    """Trainer of C3 models.

    Args:
        model: a `C3ForConditionalGeneration`, or a PEFT model around one.
        processor: saved with every checkpoint, and used for free-running evaluation.
        batches: the plan of lengths and batch sizes.
        eval_texts: held-out texts to restore; empty for none.
        num_free_running: texts of a source and ratio restored freely; 0 for none.
        growth: lets the curves of the plan wait for the model; where they waited is part of every checkpoint.
        readout: heads attached to the body of `model`, for the read-out loss; part of every checkpoint.
        lookup: of `model`, for the look-up loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: C3TrainingArguments,
        processor: ProcessorMixin,
        data_collator: C3DataCollator,
        train_dataset: Any,
        batches: LengthGroupedBatches,
        eval_texts: list[HeldOutText],
        num_free_running: int = 0,
        growth: GrowthByAccuracy | None = None,
        readout: LatentReadout | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self._meter = TrainingMeter()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_texts or None,
            compute_loss_func=token_loss,
            callbacks=[JsonlLog(Path(args.output_dir) / "log.jsonl")],
        )
        self.processor = processor
        self._batches = batches
        self._growth = growth
        self._readout, self._lookup = readout, lookup
        self._num_free_running = num_free_running
        self._eval_collator = data_collator.without_noise()
        self._staging = False

    def train_or_go_on(self) -> None:
        """Train; if `args.resume` and `output_dir` has a complete checkpoint, go on from it with the same samples."""
        checkpoints = complete_checkpoints(self.args.output_dir) if self.args.resume else []
        if not checkpoints:
            self.train()
            return
        logger.warning(f"Resuming from {checkpoints[-1].name} in `output_dir`.")
        if self._growth is not None:
            self._growth.load(checkpoints[-1])
        self.train(resume_from_checkpoint=str(checkpoints[-1]))

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the planned batches."""
        loader: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
        }
        if isinstance(self.train_dataset, IterableDataset):
            loader["batch_size"] = self.args.per_device_train_batch_size
        else:
            loader["batch_sampler"] = self._batches
        return self.accelerator.prepare(DataLoader(self.train_dataset, **loader))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, then give the decoder's parameters their own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.decoder_lr_ratio == 1.0:
            return optimizer
        model = args[0] if args and args[0] is not None else self.model
        decoder = {id(p) for name, p in model.named_parameters() if _is_decoder(name)}
        groups = []
        for group in optimizer.param_groups:
            for ratio, inside in ((1.0, False), (self.args.decoder_lr_ratio, True)):
                members = [p for p in group["params"] if (id(p) in decoder) is inside]
                if members:
                    groups.append({**group, "params": members, "lr": group["lr"] * ratio})
        optimizer.param_groups = groups
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Token loss over the labels, and what is asked for of distillation, look-up and read-out."""
        inputs = dict(inputs)
        outcomes = inputs.pop("outcome_counts")
        teacher = {name: inputs.pop(name) for name in list(inputs) if name.startswith("teacher_")}
        labels = inputs["labels"]
        if model.training and self.state.global_step < self.args.decoder_start:
            loss, outputs, right = self._read_prompts(model, inputs)
        else:
            lookup = self._lookup if model.training else None
            if lookup is not None:
                inputs["output_attentions"] = True
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            right = count_right(outputs.logits, labels)
            if self.args.distillation_weight > 0:
                num_items = kwargs.get("num_items_in_batch")
                extra = distillation_loss(model, outputs.logits, labels, teacher, num_items_in_batch=num_items)
                if num_items is not None and self.args.average_tokens_across_devices:
                    # As the Trainer does with the token loss: gradients are averaged over the processes afterwards.
                    extra = extra * self.accelerator.num_processes
                loss = loss + self.args.distillation_weight * extra
            if lookup is not None:
                extra, counts = lookup.loss(outputs.attentions, inputs, labels, outputs.logits.shape[1])
                self._meter.add_looked(counts)
                loss = loss + self.args.lookup_weight * extra * self._share_of_step(labels, kwargs)
        context_length = inputs["context_input_ids"].shape[-1]
        num_tokens = inputs["input_ids"].numel() + inputs["context_input_ids"].numel()
        self._meter.add(num_tokens, context_length, right, outcomes)
        if self._growth is not None:
            counts = self._total(right).tolist()
            self._growth.update(self.state.global_step, context_length, *counts)
        if self._readout is not None and model.training:
            extra, counts = self._readout.take()
            self._meter.add_read(counts)
            loss = loss + self.args.readout_weight * extra * self._share_of_step(labels, kwargs)
        return (loss, outputs) if return_outputs else loss

    def _read_prompts(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any, torch.Tensor]:
        """The pass of a step in which the read-out alone teaches: replies are cut off `inputs`, in place.

        Returns:
            A loss of nothing, the outputs, and counts of no labelled token.
        """
        end = inputs.pop("labels").shape[1] - inputs["logits_to_keep"] + 1
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, :end]
        outputs = model(**{**inputs, "logits_to_keep": 1})
        # DDP waits for the gradients of every parameter.
        loss = 0.0 * outputs.logits.sum() if self.args.world_size > 1 else 0.0
        return loss, outputs, torch.zeros(2, dtype=torch.int64)

    def _share_of_step(self, labels: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | float:
        """Factor that makes the mean over a micro-batch its part of the mean over the optimizer step."""
        num_items = kwargs.get("num_items_in_batch")
        if num_items is None:
            return 1.0
        share = (labels != -100).sum() / num_items
        return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Restore the held-out texts and log the results by source and ratio."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=True)
        model.eval()
        metrics: dict[str, float] = {}
        # Generation grows its cache by one position a step, which compiled layers would be compiled for anew.
        stance = torch.compiler.set_stance("force_eager") if self.args.compile_layers else nullcontext()
        with self.accelerator.autocast(), stance:
            for source, ratio in dict.fromkeys((text.source, text.ratio) for text in self.eval_dataset):
                texts = [item.text for item in self.eval_dataset if (item.source, item.ratio) == (source, ratio)]
                name = f"{metric_key_prefix}_{source}_{ratio:g}x"
                metrics[f"{name}_token_accuracy"] = token_accuracy(model, self._eval_collator, texts)
                # Under FSDP parameters are whole inside forward() only, and generate() works outside of it.
                if self._num_free_running and not self.is_fsdp_enabled:
                    precision, whole = free_running(model, self.processor, texts[: self._num_free_running])
                    metrics[f"{name}_char_precision"] = precision
                    metrics[f"{name}_exact_match"] = whole
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self._meter.restart_clock()
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add speed, accuracy by length, the ceilings and the collator's counts to a training entry, then log it."""
        if "loss" in logs:
            schedule, step = self._batches.schedule, self.state.global_step
            logs = {**logs, "ceiling": schedule.ceiling_at(step), **self._meter.collect(self._total)}
            if schedule.num_latents is not None:
                logs["stride_ceiling"] = schedule.stride_ceiling_at(step)
            if self._growth is not None:
                logs["growth_accuracy"] = round(self._growth.mean_accuracy, 4)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and the processor beside it."""
        super().save_model(output_dir, _internal_call)
        if self._readout is not None and self._staging and self.args.should_save:
            self._readout.save(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._readout is not None:
            state_dict = without_readout(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self._readout is not None:
            self._readout.load(resume_from_checkpoint)

    def _total(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes."""
        return self.accelerator.reduce(counts.to(self.args.device), "sum")

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = Path(super()._get_output_dir(trial))
        return str(run_dir / STAGING_FOLDER if self._staging else run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._growth is not None and self.args.should_save:
            folder = Path(self.args.output_dir) / STAGING_FOLDER / f"checkpoint-{self.state.global_step}"
            self._growth.save(folder)
        # Written beside its place and moved when whole, so that a run killed while saving finds no half checkpoint.
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            publish_checkpoint(self.args.output_dir, name, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


def _is_decoder(name: str) -> bool:
    bare = name.removeprefix("module.").removeprefix("base_model.model.")
    return bare.startswith(PARTS["decoder"])


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; one that was being written when the run died is not here."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def publish_checkpoint(output_dir: str | Path, name: str, keep: int | None) -> Path:
    """Move checkpoint `name` from the staging folder into `output_dir`, then delete all but the newest `keep`."""
    target = Path(output_dir) / name
    staged = Path(output_dir) / STAGING_FOLDER / name
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)
    if keep is not None:
        for old in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return target
