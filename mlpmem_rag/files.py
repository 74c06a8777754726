"""Finds the files that a folder, a name or a pattern stands for, with or without symbolic links.

Knows nothing of what is in a file.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from mlpmem_rag.errors import CorpusError

_ANY_DEPTH = "**"

# What may follow below a folder: patterns with a part for each level. An empty one stands for the
# place itself.
_Patterns = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """A file to read, or a place that can't be, and why."""

    path: Path
    problem: str | None = None


@dataclass(frozen=True)
class _Place:
    """A place on the walk, what it is without links, and what is looked for there."""

    path: Path
    real: str
    patterns: _Patterns

    @cached_property
    def is_folder(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def fits(self) -> bool:
        """Whether it's a file that was looked for, or a folder that may hold some."""
        return bool(self.patterns) and (
            any(self.patterns) if self.is_folder else () in self.patterns
        )

    @property
    def key(self) -> tuple[str, _Patterns]:
        """Equal where going there again would find nothing new."""
        return self.real, self.patterns if self.is_folder else frozenset()


def find_files(
    source: str | Path, *, follow_links: bool = False, exclude: Path | None = None
) -> tuple[Path, list[Found]]:
    """Find the files to read, sorted, and the folder that their names are relative to.

    Hidden files and folders are left out. A link that `source` names is followed, and those found
    on the way if `follow_links`. What can be reached without a link is found by that name then;
    what is reached a second time is a problem that gives the first name.

    Args:
        source: A folder, a file, or a glob pattern, in which `**` is any number of folders.
        follow_links: Whether to go where links lead, out of the folder too.
        exclude: A folder that isn't entered.

    Raises:
        CorpusError: If the path doesn't exist or the pattern matches nothing.
    """
    # Unlike Path.expanduser, this leaves a name such as "~$draft.docx" alone.
    path, given = Path(os.path.expanduser(source)), str(source)
    # An empty string, say of an unset variable, would stand for the working directory.
    if given and os.path.isdir(path):
        return path, _sorted(_search(path, (_ANY_DEPTH,), follow_links, exclude))
    if given and os.path.exists(path):
        return path.parent, [Found(path)]
    if not glob.has_magic(given):
        raise CorpusError(
            f"The corpus path {given!r} doesn't exist or can't be reached. Give a folder, a file, "
            "or a glob pattern such as 'docs/**/*.md'."
        )
    root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    pattern = path.parts[len(root.parts) :]
    found = _sorted(_search(root, pattern, follow_links, exclude)) if os.path.isdir(root) else []
    if not found:
        raise CorpusError(
            f"The pattern {given!r} matches no file. '**' stands for any number of folders, as in "
            "'docs/**/*.md'; a shell needs quotes around a pattern."
        )
    return root, found


def _sorted(found: Iterable[Found]) -> list[Found]:
    return sorted(found, key=lambda item: item.path)


def _search(
    root: Path, pattern: tuple[str, ...], follow_links: bool, exclude: Path | None
) -> Iterator[Found]:
    """Walk a folder and then, one after the other, the links that are met.

    `glob` goes through every link, and where two lead upwards it never comes back.
    """
    left_out = None if exclude is None else os.path.realpath(exclude)
    first_names: dict[tuple[str, _Patterns], Path] = {}
    places = [_Place(root, os.path.realpath(root), _expand([pattern]))]
    links: deque[_Place] = deque()
    while places or links:
        # Links wait until all that has a name without one is known by it.
        place = places.pop() if places else links.popleft()
        if not place.fits or (left_out and Path(place.real).is_relative_to(left_out)):
            continue
        first = first_names.setdefault(place.key, place.path)
        if first != place.path:
            kind = "folder" if place.is_folder else "file"
            yield Found(place.path, f"same {kind} as {first.relative_to(root).as_posix()}")
        elif not place.is_folder:
            yield Found(place.path)
        elif (children := _children(place)) is None:
            yield Found(place.path, "unreadable folder")
        else:
            for child in children:
                if not os.path.islink(child.path):
                    places.append(child)
                elif follow_links:
                    links.append(child)
                elif child.fits:
                    yield Found(child.path, "symbolic link, not followed")


def _children(folder: _Place) -> list[_Place] | None:
    """What is in a folder, sorted; None if it can't be opened."""
    try:
        paths = sorted(folder.path.iterdir())
    except OSError:
        return None
    return [
        _Place(
            path,
            os.path.realpath(path)
            if os.path.islink(path)
            else os.path.join(folder.real, path.name),
            _step(folder.patterns, path.name),
        )
        for path in paths
    ]


def _step(patterns: _Patterns, name: str) -> _Patterns:
    """What of some patterns remains below a child of that name."""
    remaining = []
    for first, *rest in filter(None, patterns):
        if name.startswith(".") and not first.startswith("."):
            continue
        if first == _ANY_DEPTH:
            remaining.append((first, *rest))
        elif fnmatch.fnmatch(name, first):
            remaining.append(tuple(rest))
    return _expand(remaining)


def _expand(patterns: Iterable[tuple[str, ...]]) -> _Patterns:
    """Add what patterns are where `**` stands for no folder at all."""
    expanded = set()
    for pattern in patterns:
        expanded.add(pattern)
        while pattern and pattern[0] == _ANY_DEPTH:
            pattern = pattern[1:]
            expanded.add(pattern)
    return frozenset(expanded)
