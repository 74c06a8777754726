"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from mlpmem_rag.errors import ConfigError

POWERS = ("", "k", "m", "g", "t")


def parse_size(text: str) -> int:
    """Bytes of `4GiB`, `800 MB`, `1.5g`: by 1024 with an i, else by 1000; a bare number is bytes.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"size {text!r} is none; give a number and a unit, such as 4GiB or 800MB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** POWERS.index(found[2]))
