"""What a training run will need, before it starts."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlpmem_rag.adaptation import num_steps
from mlpmem_rag.backbone import Backbone, mlp_shape
from mlpmem_rag.cells import compared_rows, num_cells, search_bytes
from mlpmem_rag.contexts import BLOCK
from mlpmem_rag.datastore import BATCH_TOKENS
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.errors import ResourceError
from mlpmem_rag.index import STORED_BLOCK
from mlpmem_rag.late_interaction import TOKEN_SIZE
from mlpmem_rag.lessons import Batch, distillation_targets
from mlpmem_rag.memory import Memory, derive_config, new_memory
from mlpmem_rag.neighbors import QUERY_BATCH, exact_rows
from mlpmem_rag.recall import DRAFT_TOKENS, MAX_QUESTIONS
from mlpmem_rag.rules import PIECE, num_processes
from mlpmem_rag.schedule import long_enough
from mlpmem_rag.split import MAX_HELD_OUT_ROWS, MAX_STUDY_HELD_OUT_ROWS
from mlpmem_rag.targets import MAX_TOKENS
from mlpmem_rag.torch_index import key_factor, products, query_factor
from mlpmem_rag.windows import Window

QUESTIONS_PER_TOKEN = 1.1
"""That rules write from a token of English prose."""
QUESTION_ROWS = 5
"""Along the answer of such a question."""
QUESTION_TOKENS = 32
"""Of such a question and its answer, without the prompts' common beginning."""
SENTENCE_TOKENS = 25
"""Of a sentence that questions are written from (SQuAD 2.0's half development set: 32)."""
TEXT_BYTES = 16
"""Of a token's text, twice: documents as they were read, and ids in the windows."""
WINDOW_BYTES = 256
"""Of a window beside its token ids."""
QUESTION_BYTES = 1200
"""Of a written question, its answer and its source, twice: as written and as read again."""
PARSER_BYTES = 300 * 2**20
"""Of each process that writes questions beside others."""
CHARACTERS = 5
"""Of a token, about."""
WRITING_SECONDS = 6e-4
"""Of a token, in one process."""
PROMPT_BYTES = 700
"""Of a question's prompt and answer in token ids, while the base model runs over them."""
CONTEXT_BYTES = 8
"""Of a token: its share of a context's vector, and which one that is, apart from its width."""
ADAPTED_STATES = 15
"""Times its weights that a query encoder needs to be trained: a copy, gradients, two moments, and
most of it, the inner states of a step (MiniLM on the sample corpus: 14)."""
DRAFT_BYTES = 4 * DRAFT_TOKENS
"""Of a question that may be recalled: how its answer begins."""
WORD_BYTES = 20 * TOKEN_SIZE
"""Of a question that may be recalled: its tokens and its share of a sentence's, 15 in prose."""
STEP_TOKENS = 1000
"""Tokens that the base model reads in the time of one of the encoder's training steps, about."""
DISTANCE_BYTES = 130
"""Of a row: its nearest distances, while their mean is taken."""
ORDER_BYTES = 24
"""Of a row that is learned: its number, and its place in an epoch's order."""
SCORED_BYTES = 16
"""Of a number in the base model's output, while it is scored beside the memory's."""
DATASTORE_BATCHES = 6
"""Times the inner states of one MLP that a forward pass holds at once."""
TARGET_SECONDS = 1e-4
"""Of a row, in one thread."""
GPU_COMPARED = 1 << 16
RUNTIME_BYTES = 700 * 2**20
"""What Python, torch, FAISS, spaCy and their libraries take with hardly any data."""


