"""Training on corpus text: the loss, what it learns, when it stops, how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag import distill as distill_module
from mlpmem_rag.cross_entropy import cross_entropy
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import (
    DistillConfig,
    DistillReport,
    Lesson,
    Rows,
    distill,
    learning_rate_at,
)
from mlpmem_rag.errors import ConfigError, TrainingError
from mlpmem_rag.lessons import Columns, TextLesson, distillation_targets
from mlpmem_rag.memory import Memory, MemoryConfig, new_memory
from mlpmem_rag.mixing import Probabilities, best_lambda, mixture_nll
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.targets import Targets

CORPUS_TOKENS = torch.tensor([2, 3, 5, 8, 13, 21])
FIRST, SECOND = [2, 5, 8, 21], [3, 13, 2, 5]
"""Contexts come in four kinds; each has a likely next token and a less likely one."""
SHARE = 0.7
TRAIN, HELD_OUT = np.arange(240), np.arange(240, 320)
POOR_BASE = np.full(len(HELD_OUT), 1e-3)


class Task:
    """320 made-up rows, to be learnt by a memory of one block."""

    def __init__(self, make: Callable[..., Datastore], *, learnable: bool = True) -> None:
        rng = np.random.default_rng(0)
        kind = rng.integers(4, size=320)
        keys = rng.normal(size=(4, 16))[kind] + 0.05 * rng.normal(size=(320, 16))
        tokens = np.where(rng.random(320) < SHARE, np.take(FIRST, kind), np.take(SECOND, kind))
        if not learnable:
            keys = rng.normal(size=keys.shape)
            tokens = CORPUS_TOKENS.numpy()[rng.integers(6, size=320)]
        self.kind = kind
        self.store = make(keys, tokens)
        unused = np.full_like(kind, -1)
        token_ids = np.stack([np.take(FIRST, kind), np.take(SECOND, kind), unused], 1)
        probs = np.tile(np.array([SHARE, 1 - SHARE, 0], dtype=np.float16), (320, 1))
        self.targets = Targets(token_ids.astype(np.int32), probs, tau=1.0, kept_mass=1.0)

    def memory(self) -> Memory:
        config = MemoryConfig(16, 32, 1, "silu", gated=True, vocab_size=len(CORPUS_TOKENS))
        return new_memory(config, CORPUS_TOKENS, None, seed=0)

    def lesson(self, memory: Memory, alpha: float = 0.4) -> TextLesson:
        columns = Columns(memory, vocab_size=30)
        return TextLesson(self.store, self.targets, columns, alpha=alpha)

    def train(
        self,
        folder: Path,
        config: DistillConfig,
        *,
        alpha: float = 0.4,
        p_base: Probabilities | None = None,
        stop_epoch: int | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> tuple[Memory, DistillReport]:
        memory = self.memory()
        report = distill(
            memory,
            self.lesson(memory, alpha),
            TRAIN,
            config,
            folder,
            validate=None if p_base is None else lambda m: self.validation_loss(m, p_base),
            stop_epoch=stop_epoch,
            on_progress=on_progress,
        )
        return memory, report

    def validation_loss(self, memory: Memory, p_base: Probabilities) -> float:
        p_memory = self.lesson(memory).true_token_probabilities(memory, HELD_OUT)
        return mixture_nll(p_base, p_memory, best_lambda(p_base, p_memory))


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """These epochs take no time: each is kept, but where a test says otherwise."""
    monkeypatch.setattr(distill_module, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def task(datastore_of: Callable[..., Datastore]) -> Task:
    return Task(datastore_of)


@pytest.fixture(scope="module")
def unlearnable(datastore_of: Callable[..., Datastore]) -> Task:
    return Task(datastore_of, learnable=False)


def equal(first: Memory, second: Memory | dict[str, Tensor]) -> bool:
    weights = second.state_dict() if isinstance(second, Memory) else second
    return all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())


def interrupt_at(rows: int) -> OnProgress:
    def stop(event: ProgressEvent) -> None:
        if event.done >= rows:
            raise KeyboardInterrupt

    return stop


# The loss.


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_sparse_loss_equals_the_dense_one(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(8, 12, generator=generator).log_softmax(-1)
    columns = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(8)])
    probs = torch.rand(8, 5, generator=generator)
    columns[:, 4], probs[:, 4] = 0, 0  # unused places
    probs /= probs.sum(1, keepdim=True)
    truth = torch.randint(12, (8,), generator=generator)

    dense = torch.zeros(8, 12).scatter_add(1, columns, probs)
    expected = alpha * F.kl_div(log_probs, dense, reduction="batchmean")
    expected += (1 - alpha) * F.cross_entropy(log_probs, truth)
    targets = distillation_targets(columns, probs, truth, alpha)
    # Log-probabilities as states of a head that changes nothing: softmax gives them back.
    found = cross_entropy(log_probs, torch.eye(12), targets)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_loss_of_rows_equals_one_over_all_token_ids(task: Task, alpha: float) -> None:
    """Targets and next tokens are ids of the base's vocabulary, places without a target -1."""
    rows, memory = np.array([3, 77, 200]), task.memory()
    found = task.lesson(memory, alpha).loss(memory, rows, torch.Generator())
    full = torch.full((3, 30), -100.0)
    full[:, CORPUS_TOKENS] = memory.log_probs(torch.from_numpy(task.store.keys(rows)))
    token_ids, probs = task.targets.token_ids[rows], task.targets.probs[rows].astype(np.float32)
    dense = np.zeros((3, 30), dtype=np.float32)
    for row in range(3):
        for token, prob in zip(token_ids[row], probs[row], strict=True):
            dense[row, token] += prob if token >= 0 else 0
    expected = alpha * F.kl_div(full, torch.from_numpy(dense), reduction="batchmean")
    truth = torch.from_numpy(task.store.next_tokens[rows].astype(np.int64))
    expected = expected + (1 - alpha) * F.nll_loss(full, truth)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # bfloat16 where it is fast


