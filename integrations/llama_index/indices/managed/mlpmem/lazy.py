"""Sources that are looked for when somebody wants to see them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from llama_index.core.schema import NodeWithScore
from pydantic_core import SchemaSerializer, core_schema


class LazyNodes(Sequence[NodeWithScore]):
    """A list of sources that is made at the first look at it."""

    def __init__(self, find: Callable[[], list[NodeWithScore]]) -> None:
        self._find = find
        self._found: list[NodeWithScore] | None = None
        self._lock = threading.Lock()

    def _nodes(self) -> list[NodeWithScore]:
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def __len__(self) -> int:
        """Number of sources."""
        return len(self._nodes())

    def __iter__(self) -> Iterator[NodeWithScore]:
        """Each source."""
        return iter(self._nodes())

    @overload
    def __getitem__(self, place: int) -> NodeWithScore: ...
    @overload
    def __getitem__(self, place: slice) -> list[NodeWithScore]: ...
    def __getitem__(self, place: int | slice) -> NodeWithScore | list[NodeWithScore]:
        """One source or several."""
        return self._nodes()[place]

    def __add__(self, other: Sequence[NodeWithScore]) -> list[NodeWithScore]:
        """These sources and others."""
        return [*self._nodes(), *other]

    def __radd__(self, other: Sequence[NodeWithScore]) -> list[NodeWithScore]:
        """Other sources and these."""
        return [*other, *self._nodes()]

    def __eq__(self, other: object) -> bool:
        """Whether the other holds the same sources, as a list or lazily too."""
        if not isinstance(other, list | LazyNodes):
            return NotImplemented
        return self._nodes() == list(other)

    # What pydantic asks of a value of a kind it does not expect: a response as JSON has them too.
    __pydantic_serializer__ = SchemaSerializer(
        core_schema.any_schema(serialization=core_schema.plain_serializer_function_ser_schema(list))
    )

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        """The sources, if they were looked for: a debugger is not to start a search."""
        return "LazyNodes(not looked for yet)" if self._found is None else repr(self._found)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A copy holds the sources themselves."""
        return list, (self._nodes(),)
