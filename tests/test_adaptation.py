"""An encoder that has read the corpus: lessons, their loss by hand, what training makes of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

from mlpmem_rag import adaptation
from mlpmem_rag.adaptation import Lesson, adapt, contrast, write_adapted
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.errors import TrainingError
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.query import QueryEncoder, SentenceEncoder, load_encoder
from mlpmem_rag.questions import Question

WORDS = [f"word{n}" for n in range(400)]


def written(count: int, wordings: int = 2) -> list[Question]:
    """Questions about sentences whose words they do not share: only training can connect them."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        source = " ".join(rng.choice(WORDS[:200], 6)) + "."
        for answer in ("Ines", "Maro"):
            topic = rng.choice(WORDS[200:], 4, replace=False)
            found += [
                Question(
                    f"{' '.join(rng.permutation(topic))} {rng.choice(WORDS)} ?",
                    answer,
                    source,
                    f"doc-{number % 5}",
                )
                for _ in range(wordings)
            ]
    return found


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """A tiny untrained BERT of whole words."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", "again", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(str(folder / "bert"))
    words = Transformer(str(folder / "bert"))
    model = SentenceTransformer(modules=[words, Pooling(32)], device="cpu")
    return SentenceEncoder("tiny", model)


@pytest.fixture
def backbone(tiny_folder: Path) -> Backbone:
    return load_backbone(str(tiny_folder), device="cpu", dtype="float32")


def test_the_loss_by_hand(encoder: SentenceEncoder) -> None:
    lesson = Lesson(
        ["word300 ?", "word301 word302 ?", "word303 ?", "word304 word305 ?"],
        ["word1 word2.", "word3 word4."],
        sources=[0, 0, 0, 1],
        answers=[0, 0, 1, 2],
    )
    with torch.no_grad():
        found = contrast(encoder.model.eval(), lesson).item()
    asked, told = (
        encoder.encode(t).astype(np.float64) for t in (lesson.questions, lesson.sentences)
    )

    def surprise(likeness: dict[int, float], right: int) -> float:
        scores = {n: float(np.exp(v / adaptation.TEMPERATURE)) for n, v in likeness.items()}
        return float(-np.log(scores[right] / sum(scores.values())))

    sentences = [
        surprise({s: asked[q] @ told[s] for s in range(2)}, right)
        for q, right in enumerate(lesson.sources)
    ]
    # Only the first two have another wording among the questions.
    wordings = [
        surprise({o: asked[q] @ asked[o] for o in range(4) if o != q}, 1 - q) for q in (0, 1)
    ]
    assert found == pytest.approx(np.mean(sentences) + np.mean(wordings), rel=1e-4)


def test_without_other_wordings_the_sentences_are_learned_alone(encoder: SentenceEncoder) -> None:
    lesson = Lesson(["word300 ?", "word301 ?"], ["word1.", "word2."], [0, 1], [0, 1])
    with torch.no_grad():
        found = contrast(encoder.model.eval(), lesson)
    asked, told = (
        torch.from_numpy(encoder.encode(t)) for t in (lesson.questions, lesson.sentences)
    )
    scores = asked @ told.T / adaptation.TEMPERATURE
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(2))
    torch.testing.assert_close(found, expected)


def lessons(questions: list[Question], seed: int, count: int) -> list[Lesson]:
    catalogue = adaptation._Catalogue.of(questions)
    rng = np.random.default_rng(seed)
    return [catalogue.lesson(rng) for _ in range(count)]


def test_lessons_are_of_a_few_documents_and_match_what_was_written() -> None:
    questions = written(60, wordings=3)
    source_of = {q.text: q.source for q in questions}
    answer_of = {q.text: (q.source, q.answer) for q in questions}
    document_of = {q.source: q.document for q in questions}
    for lesson in lessons(questions, 0, 20):
        assert len(set(lesson.sentences)) == len(lesson.sentences) == adaptation.SENTENCES
        assert len({document_of[s] for s in lesson.sentences}) == adaptation.DOCUMENTS
        assert len(set(lesson.questions)) == len(lesson.questions)
        for text, place in zip(lesson.questions, lesson.sources, strict=True):
            assert lesson.sentences[place] == source_of[text]
        same = {a: answer_of[t] for t, a in zip(lesson.questions, lesson.answers, strict=True)}
        assert len(set(same.values())) == len(same), "another number is another answer"
        for text, answer in zip(lesson.questions, lesson.answers, strict=True):
            assert answer_of[text] == same[answer]
        assert max(map(lesson.answers.count, lesson.answers)) == adaptation.ANSWERS
    assert lessons(questions, 0, 3) == lessons(questions, 0, 3) != lessons(questions, 1, 3)


def test_few_sentences_are_few_but_do() -> None:
    (lesson,) = lessons(written(3), 0, 1)
    assert sorted(lesson.sentences) == sorted({q.source for q in written(3)})


def test_a_trained_encoder_finds_more(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation, "LEARNING_RATE", 1e-2)  # from nothing, in seconds
    monkeypatch.setattr(adaptation, "FROZEN", 0.0)
    questions = written(12, wordings=200)
    asked, learned = questions[3::4], [q for n, q in enumerate(questions) if n % 4 != 3]
    trained = SentenceEncoder("trained", copy.deepcopy(encoder.model))
    events: list[ProgressEvent] = []
    adapt(trained.model, learned, seed=0, on_progress=events.append)
    steps = math.ceil(len(learned) / (16 * 4))
    assert events[-1] == ProgressEvent("encoder", steps, steps, "steps")

    def found(encoder: QueryEncoder) -> float:
        sources = list(dict.fromkeys(q.source for q in questions))
        scores = encoder.encode([q.text for q in asked]) @ encoder.encode(sources).T
        right = [sources[best] == q.source for best, q in zip(scores.argmax(1), asked, strict=True)]
        return float(np.mean(right))

    assert found(encoder) < 0.3
    assert found(trained) > 0.9


def test_texts_run_together_by_length_as_each_does_alone(encoder: SentenceEncoder) -> None:
    model = copy.deepcopy(encoder.model).eval()
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(1, 30, 70)]
    push = torch.randn(len(texts), 32, generator=torch.Generator().manual_seed(2))
    learned = [p for n, p in model.named_parameters() if "pooler" not in n]
    together = adaptation._vectors(model, texts)
    found = torch.autograd.grad((together * push).sum(), learned)
    alone = torch.cat([adaptation._run(model, [text]) for text in texts])
    expected = torch.autograd.grad((alone * push).sum(), learned)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_embeddings_and_lower_layers_stay_as_they_are(encoder: SentenceEncoder) -> None:
    model = copy.deepcopy(encoder.model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapt(model, written(12), seed=0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    below = ("embeddings", "layer.0.")
    expected = {n for n in before if not any(part in n for part in (*below, "pooler"))}
    assert changed == expected


def test_of_an_encoder_without_layers_to_tell_apart_all_but_embeddings_are_learned(
    encoder: SentenceEncoder,
) -> None:
    model = copy.deepcopy(encoder.model)
    body: Any = model[0]
    body.model.config.num_hidden_layers = 7  # of none of its lists
    adaptation.freeze(model)
    left = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert left == {n for n in left if "_embeddings." in n}
    assert len(left) == 3


@pytest.mark.parametrize(
    ("questions", "steps"),
    [(1, 1), (640, 10), (3_840, 60), (9_000, 60), (19_200, 75), (65_536, 120)],
)
def test_a_quarter_of_an_epoch_is_enough_for_many_questions(questions: int, steps: int) -> None:
    assert adaptation.num_steps(questions) == steps


def test_half_of_the_way_is_written_and_the_first_one_stays(
    encoder: SentenceEncoder, backbone: Backbone, tmp_path: Path
) -> None:
    questions = written(6)
    numbers = np.array([0, 1, 4, 5, 6, 7, 10, 12, 13])
    before = [p.clone() for p in encoder.model.parameters()]
    write_adapted(encoder, questions, numbers, tmp_path, seed=3)
    trained = copy.deepcopy(encoder.model)
    adapt(trained, [questions[n] for n in numbers], seed=3)
    written_ = load_encoder(str(tmp_path), backbone)
    assert isinstance(written_, SentenceEncoder)
    changed = False
    for first, mine, all_the_way, found in zip(
        before,
        encoder.model.parameters(),
        trained.parameters(),
        written_.model.parameters(),
        strict=True,
    ):
        assert torch.equal(first, mine)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, (first + all_the_way) / 2, rtol=1e-3, atol=1e-4)
        changed |= not torch.equal(first, all_the_way)
    assert changed


def test_it_is_stored_in_half_precision_and_the_same_every_time(
    encoder: SentenceEncoder, tmp_path: Path
) -> None:
    questions = written(6)
    numbers = np.arange(len(questions))
    for name in ("a", "b"):
        write_adapted(encoder, questions, numbers, tmp_path / name, seed=1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    header = json.loads(weights[0][8 : 8 + int.from_bytes(weights[0][:8], "little")])
    kinds = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert kinds == {"F16"}


def test_the_global_generator_is_left_alone(encoder: SentenceEncoder) -> None:
    state = torch.random.get_rng_state()
    adapt(copy.deepcopy(encoder.model), written(6), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loss_that_is_not_finite_is_told(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(adaptation, "contrast", broken)
    with pytest.raises(TrainingError, match="query encoder's loss became nan at step 0"):
        adapt(copy.deepcopy(encoder.model), written(6), seed=0)
