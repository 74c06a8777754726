"""Whether the files of a folder are those that its manifest lists. Knows no memory.

A manifest comes with the folder, so a stranger's is as little to be trusted as the rest: its
entries are checked before they are used, and no name in it leads out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mlpmem_rag.errors import ArtifactError, ConfigError

SMALL_BYTES = 2**20
"""Files up to this size are read whole also by the fast check: all but the weights."""
MAX_JSON_BYTES = 64 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Verify(StrEnum):
    """How thoroughly files are compared with their manifest.

    `full` compares every checksum and finds any change. `fast` compares the sizes of all files and
    the checksums of small ones: it finds what is missing, cut off, swapped for a file of another
    size, or changed in the settings, but not a bit that has flipped in the weights.
    """

    full = "full"
    fast = "fast"


def verify_mode(name: str) -> Verify:
    """The mode of that name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return Verify(name)
    except ValueError as error:
        raise ConfigError(f"verify = {name!r}: allowed are {', '.join(Verify)}") from error


@dataclass(frozen=True)
class Listed:
    """What a manifest says of a file."""

    sha256: str
    bytes: int


def problems(
    folder: Path,
    listed: Mapping[str, object],
    *,
    required: Collection[str],
    editable: Collection[str],
    how: Verify,
) -> Iterator[str]:
    """What is wrong with the files of a folder, each with its path and what to do; none: nothing.

    Args:
        folder: where the files are.
        listed: name -> {sha256, bytes}, as read from the manifest.
        required: names that must be listed.
        editable: names of files that must be there, but may have changed.
        how: how thoroughly.
    """
    for name in required:
        if name not in listed:
            yield f"the manifest of {folder} lists no {name}; train again"
    for name, entry in listed.items():
        problem = _problem(folder, name, parse_entry(entry), name in editable, how)
        if problem is not None:
            yield problem


def parse_entry(entry: object) -> Listed | None:
    """An entry of a manifest; None: it is none."""
    if not isinstance(entry, dict):
        return None
    sha256, size = entry.get("sha256"), entry.get("bytes")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        return None
    return Listed(sha256, size) if type(size) is int and size >= 0 else None


def is_inside(name: str) -> bool:
    """Whether a name stands for something below a folder, on every system."""
    return (
        name.isprintable()  # which lone halves of characters are not, either
        and not set(":\\") & set(name)  # drives and folders of Windows
        and not {"", ".", ".."} & set(name.split("/"))  # a first slash leaves "" before it
    )


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that is there.

    Raises:
        ArtifactError: it is too large, cannot be read, or is no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ArtifactError(f"{path} has {size} bytes, allowed are {MAX_JSON_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); train again") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged (no JSON object); train again")
    return content


def _problem(
    folder: Path, name: str, entry: Listed | None, editable: bool, how: Verify
) -> str | None:
    if not is_inside(name):
        return f"the manifest of {folder} lists {name!r}, which is not in the folder"
    if entry is None:
        return f"the manifest of {folder} says no SHA-256 and size of {name}; train again"
    path = folder / name
    if not path.is_file():
        return f"{path} is missing; train again or copy the folder anew"
    if editable:
        return None
    try:
        return _difference(path, entry, how)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"


def _difference(path: Path, entry: Listed, how: Verify) -> str | None:
    """Sizes first: they cost nothing, and say whether a file was cut off."""
    size = path.stat().st_size
    if size != entry.bytes:
        return (
            f"{path} was changed or is damaged: it has {size} bytes, the manifest says "
            f"{entry.bytes}; train again or copy the folder anew"
        )
    if how is Verify.fast and size > SMALL_BYTES:
        return None
    found = sha256(path)
    if found != entry.sha256:
        return (
            f"{path} was changed or is damaged: its SHA-256 is {found[:16]}…, the manifest "
            f"says {entry.sha256[:16]}…; train again or copy the folder anew"
        )
    return None
