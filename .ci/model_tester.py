"""transformers' ModelTesterMixin on a tiny memory; run by .ci/transformers_tests.py."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers import LlamaConfig

from mlpmem_rag.configuration import MLPMemConfig
from mlpmem_rag.model import MLPMemForCausalLM
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

LEFT_OUT: dict[str, str] = {}
"""Tests that do not hold, each with the reason."""


class MLPMemTester:
    """Makes the configurations and inputs that the mixin asks for."""

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.vocab_size = 99

    def get_config(self) -> MLPMemConfig:
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
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class MLPMemModelTest(ModelTesterMixin, unittest.TestCase):  # type: ignore[misc]
    all_model_classes = (MLPMemForCausalLM,)
    test_all_params_have_gradient = False  # the base model is frozen

    def setUp(self) -> None:
        if self._testMethodName in LEFT_OUT:
            self.skipTest(LEFT_OUT[self._testMethodName])
        torch.manual_seed(0)
        self.model_tester = MLPMemTester(self)
