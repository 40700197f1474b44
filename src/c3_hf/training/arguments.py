"""Recipe fields, as dataclasses, and the reading of YAML recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments


# The parts of a C3 model, by the names recipes use, and the prefixes of their parameters.
PARTS: dict[str, str | tuple[str, ...]] = {
    "encoder": "model.encoder.",
    "latent_queries": "model.latent_queries.",
    "projector": "model.projector.",
    "decoder": ("model.language_model.", "lm_head."),
}

# transformers 5 renamed two arguments; of each pair a recipe may use either name at either end.
_CHECKPOINTING = (
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)


@dataclass
class ModelArguments:
    """Which model is trained, and which parts of it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A C3 checkpoint to start from. Without it a new model is built."}
    )
    tokenizer_path: str | None = field(default=None, metadata={"help": "Tokenizer folder of a new model."})
    text_config: dict | None = field(default=None, metadata={"help": "Decoder configuration of a new model."})
    encoder_config: dict | None = field(default=None, metadata={"help": "Encoder configuration of a new model."})
    num_latents: int = field(default=32, metadata={"help": "Latents a context is compressed into, in a new model."})
    latent_stride: int | None = field(
        default=None,
        metadata={"help": "Most tokens a latent of a new model stands for, whose positions it keeps; None counts on."},
    )
    local_latents: bool = field(
        default=False,
        metadata={"help": "A latent of a new model is made from the tokens it stands for; needs `latent_stride`."},
    )
    initializer_range: float = field(
        default=0.02, metadata={"help": "Spread of the initial latent queries and projector of a new model."}
    )
    attention_bias_range: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Spread of the initial attention biases of a new model's `encoder` and `decoder`."},
    )
    share_initial_embeddings: bool = field(
        default=False, metadata={"help": "Start both halves of a new model with the same embedding table."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ...; None leaves it to transformers."}
    )
    trained_dtype: str = field(
        default="float32",
        metadata={"help": "Of the parameters that train: float32, or bfloat16, which loses small updates."},
    )
    freeze: list[str] = field(default_factory=list, metadata={"help": f"Parts that do not train: {list(PARTS)}."})
    freeze_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Modules that do not train, by their names, such as model.encoder.wte."},
    )
    lora: list[str] = field(default_factory=list, metadata={"help": "Halves trained by LoRA: encoder, decoder."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA update, over the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the LoRA matrices, 0 to 1."})

    def __post_init__(self) -> None:
        halves = ["encoder", "decoder"]
        for name, allowed in (("freeze", list(PARTS)), ("lora", halves), ("attention_bias_range", halves)):
            unknown = sorted(set(getattr(self, name)) - set(allowed))
            if unknown:
                raise ValueError(f"`{name}` may name {allowed}, got {unknown}.")
        if self.trained_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`trained_dtype` must be float32 or bfloat16, got {self.trained_dtype!r}.")
        if set(self.freeze) >= set(PARTS) and not self.lora:
            raise ValueError(f"`freeze` names every part, {sorted(self.freeze)}: nothing is left to train.")
        new_model = (self.tokenizer_path, self.text_config, self.encoder_config)
        if self.model_name_or_path is None and None in new_model:
            raise ValueError(
                "Give `model_name_or_path` to train an existing model, or all of `tokenizer_path`, `text_config` and "
                "`encoder_config` to train a new one."
            )
        if self.model_name_or_path is not None and any(value is not None for value in new_model):
            raise ValueError(
                f"`model_name_or_path` is {self.model_name_or_path!r}, so `tokenizer_path`, `text_config` and "
                "`encoder_config` must be left out: the checkpoint has its own."
            )


@dataclass
class DataArguments:
    """What the model is trained and evaluated on."""

    train_files: list[Any] = field(
        default_factory=list, metadata={"help": "JSONL files, as paths or {path, weight}, relative to data_dir."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder that train_files lie in."})
    streaming: bool = field(default=False, metadata={"help": "Stream the files instead of indexing them first."})
    tasks: dict[str, float] = field(
        default_factory=lambda: {"restore": 1.0},
        metadata={"help": "Weights of restore, continue, find, answer, answer_segments."},
    )
    text_kinds: dict[str, float] = field(
        default_factory=lambda: {"plain": 1.0}, metadata={"help": "Weights of the kinds of text to restore."}
    )
    min_context_tokens: int = field(default=8, metadata={"help": "Shortest context made from plain text, in tokens."})
    context_ceiling: list[Any] = field(
        default_factory=lambda: [[0, 256]],
        metadata={"help": "[step, tokens] pairs: the longest context made from plain text, linear in between."},
    )
    stride_ceiling: list[Any] | None = field(
        default=None,
        metadata={
            "help": "[step, tokens] pairs: the most tokens a latent stands for; None lets it follow context_ceiling."
        },
    )
    low_stride_share: list[Any] = field(
        default_factory=lambda: [[0, 0.5]],
        metadata={"help": "[step, share] pairs: share of steps whose latents stand for fewer tokens than the most."},
    )
    curriculum_accuracy: float | None = field(
        default=None,
        metadata={"help": "Raise the ceiling whenever training token accuracy near it reaches this share, 0 to 1."},
    )
    curriculum_growth: float = field(default=1.2, metadata={"help": "Factor by which the ceiling is raised."})
    curriculum_max_tokens: int = field(default=256, metadata={"help": "Where the raising of the ceiling ends."})
    length_multiple: int = field(default=16, metadata={"help": "Contexts are padded to multiples of this."})
    long_share: float = field(default=0.4, metadata={"help": "Share of steps with contexts near the ceiling."})
    full_share: float = field(
        default=0.0, metadata={"help": "Share of these at the ceiling itself, and of samples as long as their step."}
    )
    max_context_tokens: int = field(
        default=8192, metadata={"help": "Longer contexts of given messages are over-long."}
    )
    max_prompt_tokens: int = field(
        default=8192, metadata={"help": "Longer prompts, answers and latents included, are over-long."}
    )
    batch_tokens: int | None = field(
        default=None, metadata={"help": "Size micro-batches by tokens instead of per_device_train_batch_size."}
    )
    max_batch_size: int = field(default=64, metadata={"help": "Largest micro-batch under batch_tokens."})
    token_noise: float = field(
        default=0.0, metadata={"help": "Highest share of the decoder's own input tokens replaced at random, 0 to 1."}
    )
    noise_from_step: int = field(default=0, metadata={"help": "Optimizer step from which token_noise is on."})
    eval_files: list[Any] = field(
        default_factory=list, metadata={"help": "Held-out JSONL files with `text`, as paths or {path, kind}."}
    )
    eval_data_dir: str | None = field(default=None, metadata={"help": "Folder of eval_files; None means data_dir."})
    eval_ratios: list[float] = field(
        default_factory=lambda: [2, 4], metadata={"help": "Compression ratios: texts are cut to ratio x num_latents."}
    )
    eval_items: int = field(default=32, metadata={"help": "Texts a file and ratio, teacher-forced."})
    eval_free_running_items: int = field(default=8, metadata={"help": "Texts a file and ratio, generated freely."})

    def __post_init__(self) -> None:
        for name in ("token_noise", "long_share", "full_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        if self.streaming and self.batch_tokens is not None:
            raise ValueError(
                f"`batch_tokens` is {self.batch_tokens}, but with `streaming` batches have a fixed size. Leave "
                "`batch_tokens` out and set `per_device_train_batch_size`."
            )


@dataclass
class C3TrainingArguments(TrainingArguments):
    """transformers' TrainingArguments and what C3 adds to them."""

    decoder_lr_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of the decoder over that of the other parts."}
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL divergence from the same decoder reading the full text, 0 to switch off."},
    )
    readout_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss of naming the tokens of a latent from it alone, 0 to switch off."},
    )
    readout_candidates: int | None = field(
        default=None,
        metadata={
            "help": "The read-out chooses among the words of the batch and so many drawn ones; None: the vocabulary."
        },
    )
    decoder_start: int = field(
        default=0,
        metadata={"help": "Step from which the decoder trains; before it the read-out teaches the encoder alone."},
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "Compile the layers of both halves: minutes, for longer runs. From torch 2.6 on."},
    )
    resume: bool = field(
        default=True, metadata={"help": "Go on from the last complete checkpoint in output_dir, if there is one."}
    )

    # Samples carry more than forward() takes, and every process makes its own batches, which differ in size.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False, "even_batches": False},
        metadata={"help": "Settings of accelerate's data loading."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_lr_ratio <= 0:
            raise ValueError(
                f"`decoder_lr_ratio` must be positive, got {self.decoder_lr_ratio}. To keep the decoder as it is, "
                "put it into `freeze`."
            )
        if self.distillation_weight < 0:
            raise ValueError(f"`distillation_weight` must not be negative, got {self.distillation_weight}.")
        if self.readout_weight < 0:
            raise ValueError(f"`readout_weight` must not be negative, got {self.readout_weight}.")
        if self.readout_candidates is not None and self.readout_candidates < 1:
            raise ValueError(
                f"`readout_candidates` must be positive, got {self.readout_candidates}. Leave it out for the whole "
                "vocabulary."
            )
        if self.decoder_start > 0 and not self.readout_weight:
            raise ValueError(
                f"`decoder_start` is {self.decoder_start}, and without a read-out nothing teaches the encoder before. "
                "Set `readout_weight`."
            )
        if self.max_steps <= 0:
            raise ValueError(
                f"`max_steps` must be positive, got {self.max_steps}: samples are made on the fly, so a run has no "
                "natural end."
            )


def parse_recipe(
    recipe: str | Path, overrides: Sequence[str] = ()
) -> tuple[ModelArguments, DataArguments, C3TrainingArguments]:
    """Read a YAML recipe and command-line overrides.

    Args:
        recipe: YAML file whose keys are the fields of the three dataclasses, flat.
        overrides: `["--name", "value", ...]`, values in YAML.

    Raises:
        ValueError: if a key is unknown, an override has no value, or a field's value is not permitted.
    """
    with open(recipe, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    if not isinstance(values, Mapping):
        raise ValueError(f"`recipe` {str(recipe)!r} must hold a YAML mapping, got {type(values).__name__}.")
    values = {**values, **_parse_overrides(overrides)}
    classes = (ModelArguments, DataArguments, C3TrainingArguments)
    fields = {entry.name: entry for cls in classes for entry in dataclasses.fields(cls)}
    values = _settle_checkpointing(values, fields)
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"`recipe` {str(recipe)!r} has unknown fields: {unknown}. See docs/training.md for the list.")
    # YAML 1.1 reads "1e-3" as a string.
    values = {
        name: float(value) if isinstance(value, str) and _is_float(fields[name].default) else value
        for name, value in values.items()
    }
    return HfArgumentParser(classes).parse_dict(values)


def _settle_checkpointing(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the newest names that this transformers knows, without re-entrance if nothing is said of it:
    4.57 would re-enter, which torch advises against and 5.x no longer does."""
    switch, options = (next(name for name in names if name in fields) for names in _CHECKPOINTING)
    known = {name: new for names, new in zip(_CHECKPOINTING, (switch, options)) for name in names}
    settled = {known.get(name, name): value for name, value in values.items()}
    if settled.get(switch):
        settled.setdefault(options, {"use_reentrant": False})
    return settled


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    names, texts = list(overrides[::2]), list(overrides[1::2])
    if len(names) != len(texts) or any(not name.startswith("--") for name in names):
        raise ValueError(f"Overrides must come as `--name value` pairs, got {list(overrides)}.")
    return {name[2:].replace("-", "_"): yaml.safe_load(text) for name, text in zip(names, texts)}


def _is_float(value: Any) -> bool:
    return isinstance(value, float)
