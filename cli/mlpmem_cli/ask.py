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
    from mlpmem_rag.provenance import Recalled


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
    read: Annotated[
        bool,
        typer.Option(
            "--read",
            help="Where the memory is not sure, have the base model read the sentence that it "
            "recalls: oftener right, and slower. Needs the training's work folder.",
        ),
    ] = False,
    verify: options.VerifyOption = Verify.full,
    as_json: options.JsonOption = False,
) -> None:
    """Answer questions from a memory, without retrieval.

    With --json, one object a line: answer, confidence (null where the memory cannot tell),
    seconds, ttft_seconds, prompt_tokens, new_tokens; with --read, sources (document and text of
    what was read).
    """
    asked = questions or _from_stdin()
    from mlpmem_cli import display
    from mlpmem_rag import MemoryModel
    from mlpmem_rag.provenance import Provenance

    display.quiet_libraries()
    console = display.stderr()
    provenance = Provenance.open(memory) if read else None
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
        recalled = model.recalled(question, provenance) if provenance else []
        if as_json or threshold or read:  # the end decides what is shown
            answer = model.answer(
                question,
                max_new_tokens=max_new_tokens,
                lambda_=lambda_,
                threshold=threshold,
                recalled=recalled,
            )
        else:
            stream = model.stream(question, max_new_tokens=max_new_tokens, lambda_=lambda_)
            for piece in stream:
                print(piece, end="", flush=True)
            answer = stream.answer
        sources = [source_fields(one) for one in recalled] if answer.read else []
        if as_json:
            told = {"sources": sources} if read else {}
            print(json.dumps(answer_fields(answer) | told, ensure_ascii=False), flush=True)
        else:
            print(answer.text if threshold or read else "", flush=True)
            for source in sources:
                line = f"{source['document']}: {source['text']}"
                console.print(line, style="dim", markup=False, highlight=False)
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


def source_fields(recalled: Recalled) -> dict[str, str]:
    """A sentence that was read, as `--json` prints it."""
    return {"document": recalled.question.document, "text": recalled.question.source}


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
