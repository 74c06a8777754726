"""Self-study rows: for every token of an answer, the state before it and the question's vector.

The same keys as a datastore's, taken where they will be needed: after the question as it will be
asked. All prompts begin alike, and that beginning runs through the base model once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlpmem_rag.backbone import Backbone, Prefix
from mlpmem_rag.behind import behind
from mlpmem_rag.datastore import finite, key_source, on_host
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.late_interaction import WordRows
from mlpmem_rag.notes import Notes
from mlpmem_rag.processes import ALONE, Team
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.query import PooledEncoder, QueryEncoder, Vectors, encoded
from mlpmem_rag.questions import Question
from mlpmem_rag.storage import allocate_array, save_array
from mlpmem_rag.windows import TokenArray

BATCH_TOKENS = 2048
STATE = "study.json"


@dataclass(frozen=True)
class StudyRows:
    """Training rows of G questions, N rows in all.

    Attributes:
        keys: hidden states before each token of the answers. *Shape:* (N, D), float16.
        next_tokens: these tokens, the end of the answer included. *Shape:* (N,).
        questions: number of the question each row belongs to. *Shape:* (N,).
        query_vectors: of the questions. *Shape:* (G, Q).
        source_vectors: of the S sentences that answer them; zeros where the encoder does not place
            a sentence near its questions, as the base model's states do not. *Shape:* (S, Q).
        sources: number of the sentence that answers each question. *Shape:* (G,).
    """

    keys: npt.NDArray[np.float16]
    next_tokens: npt.NDArray[np.int32]
    questions: npt.NDArray[np.int32]
    query_vectors: Vectors
    source_vectors: Vectors
    sources: npt.NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.next_tokens)

    def save(self, folder: Path) -> None:
        """Write one `.npy` a field; keys that are mapped from there are there."""
        for field in fields(self):
            array, path = getattr(self, field.name), folder / f"{field.name}.npy"
            if isinstance(array, np.memmap) and str(array.filename) == str(path.resolve()):
                array.flush()
            else:
                save_array(path, array)

    @classmethod
    def open(cls, folder: Path) -> StudyRows:
        """Read what `save` wrote; the keys are mapped into memory."""
        arrays = {f.name: np.load(folder / f"{f.name}.npy", mmap_mode="r") for f in fields(cls)}
        return cls(**{n: a if n == "keys" else np.array(a) for n, a in arrays.items()})


def study_rows(
    backbone: Backbone,
    encoder: QueryEncoder | None,
    questions: Sequence[Question],
    *,
    words: WordRows | None = None,
    folder: Path | None = None,
    team: Team = ALONE,
    on_progress: OnProgress = ignore_progress,
) -> StudyRows:
    """Ask the base model every question and note its states along the right answer.

    A question too long for the context window is left without rows. Vectors are taken from `words`,
    where these are there. With a folder, keys are written
    to a file there as they come and mapped from it, so that memory does not grow with them; a call
    that was interrupted goes on where it last took note. The processes of a team need one: they
    take batches by turns and write into the same file, which is that of one process.

    Raises:
        ConfigError: there are no questions, or there is no folder for a team.
        BaseModelError: a hidden state does not fit into float16.
    """
    if folder is None and team.count > 1:
        raise ConfigError("several processes study together in a folder; give one")
    if not questions:
        raise ConfigError("there are no questions to study; write some, or give a larger corpus")
    runs = _runs(backbone, questions)
    room = backbone.context_window - (runs.prefix.length if runs.prefix else 0)
    order = [number for number in range(len(questions)) if len(runs.inputs[number]) <= room]
    counts = [len(runs.answers[number]) for number in order]
    firsts = dict(zip(order, (np.cumsum(counts) - counts).tolist(), strict=True))
    batches = _batches(runs.inputs, room)
    shape = sum(counts), backbone.hidden_size
    mine: Sequence[list[int]] = batches
    notes, before = None, 0
    if folder is None:
        keys = np.empty(shape, dtype=np.float16)
    else:
        path, content = folder / "keys.npy", _fingerprint(backbone, runs)
        expected = {"shape": list(shape), "batches": len(batches), "content": content}
        notes = Notes(folder / STATE, expected, team)
        notes.begin(partial(allocate_array, path, np.float16, shape))
        mine, before = notes.mine(batches)
        keys = np.load(path, mmap_mode="r+")

    def write(batch: list[int], arriving: Callable[[], Tensor]) -> int:
        states = finite(arriving().numpy())
        lengths = [len(runs.answers[number]) for number in batch]
        for number, rows in zip(batch, np.split(states, np.cumsum(lengths)[:-1]), strict=True):
            keys[firsts[number] : firsts[number] + len(rows)] = rows
        return len(batch)

    done, total = sum(map(len, mine[:before])), sum(map(len, mine))
    jobs = (partial(write, batch, on_host(runs.states(backbone, batch))) for batch in mine[before:])
    for number, written in enumerate(behind(jobs), before + 1):
        done += written
        if notes is not None:
            notes.take(number, [keys])
        on_progress(ProgressEvent("study", done, total, "questions"))
    if notes is not None:
        notes.finish([keys])
    distinct = list(dict.fromkeys(question.source for question in questions))
    number_of = {source: number for number, source in enumerate(distinct)}
    query_vectors, source_vectors = (
        _vectors(encoder, [question.text for question in questions], distinct, on_progress)
        if words is None
        else (words.query_vectors, words.source_vectors)
    )
    return StudyRows(
        keys=keys,
        next_tokens=np.concatenate([runs.answers[number] for number in order]),
        questions=np.repeat(np.array(order, dtype=np.int32), counts),
        query_vectors=query_vectors,
        source_vectors=source_vectors,
        sources=np.array([number_of[question.source] for question in questions], dtype=np.int32),
    )


def _vectors(
    encoder: QueryEncoder | None,
    asked: Sequence[str],
    sources: Sequence[str],
    on_progress: OnProgress,
) -> tuple[Vectors, Vectors]:
    """Of questions, and of the text that answers them: zeros where the base model encodes."""
    read = [] if isinstance(encoder, PooledEncoder) else sources
    total = len(asked) + len(read)

    def tell(done: int) -> None:
        on_progress(ProgressEvent("vectors", done, total, "texts"))

    query_vectors = encoded(encoder, asked, tell)
    source_vectors = encoded(encoder, read, lambda done: tell(len(asked) + done))
    if not read:
        source_vectors = np.zeros((len(sources), query_vectors.shape[1]), np.float32)
    return query_vectors, source_vectors


@dataclass(frozen=True)
class _Runs:
    """What the base model reads for each question.

    Attributes:
        shared: what all prompts begin with.
        prefix: the base model after that; None: it is nothing.
        inputs: the rest of the prompt, and the answer without its last token.
        answers: the answer.
    """

    shared: list[int]
    prefix: Prefix | None
    inputs: list[TokenArray]
    answers: list[TokenArray]

    def states(self, backbone: Backbone, batch: Sequence[int]) -> Tensor:
        """Before each token of the answers, question after question. *Shape:* B -> (R, D)."""
        lengths = [len(self.inputs[number]) for number in batch]
        token_ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        for line, number in enumerate(batch):
            token_ids[line, : lengths[line]] = torch.from_numpy(self.inputs[number])
        token_ids = token_ids.to(backbone.device)
        hidden = (
            backbone.hidden(token_ids, torch.ones_like(token_ids))
            if self.prefix is None
            else backbone.hidden_after(self.prefix, token_ids)
        )
        counts = [len(self.answers[number]) for number in batch]
        ends = zip(hidden, lengths, counts, strict=True)
        return torch.cat([states[end - count : end] for states, end, count in ends])


def _runs(backbone: Backbone, questions: Sequence[Question]) -> _Runs:
    tokenizer = backbone.tokenizer
    prompts = [
        np.array(prompt_ids(tokenizer, [{"role": "user", "content": q.text}]), dtype=np.int32)
        for q in questions
    ]
    answers = [np.array(answer_ids(tokenizer, q.answer), dtype=np.int32) for q in questions]
    shared = _common_beginning(prompts)[: min(map(len, prompts)) - 1]
    inputs = [
        np.concatenate([p, a])[len(shared) : -1] for p, a in zip(prompts, answers, strict=True)
    ]
    return _Runs(shared, backbone.prefix(shared) if shared else None, inputs, answers)


def _fingerprint(backbone: Backbone, runs: _Runs) -> str:
    """What decides the keys and their order: their source, and what is read together."""
    digest = hashlib.sha256(f"{key_source(backbone)} {BATCH_TOKENS} {runs.shared}".encode())
    for tokens in (*runs.inputs, *runs.answers):
        digest.update(f"{len(tokens)} ".encode() + tokens.tobytes())
    return digest.hexdigest()


def _common_beginning(sequences: Sequence[TokenArray]) -> list[int]:
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return [int(tokens[0]) for tokens in alike]


def _batches(inputs: Sequence[TokenArray], limit: int) -> list[list[int]]:
    """Numbers of inputs of like length, longest first, padding counted."""
    fitting = (number for number in range(len(inputs)) if len(inputs[number]) <= limit)
    batches: list[list[int]] = []
    for number in sorted(fitting, key=lambda n: len(inputs[n]), reverse=True):
        batch = batches[-1] if batches else []
        if not batch or len(inputs[batch[0]]) * (len(batch) + 1) > BATCH_TOKENS:
            batches.append(batch := [])
        batch.append(number)
    return batches