def test_learning_rate_rises_then_falls() -> None:
    config = DistillConfig(learning_rate=8.0, warmup=0.2)
    rates = [learning_rate_at(step, 10, config) for step in range(10)]
    np.testing.assert_allclose(rates, [4, 8, 8, 7, 6, 5, 4, 3, 2, 1])


# What is learnt.


def test_the_memory_learns_the_targets(tmp_path: Path, task: Task) -> None:
    config = DistillConfig(learning_rate=1e-2, epochs=15, batch_rows=32)
    memory, report = task.train(tmp_path, config, alpha=1.0)
    assert report.train_losses[-1] < 0.02 < 0.5 < report.train_losses[0]
    assert report.best_epoch == 15
    assert not memory.training
    with torch.no_grad():
        found = memory.log_probs(torch.from_numpy(task.store.keys(HELD_OUT))).exp()
    expected = np.zeros((len(HELD_OUT), 30))
    np.put_along_axis(expected, np.take(FIRST, task.kind[HELD_OUT])[:, None], SHARE, 1)
    np.put_along_axis(expected, np.take(SECOND, task.kind[HELD_OUT])[:, None], 1 - SHARE, 1)
    np.testing.assert_allclose(found, expected[:, CORPUS_TOKENS], atol=0.1)


def test_gradients_are_clipped(tmp_path: Path, task: Task) -> None:
    """Clipped far below Adam's epsilon, they move nothing."""
    config = DistillConfig(learning_rate=1e-2, epochs=1, batch_rows=60, clip=1e-14)
    memory, _ = task.train(tmp_path, config)
    for weight, start in zip(memory.parameters(), task.memory().parameters(), strict=True):
        torch.testing.assert_close(weight, start, rtol=0, atol=1e-6)


def test_validation_rows_are_not_trained_on(tmp_path: Path, task: Task) -> None:
    seen: list[Rows] = []

    class Recording(TextLesson):
        def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
            seen.append(rows)
            return super().loss(memory, rows, generator)

    memory = task.memory()
    lesson = Recording(task.store, task.targets, Columns(memory, vocab_size=30), alpha=0.4)
    config = DistillConfig(epochs=2, batch_rows=100)

    def validate(memory: Memory) -> float:
        return task.validation_loss(memory, POOR_BASE)

    distill(memory, lesson, TRAIN, config, tmp_path, validate=validate)
    first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    np.testing.assert_array_equal(np.sort(first), TRAIN)
    np.testing.assert_array_equal(np.sort(second), TRAIN)
    assert not np.array_equal(first, second), "each epoch has an order of its own"


def test_true_token_probabilities(task: Task) -> None:
    memory = task.memory()
    found = task.lesson(memory).true_token_probabilities(memory, HELD_OUT, 0.5, batch=33)
    with torch.no_grad():
        log_probs = memory.log_probs(torch.from_numpy(task.store.keys(HELD_OUT)), temperature=0.5)
    columns = [CORPUS_TOKENS.tolist().index(t) for t in task.store.next_tokens[HELD_OUT]]
    expected = log_probs.exp()[torch.arange(len(columns)), columns]
    np.testing.assert_allclose(found, expected, rtol=0.05)  # bfloat16 where the machine has it
    assert memory.training


