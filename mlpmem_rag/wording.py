"""The words of questions: the wh-phrases that ask for an answer, and tokens as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from mlpmem_rag.markup import HIDDEN

if TYPE_CHECKING:
    from spacy.tokens import Span, Token

    from mlpmem_rag.mentions import Mentions

LENGTHS = (
    *("m", "km", "cm", "mm", "mi", "ft", "metre", "meter", "kilometre", "kilometer", "mile"),
    *("centimetre", "centimeter", "foot", "feet", "inch", "yard", "light-year", "parsec"),
)
PERIODS = (
    *("second", "minute", "hour", "day", "week", "month", "year", "decade", "century"),
    "millennium",
)
DIMENSIONS = {
    **dict.fromkeys(("diameter", "width", "breadth"), "wide"),
    **dict.fromkeys(("mass", "weight"), "heavy"),
    **dict.fromkeys(("area", "size", "volume"), "large"),
    **dict.fromkeys(("height", "elevation", "altitude"), "high"),
    **dict.fromkeys(("speed", "velocity"), "fast"),
    **{"length": "long", "depth": "deep", "age": "old", "distance": "far away"},
    **{"thickness": "thick", "temperature": "hot"},
}
_EXTENTS = {
    **{word: word for word in ("long", "wide", "tall", "high", "deep", "thick", "old")},
    **{"away": "far away", "apart": "far apart", "across": "far across"},
}
_IRREGULAR = {
    "become": "became", "begin": "began", "bend": "bent", "bind": "bound", "bite": "bit",
    "blow": "blew", "break": "broke", "bring": "brought", "build": "built", "buy": "bought",
    "catch": "caught", "choose": "chose", "come": "came", "cut": "cut", "deal": "dealt",
    "do": "did", "draw": "drew", "drink": "drank", "drive": "drove", "eat": "ate", "fall": "fell",
    "feed": "fed", "feel": "felt", "fight": "fought", "find": "found", "flee": "fled",
    "fly": "flew", "forbid": "forbade", "forget": "forgot", "freeze": "froze", "get": "got",
    "give": "gave", "go": "went", "grow": "grew", "hang": "hung", "have": "had", "hear": "heard",
    "hide": "hid", "hit": "hit", "hold": "held", "hurt": "hurt", "keep": "kept", "know": "knew",
    "lay": "laid", "lead": "led", "leave": "left", "lend": "lent", "let": "let", "lie": "lay",
    "lose": "lost", "make": "made", "mean": "meant", "meet": "met", "oversee": "oversaw",
    "overtake": "overtook", "pay": "paid", "put": "put", "read": "read", "ride": "rode",
    "ring": "rang", "rise": "rose", "run": "ran", "say": "said", "see": "saw", "seek": "sought",
    "sell": "sold", "send": "sent", "set": "set", "shake": "shook", "shoot": "shot",
    "show": "showed", "shut": "shut", "sing": "sang", "sink": "sank", "sit": "sat",
    "sleep": "slept", "speak": "spoke", "spend": "spent", "split": "split", "spread": "spread",
    "stand": "stood", "steal": "stole", "stick": "stuck", "strike": "struck", "swear": "swore",
    "swim": "swam", "take": "took", "teach": "taught", "tear": "tore", "tell": "told",
    "think": "thought", "throw": "threw", "undergo": "underwent", "understand": "understood",
    "undertake": "undertook", "wear": "wore", "weave": "wove", "win": "won",
    "withdraw": "withdrew", "write": "wrote",
}  # fmt: skip
_UNITS = {
    **{"m": "metres", "km": "kilometres", "cm": "centimetres", "mm": "millimetres"},
    **{"mi": "miles", "ft": "feet", "kg": "kilograms", "lb": "pounds", "t": "tonnes"},
}
_NAMING = (  # `the city of Warsaw`
    *("city", "town", "village", "state", "province", "county", "island", "kingdom", "republic"),
    *("region", "district", "month", "year", "name", "title", "term", "language"),
)
_KINDS = {"NORP": "", "ORG": "organization"}
_LOCATING = ("lie", "locate", "situate", "live", "stand", "reside", "base", "bear", "find", "be")
_OFTEN = ("daily", "weekly", "monthly", "annually", "yearly")
_AT = ("in", "at", "on", "near", "from", "to")
_PLACES = (
    *("in", "at", "on", "near", "from", "around", "between", "within", "inside", "outside"),
    *("to", "into", "onto", "toward", "towards", "under", "above"),
)
_BEFORE_NAMES = ("the", "a", "an", "its", "his", "her", "their", "this")
_MODIFIERS = ("nummod", "amod", "compound", "nmod")


@dataclass(frozen=True)
class Asked:
    """What takes the answer's place in a question: `wh` `noun`, instead of `span`."""

    wh: str
    noun: str
    span: Span
    whole: bool = True  # the answer, with all that depends on it; else what follows stays

    @property
    def phrase(self) -> str:
        """The words of it."""
        return f"{self.wh} {self.noun}".strip()


