"""Early exit: the same tokens as transformers' own generate gives, with fewer layers run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from mlpmem_rag import early_exit
from mlpmem_rag.answering import answer_batch, generation_config
from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import decoder_layers, load_backbone
from mlpmem_rag.confidence import NUM_FEATURES, Confidence
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.early_exit import Halves, Reading, best_tokens
from mlpmem_rag.gate import NUM_FEATURES as GATE_FEATURES
from mlpmem_rag.gate import Gate, constant_weights
from mlpmem_rag.generation import Answer
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.memory_model import AnswerStream, MemoryModel
from mlpmem_rag.mixing import mix
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory
from mlpmem_rag.prompts import prompt_ids
from tests.conftest import save_model

DIVISIBLE = {"llama", "mistral", "qwen2", "qwen3", "gemma"}
QUESTIONS = [
    "What was found in the old mill?",
    "Who found the map?",
    "Where was wild honey found, and who asked about it again?",
    "Why?",
]
SURE, UNSURE = 0.02, 0.6
"""Temperatures at which a random memory decides nearly all tokens, and only some."""


def memory_on(folder: Path, *, temperature: float, lambda_: float = 0.9) -> MemoryModel:
    """A random memory on the base model of a folder."""
    backbone = load_backbone(str(folder), layer=1, device="cpu", dtype="float32")
    config = MemoryConfig(32, 24, 1, "silu", gated=True, vocab_size=41)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        memory = Memory(config)
    memory.corpus_tokens = torch.arange(259, 300)
    settings = MemorySettings(backbone.reference, backbone.layer, config, lambda_, temperature)
    confidence = Confidence(tuple(0.1 * n for n in range(NUM_FEATURES + 1)))
    return MemoryModel(
        attach_memory(backbone, memory, settings), backbone.tokenizer, confidence=confidence
    )


@pytest.fixture(scope="module", params=[SURE, UNSURE], ids=["sure", "unsure"])
def memory(request: pytest.FixtureRequest, tiny_folder: Path) -> MemoryModel:
    return memory_on(tiny_folder, temperature=request.param)


@pytest.fixture
def runs_of() -> Iterator[Callable[[Any], list[int]]]:
    """Gives, for a base model, the numbers of its layers that run from now on, in order."""
    handles = []

    def watch(base: Any) -> list[int]:  # noqa: ANN401
        seen: list[int] = []
        for number, layer in enumerate(decoder_layers(base)):
            hook = partial(lambda number, *_: seen.append(number), number)
            handles.append(layer.register_forward_pre_hook(hook))
        return seen

    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def runs(memory: MemoryModel, runs_of: Callable[[Any], list[int]]) -> list[int]:
    assert memory._halves.usable
    return runs_of(memory.model.base)


def plainly(memory: MemoryModel) -> MemoryModel:
    """The same memory, whose base model always runs whole."""
    plain = MemoryModel(memory.model, memory.tokenizer, memory.encoder, memory.confidence)
    plain._halves.__dict__["divisible"] = False
    return plain


def whole(stream: AnswerStream) -> Answer:
    for _ in stream:
        pass
    return stream.answer


def padded(memory: MemoryModel, texts: list[str]) -> tuple[Tensor, Tensor]:
    tokenizer: Any = memory.tokenizer
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


# Which base models.


def test_which_families_can_be_divided(family_folder: Path) -> None:
    backbone = load_backbone(str(family_folder), device="cpu", dtype="float32")
    assert Halves(backbone.model, 1).usable == (family_folder.name in DIVISIBLE)


def test_after_the_last_layer_there_is_no_second_half(memory: MemoryModel) -> None:
    assert [Halves(memory.model.base, layer).usable for layer in range(4)] == [True] * 3 + [False]


def base_of(folder: Path) -> Any:  # noqa: ANN401
    return load_backbone(str(folder), device="cpu", dtype="float32").model


def test_a_compiled_model_stays_whole(tiny_folder: Path) -> None:
    memory = memory_on(tiny_folder, temperature=SURE)
    assert memory._halves.usable
    memory.model.base.compile(backend="eager")
    assert not memory._halves.usable


@pytest.mark.parametrize(
    ("setting", "value", "usable"),
    [
        ("repetition_penalty", 1.3, False),
        ("no_repeat_ngram_size", 2, False),
        ("suppress_tokens", [5], False),
        ("temperature", 0.7, True),
        ("top_p", 0.8, True),
    ],
)
def test_a_base_model_with_rules_of_its_own_stays_whole(
    tiny_folder: Path, setting: str, value: object, *, usable: bool
) -> None:
    memory = memory_on(tiny_folder, temperature=SURE)
    setattr(memory.model.base.generation_config, setting, value)
    assert memory._halves.usable == usable
    early, late = (m.answer(QUESTIONS[0], max_new_tokens=12) for m in (memory, plainly(memory)))
    assert early.text == late.text
    assert early.confidence == pytest.approx(late.confidence)


def test_rules_of_the_memorys_own_are_kept(tiny_folder: Path) -> None:
    memory = memory_on(tiny_folder, temperature=SURE)
    before = memory.answer(QUESTIONS[0], max_new_tokens=12)
    rules = copy.deepcopy(memory.model.generation_config)
    rules.no_repeat_ngram_size = 2
    memory.model.generation_config = rules
    early, late = (m.answer(QUESTIONS[0], max_new_tokens=12) for m in (memory, plainly(memory)))
    assert early.text == late.text != before.text


def test_another_attention_is_tried_anew(tmp_path: Path) -> None:
    base = base_of(save_model(tmp_path / "qwen3", "qwen3"))
    base.config.layer_types = ["full_attention"] * len(decoder_layers(base))
    halves: Any = Halves(base, 1)
    assert halves.usable
    assert halves.late.config._attn_implementation == "sdpa"
    base.set_attn_implementation("eager")
    assert halves.usable
    assert halves.late.config._attn_implementation == "eager"


def test_a_base_model_that_rereads_long_texts_stays_whole(tiny_folder: Path) -> None:
    base = base_of(tiny_folder)

    class Rereading(type(base)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> object:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    assert Halves(base, 1).usable
    base.__class__ = Rereading
    assert not Halves(base, 1).usable


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_length_stay_whole(tiny_folder: Path, kind: str) -> None:
    base = base_of(tiny_folder)
    base.base_model.rotary_emb.rope_type = kind
    assert not Halves(base, 1).usable


def test_every_family_answers_as_its_whole_model_does(family_folder: Path) -> None:
    memory = memory_on(family_folder, temperature=0.2)
    plain = plainly(memory)
    for question in QUESTIONS:
        early, late = (m.answer(question, max_new_tokens=12) for m in (memory, plain))
        assert (early.text, early.new_tokens) == (late.text, late.new_tokens)
        assert early.confidence == pytest.approx(late.confidence, rel=1e-4)


# The two halves.


SEES = {"full": "full_attention", "near": "sliding_attention"}


@pytest.fixture(
    params=[*sorted(DIVISIBLE), "full full full near", "near full near full", "full full near near"]
)
def divisible(request: pytest.FixtureRequest, tmp_path: Path) -> Any:  # noqa: ANN401
    """Base models, some with layers that see no more than six tokens."""
    family = request.param if request.param in DIVISIBLE else "qwen3"
    folder = save_model(tmp_path / family, family)
    config = json.loads((folder / "config.json").read_text())
    if family == "mistral":
        config["sliding_window"] = 6
    elif family != request.param:
        kinds = [SEES[word] for word in request.param.split()]
        config |= {"layer_types": kinds, "sliding_window": 6, "use_sliding_window": True}
    (folder / "config.json").write_text(json.dumps(config))
    return base_of(folder)


@pytest.mark.parametrize("begun", [0, 2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_waited_comes_out_as_token_by_token(
    divisible: Any,  # noqa: ANN401
    memory: MemoryModel,
    layer: int,
    begun: int,
) -> None:
    base, halves = divisible, Halves(divisible, layer)
    assert halves.usable
    ids, mask = padded(memory, QUESTIONS[1:3])
    more = torch.tensor([[260, 261, 262, 263], [270, 271, 272, 273]])
    ids_of_all = torch.cat([ids, more], dim=1)
    mask_of_all = torch.cat([mask, torch.ones_like(more)], dim=1)
    positions = (mask_of_all.cumsum(-1) - 1).clamp(min=0)
    length, end = ids.shape[1], ids_of_all.shape[1]
    assert length > 6 + begun

    def whole(start: int, stop: int, cache: DynamicCache) -> Tensor:
        logits: Tensor = base(
            input_ids=ids_of_all[:, start:stop],
            attention_mask=mask_of_all[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits[:, -1]

    with torch.inference_mode():
        cache = halves.new_cache()
        steps = [(0, length), *((place, place + 1) for place in range(length, end))]
        expected = torch.stack([whole(*step, cache) for step in steps], dim=1)
        opening = halves.new_cache() if begun else None
        if opening is not None:
            whole(0, begun, opening)
        reading = Reading(halves, opening, mask)
        reading.read(ids[:, begun:])
        reading.read(more[:, :1])
        found = [reading.rest()]
        for place in range(1, more.shape[1] - 1):
            reading.read(more[:, place : place + 1])
        found.append(reading.rest())
        reading.read(more[:, -1:])
        found.append(reading.rest())
    places = [1, more.shape[1] - 1, more.shape[1]]
    assert torch.allclose(halves.head(torch.cat(found, 1)), expected[:, places], atol=1e-4)


def test_the_state_is_what_the_memory_is_taught_with(memory: MemoryModel) -> None:
    ids, mask = padded(memory, QUESTIONS[:1])
    folder = memory.model.base.name_or_path
    backbone = load_backbone(folder, layer=1, device="cpu", dtype="float32")
    with torch.inference_mode():
        state = Reading(Halves(memory.model.base, backbone.layer), None, mask).read(ids)
    assert torch.equal(state, backbone.hidden(ids, mask)[:, -1:])


# What is certain.


@pytest.mark.parametrize(
    ("probabilities", "weight", "truth"),
    [
        ((0.8, 0.1, 0.1), 0.9, True),  # .9 x .7 > .1
        ((0.5, 0.4, 0.1), 0.9, False),  # .9 x .1 < .1
        ((0.56, 0.44), 0.9, True),  # .108 > .1
        ((0.55, 0.45), 0.9, False),  # .09 < .1
        ((1.0, 0.0), 0.5, False),  # a tie is not decided
        ((1.0,), 0.6, True),  # no second token
        ((1.0,), 0.4, False),
    ],
)
def test_when_the_memory_decides(
    probabilities: tuple[float, ...], weight: float, truth: bool
) -> None:
    log_probs = torch.tensor([probabilities, probabilities[::-1]]).log()
    tokens, decided = best_tokens(log_probs, torch.arange(7, 10), weight).tolist()
    assert decided == [truth, truth]
    assert probabilities[0] == probabilities[-1] or tokens == [7, 6 + len(probabilities)]


def test_what_is_decided_no_base_model_changes_and_what_is_not_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    corpus_tokens = torch.tensor([5, 1, 3])
    seen = set()
    for _ in range(300):
        memory = (3 * torch.randn(1, 3, generator=generator)).log_softmax(-1)
        weight = float(torch.rand(1, generator=generator) * 0.5 + 0.5)
        best = int(corpus_tokens[memory.argmax()])
        # The worst that a base model can do: all for one token that is not the best.
        adverse = [torch.full((1, 7), -1e4).index_fill(1, torch.tensor([t]), 0.0) for t in range(7)]
        tokens = [
            int(mix(base, memory, corpus_tokens, weight).argmax())
            for token, base in enumerate(adverse)
            if token != best
        ]
        (token,), (sure,) = best_tokens(memory, corpus_tokens, weight).tolist()
        assert token == best
        assert sure == all(token == best for token in tokens)
        seen.add(sure)
    assert seen == {True, False}


# Generation.


def test_texts_and_figures_are_those_of_the_whole_model(memory: MemoryModel) -> None:
    plain = plainly(memory)
    for question in QUESTIONS:
        early, late = (m.answer(question, max_new_tokens=12) for m in (memory, plain))
        assert (early.text, early.new_tokens, early.ended, early.prompt_tokens) == (
            late.text,
            late.new_tokens,
            late.ended,
            late.prompt_tokens,
        )
        assert early.confidence == pytest.approx(late.confidence, rel=1e-4)


def test_layers_that_change_nothing_do_not_run(memory: MemoryModel, runs: list[int]) -> None:
    layer, last = memory.model.config.layer, len(decoder_layers(memory.model.base)) - 1
    assert memory._halves.usable
    runs.clear()
    answer = whole(memory.continue_text(QUESTIONS[0], Decoding(max_new_tokens=12)))
    assert runs.count(layer) == answer.new_tokens  # once a token
    late = runs.count(last)
    sure = memory.model.config.memory_temperature == SURE
    assert late < answer.new_tokens / 2 if sure else 0 < late < answer.new_tokens


def test_a_confidence_needs_no_more(memory: MemoryModel, runs: list[int]) -> None:
    untold = MemoryModel(memory.model, memory.tokenizer)
    answers, counts = [], []
    for asked in (memory, untold):
        asked.answer(QUESTIONS[1], max_new_tokens=1)  # reads the opening
        runs.clear()
        answers.append(asked.answer(QUESTIONS[0], max_new_tokens=12))
        counts.append(list(runs))
    assert counts[0] == counts[1]
    assert answers[0].confidence is not None
    assert answers[1].confidence is None


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=6, lambda_=0.0),
        Decoding(max_new_tokens=6, lambda_=0.5),
        Decoding(max_new_tokens=6, temperature=1.0, seed=1),
        Decoding(max_new_tokens=6, logits_processors=(lambda ids, scores: scores,)),  # type: ignore[arg-type]
    ],
    ids=["base alone", "half", "drawn", "processed"],
)
def test_what_depends_on_the_whole_mixture_runs_whole(
    memory: MemoryModel, runs: list[int], decoding: Decoding
) -> None:
    assert memory._halves.usable
    runs.clear()
    answer = whole(memory.continue_text(QUESTIONS[0], decoding))
    assert runs == list(range(4)) * answer.new_tokens


def test_a_gate_that_looks_at_the_base_model_runs_it_whole(
    memory: MemoryModel, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    varying = Gate((0.1, *[0.0] * (GATE_FEATURES - 1), 2.0), constant_weights(0.9))
    monkeypatch.setattr(memory.model, "gate", varying)
    assert memory._halves.usable
    runs.clear()
    answer = whole(memory.continue_text(QUESTIONS[0], Decoding(max_new_tokens=6)))
    assert runs == list(range(4)) * answer.new_tokens


def test_the_weight_of_a_constant_gate_is_that_of_the_mixture(memory: MemoryModel) -> None:
    model = memory.model
    assert model.constant_weight(0.8, asked=True) == 0.8
    gate, model.gate = model.gate, Gate(constant_weights(0.75), constant_weights(0.5))
    try:
        assert model.constant_weight(0.8, asked=True) == pytest.approx(0.6)
        assert model.constant_weight(0.8, asked=False) is None
    finally:
        model.gate = gate


def with_view(memory: MemoryModel) -> MemoryModel:
    """The same base with a memory that reads a query vector, behind a constant gate."""
    folder = Path(memory.model.base.name_or_path)
    backbone = load_backbone(str(folder), layer=1, device="cpu", dtype="float32")
    config = MemoryConfig(32, 24, 1, "silu", gated=True, vocab_size=41, query_size=6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        aware = Memory(config)
    aware.corpus_tokens = torch.arange(259, 300)
    gate = Gate(constant_weights(0.9), constant_weights(0.2))
    temperature = memory.model.config.memory_temperature
    settings = MemorySettings(backbone.reference, 1, config, 1.0, temperature, gate=gate)
    model = attach_memory(backbone, aware, settings)
    return MemoryModel(model, backbone.tokenizer, Letters(), memory.confidence)


class Letters:
    """A text's first letters as its vector."""

    name, size = "letters", 6

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        letters = [[ord(letter) for letter in f"{text:6}"[:6]] for text in texts]
        rows = np.array(letters, dtype=np.float32)
        unit: npt.NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


