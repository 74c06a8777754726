"""Sizes as people write them."""

from __future__ import annotations

import pytest

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 1024**3),
        ("800MB", 800_000_000),
        ("1.5g", 1_500_000_000),
        (" 2 kib ", 2048),
        ("1TiB", 1024**4),
        ("123", 123),
        ("7b", 7),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "4ib", "4 gigabytes", "1e9", "4GiB/s"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is none; give a number and a unit, such as 4GiB"):
        parse_size(text)