def asked_as(answer: Span, mentions: Mentions) -> list[Asked]:
    """The wh-phrases that ask for an answer, by its kind and role; the likeliest first."""
    root = answer.root
    if degree := _of_degree(answer):
        return [degree]
    if HIDDEN.fullmatch(answer.text) and (kind := _of_code(answer)):
        return [kind]
    if root.head.i >= answer.end and root.head.pos_ in ("NOUN", "PROPN"):
        if root.dep_ in _MODIFIERS:
            return _of_modifier(answer)
        if root.dep_ == "poss":
            return [_whose(answer)]
    if answer[0].lower_ in ("because", "due", "owing") or root.dep_ == "advcl":
        return [Asked("why", "", answer)]
    if root.dep_ in ("prep", "agent"):
        return [Asked(_of_preposition(answer), "", answer)]
    if root.dep_ == "pcomp" and root.tag_ == "VBG" and root.head.lower_ in ("by", "through"):
        return [Asked("how", "", answer)]
    if root.pos_ in ("VERB", "AUX"):
        return [Asked("what", "", answer)]
    if root.lower_ == "times" and any(t.dep_ == "npadvmod" for t in root.rights):
        return [Asked("how often", "", answer)]  # `three times a day`
    age = root.head.head if root.dep_ == "pobj" and root.head.lower_ == "of" else root
    if age.lemma_ == "age" and age.dep_ == "pobj" and age.head.lower_ == "at":
        return [Asked("at what age", "", answer.doc[age.left_edge.i : answer.end])]
    if root.ent_type_ in ("DATE", "TIME") or _unit(root) in PERIODS:
        return [Asked(wh, noun, answer) for wh, noun in _of_time(answer)]
    if root.dep_ == "pobj" and root.head.lower_ == "of" and root.head.head.lemma_ in _NAMING:
        noun = root.head.head
        wider = answer.doc[noun.left_edge.i : answer.end]
        return [Asked("what", noun.text, wider), Asked("what", "", wider)]
    words = _of_number(answer) or _of_name(answer, mentions)
    return [Asked(wh, noun, answer) for wh, noun in words]


def _of_modifier(answer: Span) -> list[Asked]:
    """`60` of `60 rooms` -> `how many rooms`; `old` of `old rooms` -> `what kind of rooms`."""
    noun = answer.root.head
    whole = answer.doc[min(answer.start, noun.left_edge.i) : noun.i + 1]
    if answer.root.dep_ == "nummod":
        tied = noun.i > 1 and noun.nbor(-1).text == "-"  # `light-years`
        unit = noun.nbor(-2).text + "-" + noun.text if tied else _UNITS.get(noun.text, noun.text)
        after = answer.doc[noun.i + 1] if noun.i + 1 < len(answer.doc) else noun
        if after.lower_ in _EXTENTS:  # `9 m tall` -> `how many metres tall`
            whole = answer.doc[whole.start : after.i + 1]
            unit = f"{unit} {after.lower_}"
        return [Asked("how many", unit, whole, whole=False)]
    ways = [Asked("what kind of", noun.text, whole)]
    if answer.root.ent_type_ == "NORP" and noun.dep_ in ("attr", "appos"):
        ways.append(Asked("what nationality", "", whole))
    elif answer.root.ent_type_ == "NORP" and noun.lemma_ in ("word", "name", "term", "phrase"):
        ways.append(Asked("what language", "", whole))
    return ways


def _of_code(answer: Span) -> Asked | None:
    """`--quiet` of `the --quiet option` and of `the option --quiet` -> `which option`."""
    code, doc = answer.root, answer.doc
    before = [t for t in code.lefts if t.dep_ in _MODIFIERS and t.text.islower()]
    if before:  # `the environment variable HOME`, with the code as the noun
        kind = doc[before[0].left_edge.i : code.i]
        return Asked("which", kind.text, doc[code.left_edge.i : code.i + 1])
    noun = code.head
    if noun.pos_ != "NOUN" or not noun.text.islower():
        return None
    if code.dep_ in _MODIFIERS and noun.i >= answer.end:
        kind, whole = doc[answer.end : noun.i + 1], doc[noun.left_edge.i : noun.i + 1]
    elif code.dep_ in ("appos", "nmod") and noun.i == answer.start - 1:
        nouns = [t.i for t in noun.lefts if t.dep_ == "compound"]
        kind, whole = doc[min([*nouns, noun.i]) : noun.i + 1], doc[noun.left_edge.i : answer.end]
    else:
        return None
    return Asked("which", kind.text, whole)


