"""The paper's figures (arXiv 2508.01832, version 3), to stand beside one's own."""

from __future__ import annotations

from collections.abc import Mapping

Figures = Mapping[str, float]

PERPLEXITY: Figures = {"base": 10.42, "knn": 9.43, "memory": 9.58}
"""WikiText-103, GPT2-large fine-tuned on it, 1,024 neighbours."""

QUESTIONS: Figures = {"base": 32.12, "rag": 33.38, "knn": 32.57, "lora": 32.28, "memory": 36.06}
"""Mean over NQ, WebQuestions, TriviaQA, TruthfulQA and HotpotQA, Mistral-7B, in percent."""

PREFERENCE: Figures = {"base": 53.99, "memory - base": 12.9}
"""HaluEval's questions, in percent; the gain as the paper prints it."""

TIMES_FASTER: Figures = {
    "first token, rag / memory": 2.5,
    "first token, knn / memory": 5.6,
    "tokens a second, memory / rag": 1.5,
    "tokens a second, memory / knn": 6.0,
    "answer, memory / base": 1.2,
}
"""Five passages for RAG; a GPU."""

DIFFERS: Mapping[str, tuple[str, ...]] = {
    "perplexity": (
        "The paper trains on WikiText-103's training text and tests on its test text; here the "
        "memory is of whatever documents it was trained on, and the text is the one given.",
        "The paper's base model is fine-tuned on the corpus before, this one is not.",
        "The paper tunes the memory's weight on validation text; here it is the one that training "
        "chose, with its gate. kNN-LM's is fitted on the first fifth of the text.",
    ),
    "questions": (
        "The paper's corpus is Wikipedia and its questions are from five open-domain sets; here "
        "they are the ones given, answered in a few words, scored by SQuAD's exact match and F1. "
        "Its figures are its own mean score over these sets.",
        "The paper's RAG reads five passages; `rag` here has LlamaIndex's defaults.",
        "A memory of the self-study recipe is taught questions written from the corpus; the "
        "paper's is taught its text alone.",
    ),
    "speed": (
        "Measured on this machine, one question at a time, with short answers and this corpus; the "
        "paper's figures are of a 7B model on a GPU and a far larger datastore, where search costs "
        "more.",
        "Tokens a second are over the whole time of an answer.",
    ),
    "preference": (
        "Here the answer with the larger mean log-probability a token counts as preferred. The "
        "paper's base model is near one half and a small one here can be far from it, as the "
        "made-up answers are longer: compare directions, not sizes.",
        "`rag` puts the nearest document before the question.",
    ),
    "corpus size": (
        "The paper compares corpora of different sizes; here the same one is filled up with "
        "passages and rows that are searched and never found.",
    ),
}

NOT_RUN = (
    "nine NLP tasks (base 67.86, RAG 70.79, kNN-LM 68.50, LoRA 67.88, memory 73.07): run "
    "`mlpmem-rag lm-eval` on their tasks",
)
