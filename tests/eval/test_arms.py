"""Every arm by name, on a tiny memory: it answers, in its own way, on the one base model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlpmem_eval.arms import ARMS, make_arms
from mlpmem_eval.comparison import RunSettings, run_comparison
from mlpmem_eval.knn import NeighborMemory, open_teacher
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rag import FEW_SHOT, QUOTED, template_of
from mlpmem_eval.tuning import tune
from mlpmem_eval.twin import sharing_base
from mlpmem_eval.workbench import Workbench
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory import Memory
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.reading import reading_prompt

from .fakes import LetterEncoder

QUESTIONS = [
    EvalQuestion(f"q{n}", f"What did {who} find?", ("a map",), ("doc-4",))
    for n, who in enumerate(("Ines Maro", "Dr. Tollen"))
]


@pytest.fixture
def bench(tiny_memory: Path, tiny_documents: list[Document], tmp_path: Path) -> Workbench:
    memory = MemoryModel.load(tiny_memory, device="cpu", dtype="float32")
    return Workbench(
        memory,
        tiny_memory,
        load_manifest(tiny_memory),
        tmp_path,
        Corpus(tuple(tiny_documents)),
        max_new_tokens=4,
        tuning_questions=lambda: QUESTIONS,
        encoder=LetterEncoder(),
    )


def test_arms_that_are_not_known_or_lack_documents_are_refused(bench: Workbench) -> None:
    for names in (["base", "base"], ["bas"], []):
        with pytest.raises(ConfigError, match="allowed are base, rag"):
            make_arms(names, bench)
    bench.corpus = None
    for name in ARMS:
        if name not in ("base", "memory"):
            with pytest.raises(ConfigError, match=re.escape(f"'{name}' needs the documents")):
                make_arms([name], bench)


def test_a_knn_that_votes_like_the_datastore(bench: Workbench, tiny_memory: Path) -> None:
    teacher = open_teacher(tiny_memory, load_manifest(tiny_memory), bench.memory.model.memory)
    assert isinstance(teacher, NeighborMemory)
    twin = sharing_base(bench.memory, teacher, 0.5)
    assert twin.model.base is bench.memory.model.base
    assert isinstance(bench.memory.model.memory, Memory)  # the original is as it was
    ids = bench.memory.tokenizer("In the harbour, Ines Maro")["input_ids"]
    p = twin.log_probs(ids, lambda_=1.0).exp()
    assert p.sum(-1).tolist() == pytest.approx([1.0] * len(ids), abs=1e-4)
    base = bench.memory.log_probs(ids, lambda_=0.0)
    assert twin.log_probs(ids, lambda_=0.0).equal(base)


def test_templates_are_the_librarys_own_prompts() -> None:
    filled = template_of(FEW_SHOT).format(context_str="A text.", query_str="Who?")
    assert filled == reading_prompt("Who?", ["A text."])
    assert (
        template_of(QUOTED)
        .format(context_str="A text.", query_str="Who?")
        .endswith("A text.\n\nQ: Who?\nA:")
    )


def test_halving_finds_the_best_and_asks_the_bad_ones_less() -> None:
    asked: list[int] = []

    def ask(setting: int, question: str) -> str:
        asked.append(setting)
        return "a map" if setting == 5 else "nothing"

    questions = [EvalQuestion(str(n), f"{n}?", ("a map",)) for n in range(12)]
    found = tune(ask, questions, range(8))
    assert found.best == 5
    assert asked.count(5) == 8
    assert asked.count(7) == 2


def test_a_search_is_done_once(bench: Workbench) -> None:
    asked: list[float] = []

    def ask(setting: float, question: str) -> str:
        asked.append(setting)
        return "a map" if setting == 0.5 else ""

    best, _ = bench.search("x", (0.25, 0.5), ask, {"a": 1})
    again, _ = bench.search("x", (0.25, 0.5), ask, {"a": 1})
    count = len(asked)
    assert (best, again, count) == (0.5, 0.5, 2)
    bench.search("x", (0.25, 0.5), ask, {"a": 2})
    assert len(asked) == 2 * count
    assert json.loads((bench.work / "tuning-x.json").read_text())["tried"][0]["setting"] == 0.5


# peft asks transformers 5 for a name that it will have no more in 6.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["base", "memory", "knn", "lora"])
def test_an_arm_answers(name: str, bench: Workbench, tmp_path: Path) -> None:
    (arm,) = make_arms([name], bench)
    rows = run_comparison([arm.answerer], QUESTIONS, tmp_path / "rows", RunSettings(warm_up=0))
    assert [row.error for row in rows] == [None, None]
    assert all(row.llm_calls >= 1 for row in rows)
    assert rows[0].documents is None
    json.dumps(arm.answerer.settings)  # kept with the report
