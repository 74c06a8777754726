"""One training by several processes: each learns a part of every step's rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlpmem_rag.distill import Lesson, Rows
from mlpmem_rag.memory import Memory
from mlpmem_rag.processes import Team


@contextmanager
def shared_out(lesson: Lesson, memory: Memory, team: Team) -> Iterator[Lesson]:
    """The lesson as a team learns it: each process a part of the rows, with the gradient of all.

    Every process takes the same steps: the loss is that of all rows, and each gradient becomes the
    mean over the processes as soon as it is there. Random numbers of a step depend on how many
    processes there are. One process alone learns the lesson itself.
    """
    if team.count == 1:
        yield lesson
        return
    hooks = [p.register_post_accumulate_grad_hook(_average) for p in memory.parameters()]
    yield _Part(lesson, team)
    for hook in hooks:
        hook.remove()


class _Part:
    """Every `count`th row of a lesson."""

    def __init__(self, lesson: Lesson, team: Team) -> None:
        self._lesson = lesson
        self._team = team
        self._numbers: torch.Generator | None = None

    def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
        """Mean loss of all rows. *Shape:* (R,) -> ()."""
        generator = self._own_numbers(generator)
        own = rows[self._team.index :: self._team.count]
        if not len(own):  # fewer rows than processes: no share in the loss, a place in the mean
            return _meaned(0.0 * self._lesson.loss(memory, rows[:1], generator))
        share = len(own) * self._team.count / len(rows)
        return _meaned(share * self._lesson.loss(memory, own, generator))

    def _own_numbers(self, shared: torch.Generator) -> torch.Generator:
        """Of this process: drawn from one seed, the noise on all their rows would be alike."""
        seed = self._team.count * shared.initial_seed() + self._team.index
        if self._numbers is None or self._numbers.initial_seed() != seed:  # another epoch
            self._numbers = torch.Generator(shared.device).manual_seed(seed)
        return self._numbers


def _average(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()


def _meaned(loss: Tensor) -> Tensor:
    """The mean over all processes, with the gradient of this one's."""
    out: Tensor = _Mean.apply(loss)  # type: ignore[no-untyped-call]
    return out


class _Mean(torch.autograd.Function):
    """Forward the mean, backward as if there were one process: `_average` does the rest."""

    @staticmethod
    def forward(_: Any, loss: Tensor) -> Tensor:  # noqa: ANN401  torch's own context
        """*Shape:* () -> ()."""
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        """*Shape:* () -> ()."""
        return gradient
