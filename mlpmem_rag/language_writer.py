"""Questions written by a language model, and answered again by it before they are believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.markup import readable
from mlpmem_rag.passages import answering_sentence, passages
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.prompts import left_padded
from mlpmem_rag.questions import Question
from mlpmem_rag.scoring import token_f1

Completer = Callable[[Sequence[str]], list[str]]
"""Continues each prompt; what follows the first line of a continuation is not used."""

PASSAGE_WORDS = 60
QUESTIONS_PER_PASSAGE = 4
ROUND_TRIP_F1 = 0.6
"""How far the model's answer to its own question must agree with the answer it had in mind."""
BATCH = 16

_STARTS = ("What", "Who", "When", "Where", "How", "Which")
_SHOTS = (
    (
        "The lighthouse at Skagen was finished in 1858 after two years of work. It was designed "
        "by N. S. Nebelong.",
        ("Who drew the plans for Skagen's lighthouse?", "N. S. Nebelong"),
        ("When was the lighthouse at Skagen completed?", "1858"),
    ),
    (
        "Copper conducts electricity better than iron, which is why wires are made of it.",
        ("What are wires made of?", "Copper"),
        ("Which metal is a worse conductor than copper?", "iron"),
    ),
)


class LanguageModelWriter:
    """Writes questions with any language model that continues text.

    For a LlamaIndex LLM: `LanguageModelWriter(lambda ps: [llm.complete(p).text for p in ps])`; for
    training, `save_questions` puts what it writes into a file.
    A question is kept when its answer stands in the passage, the question does not give it away,
    and the model, asked again, answers alike (round trip).
    """

    def __init__(self, complete: Completer) -> None:
        self._complete = complete

    def write(
        self, documents: Sequence[Document], *, on_progress: OnProgress = ignore_progress
    ) -> Iterator[Question]:
        """Yield questions, document by document, none twice."""
        todo = [(d, p) for d in documents for p in passages(readable(d.text), PASSAGE_WORDS)]
        seen: set[tuple[str, str]] = set()
        for first in range(0, len(todo), BATCH):
            for question in self._written(todo[first : first + BATCH]):
                if (pair := (question.text, question.answer)) not in seen:
                    seen.add(pair)
                    yield question
            done = min(first + BATCH, len(todo))
            on_progress(ProgressEvent("questions", done, len(todo), "passages"))

    def _written(self, batch: Sequence[tuple[Document, str]]) -> list[Question]:
        starts = _STARTS[:QUESTIONS_PER_PASSAGE]
        asked = [(d, p, start) for d, p in batch for start in starts]
        lines = self._complete([_asking(p, start) for _, p, start in asked])
        drafts = [
            (d, p, text)
            for (d, p, start), line in zip(asked, lines, strict=True)
            if (text := _question(start, line)) is not None
        ]
        # The answer is given twice: with the question's examples, and without.
        answers = self._complete([_answering(p, text) for _, p, text in drafts])
        again = self._complete([_answering(p, text, shots=False) for _, p, text in drafts])
        return [
            Question(text, answer, source, document.id)
            for (document, passage, text), given, other in zip(drafts, answers, again, strict=True)
            if (answer := _first_line(given).rstrip("."))
            and answer.lower() not in text.lower()
            and (source := answering_sentence(passage, text, answer)) is not None
            and token_f1(_first_line(other), [answer]) >= ROUND_TRIP_F1
        ]


def base_model_completer(backbone: Backbone, *, max_new_tokens: int = 32) -> Completer:
    """The base model itself, greedily."""
    tokenizer, model = backbone.tokenizer, backbone.model

    @torch.inference_mode()
    def complete(prompts: Sequence[str]) -> list[str]:
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        texts = []
        for first in range(0, len(prompts), BATCH):
            ids = [list(tokenizer(p)["input_ids"]) for p in prompts[first : first + BATCH]]
            padded, mask = left_padded(ids, pad)
            output = model.generate(  # type: ignore[operator]
                padded.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                pad_token_id=pad,
                stop_strings=["\n"],
                tokenizer=tokenizer,
            )
            texts += tokenizer.batch_decode(output[:, padded.shape[1] :], skip_special_tokens=True)
        return texts

    return complete


def _asking(passage: str, start: str) -> str:
    shots = "".join(
        f"Passage: {text}\nQuestion: {question}\n\n"
        for text, *pairs in _SHOTS
        for question, _ in pairs
    )
    return f"{shots}Passage: {passage}\nQuestion: {start}"


def _answering(passage: str, question: str, *, shots: bool = True) -> str:
    examples = "".join(
        f"Passage: {text}\nQuestion: {q}\nAnswer: {a}\n\n"
        for text, *pairs in _SHOTS
        for q, a in pairs
    )
    return f"{examples if shots else ''}Passage: {passage}\nQuestion: {question}\nAnswer:"


def _question(start: str, line: str) -> str | None:
    text = f"{start}{_first_line(line, strip=False)}".strip()
    return text if text.endswith("?") and 3 < len(text.split()) <= 30 else None


def _first_line(text: str, *, strip: bool = True) -> str:
    line = text.lstrip("\n").split("\n")[0] if strip else text.split("\n")[0]
    return line.strip() if strip else line
