"""Does a memory harm text that has nothing to do with its corpus? Perplexity beside the base's.

python -m benchmarks.harm TEXT --memory DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mlpmem_rag.calibrate import score_text
from mlpmem_rag.corpus import Document
from mlpmem_rag.heldout import measure
from mlpmem_rag.model import load_model
from mlpmem_rag.windows import make_windows, tokenize


def run(
    text: Path,
    memory: Annotated[Path, typer.Option(help="A memory of another corpus.")],
    tokens: Annotated[int, typer.Option(help="Measure the first so many; 0: all.")] = 0,
    device: str = "auto",
) -> None:
    """Print both perplexities and the interval of their ratio."""
    model, backbone, _ = load_model(memory, device=device)
    content = text.read_text(encoding="utf-8")
    ids = tokenize([Document("text", content, None, str(text))], backbone.tokenizer)[0]
    ids = ids[: tokens or None]
    windows = make_windows([ids], length=1024, stride=512)
    rows = np.arange(sum(window.num_rows for window in windows))
    scored = score_text(backbone, model.memory, windows, rows)
    mixed = scored.mixed(model.gate, model.memory_lambda, asked=False).double().numpy()
    base = scored.p_base.double().numpy()
    stretches = (rows // 512).astype(np.int32)
    found = measure(base, base, mixed, stretches, teacher_lambda=0.0, memory_lambda=1.0)
    typer.echo(
        f"{found.tokens} tokens: base {found.base:.3f}, with memory {found.memory:.3f}, ratio "
        f"{found.memory / found.base:.4f}, 95 % [{found.ratio_low:.4f}, {found.ratio_high:.4f}] "
        "(bootstrap over stretches of 512 tokens)"
    )


if __name__ == "__main__":
    typer.run(run)
