"""Continue the beginning of a document, by the base model alone and with its memory.

python examples/continue_text.py demo/memory
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
import typer

from mlpmem_rag import MemoryModel

TEXT = "Vega is the brightest star in the northern constellation of"


def main(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    memory = MemoryModel.load(folder)
    ids = memory.tokenizer(TEXT, return_tensors="pt")
    print(f"  {TEXT} …")
    for lambda_ in (0.0, memory.model.memory_lambda):
        with torch.inference_mode():
            out = memory.model.generate(
                **ids, max_new_tokens=32, do_sample=False, memory_lambda=lambda_
            )
        new = str(memory.tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
        print(f"  λ = {lambda_:.2f}: … {' '.join(new.split())}")


if __name__ == "__main__":
    typer.run(main)
