"""What a document has spoken of so far: whom its pronouns mean, and of what kind its things are.

Knows the parse of the sentences before, and the title. Guesses: who is `he`, the last person that
was a subject; what is `it`, most often what the document is about.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlpmem_rag.clauses import NOUNS, SUBJECTS, Clause, noun_phrase
from mlpmem_rag.wording import is_person, tidy

if TYPE_CHECKING:
    from spacy.tokens import Span, Token

_KINDS_OF = ("type", "kind", "form", "class", "one", "member", "group")
_PERSONS = ("he", "she", "his", "her", "him")
_THINGS = ("they", "them", "their", "these", "those")
_SPEAKERS = ("you", "your", "we", "our", "us", "i", "my", "me")  # who reads or writes the text
_SMALL = ("of", "the", "and", "for", "in")
_NAME_PARTS = ("compound", "flat", "nmod")


class Mentions:
    """Things that one document mentioned.

    Attributes:
        title: what the document is about.
        section: what its present section is about, where it has several.
        common: words that the corpus writes in lower case, and so no names.
        asked: questions that sentences before answer, in lower case.
        acronym: the title's first letters, where the text uses them.
        persons: last names of persons, in lower case.
    """

    def __init__(
        self,
        title: str = "",
        text: str = "",
        common: frozenset[str] = frozenset(),
        things: frozenset[str] = frozenset(),
    ) -> None:
        self.title = without_brackets(title)
        self.section = ""
        self.acronym = _acronym(self.title, text)
        self.common = common
        self._all_things = things
        self.asked: set[str] = set()
        self._named = _as_named(self.title, text)
        self.persons: set[str] = set()
        self._person = self._thing = self._things = self._named
        self._last = ""  # common noun that was the subject, in a paragraph of a section
        self._types: dict[str, str] = {}

    def enter(self, section: str) -> None:
        """A paragraph begins, in the same section or another one."""
        self.section = re.sub(r"[()]", "", without_brackets(section))
        self._last = ""

    def untold(self, text: str) -> str:
        """Of title and section, what a question has to add to be understood by itself."""
        if self.title and _told(text, self.title):
            return ""
        told = self.section and _told(text, self.section)
        return ", ".join(filter(None, (self.title, "" if told else self.section)))

    def names(self, sentence: Span) -> dict[int, str]:
        """What to say instead of pronouns, short names and `this thing`: position -> text."""
        names: dict[int, str] = {}
        if sentence[0].text in self.title.split():  # no word that only begins its sentence
            names[sentence.start] = sentence[0].text
        for token in sentence:
            if token.tag_ in ("PRP", "PRP$") and token.dep_ != "expl":
                if token.lower_ in _SPEAKERS:
                    continue
                if name := self.meant_by(token, sentence):
                    names[token.i] = f"{name}'s" if token.tag_ == "PRP$" else name
            elif self.title and self._points_to_title(token):
                names |= {
                    token.i: self._named,
                    **{t.i: "" for t in token.doc[token.i + 1 : token.head.i + 1]},
                }
            elif self.title and token.dep_ in SUBJECTS and self._is_title(token):
                parts = [t.i for t in token.subtree if t.i < token.i or t.pos_ == "NUM"]
                names |= {**dict.fromkeys(parts, ""), token.i: self._named}
        return names

    def meant_here(self, sentence: Span) -> dict[int, Token]:
        """The nouns that subject pronouns stand for, where the sentence itself tells them."""
        found = {}
        for pronoun in sentence:
            third = pronoun.tag_ == "PRP" and pronoun.lower_ not in _SPEAKERS
            if third and pronoun.dep_ in SUBJECTS[:2]:
                noun = _subject_before(pronoun, sentence)
                if noun is not None:
                    found[pronoun.i] = noun
        return found

    def remember(self, sentence: Span, found: Sequence[Clause]) -> None:
        """Take note of what a sentence is about."""
        self.persons |= {ent.root.lower_ for ent in sentence.ents if is_person(ent)}
        for clause in found:
            self._learn_type(clause)
        subject = next((token for token in sentence if token.dep_ in SUBJECTS), None)
        if subject is None or subject.pos_ == "PRON":
            return  # what went before is spoken of still
        text = self._named if self._is_title(subject) else _short(subject)
        if subject.ent_type_ == "PERSON":
            self._person = text
        elif subject.tag_ == "NNS":
            self._things = text
        elif subject.pos_ == "PROPN" and not self.title:
            self._thing = text
        self._last = text if self.section and subject.tag_ == "NN" else ""

    def type_of(self, answer: Span) -> str:
        """The common noun for a name, as the document told it, or nothing."""
        root = answer.root
        if root.pos_ == "PROPN":
            before = [t for t in root.lefts if t.dep_ in _NAME_PARTS and t.pos_ == "NOUN"]
            if before:
                return before[-1].lower_
            if root.dep_ == "appos" and (
                root.head.pos_ == "NOUN" or root.head.lower_ in self.common
            ):
                return root.head.lower_
        return self._types.get(answer.text.lower(), "")

    def is_thing(self, name: Span) -> bool:
        """Whether documents tell that a name is no person's."""
        return name.text.lower() in self._all_things

    def _own(self, text: str, noun: Token) -> str:
        """`its mass` -> `Mercury's mass`, where nothing in the sentence is meant."""
        owner = next((t for t in noun.children if t.tag_ == "PRP$"), None)
        name = "" if owner is None else self.meant_by(owner, noun.sent)
        return re.sub(r"\b([Ii]ts|[Hh]is|[Hh]er)\b", f"{name}'s", text) if name else text

    def _cannot_be(self, noun: Token, pronoun: Token) -> bool:
        """Whether a noun is surely not what a pronoun stands for."""
        person = noun.ent_type_ == "PERSON" and noun.text.lower() not in self._all_things
        if pronoun.lower_ in _PERSONS:
            about_person = self.is_about_person(self._person)
            return about_person and not person and not self._is_title(noun)
        return pronoun.lower_ in ("it", "its") and person and not self._is_title(noun)

    def is_about_person(self, name: str) -> bool:
        """Whether a name that a pronoun stands for is a person's."""
        return (
            name == self._person
            and name.lower().removeprefix("the ").removeprefix("a ") not in self._all_things
        )

    def _is_title(self, noun: Token) -> bool:
        """Whether a name means what the document is about: its longer or shorter form."""
        doc, start = noun.doc, noun.left_edge.i
        told_so = (doc[start : end + 1].text.lower() for end in (noun.i, noun.right_edge.i))
        if self.title and noun.pos_ != "PRON" and self.title.lower() in told_so:
            return True
        told = {"poss", "amod", "appos", "conj", "prep"}
        if any(t.pos_ in ("NUM", "PROPN") for t in noun.rights):
            return False
        if self.acronym and noun.text == self.acronym:
            return not told & {child.dep_ for child in noun.children}
        if noun.pos_ != "PROPN" or told & {child.dep_ for child in noun.children}:
            return False
        title = set(self.title.lower().split())
        if noun.ent_type_ == "PERSON":
            return noun.lower_ in title
        return {noun.lower_, *(t.lower_ for t in noun.lefts if t.dep_ in _NAME_PARTS)} <= title

    def _points_to_title(self, token: Token) -> bool:
        """Whether a determiner and its noun mean what the document is about: `the planet`."""
        noun = token.head
        if token.dep_ != "det" or noun.pos_ not in NOUNS[:2]:
            return False
        if token.lower_ == "this" and (
            token.doc[token.i + 1 : noun.i + 1].text.lower() == self.title.lower()
        ):
            return True
        if noun.pos_ != "NOUN" or token.i != noun.i - 1:
            return False
        if token.lower_ == "this":
            return not noun.ent_type_
        bare = all(child.dep_ == "det" for child in noun.children)
        kinds = self._types.get(self.title.lower()), self.title.lower().split()[-1]
        return token.lower_ == "the" and bare and noun.lower_ in kinds

    def _learn_type(self, clause: Clause) -> None:
        """Remember the noun of `Mercury is a planet` and of `Mercury, a planet`."""
        noun = _predicate_noun(clause)
        subject = clause.head
        key = self.title if subject.pos_ == "PRON" or self._is_title(subject) else _short(subject)
        if noun is not None and subject.pos_ in ("PROPN", "PRON"):
            self._types.setdefault(key.lower(), noun.lower_)

    def meant_by(self, pronoun: Token, sentence: Span) -> str:
        """What a pronoun stands for; nothing where its sentence says so or nobody knows."""
        noun = _subject_before(pronoun, sentence)
        if noun is not None and self._cannot_be(noun, pronoun):
            noun = None
        if noun is not None:
            own = any(above.dep_ in SUBJECTS for above in (pronoun, *pronoun.ancestors))
            if not own or noun in (pronoun.head.children):
                return ""
            if self._is_title(noun):
                return self._named
            named = (t for t in noun.rights if t.dep_ == "appos" and t.pos_ == "PROPN")
            return self._own(_short(next(named, noun)), noun)
        if pronoun.lower_ in _PERSONS:
            return self._person
        if pronoun.lower_ in _THINGS:
            return self._things
        if self._last and pronoun.lower_ in ("it", "its"):
            return self._last
        about_person = self.title.lower() not in self._all_things and not {
            word.lower() for word in self._thing.split()
        }.isdisjoint(self.persons)
        return self._thing if pronoun.lower_ in ("it", "its") and not about_person else ""


