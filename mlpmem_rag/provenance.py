"""Which training rows taught an answer: found in the datastore that training kept.

Beforehand, a request is recalled as learned questions, and each was written from a sentence.
Afterwards, every token of an answer is looked up among the rows that hold this very token: the one
whose input, hidden state and query vector, lies nearest to the answer's. These rows are what the
memory was trained on; that no others had a part in it cannot be said of any network.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mlpmem_rag.artifact import WORK, load_manifest
from mlpmem_rag.contexts import Contexts
from mlpmem_rag.corpus import Corpus
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.memory import Candidates, Memory
from mlpmem_rag.questions import Question, load_questions
from mlpmem_rag.recall import question_keys
from mlpmem_rag.storage import write_json
from mlpmem_rag.study import StudyRows

DOCUMENTS = "documents.json"
PASSAGE_TOKENS = 64

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Origin:
    """The training row that one token of an answer comes from.

    Attributes:
        document: id of the row's document.
        question: the question whose answer the row belongs to; None: a row of the text itself.
        source: the sentence that answers the question (empty for a row of the text).
        position: place of the token in its document (-1 for a row of a question).
        distance: squared, in the space that the memory reads.
    """

    document: str
    question: str | None
    source: str
    position: int
    distance: float


@dataclass(frozen=True)
class Recalled:
    """A learned question that a request may mean.

    Attributes:
        question: the question, with the sentence that it was written from.
        score: how near the request comes to it, -1 to 1.
    """

    question: Question
    score: float


@dataclass(frozen=True)
class Provenance:
    """The rows of a finished training.

    Attributes:
        documents: ids, in the order that the datastore numbers them.
        datastore: rows of the text.
        contexts: the text before each of them as the encoder sees it; None: no query vectors.
        study: rows of the questions; None: there were none.
        questions: these questions.
    """

    documents: tuple[str, ...]
    datastore: Datastore
    contexts: Contexts | None = None
    study: StudyRows | None = None
    questions: tuple[Question, ...] = ()

    @classmethod
    def open(cls, folder: str | Path) -> Provenance:
        """Open what the training of the memory in `folder` has kept.

        Raises:
            ArtifactError: `work/` was deleted, or is that of another training.
        """
        work, manifest = Path(folder) / WORK, load_manifest(Path(folder))
        documents = documents_of(Path(folder))
        try:
            datastore = Datastore.open(work / "datastore")
            if manifest.training.get("recipe") == "paper":
                return cls(documents, datastore)
            return cls(
                documents,
                datastore,
                Contexts.open(work / "study"),
                StudyRows.open(work / "study"),
                tuple(load_questions(work / "questions" / "questions.jsonl")),
            )
        except (OSError, ValueError, KeyError) as error:
            raise _gone(work, error) from error

    def origins(
        self, hidden: Floats, tokens: Sequence[int], query: Floats | None, memory: Memory
    ) -> list[Origin | None]:
        """Where each token comes from; None for a token that no training row holds.

        Args:
            hidden: the states before each token of the answer. *Shape:* (n, D).
            tokens: the answer. *Shape:* (n,).
            query: what was asked, as the encoder sees it. *Shape:* (R,).
            memory: what was trained on these rows; tells how it sees them.
        """
        asked = None
        if query is not None:
            told = torch.from_numpy(query[None]).to(memory.questions.device)
            asked = memory.recall(told)[0].float().cpu().numpy()
        return [
            self._origin(state, token, asked, memory)
            for state, token in zip(hidden, tokens, strict=True)
        ]

    def recalled(self, candidates: Candidates, top_k: int = 1) -> list[Recalled]:
        """What a request may mean, nearest first, of each sentence one question.

        A question of one's own that names no sentence is left out.

        Args:
            candidates: of one request, by the memory that was trained on these rows.
            top_k: sentences, at most; the candidates may be of fewer.
        """
        (line,) = candidates.scores.tolist()
        found: dict[tuple[str, str], Recalled] = {}
        for place in sorted(range(len(line)), key=lambda place: -line[place]):
            if not math.isfinite(line[place]):  # a free place
                continue
            question = self.questions[int(candidates.numbers[0, place])]
            if question.source:
                one = Recalled(question, line[place])
                found.setdefault((question.document, question.source), one)
        return list(found.values())[:top_k]

    def passage(self, document: str, position: int, length: int = PASSAGE_TOKENS) -> list[int]:
        """Token ids around a place in a document; its very first token is in no row."""
        here = np.flatnonzero(self.datastore.documents == self.documents.index(document))
        places = np.asarray(self.datastore.positions)[here]
        near = here[np.abs(places - position) <= length // 2]
        order = np.argsort(np.asarray(self.datastore.positions)[near], kind="stable")
        return [int(token) for token in np.asarray(self.datastore.next_tokens)[near[order]]]

    def _origin(
        self, state: Floats, token: int, query: Floats | None, memory: Memory
    ) -> Origin | None:
        text = self._nearest_text(state, token, query, memory)
        asked = self._nearest_question(state, token, query, memory)
        found = [origin for origin in (text, asked) if origin is not None]
        return min(found, key=lambda origin: origin.distance, default=None)

    def _nearest_text(
        self, state: Floats, token: int, query: Floats | None, memory: Memory
    ) -> Origin | None:
        rows = np.flatnonzero(self.datastore.next_tokens == token)
        if not len(rows):
            return None
        scale = memory.config.hidden_scale
        distances = _distances(self.datastore.keys(rows), state, scale)
        if query is not None and self.contexts is not None:
            vectors = self.contexts.vectors[self.contexts.blocks[rows]]
            distances += _distances(vectors, query, 1.0)
        best = int(distances.argmin())
        document = self.documents[int(self.datastore.documents[rows[best]])]
        position = int(self.datastore.positions[rows[best]])
        return Origin(document, None, "", position, float(distances[best]))

    def _nearest_question(
        self, state: Floats, token: int, query: Floats | None, memory: Memory
    ) -> Origin | None:
        if self.study is None:
            return None
        rows = np.flatnonzero(self.study.next_tokens == token)
        if not len(rows):
            return None
        scale = memory.config.hidden_scale
        distances = _distances(np.asarray(self.study.keys[rows], np.float32), state, scale)
        numbers = self.study.questions[rows]
        if query is not None:
            distances += _distances(question_keys(self.study, numbers), query, 1.0)
        best = int(distances.argmin())
        question = self.questions[int(numbers[best])]
        return Origin(question.document, question.text, question.source, -1, float(distances[best]))


def note_documents(work: Path, corpus: Corpus, run: str) -> None:
    """Keep the names behind the datastore's document numbers, and whose files these are."""
    ids = [document.id for document in corpus.documents]
    write_json(work / DOCUMENTS, {"run": run, "documents": ids})