def _of_degree(answer: Span) -> Asked | None:
    """`a third` of `a third larger` -> `how much larger`; `9 m` of `9 m tall` -> `how tall`."""
    root, doc = answer.root, answer.doc
    after = doc[answer.end] if answer.end < len(doc) else None
    if after is None or not any(
        token.pos_ == "NUM" or token.text == "a" for token in doc[root.left_edge.i : answer.end]
    ):
        return None
    if root.dep_ == "npadvmod" and after == root.head and after.tag_ in ("JJR", "RBR"):
        return Asked("how much", after.text, doc[answer.start : after.i + 1], whole=False)
    if after.lower_ in _EXTENTS and root.pos_ == "NOUN" and after in (root.head, *root.rights):
        return Asked("how", _EXTENTS[after.lower_], doc[answer.start : after.i + 1], whole=False)
    return None


def _whose(answer: Span) -> Asked:
    """`Warsaw` of `Warsaw's first cabaret` -> `whose first cabaret`."""
    owner, owned = answer.root, answer.root.head
    end = next((t.i + 1 for t in owner.rights if t.dep_ == "case"), answer.end)
    return Asked(
        "whose", answer.doc[end : owned.i + 1].text, answer.doc[answer.start : owned.i + 1]
    )


def _of_preposition(answer: Span) -> str:
    first = answer[0].lower_
    if any(child.ent_type_ in ("DATE", "TIME") for child in answer.root.children):
        return "how long" if first == "for" else "when"
    if first in ("by", "through", "via", "using"):
        return "how"
    if first in _PLACES:
        return "where"
    return "why" if first == "for" else "what"


def _of_time(answer: Span) -> list[tuple[str, str]]:
    text, noun = answer.text, answer.root
    if re.fullmatch(r"\d{4}", text):
        return [("what year", ""), ("when", "")]
    if answer[0].lower_ in ("every", "each", "once", "twice") or text.lower() in _OFTEN:
        return [("how often", "")]
    counted = any(
        child.dep_ == "nummod" or child.lower_ in ("several", "many", "few")
        for child in noun.children
    )
    moment = re.search(r"\b(ago|old|later|earlier|after|before)\b", text)
    if counted and _unit(noun) in PERIODS and not moment:
        return [("how long", ""), ("when", "")]
    if re.search(r"\b[A-Z]\w+ \d{1,2}\b(?!\d)|\b\d{1,2} [A-Z]", text):
        return [("when", ""), ("on what date", "")]
    return [("when", ""), *([("what century", "")] if noun.lower_ == "century" else [])]


def _unit(noun: Token) -> str:
    """The singular of a noun, with what a hyphen ties to it: `light-year`."""
    tied = noun.i > 1 and noun.nbor(-1).text == "-"
    return (noun.nbor(-2).lower_ + "-" if tied else "") + noun.lemma_.lower()


def _of_number(answer: Span) -> list[tuple[str, str]]:
    root, kind = answer.root, answer.root.ent_type_
    if root.text == "°":
        return [("how many", "degrees")]
    if root.text == "%" or kind == "PERCENT" or "percent" in root.lower_:
        of = [t for t in root.rights if t.lower_ == "of" and t.i >= answer.end]
        whole = words_of(list(of[0].subtree), {}).strip() if of else ""
        return [("what percentage", whole), ("how much", whole)]
    if kind == "MONEY":
        return [("how much", "")]
    if any(child.dep_ == "nummod" for child in root.children):
        if _unit(root).removeprefix("kilo").removeprefix("mega") in LENGTHS:
            of_what = [t.lemma_ for t in root.head.lefts if t.dep_ == "nsubj"]
            if root.head.lower_ == "of" or not DIMENSIONS.keys().isdisjoint(of_what):
                return [("what", "")]  # `a length of 2 km`, `its length is 2 km`
            return [("how far", ""), *([] if root.dep_ == "npadvmod" else [("what", "")])]
        if root.pos_ == "NOUN":
            return [("what", "")]
    return [("what", "")] if kind in ("CARDINAL", "QUANTITY") or root.pos_ == "NUM" else []


