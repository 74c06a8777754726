"""Clauses of a parsed sentence, each made to stand alone.

Takes spaCy's parse apart into simple clauses with a subject, a verb and the rest. What a clause
leaves unsaid is filled in: participles, infinitives and relative clauses get the noun they belong
to, coordinate verbs the subject of the first, appositions a form of `be`. Knows no questions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlpmem_rag.wording import past_tense, third_person, words_of

if TYPE_CHECKING:
    from spacy.tokens import Span, Token

READER = "you"
SUBJECTS = ("nsubj", "nsubjpass", "expl", "csubj", "csubjpass")
HELPERS = ("aux", "auxpass")
VERBS = ("VERB", "AUX")
FINITE = ("VBD", "VBZ", "VBP", "MD")
NOUNS = ("NOUN", "PROPN", "PRON", "NUM")
COMPLEMENTS = ("dobj", "attr", "acomp", "oprd", "xcomp", "ccomp", "dative")
RELATIVES = ("WDT", "WP", "WP$", "WRB")
_CONDITIONS = ("if", "when", "unless", "until", "before", "after", "while")
_PLURAL_WORDS = ("they", "these", "those")
_SPEAKERS = ("you", "we", "i")  # `what do I need`
_LOOSE = ("relcl", "acl", "appos", "advcl", "parataxis", "nmod", "intj", "dep", "meta")
_ADJUNCTS = ("prep", "agent", "npadvmod", "advcl")
_SUBORDINATE = ("conj", "advcl", "parataxis")


@dataclass(frozen=True)
class Clause:
    """A clause that stands alone.

    Attributes:
        verb: its verb; of an apposition, the noun that follows.
        subject: tokens of the subject, in order.
        head: the subject's noun.
        helper: the verb that stands before the subject in a question: `did`, `was`, `has`.
        base: the verb's form behind the subject in a question: `build`, `built`, nothing.
        plain: the verb as in a statement: `built`, `was built`.
        body: tokens of the rest, in order.
        antecedent: the noun that a relative or participle clause belongs to.
        gap: what stands for it there, None where it is the subject.
        names: what to say instead of the gap: position -> text.
    """

    verb: Token
    subject: Sequence[Token]
    head: Token
    helper: str
    base: str
    plain: str
    body: Sequence[Token]
    antecedent: Token | None = None
    gap: Token | None = None
    names: dict[int, str] = field(default_factory=dict)


def clauses(sentence: Span) -> list[Clause]:
    """The clauses of a sentence, in its order."""
    return [clause for token in sentence for clause in _clauses_at(token)]


def _clauses_at(token: Token) -> Iterator[Clause]:
    if _is_apposition(token):
        yield _apposition(token)
    if token.pos_ not in VERBS or token.dep_ in HELPERS:
        return
    subject = _subject(token)
    if subject is None:
        return
    antecedent, gap = None, None
    owner = _owner(token) if token.dep_ in ("relcl", "acl") else token.head
    own = [child for child in token.children if child.dep_ in SUBJECTS]
    relative = next((t for t in token.subtree if t.tag_ in RELATIVES), None)
    if token.dep_ == "relcl" and owner.pos_ in NOUNS:
        if relative is not None and relative in own:
            antecedent, subject = owner, owner
        elif relative is not None:
            antecedent, gap = owner, relative
    elif token.dep_ == "acl":
        antecedent, subject = owner, owner
    if gap is None:
        subject = _described(subject)
    yield _clause(token, subject, antecedent, gap)


def _owner(verb: Token) -> Token:
    """The noun that a relative or participle clause belongs to.

    Parsers attach it to the nearest noun, but `that` hardly ever limits a name: in `a cluster in
    the county of Kent that was found`, the cluster was found.
    """
    noun = verb.head
    aside = verb.dep_ == "relcl" and any(
        child.lower_ == "which" and child.i > 0 and child.nbor(-1).text == ","
        for child in verb.children
    )
    while (
        aside and noun.dep_ == "pobj" and noun.head.lower_ == "of" and noun.head.head.pos_ == "NOUN"
    ):
        noun = noun.head.head
    limits = any(child.lower_ == "that" for child in verb.subtree) or verb.dep_ == "acl"
    while limits and noun.dep_ == "pobj" and _named(noun) and noun.head.head.pos_ in NOUNS:
        noun = noun.head.head
    return noun


def _named(noun: Token) -> bool:
    of = (t for child in noun.rights if child.lower_ == "of" for t in child.children)
    return noun.pos_ == "PROPN" or any(t.pos_ == "PROPN" for t in of)


def _described(noun: Token) -> Token:
    """What a noun describes: `Ada` of `Ada is a poet who ...` and of `Ada, a poet who ...`."""
    if noun.dep_ == "attr":
        return next(
            (t for t in noun.head.children if t.dep_ in SUBJECTS and t.dep_ != "expl"), noun
        )
    return noun.head if noun.dep_ == "appos" and noun.head.pos_ in NOUNS else noun


def _is_apposition(token: Token) -> bool:
    """Whether a noun says what the noun before it is.

    Not in brackets, which hold figures and abbreviations, and not as a part of a list: parsers
    take `a fox, a cat and a dog` for one.
    """
    if token.dep_ != "appos" or token.pos_ not in NOUNS or token.head.pos_ not in NOUNS:
        return False
    edge = token.left_edge
    aside = edge.i > 0 and edge.nbor(-1).text == "("
    listed = any(child.dep_ == "conj" for child in token.children) and not _plural(token.head)
    return not (aside or listed)


def _apposition(noun: Token) -> Clause:
    """`Momus, a cabaret` -> `Momus is a cabaret`."""
    subject = noun_phrase(noun.head, without=noun)
    helper = form_of_be(noun.head, past=_past(noun.head))
    return Clause(noun, subject, noun.head, helper, "", helper, list(noun.subtree), noun.head)


def _clause(verb: Token, subject: Token, antecedent: Token | None, gap: Token | None) -> Clause:
    own = subject in verb.children
    who = list(subject.subtree) if own else noun_phrase(subject, without=verb)
    names = {}
    if gap is not None and antecedent is not None:
        text = words_of(noun_phrase(_described(antecedent), without=verb), {}).strip()
        names[gap.i] = f"{text}'s" if gap.tag_ == "WP$" else "" if gap.tag_ == "WRB" else text
    inside = {token.i for token in who}
    inside |= {t.i for child in verb.children if child.dep_ in SUBJECTS for t in child.subtree}
    elsewhere = {
        token.i
        for embedded in verb.subtree
        if embedded != verb and _apart(embedded, verb) and not _condition(embedded, verb, subject)
        for token in embedded.subtree
    }
    helper, base, plain, used = _forms(verb, subject)
    body = [
        token
        for token in verb.subtree
        if token.i not in inside
        and token.i not in elsewhere
        and token.i not in used
        and not (token.head == verb and token.dep_ in ("cc", "mark", "punct"))
        and not (token.head == verb and token.tag_ == "WRB" and token != gap)
    ]
    return Clause(verb, who, subject, helper, base, plain, body, antecedent, gap, names)


def _apart(token: Token, verb: Token) -> bool:
    """Whether a token heads a clause that is no part of its verb's: `... and he left`."""
    before = token.dep_ == "ccomp" and token.head == verb and token.i < verb.i
    return token.pos_ in VERBS and (before or token.dep_ in _SUBORDINATE)