def _told(text: str, topic: str) -> bool:
    """Whether a text tells a topic."""
    words = [word for word in topic.lower().split() if len(word) > 3] or [topic.lower()]
    return any(word in text.lower() for word in words)


def without_brackets(title: str) -> str:
    """`Mercury (planet)` -> `Mercury`."""
    return re.sub(r"\s*\([^)]*\)$", "", title).strip()


def is_about_thing(text: str) -> bool:
    """Whether a text says `it` more often than `he` or `she`."""
    words = Counter(re.findall(r"\w+", text.lower()))
    things = words["it"] + words["its"]
    return things > sum(words[word] for word in _PERSONS)


def _as_named(title: str, text: str) -> str:
    """A title as its text writes it inside sentences: `the asteroid belt`."""
    if not title:
        return ""
    here = rf"\b{re.escape(title)}\b(?! (?-i:[A-Z]))"  # of `the Warsaw Uprising` it is a part
    written = Counter(re.findall(rf"\b(?:the|an?) {here}", text, re.IGNORECASE))
    if 2 * written.total() <= len(re.findall(here, text, re.IGNORECASE)):
        return title
    article, _, noun = written.most_common(1)[0][0].partition(" ")
    return f"{article.lower()} {noun}"


def _acronym(title: str, text: str) -> str:
    """The first letters of a title, if its text uses them for it; else nothing."""
    words = [word for word in re.findall(r"\w+", title) if word.lower() not in _SMALL]
    letters = "".join(word[0].upper() for word in words)
    return letters if len(words) > 1 and re.search(rf"\b{letters}\b", text) else ""


def _subject_before(pronoun: Token, sentence: Span) -> Token | None:
    return next(
        (
            token
            for token in sentence[: pronoun.i - sentence.start]
            if token.dep_ in SUBJECTS and token.pos_ in ("NOUN", "PROPN")
        ),
        None,
    )


def _predicate_noun(clause: Clause) -> Token | None:
    noun: Token | None = clause.verb
    if clause.verb.dep_ != "appos":
        attributes = (t for t in clause.verb.children if t.dep_ == "attr")
        noun = next(attributes, None) if clause.verb.lemma_ == "be" else None
    while noun is not None and noun.lemma_ in _KINDS_OF:
        of = (t for child in noun.children if child.lower_ == "of" for t in child.children)
        noun = next(of, None)
    return noun if noun is not None and noun.pos_ == "NOUN" else None


def _short(noun: Token) -> str:
    text = tidy("".join(token.text_with_ws for token in noun_phrase(noun)))
    for article in ("A ", "An "):
        text = text.removeprefix(article)
    return text[:1].lower() + text[1:] if text.startswith("The ") else text
