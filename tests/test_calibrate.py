"""Calibration: held-out rows as the model sees them, splits, and what a lookup would reach."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import GenerationConfig

from mlpmem_rag import calibrate as module
from mlpmem_rag.answering import answer_batch
from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.calibrate import (
    MAX_HARM,
    Calibration,
    HeldOutAnswer,
    HeldOutRows,
    QuestionSplit,
    StudyFigures,
    answer_coverage,
    calibrate,
    nearest_answers,
    other_texts,
    score_other_text,
    score_positions,
    score_text,
    split_questions,
    unharming,
)
from mlpmem_rag.confidence import NUM_FEATURES, Confidence, Trace, fit_confidence
from mlpmem_rag.contexts import Contexts, encode_contexts
from mlpmem_rag.corpus import Document
from mlpmem_rag.gate import Gate, gate_features
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.query import PooledEncoder
from mlpmem_rag.questions import Question, accepted_answers, without_topic
from mlpmem_rag.recall import question_keys
from mlpmem_rag.scoring import exact_match
from mlpmem_rag.study import StudyRows, study_rows
from mlpmem_rag.windows import Window, make_windows, tokenize

CORPUS_TOKENS = torch.arange(4, 300, 2)
"""Every other token: half of the true tokens have no memory mass."""
QUESTIONS = [
    Question(f"Who found the {thing} of {place}?", answer, f"{answer} found it.", f"doc-{n}")
    for n, (thing, place, answer) in enumerate(
        [
            ("lamps", "the mill", "Ines Maro"),
            ("map", "the harbour", "Dr. Tollen"),
            ("honey", "a mountain hut", "the night watchman"),
            ("ledger", "Lake Orsa", "two surveyors"),
            ("lamp", "the old mill, which nobody had asked about", "Ines Maro"),
        ]
    )
]


@dataclass(frozen=True)
class Setup:
    """A random query-aware memory on a tiny base model, and what it would be calibrated with."""

    backbone: Backbone
    model: MLPMemForCausalLM
    study: StudyRows
    windows: list[Window]
    contexts: Contexts

    @property
    def queries(self) -> torch.Tensor:
        return torch.from_numpy(self.study.query_vectors)


def setup_on(folder: Path, documents: list[Document]) -> Setup:
    backbone = load_backbone(str(folder), device="cpu", dtype="float32")
    width = backbone.hidden_size
    config = MemoryConfig(
        width, 24, 1, "silu", True, len(CORPUS_TOKENS), query_size=width, hidden_scale=2.0
    )
    memory = Memory(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    memory.corpus_tokens = CORPUS_TOKENS
    settings = MemorySettings(backbone.reference, backbone.layer, config, 1.0, 1.0)
    encoder = PooledEncoder(backbone)
    windows = make_windows(tokenize(documents, backbone.tokenizer), length=40, stride=25)
    return Setup(
        backbone,
        attach_memory(backbone, memory, settings),
        study_rows(backbone, encoder, QUESTIONS),
        windows,
        encode_contexts(encoder, backbone.tokenizer, windows),
    )


@pytest.fixture(scope="module")
def setup(family_folder: Path, tiny_documents: list[Document]) -> Setup:
    """Of each family."""
    return setup_on(family_folder, tiny_documents[:4])


@pytest.fixture(scope="module")
def llama(tiny_folder: Path, tiny_documents: list[Document]) -> Setup:
    return setup_on(tiny_folder, tiny_documents[:4])


def check(
    setup: Setup, found: HeldOutRows, row: int, ids: list[int], query: torch.Tensor | None
) -> None:
    """One row against the model's own forward pass up to the token before."""
    before = torch.tensor([ids[:-1]])
    with torch.no_grad():
        p_base = setup.backbone.model(input_ids=before).logits[0, -1].softmax(-1)
        vector = None if query is None else query[None]
        memory = setup.model(input_ids=before, query_vector=vector, memory_lambda=1.0)
    p_memory = memory.logits[0, -1].exp()
    assert found.p_base[row].item() == pytest.approx(p_base[ids[-1]].item(), rel=1e-3)
    expected = p_memory[ids[-1]].item()
    assert found.p_memory[row].item() == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert (expected == 0) == (ids[-1] not in CORPUS_TOKENS)
    features = gate_features(p_memory[CORPUS_TOKENS].log(), p_base.log(), CORPUS_TOKENS)
    torch.testing.assert_close(found.features[row], features, rtol=1e-3, atol=1e-3)


