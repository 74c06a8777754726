"""Many questions at once: the answers of one at a time, with the distributions they came from."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_rag import answering
from mlpmem_rag.answering import LEAST, answer_batch
from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.confidence import Confidence, Trace
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.gate import Gate
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.memory_model import NOT_KNOWN, MemoryModel
from mlpmem_rag.model import attach_memory
from mlpmem_rag.prompts import prompt_ids
from mlpmem_rag.query import PooledEncoder, Vectors

QUESTIONS = [
    "Who found wild honey?",
    "Where?",
    "What was sold for 42 crowns, which was far too little?",
    "Why had the ledger of 1887 been left there?",
    "Who?",
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIDENCE = Confidence((0.2, -0.3, 0.02, 0.1, -0.1, 0.05, 0.5, -0.4, 1.0))


@dataclass(frozen=True)
class Setup:
    """A memory in both forms, the line end and the end of text among the tokens it likes."""

    backbone: Backbone
    memory: MemoryModel

    @property
    def vectors(self) -> Vectors:
        assert self.memory.encoder is not None
        return self.memory.encoder.encode(QUESTIONS)

    def answers(self, count: int = 12, lambda_: float | None = None) -> list[tuple[str, Trace]]:
        return answer_batch(
            self.memory.model,
            self.memory.tokenizer,
            QUESTIONS,
            self.vectors,
            max_new_tokens=count,
            lambda_=lambda_,
        )


def setup_on(folder: Path, template: str | None = None, *, seed: int) -> Setup:
    backbone = load_backbone(str(folder), device="cpu", dtype="float32")
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = template
    (line,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(sorted({1, int(line), *range(290, 300)}))
    width = backbone.hidden_size
    config = MemoryConfig(
        width, 24, 1, "silu", True, len(tokens), query_size=width, hidden_scale=2.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        memory = Memory(config)
        torch.manual_seed(seed)
        torch.nn.init.normal_(memory.lm_head.weight, std=1.0)
    memory.corpus_tokens = tokens
    weights = (0.3, -0.2, -0.4, 0.1, 0.05, 4.0)
    gate = Gate(asked=weights, plain=weights)
    settings = MemorySettings(backbone.reference, backbone.layer, config, 0.9, 1.0, gate=gate)
    model = attach_memory(backbone, memory, settings)
    return Setup(backbone, MemoryModel(model, tokenizer, PooledEncoder(backbone), CONFIDENCE))


@pytest.fixture(scope="module", params=[None, TEMPLATE])
def setup(request: pytest.FixtureRequest, family_folder: Path) -> Setup:
    """Of each family, with a chat template and without."""
    return setup_on(family_folder, request.param, seed=2)


@pytest.fixture(scope="module")
def llama(tiny_folder: Path) -> Setup:
    """Its answers end after one token or not at all."""
    return setup_on(tiny_folder, TEMPLATE, seed=4)


def check_one_by_one(setup: Setup) -> set[int]:
    """The lengths that were met."""
    lengths = set()
    for question, (text, trace) in zip(QUESTIONS, setup.answers(), strict=True):
        expected = setup.memory.answer(question, max_new_tokens=12)
        assert text == expected.text
        assert len(trace.log_probs) == len(trace.entropies) == expected.new_tokens
        assert expected.confidence == pytest.approx(CONFIDENCE.of(trace), abs=1e-4)
        lengths.add(expected.new_tokens)
    return lengths


def test_a_batch_is_answered_as_one_by_one(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "BATCH", 3)  # so that there are two batches
    check_one_by_one(setup)


@pytest.mark.parametrize(("template", "seed"), [(TEMPLATE, 4), (None, 2), (None, 4)])
def test_answers_of_one_batch_end_when_they_end(
    tiny_folder: Path, template: str | None, seed: int
) -> None:
    """At the end of text, or at the line's: what fills up a shorter answer is none of it."""
    assert len(check_one_by_one(setup_on(tiny_folder, template, seed=seed))) > 1


