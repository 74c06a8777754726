"""`mlpmem-rag chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mlpmem_cli import options
from mlpmem_rag.integrity import Verify

if TYPE_CHECKING:
    from mlpmem_rag.memory_model import MemoryModel

HELP = "Commands: /reset forgets the conversation, /exit ends (so does Ctrl-D)."


def chat(
    memory: options.MemoryArgument,
    max_new_tokens: options.MaxNewTokensOption = 256,
    lambda_: options.LambdaOption = None,
    base_model: options.BasePlaceOption = None,
    device: options.DeviceOption = options.Device.auto,
    dtype: options.DtypeOption = options.Dtype.auto,
    verify: options.VerifyOption = Verify.full,
) -> None:
    """Talk with a memory. Piped stdin works too: one message a line."""
    from mlpmem_cli import display
    from mlpmem_rag import MemoryModel

    display.quiet_libraries()
    model = MemoryModel.load(
        memory,
        base_model=base_model,
        device=device.value,
        dtype=dtype.value,
        verify=verify,
    )
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history for input()

        display.stderr().print(HELP, style="dim")
    messages: list[dict[str, str]] = []
    while (line := _read(interactive)) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            text = _reply(model, messages, max_new_tokens, lambda_)
            messages.append({"role": "assistant", "content": text})


def _read(interactive: bool) -> str | None:
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None


def _reply(
    model: MemoryModel,
    messages: list[dict[str, str]],
    max_new_tokens: int,
    lambda_: float | None,
) -> str:
    """Print a reply as it comes; Ctrl-C ends the reply, not the conversation."""
    stream = model.stream(messages, max_new_tokens=max_new_tokens, lambda_=lambda_)
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    print(flush=True)
    return stream.answer.text