# Rows.


def score_answers(
    backbone: Backbone, memory: Memory, questions: list[Question], queries: torch.Tensor
) -> HeldOutRows:
    """The tokens of right answers, each with its question's vector."""
    pairs = [
        (
            prompt_ids(backbone.tokenizer, [{"role": "user", "content": question.text}]),
            answer_ids(backbone.tokenizer, question.answer),
        )
        for question in questions
    ]
    places = [range(len(prompt), len(prompt) + len(answer)) for prompt, answer in pairs]
    vectors = queries.repeat_interleave(torch.tensor([len(a) for _, a in pairs]), dim=0)
    return score_positions(backbone, memory, [p + a for p, a in pairs], places, vectors)


def test_rows_of_answers_equal_the_models_forward(setup: Setup) -> None:
    found = score_answers(setup.backbone, setup.model.memory, QUESTIONS, setup.queries)
    row = 0
    for number, question in enumerate(QUESTIONS):
        tokenizer = setup.backbone.tokenizer
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": question.text}])
        answer = answer_ids(tokenizer, question.answer)
        for length in range(1, len(answer) + 1):
            check(setup, found, row, prompt + answer[:length], setup.queries[number])
            row += 1
    assert row == len(found.p_base) == setup.study.num_rows


def test_rows_of_text_equal_the_models_forward(setup: Setup) -> None:
    every = [
        (window, place)
        for window in setup.windows
        for place in range(window.context, len(window.token_ids))
    ]
    rows = np.sort(np.random.default_rng(0).permutation(len(every))[:8])
    found = score_text(setup.backbone, setup.model.memory, setup.windows, rows)
    assert len(found.p_base) == len(rows)
    for number, row in enumerate(rows):
        window, place = every[row]
        check(setup, found, number, window.token_ids[: place + 1].tolist(), None)


def test_sequences_together_equal_each_alone(llama: Setup) -> None:
    sequences = [[0, 40, 81, 122, 163, 204, 9], [0, 7, 14], [0, 90, 91, 92, 93]]
    places = [[2, 6, 3], [1], [4, 1]]
    queries = torch.nn.functional.normalize(torch.randn(6, 32, generator=_seeded()), dim=1)
    memory = llama.model.memory
    together = score_positions(llama.backbone, memory, sequences, places, queries)
    row = 0
    for sequence, part in zip(sequences, places, strict=True):
        for place in part:
            alone = score_positions(
                llama.backbone, memory, [sequence], [[place]], queries[row : row + 1]
            )
            for name in ("features", "p_memory", "p_base"):
                expected = getattr(alone, name)[0]
                torch.testing.assert_close(
                    getattr(together, name)[row], expected, rtol=1e-4, atol=1e-6
                )
            row += 1


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_the_mixture_of_rows_is_that_of_the_model(llama: Setup) -> None:
    gate = Gate(asked=(0.2, -0.1, 0.3, 0.1, -0.2, 0.4), plain=(0.0,) * 6)
    settings = MemorySettings(
        llama.backbone.reference, llama.backbone.layer, llama.model.memory.config, 0.8, 1.0
    )
    gated = attach_memory(llama.backbone, llama.model.memory, replace(settings, gate=gate))
    rows = score_answers(llama.backbone, llama.model.memory, QUESTIONS[:1], llama.queries[:1])
    tokenizer = llama.backbone.tokenizer
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": QUESTIONS[0].text}])
    answer = answer_ids(tokenizer, QUESTIONS[0].answer)
    with torch.no_grad():
        ids = torch.tensor([prompt + answer])
        probs = gated(input_ids=ids, query_vector=llama.queries[:1]).logits[0].exp()
    expected = probs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).squeeze(1)
    torch.testing.assert_close(rows.mixed(gate, 0.8, asked=True), expected, rtol=1e-3, atol=1e-8)
    plain = rows.mixed(gate, 0.8, asked=False)
    torch.testing.assert_close(plain, 0.4 * rows.p_memory + 0.6 * rows.p_base)
    ungated = rows.mixed(None, 0.8, asked=True)
    torch.testing.assert_close(ungated, 0.8 * rows.p_memory + 0.2 * rows.p_base)