def test_the_question_and_a_constant_gate_are_seen_as_in_a_batch(memory: MemoryModel) -> None:
    """`answer_batch`, which confidences are fitted on, is transformers' own `generate`."""
    aware = with_view(memory)
    assert aware._halves.usable
    vectors = Letters().encode(QUESTIONS)
    expected = answer_batch(aware.model, aware.tokenizer, QUESTIONS, vectors, max_new_tokens=12)
    for question, (text, trace) in zip(QUESTIONS, expected, strict=True):
        answer = aware.answer(question, max_new_tokens=12)
        assert aware.confidence is not None
        assert answer.text == text
        assert answer.confidence == pytest.approx(aware.confidence.of(trace), rel=1e-4)


@pytest.mark.parametrize("how", ["no encoder", "nothing asked"])
def test_where_no_request_is_given_generate_looks_for_one(
    memory: MemoryModel, how: str, runs_of: Callable[[Any], list[int]]
) -> None:
    aware = with_view(memory)
    if how == "no encoder":
        aware.encoder = None
    else:
        aware.encoder = Nothing()
    runs = runs_of(aware.model.base)
    answer = whole(aware.continue_text(QUESTIONS[0], Decoding(max_new_tokens=6)))
    assert runs == list(range(4)) * answer.new_tokens


