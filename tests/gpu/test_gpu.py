"""Every stage on a GPU beside the same on the CPU; passed over where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import load_backbone
from mlpmem_rag.cells import PROBES, num_cells
from mlpmem_rag.config import TrainConfig
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.cross_entropy import SparseTargets, cross_entropy
from mlpmem_rag.datastore import Datastore, build_datastore, on_host
from mlpmem_rag.distill import DistillConfig, Lesson, distill
from mlpmem_rag.index import CPU
from mlpmem_rag.lessons import Columns, TextLesson
from mlpmem_rag.memory import Memory, MemoryConfig, new_memory
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import attach_memory
from mlpmem_rag.nearest import GROUP, grouped_smallest, smallest
from mlpmem_rag.neighbors import find_neighbors
from mlpmem_rag.pipeline import train
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.targets import build_targets
from mlpmem_rag.torch_index import TorchIndex
from mlpmem_rag.windows import make_windows, tokenize

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

Make = Callable[..., Datastore]


def around_centres(rows: int, width: int) -> npt.NDArray[np.float32]:
    """Rows around sixty centres, away from the origin."""
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=4, size=(60, width))
    keys = 9 + centres[rng.integers(60, size=rows)] + rng.normal(size=(rows, width))
    return keys.astype(np.float16).astype(np.float32)


def test_states_arrive_as_they_were_computed() -> None:
    """From the last GPU, whose stream is not the current one where there are several."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    weights = torch.randn(2048, 2048, device=last) / 45
    for seed in range(8):
        generator = torch.Generator(last).manual_seed(seed)
        states = torch.randn(2048, 2048, device=last, generator=generator)
        for _ in range(20):  # long enough for a copy that does not wait to be seen
            states = states @ weights
        arriving = on_host(states)
        assert torch.equal(arriving(), states.half().cpu())


def test_a_datastore_is_near_that_of_the_cpu(
    tmp_path: Path, tiny_folder: Path, tiny_documents: list[Document]
) -> None:
    stores = []
    for device in ("cpu", str(GPU)):
        backbone = load_backbone(str(tiny_folder), device=device, dtype="float32")
        ids = tokenize(tiny_documents, backbone.tokenizer)
        windows = make_windows(ids, length=48, stride=24)
        stores.append(build_datastore(backbone, windows, tmp_path / device))
    rows = np.arange(stores[0].num_rows)
    np.testing.assert_allclose(stores[1].keys(rows), stores[0].keys(rows), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("columns", [4 * GROUP, 20 * GROUP + 7])
def test_the_smallest_are_those_of_a_sort(k: int, columns: int) -> None:
    numbers = torch.randn(9, columns, device=GPU)
    for find in (smallest, grouped_smallest):
        values, places = find(numbers, k)
        assert torch.equal(values, numbers.sort(1).values[:, :k])
        assert torch.equal(numbers.gather(1, places), values)


@pytest.mark.parametrize("k", [1, 64, 700])
def test_exact_search_is_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpmem_rag.torch_index.COLUMNS", 2500)
    keys = around_centres(6000, 48) - 9
    index = TorchIndex(GPU)
    for part in np.array_split(keys, 3):
        index.add(part)
    distances, found = index.search(keys[::30], k)
    brute = ((keys[::30, None].astype(np.float64) - keys) ** 2).sum(2)
    np.testing.assert_allclose(distances, np.sort(brute, 1)[:, :k], rtol=1e-4, atol=1e-4)
    here = np.take_along_axis(brute, found, 1)
    np.testing.assert_allclose(here, distances, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flat_max_rows", [None, 1], ids=["exact", "by cells"])
def test_neighbours_are_those_of_the_cpu(
    flat_max_rows: int | None, tmp_path: Path, datastore_of: Make
) -> None:
    store, rows = datastore_of(around_centres(2000, 32)), np.arange(2000)
    assert num_cells(2000) < PROBES, "all cells are looked into"
    found = find_neighbors(
        store, rows, tmp_path / "gpu", k=20, flat_max_rows=flat_max_rows, device=GPU
    )
    expected = find_neighbors(store, rows, tmp_path / "cpu", k=20)
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-3, atol=1e-2)
    assert np.mean(found.ids == expected.ids) > 0.99  # but for ties
    tokens = (rows % 7).astype(np.int32)
    votes = [
        build_targets(expected, tokens, tmp_path / f"votes-{device}", tau=9.0, device=device).probs
        for device in (GPU, CPU)
    ]
    np.testing.assert_allclose(votes[0], votes[1], rtol=2e-3, atol=1e-6)


def test_a_request_is_taken_for_the_same_question_as_on_a_cpu() -> None:
    random = torch.Generator().manual_seed(0)
    memory = Memory(
        MemoryConfig(8, 8, 1, "silu", True, 4, query_size=24, num_questions=500, recalls=True)
    )
    memory.questions.copy_(torch.randn(500, 24, generator=random))
    asked = F.normalize(torch.randn(40, 24, generator=random), dim=1)
    expected = memory.recall(asked)
    torch.testing.assert_close(memory.to(GPU).recall(asked.to(GPU)).cpu(), expected)


def test_cross_entropy_and_its_gradients_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(GPU)

    states, head = made(37, 8).requires_grad_(), made(23, 8).requires_grad_()
    columns = torch.randint(23, (37, 5), generator=generator).to(GPU)
    targets = SparseTargets(columns, made(37, 5).abs(), made(37).abs(), made(37))
    dense = (targets.spread[:, None] / 23).expand(-1, 23).scatter_add(1, columns, targets.weights)
    expected = F.cross_entropy(states.double() @ head.double().T, dense.double())
    expected = expected - targets.least.mean()
    found = cross_entropy(states, head, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found, [states, head]),
        torch.autograd.grad(expected, [states, head]),
        rtol=1e-3,
        atol=1e-5,
    )


