"""Training the memory to imitate the kNN teacher.

Loss: alpha * KL(p_kNN || p_mem) + (1 - alpha) * CE(next token) (paper, section 3). The KL is
computed on the sparse targets alone, and the head covers only corpus tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ConfigError, TrainingError
from mlpmem_rag.hardware import has_bfloat16
from mlpmem_rag.memory import Memory
from mlpmem_rag.mixing import best_lambda, mixture_nll
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.storage import replace_file, write_json
from mlpmem_rag.targets import Targets

Rows = npt.NDArray[np.int64]
BEST = "best.safetensors"


@dataclass(frozen=True)
class DistillConfig:
    """Settings of the optimisation; the defaults are the paper's where it names them.

    Attributes:
        alpha: share of the KL term (paper 0.4).
        learning_rate: peak of the linear schedule (paper 4e-4).
        warmup: share of the steps in which the rate rises (paper 0.03).
        epochs: passes over the rows at most (paper 5 for a 7B base).
        batch_rows: rows a step.
        clip: largest gradient norm (paper 1.0).
        patience: epochs without a better validation loss after which training ends.
        seed: order of the rows.
    """

    alpha: float = 0.4
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
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha = {self.alpha}: allowed are 0 (only CE) to 1 (only KL)")
        if not (self.learning_rate > 0 and self.clip > 0):
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


@dataclass(frozen=True)
class Validation:
    """Held-out rows and what the base model gives their true tokens. *Shapes:* (R,), (R,)."""

    rows: Rows
    p_base: npt.NDArray[np.float64]


@dataclass
class DistillReport:
    """How training went; saved with each checkpoint.

    Attributes:
        train_losses: mean loss of each epoch.
        validation_losses: negative log-likelihood of the best mixture after each epoch.
        best_epoch: epoch (from 1) whose weights are kept.
        seconds: training time, evaluation included.
        rows_per_second: training throughput.
    """

    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0


class TrainingData:
    """Rows of the datastore with their targets, as batches of tensors."""

    def __init__(
        self, datastore: Datastore, targets: Targets, memory: Memory, vocab_size: int
    ) -> None:
        self._datastore = datastore
        self._targets = targets
        self._device = memory.corpus_tokens.device
        columns = np.zeros(vocab_size + 1, dtype=np.int64)  # the last place serves -1
        tokens = memory.corpus_tokens.cpu().numpy()
        columns[tokens] = np.arange(len(tokens))
        self._columns = columns

    def batch(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys (R, D), target columns (R, M), target probabilities (R, M), next columns (R,)."""
        keys = torch.from_numpy(self._datastore.keys(rows))
        columns = torch.from_numpy(self._columns[self._targets.token_ids[rows]])
        probs = torch.from_numpy(self._targets.probs[rows].astype(np.float32))
        next_columns = torch.from_numpy(self._columns[self._datastore.next_tokens[rows]])
        device = self._device
        return keys.to(device), columns.to(device), probs.to(device), next_columns.to(device)

    def keys_and_next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys (R, D) and next columns (R,), for evaluation."""
        keys = torch.from_numpy(self._datastore.keys(rows)).to(self._device)
        next_columns = torch.from_numpy(self._columns[self._datastore.next_tokens[rows]])
        return keys, next_columns.to(self._device)


def distillation_loss(
    log_probs: Tensor, columns: Tensor, probs: Tensor, next_columns: Tensor, alpha: float
) -> Tensor:
    """Alpha * KL(target || memory) + (1 - alpha) * cross-entropy, mean over rows.

    *Shapes:* log_probs (R, V), columns (R, M), probs (R, M), next_columns (R,) -> ().
    """
    cross = -(probs * log_probs.gather(1, columns)).sum(1)
    entropy = -torch.special.xlogy(probs, probs).sum(1)
    nll = -log_probs.gather(1, next_columns[:, None]).squeeze(1)
    loss: Tensor = (alpha * (cross - entropy) + (1 - alpha) * nll).mean()
    return loss


def distill(
    memory: Memory,
    data: TrainingData,
    train_rows: Rows,
    config: DistillConfig,
    folder: Path,
    *,
    validation: Validation | None,
    stop_epoch: int | None = None,
    stage: str = "distil",
    on_progress: OnProgress = ignore_progress,
) -> DistillReport:
    """Train `memory` in place and leave the best weights in it.

    With validation rows: stops early, keeps the epoch whose mixture with the base is best.
    Without: trains to `stop_epoch` (or the end) of the same schedule and keeps the last weights.
    Checkpoints after every epoch in `folder`; a second call with the same arguments goes on
    from the last one.

    Raises:
        TrainingError: the loss is no longer finite; the last good checkpoint is kept.
    """
    optimizer = torch.optim.AdamW(memory.parameters(), weight_decay=0.0, fused=True)
    last_epoch = min(stop_epoch or config.epochs, config.epochs)
    report = DistillReport()
    epoch = _resume(folder, memory, optimizer, report, last_epoch, config.patience)
    total = last_epoch * len(train_rows)
    on_progress(ProgressEvent(stage, epoch * len(train_rows), total, "rows"))
    while epoch < last_epoch and epoch - report.best_epoch < config.patience:
        started = time.perf_counter()
        losses = []
        for loss in _train_epoch(memory, data, train_rows, optimizer, config, epoch, folder):
            losses.append(loss)
            done = epoch * len(train_rows) + min(len(losses) * config.batch_rows, len(train_rows))
            on_progress(ProgressEvent(stage, done, total, "rows"))
        epoch += 1
        report.train_losses.append(float(np.mean(losses)))
        report.rows_per_second = len(train_rows) / (time.perf_counter() - started)
        if validation is not None:
            report.validation_losses.append(validation_loss(memory, data, validation))
        *earlier, last = report.validation_losses or [0.0]
        if validation is None or all(last < loss for loss in earlier):
            report.best_epoch = epoch
        report.seconds += time.perf_counter() - started
        _checkpoint(folder, memory, optimizer, report, epoch)
    on_progress(ProgressEvent(stage, total, total, "rows"))
    memory.load_state_dict(load_file(folder / BEST))
    memory.eval()
    for path in folder.glob("last-*.safetensors"):  # three times the weights, and of no more use
        path.unlink()
    return report


def _train_epoch(
    memory: Memory,
    data: TrainingData,
    train_rows: Rows,
    optimizer: torch.optim.AdamW,
    config: DistillConfig,
    epoch: int,
    folder: Path,
) -> Iterator[float]:
    """One pass over the rows; yields the loss of each step."""
    memory.train()
    device = memory.corpus_tokens.device
    steps = math.ceil(len(train_rows) / config.batch_rows)
    for number, rows in enumerate(_shuffled(train_rows, config, epoch)):
        keys, columns, probs, next_columns = data.batch(rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            logits = memory(keys)
        log_probs = logits.float().log_softmax(-1)
        loss = distillation_loss(log_probs, columns, probs, next_columns, config.alpha)
        step = epoch * steps + number
        value = _finite(loss, step, folder)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps * config.epochs, config)
        optimizer.step()
        yield value


def validation_loss(memory: Memory, data: TrainingData, validation: Validation) -> float:
    """Negative log-likelihood of the held-out rows under the best mixture with the base."""
    p_memory = true_token_probabilities(memory, data, validation.rows)
    return mixture_nll(validation.p_base, p_memory, best_lambda(validation.p_base, p_memory))


@torch.inference_mode()
def true_token_probabilities(
    memory: Memory, data: TrainingData, rows: Rows, temperature: float = 1.0, batch: int = 1024
) -> npt.NDArray[np.float64]:
    """What the memory gives the true next token of each row. *Shape:* (R,)."""
    training = memory.training
    memory.eval()
    out = np.empty(len(rows))
    device = memory.corpus_tokens.device
    for first in range(0, len(rows), batch):
        keys, next_columns = data.keys_and_next(rows[first : first + batch])
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            logits = memory(keys)
        log_probs = (logits.float() / temperature).log_softmax(-1)
        chosen = log_probs.gather(1, next_columns[:, None]).squeeze(1)
        out[first : first + batch] = chosen.exp().double().cpu().numpy()
    memory.train(training)
    return out


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


def _finite(loss: Tensor, step: int, folder: Path) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss became {value} at step {step}; the last good checkpoint is in {folder}. "
            "Try --dtype float32, another --layer, or a smaller learning rate"
        )
    return value


def _checkpoint(
    folder: Path,
    memory: Memory,
    optimizer: torch.optim.AdamW,
    report: DistillReport,
    epoch: int,
) -> None:
    """Weights, optimiser moments and report, without pickle; the state file goes last."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = memory.state_dict()
    if report.best_epoch == epoch:
        replace_file(folder / BEST, lambda path: save_file(weights, path))
    tensors = {f"weights.{name}": tensor for name, tensor in weights.items()}
    for name, parameter in memory.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    # Two files by turns: the one the state names is never being written.
    file = f"last-{epoch % 2}.safetensors"
    replace_file(folder / file, lambda path: save_file(tensors, path))
    state = {"epoch": epoch, "file": file, **asdict(report)}
    write_json(folder / "state.json", state)


def _resume(
    folder: Path,
    memory: Memory,
    optimizer: torch.optim.AdamW,
    report: DistillReport,
    last_epoch: int,
    patience: int,
) -> int:
    """Continue from the last checkpoint; the number of epochs that are done."""
    path = folder / "state.json"
    if not path.is_file():
        return 0
    state = json.loads(path.read_text())
    epoch = int(state["epoch"])
    ended = epoch >= last_epoch or epoch - state["best_epoch"] >= patience
    if not ended and not (folder / state["file"]).is_file():
        return 0  # a shorter training had ended here and kept only its best weights
    for name in asdict(report):
        setattr(report, name, state[name])
    if ended:
        return epoch
    tensors = load_file(folder / state["file"])
    weights = "weights."
    memory.load_state_dict(
        {n.removeprefix(weights): t for n, t in tensors.items() if n.startswith(weights)}
    )
    for name, parameter in memory.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].to(parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return epoch