@dataclass(frozen=True)
class Plan:
    """Needs of a run. Times are projected from short measurements on this machine.

    Attributes:
        documents: number of documents.
        tokens: tokens in all documents.
        computed_tokens: tokens the base model runs over, window overlaps included.
        rows: datastore rows.
        vocabulary: distinct tokens the memory can predict.
        memory_parameters: size of the memory.
        disk_bytes: largest size of the output folder during the run.
        memory_bytes: largest amount of main memory.
        keys_in_memory: whether the neighbour search holds all keys there.
        writing_processes: that write questions by rules.
        free_disk_bytes: what the output's disk has free.
        seconds: projected time of each stage.
        max_memory: bytes of main memory that it may take; None: as many as there are.
    """

    documents: int
    tokens: int
    computed_tokens: int
    rows: int
    vocabulary: int
    memory_parameters: int
    disk_bytes: int
    memory_bytes: int
    keys_in_memory: bool
    writing_processes: int
    free_disk_bytes: int
    seconds: dict[str, float]
    max_memory: int | None = None

    def check(self) -> None:
        """Refuse a run that the disk, or the memory it may take, cannot hold.

        Raises:
            ResourceError: more is needed than is free or allowed.
        """
        if self.max_memory is not None and self.memory_bytes > self.max_memory:
            raise ResourceError(
                f"the run needs {self.memory_bytes / 2**30:.2f} GiB of memory, "
                f"{self.max_memory / 2**30:.2f} GiB are allowed; allow more, or choose a smaller "
                "base model, --size small, or fewer --neighbors"
            )
        if self.disk_bytes > self.free_disk_bytes:
            raise ResourceError(
                f"the run needs {self.disk_bytes / 2**30:.2f} GiB of disk, "
                f"{self.free_disk_bytes / 2**30:.2f} GiB are free; free some, choose another "
                "--out, or lower --neighbors"
            )


def make_plan(
    backbone: Backbone,
    windows: Sequence[Window],
    out: Path,
    *,
    size: str,
    k: int,
    held_out: float,
    distill: DistillConfig,
    query_size: int = 0,
    studies: bool = False,
    by_rules: bool = False,
    encoder_parameters: int = 0,
    max_memory: int | None = None,
) -> Plan:
    """Count what a run needs and measure how fast this machine does its parts (seconds).

    Args:
        backbone: the base model.
        windows: of the corpus.
        out: where the memory is to be.
        size: of the memory.
        k: neighbours of a row.
        held_out: share of the rows in each of the two held-out parts.
        distill: how it is trained.
        query_size: Q, width of the query vectors; 0: there are none.
        studies: whether questions are learned as well; how many there will be is an estimate.
        by_rules: whether rules write them.
        encoder_parameters: of a query encoder that reads the corpus first.
        max_memory: bytes of main memory; where these are few, the neighbour search reads keys from
            the disk rather than hold them.
    """
    rows = sum(window.num_rows for window in windows)
    tokens = np.unique(np.concatenate([window.token_ids[window.context :] for window in windows]))
    shape = mlp_shape(backbone.model, backbone.layer)
    config = derive_config(shape, backbone.num_layers, len(tokens), size, query_size=query_size)
    written = round(QUESTIONS_PER_TOKEN * rows) if studies else 0
    taught = min(written, MAX_QUESTIONS)
    memory = new_memory(config, torch.from_numpy(tokens.astype(np.int64)), None, seed=0)
    parameters = sum(p.numel() for p in memory.parameters())
    width = backbone.hidden_size
    k = min(k, rows - 1)
    base_bytes = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    computed = sum(len(window.token_ids) for window in windows)
    searched = searched_rows(rows, held_out, studies=studies)
    exact = searched <= exact_rows(width, backbone.device)
    stages = {
        "datastore": DATASTORE_BATCHES * BATCH_TOKENS * shape.intermediate_size * 4,
        "neighbors": search_memory(rows, width, k, exact=exact) + 8 * rows,
        "targets": DISTANCE_BYTES * rows,
        "scores": max(w.num_rows for w in windows) * backbone.reference.vocab_size * SCORED_BYTES,
        "questions": QUESTION_BYTES * written,
        **learning_memory(rows, taught, query_size, parameters),
    }
    if encoder_parameters:
        stages["encoder"] = ADAPTED_STATES * encoder_parameters * 4
    constant = RUNTIME_BYTES + base_bytes + 4 * encoder_parameters + text_memory(windows)
    room = math.inf if max_memory is None else max_memory - constant - stages["questions"]
    processes = _writing_processes(rows, room) if by_rules else 1
    stages["questions"] += PARSER_BYTES * processes if processes > 1 else 0
    needed = constant + max(stages.values())
    held = 4 * width * searched if exact and backbone.device.type == "cpu" else 0
    in_memory = max_memory is None or needed + held <= max_memory
    return Plan(
        documents=len({window.document for window in windows}),
        tokens=rows + len({window.document for window in windows}),
        computed_tokens=computed,
        rows=rows,
        vocabulary=len(tokens),
        memory_parameters=parameters,
        disk_bytes=(
            rows * (2 * width + 12)  # keys and provenance
            + rows * 8 * k  # neighbours
            + rows * 6 * min(MAX_TOKENS, k)  # targets
            + (0 if exact else searched * 2 * width)  # keys in the cells' order
            + taught * QUESTION_ROWS * (2 * width + 8)
            + vector_bytes(rows, taught, query_size)
            + (context_bytes(rows, query_size) if studies else 0)
            + 2 * 2 * encoder_parameters  # in half precision, with the memory as well
            + (22 * query_size + 6 * DRAFT_BYTES) * taught  # with a memory
            # Words, in `work/` and with a memory, and the vectors that come with them.
            + (2 * WORD_BYTES * taught + 6 * query_size * taught if encoder_parameters else 0)
            + 4 * parameters * 10  # best weights of both trainings, one's checkpoints, the memory
        ),
        memory_bytes=needed + (held if in_memory else 0),
        keys_in_memory=in_memory,
        writing_processes=processes,
        free_disk_bytes=shutil.disk_usage(_existing(out)).free,
        seconds=_project(
            backbone,
            memory,
            rows,
            searched,
            taught,
            computed,
            held_out,
            distill,
            writing=rows * WRITING_SECONDS / processes if by_rules else 0.0,
        ),
        max_memory=max_memory,
    )