def test_a_question_beyond_the_context_window_does_no_harm(setup: Setup) -> None:
    """It has no rows to learn from; with learned positions, the base cannot even read it."""
    long = Question("ledger " * 120, "Ines Maro", "s", "doc-0")
    queries = torch.cat([setup.queries[:1], setup.queries[:1]])
    replies = answer_batch(
        setup.model, setup.backbone.tokenizer, [QUESTIONS[0].text, long.text], queries.numpy()
    )
    assert len(replies) == 2


# Which questions are held out.


@pytest.mark.parametrize("validated", [False, True])
def test_every_question_is_in_one_part(validated: bool) -> None:
    questions = [Question(f"q{n}", "a", "s", f"doc-{n % 10}") for n in range(1000)]
    held_out = {"doc-3", "doc-7"}
    unknown = np.array([q.document in held_out for q in questions])
    split = split_questions(questions, unknown, validated=validated, seed=0)
    parts = [split.train, split.known, split.unknown]
    assert np.sort(np.concatenate(parts)).tolist() == list(range(1000))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert {questions[n].document for n in split.unknown} == held_out
    assert len(split.unknown) == 200
    if validated:
        assert len(split.known) == pytest.approx(800 * module.HELD_OUT_QUESTIONS, rel=0.4)
        assert split.calibrates
    else:
        assert len(split.known) == 0
        assert not split.calibrates


def test_the_seed_decides_which() -> None:
    questions = [Question(f"q{n}", "a", "s", "doc") for n in range(500)]
    none = np.zeros(500, dtype=bool)

    def known(seed: int) -> list[int]:
        return list(split_questions(questions, none, validated=True, seed=seed).known)

    assert known(0) == known(0) != known(1)


def test_what_is_held_out_is_learned_in_other_words_and_never_in_the_same() -> None:
    """Each answer in two wordings, of which one is asked in the same words of two documents."""
    questions = [
        Question(f"q{n}" if kind else f"q{n // 2}, in other words", f"a{n}", f"s{n}", f"d{n % 2}")
        for n in range(1000)
        for kind in (0, 1)
    ] + [Question(f"only {n}", f"b{n}", f"t{n}", "d0") for n in range(1000)]
    split = split_questions(questions, np.zeros(3000, dtype=bool), validated=True, seed=0)
    train, known = ([questions[n] for n in part] for part in (split.train, split.known))
    assert len(known) >= 50
    assert not {q.text for q in train} & {q.text for q in known}
    assert {(q.source, q.answer) for q in known} <= {(q.source, q.answer) for q in train}


def test_the_same_words_with_the_title_behind_them_are_no_other_words() -> None:
    questions = [
        Question(f"Who left {n}{title}?", f"a{n}", f"s{n}", "d0")
        for n in range(600)
        for title in ("", " (Quay)")
    ]
    others = [Question(f"By whom was {n} left?", f"a{n}", f"s{n}", "d0") for n in range(300)]
    asked = [*questions, *others]
    split = split_questions(asked, np.zeros(len(asked), dtype=bool), validated=True, seed=0)
    train, known = ([asked[n] for n in part] for part in (split.train, split.known))
    assert len(known) >= 8
    assert not {without_topic(q.text) for q in train} & {without_topic(q.text) for q in known}
    assert {q.answer for q in known} <= {q.answer for q in train}
    assert without_topic("Who left (in 1887) Rome (Normans)?") == "who left (in 1887) rome?"
    assert without_topic("Who left (in 1887)?") == "who left?"
    assert without_topic("Who left Rome (Normans) first?") == "who left rome (normans) first?"


def test_where_nothing_has_other_words_some_are_held_out_all_the_same() -> None:
    questions = [Question(f"only {n}", f"b{n}", f"t{n}", "d0") for n in range(400)]
    split = split_questions(questions, np.zeros(400, dtype=bool), validated=True, seed=0)
    assert split.calibrates


