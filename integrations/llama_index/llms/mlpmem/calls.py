"""The keyword arguments of one call, and what its result looks like."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llama_index.llms.mlpmem.grammar import JsonGrammar
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.generation import Answer

ALIASES = {"max_tokens": "max_new_tokens", "logits_processor": "logits_processors"}
ALLOWED = (
    "max_tokens",
    "max_new_tokens",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "lambda_",
    "logits_processor",
    "json_schema",
    "asked",
)

logger = logging.getLogger(__name__)


def decoding_of(
    default: Decoding, kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[Decoding, str | None]:
    """The LLM's settings with those of one call, and the text the memory is asked with.

    Raises:
        ConfigError: an argument that is not known, given twice, or outside what is allowed.
        MissingDependencyError: a JSON schema, and nothing that keeps to it is installed.
    """
    if unknown := sorted(set(kwargs) - set(ALLOWED)):
        raise ConfigError(
            f"unknown argument(s) {', '.join(unknown)} of a call; allowed are {', '.join(ALLOWED)}"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    if "max_tokens" in given and "max_new_tokens" in given:
        raise ConfigError("max_tokens and max_new_tokens mean the same; give one of them")
    asked, schema = given.pop("asked", None), given.pop("json_schema", None)
    changes = {ALIASES.get(name, name): value for name, value in given.items()}
    for name in ("stop", "logits_processors"):
        if name in changes:
            changes[name] = listed(changes[name])
    decoding = replace(default, **changes)
    if schema is not None:
        grammar = JsonGrammar(tokenizer, schema)
        decoding = replace(decoding, logits_processors=(*decoding.logits_processors, grammar))
    return decoding, asked


def listed(value: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Nothing, one thing or several, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (value,)
    return tuple(value)


def raw(answer: Answer, *, model: str) -> dict[str, Any]:
    """The response's `raw`: JSON-able, with `usage` as token counters read it."""
    return {
        "model": model,
        "finish_reason": "stop" if answer.ended else "length",
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.new_tokens,
            "total_tokens": answer.prompt_tokens + answer.new_tokens,
        },
        "mlpmem": {
            "lambda": answer.lambda_,
            "confidence": answer.confidence,
            "seconds": answer.seconds,
            "ttft_seconds": answer.ttft_seconds,
            "cut_tokens": answer.cut_tokens,
        },
    }


def warn_of_cut(answer: Answer, context_window: int) -> None:
    """Say that the model did not see the whole prompt."""
    if answer.cut_tokens:
        logger.warning(
            "the prompt's first %d tokens were left out: %d tokens are the context window less "
            "the room for new tokens (window %d)",
            answer.cut_tokens,
            answer.prompt_tokens,
            context_window,
        )
