"""What requirements.lock promises: all that make setup installs, by hash, from anywhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LINUX = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
    "python_version": "3.11",
    "python_full_version": "3.11.9",
}


def entries(text: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a lock with its hashes."""
    lines = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for entry in lines.replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split(" --hash=")
        yield Requirement(requirement.strip()), [found.strip() for found in hashes]


def locked(text: str) -> dict[str, str]:
    """Versions by name that a lock asks for with Python 3.11 on Linux."""
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement, _ in entries(text)
        if requirement.marker is None or requirement.marker.evaluate(LINUX)
    }


def needed(*extras: str) -> set[str]:
    """Names of what the project itself asks for, with some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: set[str] = set()
    waiting = list(project["dependencies"])
    waiting += [text for extra in extras for text in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, waiting):
        if requirement.name == project["name"]:
            found |= needed(*requirement.extras)
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def test_every_entry_has_one_version_and_hashes_of_files() -> None:
    for requirement, hashes in entries(LOCK):
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for found in hashes), requirement


def test_no_place_is_named() -> None:
    assert not re.search(r"https?:|file:|^-|@", LOCK, re.MULTILINE)


def test_what_the_extras_ask_for_is_there() -> None:
    names = needed("cpu", "dev")
    assert {"torch", "faiss-cpu", "pytest", "peft", "llama-index-core"} <= names
    assert names <= locked(LOCK).keys()


def test_linux_gets_the_cpu_build_of_torch_and_nothing_of_cuda() -> None:
    versions = locked(LOCK)
    assert versions["torch"].endswith("+cpu")
    assert not [name for name in versions if re.match(r"nvidia-|cuda-|triton", name)]


def test_the_constraints_of_other_tools_are_the_same_versions() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "+" not in constraints  # any build of torch will do
    assert {str(requirement) for requirement, _ in entries(LOCK.replace("+cpu", ""))} <= {
        str(requirement) for requirement, _ in entries(constraints)
    }
    assert needed("cpu", "dev", "fuzz", "lm-eval", "mutants") <= locked(constraints).keys()
