"""Answers: the spans of a sentence that somebody might ask for.

Entities, numbers, noun phrases with and without what depends on them, lists, complements, reasons
and single modifiers. No pieces of names, and no nouns that say nothing without what follows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlpmem_rag.clauses import NOUNS, VERBS
from mlpmem_rag.markup import HIDDEN

if TYPE_CHECKING:
    from spacy.tokens import Span, Token

MAX_ANSWER_TOKENS = 12
OFTEN = ("once", "twice")  # `once a year`
HYPHENS = ("-", "–")
NOT_IN_FRONT = frozenset(
    ("the", "a", "an", "its", "their", "his", "her", "our", "this", "these", "those", "some")
)
_EMPTY = "it they he she this that these those which who whom whose i we you there one ones"
_VAGUE = "him her them us me itself himself herself themselves what such other others part way"
_NO_ANSWERS = frozenset(f"{_EMPTY} {_VAGUE}".split(" "))
_REASONS = frozenset(("to", "because", "since", "as", "so"))
_COMPLEMENTS = ("acomp", "attr", "dobj", "pcomp", "oprd")
_BEFORE_NOUNS = ("amod", "compound", "nmod")
_SIGNS = ("%", "°", "percent")


def candidates(sentence: Span) -> Iterator[Span]:
    """Spans of a sentence that somebody might ask for, none twice."""
    doc = sentence.doc
    names = (ent[1:] if ent[0].pos_ == "DET" else ent for ent in sentence.ents)
    names_of_words = [name for name in names if _is_one_name(name)]
    seen: set[tuple[int, int]] = set()
    for start, end in _edges(sentence):
        span = _trimmed(doc[start:end])
        inside = any(
            name.start <= span.start and span.end <= name.end and len(span) < len(name)
            for name in names_of_words
        )
        inside = inside or any(_is_piece_of_date(span, entity) for entity in sentence.ents)
        if (span.start, span.end) in seen or inside or not _is_answer(span):
            continue
        seen.add((span.start, span.end))
        yield span


def list_members(noun: Token) -> list[Token]:
    """The nouns of the list that a noun belongs to; the noun alone, where it is none."""
    while noun.dep_ == "conj" and noun.head.pos_ in NOUNS:
        noun = noun.head
    members = [noun]
    for member in members:  # grows as it goes
        members += [t for t in member.rights if t.dep_ == "conj" and t.pos_ in NOUNS]
    return members


def _edges(sentence: Span) -> Iterator[tuple[int, int]]:
    """Start and end of what may be an answer, as yet with articles and punctuation."""
    for entity in sentence.ents:
        often = [t.i for t in entity.root.lefts if t.lower_ in OFTEN]
        yield min([entity.start, *often]), entity.end
    for chunk in sentence.noun_chunks:
        if chunk.root.pos_ != "PRON":
            yield from _edges_of_noun(chunk)
    for token in sentence:
        if token.text == "°":
            yield token.left_edge.i, token.i + 1
        elif _is_whole(token):
            yield token.left_edge.i, token.right_edge.i + 1
        elif _is_single(token):
            yield token.i, token.i + 1


def _edges_of_noun(chunk: Span) -> Iterator[tuple[int, int]]:
    noun = chunk.root
    after = {child.dep_: child for child in noun.rights}
    of = any(child.lower_ == "of" for child in noun.rights)
    if not of or noun.pos_ == "PROPN":  # the `order` of `an order of monks` says nothing
        yield chunk.start, chunk.end
    for child in noun.children:
        if child.dep_ == "prep" and child.i >= chunk.end:
            yield chunk.start, child.right_edge.i + 1
    last = max(member.i for member in list_members(noun))
    if noun.dep_ != "conj" and last > noun.i:
        yield chunk.start, last + 1
    if not after.keys() & {"appos", "relcl"}:
        yield chunk.start, max(chunk.end, noun.right_edge.i + 1)


def _is_whole(token: Token) -> bool:
    """Whether a token and all that depends on it may be an answer."""
    if token.dep_ == "npadvmod" and token.pos_ == "NOUN" and token.head.pos_ in ("ADJ", "ADV"):
        return True
    if token.lower_ == "times" and token.dep_ == "npadvmod":
        return any(child.dep_ == "npadvmod" for child in token.rights)  # `three times a day`
    if token.dep_ == "nummod":
        return token.head.lemma_ not in _SIGNS
    if token.dep_ == "advcl":
        marks = {child.lower_ for child in token.children if child.dep_ in ("mark", "aux")}
        return bool(marks & _REASONS)
    if token.dep_ == "prep" and token.head.pos_ in VERBS:
        bare = token.lower_ in ("in", "at", "on")
        return not any(
            child.dep_ == "pobj" and (bare or child.ent_type_) for child in token.children
        )
    if token.dep_ == "amod" and token.left_edge != token:  # `torus-shaped`
        return token.nbor(-1).text == "-"
    number = token.pos_ == "NUM" and token.dep_ == "pobj"
    return number or token.dep_ in _COMPLEMENTS


def _is_single(token: Token) -> bool:
    """Whether a token alone may be an answer: a year, a modifier, a noun without modifiers."""
    if token.ent_type_ == "DATE" and re.fullmatch(r"\d{4}", token.text):
        return True
    if HIDDEN.fullmatch(token.text):
        return True
    if token.tag_ in ("JJR", "JJS") or _is_piece_of_name(token):
        return False
    if token.dep_ in _BEFORE_NOUNS and token.pos_ in ("ADJ", "NOUN", "PROPN"):
        of_date = token.ent_type_ and token.head.ent_type_ in ("DATE", "TIME")
        return not (of_date or _touches_hyphen(token))
    said = any(
        child.dep_ in (*_BEFORE_NOUNS, "nummod", "poss") or child.lower_ == "of"
        for child in token.children
    )
    one_of = token.dep_ == "pobj" and token.head.head.lower_ == "one"
    return token.pos_ in ("NOUN", "PROPN") and not (said or one_of or _touches_hyphen(token))


def _touches_hyphen(token: Token) -> bool:
    around = token.doc[max(0, token.i - 1) : token.i + 2]
    return any(neighbour.text in HYPHENS for neighbour in around)


def _is_piece_of_date(span: Span, entity: Span) -> bool:
    """Whether a span is a piece of `5 May 2000`, and not its year."""
    piece = entity.start <= span.start and span.end <= entity.end and len(span) < len(entity)
    figures = any(token.pos_ == "NUM" for token in entity)
    return entity.label_ == "DATE" and piece and figures and span.root.pos_ == "PROPN"


def _is_one_name(entity: Span) -> bool:
    """Whether all of an entity is a name, of which no piece is an answer by itself."""
    words = [token for token in entity if token.pos_ not in ("ADP", "DET", "PUNCT")]
    return len(words) > 1 and all(token.pos_ == "PROPN" for token in words)


def _is_piece_of_name(token: Token) -> bool:
    """Whether a token is a piece of a longer name or number."""
    if token.pos_ not in ("PROPN", "NUM"):
        return False
    after = token.doc[token.i + 1] if token.i + 1 < len(token.doc) else None
    in_entity = token.ent_iob_ == "I" or (
        token.ent_iob_ == "B" and after is not None and after.ent_iob_ == "I"
    )
    compound = token.dep_ == "compound" or any(c.dep_ == "compound" for c in token.children)
    return in_entity or compound


def _is_named_by_code(span: Span) -> bool:
    """Whether a span only says of what kind the code in it is: `the --quiet option`."""
    code = [token for token in span if HIDDEN.fullmatch(token.text)]
    words = [token for token in span if token not in code]
    kind = all(token.pos_ in ("NOUN", "ADJ") and token.text.islower() for token in words)
    return len(code) == 1 and len(words) > 0 and kind


def _trimmed(span: Span) -> Span:
    """A span without articles, the `'s` of an owner, and punctuation at its ends."""
    start, end, doc = span.start, span.end, span.doc
    while start < end and (doc[start].is_punct or doc[start].lower_ in NOT_IN_FRONT):
        start += 1
    while end > start and (
        doc[end - 1].tag_ == "POS" or (doc[end - 1].is_punct and doc[end - 1].text not in ")%")
    ):
        end -= 1
    if end > start and doc[end - 1].text == ")" and "(" not in doc[start:end].text:
        end -= 1
    return doc[start:end]


def _is_answer(span: Span) -> bool:
    """Whether a trimmed span says something by itself."""
    doc, start, end = span.doc, span.start, span.end
    if not 0 < len(span) <= MAX_ANSWER_TOKENS or "(" in span.text:
        return False
    aside = start > 0 and doc[start - 1].text == "(" and doc[start].pos_ != "NUM"
    if doc[start].tag_ in ("WP$", "WDT", "WP") or (end < len(doc) and doc[end].text == "°"):
        return False
    tied = end < len(doc) and doc[end].text in HYPHENS and not doc[end - 1].whitespace_
    if _is_named_by_code(span):
        return False
    told = any(t.pos_ == "NUM" or not (t.is_stop or t.is_punct) for t in span)
    return told and not (aside or tied) and span.text.lower() not in _NO_ANSWERS
