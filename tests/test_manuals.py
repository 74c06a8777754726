"""Questions of manuals: sections, instructions, options, replies, code."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_rag.corpus import Document, read_corpus
from mlpmem_rag.markup import HIDDEN
from mlpmem_rag.paragraphs import Paragraph, paragraphs, plain_title
from mlpmem_rag.questions import Question
from mlpmem_rag.rules import RuleWriter


@pytest.fixture(scope="module")
def writer() -> RuleWriter:
    return RuleWriter()


def written(writer: RuleWriter, text: str, title: str | None = "Tool") -> list[Question]:
    return list(writer.write([Document("d", f"# {title}\n\n{text}", title, "d.md")]))


def pairs(writer: RuleWriter, text: str) -> set[tuple[str, str]]:
    return {(question.text, question.answer) for question in written(writer, text)}


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("Use citric acid for the kettle.", "What should you use for the kettle?", "citric acid"),
        ("Never clean the seal with vinegar.", "What should you never clean the seal with?",
         "vinegar"),
        ("Do not put the filter in a dishwasher.", "Where should you not put the filter?",
         "dishwasher"),
        ("Please keep the box for two years.", "How long should you keep the box?",
         "two years"),
        ("If the light blinks, replace the battery.",
         "What should you replace if the light blinks?", "battery"),
        ("To reset the device, hold the button for ten seconds.",
         "How do you reset the device?", "hold the button for ten seconds"),
        ("In order to reset it, you must hold the button.", "How do you reset Tool?",
         "hold the button"),
        ("You can press the lever to open the lid.", "How do you open the lid?",
         "press the lever"),
        ("To list all versions, run `tool list --all`.", "How do you list all versions?",
         "tool list --all"),
        ("Use the `--quiet` option to silence all messages.",
         "How do you silence all messages?", "--quiet"),
        ("To upgrade everything, run:\n\n    tool up --all", "How do you upgrade everything?",
         "tool up --all"),
        ("Put the path into the environment variable `TOOL_HOME`.",
         "Which environment variable should you put the path into?", "TOOL_HOME"),
        ("`tool list` shows every step.", "What does tool list show?", "every step"),
    ],
)  # fmt: skip
def test_an_instruction_is_asked_for(
    writer: RuleWriter, text: str, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, text)


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("- `--force`: Overwrites existing files.", "What overwrites existing files?", "--force"),
        ("- `--dry-run` Show what would be done.", "What shows what would be done?", "--dry-run"),
        ("- `timeout` (int) – The number of seconds to wait.", "What is timeout?",
         "number of seconds to wait"),
        ("| Option | Description | Default |\n|-|-|-|\n| `-n` | Limits the output | `20` |",
         "What limits the output?", "-n"),
        ("| Option | Description | Default |\n|-|-|-|\n| `-n` | Limits the output | `20` |",
         "What is the default of -n?", "20"),
        ("`--all`\n\nShow hidden files.", "What shows hidden files?", "--all"),
        ("## `clear()`\n\nCancels the running timer.", "What does clear() cancel?",
         "running timer"),
    ],
)  # fmt: skip
def test_what_describes_an_option_is_asked_of_it(
    writer: RuleWriter, text: str, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, text)


@pytest.mark.parametrize(
    "text",
    [
        "## Can I use hot water?\n\nNo, the maximum is 38 °C. More follows.",
        "**Can I use hot water?**\n\nNo, the maximum is 38 °C.",
        "Q: Can I use hot water?\n\nA: No, the maximum is 38 °C.",
    ],
)
def test_a_question_in_the_text_has_the_sentence_below_it_for_an_answer(
    writer: RuleWriter, text: str
) -> None:
    assert ("Can I use hot water?", "No, the maximum is 38 °C.") in pairs(writer, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("He left a note: do not open the door.", "He left a note: do not open the door."),
        ("The keynote: it was long.", "The keynote: it was long."),
        ("Security note: keep the key.", "keep the key."),
        ("`pip` (the installer) can get packages.", "X (the installer) can get packages."),
        ("`x` - `y` is the difference.", "X - X is the difference."),
        ("`git` Bash completion is there.", "X Bash completion is there."),
    ],
)
def test_only_what_begins_a_paragraph_is_a_label_or_a_term(text: str, told: str) -> None:
    (paragraph,) = paragraphs(Document("d", f"# A\n\n{text}\n", "A", "d"))
    assert HIDDEN.sub("X", paragraph.text) == told


def test_a_reply_is_whole(writer: RuleWriter) -> None:
    text = "## Where is it made?\n\nIt is made in the USA. It was built there."
    assert ("Where is it made?", "It is made in the USA.") in pairs(writer, text)
    listed = "## How do I list all files?\n\n- `ls`: Lists files."
    assert ("How do I list all files?", "ls: Lists files.") in pairs(writer, listed)
    numbered = "Q1: Can I swim here?\n\nA1: Yes, in summer you can."
    assert ("Can I swim here?", "Yes, in summer you can.") in pairs(writer, numbered)


def test_an_option_describes_nothing_beyond_its_paragraph() -> None:
    text = "# A\n\n- `--a`\n- `--b`\n\n## Notes\n\nDeprecated options go."
    assert [p.about for p in paragraphs(Document("d", text, "A", "d"))] == [""]


@pytest.mark.parametrize(
    "text",
    [
        "Thank you for reading.",
        "Welcome to the guide.",
        "Hope this helps.",
        "Among them are three lakes.",
        "- `config.yml`: Edit this file first.",
        "- `-x`: See above.",
    ],
)
def test_what_is_no_instruction_is_not_retold(writer: RuleWriter, text: str) -> None:
    retold = (" you should", "Who edits", "What edits", "What sees")
    assert not [q for q, _ in pairs(writer, text) if any(words in q for words in retold)]


def test_a_condition_keeps_its_words(writer: RuleWriter) -> None:
    found = {q for q, _ in pairs(writer, "Replace the battery if the light doesn't blink.")}
    assert "What should you replace if the light doesn't blink?" in found


@pytest.mark.parametrize("opening", ["It overwrites", "This option overwrites", "Overwrites"])
def test_what_an_option_is_called_where_it_is_described(writer: RuleWriter, opening: str) -> None:
    found = pairs(writer, f"- `--force`: {opening} existing files.")
    assert ("What overwrites existing files?", "--force") in found
    assert not [answer for _, answer in found if answer == "Tool"]


def test_what_the_reader_needs_is_asked(writer: RuleWriter) -> None:
    found = {q for q, _ in pairs(writer, "You need Python 3.10 to run the server.")}
    assert not [q for q in found if q.startswith("What you ")]
    assert [q for q in found if q.startswith("What do you need")]


def test_a_question_with_nothing_below_it_is_left_alone(writer: RuleWriter) -> None:
    text = "## Why?\n\n## What does it do?\n\n| A | B |\n|-|-|\n| x | y |"
    assert not {q for q, _ in pairs(writer, text)} & {"Why?", "What does it do?"}


def test_a_question_says_what_its_section_is_about(writer: RuleWriter) -> None:
    found = pairs(writer, "## Descaling\n\nLemon juice can damage the seal.")
    assert ("What can damage the seal (Tool, Descaling)?", "Lemon juice") in found
    assert ("What can damage the seal?", "Lemon juice") in found


def test_it_is_what_the_sentence_before_spoke_of_in_a_section(writer: RuleWriter) -> None:
    text = "The warranty covers defects. It excludes the cartridge."
    assert ("What does the warranty exclude?", "cartridge") in pairs(writer, f"## Terms\n\n{text}")
    assert ("What does Tool exclude?", "cartridge") in pairs(writer, text)


def test_what_could_be_asked_of_any_instruction_is_not_asked(writer: RuleWriter) -> None:
    asked = {question for question, _ in pairs(writer, "Use the big key. See the other page.")}
    assert "What should you use?" not in asked
    assert "What should you use (Tool)?" in asked
    assert not [question for question in asked if " see" in question]


def test_beside_code_a_common_word_is_no_answer(writer: RuleWriter) -> None:
    text = "The folder holds a cache, and `run` reads Python files."
    answers = {answer for _, answer in pairs(writer, text)}
    assert "Python files" in answers
    assert "cache" not in answers
    assert "cache" in {answer for _, answer in pairs(writer, text.replace("`", ""))}


def test_nothing_hidden_is_left_in_questions_of_a_manual(writer: RuleWriter) -> None:
    guides = sorted(Path(__file__).parents[1].glob("*.md"))
    found = list(writer.write(read_corpus(guides[0].parent / "README.md").documents))
    assert len(found) > 300
    for question in found:
        assert "zyloq" not in f"{question}".lower()
        assert "`" not in question.text


def test_a_paragraph_knows_its_section_and_its_source() -> None:
    text = "# The `tool`\n\nNote: It is small.\n\n## Use\n\n`-a`: All.\n\n### Why?\n\nIt is good."
    guide = Document("d", text, "The `tool`", "d.md")
    assert plain_title(guide) == "The tool"
    first, second, third = paragraphs(guide)
    assert first == Paragraph("It is small.")
    assert (second.text, second.section) == ("All.", "Use")
    assert second.source.shown(second.about) == "-a"
    assert (third.asked, third.section) == ("", "Why?")  # by itself it asks nothing
