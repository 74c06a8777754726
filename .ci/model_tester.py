"""transformers' ModelTesterMixin on a tiny memory; run by .ci/transformers_tests.py."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers import LlamaConfig

from mlpmem_rag.configuration import MLPMemConfig
from mlpmem_rag.model import MLPMemForCausalLM

LEFT_OUT = {
    "test_correct_missing_keys": "it loads weights without their manifest, which is refused",
    "test_model_weights_reload_no_missing_tied_weights": "it changes a saved file: refused",
    "test_retain_grad_hidden_states_attentions": "the base model is frozen: it has no gradients",
    "test_generation_tester_mixin_inheritance": "the sdist has no GenerationTesterMixin; generation"
    " is tested in tests/test_generation.py",
}
"""Tests that do not hold, each with the reason."""


class MLPMemTester:
    """Makes the configurations and inputs that the mixin asks for."""

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.vocab_size = 99

    def get_config(self) -> MLPMemConfig:
        """A Llama of two layers and a memory of two blocks."""
        base = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        memory = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 24,
            "num_blocks": 2,
            "activation": "silu",
            "gated": True,
            "vocab_size": 40,
        }
        return MLPMemConfig(base_config=base, layer=1, memory=memory, memory_lambda=0.5)

    def prepare_config_and_inputs_for_common(self) -> tuple[MLPMemConfig, dict[str, Any]]:
        """Random ids with a mask."""
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class MLPMemModelTest(ModelTesterMixin, unittest.TestCase):  # type: ignore[misc]
    """The tests are the mixin's."""

    all_model_classes = (MLPMemForCausalLM,)
    test_all_params_have_gradient = False  # the base model is frozen

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        """The mixin makes labels only for the models that it knows by name."""
        inputs: dict[str, Any] = super()._prepare_for_class(inputs_dict, model_class)
        return {**inputs, "labels": inputs["input_ids"].clone()} if return_labels else inputs

    def setUp(self) -> None:
        """Make the tester, or say why a test is left out."""
        if self._testMethodName in LEFT_OUT:
            self.skipTest(LEFT_OUT[self._testMethodName])
        torch.manual_seed(0)
        self.model_tester = MLPMemTester(self)