def _of_name(answer: Span, mentions: Mentions) -> list[tuple[str, str]]:
    """Wh-phrases for a name or another noun phrase."""
    root, kind = answer.root, answer.root.ent_type_
    told = mentions.type_of(answer)
    typed = [("what", told)] if told else _by_last_noun(answer, mentions.common)
    if mentions.is_thing(answer) or HIDDEN.fullmatch(answer.text):
        return [("what", ""), *typed]
    if is_person(answer) or (root.pos_ == "PROPN" and root.lower_ in mentions.persons):
        return [("who", ""), *typed]
    if kind in ("GPE", "LOC", "FAC"):
        if root.dep_ == "pobj" and root.head.lower_ in _AT:
            return [("where", ""), *(typed or [("what", "")])]
        if root.dep_ == "nsubj" or root.head.dep_ == "agent":
            return [("who", ""), *(typed or [("what", "country" if kind == "GPE" else "place")])]
        return [("what", "place"), *(typed or [("what", "")])]
    if root.dep_ == "pobj" and root.head.lower_ in ("in", "at", "on"):
        verb = root.head.head
        where = [("where", "")] if verb.pos_ in ("VERB", "AUX") else []
        if verb.lemma_ in _LOCATING:
            return [*where, ("what", ""), *typed]
        return [("what", ""), *where, *typed]
    if kind in _KINDS and root.pos_ == "PROPN":
        acts = root.dep_ == "nsubj" or root.head.dep_ == "agent"
        return [("who" if acts else "what", ""), *(typed or [("what", _KINDS[kind])])][:2]
    if root.pos_ == "PROPN" and root.head.dep_ == "agent":
        return [("who", ""), ("what", ""), *typed]
    if root.pos_ == "PROPN" and root.dep_ == "nsubj" and root.head.lemma_ != "be":
        return [("what", ""), ("who", ""), *typed]
    return [("what", ""), *typed]


def past_tense(lemma: str) -> str:
    """The past tense of a verb, by its lemma: `won`, `stopped`, `carried`, `moved`."""
    if lemma in _IRREGULAR:
        return _IRREGULAR[lemma]
    if lemma.endswith("e"):
        return f"{lemma}d"
    if re.search(r"[^aeiou]y$", lemma):
        return f"{lemma[:-1]}ied"
    once = re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", lemma)
    return f"{lemma}{lemma[-1] if once else ''}ed"


def third_person(lemma: str) -> str:
    """The present tense of a verb after `who` or `what`: `wins`, `carries`, `passes`."""
    if re.search(r"[^aeiou]y$", lemma):
        return f"{lemma[:-1]}ies"
    return lemma + ("es" if re.search(r"(s|x|z|ch|sh|o)$", lemma) else "s")


def is_person(span: Span) -> bool:
    """Whether a span names a person; an article before it tells that it does not."""
    article = span.start > 0 and span.doc[span.start - 1].lower_ == "the"
    return span.root.ent_type_ == "PERSON" and span[0].lower_ != "the" and not article


def _by_last_noun(answer: Span, common: frozenset[str]) -> list[tuple[str, str]]:
    """`Royal Castle` -> `what castle`; `literary cabaret` -> `what kind of cabaret`."""
    root = answer.root
    if not any(child.dep_ in _MODIFIERS for child in root.lefts):
        return []
    if root.pos_ == "NOUN":
        return [("what kind of", root.text)]
    named = root.pos_ == "PROPN" and root.text.istitle() and root.lower_ in common
    return [("what", root.lower_)] if named else []


def words_of(tokens: Sequence[Token], names: Mapping[int, str]) -> str:
    """Tokens as text, some by another name; a word that only begins its sentence in lower case."""
    pieces = []
    for token, following in zip_longest(tokens, tokens[1:]):
        name = token.pos_ == "PROPN" or token.ent_type_
        starts = token.is_sent_start and token.text.istitle()
        starts = starts and not (name and token.lower_ not in _BEFORE_NAMES)
        word = token.text[:1].lower() + token.text[1:] if starts else token.text
        adjacent = following is not None and following.i == token.i + 1
        pieces.append(names.get(token.i, word) + (token.whitespace_ if adjacent else " "))
    return "".join(pieces)


def tidy(text: str) -> str:
    """Text without doubled spaces and without the punctuation that pieces leave behind."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:?!)])", r"\1", text)
    text = re.sub(r"\s+(['’]s)\b", r"\1", text)
    text = re.sub(r"^(what|who|where|when)\s*,", r"\1", text)
    text = re.sub(r"\(\s*\)|[,;:]+(?=[,;:.?!]|$)", "", text)
    return text.strip(" ,;:.–—-").strip()