def _condition(embedded: Token, verb: Token, subject: Token) -> bool:
    """Whether a clause says when the reader is to do what the verb says."""
    return (
        subject.lower_ == READER
        and embedded.dep_ == "advcl"
        and embedded.head == verb
        and any(child.lower_ in _CONDITIONS for child in embedded.children)
    )


def _subject(verb: Token) -> Token | None:
    """The subject of a verb: its own, or the one that it takes from what it depends on."""
    seen = 0
    while seen < 10:
        for child in verb.children:
            if child.dep_ in SUBJECTS:
                relative = child.tag_ in RELATIVES and verb.dep_ == "relcl"
                return verb.head if relative else child
        head = verb.head
        if verb.dep_ in ("acl", "relcl"):
            return head if head.pos_ in NOUNS else None
        if verb.dep_ == "xcomp":
            for child in head.children:
                if child.dep_ == "dobj" and child.i < verb.i:
                    return child
        if verb.dep_ == "conj" and verb.tag_ in FINITE:  # parsers attach it to the nearest verb
            while head.tag_ not in FINITE and head.head != head and not _has_subject(head):
                head = head.head
        if verb.dep_ == "pcomp" or (verb.dep_ == "conj" and head.dep_ == "acomp"):
            head = head.head
        elif verb.dep_ not in ("conj", "xcomp", "advcl"):
            return None
        if head.pos_ not in VERBS or head == verb:
            return None
        verb, seen = head, seen + 1
    return None


