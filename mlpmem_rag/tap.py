"""The hidden state that a memory reads, taken while the base model runs.

`HiddenTap` puts its hook on for one run and can end the run there. A model that generates has a
`Tap`, whose hook stays for good: hooks that come and go would make torch.compile compile anew, or
keep a stale one. Both see the runs of their own thread alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlpmem_rag.errors import BaseModelError


class Tap:
    """A forward pre-hook that keeps the module's input for the thread that listens."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor | None] = {}
        self._traced: Tensor | None = None

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Called by torch before the module runs."""
        if torch.compiler.is_compiling():
            # Written and read in one graph: threads cannot meet.
            self._traced = _input(args, kwargs)
        elif (thread := threading.get_ident()) in self._states:
            self._states[thread] = _input(args, kwargs)

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
        return _captured(state)


def tap_on(module: nn.Module) -> Tap:
    """The tap of a module, put there if it has none."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, Tap):
            return hook
    tap = Tap()
    module.register_forward_pre_hook(tap, with_kwargs=True)
    return tap


class HiddenTap:
    """Takes the input of one module in the runs of a `with` block."""

    def __init__(self, module: nn.Module, *, stop: bool = False) -> None:
        self._module = module
        self._stop = stop
        self._state: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """The input of the last run. *Shape:* (B, T, D), or (B*T, D) where the model flattens it.

        Raises:
            BaseModelError: the module did not run.
        """
        return _captured(self._state)

    @contextlib.contextmanager
    def listen(self) -> Iterator[HiddenTap]:
        """Capture during the `with` block; forward passes of other threads are not seen."""
        owner = threading.get_ident()

        def capture(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
        ) -> None:
            if threading.get_ident() != owner:
                return
            self._state = _input(args, kwargs)
            if self._stop:
                raise _ReachedTap

        handle = self._module.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            yield self
        except _ReachedTap:
            pass
        finally:
            handle.remove()


class _ReachedTap(Exception):  # noqa: N818  control flow, not an error
    """Raised at the tapped module: no later layer needs to run."""


def _input(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Tensor:
    """The hidden state among what a module is called with; it is the first in every family.

    A hook gets no `kwargs` in a pass of another thread that meets it half registered.
    """
    state: Tensor = args[0] if args else next(iter((kwargs or {}).values()))
    return state


def _captured(state: Tensor | None) -> Tensor:
    if state is None:
        raise BaseModelError(
            "the base model ran without its tapped MLP sublayer: its layer stack is not standard; "
            "choose another base model"
        )
    return state