# When it stops.


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path, unlearnable: Task) -> None:
    config = DistillConfig(learning_rate=1e-2, epochs=12, batch_rows=16, patience=2)
    memory, report = unlearnable.train(tmp_path, config, p_base=POOR_BASE)
    losses = report.validation_losses
    assert len(losses) == len(report.train_losses) == report.best_epoch + 2 < 12
    assert losses[report.best_epoch - 1] == min(losses) < losses[-1]
    assert unlearnable.validation_loss(memory, POOR_BASE) == pytest.approx(min(losses))
    assert equal(memory, load_file(tmp_path / "best.safetensors"))


def test_no_better_loss_ends_training(tmp_path: Path, task: Task) -> None:
    """A base that is always right: lambda is 0 and the loss the same after every epoch."""
    perfect = np.ones(len(HELD_OUT))
    config = DistillConfig(epochs=6, batch_rows=120, patience=2)
    _, report = task.train(tmp_path, config, p_base=perfect)
    assert report.best_epoch == 1
    assert len(report.validation_losses) == 3


def test_stop_epoch_follows_the_same_schedule(tmp_path: Path, task: Task) -> None:
    config = DistillConfig(epochs=4, batch_rows=60)
    events: list[ProgressEvent] = []
    early, report = task.train(tmp_path / "a", config, stop_epoch=2, on_progress=events.append)
    assert report.best_epoch == len(report.train_losses) == 2
    assert {event.total for event in events} == {480}
    assert [event.done for event in events] == [*range(0, 481, 60), 480]
    whole, expected = task.train(tmp_path / "b", config)
    assert report.train_losses == expected.train_losses[:2]
    assert not equal(early, whole)


# Interruption, repetition, failure.


@pytest.mark.parametrize("at", [1.5, 2.0, 2.75])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, unlearnable: Task, at: float
) -> None:
    config = DistillConfig(learning_rate=1e-2, epochs=4, batch_rows=32, patience=4)
    once, expected = unlearnable.train(tmp_path / "once", config, p_base=POOR_BASE)
    stop = interrupt_at(int(at * len(TRAIN)))
    with pytest.raises(KeyboardInterrupt):
        unlearnable.train(tmp_path / "twice", config, p_base=POOR_BASE, on_progress=stop)
    events: list[ProgressEvent] = []
    twice, report = unlearnable.train(
        tmp_path / "twice", config, p_base=POOR_BASE, on_progress=events.append
    )
    assert events[0].done == (np.ceil(at) - 1) * len(TRAIN)
    assert equal(once, twice)
    assert report.train_losses == expected.train_losses
    assert report.validation_losses == expected.validation_losses
    assert report.best_epoch == expected.best_epoch


