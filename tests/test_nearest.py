"""The ways to the k smallest against a plain sort."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mlpmem_rag.nearest import (
    GROUP,
    grouped_smallest,
    partitioned_smallest,
    selected_smallest,
    smallest,
    squared_distances,
)

Find = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@pytest.mark.parametrize(
    "find", [smallest, partitioned_smallest, selected_smallest, grouped_smallest]
)
@pytest.mark.parametrize("columns", [4 * GROUP, 4 * GROUP + 7, 20 * GROUP])
@pytest.mark.parametrize("kind", ["distinct", "with ties", "rising"])
def test_the_smallest_are_those_of_a_sort(find: Find, columns: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(columns)
    numbers = {
        "distinct": torch.randn(9, columns, generator=generator),
        "with ties": torch.randint(0, 4, (9, columns), generator=generator).float(),
        "rising": torch.arange(9.0 * columns).view(9, columns),  # all in one group of columns
    }[kind]
    values, places = find(numbers, 4)
    assert torch.equal(values, numbers.sort(1).values[:, :4])
    assert torch.equal(numbers.gather(1, places), values)
    assert all(len(set(row)) == 4 for row in places.tolist())


@pytest.mark.parametrize("find", [smallest, partitioned_smallest, selected_smallest])
def test_all_columns_may_be_asked_for(find: Find) -> None:
    values, places = find(torch.tensor([[3.0, 1.0, 2.0]]), 3)
    assert (values.tolist(), places.tolist()) == ([[1.0, 2.0, 3.0]], [[1, 2, 0]])


@pytest.mark.parametrize("k", [1, 2, 40])
def test_any_number_of_neighbours_out_of_few_columns(k: int) -> None:
    numbers = torch.randn(6, 2 * GROUP, generator=torch.Generator().manual_seed(k))
    for find in (smallest, selected_smallest):
        values, places = find(numbers, k)
        assert torch.equal(values, numbers.sort(1).values[:, :k])
        assert torch.equal(places, numbers.argsort(1)[:, :k])


def test_a_single_row_needs_no_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    values, _ = partitioned_smallest(torch.tensor([[2.0, 0.0, 1.0]]), 2)
    assert values.tolist() == [[0.0, 1.0]]


def test_several_threads_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    expected = partitioned_smallest(numbers, 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for mine, theirs in zip(partitioned_smallest(numbers, 20), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_distances_are_those_of_differences() -> None:
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(5, 16)), rng.normal(size=(40, 16))
    expected = ((queries[:, None] - keys) ** 2).sum(2)
    given = (torch.from_numpy(array).float() for array in (queries, keys))
    q, x = given
    buffer = torch.empty(5, 40)
    found = squared_distances(q, x, x.square().sum(1), out=buffer)
    assert found is buffer  # which is filled block after block
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
