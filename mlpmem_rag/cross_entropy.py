"""Cross-entropy of a linear head against sparse targets, with its gradient made on the way.

Rows x vocabulary is by far the largest array of a training step. Here it exists once, in the
number format of the product: each piece of it becomes probabilities, then the gradient, in place,
and what leaves is the gradient of states and head alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**24
"""Logits that exist at once."""
PIECE = 2**20
"""Logits that are float32 at once, on CPUs: what their caches hold."""


@dataclass(frozen=True)
class SparseTargets:
    """What each row is to predict: some columns with weights, and a share for all columns alike.

    Attributes:
        columns: *Shape:* (R, M).
        weights: of the columns; 0 where there are fewer. *Shape:* (R, M).
        spread: probability spread evenly over all columns. *Shape:* (R,).
        least: what a perfect prediction would cost, taken off the loss: a divergence counts from
            the entropy of its targets. *Shape:* (R,).
    """

    columns: Tensor
    weights: Tensor
    spread: Tensor
    least: Tensor

    def __len__(self) -> int:
        """R."""
        return len(self.columns)

    def rows(self, first: int, last: int) -> SparseTargets:
        """Those of some rows."""
        return SparseTargets(*(getattr(self, field.name)[first:last] for field in fields(self)))


def joined(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Those of all rows, one part after the other."""
    width = max(part.columns.shape[1] for part in parts)
    return SparseTargets(
        torch.cat([_widened(part.columns, width) for part in parts]),
        torch.cat([_widened(part.weights, width) for part in parts]),
        torch.cat([part.spread for part in parts]),
        torch.cat([part.least for part in parts]),
    )


def _widened(places: Tensor, width: int) -> Tensor:
    return F.pad(places, (0, width - places.shape[1]))


def cross_entropy(
    states: Tensor, head: Tensor, targets: SparseTargets, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Mean over rows of `-sum(target * log softmax(head @ state))`, less `least`.

    The products are taken in `dtype`, everything between them in float32.
    *Shapes:* states (R, W), head (V, W) -> ().
    """
    loss: Tensor = _CrossEntropy.apply(states, head, targets, dtype)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch's own context
        states: Tensor,
        head: Tensor,
        targets: SparseTargets,
        dtype: torch.dtype,
    ) -> Tensor:
        """Loss and both gradients. *Shape:* ()."""
        x, w = states.detach().to(dtype), head.detach().to(dtype)
        losses = torch.empty(len(x), device=x.device)
        state_gradient = torch.empty_like(x)
        head_gradient: Tensor | None = None
        rows = max(1, BLOCK // len(w))
        for first in range(0, len(x), rows):
            block = slice(first, first + rows)
            gradient = x[block] @ w.T  # logits yet
            losses[block] = _into_gradient(gradient, targets.rows(first, first + rows), len(x))
            torch.mm(gradient, w, out=state_gradient[block])
            part = (gradient.T @ x[block]).to(head.dtype)
            head_gradient = part if head_gradient is None else head_gradient.add_(part)
        ctx.save_for_backward(state_gradient.to(states.dtype), head_gradient)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        """*Shapes:* () -> (R, W), (V, W)."""
        states, head = ctx.saved_tensors
        if gradient.device.type == "cpu" and gradient.item() == 1:
            return states, head, None, None
        return states * gradient, head * gradient, None, None


def _into_gradient(logits: Tensor, targets: SparseTargets, count: int) -> Tensor:
    """Each row's loss; the logits become the gradient of the mean over `count` rows.

    *Shape:* (B, V) -> (B,).
    """
    on_cpu = logits.device.type == "cpu"
    rows = max(1, PIECE // logits.shape[1]) if on_cpu else len(logits)
    losses = [
        _piece_into_gradient(piece, targets.rows(first, first + rows), count)
        for first, piece in zip(range(0, len(logits), rows), logits.split(rows), strict=True)
    ]
    return torch.cat(losses)


def _piece_into_gradient(logits: Tensor, targets: SparseTargets, count: int) -> Tensor:
    values = logits.float()
    values.sub_(values.amax(1, keepdim=True))
    total = targets.weights.sum(1) + targets.spread
    wanted = (targets.weights * values.gather(1, targets.columns)).sum(1)
    wanted += targets.spread * values.mean(1)
    sums = values.exp_().sum(1)
    values.mul_((total / (sums * count))[:, None])
    values.sub_((targets.spread / (count * values.shape[1]))[:, None])
    values.scatter_add_(1, targets.columns, targets.weights / -count)
    logits.copy_(values)
    return total * sums.log() - wanted - targets.least
