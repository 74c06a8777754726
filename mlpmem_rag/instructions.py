"""Instructions and descriptions, told as statements that questions can be made of.

Manuals say `Hold the button for ten seconds.` and, behind the name of an option, `Lists all
versions.`; whose deed that is goes without saying, and a question has to say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlpmem_rag.clauses import HELPERS, READER, SUBJECTS
from mlpmem_rag.markup import HIDDEN
from mlpmem_rag.wording import third_person, tidy, words_of

if TYPE_CHECKING:
    from spacy.tokens import Span, Token

MAX_STEP = 16
"""Tokens of an answer that tells how something is done."""
_AHEAD = ("advcl", "prep", "advmod", "npadvmod", "mark", "punct", "cc", "intj", "dep")
_WITH_THE_VERB = ("aux", "neg", "advmod")
_BARE = ("VB", "VBP")
_PURPOSES = ("advcl", "xcomp", "acl", "relcl")
_NO_DEED = (
    *("see", "note", "let", "refer", "suppose", "say", "thank", "thanks", "welcome"),
    *("hope", "bless", "feel", "guess", "believe"),
)
_OF_THE_READER = ("use", "edit", "have", "click", "consider", "make", "please", "if", "when")
"""Verbs that tell the reader what to do with an option rather than what it does."""
_USING = ("use", "run", "call", "add", "pass", "set", "specify", "type", "enter", "execute")
_FEW = 6  # tokens: `use the environment variable X.`
_NO_STEP = ("need", "want", "wish", "like", "have", "remember", "try", "plan", "expect", "refer")


def statement(
    parser: Any,  # noqa: ANN401  spaCy is optional
    sentence: Span,
    about: str,
    section: str = "",
) -> str | None:
    """The sentence with the subject that it goes without; None where it needs none.

    `about`: what it describes; nothing where it can only be the reader who is told to do it.
    `section`: what the section describes that it stands in, if that is a name.
    """
    subject = next((t for t in sentence.root.children if t.dep_ in SUBJECTS), None)
    if subject is None:
        told = _description(parser, sentence, about) if about else _instruction(sentence)
        if told is None and section:
            told = _deed(parser, section, sentence[0], _lowered(sentence.text))
        return told
    first = sentence[0]
    if about and first.lower_ in ("it", "this") and first in (subject, *subject.children):
        return f"{about} {_text(sentence, subject.i + 1, sentence.end)}"  # `this option lists`
    return None


def _instruction(sentence: Span) -> str | None:
    """`If it blinks, never use bleach.` -> `If it blinks, you should never use bleach.`."""
    root = sentence.root
    helpers = [child for child in root.children if child.dep_ in HELPERS]
    if root.tag_ not in _BARE or root.lemma_ != root.lower_ or root.lemma_ in _NO_DEED:
        return None
    if any(child.lower_ not in ("do", "please") for child in helpers):
        return None
    first = root
    while first.i > sentence.start:
        before = first.nbor(-1)
        if before.head != root or before.dep_ not in _WITH_THE_VERB:
            break
        first = before
    ahead = [child for child in root.children if child.i < first.i]
    if any(child.dep_ not in _AHEAD for child in ahead):
        return None
    lead = re.sub(r"(?i)\bplease\s+$", "", _text(sentence, sentence.start, first.i))
    rest = "".join(
        "not " if token.head == root and token.lower_ == "n't" else token.text_with_ws
        for token in sentence.doc[first.i : sentence.end]
        if token not in helpers
    )
    return f"{lead}{READER if lead else READER.title()} should {_lowered(rest)}"


def _description(parser: Any, sentence: Span, about: str) -> str | None:  # noqa: ANN401
    """`Lists all versions.` -> `<about> lists all versions.`; a noun is what it is."""
    first, text = sentence[0], sentence.text
    if first.lemma_.lower() in (*_NO_DEED, *_OF_THE_READER) or first.dep_ == "mark":
        return None
    rest = text if first.pos_ == "PROPN" or first.text.isupper() else _lowered(text)
    if first.tag_ in _BARE and sentence.root == first and first.lemma_ != "be":
        return f"{about} {third_person(first.lemma_.lower())}{text[len(first.text) :]}"
    if told := _deed(parser, about, first, rest):
        return told
    noun = sentence.root.pos_ in ("NOUN", "PROPN", "NUM", "ADJ")
    return f"{about} is {rest}" if noun else None


def _deed(parser: Any, name: str, first: Token, text: str) -> str | None:  # noqa: ANN401
    """`cancels the timer.` behind a name, if it begins with a verb: that is what this does."""
    if not first.text.endswith("s"):
        return None
    told = f"{name} {text}"
    doc = parser(told)
    verb = next((token for token in doc if token.idx > len(name)), doc[-1])
    return told if verb.tag_ == "VBZ" and verb.dep_ == "ROOT" else None


def how_to(sentence: Span, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """`To reset it, you should hold the button.` -> `How do you reset it?`, `hold the button`."""
    root = sentence.root
    subject = next((child for child in root.children if child.dep_ in SUBJECTS), None)
    if subject is None or subject.lower_ != READER:
        return
    told = any(child.dep_ == "aux" and child.tag_ == "MD" for child in root.children)
    if not told or root.lemma_ in _NO_STEP or any(c.dep_ == "neg" for c in root.children):
        return
    objects = [child for child in root.children if child.dep_ == "dobj"]
    orders = [t for t in root.subtree if t.lower_ == "order" and t.head.head == root]
    for purpose in (t for head in (root, *objects, *orders) for t in head.children):
        if purpose.dep_ not in _PURPOSES or not _infinitive(purpose):
            continue
        inside = {token.i for token in purpose.subtree}
        inside |= {token.i for order in orders for token in (order.head, order)}
        step = [
            token
            for token in root.subtree
            if token.i > subject.i and token.i not in inside and token.dep_ not in HELPERS
        ]
        done = [token for token in purpose.subtree if token.i >= purpose.i]
        code = [token for token in step if HIDDEN.fullmatch(token.text)]
        used = root.lemma_ in _USING and len(code) == 1 and len(step) <= _FEW
        answer = code[0].text if used else tidy(words_of(step, {}))
        if 1 < sum(not token.is_punct for token in step) <= MAX_STEP and len(done) > 1:
            yield f"How do you {tidy(words_of(done, names))}", answer


def _infinitive(verb: Token) -> bool:
    return verb.tag_ == "VB" and any(child.tag_ == "TO" for child in verb.children)


def _text(sentence: Span, start: int, end: int) -> str:
    return "".join(token.text_with_ws for token in sentence.doc[start:end])


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
