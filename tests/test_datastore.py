"""The datastore: every row's key, token and place, however the work was cut up."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlpmem_rag import datastore as module
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.datastore import (
    MAX_PADDING,
    Datastore,
    build_datastore,
    length_buckets,
    on_host,
    write_keys,
)
from mlpmem_rag.errors import ArtifactError, BaseModelError
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.windows import TokenArray, Window, make_windows, tokenize

LENGTH, STRIDE = 16, 8


@pytest.fixture(scope="module")
def token_ids(tiny_documents: list[Document], tiny_backbone: Backbone) -> list[TokenArray]:
    return tokenize(tiny_documents, tiny_backbone.tokenizer)


@pytest.fixture(scope="module")
def windows(token_ids: list[TokenArray]) -> list[Window]:
    return make_windows(token_ids, length=LENGTH, stride=STRIDE)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a batch, so that there are more batches than between two notes of the state."""
    small = functools.partial(length_buckets, max_tokens=2 * LENGTH)
    monkeypatch.setattr(module, "length_buckets", small)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_equal_an_independent_walk(
    tmp_path: Path,
    tiny_backbone: Backbone,
    token_ids: list[TokenArray],
    windows: list[Window],
) -> None:
    store = build_datastore(tiny_backbone, windows, tmp_path)
    walk = [(n, p) for n, ids in enumerate(token_ids) for p in range(1, len(ids))]
    assert list(zip(store.documents.tolist(), store.positions.tolist(), strict=True)) == walk
    assert store.next_tokens.tolist() == [token_ids[n][p] for n, p in walk]
    assert (store.num_rows, store.key_size) == (len(walk), 32)

    @functools.cache
    def alone(document: int, start: int) -> npt.NDArray[np.float16]:
        stretch = token_ids[document][start : start + LENGTH]
        ids = torch.from_numpy(stretch.astype(np.int64))[None]
        hidden: npt.NDArray[np.float16] = (
            tiny_backbone.hidden(ids, torch.ones_like(ids))[0].half().numpy()
        )
        return hidden

    for (n, p), key in zip(walk, store.keys(np.arange(len(walk))), strict=True):
        # Position p is predicted in the first window that reaches it.
        start = max(0, -(-(p + 1 - LENGTH) // STRIDE) * STRIDE)
        # Batching may change one unit in the last place.
        np.testing.assert_allclose(key, alone(n, start)[p - 1 - start], rtol=1e-3, atol=1e-5)


def test_shards_hold_the_same_as_one_file(
    tmp_path: Path,
    tiny_backbone: Backbone,
    windows: list[Window],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = build_datastore(tiny_backbone, windows, tmp_path / "whole")
    rows = np.random.default_rng(0).permutation(whole.num_rows)
    expected = whole.keys(rows)
    monkeypatch.setattr(module, "SHARD_ROWS", 100)
    parts = build_datastore(tiny_backbone, windows, tmp_path / "parts")
    assert [len(shard) for shard in parts.key_shards[:-1]] == [100] * (whole.num_rows // 100)
    np.testing.assert_array_equal(parts.keys(rows), expected)
    np.testing.assert_array_equal(parts.next_tokens, whole.next_tokens)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("stop", [10, 40])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, tiny_backbone: Backbone, windows: list[Window], stop: int
) -> None:
    events: list[ProgressEvent] = []
    build_datastore(tiny_backbone, windows, tmp_path / "once", on_progress=events.append)
    assert len(events) > 65, "the state must be noted twice on the way"

    def interrupt(event: ProgressEvent) -> None:
        if event.done >= events[stop].done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_datastore(tiny_backbone, windows, tmp_path / "twice", on_progress=interrupt)
    with pytest.raises(ArtifactError, match="no finished datastore"):
        Datastore.open(tmp_path / "twice")
    resumed: list[ProgressEvent] = []
    build_datastore(tiny_backbone, windows, tmp_path / "twice", on_progress=resumed.append)

    assert resumed == events[32 * (stop // 32) :]
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_other_windows_are_built_afresh(
    tmp_path: Path, tiny_backbone: Backbone, windows: list[Window]
) -> None:
    build_datastore(tiny_backbone, windows[:5], tmp_path / "reused")
    build_datastore(tiny_backbone, windows, tmp_path / "reused")
    build_datastore(tiny_backbone, windows, tmp_path / "new")
    assert contents(tmp_path / "reused") == contents(tmp_path / "new")


def test_a_state_too_large_for_float16_is_refused(
    tmp_path: Path, tiny_backbone: Backbone, windows: list[Window]
) -> None:
    model = copy.deepcopy(tiny_backbone.model)
    model.model.layers[tiny_backbone.layer].post_attention_layernorm.weight.mul_(1e6)
    broken = dataclasses.replace(tiny_backbone, model=model)
    with pytest.raises(BaseModelError, match=r"does not fit into float16.*--layer"):
        build_datastore(broken, windows, tmp_path)


def test_batches_hold_every_window_once_within_the_limit(windows: list[Window]) -> None:
    batches = list(length_buckets(windows, max_tokens=50))
    assert sorted(w for batch in batches for w in batch) == list(range(len(windows)))
    assert all(len(b) * max(len(windows[w].token_ids) for w in b) <= 50 for b in batches)
    assert len(batches) < len(windows)


def test_batches_are_hardly_padded(tiny_backbone: Backbone, token_ids: list[TokenArray]) -> None:
    windows = make_windows(token_ids, length=96, stride=48)
    lengths = [len(window.token_ids) for window in windows]
    assert len(set(lengths)) > 3
    for batch in length_buckets(windows):
        room = len(batch) * max(lengths[w] for w in batch)
        assert room - sum(lengths[w] for w in batch) <= MAX_PADDING * room


def test_one_batch_is_written_while_the_next_is_computed(
    tiny_backbone: Backbone, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    second_computed = threading.Event()
    hidden, passes = tiny_backbone.hidden, itertools.count(1)

    def computed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = hidden(ids, mask)
        if next(passes) == 2:
            second_computed.set()
        return out

    def written(shards: object, first: int, keys: object) -> None:
        assert second_computed.wait(timeout=20), "the second batch waits for the first's rows"

    monkeypatch.setattr(Backbone, "hidden", lambda _, ids, mask: computed(ids, mask))
    monkeypatch.setattr(module, "_write_rows", written)
    batches = [[0], [1], [2]]
    assert list(write_keys(tiny_backbone, windows, batches, np.arange(4), [])) == batches


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished datastore"):
        Datastore.open(tmp_path)


class OnGPU:
    """Stands in for a tensor on the second of two GPUs, and for its copy in pinned memory."""

    device = torch.device("cuda:1")
    shape, dtype = (2, 3), torch.float16

    def __init__(self, *_: object, **__: object) -> None:
        self.copied = False

    def to(self, dtype: torch.dtype) -> OnGPU:
        assert dtype == torch.float16
        return self

    def copy_(self, states: OnGPU, *, non_blocking: bool) -> None:
        assert non_blocking
        self.copied = True


def test_the_copy_is_waited_for_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event of the current device, which may be another, says nothing of the copy."""
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = "of the current device") -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            recorded.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    monkeypatch.setattr(torch, "empty", OnGPU)
    arriving = on_host(OnGPU())  # type: ignore[arg-type]
    assert recorded == ["of cuda:1"]
    assert arriving().copied  # type: ignore[attr-defined]
    assert recorded == ["of cuda:1", "waited"]