class Nothing(Letters):
    """No text asks anything."""

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.zeros((len(texts), 6), dtype=np.float32)


def test_for_a_token_that_is_decided_the_host_waits_once(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memory_on(tiny_folder, temperature=1e-4)  # no token is in doubt
    untold = MemoryModel(memory.model, memory.tokenizer)
    untold.answer(QUESTIONS[0], max_new_tokens=4)
    looks: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "numpy"):

        def look(plain: Callable[[Tensor], object], tensor: Tensor) -> object:
            looks.append(plain.__name__)
            return plain(tensor)

        monkeypatch.setattr(Tensor, name, partialmethod(partial(look, getattr(Tensor, name))))
    short = untold.answer(QUESTIONS[0], max_new_tokens=4).new_tokens
    few = len(looks)
    long = untold.answer(QUESTIONS[0], max_new_tokens=12).new_tokens
    assert long > short
    assert len(looks) - few == few + long - short


@pytest.mark.parametrize("mark", [None, "e"])
def test_a_batch_gives_each_what_it_gets_alone(memory: MemoryModel, mark: str | None) -> None:
    """With a stop string the lines end at different tokens."""
    stop = (mark,) if mark else ()
    together = Decoding(max_new_tokens=12, batch_size=4, stop=stop)
    alone = [whole(plainly(memory).continue_text(q, Decoding(12, stop=stop))) for q in QUESTIONS]
    for question, expected in zip(QUESTIONS, alone, strict=True):
        got = whole(memory.continue_text(question, together))
        assert (got.text, got.new_tokens) == (expected.text, expected.new_tokens)


