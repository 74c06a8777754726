"""A LlamaIndex LLM by its name on the command line.

    llama_index.llms.ollama:Ollama?model=llama3.1&request_timeout=120
    ./judge.py:make_llm

Before the colon a module or a `.py` file, after it an LLM or anything that makes one when called,
behind the question mark what it is called with. The module is run, like any program that is named.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from llama_index.core.llms import LLM

from mlpmem_rag.errors import ConfigError

EXAMPLE = "llama_index.llms.ollama:Ollama?model=llama3.1, or ./judge.py:make_llm"
_SECRET = re.compile(r"key$|token$|secret|passw|authorization|credential", re.IGNORECASE)


def load_llm(name: str) -> LLM:
    """Import and make the LLM.

    Raises:
        ConfigError: the name has another form, holds a secret, or does not lead to an LLM.
    """
    target, _, query = name.partition("?")
    place, colon, attribute = target.rpartition(":")
    if not (place and colon and attribute.isidentifier()):
        raise ConfigError(f"LLM {name!r}: give MODULE:NAME or FILE.py:NAME, like {EXAMPLE}")
    found = getattr(_module(place, name), attribute, None)
    if found is None:
        raise ConfigError(f"LLM {name!r}: {place} has no {attribute!r}")
    llm = found if isinstance(found, LLM) else _made(found, _arguments(query, name), name)
    if not isinstance(llm, LLM):
        raise ConfigError(
            f"LLM {name!r} is a {type(llm).__name__}; it has to be a LlamaIndex LLM, or to make one"
        )
    return llm


def source_of(name: str) -> str:
    """A fingerprint of the `.py` file that is named; nothing where it is a module."""
    place = name.partition("?")[0].rpartition(":")[0]
    path = Path(place)
    if not (place.endswith(".py") and path.is_file()):
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _module(place: str, name: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location("mlpmem_named_llm", Path(place))
        if spec is None or spec.loader is None:
            raise ImportError(f"{place} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a module raises when it is run
        raise ConfigError(
            f"LLM {name!r}: {place} cannot be imported ({_told(error)}); LlamaIndex's LLMs are "
            "packages of their own, like llama-index-llms-ollama"
        ) from error
    return module


def _made(maker: Any, arguments: dict[str, Any], name: str) -> object:  # noqa: ANN401
    try:
        return maker(**arguments)
    except Exception as error:  # whatever the constructor raises
        raise ConfigError(f"LLM {name!r} cannot be made ({_told(error)})") from error


def _arguments(query: str, name: str) -> dict[str, Any]:
    """`a=1&b=x` as keyword arguments: JSON values where they are such, else texts."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"LLM {name!r}: {query!r} is not of the form a=1&b=x") from error
    secrets = [key for key, _ in pairs if _SECRET.search(key)]
    if secrets:
        raise ConfigError(
            f"{secrets[0]} would stand where others read it; give it in an environment "
            "variable, or name a FILE.py:NAME that reads it"
        )
    return {key: _value(text) for key, text in pairs}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
