"""Convert a C3 checkpoint from its released layout (two folders, slow tokenizer) into one ordinary Hub repository.

As a command: `python conversion/convert_c3_to_hf.py SOURCE OUTPUT [--verify]`, the same as `c3-hf convert`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers.utils import logging

import c3_hf
from c3_hf.conversion import repository, weights
from c3_hf.conversion.card import read_license, write_converted_card
from c3_hf.conversion.configs import config_json, dtype_name, generation_config, read_released_config
from c3_hf.conversion.plan import EMBEDDING, EQUAL_HEAD, HEAD, WeightPlan, plan_conversion
from c3_hf.conversion.released import (
    ENCODER_FOLDER,
    ReleasedCheckpoint,
    Vocabulary,
    open_released_checkpoint,
    read_vocabulary,
)
from c3_hf.conversion.verification import make_samples, verify_forward, verify_tensors
from c3_hf.files import atomic_folder, file_sha256, write_json
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.processing_c3 import C3Processor


logger = logging.get_logger(__name__)

RECORD_FILE = "conversion.json"
# The configuration gets its final name last: without it, a folder left by a killed conversion does not load.
PENDING_CONFIG = "config.json.partial"


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = weights.DEFAULT_SHARD_SIZE,
    base_models: Sequence[str] = (),
    verify: bool = False,
    **hub: Any,
) -> dict:
    """Convert a checkpoint in the released layout.

    Everything is checked before anything is written: every source tensor is used once or left out for a stated
    reason, has the shape the configuration asks for and holds finite values only. The weights go from file to file in
    pieces of 4 MiB, so memory does not depend on the size of the model (only `verify` loads it).

    Args:
        source: a folder or Hub id with `config.json`, `*.safetensors` and the encoder in `llm1/`.
        output: the folder to make; it appears complete or not at all.
        dtype: floating-point type to cast the weights to; None keeps the stored ones.
        max_shard_size: largest weight file, in bytes or as "5GB".
        base_models: Hub ids for the model card's `base_model`; the source itself if it is a Hub id.
        verify: also reload the output and compare it with the source, tensor by tensor and by a forward pass.
        hub: how a Hub repository is fetched, see [`fetch_folder`].

    Returns:
        The record that is stored as `conversion.json`: source, revision, hashes, dropped tensors, versions and, if
        asked for, the verification's receipt.

    Raises:
        FileNotFoundError: if a needed file is absent.
        ValueError: if anything about the source is not as it must be, `output` is taken, or the verification fails.
    """
    max_shard_size = weights.shard_size(max_shard_size)
    checkpoint = open_released_checkpoint(source, **hub)
    with atomic_folder(output) as folder:
        vocabulary = read_vocabulary(checkpoint)
        config = read_released_config(checkpoint, vocabulary, dtype)
        plan = plan_conversion(config, checkpoint.main_tensors, checkpoint.encoder_tensors, checkpoint.config_files)
        digests = weights.scan_weights(plan.sources, dtype)
        if HEAD in digests and digests[HEAD].stored == digests[EMBEDDING].stored:
            plan.drop(HEAD, EQUAL_HEAD)
            del digests[HEAD]
            config = read_released_config(checkpoint, vocabulary, dtype, tie_word_embeddings=True)
        config.license = read_license(checkpoint)
        config.base_models = list(base_models) or ([checkpoint.name] if checkpoint.revision else None)
        weights.write_shards(folder, plan.sources, dtype, max_shard_size)
        _write_companions(folder, config, vocabulary)
        record = _make_record(checkpoint, plan, digests, dtype, has_processor=vocabulary.tokenizer is not None)
        if verify:
            pending = C3Config.from_json_file(folder / PENDING_CONFIG)
            samples = make_samples(config, vocabulary.tokenizer)
            compute_dtype = dtype or next(iter(plan.sources.values())).dtype
            record["verification"] = {
                "tensors_equal": verify_tensors(folder, digests),
                "forward": verify_forward(folder, checkpoint, pending, samples, compute_dtype),
            }
        write_json(folder / RECORD_FILE, record)
        write_converted_card(folder, Path(output).name, config, record)
        (folder / PENDING_CONFIG).rename(folder / "config.json")
    return record


def _write_companions(folder: Path, config: C3Config, vocabulary: Vocabulary) -> None:
    """Write everything but weights, record and card; the configuration under a name that nothing loads."""
    auto_map = dict(repository.AUTO_MAP)
    if vocabulary.tokenizer is not None:
        C3Processor(tokenizer=vocabulary.tokenizer, num_latents=config.num_latents).save_pretrained(folder)
        auto_map |= repository.PROCESSOR_AUTO_MAP
    repository.copy_code(folder)
    generation_config(config, config.text_config.bos_token_id, vocabulary.end_of_text_id).save_pretrained(folder)
    text = config_json(config, repository.MODEL_CLASS, auto_map)
    (folder / PENDING_CONFIG).write_text(text, encoding="utf-8")


def _make_record(
    checkpoint: ReleasedCheckpoint,
    plan: WeightPlan,
    digests: dict[str, weights.Digest],
    dtype: torch.dtype | None,
    has_processor: bool,
) -> dict:
    read = {tensor.path for tensor in [*checkpoint.main_tensors, *checkpoint.encoder_tensors]}
    configs = [checkpoint.folder / "config.json", checkpoint.folder / ENCODER_FOLDER / "config.json"]
    files = sorted([*read, *configs, *checkpoint.folder.glob("*.tiktoken")])
    dropped = [
        {"tensor": tensor.path.relative_to(checkpoint.folder).as_posix() + ":" + tensor.name, "reason": reason}
        for tensor, reason in plan.dropped
    ]
    for drop in dropped:
        logger.info(f"left out {drop['tensor']}: {drop['reason']}")
    return {
        "source": checkpoint.name if checkpoint.revision else Path(checkpoint.name).resolve().name,
        "revision": checkpoint.revision,
        "has_processor": has_processor,
        "cast_to": dtype_name(dtype),
        "source_files": {
            path.relative_to(checkpoint.folder).as_posix(): file_sha256(path)
            for path in tqdm(files, desc="hashing files", unit="file", disable=None)
        },
        "tensors": {
            target: {
                "source": source.path.relative_to(checkpoint.folder).as_posix() + ":" + source.name,
                "sha256": digests[target].stored,
            }
            for target, source in plan.sources.items()
        },
        "dropped": dropped,
        "versions": {
            "c3_hf": c3_hf.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "verification": None,
    }


if __name__ == "__main__":
    from c3_hf.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