def test_no_questions_are_no_split() -> None:
    split = split_questions([], np.zeros(0, dtype=bool), validated=True, seed=0)
    assert [len(part) for part in (split.train, split.known, split.unknown)] == [0, 0, 0]


def test_questions_without_rows_are_in_no_part() -> None:
    questions = [Question(f"q{n}", "a", "s", f"doc-{n % 2}") for n in range(6)]
    rows = np.array([5, 0, 0, 1], dtype=np.int32)
    odd = np.arange(6) % 2 == 1
    split = split_questions(questions, odd, validated=False, seed=0).among(rows)
    assert (split.train.tolist(), split.unknown.tolist()) == ([0], [1, 5])


# What a lookup would reach, and what the questions cover.


def test_the_nearest_question_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    answers = [("The mill", "mill.", "quay")[n] for n in rng.integers(3, size=60)]
    questions = [Question(f"q{n}", answer, "s", "d") for n, answer in enumerate(answers)]
    sources, ints = np.eye(2, 8, dtype=np.float32), rng.integers(2, size=60).astype(np.int32)
    study = StudyRows(np.zeros((0, 4), np.float16), ints[:0], ints[:0], vectors, sources, ints)
    taught, asked = np.arange(5, 45), np.arange(45, 60)
    memory = Memory(MemoryConfig(4, 8, 0, "silu", True, 3, query_size=8, num_questions=55))
    memory.questions[:40] = torch.from_numpy(question_keys(study, taught))

    def key(number: np.int64) -> npt.NDArray[np.float32]:
        whole: npt.NDArray[np.float32] = vectors[number] + sources[ints[number]] / 2
        return whole / np.linalg.norm(whole)

    expected = []
    for a in asked:
        nearest = max(taught, key=lambda t: float(vectors[a] @ key(t)))
        expected.append(exact_match(answers[nearest], [answers[a]]))
    accepted = [accepted_answers(questions)[a] for a in asked]
    found = nearest_answers(memory, vectors[asked], questions, taught, accepted)
    assert found == expected
    assert len(set(found)) == 2


def test_coverage_by_hand() -> None:
    documents = [
        Document("a", "The old mill. A mill burned in 1887!", None, "a"),  # 6 words, articles aside
        Document("b", "Honey, honey", None, "b"),
        Document("c", "Nobody asked.", None, "c"),
    ]
    questions = [
        Question("?", "the mill", "s", "a"),
        Question("?", "In 1887", "s", "a"),
        Question("?", "old honey", "s", "b"),
        Question("?", "asked", "s", "elsewhere"),
    ]
    assert answer_coverage(questions, documents) == pytest.approx((4 + 2 + 0) / (6 + 2 + 2))
    assert answer_coverage([], documents) == 0.0
    assert answer_coverage(questions, []) == 0.0


# The whole of it.


@pytest.fixture(scope="module")
def calibrated(llama: Setup) -> tuple[Calibration, QuestionSplit]:
    split = QuestionSplit(np.array([0, 3]), np.array([1, 4]), np.array([2]))
    return recalibrated(llama, split), split


def recalibrated(llama: Setup, split: QuestionSplit) -> Calibration:
    rows = np.arange(sum(window.num_rows for window in llama.windows))
    text = score_text(llama.backbone, llama.model.memory, llama.windows, rows)
    others = other_texts(llama.backbone, seed=0)
    return calibrate(
        llama.model, llama.backbone, QUESTIONS, llama.study, split, text, others, 0.5, seed=0
    )


def scored(setup: Setup) -> HeldOutRows:
    texts = other_texts(setup.backbone, seed=0)
    return score_other_text(setup.backbone, setup.model.memory, texts)


def test_other_text_is_hardly_harmed(
    llama: Setup, calibrated: tuple[Calibration, QuestionSplit]
) -> None:
    other = scored(llama)
    mixed = other.mixed(calibrated[0].gate, 1.0, asked=False)
    assert (other.p_base.log() - mixed.log()).mean().exp() <= MAX_HARM + 1e-6


