"""lm-evaluation-harness: a memory as one of its models, by the name `mlpmem`.

Imported by nobody but `mlpmem-rag lm-eval`; it needs the extra of that name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlpmem_rag.backbone import context_window
from mlpmem_rag.errors import ArtifactError, MissingDependencyError
from mlpmem_rag.model import load_model

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingDependencyError(
        f"lm-evaluation-harness is not installed ({error}); run: pip install 'mlpmem-rag[lm-eval]'"
    ) from error

MODEL = "mlpmem"


@register_model(MODEL)
class MLPMemLM(HFLM):  # type: ignore[misc]
    """A memory folder; everything else is as the harness's own `hf` model does it."""

    def __init__(
        self,
        pretrained: str,
        memory_lambda: float | str | None = None,
        base_model: str | None = None,
        device: str | None = "auto",
        dtype: str | None = "auto",
        max_length: int | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        model, backbone, _ = load_model(
            pretrained, base_model=base_model, device=device or "auto", dtype=dtype or "auto"
        )
        if memory_lambda is not None:
            model.memory_lambda = float(memory_lambda)
        super().__init__(
            pretrained=model,
            tokenizer=backbone.tokenizer,
            max_length=max_length or context_window(model.base),
            **kwargs,
        )


def run_harness(
    folder: Path,
    options: Sequence[str],
    *,
    memory_lambda: float | None = None,
    base_model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Run the harness's command line on a memory.

    Args:
        folder: the memory.
        options: what its `run` takes: `--tasks`, `--include_path`, `--limit` and so on.
        memory_lambda: mixing weight; None: the memory's own.
        base_model: where to take the base from when its place has changed.
        device: `auto`, `cpu`, `cuda`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.

    Raises:
        ArtifactError: a path that the harness's syntax cannot express.
    """
    # A whole path: of a name such as 2024 the harness would make a number.
    arguments = {"pretrained": str(Path(folder).resolve()), "dtype": dtype}
    if memory_lambda is not None:
        arguments["memory_lambda"] = repr(memory_lambda)
    if base_model is not None:
        local = Path(base_model).is_dir()
        arguments["base_model"] = str(Path(base_model).resolve()) if local else base_model
    for name, value in arguments.items():
        if "," in value or "=" in value:
            raise ArtifactError(
                f"{name} {value!r} has a comma or an equals sign, which the harness's own syntax "
                "cannot hold; move it to a path without"
            )
    spelled = ",".join(f"{name}={value}" for name, value in arguments.items())
    given = sys.argv
    own = ["--model", MODEL, "--model_args", spelled, "--device", device]
    sys.argv = ["lm-eval", "run", *own, *options]
    try:
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    finally:
        sys.argv = given
