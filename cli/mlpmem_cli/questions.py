"""`mlpmem-rag questions`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlpmem_cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from mlpmem_rag.questions import Question, QuestionWriter


def questions(
    corpus: options.CorpusArgument,
    written_by: options.QuestionsOption = None,
    base_model: options.BaseModelOption = None,
    llm: Annotated[
        str | None,
        typer.Option(
            help="A LlamaIndex LLM writes too: MODULE:NAME or FILE.py:NAME, with ?key=value&…."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write all of them to a jsonl file as well.")
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="How many to show, spread over the corpus; 0: all.")
    ] = 20,
    strict: options.StrictOption = False,
    follow_links: options.FollowLinksOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Preview the questions that can be written from a corpus, with their answers.

    With --out they are in a file, which train --questions FILE takes.
    """
    from mlpmem_cli import display
    from mlpmem_rag.backbone import load_backbone
    from mlpmem_rag.corpus import read_corpus
    from mlpmem_rag.embedded import SMOLLM2
    from mlpmem_rag.questions import BASE_MODEL, RULES, save_questions
    from mlpmem_rag.writers import write_questions

    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no folder {out.parent}; make it first")
    console = display.stderr()
    with display.progress_bars(console) as on_progress:
        read = read_corpus(
            corpus, strict=strict, follow_links=follow_links, on_progress=on_progress
        )
        sources: list[str | QuestionWriter] = [*(written_by or ([] if llm else [RULES]))]
        if llm:
            sources.append(_written_by(llm))
        backbone = load_backbone(base_model or SMOLLM2) if BASE_MODEL in sources else None
        written = write_questions(sources, read.documents, backbone, on_progress=on_progress)
    display.show_skipped(console, read)
    if out is not None:
        save_questions(written, out)
    step = max(1, len(written) // show) if show else 1
    shown = written[::step][: show or None]
    if as_json:
        for question in shown:
            typer.echo(json.dumps(asdict(question), ensure_ascii=False))
    else:
        display.stdout().print(_table(shown))
    number = f"{len(written):,} questions from {len(read.documents):,} documents"
    console.print(number if out is None else f"{number}, written to {out}", markup=False)


def _written_by(name: str) -> QuestionWriter:
    from mlpmem_eval.named_llm import load_llm
    from mlpmem_rag.language_writer import LanguageModelWriter

    llm = load_llm(name)
    return LanguageModelWriter(lambda prompts: [llm.complete(prompt).text for prompt in prompts])


def _table(shown: list[Question]) -> Table:
    from rich.table import Table

    from mlpmem_cli.display import plain

    table = Table("question", "answer", "document")
    for question in shown:
        table.add_row(plain(question.text), plain(question.answer), plain(question.document))
    return table