def test_many_at_once_share_a_batch(memory: MemoryModel) -> None:
    decoding = Decoding(max_new_tokens=12, batch_size=4)
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS * 2]
    alone = [whole(plainly(memory).reply(talk, Decoding(12))) for talk in talks]
    with ThreadPoolExecutor(len(talks)) as threads:
        got = list(threads.map(lambda talk: whole(memory.reply(talk, decoding)), talks))
    for one, expected in zip(got, alone, strict=True):
        assert (one.text, one.new_tokens) == (expected.text, expected.new_tokens)
        assert one.confidence == pytest.approx(expected.confidence, rel=1e-4)


def test_a_confidence_is_known_as_far_as_the_answer_has_come(memory: MemoryModel) -> None:
    talk = [{"role": "user", "content": QUESTIONS[0]}]
    short = {n: memory.answer(QUESTIONS[0], max_new_tokens=n).confidence for n in range(1, 9)}
    stream = memory.reply(talk, Decoding(8))
    for _ in stream:
        answer = stream.answer
        assert answer.confidence == pytest.approx(short[answer.new_tokens], rel=1e-4)
    assert stream.answer.confidence == pytest.approx(short[8], rel=1e-4)


# Drafts.


def recalling(folder: Path, *, temperature: float, drafts: Sequence[Sequence[int]]) -> MemoryModel:
    """A memory that recalls each of `QUESTIONS` as itself, with a draft for each of the first."""
    backbone = load_backbone(str(folder), layer=1, device="cpu", dtype="float32")
    size = max(map(len, drafts))
    config = MemoryConfig(
        *(32, 24, 1, "silu"),
        gated=True,
        vocab_size=41,
        query_size=6,
        num_questions=len(QUESTIONS),
        recalls=True,
        draft_size=size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        memory = Memory(config)
    memory.corpus_tokens = torch.arange(259, 300)
    memory.questions.copy_(torch.from_numpy(Letters().encode(QUESTIONS)))
    for line, draft in enumerate(drafts):
        memory.drafts[line, : len(draft)] = torch.tensor(draft, dtype=torch.int32)
    settings = MemorySettings(backbone.reference, 1, config, 0.9, temperature)
    model = attach_memory(backbone, memory, settings)
    confidence = Confidence(tuple(0.1 * n for n in range(NUM_FEATURES + 1)))
    return MemoryModel(model, backbone.tokenizer, Letters(), confidence)


def tokens_of(memory: MemoryModel, question: str, count: int) -> list[int]:
    """What a memory without a draft answers, by transformers' own `generate`."""
    tokenizer: Any = memory.tokenizer
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": question}])
    vector = torch.from_numpy(Letters().encode([question]))
    model: Any = memory.model
    ids = torch.tensor([prompt])
    config = generation_config(memory.model, tokenizer, count)
    config.stop_strings = None
    out = model.generate(inputs=ids, query_vector=vector, generation_config=config)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("temperature", [SURE, 0.2, UNSURE])
def test_a_taught_answer_is_read_ahead_and_changes_nothing_by_that(
    tiny_folder: Path, temperature: float, runs_of: Callable[[Any], list[int]]
) -> None:
    truth = tokens_of(
        recalling(tiny_folder, temperature=temperature, drafts=[[]]), QUESTIONS[0], 12
    )
    assert len(truth) == 12
    drafts = [truth[:8]]
    drafts += [[*truth[:n], 259 + (truth[n] - 258) % 41, *truth[n + 1 : 8]] for n in range(8)]
    for draft in drafts:
        memory = recalling(tiny_folder, temperature=temperature, drafts=[draft])
        said = tokens_of(memory, QUESTIONS[0], 12)
        plain = plainly(memory).answer(QUESTIONS[0], max_new_tokens=12)
        memory.answer(QUESTIONS[1], max_new_tokens=1)  # reads the opening
        runs = runs_of(memory.model.base)
        answer = memory.answer(QUESTIONS[0], max_new_tokens=12)
        assert (answer.text, answer.new_tokens, answer.ended) == (
            plain.text,
            plain.new_tokens,
            plain.ended,
        )
        assert answer.text == str(memory.tokenizer.decode(said)).strip()
        assert answer.confidence == pytest.approx(plain.confidence, rel=1e-4)
        same = [mine == other for mine, other in zip(draft, said, strict=False)]
        alike = [*same, False].index(False)
        # The first token, as many at once as are right and one more, the rest one by one.
        assert runs.count(0) == 12 - max(0, min(alike, 7) - 1)
        assert temperature > SURE or said == truth, "a memory that is sure is not talked over"


def test_who_is_unsure_says_what_was_taught(tiny_folder: Path) -> None:
    without = recalling(tiny_folder, temperature=UNSURE, drafts=[[]])
    others = tokens_of(without, QUESTIONS[1], 8)
    truth = tokens_of(without, QUESTIONS[0], 8)
    assert truth != others
    memory = recalling(tiny_folder, temperature=UNSURE, drafts=[others])
    assert tokens_of(memory, QUESTIONS[0], 8) == others
    text = str(memory.tokenizer.decode(others)).strip()
    assert memory.answer(QUESTIONS[0], max_new_tokens=8).text == text
    many = answer_batch(
        memory.model,
        memory.tokenizer,
        QUESTIONS[:2],
        Letters().encode(QUESTIONS[:2]),
        max_new_tokens=8,
    )
    assert many[0][0] == text
    # Nothing of it at lambda 0, where text goes on, and where nothing is asked.
    base = memory.answer(QUESTIONS[0], max_new_tokens=8, lambda_=0.0)
    assert base.text == without.answer(QUESTIONS[0], max_new_tokens=8, lambda_=0.0).text
    for given in (memory, without):
        given.model.memory.drafts[1:] = 7
    found = [whole(m.continue_text(QUESTIONS[0], Decoding(6))).text for m in (memory, without)]
    assert found[0] == found[1]


def test_an_answer_that_is_its_draft_takes_two_passes(
    tiny_folder: Path, runs_of: Callable[[Any], list[int]]
) -> None:
    truth = tokens_of(recalling(tiny_folder, temperature=SURE, drafts=[[]]), QUESTIONS[1], 6)
    memory = recalling(tiny_folder, temperature=SURE, drafts=[[259], truth])
    memory.answer(QUESTIONS[0], max_new_tokens=1)  # reads the opening
    runs = runs_of(memory.model.base)
    answer = memory.answer(QUESTIONS[1], max_new_tokens=6)
    assert answer.new_tokens == 6
    assert runs.count(0) == 2


@pytest.mark.parametrize("most", range(1, 6))
def test_no_more_is_read_than_may_be_said(tiny_folder: Path, most: int) -> None:
    truth = tokens_of(recalling(tiny_folder, temperature=SURE, drafts=[[]]), QUESTIONS[0], 8)
    memory = recalling(tiny_folder, temperature=SURE, drafts=[truth])
    lengths: list[int] = []
    base: Any = memory.model.base
    body = base.base_model.embed_tokens
    body.register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))
    assert memory._halves.usable
    lengths.clear()
    answer = memory.answer(QUESTIONS[0], max_new_tokens=most)
    assert answer.new_tokens == most
    assert sum(lengths[-2:] if most > 1 else lengths[-1:]) <= answer.prompt_tokens + most - 1


