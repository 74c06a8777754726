"""Every arm by name, on a tiny memory: it answers, in its own way, on the one base model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
from llama_index.core.base.response.schema import Response

from mlpmem_eval.answerers import QueryEngineAnswerer, Reply
from mlpmem_eval.arms import ARMS, make_arms
from mlpmem_eval.comparison import RunSettings, run_comparison
from mlpmem_eval.knn import NeighborMemory, open_teacher
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rag import CANDIDATES, FEW_SHOT, QUOTED, RagSetting, template_of
from mlpmem_eval.rows import read_lines
from mlpmem_eval.tuning import tune
from mlpmem_eval.twin import sharing_base
from mlpmem_eval.workbench import Workbench
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.calibrate import Calibration, HeldOutAnswer, StudyFigures
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.gate import Gate, constant_weights
from mlpmem_rag.memory import Memory
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.questions import Question, save_questions
from mlpmem_rag.reading import reading_prompt
from mlpmem_rag.storage import write_json

from .fakes import LetterEncoder

QUESTIONS = [
    EvalQuestion(f"q{n}", f"What did {who} find?", ("a map",), ("doc-4",))
    for n, who in enumerate(("Ines Maro", "Dr. Tollen"))
]


def bench_of(folder: Path, documents: list[Document], work: Path) -> Workbench:
    return Workbench(
        MemoryModel.load(folder, device="cpu", dtype="float32"),
        folder,
        load_manifest(folder),
        work,
        Corpus(tuple(documents)),
        max_new_tokens=4,
        tuning_questions=lambda: QUESTIONS,
        encoder=LetterEncoder(),
    )


@pytest.fixture
def bench(tiny_memory: Path, tiny_documents: list[Document], tmp_path: Path) -> Workbench:
    return bench_of(tiny_memory, tiny_documents, tmp_path)


def test_arms_that_are_not_known_or_lack_documents_are_refused(bench: Workbench) -> None:
    for names in (["base", "base"], ["bas"], []):
        with pytest.raises(ConfigError, match="allowed are base, rag"):
            make_arms(names, bench)
    bench.corpus = None
    for name in ARMS:
        if name not in ("base", "memory", "recall"):
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


def only(right: int, asked: list[int]) -> Callable[[int, str], str]:
    """One setting is right, always; who was asked is noted."""

    def ask(setting: int, question: str) -> str:
        asked.append(setting)
        return "a map" if setting == right else "nothing"

    return ask


def test_halving_finds_the_best_and_asks_the_bad_ones_less() -> None:
    asked: list[int] = []
    questions = [EvalQuestion(str(n), f"{n}?", ("a map",)) for n in range(12)]
    found = tune(only(5, asked), questions, range(8))
    assert found.best == 5
    assert asked.count(5) == 12
    assert asked.count(7) == 2


def test_few_candidates_are_asked_everything_in_the_end() -> None:
    asked: list[int] = []
    questions = [EvalQuestion(str(n), f"{n}?", ("a map",)) for n in range(12)]
    assert tune(only(1, asked), questions, range(3)).best == 1
    assert [asked.count(setting) for setting in range(3)] == [12, 12, 2]


@pytest.mark.parametrize(("better", "best"), [(0, 0), (3, 5)])
def test_the_first_candidate_stays_unless_another_is_better(better: int, best: int) -> None:
    def ask(setting: int, question: str) -> str:
        number = int(question.rstrip("?"))
        right = {0: number % 3 == 0, 5: number % 3 == 1 or number < better}
        return "a map" if right.get(setting, False) else "nothing"

    questions = [EvalQuestion(str(n), f"{n}?", ("a map",)) for n in range(12)]
    # Four right each, or four and six, though the first is right where the search begins.
    assert tune(ask, questions, range(8)).best == best


def test_a_search_is_done_once(bench: Workbench) -> None:
    asked: list[float] = []

    def ask(setting: float, question: str) -> str:
        asked.append(setting)
        return "a map" if setting == 0.5 else ""

    best, _ = bench.search("x", (0.25, 0.5), ask, {"a": 1})
    again, _ = bench.search("x", (0.25, 0.5), ask, {"a": 1})
    count = len(asked)
    assert (best, again, count) == (0.5, 0.5, 4)
    bench.search("x", (0.25, 0.5), ask, {"a": 2})
    assert len(asked) == 2 * count
    assert json.loads((bench.work / "tuning-x.json").read_text())["tried"][0]["setting"] == 0.5


# peft asks transformers 5 for a name that it will have no more in 6.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("memory", ["tiny_memory", "studied_memory"])
def test_an_arm_answers(
    memory: str,
    name: str,
    tiny_documents: list[Document],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    bench = bench_of(request.getfixturevalue(memory), tiny_documents, tmp_path)
    bench.threshold = 0.5  # this memory gives no confidence to fit one on
    if (memory, name) == ("tiny_memory", "recall"):
        with pytest.raises(ConfigError, match="this memory was taught no questions"):
            make_arms([name], bench)
        return
    (arm,) = make_arms([name], bench)
    rows = run_comparison([arm.answerer], QUESTIONS, tmp_path / "rows", RunSettings(warm_up=0))
    assert [row.error for row in rows] == [None, None]
    assert all(row.llm_calls >= 1 for row in rows)
    retrieves = name in ("rag", "rag-tuned", "memory+rag", "recall", "memory-first")
    assert (rows[0].documents is not None) == retrieves
    assert arm.answerer.name == name
    json.dumps(arm.answerer.settings)  # kept with the report


def test_an_interrupted_search_asks_only_what_is_missing(bench: Workbench) -> None:
    asked: list[tuple[float, str]] = []

    def ask(setting: float, question: str) -> str:
        if len(asked) == 3:
            asked.clear()
            raise KeyboardInterrupt
        asked.append((setting, question))
        return "a map" if setting == 0.5 else ""

    bench.tuning_questions = lambda: [EvalQuestion(f"q{n}", f"{n}?", ("a map",)) for n in range(4)]
    candidates = (0.1, 0.25, 0.5, 0.75)
    with pytest.raises(KeyboardInterrupt):
        bench.search("x", candidates, ask, {"a": 1})
    with (bench.work / "tuning-x.jsonl").open("a") as file:
        file.write('{"key": "cut sh')

    def later(setting: float, question: str) -> str:
        asked.append((setting, question))
        return "a map" if (setting, question) == (0.5, "1?") else ""

    best, seconds = bench.search("x", candidates, later, {"a": 1})
    left = [(setting, f"{n}?") for setting in (0.1, 0.5, 0.25) for n in (1, 2, 3)]
    assert asked == [(0.75, "0?"), *left]
    assert best == 0.5  # what it had said before the interruption counts
    kept = read_lines(bench.work / "tuning-x.jsonl")
    assert len(kept) == 3 + len(asked)
    assert seconds == pytest.approx(sum(entry["seconds"] for entry in kept))


def test_memory_first_asks_rag_where_rag_is_more_often_right(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On written questions RAG's best setting is right in one of four, and has the larger F1."""
    asked = [EvalQuestion(f"q{n}", f"{n}?", ("a map of the lake",)) for n in range(4)]
    bench.tuning_questions = lambda: asked

    best = CANDIDATES[1]

    class Scripted(QueryEngineAnswerer):
        def answer(self, question: str) -> Reply:
            right = "a map of the lake" if question == "0?" else "a map"
            return Reply(right if self.settings["words"] == best.words else "nothing")

    def scripted(name: str, setting: RagSetting) -> Scripted:
        known = setting if setting == best else replace(setting, words=-1)
        return Scripted(name, cast(Any, None), asdict(known))

    monkeypatch.setattr(bench, "rag_answerer", scripted)
    assert bench.memory_first_threshold == (0.25, 0.0)
    assert bench.tuned_rag[0] == best