def _has_subject(verb: Token) -> bool:
    return any(child.dep_ in SUBJECTS for child in verb.children)


def _forms(verb: Token, subject: Token) -> tuple[str, str, str, set[int]]:
    """Helper, base and plain form of a verb, and the positions of the words they are made of."""
    text = verb.lower_
    helpers = [child for child in verb.children if child.dep_ in HELPERS and child.i < verb.i]
    used = {verb.i, *(child.i for child in helpers)}
    helpers = [child for child in helpers if child.tag_ != "TO"]
    if not helpers and verb.dep_ == "conj" and verb.head.pos_ in VERBS:
        helpers = _shared_helpers(verb)
    finite = verb.tag_ in FINITE
    if helpers and helpers[0].tag_ in FINITE:
        first, *others = [_full(child) for child in helpers]
        base = " ".join([*others, text])
        return first, base, f"{first} {base}", used
    past = _past(verb)
    if helpers and helpers[0].lemma_ == "be" and verb.tag_ == "VBN":
        helper = form_of_be(subject, past=past)
        return helper, text, f"{helper} {text}", used
    if verb.lemma_ == "be":
        helper = verb.text if finite else form_of_be(subject, past=past)
        return helper, "", helper, used
    own = _has_subject(verb)
    past = past or (own and verb.tag_ == "VBN")  # taggers mistake `opened`
    if not (own or helpers) and _participle(verb):
        past = past or any(re.match(r"\d{4}\b", token.text) for token in verb.subtree)
        helper = form_of_be(subject, past=past)
        return helper, text, f"{helper} {text}", used
    do = "did" if past else "do" if _plural(subject) else "does"
    if finite or verb.tag_ == "VBN":
        return do, verb.lemma_, text, used
    if verb.tag_ == "VBG":
        return do, verb.lemma_, f"{form_of_be(subject, past=past)} {text}", used
    plain = {"did": past_tense, "does": third_person}.get(do, str)(verb.lemma_)
    return do, verb.lemma_, plain, used


def _participle(verb: Token) -> bool:
    """Whether a verb without helpers is passive: `a ship built in May and named after him`."""
    if verb.dep_ == "conj" and verb.tag_ in ("VBN", "VBD"):
        objects = any(child.dep_ in COMPLEMENTS[:1] for child in verb.children)
        after = verb.head.dep_ in ("acl", "acomp") and verb.head.tag_ in ("VBN", "VBD", "JJ")
        return (after or verb.tag_ == "VBN") and not objects
    return verb.tag_ == "VBN" or (verb.tag_ == "VBD" and verb.dep_ == "acl")


def _shared_helpers(verb: Token) -> list[Token]:
    """What a coordinate verb shares: `was built and opened`, `can fly and swim`."""
    helpers = [child for child in verb.head.children if child.dep_ in HELPERS]
    alike = verb.tag_ == verb.head.tag_ and verb.tag_ in ("VBN", "VB", "VBG")
    passive = any(child.dep_ == "auxpass" for child in helpers)
    if passive and verb.tag_ == "VBD":  # `was found in May and confirmed in June`
        alike = not any(child.dep_ in COMPLEMENTS for child in verb.children)
    return [child for child in helpers if child.tag_ != "TO"] if alike else []


def _full(helper: Token) -> str:
    return {"'s": "is", "'re": "are", "'ve": "have", "ca": "can", "wo": "will"}.get(
        helper.lower_, helper.lower_
    )


def form_of_be(subject: Token, *, past: bool) -> str:
    """`is`, `are`, `was` or `were`, as a subject takes it."""
    if _plural(subject):
        return "were" if past else "are"
    return "was" if past else "is"


