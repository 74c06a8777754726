"""Training, validation and test rows: disjoint, complete, whole documents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_rag.split import Split, split_rows


def rows_of(sizes: list[int]) -> npt.NDArray[np.int32]:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def owners(split: Split, documents: npt.NDArray[np.int32]) -> list[set[int]]:
    return [set(documents[part].tolist()) for part in (split.train, split.validation, split.test)]


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    held_out=st.floats(0, 0.25),
    seed=st.integers(0, 99),
)
def test_parts_are_disjoint_and_complete(sizes: list[int], held_out: float, seed: int) -> None:
    documents = rows_of(sizes)
    split = split_rows(documents, held_out=held_out, seed=seed)
    parts = (split.train, split.validation, split.test)
    together = np.concatenate(parts)
    np.testing.assert_array_equal(np.sort(together), np.arange(len(documents)))
    assert split.num_rows == len(documents)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    if split.by_document:
        train, validation, test = owners(split, documents)
        assert len(train) + len(validation) + len(test) == len(train | validation | test)


def test_many_documents_are_held_out_whole() -> None:
    documents = rows_of([20] * 100)
    split = split_rows(documents, held_out=0.1, seed=3)
    assert split.held_out_by == "document"
    assert [len(names) for names in owners(split, documents)] == [80, 10, 10]


def test_no_more_is_held_out_than_is_asked_for() -> None:
    documents = rows_of([20] * 100)
    split = split_rows(documents, held_out=0.1, seed=3, most=60)
    assert [len(names) for names in owners(split, documents)] == [94, 3, 3]


def test_the_seed_decides() -> None:
    documents = rows_of([7, 12, 30, 5] * 10)
    first, again, other = (split_rows(documents, held_out=0.1, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.test, again.test)
    np.testing.assert_array_equal(first.validation, again.validation)
    assert not np.array_equal(first.validation, other.validation)


def test_of_few_documents_the_tails_are_held_out() -> None:
    split = split_rows(rows_of([100, 200]), held_out=0.1, seed=0)
    assert split.held_out_by == "passage"
    assert split.validation.tolist() == [*range(80, 90), *range(260, 280)]
    assert split.test.tolist() == [*range(90, 100), *range(280, 300)]


@pytest.mark.parametrize("sizes", [[30, 30], [30] * 20])
@pytest.mark.parametrize("held_out", [0.0, 0.02])
def test_nothing_held_out(sizes: list[int], held_out: float) -> None:
    """Either nothing was asked for, or too little to measure anything on."""
    split = split_rows(rows_of(sizes), held_out=held_out, seed=0)
    assert len(split.train) == sum(sizes)
    assert split.validation.size == split.test.size == 0
    assert split.held_out_by is None


@pytest.mark.parametrize("seed", range(10))
def test_a_giant_document_is_never_held_out(seed: int) -> None:
    documents = rows_of([2000, *[50] * 40])
    split = split_rows(documents, held_out=0.05, seed=seed)
    train, validation, test = owners(split, documents)
    assert 0 in train
    assert validation
    assert test


def test_where_all_documents_are_too_large_the_tails_are_held_out() -> None:
    split = split_rows(rows_of([101] * 10), held_out=0.049, seed=0)
    assert split.held_out_by == "passage"
    assert len(split.validation) == len(split.test) == 40


def test_of_many_long_documents_some_ends_are_held_out() -> None:
    documents = np.repeat(np.arange(40, dtype=np.int32), 4000)
    split = split_rows(documents, held_out=0.05, seed=0, most=1000)
    assert not split.by_document
    counts = np.bincount(documents[split.test], minlength=40)
    assert sorted(counts) == [0] * 35 + [200] * 5
    assert np.array_equal(counts, np.bincount(documents[split.validation], minlength=40))
    for document in np.flatnonzero(counts):
        rows = np.flatnonzero(documents == document)
        assert np.array_equal(split.test[np.isin(split.test, rows)], rows[-200:])
        assert np.array_equal(split.validation[np.isin(split.validation, rows)], rows[-400:-200])
