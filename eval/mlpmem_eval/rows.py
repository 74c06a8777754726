"""One arm's answer to one question, kept line by line so that a comparison can go on later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpmem_eval.questions import EvalQuestion


@dataclass(frozen=True)
class Row:
    """What an arm said and what it took; times in seconds.

    Attributes:
        arm: name of the arm.
        question: id of the question.
        key: what the answer depends on, as `row_key` gives it.
        text: the answer; empty where there is an error.
        error: why there is no answer.
        confidence: probability that the answer is right, as the arm tells.
        documents: retrieved documents; None where nothing is retrieved.
        route: which way the answer took.
        total: wall time of the answer.
        ttft: to the first piece of its text.
        retrieval: finding passages.
        embedding: of that, turning the question into a vector.
        prefill: reading prompts.
        decode: generating.
        share: wall time of all answers given at the same time, divided by their number.
        prompt_tokens: over all calls of the LLM.
        completion_tokens: likewise.
        llm_calls: number of them.
        peak_bytes: most memory in use meanwhile.
        joules: energy of this answer's share.
    """

    arm: str
    question: str
    key: str
    text: str = ""
    error: str | None = None
    confidence: float | None = None
    documents: tuple[str, ...] | None = None
    route: str | None = None
    total: float = 0.0
    ttft: float = 0.0
    retrieval: float = 0.0
    embedding: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    share: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    llm_calls: int = 0
    peak_bytes: int | None = None
    joules: float | None = None


def row_key(settings: dict[str, Any], question: EvalQuestion) -> str:
    """Equal for two rows exactly when the same was asked in the same way."""
    content = json.dumps([settings, question.text], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; one of an older format is left out."""
    rows = []
    for values in read_lines(path):
        try:
            documents = values["documents"]
            rows.append(Row(**values | {"documents": documents and tuple(documents)}))
        except (KeyError, TypeError):
            continue
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; a line that was cut short is left out, no file has none."""
    if not path.is_file():
        return []
    found = []
    # Not splitlines(): JSON strings may hold U+2028 and other separators as they are. A line may
    # end within a character, too.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the file."""
    append_lines(path, [asdict(row) for row in rows])


def append_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Add values to a jsonl file, handed to the system when this returns."""
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with path.open("a+b") as file:
        if file.tell() and not _ends_a_line(file):
            file.write(b"\n")  # the run before ended within a line
        file.write(lines.encode())
        file.flush()


def _ends_a_line(file: Any) -> bool:  # noqa: ANN401
    file.seek(-1, 2)
    last: bytes = file.read(1)
    return last == b"\n"