def test_a_confidence_is_told_of_the_answer_that_is_given() -> None:
    class Told:
        def __init__(self, told: dict[str, Any]) -> None:
            self.told = told

        def query(self, question: str) -> Response:
            return Response("text", metadata={"mlpmem": self.told | {"confidence": 0.4}})

    for told, confidence in (
        ({"route": "rag"}, None),
        ({"route": "memory"}, 0.4),
        ({"route": "memory+rag"}, 0.4),
        ({}, 0.4),
    ):
        reply = QueryEngineAnswerer("x", cast(Any, Told(told))).answer("Who?")
        assert reply.confidence == confidence


def test_an_adapter_without_a_budget_is_refused(bench: Workbench) -> None:
    bench.manifest = replace(bench.manifest, figures={})
    with pytest.raises(ConfigError, match="as long as the memory's training took"):
        make_arms(["lora"], bench)
    assert not bench.memory_setup.trained  # nothing breaks even with what is not known


def test_memory_first_weighs_both_on_held_out_questions(
    tiny_documents: list[Document],
    tiny_memory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The memory is right from .3 on; RAG on the second question alone."""
    shutil.copytree(tiny_memory, tmp_path / "memory")
    work = tmp_path / "memory" / "work"
    (work / "calibration").mkdir()
    (work / "questions").mkdir()
    answers = tuple(
        HeldOutAnswer(n, sure, right=n > 1) for n, sure in enumerate((0.1, 0.2, 0.3, 0.5, 0.9))
    )
    plain = constant_weights(0.5)
    kept = Calibration(Gate(plain, plain), None, StudyFigures(4, 4, 1.0), answers)
    write_json(work / "calibration" / "calibration.json", asdict(kept))
    written = [Question(f"What of {n}?", f"it is {n}", "s", "doc-0") for n in range(5)]
    written.append(replace(written[1], answer="it may be one"))  # right as well
    save_questions(written, work / "questions" / "questions.jsonl")
    bench = bench_of(tmp_path / "memory", tiny_documents, tmp_path / "bench")
    (tmp_path / "bench").mkdir()
    bench.tuning_questions = lambda: QUESTIONS * 2
    bench.asked = frozenset([written[4].text])
    asked: list[str] = []

    class Scripted(QueryEngineAnswerer):
        def answer(self, question: str) -> Reply:
            asked.append(question)
            return Reply(written[5].answer if question == written[1].text else "nothing")

    monkeypatch.setattr(bench, "rag_answerer", lambda n, _: Scripted(n, cast(Any, None), {}))
    bench.tuned_rag  # noqa: B018  searched for before
    asked.clear()
    threshold, seconds = bench.memory_first_threshold
    assert sorted(asked) == [question.text for question in written[:4]]
    assert threshold == 0.3
    assert seconds > 0
    assert bench.searches["memory-first"] | {"seconds": 0, "key": ""} == {
        "seconds": 0, "key": "", "threshold": 0.3, "right": 0.75, "memory": 0.5, "rag": 0.25,
        "from_memory": 0.5, "n": 4,
    }  # fmt: skip
    again = bench_of(tmp_path / "memory", tiny_documents, tmp_path / "bench")
    again.threshold = 0.7
    assert again.memory_first_threshold == (0.7, 0.0)
