"""The datastore stage beside the bare forward passes of the same batches."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from benchmarks import roofline
from benchmarks.figures import Figure, Goal
from benchmarks.rounds import interleaved, median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.datastore import BATCH_TOKENS, build_datastore, length_buckets, pad

AT_LEAST = 0.9


def run(setup: Setup) -> list[Figure]:
    """Tokens a second of both; the stage also writes keys, tokens and provenance."""
    backbone, windows = setup.backbone, setup.windows
    batches = [[windows[w] for w in batch] for batch in length_buckets(windows)]
    tokens = sum(len(window.token_ids) for window in windows)
    padded = sum(len(b) * max(len(w.token_ids) for w in b) for b in batches)
    number = itertools.count()  # a folder of its own each time: nothing is resumed

    def forward() -> None:
        for batch in batches:
            backbone.hidden(*pad(batch, backbone.device))

    with tempfile.TemporaryDirectory(dir=setup.work) as folder:

        def stage() -> None:
            build_datastore(backbone, windows, Path(folder) / str(next(number)))

        took = interleaved({"stage": stage, "forward": forward}, setup.rounds, device=setup.device)
    ratio = median_ratio(took["forward"], took["stage"])
    rate = tokens / min(took["stage"])
    return [
        Figure(
            "datastore of the corpus",
            "tokens/s",
            rate,
            "bare forward passes",
            tokens / min(took["forward"]),
            ratio,
            Goal(at_least=AT_LEAST),
            per_second=rate,
            needs=roofline.forward_needs(
                backbone, [len(w.token_ids) for w in windows], BATCH_TOKENS
            ),
            details={"tokens": tokens, "padding": padded / tokens - 1, "batches": len(batches)},
        )
    ]