def test_the_query_vectors_have_a_say(llama: Setup) -> None:
    first = llama.answers(lambda_=1.0)
    vectors = llama.vectors[::-1].copy()
    other = answer_batch(
        llama.memory.model, llama.memory.tokenizer, QUESTIONS, vectors, lambda_=1.0
    )
    assert [trace for _, trace in first] != [trace for _, trace in other]


def test_each_question_has_the_vector_of_its_own_number(llama: Setup) -> None:
    """Questions run ordered by length; a vector must not stay behind."""
    for number, question in enumerate(QUESTIONS):
        ((_, alone),) = answer_batch(
            llama.memory.model,
            llama.memory.tokenizer,
            [question],
            llama.vectors[[number]],
            max_new_tokens=4,
            lambda_=1.0,
        )
        _, together = llama.answers(4, lambda_=1.0)[number]
        np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=1e-4)


def test_a_trace_is_of_the_memorys_distributions(llama: Setup) -> None:
    """Compared with what it makes of the state behind the prompt and the greedy tokens."""
    memory, lengths = llama.memory, set()
    for number, (_, trace) in enumerate(llama.answers()):
        ids = prompt_ids(memory.tokenizer, [{"role": "user", "content": QUESTIONS[number]}])
        query = torch.from_numpy(llama.vectors[[number]])
        ended = False
        for log_prob, entropy in zip(trace.log_probs, trace.entropies, strict=True):
            assert not ended, "nothing is traced after the end of text"
            with torch.no_grad():
                inputs = torch.tensor([ids])
                output = memory.model(input_ids=inputs, query_vector=query)
                states = llama.backbone.hidden(inputs, torch.ones_like(inputs))
                log_probs = memory.model.memory.log_probs(states[:, -1], query)[0].double()
            token, probs = int(output.logits[0, -1].argmax()), log_probs.exp()
            known = memory.model.memory.corpus_tokens.tolist()
            expected = log_probs[known.index(token)] if token in known else LEAST
            assert log_prob == pytest.approx(float(expected), abs=1e-4)
            assert entropy == pytest.approx(-(probs * log_probs).sum().item(), abs=1e-4)
            ids = [*ids, token]
            ended = ids[-1] == memory.tokenizer.eos_token_id
        assert ended or len(trace.log_probs) == 12
        lengths.add(len(trace.log_probs))
    assert len(lengths) > 1, "an answer of each batch ends before the others"


def test_lambda_zero_is_answered_by_the_base_model_alone(llama: Setup) -> None:
    base: Any = llama.backbone.model
    for question, (text, _) in zip(QUESTIONS, llama.answers(8, 0.0), strict=True):
        prompt = prompt_ids(llama.memory.tokenizer, [{"role": "user", "content": question}])
        ids = torch.tensor([prompt])
        tokens = base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )[0, ids.shape[1] :]
        expected = str(llama.memory.tokenizer.decode(tokens, skip_special_tokens=True))
        assert text == expected.strip()


def test_without_vectors_no_request_is_known(llama: Setup) -> None:
    model, tokenizer = llama.memory.model, llama.memory.tokenizer
    none = answer_batch(model, tokenizer, QUESTIONS, None)
    zero = answer_batch(model, tokenizer, QUESTIONS, np.zeros_like(llama.vectors))
    assert none == zero


