"""LoRA of the user's own, by PEFT and transformers' Trainer: the encoder's matrices train under checkpointing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import Trainer, TrainingArguments

import factories
from c3_hf.data.collator import C3DataCollator


peft = pytest.importorskip("peft", reason="peft comes with the extra `train`")

RECORDS = [
    {
        "messages": [{"role": "user", "content": "Repeat the text: "}, {"role": "assistant", "content": text}],
        "contexts": [text],
    }
    for text in ("It was the best of times.", "It was the worst of times.")
]
# Of the two names, the one that lasts where it exists.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


# transformers 5 has a new name for this property, which peft does not know yet; the other is torch's, about its own
# default, which the Trainer of 4.57 sets for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_lora_on_the_encoder_trains_under_checkpointing(tmp_path, options):
    model = factories.make_model()
    layers = [f"model.encoder.layers.{number}.self_attn.q_proj" for number in range(2)]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": options},
    )
    collator = C3DataCollator(factories.make_processor())
    Trainer(model, args, train_dataset=RECORDS, data_collator=collator).train()
    matrices = {name: matrix for name, matrix in model.named_parameters() if "lora_B" in name}
    assert len(matrices) == 2
    assert all(torch.count_nonzero(matrix) > 0.9 * matrix.numel() for matrix in matrices.values())


def test_an_encoder_that_does_not_train_keeps_no_graph():
    model = factories.make_model().train()
    model.model.encoder.requires_grad_(False)
    model.model.latent_queries.requires_grad_(False)
    latents = model.get_encoder_latents(torch.tensor([[1, 2, 3]]))
    assert not latents.requires_grad
