"""The sceptic's baseline: why not fine-tune? A LoRA adapter on what the memory learned.

Hu et al., arXiv 2106.09685. The adapter learns the same written questions, asked as they will be
asked, and the same text, for at most as long as the memory's training took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.errors import MissingDependencyError
from mlpmem_rag.integrity import sha256
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.questions import Question
from mlpmem_rag.stages import stage_key
from mlpmem_rag.storage import write_json
from mlpmem_rag.windows import tokenize

WEIGHTS = "adapter_model.safetensors"
WARM_UP = 0.03
IGNORED = -100
"""Label of a token that is read, not learned."""


@dataclass(frozen=True)
class LoraSettings:
    """How the adapter is trained.

    Attributes:
        rank: of the adapter's matrices.
        alpha: scale of the adapter, over its rank.
        learning_rate: at its highest, after a warm-up of 3 %; linear decay.
        epochs: passes over questions and text, if the time suffices.
        batch_tokens: most tokens in a batch, padding counted.
        window: tokens of a stretch of text.
        seed: of start and order.
    """

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    epochs: int = 3
    batch_tokens: int = 1024
    window: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        steps: batches learned.
        planned: batches that all epochs have.
        seconds: it took.
        parameters: of the adapter.
        loss: mean over the last tenth of the steps.
    """

    steps: int
    planned: int
    seconds: float
    parameters: int
    loss: float


Example = tuple[list[int], list[int]]
"""Token ids, and labels of the same length."""


def examples_of(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    questions: Sequence[Question],
    window: int,
) -> list[Example]:
    """Text to go on with, and questions of which only the answer is learned."""
    out: list[Example] = []
    for ids in tokenize(documents, tokenizer):
        pieces = [ids[first : first + window].tolist() for first in range(0, len(ids), window)]
        out += [(piece, piece) for piece in pieces if len(piece) > 1]
    for question in questions:
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": question.text}])
        answer = answer_ids(tokenizer, question.answer)
        out.append(([*prompt, *answer], [IGNORED] * len(prompt) + answer))
    return out


@dataclass(frozen=True)
class FineTuned:
    """A base model with its adapter in it.

    Attributes:
        settings: of the training, the adapter's checksum among them.
        seconds: the training took.
        num_bytes: of the adapter on the disk.
    """

    settings: dict[str, Any]
    seconds: float
    num_bytes: int


def fine_tuned(
    base: Any,  # noqa: ANN401  torch types submodules as tensors or modules
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    questions: Sequence[Question],
    settings: LoraSettings,
    folder: Path,
    *,
    budget_seconds: float,
    on_progress: OnProgress = ignore_progress,
) -> FineTuned:
    """Train an adapter, or take the one in `folder`, and merge it into `base`, in place.

    Args:
        base: a causal language model of its own, which is changed.
        tokenizer: its own.
        corpus: the text to learn.
        questions: the questions to learn.
        settings: how.
        folder: where the adapter is kept.
        budget_seconds: the training ends here even if epochs are left.
        on_progress: called after every step.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    peft = import_peft()
    asked = asdict(settings) | {
        "corpus": corpus.fingerprint[:16],
        "questions": stage_key([[q.text, q.answer] for q in questions])[:16],
        "budget_seconds": budget_seconds,
    }
    note = folder / "training.json"
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if found.get("asked") == asked:
        peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    else:
        examples = examples_of(tokenizer, corpus.documents, questions, settings.window)
        model = adapted(base, settings)
        trained = train_lora(
            model, examples, settings, budget_seconds=budget_seconds, on_progress=on_progress
        )
        note.unlink(missing_ok=True)
        model.save_pretrained(str(folder))
        model.merge_and_unload()
        found = {"asked": asked, "trained": asdict(trained)}
        write_json(note, found)
    base.requires_grad_(False)
    base.eval()
    weights = folder / WEIGHTS
    told = asked | found["trained"] | {"adapter": sha256(weights)[:16]}
    return FineTuned(told, float(found["trained"]["seconds"]), weights.stat().st_size)


def train_lora(
    model: Any,  # noqa: ANN401  peft's own
    examples: Sequence[Example],
    settings: LoraSettings,
    *,
    budget_seconds: float,
    on_progress: OnProgress = ignore_progress,
) -> Trained:
    """Train the adapter of a model.

    Args:
        model: from `adapted`.
        examples: from `examples_of`.
        settings: how.
        budget_seconds: the training ends here even if epochs are left, but not before the first
            step; the rate falls with whichever of both is nearer its end.
        on_progress: called after every step.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    batches = list(_batches(examples, settings))
    started, losses = time.perf_counter(), []
    model.train()
    for step, batch in enumerate(batches):
        spent = time.perf_counter() - started
        elapsed = spent / budget_seconds if budget_seconds > 0 else 1.0
        if elapsed >= 1 and step:
            break
        warm = min(1.0, (step + 1) / (WARM_UP * len(batches) + 1))
        left = max(0.0, 1 - max(step / len(batches), elapsed))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * left
        losses.append(_step(model, optimizer, weights, [examples[n] for n in batch]))
        on_progress(ProgressEvent("train lora", step + 1, len(batches), "steps"))
    return Trained(
        steps=len(losses),
        planned=len(batches),
        seconds=time.perf_counter() - started,
        parameters=sum(p.numel() for p in weights),
        loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
    )


def adapted(base: Any, settings: LoraSettings) -> Any:  # noqa: ANN401  peft's own
    """The model with a new adapter on all its linear layers; at first it changes nothing."""
    peft = import_peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return peft.get_peft_model(base, config)


def import_peft() -> Any:  # noqa: ANN401
    """The package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "the arm 'lora' needs peft; run: pip install 'mlpmem-rag[lora]'"
        ) from error
    return peft


def _step(
    model: Any,  # noqa: ANN401  peft's own
    optimizer: torch.optim.Optimizer,
    weights: Sequence[torch.nn.Parameter],
    batch: Sequence[Example],
) -> float:
    ids, mask, labels = _padded(batch)
    device = model.device
    loss = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
    ).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    return float(loss.detach())


def _batches(examples: Sequence[Example], settings: LoraSettings) -> Iterator[list[int]]:
    """Numbers of examples of like length, in random order, epoch by epoch."""
    generator = np.random.default_rng(settings.seed)
    for _ in range(settings.epochs):
        order = generator.permutation(len(examples)).tolist()
        order.sort(key=lambda n: len(examples[n][0]))  # stable: random among equals
        groups: list[list[int]] = []
        for number in order:
            length = len(examples[number][0])
            if not groups or length * (len(groups[-1]) + 1) > settings.batch_tokens:
                groups.append([])
            groups[-1].append(number)
        for place in generator.permutation(len(groups)):
            yield groups[place]


def _padded(batch: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask and labels. *Shapes:* (B, T) each."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for line, (tokens, targets) in enumerate(batch):
        ids[line, : len(tokens)] = torch.tensor(tokens)
        labels[line, : len(tokens)] = torch.tensor(targets)
        mask[line, : len(tokens)] = 1
    return ids, mask, labels