def test_other_text_is_the_base_models_own_whatever_its_settings(llama: Setup) -> None:
    def drawn() -> torch.Tensor:
        return scored(llama).p_base

    plain, model = drawn(), llama.backbone.model
    settings = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            **{**settings.to_diff_dict(), "temperature": 0.1, "top_p": 0.5, "do_sample": True},
            repetition_penalty=1.5,
            min_p=0.3,
        )
        assert torch.equal(drawn(), plain)
    finally:
        model.generation_config = settings


def other_rows(*, p_memory: float) -> HeldOutRows:
    """Rows of which the base model gives every token .5, with features of all sizes."""
    features = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    return HeldOutRows(features, torch.full((64,), p_memory), torch.full((64,), 0.5))


def test_a_gate_is_closed_as_far_as_other_text_needs_it() -> None:
    rows = other_rows(p_memory=0.0)
    weights = (0.3, -0.2, 0.1, 0.0, 0.5, 1.0)
    found = unharming(weights, rows)
    assert found[:-1] == weights[:-1]
    opening = Gate(weights, found).opening(rows.features, asked=False)
    # A memory without mass takes log(1 - opening) from every token.
    assert (1 - opening).log().mean().exp().item() == pytest.approx(1 / MAX_HARM, rel=1e-5)


def test_a_gate_is_closed_however_wide_its_features_open_it() -> None:
    rows = other_rows(p_memory=0.0)
    weights = (0.0, 200.0, 0.0, 0.0, 0.0, -20.0)
    opening = Gate(weights, unharming(weights, rows)).opening(rows.features, asked=False)
    assert -(1 - opening).log().mean().item() <= math.log(MAX_HARM) + 1e-6


@pytest.mark.parametrize("p_memory", [0.5, 0.9])
def test_a_gate_that_does_no_harm_stays_as_it_was_fitted(p_memory: float) -> None:
    weights = (0.3, -0.2, 0.1, 0.0, 0.5, 1.0)
    assert unharming(weights, other_rows(p_memory=p_memory)) == weights


