"""`python -m fuzz.run TARGET [SECONDS]`: coverage-guided fuzzing of one reader, with atheris.

Needs `pip install 'mlpmem-rag[fuzz]'`. Ends with the number of executions; a finding ends it at
once, with the traceback, and leaves the bytes in the working folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

# The parsers whose branches guide the search; torch and transformers would only slow it down.
with atheris.instrument_imports(
    include=["mlpmem_rag", "csv", "docutils", "inscriptis", "json", "mammoth", "pypdf", "zipfile"]
):
    from fuzz.targets import TARGETS, seeds

MAX_BYTES = 4096
SLOW_SECONDS = 20


def main() -> None:
    """Fuzz a target for a while."""
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as begin:
        for number, content in enumerate(seeds(name)):
            (Path(begin) / str(number)).write_bytes(content)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_BYTES}",
            f"-timeout={SLOW_SECONDS}",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
            begin,
        ]
        atheris.Setup([sys.argv[0], *options], lambda data: target(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