def documents_of(folder: Path) -> tuple[str, ...]:
    """Names behind the datastore's document numbers, where `work/` is of the memory beside it.

    Raises:
        ArtifactError: it is of another training, or was deleted.
    """
    work = folder / WORK
    try:
        note = json.loads((work / DOCUMENTS).read_text(encoding="utf-8"))
        run, documents = note.get("run"), tuple(note["documents"])
    except (OSError, ValueError, KeyError) as error:
        raise _gone(work, error) from error
    if run != load_manifest(folder).run:
        raise ArtifactError(
            f"{work} is of another training than the memory beside it, of other documents or "
            "settings; train again"
        )
    return documents


def _gone(work: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{work} does not hold the rows of the training any more ({error}); answers "
        "cannot be traced to them, and sentences not be read. Train again to have them"
    )


def shares(origins: Sequence[Origin | None]) -> dict[str, float]:
    """Share of the tokens that come from each document, largest first."""
    counts = Counter(origin.document for origin in origins if origin is not None)
    return {document: count / len(origins) for document, count in counts.most_common()}


def _distances(rows: Floats, point: Floats, scale: float) -> Floats:
    """Squared distances. *Shapes:* (R, D), (D,) -> (R,)."""
    difference = (np.asarray(rows, np.float32) - point) / scale
    squared: Floats = np.einsum("rd,rd->r", difference, difference)
    return squared