def _plural(noun: Token) -> bool:
    coordinate = any(child.dep_ == "conj" for child in noun.children)
    spoken = noun.tag_ == "PRP" and noun.lower_ in _SPEAKERS
    return noun.tag_ in ("NNS", "NNPS") or noun.lower_ in _PLURAL_WORDS or spoken or coordinate


def _past(token: Token) -> bool:
    """Whether the nearest finite verb at or above a token tells of the past."""
    while True:
        if token.pos_ in VERBS:
            group = [token, *(child for child in token.children if child.dep_ in HELPERS)]
            if any(word.tag_ == "VBD" for word in group):
                return True
            if any(word.tag_ in ("VBZ", "VBP", "MD") for word in group):
                return False
        if token.head == token:
            return False
        token = token.head


def noun_phrase(noun: Token, without: Token | None = None) -> list[Token]:
    """A noun with what stands before it and what it is of, without all that is said about it."""
    tokens = []
    for child in noun.children:
        if child == without:
            continue
        before = child.i < noun.i and child.dep_ not in ("punct", "appos", "relcl", "prep", "cc")
        if before or (child.dep_ == "prep" and child.lower_ == "of"):
            tokens += list(child.subtree) if before else [child, *_object(child)]
    return sorted([*tokens, noun], key=lambda token: token.i)


def _object(preposition: Token) -> list[Token]:
    return [t for child in preposition.children for t in noun_phrase(child)]


def _hyphenated(token: Token) -> bool:
    """Whether a hyphen ties a token to the next: `torus` of `torus-shaped`."""
    return token.i + 1 < len(token.doc) and token.nbor(1).text in ("-", "–")


def pruned(tokens: Sequence[Token], clause: Clause, keep: Token, *, short: bool) -> list[Token]:
    """The tokens without what a clause can do without, save the way to the token `keep`.

    Where `short`, adverbials go too, and the second and later parts of lists.
    """
    needed = {keep.i, *(token.i for token in keep.ancestors)}
    first = next(
        (t.i for t in clause.verb.children if t.dep_ == "prep" and t.i > clause.verb.i), -1
    )
    aside = any(t.head == clause.verb and t.dep_ in _ADJUNCTS for t in (keep, *keep.ancestors))
    first_bound = aside and (first != clause.verb.i + 1 or _is_time(clause.verb.doc[first]))
    bound = first_bound or any(
        t.dep_ in ("dobj", "attr", "acomp", "oprd", "dative") for t in clause.verb.children
    )

    def spare(token: Token) -> bool:
        if token.i in needed or token == clause.verb or _hyphenated(token):
            return False
        head, dep = token.head, token.dep_
        if not short and _condition(token, clause.verb, clause.head):
            return False
        if dep in _LOOSE or dep == "punct":
            return dep != "punct" or token.text not in "-–—/'"
        if token.ent_iob_ == "I" and head.ent_type_ == token.ent_type_:
            return False
        if dep == "prep" and head.pos_ in NOUNS:
            return token.lower_ != "of" and (short or head.head != clause.verb)
        if not short or token.tag_ in RELATIVES:
            return False
        if dep == "agent":
            return aside and head == clause.verb
        if dep == "prep" and head == clause.verb:
            return bound or token.i != first
        return dep in ("conj", "cc", "preconj", "npadvmod") or (
            dep == "advmod" and head.pos_ in VERBS
        )

    left = _other_members(keep)

    def goes(token: Token) -> bool:
        for above in (token, *token.ancestors):
            if above in (clause.verb, clause.head):
                return False
            if spare(above):
                return True
        return False

    return [token for token in tokens if token.i not in left and not goes(token)]


def _is_time(preposition: Token) -> bool:
    return any(child.ent_type_ in ("DATE", "TIME") for child in preposition.children)


def _other_members(token: Token) -> set[int]:
    """Positions of the list members before the one that a token belongs to."""
    left: set[int] = set()
    for member in (token, *token.ancestors):
        if member.dep_ == "conj" and member.head.pos_ in NOUNS:
            own = {t.i for t in member.subtree}
            before = {t.i for t in member.head.subtree if t.i < member.i}
            left |= before - own
    return left
