"""Matrix products of a few rows, as generation takes them for every token, on CPUs.

For `x @ weight.T` with few rows, torch's libraries lay out the weights anew first. With the
operands exchanged, `weight @ x.T`, they are read as they lie. In bfloat16 that takes three quarters
of the time where they come from main memory and a quarter where they are in a cache, and up to 32
rows both give the same bits; where a trial says otherwise, nothing is exchanged.

In float32 it depends on the processor. On AMD's, MKL takes two to eight rows in a third to two
thirds of the time so, and even one row is faster taken twice, as a matrix, than as a vector: 100
instead of 129 ms for a token of SmolLM2-135M. On Intel's, one to three rows take twice the time
exchanged, and four to 32 between half and all of it. And sums are taken in another order and last
bits differ: a base model's products are exchanged only inside `other_order`, a memory's always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpmem_rag.hardware import is_amd

FEW = 32
"""Rows up to which both ways give the same bits in bfloat16."""
ALIGNED = 16
"""Bytes: where float32 weights lie otherwise, as in a mapped file, MKL sums in another order."""

_any_order: ContextVar[bool] = ContextVar("_any_order", default=False)


class Linear(nn.Linear):
    """torch's own, faster for a few rows without a gradient on a CPU."""

    exact = False
    """Whether its results are to have the bits of torch's own outside `other_order`."""

    def forward(self, input: Tensor) -> Tensor:
        """*Shape:* (..., in) -> (..., out)."""
        rows = input.numel() // self.in_features
        if not self._is_free(input) or rows not in few(input.dtype):
            return super().forward(input)
        out = _exchanged(input.reshape(-1, self.in_features), self.weight)
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], self.out_features)

    def _is_free(self, input: Tensor) -> bool:
        """Whether the product may be taken another way; float32 weights then lie as MKL likes."""
        if not (
            input.dtype == self.weight.dtype
            and input.device.type == self.weight.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            return False
        if input.dtype == torch.bfloat16:
            return self.bias is None
        if input.dtype != torch.float32 or (self.exact and not _any_order.get()):
            return False
        if self.weight.data_ptr() % ALIGNED:
            with torch.inference_mode(False):
                self.weight.data = self.weight.data.clone()
        return True


class ExactLinear(Linear):
    """As torch's own to the last bit, unless inside `other_order`."""

    exact = True


def quicken(model: nn.Module) -> None:
    """Have all of a model's own linear layers take few rows the fast way, with the same bits."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ExactLinear


@contextmanager
def other_order() -> Iterator[None]:
    """Inside, the last bits of products need not be torch's own."""
    token = _any_order.set(True)
    try:
        yield
    finally:
        _any_order.reset(token)


def _exchanged(rows: Tensor, weight: Tensor) -> Tensor:
    """*Shapes:* (R, in), (out, in) -> (R, out)."""
    if len(rows) > 1:
        return (weight @ rows.T).T.contiguous()
    if weight.dtype == torch.bfloat16:
        return torch.mv(weight, rows[0])[None]
    return (weight @ rows.repeat(2, 1).T)[:, 0][None].contiguous()


@cache
def few(dtype: torch.dtype) -> range:
    """Numbers of rows for which exchanging pays on this processor."""
    if dtype == torch.bfloat16:
        return range(1, FEW + 1) if same_bits() else range(0)
    if dtype != torch.float32 or not torch.backends.mkl.is_available():
        return range(0)
    return range(1, 65) if is_amd(torch.cpu.get_capabilities()) else range(4, 33)


@cache
def same_bits() -> bool:
    """Whether a trial of both ways in bfloat16 differs in no bit on this machine."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 1024, generator=generator).bfloat16()
    counts = (1, 2, 7, 16, FEW)
    trials = (torch.randn(n, 1024, generator=generator).bfloat16() for n in counts)
    return all(torch.equal(_exchanged(x, weight), F.linear(x, weight)) for x in trials)