def lesson_of(store: Datastore, folder: Path) -> Callable[[Memory], Lesson]:
    """The votes of a datastore's neighbours."""
    found = find_neighbors(store, np.arange(store.num_rows), folder, k=5)
    targets = build_targets(found, store.next_tokens, folder, tau=9.0)
    return lambda memory: TextLesson(store, targets, Columns(memory, 30), alpha=0.4)


def test_distillation_goes_on_where_it_stopped(tmp_path: Path, datastore_of: Make) -> None:
    tokens = np.random.default_rng(0).integers(6, size=300)
    lesson = lesson_of(datastore_of(around_centres(300, 16) - 9, tokens), tmp_path)
    rows, config = np.arange(300), DistillConfig(epochs=3, batch_rows=50, learning_rate=1e-2)

    def stop(event: ProgressEvent) -> None:
        if event.done >= 400:
            raise KeyboardInterrupt

    def trained(folder: str, device: torch.device, *, twice: bool = False) -> tuple[Memory, Any]:
        shape = MemoryConfig(16, 32, 1, "silu", gated=True, vocab_size=6)
        memory = new_memory(shape, torch.arange(6), None, seed=0).to(device)
        given = (memory, lesson(memory), rows, config, tmp_path / folder)
        (tmp_path / folder).mkdir(exist_ok=True)
        if twice:
            with pytest.raises(KeyboardInterrupt):
                distill(*given, validate=None, on_progress=stop)
            return trained(folder, device)
        return memory, distill(*given, validate=None)

    once, report = trained("once", GPU)
    again, resumed = trained("again", GPU, twice=True)
    _, expected = trained("cpu", CPU)
    torch.testing.assert_close(once.state_dict(), again.state_dict(), rtol=1e-3, atol=1e-3)
    for losses in (report.train_losses, resumed.train_losses):
        np.testing.assert_allclose(losses, expected.train_losses, rtol=0.02)


def test_answers_of_early_exit_are_those_of_all_layers(tiny_folder: Path) -> None:
    backbone = load_backbone(str(tiny_folder), layer=1, device=str(GPU), dtype="float32")
    config = MemoryConfig(32, 24, 1, "silu", gated=True, vocab_size=41)
    memory = new_memory(config, torch.arange(259, 300), None, seed=3).to(GPU)
    found = MemorySettings(backbone.reference, backbone.layer, config, 0.9, 0.1)
    early, plain = (
        MemoryModel(attach_memory(backbone, memory, found), backbone.tokenizer) for _ in range(2)
    )
    assert early._halves.usable
    plain._halves.__dict__["divisible"] = False
    for question in ("What was found in the old mill?", "Why?"):
        texts = [memory.answer(question, max_new_tokens=12).text for memory in (early, plain)]
        assert texts[0] == texts[1]


def test_documents_become_a_memory_that_answers(
    tmp_path: Path,
    tiny_folder: Path,
    tiny_documents: list[Document],
    quick_training: dict[str, Any],
) -> None:
    there = {**quick_training, "device": str(GPU)}
    config = TrainConfig(base_model=str(tiny_folder), **there)
    report = train(Corpus(tuple(tiny_documents)), out=tmp_path / "memory", config=config)
    assert report.perplexity is not None
    assert report.perplexity.memory < report.perplexity.base
    answered = {
        device: MemoryModel.load(tmp_path / "memory", device=device, dtype="float32")
        .answer("What was found in the old mill?", max_new_tokens=6)
        .text
        for device in ("cpu", str(GPU))
    }
    assert answered["cpu"] == answered[str(GPU)]
