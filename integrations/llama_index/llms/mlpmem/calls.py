"""The keyword arguments of one call, and what its result looks like."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llama_index.llms.mlpmem.grammar import JsonGrammar
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.generation import Answer

ALIASES = {"max_tokens": "max_new_tokens", "logits_processor": "logits_processors"}
LISTS = ("stop", "logits_processor")

_Kind = tuple[Callable[[Any], bool], str]
"""Whether a value is of it, and what it is called."""

WHOLE: _Kind = (lambda value: isinstance(value, Integral), "a whole number")
NUMBER: _Kind = (lambda value: isinstance(value, Real), "a number")
SCHEMA: _Kind = (lambda value: is_schema(value), "a pydantic class, or a JSON schema as a dict")
ALLOWED: dict[str, _Kind] = {
    "max_tokens": WHOLE,
    "max_new_tokens": WHOLE,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "stop": (lambda values: all(isinstance(v, str) for v in values), "strings"),
    "seed": WHOLE,
    "lambda_": NUMBER,
    "logits_processor": (lambda values: all(map(callable, values)), "LogitsProcessors"),
    "json_schema": SCHEMA,
    "asked": (lambda value: isinstance(value, str) and bool(value.strip()), "a text"),
}

logger = logging.getLogger(__name__)


def decoding_of(
    default: Decoding, kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[Decoding, str | None]:
    """The LLM's settings with those of one call, and the text the memory is asked with.

    Raises:
        ConfigError: an argument that is not known, given twice, or outside what is allowed.
        MissingDependencyError: a JSON schema, and nothing that keeps to it is installed.
    """
    given = _checked(kwargs)
    asked, schema = given.pop("asked", None), given.pop("json_schema", None)
    decoding = replace(default, **{ALIASES.get(name, name): v for name, v in given.items()})
    if schema is not None:
        grammar = JsonGrammar(tokenizer, schema)
        decoding = replace(decoding, logits_processors=(*decoding.logits_processors, grammar))
    return decoding, asked


def _checked(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is given of a call's arguments; None means not given."""
    if unknown := sorted(set(kwargs) - set(ALLOWED)):
        raise ConfigError(
            f"unknown argument(s) {', '.join(unknown)} of a call; allowed are {', '.join(ALLOWED)}"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    if "max_tokens" in given and "max_new_tokens" in given:
        raise ConfigError("max_tokens and max_new_tokens mean the same; give one of them")
    given |= {name: listed(given[name]) for name in LISTS if name in given}
    for name, value in given.items():
        is_one, kind = ALLOWED[name]
        if not is_one(value):
            raise ConfigError(f"{name} = {kwargs[name]!r}: allowed is {kind}")
    return given


def is_schema(value: Any) -> bool:  # noqa: ANN401
    """Whether a value says what an object looks like."""
    return isinstance(value, dict) or (isinstance(value, type) and issubclass(value, BaseModel))


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
