"""transformers' own tests of models and of generation, on C3 models.

They lie in transformers' repository, not in its package, so they run where `C3_TRANSFORMERS` names a checkout of the
installed version (or a folder with its `tests`), and need the package `parameterized`.
"""

from __future__ import annotations

import os
import sys
import unittest

import pytest
import torch

from c3_hf import C3Config, C3ForConditionalGeneration, C3Model
from factories import NUM_LATENTS, make_config, sub_config


CHECKOUT = os.environ.get("C3_TRANSFORMERS")
if CHECKOUT is None:
    pytest.skip("C3_TRANSFORMERS names no checkout of transformers with its tests", allow_module_level=True)
# pytest may have made a module of this name for the folder of these tests.
sys.modules.pop("tests", None)
sys.path.insert(0, CHECKOUT)

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402


# Their tests warn of what they test.
pytestmark = pytest.mark.filterwarnings("default")


# What they ask that does not hold for C3, and why.
NOT_FOR_C3 = {
    "test_sdpa_can_dispatch_composite_models": "it looks for a vision tower",
    "test_bc_cache_name_forward": "the old name of the cache is the name up to 5.23: it is taken without a warning",
}
# Ids away from the end of the vocabulary, which the tests cut off.
MARKERS = {
    "context_start_token_id": 20,
    "context_end_token_id": 21,
    "context_token_id": 22,
    "inline_context_start_token_id": 23,
    "inline_context_end_token_id": 24,
}


class C3ModelTester:
    """What the mixins ask of a model: its configuration, the inputs of a call, and what they count."""

    batch_size = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, num_contexts, latent_stride):
        self.num_contexts = num_contexts
        self.latent_stride = latent_stride
        self.seq_length = 9 + num_contexts * (NUM_LATENTS + 2)

    def get_config(self):
        config = make_config(latent_stride=self.latent_stride, **MARKERS)
        # One of their tests asks this of the whole, where others look at the decoder.
        config.use_cache = True
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        if not self.num_contexts:
            # Any id at all: a marker by itself is an ordinary token where there is no context.
            ids = ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size)
            return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        words = ids_tensor([self.batch_size, 9], 200) + 25
        block = torch.tensor([20, *[22] * NUM_LATENTS, 21] * self.num_contexts).expand(self.batch_size, -1)
        ids = torch.cat([words[:, :3], block, words[:, 3:]], dim=1)
        contexts = ids_tensor([self.batch_size, self.num_contexts, 7], 200) + 25
        return config, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "context_input_ids": contexts,
            "context_attention_mask": torch.ones_like(contexts),
        }


class Mixins(ModelTesterMixin, GenerationTesterMixin):
    """The tests, for one kind of prompt."""

    all_model_classes = (C3Model, C3ForConditionalGeneration)
    _is_composite = True
    # Of 4.57: the halves are what is pruned.
    test_pruning = False
    test_head_masking = False
    num_contexts = 0
    latent_stride = None

    def setUp(self):
        name = self._testMethodName
        if name in NOT_FOR_C3:
            self.skipTest(NOT_FOR_C3[name])
        if "training_gradient_checkpointing" in name and not self.num_contexts:
            self.skipTest("it counts the runs of the first layer, the encoder's, which runs for contexts only")
        self.model_tester = C3ModelTester(self.num_contexts, self.latent_stride)
        self.config_tester = ConfigTester(self, C3Config, has_text_modality=False)
        if "training" in name:
            # Only with its head has a model a loss.
            self.all_model_classes = (C3ForConditionalGeneration,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

    def test_config(self):
        # A half is looked for by its type, so there they are of two types.
        halves = {"encoder_config": sub_config("llama", hidden_size=24, head_dim=6)}
        by_type = ConfigTester(self, C3Config, False, encoder_context_start_token_id=20, **halves)
        name = "create_and_test_config_from_and_save_pretrained_composite"
        setattr(self.config_tester, name, getattr(by_type, name))
        self.config_tester.run_common_tests()


class TestText(Mixins, unittest.TestCase):
    pass


class TestContexts(Mixins, unittest.TestCase):
    num_contexts = 2


class TestTextWithAStride(Mixins, unittest.TestCase):
    latent_stride = 3


class TestContextsWithAStride(Mixins, unittest.TestCase):
    num_contexts = 2
    latent_stride = 3
