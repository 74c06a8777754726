"""Made-up files of strangers: read or refused in words, whatever they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.targets import SUFFIXES, TARGETS, config, corpus, manifest, questions, seeds, weights

QUICK = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -1, 0, 2**63, "../x", "/etc/passwd", "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:  # noqa: ANN401
    """The ways to everything in a JSON value."""
    found = [path]
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            found += places(value[key], (*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn, target: str) -> bytes:
    """A valid file of which one to three values are something else, or gone, or one is new."""
    value = json.loads(seeds(target)[0])
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([path for path in places(value) if path]))
        inner = value
        for key in way:
            inner = inner[key]
        kind = draw(st.sampled_from(["other", "gone", "new"]))
        if kind == "gone":
            del inner[last]
        elif kind == "new" and isinstance(inner, dict):
            inner[draw(st.text(max_size=9))] = draw(JSON)
        else:
            inner[last] = draw(JSON)
        if len(places(value)) == 1:
            break
    return json.dumps(value).encode()


@pytest.mark.parametrize("target", TARGETS)
def test_what_fuzzing_begins_with_is_read(tmp_path: Path, target: str) -> None:
    for content in seeds(target):
        TARGETS[target](content, tmp_path)


@QUICK
@given(changed("manifest"))
def test_a_manifest_may_say_anything(tmp_path: Path, content: bytes) -> None:
    manifest(content, tmp_path)


@QUICK
@given(changed("config"))
def test_a_configuration_may_say_anything(tmp_path: Path, content: bytes) -> None:
    config(content, tmp_path)


@QUICK
@given(st.data())
def test_weights_may_be_anything(tmp_path: Path, data: st.DataObject) -> None:
    (whole,) = seeds("weights")
    place, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 20))
    weights(whole[:place] + data.draw(st.binary(max_size=20)) + whole[place + length :], tmp_path)


@QUICK
@given(st.lists(JSON.map(json.dumps) | changed("questions").map(bytes.decode), max_size=3))
def test_questions_may_be_anything(tmp_path: Path, lines: list[str]) -> None:
    questions("\n".join(lines).encode(), tmp_path)


@QUICK
@given(st.sampled_from(range(len(SUFFIXES))), st.text(max_size=300) | st.binary(max_size=300))
def test_a_document_may_be_anything(tmp_path: Path, suffix: int, content: str | bytes) -> None:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    corpus(bytes([suffix]) + data, tmp_path)


@QUICK
@given(st.sampled_from(range(len(SUFFIXES))), st.data())
def test_a_document_may_be_damaged(tmp_path: Path, suffix: int, data: st.DataObject) -> None:
    whole = seeds("corpus")[suffix]
    place, length = data.draw(st.integers(1, len(whole))), data.draw(st.integers(0, 40))
    corpus(whole[:place] + data.draw(st.binary(max_size=20)) + whole[place + length :], tmp_path)
