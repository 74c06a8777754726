"""The kNN datastore: for every corpus token, the hidden state that came before it.

On disk: float16 keys in shards of `SHARD_ROWS` rows, next tokens and provenance beside them, all
plain `.npy`, memory-mapped. Rows have their place before any is computed, so batches may be
written in any order and an interrupted build goes on after the last 32 that it noted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.behind import behind
from mlpmem_rag.errors import ArtifactError, BaseModelError, CorpusError
from mlpmem_rag.notes import Notes
from mlpmem_rag.processes import ALONE, Team
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.storage import allocate_array, save_array
from mlpmem_rag.windows import Window

SHARD_ROWS = 1 << 18
BATCH_TOKENS = 4096
MAX_PADDING = 1 / 16
"""Share of a batch."""
STATE = "datastore.json"


@dataclass(frozen=True)
class Datastore:
    """An opened datastore of N rows with keys of width D.

    Attributes:
        key_shards: memory-mapped float16 arrays, together *shape* (N, D).
        next_tokens: the token that followed. *Shape:* (N,).
        documents: index of the document each row comes from. *Shape:* (N,).
        positions: position of the next token in its document. *Shape:* (N,).
    """

    key_shards: tuple[npt.NDArray[np.float16], ...]
    next_tokens: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.next_tokens)

    @property
    def key_size(self) -> int:
        """D."""
        return int(self.key_shards[0].shape[1])

    def keys(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Keys of the given rows. *Shape:* (R,) -> (R, D)."""
        out = np.empty((len(rows), self.key_size), dtype=np.float32)
        self._read(rows, out)
        return out

    def stored_keys(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Keys of the given rows as they are on the disk. *Shape:* (R,) -> (R, D)."""
        out = np.empty((len(rows), self.key_size), dtype=np.float16)
        self._read(rows, out)
        return out

    def _read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.floating]) -> None:
        shard_of = rows // SHARD_ROWS
        numbers = np.unique(shard_of)
        for number in numbers:
            here = shard_of == number if len(numbers) > 1 else slice(None)
            mine = rows[here] - number * SHARD_ROWS
            in_a_row = bool((np.diff(mine) == 1).all())  # read without a copy between
            where = slice(mine[0], mine[-1] + 1) if in_a_row else mine
            out[here] = self.key_shards[number][where]

    @classmethod
    def open(cls, folder: Path) -> Datastore:
        """Map a finished datastore into memory.

        Raises:
            ArtifactError: the folder holds no finished datastore.
        """
        state = read_state(folder)
        if state is None or state["batches_done"] != state["batches"]:
            raise ArtifactError(f"{folder} holds no finished datastore; run the training again")
        shards = tuple(np.load(path, mmap_mode="r") for path in _shard_paths(folder, state["rows"]))
        return cls(
            shards,
            np.load(folder / "next_tokens.npy", mmap_mode="r"),
            np.load(folder / "documents.npy", mmap_mode="r"),
            np.load(folder / "positions.npy", mmap_mode="r"),
        )


def build_datastore(
    backbone: Backbone,
    windows: Sequence[Window],
    folder: Path,
    *,
    team: Team = ALONE,
    on_progress: OnProgress = ignore_progress,
) -> Datastore:
    """Run the base model over all windows and store one row per target token.

    An interrupted build of the same windows goes on where it stopped. The processes of a team take
    batches by turns and write into the same files, so that these are those of one process.

    Raises:
        BaseModelError: a hidden state does not fit into float16.
        CorpusError: there are no windows.
    """
    if not windows:
        raise CorpusError("no document has two tokens or more; give documents with text")
    folder.mkdir(parents=True, exist_ok=True)
    batches = list(length_buckets(windows))
    first_rows = np.concatenate([[0], np.cumsum([w.num_rows for w in windows])])
    rows = int(first_rows[-1])
    expected = {
        "rows": rows,
        "key_size": backbone.hidden_size,
        "batches": len(batches),
        "content": _fingerprint(backbone, windows),
    }
    notes = Notes(folder / STATE, expected, team)
    notes.begin(partial(_allocate, folder, windows, rows, backbone.hidden_size))
    mine, done = notes.mine(batches)
    shards = [np.load(path, mmap_mode="r+") for path in _shard_paths(folder, rows)]
    counted = [sum(windows[w].num_rows for w in batch) for batch in mine]
    own_rows, total = sum(counted[:done]), sum(counted)
    on_progress(ProgressEvent("datastore", own_rows if mine else rows, total or rows, "tokens"))
    written = write_keys(backbone, windows, mine[done:], first_rows, shards)
    for number, _ in enumerate(written, start=done):
        own_rows += counted[number]
        notes.take(number + 1, shards)
        on_progress(ProgressEvent("datastore", own_rows, total, "tokens"))
    notes.finish(shards)
    return Datastore.open(folder)


def write_keys(
    backbone: Backbone,
    windows: Sequence[Window],
    batches: Iterable[list[int]],
    first_rows: npt.NDArray[np.int64],
    shards: Sequence[npt.NDArray[np.float16]],
) -> Iterator[list[int]]:
    """Compute the keys of each batch and put them in their place; yields the batches written.

    A thread writes one batch while the base model runs on the next.

    Raises:
        BaseModelError: a hidden state does not fit into float16.
    """

    def write(batch: list[int], arriving: Callable[[], Tensor]) -> list[int]:
        hidden = arriving().numpy()
        for w, states in zip(batch, hidden, strict=True):
            last = len(windows[w].token_ids) - 1  # its hidden state predicts nothing stored here
            keys = finite(states[windows[w].context - 1 : last])
            _write_rows(shards, int(first_rows[w]), keys)
        return batch

    def states(batch: list[int]) -> Tensor:
        return backbone.hidden(*pad([windows[w] for w in batch], backbone.device))

    yield from behind(partial(write, batch, on_host(states(batch))) for batch in batches)


def on_host(states: Tensor) -> Callable[[], Tensor]:
    """Convert to float16 and queue a copy to main memory; what is returned waits and gives it."""
    states = states.to(torch.float16)  # here: a second thread's parallel loops slow those of all
    if states.device.type != "cuda":
        return lambda: states
    copy = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
    copy.copy_(states, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(states.device))  # not of the current device

    def arrived() -> Tensor:
        copied.synchronize()
        return copy

    return arrived


def key_source(backbone: Backbone) -> str:
    """What any key depends on: base model, layer and number format."""
    return f"{backbone.reference} {backbone.layer} {backbone.model.dtype}"


def _fingerprint(backbone: Backbone, windows: Sequence[Window]) -> str:
    """What decides the keys: their source and every window."""
    digest = hashlib.sha256(key_source(backbone).encode())
    for window in windows:
        digest.update(f"{window.document} {window.start} {window.context} ".encode())
        digest.update(window.token_ids.tobytes())
    return digest.hexdigest()


def length_buckets(
    windows: Sequence[Window], max_tokens: int = BATCH_TOKENS
) -> Iterator[list[int]]:
    """Indices of windows of like length, longest first.

    A batch has at most `max_tokens` with its padding, and no more padding than `MAX_PADDING`.
    """
    lengths = [len(window.token_ids) for window in windows]
    batch: list[int] = []
    filled = 0
    for w in sorted(range(len(windows)), key=lengths.__getitem__, reverse=True):
        room = lengths[batch[0] if batch else w] * (len(batch) + 1)
        padding = room - filled - lengths[w]
        if batch and (room > max_tokens or padding > MAX_PADDING * room):
            yield batch
            batch, filled = [], 0
        batch.append(w)
        filled += lengths[w]
    if batch:
        yield batch


def pad(windows: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask. *Shapes:* (B, T), (B, T).

    With a causal model, padding on the right changes nothing on its left.
    """
    longest = max(len(window.token_ids) for window in windows)
    token_ids = torch.zeros(len(windows), longest, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    for line, window in enumerate(windows):
        length = len(window.token_ids)
        token_ids[line, :length] = torch.from_numpy(window.token_ids.astype(np.int64))
        mask[line, :length] = 1
    return token_ids.to(device), mask.to(device)


def to_float16(hidden: Tensor) -> npt.NDArray[np.float16]:
    """Hidden states as stored keys.

    Raises:
        BaseModelError: a value is not finite in float16.
    """
    return finite(hidden.to(torch.float16).cpu().numpy())


def finite(keys: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """The same keys.

    Raises:
        BaseModelError: a value is not finite.
    """
    if not np.isfinite(keys).all():
        raise BaseModelError(
            "a hidden state of this layer does not fit into float16, whose largest number is "
            "65,504; choose another layer with --layer"
        )
    return keys


def read_state(folder: Path) -> dict[str, Any] | None:
    """How far a datastore is; None when there is none."""
    path = folder / STATE
    return json.loads(path.read_text()) if path.is_file() else None


def _shard_paths(folder: Path, rows: int) -> list[Path]:
    return [folder / f"keys-{n:05d}.npy" for n in range(-(-rows // SHARD_ROWS))]


def _allocate(folder: Path, windows: Sequence[Window], rows: int, key_size: int) -> None:
    for number, path in enumerate(_shard_paths(folder, rows)):
        shape = (min(SHARD_ROWS, rows - number * SHARD_ROWS), key_size)
        allocate_array(path, np.float16, shape)
    targets = [w.token_ids[w.context :] for w in windows]
    save_array(folder / "next_tokens.npy", np.concatenate(targets))
    counts = [w.num_rows for w in windows]
    documents = np.repeat(np.array([w.document for w in windows], dtype=np.int32), counts)
    save_array(folder / "documents.npy", documents)
    positions = [w.start + np.arange(w.context, len(w.token_ids)) for w in windows]
    save_array(folder / "positions.npy", np.concatenate(positions).astype(np.int32))


def _write_rows(
    shards: Sequence[npt.NDArray[np.float16]], first: int, keys: npt.NDArray[np.float16]
) -> None:
    while len(keys):
        shard, offset = divmod(first, SHARD_ROWS)
        here = min(len(keys), SHARD_ROWS - offset)
        shards[shard][offset : offset + here] = keys[:here]
        first, keys = first + here, keys[here:]
