"""Recipe fields, as dataclasses, and the reading of YAML recipes."""

# ruff: noqa: RUF009 - `option` is `dataclasses.field`

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


def option(default: Any, words: str) -> Any:
    """A field of a recipe: its default, or the function that makes it anew, and what `--help` says of it."""
    if callable(default):
        return field(default_factory=default, metadata={"help": words})
    return field(default=default, metadata={"help": words})


@dataclass
class ModelArguments:
    """Which model is trained, and which parts of it."""

    model_name_or_path: str | None = option(None, "A C3 checkpoint to start from. Without it a new model is built.")
    tokenizer_path: str | None = option(None, "Tokenizer folder of a new model.")
    text_config: dict | None = option(None, "Decoder configuration of a new model.")
    encoder_config: dict | None = option(None, "Encoder configuration of a new model.")
    num_latents: int = option(32, "Latents a context is compressed into, in a new model.")
    latent_stride: int | None = option(
        None, "Most tokens a latent of a new model stands for, whose positions it keeps; None counts on."
    )
    local_latents: bool = option(
        False, "A latent of a new model is made from the tokens it stands for; needs `latent_stride`."
    )
    initializer_range: float = option(0.02, "Spread of the initial latent queries and projector of a new model.")
    attention_bias_range: dict[str, float] = option(
        dict, "Spread of the initial attention biases of a new model's `encoder` and `decoder`."
    )
    share_initial_embeddings: bool = option(False, "Start both halves of a new model with the same embedding table.")
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ...; None leaves it to transformers."
    )
    trained_dtype: str = option(
        "float32", "Of the parameters that train: float32, or bfloat16, which loses small updates."
    )
    freeze: list[str] = option(list, f"Parts that do not train: {list(PARTS)}.")
    freeze_modules: list[str] = option(list, "Modules that do not train, by their names, such as model.encoder.wte.")
    lora: list[str] = option(list, "Halves trained by LoRA: encoder, decoder.")
    lora_rank: int = option(16, "Rank of the LoRA matrices.")
    lora_alpha: int = option(32, "Scale of the LoRA update, over the rank.")
    lora_dropout: float = option(0.0, "Dropout in front of the LoRA matrices, 0 to 1.")

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

    train_files: list[Any] = option(list, "JSONL files, as paths or {path, weight}, relative to data_dir.")
    data_dir: str | None = option(None, "Folder that train_files lie in.")
    streaming: bool = option(False, "Stream the files instead of indexing them first.")
    tasks: dict[str, float] = option(
        lambda: {"restore": 1.0}, "Weights of restore, continue, find, answer, answer_segments, pieces."
    )
    text_kinds: dict[str, float] = option(lambda: {"plain": 1.0}, "Weights of the kinds of text to restore.")
    min_context_tokens: int = option(8, "Shortest context made from plain text, in tokens.")
    context_ceiling: list[Any] = option(
        lambda: [[0, 256]], "[step, tokens] pairs: the longest context made from plain text, linear in between."
    )
    stride_ceiling: list[Any] | None = option(
        None, "[step, tokens] pairs: the most tokens a latent stands for; None lets it follow context_ceiling."
    )
    low_stride_share: list[Any] = option(
        lambda: [[0, 0.5]], "[step, share] pairs: share of steps whose latents stand for fewer tokens than the most."
    )
    asking_stride_ceiling: list[Any] | None = option(
        None,
        "[step, tokens] pairs: the most tokens a latent stands for where a sample asks for a place of its text. Steps "
        "then ask as a whole or not at all; None: each sample draws its task.",
    )
    growth_accuracy: float | None = option(
        None, "Where lengths or strides would rise they wait while training token accuracy is below this, 0 to 1."
    )
    length_multiple: int = option(16, "Contexts are padded to multiples of this.")
    long_share: float = option(0.4, "Share of steps with contexts near the ceiling.")
    full_share: float = option(0.0, "Share of these at the ceiling itself, and of samples as long as their step.")
    max_context_tokens: int = option(8192, "Longer contexts of given messages are over-long.")
    max_prompt_tokens: int = option(8192, "Longer prompts, answers and latents included, are over-long.")
    batch_tokens: int | None = option(None, "Size micro-batches by tokens instead of per_device_train_batch_size.")
    max_batch_size: int = option(64, "Largest micro-batch under batch_tokens.")
    token_noise: float = option(0.0, "Highest share of the decoder's own input tokens replaced at random, 0 to 1.")
    noise_from_step: int = option(0, "Optimizer step from which token_noise is on.")
    eval_files: list[Any] = option(list, "Held-out JSONL files with `text`, as paths or {path, kind}.")
    eval_data_dir: str | None = option(None, "Folder of eval_files; None means data_dir.")
    eval_ratios: list[float] = option(lambda: [2, 4], "Compression ratios: texts are cut to ratio x num_latents.")
    eval_items: int = option(32, "Texts a file and ratio, teacher-forced.")
    eval_free_running_items: int = option(8, "Texts a file and ratio, generated freely.")

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

    decoder_lr_ratio: float = option(1.0, "Learning rate of the decoder over that of the other parts.")
    distillation_weight: float = option(
        0.0, "Weight of the KL divergence from the same decoder reading the full text, 0 to switch off."
    )
    readout_weight: float = option(
        0.0, "Weight of the loss of naming the tokens of a latent from it alone, 0 to switch off."
    )
    readout_candidates: int | None = option(
        None, "The read-out chooses among the words of the batch and so many drawn ones; None: the vocabulary."
    )
    lookup_weight: float = option(
        0.0, "Weight of the loss of not looking at the latent of the next token, 0 to switch off; eager attention."
    )
    lookup_heads: dict[int, list[int]] = option(
        dict,
        "Heads that look it up, by layer of the decoder, both from 0, such as {0: [2, 3], 1: [5]}; each its places.",
    )
    draw_lookup_heads: dict[int, list[int]] = option(
        dict, "Those of them drawn anew at the start, without biases: of a model whose heads look at distances, all."
    )
    lookup_places: int | None = option(
        None, "Places of a latent that these heads tell apart, several heads for each; None: as many as heads."
    )
    previous_heads: dict[int, list[int]] = option(
        dict,
        "Heads, by layer of the decoder below those, that look from a latent at the one before, in which the token in "
        "front of its first one stands; needs `lookup_places`.",
    )
    lookup_heads_alone: bool = option(
        False, "Nothing but these heads trains, and all else of the model stays as it is; needs `weight_decay: 0`."
    )
    quiet_weight: float = option(
        0.0, "Weight, in the look-up loss, of what its heads say where they shall look at no latent, 0 to switch off."
    )
    decoder_start: int = option(
        0, "Step from which the decoder trains; before it the read-out teaches the encoder alone."
    )
    compile_layers: bool = option(
        False, "Compile the layers of both halves: minutes, for longer runs. From torch 2.6 on."
    )
    resume: bool = option(True, "Go on from the last complete checkpoint in output_dir, if there is one.")

    # Samples carry more than forward() takes, and every process makes its own batches, which differ in size.
    remove_unused_columns: bool = option(False, "Must stay off.")
    # Every process uses every parameter at each step; the search for unused ones starts from the model's outputs, of
    # which the read-out is none, and would take its heads for unused.
    ddp_find_unused_parameters: bool | None = option(False, "Must stay off with a read-out.")
    accelerator_config: dict | str | None = option(
        lambda: {"dispatch_batches": False, "even_batches": False}, "Settings of accelerate's data loading."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_lr_ratio <= 0:
            raise ValueError(
                f"`decoder_lr_ratio` must be positive, got {self.decoder_lr_ratio}. To keep the decoder as it is, "
                "put it into `freeze`."
            )
        for name in ("distillation_weight", "readout_weight", "lookup_weight", "quiet_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.readout_candidates is not None and self.readout_candidates < 1:
            raise ValueError(
                f"`readout_candidates` must be positive, got {self.readout_candidates}. Leave it out for the whole "
                "vocabulary."
            )
        self._check_lookup()
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

    def _check_lookup(self) -> None:
        num_heads = sum(map(len, self.lookup_heads.values()))
        if self.lookup_places is not None and not 1 <= self.lookup_places <= num_heads:
            raise ValueError(
                f"`lookup_places` must lie between 1 and the number of `lookup_heads`, {num_heads}, got "
                f"{self.lookup_places}: each place needs a head. Name more heads, or leave it out: one place a head."
            )
        if self.draw_lookup_heads and not self.lookup_weight:
            raise ValueError(
                "`draw_lookup_heads` is set and `lookup_weight` is 0: nothing would teach the new heads. Set "
                "`lookup_weight`, or leave both out."
            )
        if any(set(heads) - set(self.lookup_heads.get(at, ())) for at, heads in self.draw_lookup_heads.items()):
            raise ValueError(
                f"`draw_lookup_heads` may name heads that `lookup_heads` names, {self.lookup_heads}, got "
                f"{self.draw_lookup_heads}: nothing would teach the others. Name them in both, or leave them out."
            )
        if self.quiet_weight and not self.lookup_weight:
            raise ValueError(
                f"`quiet_weight` is {self.quiet_weight} and `lookup_weight` is 0: there are no heads that could say "
                "something. Set `lookup_weight`, or leave both out."
            )
        if self.previous_heads and (not self.lookup_weight or self.lookup_places is None):
            raise ValueError(
                f"`previous_heads` is {self.previous_heads}, and they serve heads that look tokens up, where a latent "
                f"has no more tokens than these have places, got `lookup_weight` {self.lookup_weight} and "
                f"`lookup_places` {self.lookup_places}. Set both, or leave it out."
            )
        if self.previous_heads and max(self.previous_heads) >= min(self.lookup_heads):
            raise ValueError(
                f"`previous_heads` must lie in layers below those of `lookup_heads`, {sorted(self.lookup_heads)}, "
                f"which read what they carry over, got {sorted(self.previous_heads)}."
            )
        if self.lookup_heads_alone and (not self.lookup_weight or self.weight_decay):
            raise ValueError(
                "`lookup_heads_alone` needs `lookup_weight`, or there are no such heads, and `weight_decay: 0`, or "
                f"what lies beside them in a tensor shrinks, got {self.lookup_weight} and {self.weight_decay}."
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
    for name, value in values.items():
        # YAML 1.1 reads `1e-3` as a string, and the `no` of `save_strategy: no` as false.
        if isinstance(value, str) and isinstance(fields[name].default, float):
            values[name] = float(value)
        elif value is False and name.endswith("_strategy"):
            values[name] = "no"
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
