"""Answers in a form: a grammar that leaves only the tokens that may come next."""

from __future__ import annotations

import importlib.util
import json
import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llama_index.core.bridge.pydantic import BaseModel
from torch import Tensor
from transformers import LogitsProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.errors import ConfigError, MissingDependencyError

JsonSchema = type[BaseModel] | dict[str, Any]

# Small models go on with white space for ever where the form lets them.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Of a tokenizer and the width of a model's output; it takes a second to make.
_vocabularies: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, Any]] = WeakKeyDictionary()
_lock = threading.Lock()


def can_constrain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether answers can be held to a form here."""
    installed = importlib.util.find_spec("llguidance") is not None
    return installed and tokenizer.is_fast and tokenizer.eos_token_id is not None


def closed(schema: Any) -> Any:  # noqa: ANN401
    """A JSON schema whose objects hold nothing but what is named, unless they say otherwise.

    A model could go on for ever with properties that nobody asked for.
    """
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(out.get(name), dict):
            out[name] = {key: closed(value) for key, value in out[name].items()}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(out.get(name), list):
            out[name] = [closed(value) for value in out[name]]
    for name in ("items", "additionalProperties"):
        if name in out:
            out[name] = closed(out[name])
    if "properties" in out:
        out.setdefault("additionalProperties", False)
    return out


class JsonGrammar(LogitsProcessor):
    """Lets through what is, or can still become, JSON of a schema; for one generation.

    Args:
        tokenizer: of the base model.
        schema: a pydantic class, or a JSON schema.
        lenient: leave out what no grammar can see to (that a list's items differ, say), for
            answers that are checked afterwards.

    Raises:
        ConfigError: a schema that cannot be a grammar, or a tokenizer without an end mark.
        MissingDependencyError: llguidance is not installed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, schema: JsonSchema, *, lenient: bool = False
    ) -> None:
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "answers of a JSON schema need llguidance; pip install 'mlpmem-rag[structured]'"
            ) from error
        if not can_constrain(tokenizer):
            raise ConfigError(
                "json_schema needs a fast tokenizer with a token that ends a text; this base "
                "model's has none"
            )
        told = schema if isinstance(schema, dict) else schema.model_json_schema()
        options: Any = {**COMPACT, "lenient": lenient}
        self._grammar = LLMatcher.grammar_from_json_schema(
            json.dumps(closed(told)), overrides=options
        )
        if wrong := LLMatcher.validate_grammar(self._grammar, None):
            raise ConfigError(
                f"json_schema cannot be kept to: {wrong}; leave that out of the schema"
            )
        self._tokenizer: Any = tokenizer
        self._matcher: Any = None
        self._seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """*Shapes:* (1, T), (1, W) -> (1, W)."""
        width = scores.shape[-1]
        if self._matcher is None:
            self._matcher = self._begin(width)
        else:
            self._matcher.consume_tokens(input_ids[0, self._seen :].tolist())
        self._seen = input_ids.shape[1]
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[:width].astype(bool))
        kept = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        if bool(kept.isneginf().all()):  # the memory alone has no word for what has to come
            return torch.where(allowed.to(scores.device), 0.0, kept)
        return kept

    def _begin(self, width: int) -> Any:  # noqa: ANN401
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        with _lock:
            made = _vocabularies.setdefault(self._tokenizer, {})
            if width not in made:
                made[width] = from_tokenizer(self._tokenizer, n_vocab=width)
            return LLMatcher(made[width], self._grammar)
