#!/usr/bin/env bash
# Train a memory from the sample documents, look at it, ask it. Run by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

echo "== Train a memory from examples/corpus (88 documents about astronomy and space flight)"
mlpmem-rag train examples/corpus --out demo/memory

echo
echo "== The first tokens of an article it has read, continued by the base model and by the memory"
python examples/continue_text.py demo/memory

echo
echo "== Ask it"
mlpmem-rag ask demo/memory --max-new-tokens 40 \
  "How far is Vega from the Sun?" \
  "Which constellation is Vega in?" \
  "Who was the first woman in space?" \
  "On what date did Giuseppe Piazzi find Ceres?"
