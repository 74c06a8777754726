"""The hidden state that a memory reads, taken while the base model runs.

One hook stays on the tapped module for good: hooks that come and go would make torch.compile
compile anew, or keep a stale one.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from mlpmem_rag.errors import BaseModelError


class Tap:
    """A forward pre-hook that keeps the module's input for the thread that listens."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor | None] = {}
        self._traced: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called by torch before the module runs."""
        state = args[0] if args else next(iter(kwargs.values()))
        if torch.compiler.is_compiling():
            self._traced = state  # written and read in one graph: threads cannot meet
        elif (thread := threading.get_ident()) in self._states:
            self._states[thread] = state

    def listen(self) -> None:
        """Keep what comes next in this thread."""
        if not torch.compiler.is_compiling():
            self._states[threading.get_ident()] = None

    def take(self) -> Tensor:
        """The input since `listen`. *Shape:* (B, T, D), or (B*T, D) where the model flattens it.

        Raises:
            BaseModelError: the module did not run.
        """
        if torch.compiler.is_compiling():
            state, self._traced = self._traced, None
        else:
            state = self._states.pop(threading.get_ident(), None)
        if state is None:
            raise BaseModelError(
                "the base model ran without its tapped MLP sublayer: its layer stack is not "
                "standard; choose another base model"
            )
        return state


def tap_on(module: nn.Module) -> Tap:
    """The tap of a module, put there if it has none."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, Tap):
            return hook
    tap = Tap()
    module.register_forward_pre_hook(tap, with_kwargs=True)
    return tap
