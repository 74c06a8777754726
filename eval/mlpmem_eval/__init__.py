"""Head-to-head evaluation: base model, RAG and memory on the same questions, with one LM.

Knows the library and LlamaIndex, not the command line. `comparison.run_comparison` asks the arms,
`report.build_report` turns their rows into figures, `render` shows them.
"""