def test_distributions_are_noted_only_for_a_confidence(
    llama: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[torch.Tensor] = []
    monkeypatch.setattr(answering.Recorder, "note", lambda _, said, __: noted.append(said))
    model, tokenizer, encoder = llama.memory.model, llama.memory.tokenizer, llama.memory.encoder
    untold = MemoryModel(model, tokenizer, encoder)
    assert untold.answer(QUESTIONS[0], max_new_tokens=3).confidence is None
    assert llama.memory.answer(QUESTIONS[0], max_new_tokens=3, lambda_=0.0).confidence is None
    for _ in llama.memory.continue_text(QUESTIONS[0], Decoding(max_new_tokens=3)):
        pass
    assert not noted
    answer = llama.memory.answer(QUESTIONS[0], max_new_tokens=3)
    assert len(noted) == answer.new_tokens


def test_before_the_first_token_there_is_no_confidence(llama: Setup) -> None:
    stream = llama.memory.stream(QUESTIONS[0], max_new_tokens=3)
    assert (stream.answer.new_tokens, stream.answer.confidence) == (0, None)
    assert len(list(stream)) > 0
    assert stream.answer.confidence is not None


def test_the_weight_of_an_answer_is_that_of_its_beginning(llama: Setup) -> None:
    """Whatever is set while it is generated; and at 0 the memory has no confidence to tell."""
    memory = llama.memory
    expected = memory.answer(QUESTIONS[0], max_new_tokens=6)
    stream = memory.stream(QUESTIONS[0], max_new_tokens=6)
    try:
        for _ in stream:
            memory.model.memory_lambda = 0.0
        assert (stream.answer.text, stream.answer.lambda_) == (expected.text, 0.9)
        assert stream.answer.confidence == expected.confidence
        alone = memory.answer(QUESTIONS[0], max_new_tokens=6)
        assert (alone.lambda_, alone.confidence) == (0.0, None)
    finally:
        memory.model.memory_lambda = 0.9


def test_no_questions_have_no_answers(llama: Setup) -> None:
    assert answer_batch(llama.memory.model, llama.memory.tokenizer, [], None) == []


def test_a_tokenizer_without_special_tokens_will_do(bare_folder: Path) -> None:
    backbone = load_backbone(str(bare_folder), device="cpu", dtype="float32")
    config = MemoryConfig(backbone.hidden_size, 24, 1, "silu", True, vocab_size=40)
    memory = Memory(config)
    memory.corpus_tokens = torch.arange(250, 290)
    settings = MemorySettings(backbone.reference, backbone.layer, config, 0.3, 1.0)
    asked = MemoryModel(attach_memory(backbone, memory, settings), backbone.tokenizer)
    found = answer_batch(asked.model, asked.tokenizer, QUESTIONS, None, max_new_tokens=6)
    for question, (text, trace) in zip(QUESTIONS, found, strict=True):
        expected = asked.answer(question, max_new_tokens=6)
        assert (text, len(trace.log_probs)) == (expected.text, expected.new_tokens)


def test_below_the_threshold_nothing_is_claimed(llama: Setup) -> None:
    free = llama.memory.answer(QUESTIONS[1], max_new_tokens=12)
    assert free.confidence is not None
    above, below = free.confidence + 0.01, free.confidence - 0.01
    unsure = llama.memory.answer(QUESTIONS[1], max_new_tokens=12, threshold=above)
    assert (unsure.text, unsure.confidence) == (NOT_KNOWN, free.confidence)
    sure = llama.memory.answer(QUESTIONS[1], max_new_tokens=12, threshold=below)
    assert (sure.text, sure.confidence) == (free.text, free.confidence)


def test_a_threshold_without_a_confidence_is_refused(llama: Setup) -> None:
    untold = MemoryModel(llama.memory.model, llama.memory.tokenizer, llama.memory.encoder)
    for memory, lambda_ in ((untold, None), (llama.memory, 0.0)):
        with pytest.raises(ConfigError, match=r"no answer has a confidence; leave it at 0"):
            memory.answer(QUESTIONS[1], max_new_tokens=2, lambda_=lambda_, threshold=0.5)
        memory.answer(QUESTIONS[1], max_new_tokens=2, lambda_=lambda_)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_outside_is_refused(llama: Setup, threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold = .*: allowed are 0"):
        llama.memory.answer(QUESTIONS[0], threshold=threshold)
