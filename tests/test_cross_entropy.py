"""Loss and gradients beside those of torch's own cross-entropy on the dense targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag import cross_entropy as module
from mlpmem_rag.cross_entropy import SparseTargets, cross_entropy, joined

ROWS, WIDTH, VOCABULARY, PLACES = 37, 8, 23, 5


def random_targets(seed: int, rows: int = ROWS, places: int = PLACES) -> SparseTargets:
    """Columns that come more than once in a row, places of weight 0, any total."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, places, generator=generator)
    weights[:, -1] = 0
    return SparseTargets(
        torch.randint(VOCABULARY, (rows, places), generator=generator),
        weights,
        torch.rand(rows, generator=generator),
        torch.rand(rows, generator=generator),
    )


def random_head(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = 3 * torch.randn(ROWS, WIDTH, generator=generator)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return states.requires_grad_(), head.requires_grad_()


def dense(targets: SparseTargets) -> Tensor:
    """The same targets, all columns written out."""
    spread = targets.spread[:, None] / VOCABULARY
    return spread.expand(-1, VOCABULARY).scatter_add(1, targets.columns, targets.weights)


def by_torch(states: Tensor, head: Tensor, targets: SparseTargets) -> Tensor:
    """In float64, by automatic differentiation."""
    logits = states.double() @ head.double().T
    return F.cross_entropy(logits, dense(targets).double()) - targets.least.mean()


@pytest.mark.parametrize("block", [module.BLOCK, 10 * VOCABULARY, 1], ids=["whole", "ten", "one"])
@pytest.mark.parametrize("piece", [module.PIECE, 3 * VOCABULARY, 1], ids=["whole", "three", "one"])
def test_loss_and_gradients_in_any_number_of_parts(
    monkeypatch: pytest.MonkeyPatch, block: int, piece: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "PIECE", piece)
    (states, head), targets = random_head(), random_targets(1)
    found, expected = cross_entropy(states, head, targets), by_torch(states, head, targets)
    torch.testing.assert_close(found.double(), expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [states, head]),
        torch.autograd.grad(expected, [states, head]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_share_of_the_loss_has_a_share_of_the_gradient() -> None:
    (states, head), targets = random_head(), random_targets(1)
    whole = torch.autograd.grad(cross_entropy(states, head, targets), [states, head])
    part = torch.autograd.grad(0.25 * cross_entropy(states, head, targets) + 1, [states, head])
    torch.testing.assert_close(part, tuple(gradient / 4 for gradient in whole))


def test_extreme_logits_stay_finite() -> None:
    states, head = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.0]])
    targets = SparseTargets(
        torch.tensor([[0], [1]]), torch.ones(2, 1), torch.zeros(2), torch.zeros(2)
    )
    states.requires_grad_()
    loss = cross_entropy(states, head.requires_grad_(), targets)
    assert loss.item() == pytest.approx(1e4)  # the mean of 0 and 2e4
    (gradient,) = torch.autograd.grad(loss, [states])
    torch.testing.assert_close(gradient, torch.tensor([[0.0], [1.0]]))


def test_in_bfloat16_it_is_near() -> None:
    (states, head), targets = random_head(), random_targets(1)
    found = cross_entropy(states, head, targets, torch.bfloat16)
    expected = by_torch(states, head, targets)
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    for mine, theirs in zip(
        torch.autograd.grad(found, [states, head]),
        torch.autograd.grad(expected, [states, head]),
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.999


def test_joined_targets_are_those_of_each_part() -> None:
    states, head = random_head()
    first, second = random_targets(1, rows=30, places=2), random_targets(2, rows=7, places=6)
    both = joined([first, second])
    assert len(both) == ROWS
    expected = 30 * cross_entropy(states[:30], head, first) + 7 * cross_entropy(
        states[30:], head, second
    )
    torch.testing.assert_close(cross_entropy(states, head, both), expected / ROWS)