def test_without_the_limit_the_gate_is_better_than_any_constant_on_what_it_was_fitted_to(
    llama: Setup,
    calibrated: tuple[Calibration, QuestionSplit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_HARM", 1e9)
    calibration = recalibrated(llama, calibrated[1])
    rows = np.arange(sum(window.num_rows for window in llama.windows))
    memory = llama.model.memory
    text = score_text(llama.backbone, memory, llama.windows, rows)
    other = scored(llama)

    def nll(gate: Gate | None, lambda_: float) -> float:
        """Corpus text and other text count alike."""
        kinds = (kind.mixed(gate, lambda_, asked=False) for kind in (text, other))
        return float(np.mean([-p.clamp_min(1e-30).log().mean().item() for p in kinds]))

    constants = [nll(None, constant) for constant in np.linspace(0.001, 0.99, 100)]
    assert nll(calibration.gate, 1.0) < min(constants) + 1e-4
    mean = calibration.gate.opening(text.features, asked=False).mean().item()
    assert calibration.figures.text_gate == pytest.approx(mean, rel=1e-3)


def test_its_figures_equal_a_count_of_the_answers(
    llama: Setup, calibrated: tuple[Calibration, QuestionSplit]
) -> None:
    calibration, split = calibrated
    figures = calibration.figures

    def right(numbers: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
        texts = answer_batch(
            llama.model,
            llama.backbone.tokenizer,
            [QUESTIONS[n].text for n in numbers],
            llama.study.query_vectors[numbers],
        )
        matches = [
            exact_match(text, [QUESTIONS[n].answer])
            for (text, _), n in zip(texts, numbers, strict=True)
        ]
        return sum(matches) / len(matches)

    assert (figures.questions, figures.sources, figures.coverage) == (5, 4, 0.5)
    assert figures.taught == right(split.train)
    assert figures.held_out == right(split.known)
    assert figures.unknown == right(split.unknown)
    vectors = llama.study.query_vectors[split.known]
    accepted = [accepted_answers(QUESTIONS)[n] for n in split.known]
    nearest = nearest_answers(llama.model.memory, vectors, QUESTIONS, split.train, accepted)
    assert figures.nearest == sum(nearest) / 2
    assert (calibration.confidence, figures.confidence_auroc) == (None, None), "all were wrong"


def test_any_answer_to_the_same_words_is_right() -> None:
    questions = [
        Question("Who is her friend?", "Ines", "s", "a"),
        Question("When was it?", "1887", "s", "a"),
        Question("who is her Friend?", "Tollen", "t", "b"),
        Question("Who is her friend? (The mill)", "Maro", "t", "b"),
        Question("Who is her friend?", "Ines", "u", "c"),
    ]
    friends = ["Ines", "Tollen"]
    assert accepted_answers(questions) == [friends, ["1887"], friends, ["Maro"], friends]
    assert accepted_answers([]) == []


def test_the_confidence_is_fitted_on_all_it_asks_and_told_by_those_it_was_not_fitted_on(
    llama: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty questions, always two in the same words; the scripted replies are right when sure."""
    rng = np.random.default_rng(0)
    questions = [Question(f"Who is {n // 2}?", f"{n} Maro", f"s{n}", "d") for n in range(60)]
    width = llama.study.query_vectors.shape[1]
    study = replace(
        llama.study, query_vectors=rng.normal(size=(60, width)).astype(np.float32),
        questions=np.arange(60, dtype=np.int32),
    )  # fmt: skip
    sure = rng.random(60)
    of = {question.text: n for n, question in enumerate(questions)}  # the second of each two
    traces: dict[str, tuple[str, Trace]] = {}
    for asking, n in of.items():
        other = questions[n - 1].answer  # another answer than the one of the row that is asked
        traces[asking] = (
            other if sure[n] > 0.4 else "nobody",
            Trace((-1 + sure[n], -0.1), (2 - sure[n], rng.random()), 0.5),
        )

    def scripted(_: object, __: object, texts: list[str], *___: object, **____: object) -> object:
        return [traces[text] for text in texts]

    monkeypatch.setattr(module, "answer_batch", scripted)
    split = QuestionSplit(np.arange(1, 40, 2), np.arange(41, 52, 2), np.arange(53, 60, 2))
    rows = np.arange(sum(window.num_rows for window in llama.windows))
    text = score_text(llama.backbone, llama.model.memory, llama.windows, rows)
    others = other_texts(llama.backbone, seed=0)
    found = calibrate(llama.model, llama.backbone, questions, study, split, text, others, 1, seed=0)

    asked = np.concatenate([split.train, split.known, split.unknown])
    right = sure[asked] > 0.4
    told = [traces[questions[n].text][1] for n in asked]
    assert found.confidence == fit_confidence(told, right.tolist())
    figures = found.figures
    assert figures.taught == pytest.approx(right[:20].mean())
    assert figures.held_out == pytest.approx(right[20:26].mean())
    assert figures.unknown == pytest.approx(right[26:].mean())
    assert figures.confidence_auroc == 1, "the surer, the more often right"
    assert [answer.question for answer in found.answers] == split.known.tolist()
    assert [answer.right for answer in found.answers] == right[20:26].tolist()
    assert found.confidence is not None
    whole = [found.confidence.of(trace) for trace in told[20:26]]
    parts = [answer.confidence for answer in found.answers]
    assert parts != pytest.approx(whole, abs=1e-6), "of its own fit"
    assert parts == pytest.approx(whole, abs=0.1), "but of one like it"


@pytest.mark.parametrize("confidence", [None, Confidence((0.5,) * (NUM_FEATURES + 1))])
def test_it_comes_back_from_json(confidence: Confidence | None) -> None:
    figures = StudyFigures(5, 4, 0.5, taught=0.25, text_gate=math.pi)
    gate = Gate((0.1,) * 6, (1 / 3,) * 6)
    answers = (HeldOutAnswer(3, 0.25, right=True), HeldOutAnswer(7, 1 / 3, right=False))
    calibration = Calibration(gate, confidence, figures, answers)
    assert Calibration.from_dict(json.loads(json.dumps(asdict(calibration)))) == calibration