def test_text_that_goes_on_has_no_answer_and_lines_of_a_batch_have_theirs(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = recalling(tiny_folder, temperature=SURE, drafts=[[260, 261, 262]] * 4)
    given: list[list[list[int]]] = []

    def watched(*args: Any) -> None:  # noqa: ANN401
        given.append(args[-2])
        early_exit.generate_early(*args)

    monkeypatch.setattr("mlpmem_rag.generation.generate_early", watched)
    whole(memory.continue_text(QUESTIONS[0], Decoding(6)))
    memory.answer(QUESTIONS[1], max_new_tokens=6)
    with ThreadPoolExecutor(4) as threads:
        talks = [[{"role": "user", "content": question}] for question in QUESTIONS * 2]
        decoding = Decoding(6, batch_size=8)
        list(threads.map(lambda talk: whole(memory.reply(talk, decoding)), talks))
    assert given[:2] == [[], [[260, 261, 262]]]
    assert max(map(len, given[2:])) > 1
    assert all(answer == [260, 261, 262] for answers in given[1:] for answer in answers)


@pytest.mark.parametrize("settled", [False, True])
def test_what_is_taken_back_was_never_read(
    divisible: Any,  # noqa: ANN401
    memory: MemoryModel,
    *,
    settled: bool,
) -> None:
    halves = Halves(divisible, 1)
    ids, mask = padded(memory, QUESTIONS[:1])
    wrong, right = torch.tensor([[260, 261, 262, 263]]), torch.tensor([[260, 271, 272]])
    with torch.inference_mode():
        expected = Reading(halves, None, mask)
        states = [expected.read(ids), *(expected.read(right[:, n : n + 1]) for n in range(3))]
        reading = Reading(halves, None, mask)
        found = [reading.read(ids)]
        windows = any(isinstance(x, DynamicSlidingWindowLayer) for x in halves.new_cache().layers)
        assert reading.can_forget(4) != windows  # of six tokens, which the question fills
        if windows:
            return
        found.append(reading.read(wrong, 4)[:, :1])
        rest = reading.rest(4)[:, :1] if settled else None
        reading.forget(3)
        found += [reading.read(right[:, 1:], 2)]
        assert torch.allclose(torch.cat(found, 1), torch.cat(states, 1), atol=1e-5)
        after = expected.rest(4)  # the question's end, and three more
        assert torch.allclose(reading.rest(2), after[:, 2:], atol=1e-5)
        assert rest is None or torch.allclose(rest, after[:, 1:2], atol=1e-5)


def test_where_a_window_is_full_nothing_is_read_ahead(
    tmp_path: Path, runs_of: Callable[[Any], list[int]]
) -> None:
    folder = save_model(tmp_path / "mistral", "mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 6}))
    truth = tokens_of(recalling(folder, temperature=SURE, drafts=[[]]), QUESTIONS[0], 6)
    memory = recalling(folder, temperature=SURE, drafts=[truth])
    memory.answer(QUESTIONS[1], max_new_tokens=1)  # reads the opening
    runs = runs_of(memory.model.base)
    assert memory.answer(QUESTIONS[0], max_new_tokens=6).new_tokens == 6
    assert runs.count(0) == 6


# What changes between two requests.


def logits_of(memory: MemoryModel, vector: Tensor) -> Tensor:
    ids = torch.tensor([prompt_ids(memory.tokenizer, [{"role": "user", "content": QUESTIONS[0]}])])
    out: Tensor = memory.model(input_ids=ids, query_vector=vector).logits
    return out


@pytest.mark.parametrize("inference", [False, True])
def test_a_vector_that_is_written_to_is_recalled_anew(tiny_folder: Path, inference: bool) -> None:
    memory = recalling(tiny_folder, temperature=UNSURE, drafts=[[]])
    first, second = torch.from_numpy(Letters().encode(QUESTIONS[:2])).split(1)
    with torch.inference_mode(inference), torch.no_grad():
        expected = logits_of(memory, second.clone())
        buffer = first.clone()
        assert not torch.equal(logits_of(memory, buffer), expected)
        buffer.copy_(second)
        assert torch.equal(logits_of(memory, buffer), expected)


def test_steps_of_a_generation_tell_their_vector_without_its_numbers(tiny_folder: Path) -> None:
    """To look at these, every step would wait for a GPU."""
    memory = recalling(tiny_folder, temperature=UNSURE, drafts=[[]])
    model: Any = memory.model
    with torch.inference_mode():
        vector = torch.from_numpy(Letters().encode(QUESTIONS[:1])).clone()
        assert vector.is_inference()
        model.generate(torch.tensor([[5, 6]]), query_vector=vector, max_new_tokens=2)
    assert isinstance(model._recalled[1], int)


def test_who_listens_hears_only_the_thread_it_is_in(tiny_folder: Path) -> None:
    memory = recalling(tiny_folder, temperature=UNSURE, drafts=[[]])
    vector = torch.from_numpy(Letters().encode(QUESTIONS[:1]))
    heard: list[Tensor] = []
    with memory.model.overheard(heard.append), ThreadPoolExecutor(1) as other:
        other.submit(logits_of, memory, vector).result()
        assert not heard
        logits_of(memory, vector)
        assert len(heard) == 1
    logits_of(memory, vector)
    assert len(heard) == 1


def test_another_encoder_or_template_is_not_taken_for_the_one_before(tiny_folder: Path) -> None:
    class Backwards(Letters):
        def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            return super().encode(texts)[:, ::-1].copy()

    model = recalling(tiny_folder, temperature=UNSURE, drafts=[[]]).model

    def seen() -> list[float]:
        assert model.tokenizer is not None
        ids = prompt_ids(model.tokenizer, [{"role": "user", "content": QUESTIONS[0]}])
        found = model.queries_in(torch.tensor([ids]))
        assert found is not None
        numbers: list[float] = found[0].tolist()
        return numbers

    letters = Letters().encode(QUESTIONS[:1])[0].tolist()
    model.query_encoder = Letters()
    assert seen() == letters
    model.query_encoder = Backwards()
    assert seen() == letters[::-1]
    model.tokenizer = copy.deepcopy(model.tokenizer)
    assert model.tokenizer is not None
    model.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    )
    assert seen() == letters[::-1]


def test_free_places_are_no_questions(tiny_folder: Path) -> None:
    """A request that agrees with no learned question is still recalled as one of them."""
    memory = recalling(tiny_folder, temperature=0.3, drafts=[[]])
    memory.model.gate = Gate(constant_weights(0.95), constant_weights(0.02))
    asked = torch.from_numpy(Letters().encode(QUESTIONS))
    memory.model.memory.questions.copy_(-asked)
    memory.model.memory.questions[1] = 0
    assert 1 not in memory.model.memory.nearest(asked)
    for question in QUESTIONS:
        answer = memory.answer(question, max_new_tokens=8)
        plain = plainly(memory).answer(question, max_new_tokens=8)
        assert answer.text == plain.text
        assert answer.confidence == pytest.approx(plain.confidence, abs=1e-4)
    memory.model.memory.questions.zero_()  # of none, nothing is asked
    none = [m.answer("Why?", max_new_tokens=8).text for m in (memory, plainly(memory))]
    assert none[0] == none[1]


def test_an_encoder_beside_a_memory_that_reads_no_vector_changes_nothing(
    tiny_folder: Path,
) -> None:
    memory = memory_on(tiny_folder, temperature=0.3, lambda_=1.0)
    memory.model.gate = Gate(constant_weights(0.95), constant_weights(0.02))
    memory.encoder = Letters()
    for question in QUESTIONS:
        answer = memory.answer(question, max_new_tokens=8)
        assert answer.text == plainly(memory).answer(question, max_new_tokens=8).text


def test_what_a_checkpoint_lacks_of_a_recall_is_empty(tiny_folder: Path) -> None:
    model = recalling(tiny_folder, temperature=0.3, drafts=[[260, 261]]).model
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if name not in ("memory.questions", "memory.drafts")
    }
    loaded = MLPMemForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
    assert (loaded.memory.drafts == -1).all()
    assert (loaded.memory.questions == 0).all()


def test_a_memory_without_questions_takes_requests_as_they_are() -> None:
    memory = Memory(MemoryConfig(8, 8, 1, "silu", gated=True, vocab_size=5, query_size=3))
    told = torch.randn(2, 3)
    assert torch.equal(memory.recall(told), told)
    recalls = replace(memory.config, recalls=True)
    assert torch.equal(Memory(recalls).recall(told), told)
    assert not Memory(recalls).recalls


def test_halves_are_of_the_modules_that_are_there(tiny_folder: Path) -> None:
    halves = recalling(tiny_folder, temperature=0.3, drafts=[[]])._halves
    base = halves._base
    assert halves.usable
    assert halves.early is halves.early
    other = copy.deepcopy(base.get_input_embeddings())
    base.set_input_embeddings(other)
    assert halves.usable
    assert halves.early._modules["embed_tokens"] is other
    layer = copy.deepcopy(decoder_layers(base)[-1])
    decoder_layers(base)[-1] = layer
    assert halves.usable
    assert halves.late._modules["layers"][-1] is layer  # type: ignore[index]
