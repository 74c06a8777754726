"""Training the memory on lessons: rows of hidden states with what is to be predicted from them.

The optimisation, its checkpoints and its early stop. What a row teaches is the lesson's own
(`TextLesson`: the kNN teacher's votes; `StudyLesson`: answers to written questions).
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlpmem_rag.errors import ConfigError, TrainingError
from mlpmem_rag.memory import Memory
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.storage import replace_file, write_json
from mlpmem_rag.tensors import is_finite

Rows = npt.NDArray[np.int64]
BEST = "best.safetensors"
STATE = "state.json"
WORDS = "words."
"""How the names of tensors begin that are looked at and not learned."""
LAST = ("last-0.safetensors", "last-1.safetensors")
CHECKPOINT_SECONDS = 30.0
"""Between two checkpoints of one training: three times the weights go to the disk."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of the optimisation; the defaults are the paper's where it names them.

    Attributes:
        learning_rate: peak of the linear schedule (paper 4e-4).
        warmup: share of the steps in which the rate rises (paper 0.03).
        epochs: passes over the rows at most (paper 5 for a 7B base).
        batch_rows: rows a step.
        clip: largest gradient norm (paper 1.0).
        patience: epochs without a better validation loss after which training ends.
        seed: order of the rows.
    """

    learning_rate: float = 4e-4
    warmup: float = 0.03
    epochs: int = 5
    batch_rows: int = 256
    clip: float = 1.0
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: a value outside what is allowed.
        """
        if not (0 < self.learning_rate < math.inf and 0 < self.clip < math.inf):
            raise ConfigError(
                f"learning rate {self.learning_rate} and clipping norm {self.clip}: "
                "allowed are numbers above 0"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError(f"warm-up share {self.warmup}: allowed are 0 up to 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: allowed are 0 and above")
        if min(self.epochs, self.batch_rows, self.patience) < 1:
            raise ConfigError("epochs, batch rows and patience must be at least 1")


class Lesson(Protocol):
    """Rows to learn, numbered from 0."""

    def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
        """Mean loss of the rows, with a gradient; `generator` serves whatever is random in it.

        *Shape:* (R,) -> ().
        """
        ...


@dataclass
class DistillReport:
    """How training went; saved with each checkpoint.

    Attributes:
        train_losses: mean loss of each epoch.
        validation_losses: what `validate` said after each epoch.
        best_epoch: epoch (from 1) whose weights are kept.
        seconds: training time, evaluation included.
        rows_per_second: training throughput.
    """

    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0


def distill(
    memory: Memory,
    lesson: Lesson,
    train_rows: Rows,
    config: DistillConfig,
    folder: Path,
    *,
    validate: Callable[[Memory], float] | None,
    stop_epoch: int | None = None,
    stage: str = "distil",
    on_progress: OnProgress = ignore_progress,
) -> DistillReport:
    """Train `memory` in place and leave the best weights in it.

    With `validate`, the loss on rows held out: stops early and keeps the best epoch's weights.
    Without: trains to `stop_epoch` (or the end) of the same schedule and keeps the last weights.
    Checkpoints in `folder` after every epoch, or of short ones after some; a second call with the
    same arguments goes on from the last one.

    Raises:
        TrainingError: a loss or a weight is no longer finite; the last good checkpoint is kept.
    """
    optimizer = torch.optim.AdamW(memory.parameters(), weight_decay=0.0, fused=True)
    last_epoch = min(stop_epoch or config.epochs, config.epochs)
    report = DistillReport()
    epoch = _resume(folder, memory, optimizer, report, last_epoch, config.patience)
    total = last_epoch * len(train_rows)
    on_progress(ProgressEvent(stage, epoch * len(train_rows), total, "rows"))
    kept = time.perf_counter()
    while not _ended(epoch, report.best_epoch, last_epoch, config.patience):
        started = time.perf_counter()
        losses = []
        for step, loss in _train_epoch(memory, lesson, train_rows, optimizer, config, epoch):
            losses.append(_finite(loss(), step, folder))
            done = epoch * len(train_rows) + min(len(losses) * config.batch_rows, len(train_rows))
            on_progress(ProgressEvent(stage, done, total, "rows"))
        epoch += 1
        report.train_losses.append(float(np.mean(losses)))
        report.rows_per_second = len(train_rows) / (time.perf_counter() - started)
        _check_weights(memory, epoch * math.ceil(len(train_rows) / config.batch_rows) - 1, folder)
        if validate is not None:
            report.validation_losses.append(_finite_validation(validate(memory), epoch, folder))
        *earlier, last = report.validation_losses or [0.0]
        if validate is None or all(last < loss for loss in earlier):
            report.best_epoch = epoch
        report.seconds += time.perf_counter() - started
        ended = _ended(epoch, report.best_epoch, last_epoch, config.patience)
        if ended or validate is not None or time.perf_counter() - kept >= CHECKPOINT_SECONDS:
            _checkpoint(folder, memory, optimizer, report, epoch)
            kept = time.perf_counter()
    on_progress(ProgressEvent(stage, total, total, "rows"))
    _restore(memory, load_file(folder / BEST))
    memory.eval()
    for path in (folder / name for name in LAST):  # three times the weights, and of no more use
        path.unlink(missing_ok=True)
    return report


def _ended(epoch: int, best_epoch: int, last_epoch: int, patience: int) -> bool:
    """Whether no epoch comes after so many."""
    return epoch >= last_epoch or epoch - best_epoch >= patience


def _train_epoch(
    memory: Memory,
    lesson: Lesson,
    train_rows: Rows,
    optimizer: torch.optim.AdamW,
    config: DistillConfig,
    epoch: int,
) -> Iterator[tuple[int, Callable[[], float]]]:
    """One pass over the rows; yields each step with its loss.

    A step is yielded when the next one is queued behind it, so that a GPU has work while the host
    waits for a loss.
    """
    memory.train()
    device = memory.corpus_tokens.device
    generator = torch.Generator(device).manual_seed(config.seed * 100_003 + epoch)
    steps = math.ceil(len(train_rows) / config.batch_rows)
    queued: deque[tuple[int, Callable[[], float]]] = deque()
    for number, rows in enumerate(_shuffled(train_rows, config, epoch)):
        loss = lesson.loss(memory, rows, generator)
        step = epoch * steps + number
        queued.append((step, _arriving(loss)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps * config.epochs, config)
        optimizer.step()
        if len(queued) > 1:
            yield queued.popleft()
    yield from queued


def _arriving(loss: Tensor) -> Callable[[], float]:
    """Queue a copy to main memory; what is returned waits for it and gives it. *Shape:* ()."""
    value = loss.detach()
    if value.device.type != "cuda":
        return value.item
    copy = value.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(value.device))

    def arrived() -> float:
        copied.synchronize()
        return copy.item()

    return arrived


def _shuffled(rows: Rows, config: DistillConfig, epoch: int) -> Iterator[Rows]:
    order = np.random.default_rng((config.seed, epoch)).permutation(len(rows))
    for first in range(0, len(rows), config.batch_rows):
        # Sorted within the batch: the same gradient, and the files are read in order.
        yield np.sort(rows[order[first : first + config.batch_rows]])


def learning_rate_at(step: int, steps: int, config: DistillConfig) -> float:
    """Linear warm-up, then linear decay to zero at the last of `steps`."""
    warmup = max(1, round(config.warmup * steps))
    rising = (step + 1) / warmup
    falling = (steps - step) / max(1, steps - warmup)
    return config.learning_rate * min(1.0, rising, falling)


def _finite(loss: float, step: int, folder: Path) -> float:
    if not math.isfinite(loss):
        raise _diverged(f"the loss became {loss} at step {step}", folder)
    return loss


def _finite_validation(loss: float, epoch: int, folder: Path) -> float:
    if not math.isfinite(loss):
        raise _diverged(f"the validation loss became {loss} in epoch {epoch}", folder)
    return loss


def _check_weights(memory: Memory, step: int, folder: Path) -> None:
    """Before they are kept: a gradient that is not finite shows in the next loss only."""
    for name, parameter in memory.named_parameters():
        if not is_finite(parameter.detach()):
            raise _diverged(f"{name} was no longer finite after step {step}", folder)


def _diverged(what: str, folder: Path) -> TrainingError:
    state = folder / STATE
    kept = "there is no earlier checkpoint"
    if state.is_file():
        epoch = json.loads(state.read_text())["epoch"]
        kept = f"the last good checkpoint, of epoch {epoch}, is in {folder}"
    return TrainingError(
        f"{what}; {kept}. Try --dtype float32, another --layer, or a smaller learning rate"
    )


def _checkpoint(
    folder: Path,
    memory: Memory,
    optimizer: torch.optim.AdamW,
    report: DistillReport,
    epoch: int,
) -> None:
    """Weights, optimiser moments and report, without pickle; the state file goes last."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: t for n, t in memory.state_dict().items() if not n.startswith(WORDS)}
    if report.best_epoch == epoch:
        replace_file(folder / BEST, lambda path: save_file(weights, path))
    tensors = {f"weights.{name}": tensor for name, tensor in weights.items()}
    for name, parameter in memory.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    # Two files by turns: the one the state names is never being written.
    named = json.loads((folder / STATE).read_text())["file"] if (folder / STATE).is_file() else ""
    file = next(name for name in LAST if name != named)
    replace_file(folder / file, lambda path: save_file(tensors, path))
    state = {"epoch": epoch, "file": file, **asdict(report)}
    write_json(folder / STATE, state)


def _restore(memory: Memory, weights: dict[str, Tensor]) -> None:
    """Take what a checkpoint has; the words, which are not learned, stay as they are."""
    words = {n: t for n, t in memory.state_dict().items() if n.startswith(WORDS)}
    memory.load_state_dict({**words, **weights})


def _resume(
    folder: Path,
    memory: Memory,
    optimizer: torch.optim.AdamW,
    report: DistillReport,
    last_epoch: int,
    patience: int,
) -> int:
    """Continue from the last checkpoint; the number of epochs that are done."""
    path = folder / STATE
    if not path.is_file():
        return 0
    state = json.loads(path.read_text())
    epoch = int(state["epoch"])
    ended = _ended(epoch, state["best_epoch"], last_epoch, patience)
    if not ended and not (folder / state["file"]).is_file():
        return 0  # a shorter training had ended here and kept only its best weights
    for name in asdict(report):
        setattr(report, name, state[name])
    if ended:
        return epoch
    tensors = load_file(folder / state["file"])
    weights = "weights."
    _restore(
        memory, {n.removeprefix(weights): t for n, t in tensors.items() if n.startswith(weights)}
    )
    for name, parameter in memory.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].to(parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return epoch
