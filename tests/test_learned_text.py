"""Which questions are about held-out text, whole documents or the ends of some."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.datastore import Datastore, build_datastore
from mlpmem_rag.learned_text import Cut, about_held_out, cut_documents
from mlpmem_rag.preparation import Prepared
from mlpmem_rag.questions import Question
from mlpmem_rag.split import Split, split_rows
from mlpmem_rag.windows import make_windows, tokenize

SENTENCES = [f"Keeper {n} of the old mill sold {n + 20} lamps in the harbour." for n in range(60)]


def rows_of(backbone: Backbone, texts: list[str], folder: Path) -> tuple[Prepared, Datastore]:
    documents = tuple(
        Document(f"d{n}", text, None, hashlib.sha256(text.encode()).hexdigest())
        for n, text in enumerate(texts)
    )
    token_ids = tokenize(documents, backbone.tokenizer)
    windows = make_windows(token_ids, length=40, stride=20)
    prepared = Prepared(Corpus(documents), backbone, windows, sum(map(len, token_ids)))
    return prepared, build_datastore(backbone, windows, folder)


@pytest.fixture
def parts(tiny_backbone: Backbone, tmp_path: Path) -> tuple[Prepared, Datastore, Split]:
    """Two documents of which the ends are held out."""
    texts = [" ".join(SENTENCES[:30]), "\n".join(SENTENCES[30:])]
    prepared, store = rows_of(tiny_backbone, texts, tmp_path)
    split = split_rows(np.asarray(store.documents), held_out=0.2, seed=0)
    assert split.held_out_by == "passage"
    return prepared, store, split


def test_the_end_of_a_document_is_cut_where_its_held_out_rows_begin(
    parts: tuple[Prepared, Datastore, Split],
) -> None:
    prepared, store, split = parts
    cuts = cut_documents(prepared, store, split)
    assert list(cuts) == ["d0", "d1"]
    documents = np.asarray(store.documents)
    for number, cut in enumerate(cuts.values()):
        learned = split.train[documents[split.train] == number]
        tokens = np.asarray(store.next_tokens)[learned]
        told = str(prepared.backbone.tokenizer.decode(tokens))
        assert cut.learned.split()[5:-3] == told.split()[5:-3]  # but for the first token
        assert cut.text == " ".join(SENTENCES[30 * number : 30 * number + 30])


def test_a_question_is_held_out_with_the_sentence_that_answers_it(
    parts: tuple[Prepared, Datastore, Split],
) -> None:
    cuts = cut_documents(*parts)
    asked = [
        Question("How many lamps?", f"{n + 20} lamps", sentence, f"d{n // 30}")
        for n, sentence in enumerate(SENTENCES)
    ]
    held_out = about_held_out(asked, cuts)
    learned = np.array([s in cuts[f"d{n // 30}"].learned for n, s in enumerate(SENTENCES)])
    np.testing.assert_array_equal(held_out, ~learned)
    for part in (held_out[:30], held_out[30:]):
        assert 10 <= part.sum() <= 14, "two fifths"
        assert not part[:16].any()
        assert part[-10:].all()
    elsewhere = [Question(q.text, q.answer, q.source, "other") for q in asked]
    assert not about_held_out(elsewhere, cuts).any()


def test_a_sentence_that_a_writer_made_is_where_its_answer_is() -> None:
    cut = Cut("Born: 1815 in London.", "Born: 1815 in London. Died: 1852 there.")
    for answer, held_out in (("1815", False), ("1852", True), ("1900", True)):
        made = Question("When?", answer, f"The year of Ada\nis {answer}.", "a")
        assert cut.holds_out(made) == held_out
    assert Cut("", "Born: 1815.").holds_out(Question("When?", "1815", "Born: 1815.", "a"))


def test_whole_documents_are_held_out_whole(tiny_backbone: Backbone, tmp_path: Path) -> None:
    texts = [" ".join(SENTENCES[4 * n : 4 * n + 4]) for n in range(15)]
    prepared, store = rows_of(tiny_backbone, texts, tmp_path)
    split = split_rows(np.asarray(store.documents), held_out=0.1, seed=0)
    assert split.held_out_by == "document"
    cuts = cut_documents(prepared, store, split)
    held_out = np.concatenate([split.validation, split.test])
    names = {f"d{n}" for n in np.asarray(store.documents)[held_out]}
    assert set(cuts) == names
    assert {cut.learned for cut in cuts.values()} == {""}


def test_marks_of_a_text_do_not_hide_which_sentence_answers(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    marked = [sentence.replace("the old mill", "**the old `mill`**") for sentence in SENTENCES]
    prepared, store = rows_of(tiny_backbone, ["\n\n".join(marked)], tmp_path)
    split = split_rows(np.asarray(store.documents), held_out=0.2, seed=0)
    (cut,) = cut_documents(prepared, store, split).values()
    asked = [Question("How many?", "lamps", sentence, "d0") for sentence in SENTENCES]
    held_out = about_held_out(asked, {"d0": cut})
    assert 3 < held_out.sum() < 30
    assert held_out[-1]
    assert not held_out[: -held_out.sum()].any()
