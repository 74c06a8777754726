"""What of the documents is learned at first, and which questions are about the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlpmem_rag.datastore import Datastore
from mlpmem_rag.markup import readable
from mlpmem_rag.passages import holds, without_notes
from mlpmem_rag.preparation import Prepared
from mlpmem_rag.questions import Question
from mlpmem_rag.split import Split


@dataclass(frozen=True)
class Cut:
    """A document that is held out, or whose end is; without marks, white space as single spaces.

    Attributes:
        learned: what stands before that; empty: nothing.
        text: all of it.
    """

    learned: str
    text: str

    def holds_out(self, question: Question) -> bool:
        """Whether its answer is not in the learned part, as far as can be told.

        That is where the sentence that answers it stands or, if a writer made that sentence, the
        answer.
        """
        source, answer = _spaced(question.source), _spaced(question.answer)
        if source in self.text:
            return source not in self.learned
        return not holds(self.learned, answer)


def cut_documents(prepared: Prepared, datastore: Datastore, split: Split) -> dict[str, Cut]:
    """The documents of which something is held out, by id.

    The place of the cut is where the decoded tokens before it reach, as a share of all: a tokenizer
    need not give back a text letter by letter.
    """
    documents, positions = np.asarray(datastore.documents), np.asarray(datastore.positions)
    held_out = np.concatenate([split.validation, split.test])
    found: dict[str, Cut] = {}
    for number in np.unique(documents[held_out]).tolist():
        rows = np.flatnonzero(documents == number)
        rows = rows[np.argsort(positions[rows], kind="stable")]
        first = np.flatnonzero(np.isin(rows, held_out))[0]
        tokens = np.asarray(datastore.next_tokens)[rows]
        before, whole = (
            len(prepared.backbone.tokenizer.decode(ids)) for ids in (tokens[:first], tokens)
        )
        document = prepared.corpus.documents[number]
        learned = document.text[: len(document.text) * before // max(1, whole)]
        found[document.id] = Cut(_spaced(readable(learned)), _spaced(readable(document.text)))
    return found


def about_held_out(questions: Sequence[Question], cuts: Mapping[str, Cut]) -> npt.NDArray[np.bool_]:
    """Which questions are answered by text that is not learned. *Shape:* (M,)."""
    return np.array([q.document in cuts and cuts[q.document].holds_out(q) for q in questions], bool)


def _spaced(text: str) -> str:
    return " ".join(without_notes(text).split())
