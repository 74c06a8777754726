"""`mlpmem-rag lm-eval`."""

from __future__ import annotations

import typer

from mlpmem_cli import options


def lm_eval(
    context: typer.Context,
    memory: options.MemoryArgument,
    lambda_: options.LambdaOption = None,
    base_model: options.BasePlaceOption = None,
    device: options.DeviceOption = options.Device.auto,
    dtype: options.DtypeOption = options.Dtype.auto,
) -> None:
    """Run lm-evaluation-harness on a memory.

    All other options go to the harness's own `run`: --tasks NAMES, --include_path FOLDER for tasks
    of your own, --limit, --num_fewshot, --batch_size, --output_path and more.
    """
    from mlpmem_cli import display
    from mlpmem_rag.harness import run_harness

    display.quiet_libraries()
    run_harness(
        memory,
        context.args,
        memory_lambda=lambda_,
        base_model=base_model,
        device=device.value,
        dtype=dtype.value,
    )
