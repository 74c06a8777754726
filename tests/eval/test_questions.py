"""Questions from every format; what is no question is named by its line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mlpmem_eval.questions import EvalQuestion, drawn, load_questions, written_questions
from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_with_all_fields_and_with_the_fewest(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": " Who? ", "answers": ["Ada", "Ada L."], "doc_ids": ["d1"]},
        {"question": "How many?", "answer": 42},
        {"id": 7, "question": "Why?", "answers": [], "answerable": False},
    ]
    path = write(tmp_path / "q.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    found = load_questions(path)
    assert found.questions == (
        EvalQuestion("a", "Who?", ("Ada", "Ada L."), ("d1",)),
        EvalQuestion("q3", "How many?", ("42",)),
        EvalQuestion("7", "Why?", (), (), answerable=False),
    )
    assert found.problems == ()


def test_a_damaged_row_of_a_csv_does_not_end_it(tmp_path: Path) -> None:
    rows = ["Q0?,a", 'B?,"y"z', *(f"Q{n}?,a" for n in range(1, 51))]
    found = load_questions(write(tmp_path / "q.csv", "\n".join(["question,answers", *rows])))
    assert [question.text for question in found.questions] == [f"Q{n}?" for n in range(51)]
    assert [line for line, _ in found.problems] == [3]


def test_a_csv_splits_its_lists_and_knows_its_lines(tmp_path: Path) -> None:
    text = (
        "id,question,answers,doc_ids,answerable\n"
        'a,"Who, then?",Ada | Ada L.,d1|d2,true\n'
        "b,Why?,,,no\n"
        "c,Where?,,,yes\n"
    )
    found = load_questions(write(tmp_path / "q.csv", text))
    assert found.questions == (
        EvalQuestion("a", "Who, then?", ("Ada", "Ada L."), ("d1", "d2")),
        EvalQuestion("b", "Why?", (), (), answerable=False),
    )
    assert found.problems == ((4, "no answers; give some, or answerable: false"),)


def test_a_labelled_rag_dataset(tmp_path: Path) -> None:
    content = {
        "examples": [
            {"query": "Who?", "reference_answer": "Ada", "reference_contexts": ["Ada did."]},
            {"query": "", "reference_answer": "nobody"},
            "nothing",
        ]
    }
    found = load_questions(write(tmp_path / "q.json", json.dumps(content)))
    assert found.questions == (EvalQuestion("q1", "Who?", ("Ada",)),)
    assert found.problems == ((2, "no question"), (3, "no JSON object, or a damaged row"))


def test_bad_rows_are_listed_by_line_and_the_rest_is_kept(tmp_path: Path) -> None:
    lines = [
        '{"id": "a", "question": "Who?", "answers": ["Ada"]}',
        "not json",
        '{"question": 3, "answers": ["x"]}',
        '{"id": "a", "question": "Who else?", "answers": ["Bob"]}',
        '{"question": "What?", "answers": [{"text": "x"}]}',
        '{"question": "When?", "answers": ["now"], "answerable": "perhaps"}',
        "[1, 2]",
        '{"question": "How?", "answers": ["x\\ud800"]}',
    ]
    path = write(tmp_path / "q.jsonl", "\n".join(lines))
    found = load_questions(path)
    assert [q.id for q in found.questions] == ["a"]
    assert [line for line, _ in found.problems] == [2, 3, 4, 5, 6, 7, 8]
    reasons = dict(found.problems)
    assert "line 1" in reasons[4]
    assert "perhaps" in reasons[6]
    assert "half of a character" in reasons[8]
    with pytest.raises(ConfigError, match="7 of 8 rows are no questions") as error:
        load_questions(path, strict=True)
    assert "line 2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("q.txt", "Who?", "allowed are .jsonl, .csv, .json"),
        ("q.jsonl", "", "0 of 0 rows"),
        ("q.jsonl", '{"question": "Who?"}', "no answers"),
        ("q.json", '{"rows": []}', "damaged"),
    ],
)
def test_a_file_without_questions_is_refused(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        load_questions(write(tmp_path / name, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(ConfigError, match="UTF-8"):
        load_questions(tmp_path / "latin.jsonl")


def documents() -> list[Document]:
    people = ("Ada Morris", "Ben Tully", "Cora Lund", "Dan Orr")
    return [
        Document(
            id=f"d{n}",
            text=f"The hobby of {name} is chess.\nThe father of {name} is Tom Orr.\n"
            f"{name} was born in 18{n}0 in Vienna.",
            title=None,
            source=f"d{n}.txt",
        )
        for n, name in enumerate(people)
    ]


def test_written_questions_are_spread_marked_and_repeatable() -> None:
    found = written_questions(documents(), 4, seed=3)
    assert [q.synthetic for q in found] == [True] * 4
    assert {q.doc_ids[0] for q in found} == {"d0", "d1", "d2", "d3"}  # one of each document
    assert all(q.answers and q.answerable for q in found)
    assert found == written_questions(documents(), 4, seed=3)
    assert found != written_questions(documents(), 4, seed=4)


def test_written_questions_leave_out_what_they_are_told_to() -> None:
    everything = {q.text for q in written_questions(documents(), 1000)}
    half = set(sorted(everything)[::2])
    rest = {q.text for q in written_questions(documents(), 1000, exclude=half)}
    assert rest == everything - half


def test_a_draw_is_by_chance_and_keeps_the_order() -> None:
    rows = list("abcdefghij")
    found = [drawn(rows, 4, seed) for seed in range(200)]
    assert all(len(one) == 4 and list(one) == sorted(set(one)) for one in found)
    assert drawn(rows, 4, 7) == found[7]
    times = Counter(row for one in found for row in one)
    assert set(times) == set(rows)
    assert 50 < min(times.values()) < max(times.values()) < 110
    assert drawn(rows, 0, 0) == drawn(rows, 10, 0) == drawn(rows, 11, 0) == tuple(rows)
