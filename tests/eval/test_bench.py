"""The paper's protocols on a tiny memory, each beside a slow way or numbers by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_eval import perplexity, published
from mlpmem_eval.bench import ARMS, BenchConfig, run_bench
from mlpmem_eval.bench_schema import Bench, Line, Section, markdown
from mlpmem_eval.growth import Sized, first_tokens, grown_index
from mlpmem_eval.knn import open_teacher
from mlpmem_eval.latency import recording
from mlpmem_eval.perplexity import FITTED_SHARE, text_perplexity
from mlpmem_eval.preference import Choice, load_choices, prefers_right
from mlpmem_eval.protocols import preference_section, question_section, speed_section
from mlpmem_eval.schema import Report
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import ConfigError, OutputError
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.mixing import best_lambda
from mlpmem_rag.prompts import answer_ids, prompt_ids

from .fakes import FakeArm, FakeClock, letter_index, question


@pytest.fixture(scope="module")
def memory(tiny_memory: Path) -> MemoryModel:
    return MemoryModel.load(tiny_memory, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def text(tiny_documents: list[Document]) -> str:
    return "\n".join(document.text for document in reversed(tiny_documents))


# Perplexity.


def test_perplexities_are_those_of_a_slow_walk(
    memory: MemoryModel, tiny_memory: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "WINDOW", 48)
    monkeypatch.setattr(perplexity, "STRETCH", 32)
    teacher = open_teacher(tiny_memory, load_manifest(tiny_memory), memory.model.memory)
    found = text_perplexity(memory, teacher, text, tokens=100)
    ids = memory.tokenizer(text)["input_ids"][:101]
    window = 48
    base, near, mixed = [], [], []
    for place in range(1, len(ids)):
        # The window in which this token is predicted: the first that holds it.
        start = max(0, math.ceil((place + 1 - window) / (window // 2))) * (window // 2)
        prompt = torch.tensor([ids[start:place]])
        target = ids[place]
        with torch.inference_mode():
            logits = memory.model(input_ids=prompt, memory_lambda=0.0, use_cache=False).logits
            own = memory.model(input_ids=prompt, use_cache=False).logits
            assert memory.backbone is not None
            hidden = memory.backbone.hidden(prompt, torch.ones_like(prompt))[0, -1:]
            votes = teacher.log_probs(hidden)[0]
        base.append(float(logits[0, -1].float().softmax(-1)[target]))
        mixed.append(float(own[0, -1].float().softmax(-1)[target]))
        (column,) = (teacher.corpus_tokens == target).nonzero().flatten().tolist() or (None,)
        near.append(0.0 if column is None else float(votes[column].exp()))
    fitted = int(len(base) * FITTED_SHARE)
    lambda_ = best_lambda(np.array(base[:fitted]), np.array(near[:fitted]))
    assert found.teacher_lambda == pytest.approx(lambda_, abs=1e-3)
    knn = [lambda_ * n + (1 - lambda_) * b for n, b in zip(near, base, strict=True)]
    for values, measured in (
        (base, found.perplexities.base),
        (knn, found.perplexities.teacher),
        (mixed, found.perplexities.memory),
    ):
        expected = math.exp(-np.log(values[fitted:]).mean())
        assert measured == pytest.approx(expected, rel=2e-3)
    assert found.perplexities.tokens == 100 - fitted


def test_without_rows_there_is_no_teacher(memory: MemoryModel, text: str) -> None:
    found = text_perplexity(memory, None, text, tokens=1024)
    assert found.teacher_lambda is None
    with pytest.raises(ConfigError, match="100 tokens is too short"):
        text_perplexity(memory, None, text, tokens=100)


# Right against made-up answers.


def test_a_choice_is_made_by_mean_log_probability(memory: MemoryModel) -> None:
    choices = [
        Choice("What did Ines Maro find?", "wild honey", "a very long and made-up story"),
        Choice("Who found it?", "Dr. Tollen found the ledger of 1887", "two"),
    ]
    found = prefers_right(memory, choices, ["In Lake Orsa, Ines Maro found wild honey."] * 2)
    assert list(found) == ["base", "rag", "memory"]

    def mean(asked: str, answer: str, lambda_: float | None) -> float:
        prompt = prompt_ids(memory.tokenizer, [{"role": "user", "content": asked}])
        tokens = answer_ids(memory.tokenizer, answer)
        log_probs = memory.log_probs([*prompt, *tokens], lambda_=lambda_)
        places = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        return float(np.mean([log_probs[p, t] for p, t in zip(places, tokens, strict=True)]))

    for number, choice in enumerate(choices):
        for arm, before, lambda_ in (
            ("base", "", 0.0),
            ("rag", "In Lake Orsa, Ines Maro found wild honey.\n\n", 0.0),
            ("memory", "", None),
        ):
            right, wrong = (
                mean(before + choice.question, answer, lambda_)
                for answer in (choice.right, choice.hallucinated)
            )
            assert found[arm][number] == float(right > wrong)


def test_choices_are_the_rows_with_a_made_up_answer(tmp_path: Path) -> None:
    rows = [
        {"question": " Who? ", "answers": ["Ada", "A."], "hallucinated_answer": "Bob"},
        {"question": "Why?", "answers": ["so"]},
        {"question": "When?", "answers": [], "hallucinated_answer": "now"},
        {"answers": ["no question"], "hallucinated_answer": "now"},
        {"question": " ", "answers": ["so"], "hallucinated_answer": "now"},
        {"question": "Where?", "answer": "Kiel", "hallucinated_answer": "Rome"},
        {"question": "Which?", "answers": "this", "hallucinated_answer": "that"},
        {"question": "How many?", "answers": [42], "hallucinated_answer": "43"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\nno json")
    assert load_choices(path) == [
        Choice("Who?", "Ada", "Bob"),
        Choice("Where?", "Kiel", "Rome"),
        Choice("Which?", "this", "that"),
        Choice("How many?", "42", "43"),
    ]


def test_the_gain_is_paired() -> None:
    right = {"base": np.array([0.0, 1, 0, 1]), "memory": np.array([1.0, 1, 1, 1])}
    section = preference_section(right)
    found = {line.what: line for line in section.lines}
    assert (found["base"].value, found["memory"].value) == (50.0, 100.0)
    assert found["memory - base"].value == 50.0
    assert found["memory - base"].published == published.PREFERENCE["memory - base"]
    assert found["memory"].interval == (100.0, 100.0)


# Questions and speed, from a report.


def test_questions_stand_beside_the_papers_arms(report: Report) -> None:
    found = {line.what: line for line in question_section(report).lines}
    assert found["rag, exact match"].value == pytest.approx(50.0)
    assert found["rag, exact match"].published == published.QUESTIONS["rag"]
    assert found["rag, F1"].published is None
    assert found["memory, exact match"].n == 5


def test_speed_is_the_mean_of_ratios(report: Report) -> None:
    found = {line.what: line for line in speed_section(report).lines}
    entries = [e for e in report.questions if e.arms["memory"].error is None]
    ratios = [e.arms["memory"].total_ms / e.arms["base"].total_ms for e in entries]
    assert found["answer, memory / base"].value == pytest.approx(
        math.prod(ratios) ** (1 / len(ratios))
    )
    assert found["first token, rag / memory"].value == pytest.approx(600 / 200)
    tokens = [(5 / e.arms["memory"].total_ms) / (9 / e.arms["rag"].total_ms) for e in entries]
    assert found["tokens a second, memory / rag"].value == pytest.approx(
        math.prod(tokens) ** (1 / len(tokens))
    )
    assert "first token, knn / memory" not in found  # there is no such arm


# Corpus size.


def test_a_grown_index_finds_what_it_found_before(clock: FakeClock) -> None:
    index = letter_index(clock, 0.0, ["aaa apples", "zzz zebras", "mmm moles", "eee eels"])
    grown = grown_index(index, index._embed_model, 8)
    assert len(grown.vector_store.to_dict()["embedding_dict"]) == 8 * 4
    for asked in ("zebra?", "an apple", "moles", "eel"):
        before, after = (
            [n.node.get_content() for n in i.as_retriever(similarity_top_k=3).retrieve(asked)]
            for i in (index, grown)
        )
        assert after == before


def test_far_rows_have_no_vote(memory: MemoryModel, tiny_memory: Path) -> None:
    manifest = load_manifest(tiny_memory)
    plain = open_teacher(tiny_memory, manifest, memory.model.memory)
    grown = open_teacher(tiny_memory, manifest, memory.model.memory)
    grown.add_far_rows(3 * grown.num_rows + 1)
    hidden = torch.randn(5, memory.model.memory.config.hidden_size)
    assert torch.allclose(grown.log_probs(hidden), plain.log_probs(hidden), atol=1e-4)
    assert grown._index.ntotal == 4 * plain.num_rows + 1


def test_every_arm_is_timed_in_turns_after_a_warm_up(clock: FakeClock) -> None:
    asked = [question(n) for n in range(3)]
    said = {q.text: "x" for q in asked}
    arms = [
        Sized(FakeArm("rag", said, wait=lambda: clock.sleep(0.25)), 1),
        Sized(FakeArm("rag", said, wait=lambda: clock.sleep(0.5)), 4),
    ]
    with recording(clock) as recorder:
        found = first_tokens(arms, asked, recorder)
    assert [(t.arm, t.factor, len(t.milliseconds)) for t in found] == [("rag", 1, 3), ("rag", 4, 3)]
    assert found[0].milliseconds == pytest.approx((250.0,) * 3)
    assert found[1].milliseconds == pytest.approx((500.0,) * 3)
    assert found[1].median == pytest.approx(500.0)


# All of it.


@pytest.fixture(scope="module")
def data(
    tiny_documents: list[Document], text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("data")
    documents = [json.dumps({"doc_id": d.id, "text": d.text}) for d in tiny_documents]
    (folder / "corpus.jsonl").write_text("\n".join(documents))
    rows = [
        {"question": f"What did {who} find?", "answers": ["a map"], "hallucinated_answer": "gold"}
        for who in ("Ines Maro", "Dr. Tollen", "the night watchman")
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def config(tiny_memory: Path, data: Path, tmp_path: Path) -> BenchConfig:
    return BenchConfig(
        tiny_memory,
        tmp_path / "bench",
        questions=data / "questions.jsonl",
        corpus=str(data / "corpus.jsonl"),
        text=data / "text.txt",
        tokens=1024,
        limit=2,
        max_new_tokens=4,
        device="cpu",
        dtype="float32",
    )


@pytest.mark.usefixtures("letters")
def test_all_protocols_are_run_and_written(config: BenchConfig) -> None:
    found = run_bench(config)
    assert [section.name for section in found.sections] == [
        "held-out perplexity",
        "perplexity",
        "questions",
        "speed",
        "preference",
        "corpus size",
    ]
    stored = Bench.model_validate_json((config.out / "bench.json").read_text())
    assert stored.model_dump(mode="json") == found.model_dump(mode="json")
    assert (config.out / "bench.md").read_text() == markdown(found)
    by_name = {section.name: section for section in found.sections}
    arms = {line.what.split(",")[0] for line in by_name["questions"].lines}
    assert arms == set(ARMS)
    assert {line.n for line in by_name["questions"].lines} == {2}
    assert [line.what for line in by_name["corpus size"].lines] == [
        "memory, any size", "rag, 1×", "rag, 4×", "rag, 16×", "knn, 1×", "knn, 4×", "knn, 16×",
    ]  # fmt: skip
    assert all(section.differs for section in found.sections)
    assert all(math.isfinite(line.value) for s in found.sections for line in s.lines)
    assert len(found.not_run) == 1  # the nine tasks
    manifest = load_manifest(config.memory)
    held_out = {line.what: line.value for line in by_name["held-out perplexity"].lines}
    assert held_out["knn"] == manifest.figures["perplexity"]["teacher"]


@pytest.mark.usefixtures("letters")
def test_what_has_no_data_is_named(config: BenchConfig) -> None:
    found = run_bench(replace(config, questions=None, corpus=None))
    assert [section.name for section in found.sections] == ["held-out perplexity", "perplexity"]
    assert any("give --questions with a hallucinated_answer" in why for why in found.not_run)
    without = run_bench(replace(config, corpus=None, text=None, out=config.out / "2"))
    assert [s.name for s in without.sections][1:] == ["questions", "speed", "preference"]
    assert any(why.startswith("arms rag, knn:") for why in without.not_run)


def test_nothing_to_measure_and_foreign_folders_are_refused(
    config: BenchConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        run_bench(replace(config, questions=None, text=None))
    with pytest.raises(ConfigError, match="cannot be read"):
        run_bench(replace(config, text=tmp_path / "none.txt"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no bench"):
        run_bench(replace(config, out=tmp_path / "other"))


def test_the_table_is_markdown() -> None:
    line = Line(what="memory", value=12.345678, interval=(1.0, 2.0), n=1234, published=9.58)
    section = Section(
        name="x", title="X", unit="times", lines=[line], settings={}, differs=["All of it."]
    )
    told = markdown(
        Bench(
            schema_version=1, created="now", settings={}, warnings=["w"], sections=[section],
            not_run=["y"],
        )
    )  # fmt: skip
    assert "| memory | 12.35 (1–2) | 1,234 | 9.58 |" in told
    assert "- All of it." in told
    assert "### Not run\n\n- y" in told
    assert "- w" in told