def test_short_epochs_are_kept_now_and_then(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the last of twelve of which every fifth or so is kept."""
    config = DistillConfig(learning_rate=1e-2, epochs=12, batch_rows=60, patience=12)
    monkeypatch.setattr(distill_module, "CHECKPOINT_SECONDS", 30.0)
    looks = count(0, 3)  # seconds at every look at the clock
    clock = SimpleNamespace(perf_counter=lambda: float(next(looks)))
    monkeypatch.setattr("mlpmem_rag.distill.time", clock)
    once, expected = task.train(tmp_path / "once", config)
    stop = interrupt_at(int(11.5 * len(TRAIN)))
    with pytest.raises(KeyboardInterrupt):
        task.train(tmp_path / "twice", config, on_progress=stop)
    events: list[ProgressEvent] = []
    twice, report = task.train(tmp_path / "twice", config, on_progress=events.append)
    assert 0 < events[0].done < 11 * len(TRAIN)
    assert equal(once, twice)
    assert report.train_losses == expected.train_losses


def test_a_finished_run_is_not_trained_again(tmp_path: Path, task: Task) -> None:
    config = DistillConfig(epochs=2, batch_rows=60)
    first, report = task.train(tmp_path, config)
    again, same_report = task.train(tmp_path, config)
    assert equal(first, again)
    assert report == same_report


def test_the_seed_decides(tmp_path: Path, task: Task) -> None:
    def train(name: str, seed: int) -> Memory:
        return task.train(tmp_path / name, DistillConfig(epochs=1, batch_rows=32, seed=seed))[0]

    torch.manual_seed(1)
    first = train("first", 7)
    torch.manual_seed(2)
    assert equal(first, train("again", 7))
    assert not equal(first, train("other", 8))


def test_a_loss_that_is_not_finite_names_step_and_folder(tmp_path: Path, task: Task) -> None:
    config = DistillConfig(learning_rate=1e38, epochs=3, batch_rows=60, warmup=0.0)
    with pytest.raises(TrainingError) as caught:
        task.train(tmp_path, config)
    assert "the loss became nan at step 1; there is no earlier checkpoint." in str(caught.value)


class Failing:
    """A lesson whose loss, or whose gradient alone, is not finite at one step."""

    def __init__(self, lesson: Lesson, at: int, *, gradient_only: bool) -> None:
        self.lesson = lesson
        self.at = at
        self.gradient_only = gradient_only
        self.step = -1

    def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
        self.step += 1
        loss = self.lesson.loss(memory, rows, generator)
        if self.step != self.at:
            return loss
        if self.gradient_only:  # the slope of the root at 0 is infinite
            return loss + torch.sqrt(0.0 * memory.lm_head.weight[0, 0])
        return loss + torch.nan


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("at", "gradient_only", "said"),
    [
        (5, False, "the loss became nan at step 5"),
        (5, True, "the loss became nan at step 6"),
        (7, True, r"[a-z_0-9.]+ was no longer finite after step 7"),
    ],
)
def test_what_is_not_finite_ends_training_with_the_epoch_before_it_kept(
    tmp_path: Path, task: Task, at: int, gradient_only: bool, said: str
) -> None:
    config = DistillConfig(learning_rate=1e-2, epochs=3, batch_rows=60)  # 4 steps an epoch
    memory = task.memory()
    failing = Failing(task.lesson(memory), at, gradient_only=gradient_only)
    kept: dict[str, bytes] = {}

    def note(event: ProgressEvent) -> None:
        if event.done == len(TRAIN) + config.batch_rows:  # a step into the second epoch
            kept.update(content(tmp_path))

    kept_said = rf"{said}; the last good checkpoint, of epoch 1, is in {tmp_path}\. Try"
    with pytest.raises(TrainingError, match=kept_said):
        distill(memory, failing, TRAIN, config, tmp_path, validate=None, on_progress=note)
    assert len(kept) == 3
    assert content(tmp_path) == kept
    memory = task.memory()
    whole = task.memory()
    for folder, one in ((tmp_path, memory), (tmp_path / "whole", whole)):
        distill(one, task.lesson(one), TRAIN, config, folder, validate=None)
    assert equal(memory, whole), "once the cause is gone it goes on as if nothing had happened"


def test_the_next_step_is_made_before_a_loss_is_waited_for(tmp_path: Path, task: Task) -> None:
    memory, made = task.memory(), list[int]()
    lesson = task.lesson(memory)

    class Counting:
        def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
            made.append(len(rows))
            return lesson.loss(memory, rows, generator)

    seen: list[tuple[int, int]] = []
    distill(
        memory,
        Counting(),
        TRAIN,
        DistillConfig(epochs=2, batch_rows=60),
        tmp_path,
        validate=None,
        on_progress=lambda event: seen.append((event.done // 60, len(made))),
    )
    # After a step's loss, the number of steps made; an epoch ends with all of them.
    assert seen[1:-1] == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 7), (7, 8), (8, 8)]


def test_a_validation_loss_that_is_not_finite_is_no_best_one(tmp_path: Path, task: Task) -> None:
    memory = task.memory()
    config = DistillConfig(epochs=2, batch_rows=60)
    said = "the validation loss became nan in epoch 1; there is no earlier checkpoint"
    with pytest.raises(TrainingError, match=said):
        distill(
            memory, task.lesson(memory), TRAIN, config, tmp_path, validate=lambda _: float("nan")
        )
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup": 1.0},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"clip": float("nan")},
        {"clip": 0.0},
        {"epochs": 0},
        {"batch_rows": 0},
        {"patience": 0},
    ],
)
def test_settings_outside_what_is_allowed(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"allowed are|at least 1"):
        DistillConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_a_share_of_the_kl_outside_is_refused(task: Task, alpha: float) -> None:
    with pytest.raises(ConfigError, match=rf"alpha = {alpha}: allowed are 0 .* to 1"):
        task.lesson(task.memory(), alpha)
