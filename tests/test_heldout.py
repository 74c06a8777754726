"""The figures: what the base gives held-out tokens, the choice of settings, and perplexities."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlpmem_rag import heldout
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.heldout import Perplexities, measure, score_base, tune
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.windows import Window, make_windows, tokenize

Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def windows(tiny_backbone: Backbone, tiny_documents: list[Document]) -> list[Window]:
    """Of six documents, some of them several windows long."""
    return make_windows(tokenize(tiny_documents[:6], tiny_backbone.tokenizer), length=40, stride=15)


# What the base alone gives.


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_base_scores_equal_each_window_run_alone(
    tmp_path: Path,
    tiny_backbone: Backbone,
    windows: list[Window],
    monkeypatch: pytest.MonkeyPatch,
    batch_tokens: int,
) -> None:
    expected = []
    for window in windows:
        ids = torch.from_numpy(window.token_ids.astype(np.int64))
        with torch.no_grad():
            probs = tiny_backbone.model(input_ids=ids[None]).logits[0].double().softmax(-1)
        expected += [probs[p - 1, ids[p]].item() for p in range(window.context, len(ids))]

    rows = np.random.default_rng(0).permutation(len(expected))[:150]  # validation, then test rows
    monkeypatch.setattr(heldout, "SCORE_TOKENS", batch_tokens)
    found = score_base(tiny_backbone, windows, rows, tmp_path / "scores.npy")
    np.testing.assert_allclose(found, np.array(expected)[rows], rtol=1e-4)
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), found)


def test_only_windows_with_wanted_rows_are_run(
    tmp_path: Path, tiny_backbone: Backbone, windows: list[Window]
) -> None:
    first_rows = np.cumsum([0, *(window.num_rows for window in windows)])
    rows = first_rows[[2, 4, 5]]  # the first row of each of three windows
    events: list[ProgressEvent] = []
    score_base(tiny_backbone, windows, rows, tmp_path / "s.npy", on_progress=events.append)
    # Two of the three windows are of one length: a batch of them, then the third.
    assert [(event.done, event.total) for event in events] == [(0, 3), (2, 3), (3, 3)]


def test_no_rows_have_no_scores(
    tmp_path: Path, tiny_backbone: Backbone, windows: list[Window]
) -> None:
    none = np.zeros(0, dtype=np.int64)
    assert score_base(tiny_backbone, windows, none, tmp_path / "s.npy").shape == (0,)


# The choice of lambda and temperature.


@pytest.mark.parametrize(("scale", "best"), [(1.0, 0.6), (3.0, 1.0), (8.0, 3.0)])
def test_tuning_finds_the_best_of_a_fine_grid(scale: float, best: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 6))
    sharpness = np.exp(logits / scale)
    truth = np.array([rng.choice(6, p=row / row.sum()) for row in sharpness])

    def p_memory(temperature: float) -> Floats:
        scaled = np.exp(logits / temperature)
        chosen: Floats = scaled[np.arange(400), truth] / scaled.sum(1)
        return chosen

    p_base = rng.uniform(0.05, 0.3, size=400)
    at = {t: p_memory(t) for t in (0.6, 1.0, 3.0)}
    losses = {
        (lambda_, t): -np.log(lambda_ * p + (1 - lambda_) * p_base).mean()
        for t, p in at.items()
        for lambda_ in np.linspace(0, 0.999, 500)
    }
    lambda_, temperature = tune(p_base, at)
    expected = min(losses, key=lambda choice: losses[choice])
    assert temperature == expected[1] == best
    assert lambda_ == pytest.approx(expected[0], abs=3e-3)


def test_a_useless_memory_gets_no_weight() -> None:
    lambda_, _ = tune(np.full(50, 0.5), {1.0: np.full(50, 0.1), 2.0: np.full(50, 0.2)})
    assert lambda_ == 0.0


# The figures.


def test_perplexities_by_hand() -> None:
    found = measure(
        p_base=np.array([0.5, 0.25, 0.125]),
        p_teacher=np.array([1.0, 0.5, 0.125]),
        p_memory=np.array([0.1, 1.0, 0.5]),
        documents=np.array([0, 0, 1], dtype=np.int32),
        teacher_lambda=1.0,
        memory_lambda=0.5,
    )
    assert found.tokens == 3
    assert found.base == pytest.approx(64 ** (1 / 3))
    assert found.teacher == pytest.approx(16 ** (1 / 3))
    assert found.memory == pytest.approx((1 / (0.3 * 0.625 * 0.3125)) ** (1 / 3))
    assert found.kept_gain == pytest.approx((4 - 2.5746) / (4 - 2.5198), abs=1e-4)


@pytest.mark.parametrize(("memory", "kept"), [(10.0, 0.0), (8.0, 1.0), (7.0, 1.5), (11.0, -0.5)])
def test_share_of_the_teachers_gain(memory: float, kept: float) -> None:
    assert Perplexities(9, 10.0, 8.0, memory, 0, 1).kept_gain == pytest.approx(kept)


@pytest.mark.parametrize("teacher", [10.0, 11.0])
def test_nothing_can_be_kept_of_no_gain(teacher: float) -> None:
    assert Perplexities(9, 10.0, teacher, 8.0, 0, 1).kept_gain is None


def test_a_base_that_rules_the_truth_out_gives_finite_figures() -> None:
    p_base, p_memory = np.array([0.0, 0.5]), np.array([0.5, 0.5])
    documents = np.array([0, 1], dtype=np.int32)
    found = measure(p_base, p_base, p_memory, documents, teacher_lambda=0.3, memory_lambda=0.5)
    assert found.memory == pytest.approx((0.25 * 0.5) ** -0.5)
    assert all(map(math.isfinite, (found.base, found.teacher, found.ratio_low, found.ratio_high)))


# The interval.


def interval(gains: list[list[float]], seed: int = 0) -> tuple[float, float]:
    """Of documents whose tokens gain these factors of probability."""
    factors = np.concatenate([np.array(gain) for gain in gains])
    documents = np.repeat(np.arange(len(gains), dtype=np.int32), [len(gain) for gain in gains])
    p_base = np.full(len(factors), 0.01)
    found = measure(
        p_base, p_base, p_base * factors, documents, teacher_lambda=0, memory_lambda=1, seed=seed
    )
    ratio = found.memory / found.base
    assert found.ratio_low <= ratio * (1 + 1e-12)
    assert ratio <= found.ratio_high * (1 + 1e-12)
    return found.ratio_low, found.ratio_high


@pytest.mark.parametrize("gains", [[[2.0] * 5, [2.0] * 9, [2.0]], [[1.0, 4.0]] * 7])
def test_equal_documents_leave_no_doubt(gains: list[list[float]]) -> None:
    low, high = interval(gains)
    assert low == pytest.approx(high)
    assert low == pytest.approx(float(np.prod(gains[0])) ** (-1 / len(gains[0])))


def test_documents_are_drawn_not_tokens() -> None:
    """Six with their own gain each: nothing is as sure as six hundred tokens would make it."""
    gains = [1.2, 1.4, 1.6, 1.8, 2.0, 2.2]
    many, one = ([[gain] * count for gain in gains] for count in (100, 1))
    assert interval(many) == pytest.approx(interval(one))


def test_of_few_documents_stretches_of_text_are_drawn() -> None:
    rng = np.random.default_rng(1)
    logs = rng.normal(0.2, 0.3, size=200)
    gains = [math.exp(log) for log in logs for _ in range(heldout.STRETCH)]
    low, high = interval([gains])
    half = 1.96 * logs.std() / math.sqrt(200)
    assert math.log(low) == pytest.approx(-logs.mean() - half, abs=0.1 * half)
    assert math.log(high) == pytest.approx(-logs.mean() + half, abs=0.1 * half)


def test_the_interval_is_that_of_the_mean_of_many_documents() -> None:
    rng = np.random.default_rng(1)
    logs = rng.normal(0.2, 0.3, size=200)
    low, high = interval([[math.exp(log)] for log in logs])
    half = 1.96 * logs.std() / math.sqrt(200)
    assert math.log(low) == pytest.approx(-logs.mean() - half, abs=0.1 * half)
    assert math.log(high) == pytest.approx(-logs.mean() + half, abs=0.1 * half)


def test_the_interval_follows_the_seed() -> None:
    gains = [[1.0 + n] for n in range(9)]
    assert interval(gains) == interval(gains) != interval(gains, seed=1)