def text_memory(windows: Sequence[Window]) -> int:
    """Bytes of documents and windows, which are there during the whole run."""
    return sum(TEXT_BYTES * window.num_rows + WINDOW_BYTES for window in windows)


def learning_memory(rows: int, questions: int, query_size: int, parameters: int) -> dict[str, int]:
    """Bytes of the stages that have questions to learn, or would have.

    While the memory learns there are at once: weights, gradients, moments and the best weights; the
    order of the rows; and the questions with their vectors, of which keys are made.
    """
    vectors = vector_bytes(rows, questions, query_size)
    keys = 4 * query_size * questions
    study_rows = QUESTION_ROWS * questions
    taught = QUESTION_BYTES * questions + vectors + 8 * study_rows
    taught += context_bytes(rows, query_size) if questions else 0
    return {
        "study": taught + PROMPT_BYTES * questions + vectors,
        "distil": taught
        + 2 * keys  # and those that the memory holds
        + (DRAFT_BYTES + 3 * WORD_BYTES) * questions
        + 4 * parameters * 6
        + ORDER_BYTES * (rows + study_rows),
    }


def vector_bytes(rows: int, questions: int, query_size: int) -> int:
    """Of the query vectors of questions and of the sentences that they were written from."""
    return 4 * query_size * (questions + min(questions, rows // SENTENCE_TOKENS))


def context_bytes(rows: int, query_size: int) -> int:
    """Of the vectors of the text before each stretch of the corpus."""
    return rows * (CONTEXT_BYTES + 4 * query_size // BLOCK)


def searched_rows(rows: int, held_out: float, *, studies: bool) -> int:
    """Rows that may be neighbours: those that are not held out."""
    most = MAX_STUDY_HELD_OUT_ROWS if studies else MAX_HELD_OUT_ROWS
    return rows - 2 * min(int(held_out * rows), most)


def search_memory(rows: int, width: int, k: int, *, exact: bool) -> int:
    """Bytes that the neighbour search takes beside keys that it may hold."""
    if not exact:
        return search_bytes(rows, width)
    return QUERY_BATCH * k * 64 + STORED_BLOCK * width * 8


def _writing_processes(rows: int, room: float) -> int:
    """As many as suit the corpus and have room in so many bytes, one at least."""
    processes = num_processes(math.ceil(CHARACTERS * rows / PIECE))
    return max(1, int(min(processes, room / PARSER_BYTES)))


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _project(
    backbone: Backbone,
    memory: Memory,
    rows: int,
    searched: int,
    taught: int,
    computed: int,
    held_out: float,
    distill: DistillConfig,
    *,
    writing: float,
) -> dict[str, float]:
    forward = _forward_seconds(backbone) / BATCH_TOKENS
    step = _step_seconds(memory, backbone.device, distill)
    exact = searched <= exact_rows(backbone.hidden_size, backbone.device)
    compared = searched if exact else num_cells(searched) + compared_rows(searched)
    epochs_rows = distill.epochs * rows * ((1 - 2 * held_out) + (1 if held_out else 0))
    if taught:
        questions = {
            **({"questions": writing} if writing else {}),
            "encoder": STEP_TOKENS * num_steps(taught) * forward,
            "study": QUESTION_TOKENS * taught * forward,
        }
        rows_in_all = rows + QUESTION_ROWS * taught
        epochs_rows = long_enough(distill, rows_in_all, alike=False).epochs * rows_in_all
    return {
        "datastore": computed * forward,
        "neighbors": rows * compared * _compare_seconds(backbone.hidden_size, backbone.device),
        "targets": rows * TARGET_SECONDS,
        "base scores": 2 * held_out * computed * forward * 3,  # with the output head
        **(questions if taught else {}),
        "distil": epochs_rows / distill.batch_rows * step,
    }


def _best_of(runs: int, work: Callable[[], object], device: torch.device) -> float:
    work()  # warm-up
    seconds = []
    for _ in range(runs):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(device: torch.device) -> None:
    """For what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forward_seconds(backbone: Backbone) -> float:
    """Seconds for a full batch of the datastore stage."""
    length = min(256, backbone.context_window)
    ids = torch.zeros(2, length, dtype=torch.long, device=backbone.device)
    mask = torch.ones_like(ids)
    took = _best_of(1, lambda: backbone.hidden(ids, mask), backbone.device)
    return took * BATCH_TOKENS / ids.numel()


def _compare_seconds(width: int, device: torch.device) -> float:
    """Seconds for one distance between two keys, in a large product, and for selecting."""
    if device.type == "cuda":
        keys = torch.zeros(GPU_COMPARED, width, device=device)
        factor, asked = key_factor(keys), query_factor(keys[:QUERY_BATCH])
        took = _best_of(2, lambda: products(asked, factor.keys).amin(1), device)
        return took / (len(asked) * len(keys))
    keys = torch.zeros(2048, width)
    # Selecting the nearest costs about as much again as the products.
    return 2 * _best_of(2, lambda: keys @ keys.T, device) / 2048**2


def _step_seconds(memory: Memory, device: torch.device, config: DistillConfig) -> float:
    """Seconds for one training step, optimiser included."""
    memory = memory.to(device)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.0, fused=True)
    keys = torch.randn(config.batch_rows, memory.config.hidden_size, device=device)
    columns = torch.zeros(config.batch_rows, MAX_TOKENS, dtype=torch.long, device=device)
    probs = torch.full(columns.shape, 1 / MAX_TOKENS, device=device)

    batch = Batch(keys, None, distillation_targets(columns, probs, columns[:, 0], 0.4))

    def step() -> None:
        batch.loss(memory).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _best_of(2, step, device)
