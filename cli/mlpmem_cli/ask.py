"""`mlpmem-rag ask`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mlpmem_cli import options
from mlpmem_rag.integrity import Verify

if TYPE_CHECKING:
    from mlpmem_rag.generation import Answer


def ask(
    memory: options.MemoryArgument,
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions; without any, one a line on stdin.")
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = 128,
    lambda_: options.LambdaOption = None,
    base_model: options.BasePlaceOption = None,
    device: options.DeviceOption = options.Device.auto,
    dtype: options.DtypeOption = options.Dtype.auto,
    threshold: options.ThresholdOption = 0.0,
    verify: options.VerifyOption = Verify.full,
    as_json: options.JsonOption = False,
) -> None:
    """Answer questions from a memory, without retrieval.

    With --json, one object a line: answer, confidence (null where the memory cannot tell),
    seconds, ttft_seconds, prompt_tokens, new_tokens.
    """
    asked = questions or _from_stdin()
    from mlpmem_cli import display
    from mlpmem_rag import MemoryModel

    display.quiet_libraries()
    console = display.stderr()
    model = MemoryModel.load(
        memory,
        base_model=base_model,
        device=device.value,
        dtype=dtype.value,
        verify=verify,
    )
    for question in asked:
        if len(asked) > 1 and not as_json:
            console.print(question, style="bold", markup=False, highlight=False)
        if as_json or threshold:  # the end decides what is shown
            answer = model.answer(
                question, max_new_tokens=max_new_tokens, lambda_=lambda_, threshold=threshold
            )
        else:
            stream = model.stream(question, max_new_tokens=max_new_tokens, lambda_=lambda_)
            for piece in stream:
                print(piece, end="", flush=True)
            answer = stream.answer
        if as_json:
            print(json.dumps(answer_fields(answer), ensure_ascii=False), flush=True)
        else:
            print(answer.text if threshold else "", flush=True)
            console.print(figures(answer), style="dim", highlight=False)


def answer_fields(answer: Answer) -> dict[str, str | float | int | None]:
    """The object that `--json` prints."""
    return {
        "answer": answer.text,
        "confidence": None if answer.confidence is None else round(answer.confidence, 4),
        "seconds": round(answer.seconds, 4),
        "ttft_seconds": round(answer.ttft_seconds, 4),
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
    }


def figures(answer: Answer) -> str:
    """One line about what an answer took."""
    sure = "" if answer.confidence is None else f"{answer.confidence:.0%} sure, "
    return (
        f"{sure}{answer.ttft_seconds:.2f} s to the first token, {answer.seconds:.2f} s in all, "
        f"{answer.prompt_tokens} + {answer.new_tokens} tokens"
    )


def _from_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a question, or pipe one a line into stdin")
    questions = [line.strip() for line in sys.stdin if line.strip()]
    if not questions:
        raise typer.BadParameter("stdin holds no question; give one, or one a line")
    return questions
