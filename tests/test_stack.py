"""Several memories on one base: equal to a naive mixture, and each independent of the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.gate import Gate, gate_features
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.stack import MemoryStack

IDS = torch.tensor([[0, 40, 81, 122, 163, 204], [0, 7, 14, 21, 28, 35]])
OPEN = Gate(asked=(0.3, -0.2, -0.4, 0.1, 0.05, 0.2), plain=(0.1, 0.1, 0.2, 0.0, 0.1, -0.5))
MemoryOn = Callable[..., MLPMemForCausalLM]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone, memory_on: MemoryOn
) -> dict[str, Path]:
    """Three memories: plain, gated and query-aware, each of its own corpus and layer."""
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"seed": 1, "lambda_": 0.3, "layer": 1},
        "gated": {"seed": 2, "lambda_": 0.9, "gate": OPEN, "vocab_size": 120},
        "asked": {"seed": 3, "lambda_": 0.4, "gate": OPEN, "query_size": 32, "encoder": "pooled"},
    }
    root = tmp_path_factory.mktemp("memories")
    for name, kind in kinds.items():
        memory_on(tiny_backbone, **kind).save_pretrained(root / name)
    return {name: root / name for name in kinds}


@pytest.fixture
def stack(folders: dict[str, Path]) -> Any:  # noqa: ANN401
    """All three."""
    return MemoryStack.load(folders, device="cpu", dtype="float32")


def logits(model: Any, **inputs: object) -> Tensor:  # noqa: ANN401
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, **inputs).logits
    return out


def naive(stack: Any, backbone: Backbone, query: Tensor | None) -> Tensor:  # noqa: ANN401
    """The formula, position by position, in double precision."""
    base = logits(backbone.model).double().softmax(-1)
    out = torch.zeros_like(base)
    for row in range(IDS.shape[0]):
        for place in range(IDS.shape[1]):
            weights, parts = [], []
            for name, lambda_ in stack.lambdas.items():
                single = stack.single(name)
                taken: list[Tensor] = []
                handle = single.backbone.mlp.register_forward_pre_hook(
                    lambda _, args, taken=taken: taken.append(args[0])
                )
                logits(single.base)
                handle.remove()
                asks = query is not None and single.query_size
                view = query[row] if query is not None and single.query_size else None
                found = single.memory(taken[0][row, place], view) / 1.3
                p = torch.zeros(base.shape[-1], dtype=torch.double)
                p[single.memory.corpus_tokens] = found.double().softmax(-1)
                opening = 1.0
                if single.gate is not None:
                    features = gate_features(
                        found.log_softmax(-1),
                        base[row, place].log().float(),
                        single.memory.corpus_tokens,
                    )
                    opening = float(single.gate.opening(features, asked=bool(asks)))
                weights.append(lambda_ * opening)
                parts.append(p)
            weights = [weight / max(1.0, sum(weights)) for weight in weights]
            out[row, place] = (1 - sum(weights)) * base[row, place]
            for weight, p in zip(weights, parts, strict=True):
                out[row, place] += weight * p
    return out


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lambdas", [(0.3, 0.9, 0.4), (0.2, 0.1, 0.3), (1.0, 1.0, 1.0), (0, 0, 1)])
def test_it_is_the_mixture_of_the_formula(
    stack: Any,  # noqa: ANN401
    tiny_backbone: Backbone,
    lambdas: tuple[float, ...],
    known: bool,
) -> None:
    for name, lambda_ in zip(stack.lambdas, lambdas, strict=True):
        stack.set_lambda(name, lambda_)
    query = torch.nn.functional.normalize(torch.randn(2, 32), dim=-1) if known else None
    with torch.no_grad():
        expected = naive(stack, tiny_backbone, query)
    found = logits(stack, query_vector=query).double().exp()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 6).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["plain", "gated", "asked"])
def test_one_memory_in_a_stack_is_that_memory(folders: dict[str, Path], name: str) -> None:
    alone = MLPMemForCausalLM.from_pretrained(folders[name], dtype="float32")
    stack: Any = MemoryStack.load({name: folders[name]}, device="cpu", dtype="float32")
    assert torch.equal(logits(stack), logits(alone))
    if name == "asked":
        query = torch.nn.functional.normalize(torch.randn(2, 32), dim=-1)
        assert torch.equal(logits(stack, query_vector=query), logits(alone, query_vector=query))


def test_a_memory_taken_off_leaves_no_trace(folders: dict[str, Path], stack: Any) -> None:  # noqa: ANN401
    pair: Any = MemoryStack.load(
        {name: folders[name] for name in ("plain", "asked")}, device="cpu", dtype="float32"
    )
    before = logits(stack)
    assert not torch.allclose(before, logits(pair), atol=0.01)
    stack.remove("gated")
    assert torch.equal(logits(stack), logits(pair))
    stack.add("gated", folders["gated"])
    assert torch.equal(logits(stack), before)
    for name in list(stack.lambdas):
        stack.remove(name)
    assert torch.equal(logits(stack), logits(stack.base))


def test_a_memory_without_weight_is_as_good_as_off(stack: Any, folders: dict[str, Path]) -> None:  # noqa: ANN401
    stack.set_lambda("gated", 0.0)
    pair: Any = MemoryStack.load(
        {name: folders[name] for name in ("plain", "asked")}, device="cpu", dtype="float32"
    )
    assert torch.equal(logits(stack), logits(pair))


def test_lambda_zero_is_the_base_model_to_the_bit(stack: Any, tiny_backbone: Backbone) -> None:  # noqa: ANN401
    expected = logits(tiny_backbone.model)
    assert torch.equal(logits(stack, memory_lambda=0.0), expected)
    for name in stack.lambdas:
        stack.set_lambda(name, 0.0)
    assert torch.equal(logits(stack), expected)
    for count in (1, 2):  # of so few rows, products with a memory beside them are others
        ids = IDS[:1, :count]
        with torch.no_grad():
            alone = stack.base(input_ids=ids).logits
            assert torch.equal(stack(input_ids=ids).logits, alone)


def test_the_stacks_lambda_multiplies_its_memories(stack: Any) -> None:  # noqa: ANN401
    half = logits(stack, memory_lambda=0.5)
    stack.memory_lambda = 0.5
    assert torch.equal(logits(stack), half)
    stack.memory_lambda = 1.0
    for name, lambda_ in stack.lambdas.items():
        stack.set_lambda(name, lambda_ / 2)
    torch.testing.assert_close(logits(stack), half)


def test_it_generates_cached_and_in_batches(stack: Any) -> None:  # noqa: ANN401
    query = torch.nn.functional.normalize(torch.randn(2, 32), dim=-1)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(IDS)
    found = stack.generate(IDS, attention_mask=mask, query_vector=query, **settings)
    again = stack.generate(
        IDS, attention_mask=mask, query_vector=query, use_cache=False, **settings
    )
    assert torch.equal(found, again)
    for row in range(2):
        alone = stack.generate(
            IDS[row : row + 1],
            attention_mask=mask[:1],
            query_vector=query[row : row + 1],
            **settings,
        )
        assert torch.equal(alone[0], found[row])
    beams = stack.generate(IDS, attention_mask=mask, query_vector=query, num_beams=3, **settings)
    assert beams.shape == found.shape


def test_the_question_in_a_prompt_reaches_the_memory_that_reads_one(stack: Any) -> None:  # noqa: ANN401
    ids = stack.tokenizer("Question: Who found wild honey?\nAnswer:", return_tensors="pt")
    given = stack.encode_queries(["Who found wild honey?"])
    with torch.no_grad():
        found = stack(**ids).logits
        assert torch.equal(found, stack(**ids, query_vector=given).logits)
        assert not torch.allclose(found, stack(**ids, query_vector=0 * given).logits, atol=0.01)


def test_different_encoders_see_the_request_side_by_side(
    tmp_path: Path, tiny_backbone: Backbone, memory_on: MemoryOn
) -> None:
    """Pooled states of different layers are different views."""
    kind: dict[str, Any] = {"query_size": 32, "encoder": "pooled"}
    singles = {}
    for name, layer in (("low", 1), ("high", 3), ("high-too", 3)):
        singles[name] = memory_on(tiny_backbone, layer=layer, seed=layer, **kind)
        singles[name].save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in singles}
    stack: Any = MemoryStack.load(folders, device="cpu", dtype="float32")
    assert stack.query_size == 64
    vectors = stack.encode_queries(["Who?"])
    low, high = (singles[name].encode_queries(["Who?"]) for name in ("low", "high"))
    torch.testing.assert_close(vectors, torch.cat([low, high], 1))
    stack.remove("low")
    assert stack.query_size == 32
    torch.testing.assert_close(stack.encode_queries(["Who?"]), high)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path, stack: Any) -> None:  # noqa: ANN401
    stack.set_lambda("plain", 0.25)
    stack.memory_lambda = 0.8
    stack.save_pretrained(tmp_path / "stack")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "stack", dtype="float32")
    assert isinstance(loaded, MemoryStack)
    assert loaded.lambdas == stack.lambdas
    assert torch.equal(logits(loaded), logits(stack))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "stack")
    assert tokenizer("wild honey")["input_ids"] == stack.tokenizer("wild honey")["input_ids"]
    alone = MLPMemForCausalLM.from_pretrained(tmp_path / "stack" / "plain", dtype="float32")
    assert alone.memory_lambda == 0.25, "each memory can be taken out again"
    with pytest.raises(ConfigError, match="max_memory"):
        MemoryStack.from_pretrained(tmp_path / "stack", max_memory={0: "1GB"})


def test_memories_of_another_base_are_refused(
    tmp_path: Path,
    stack: Any,  # noqa: ANN401
    bare_folder: Path,
    memory_on: MemoryOn,
) -> None:
    other = load_backbone(str(bare_folder), device="cpu", dtype="float32")
    memory_on(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"was trained on .*bare-llama.* not on .*tiny-llama"):
        stack.add("other", tmp_path / "other")
    assert list(stack.lambdas) == ["plain", "gated", "asked"]


def test_memories_with_their_base_inside_need_no_other(
    tmp_path: Path, tiny_folder: Path, memory_on: MemoryOn
) -> None:
    """Beside memories that name it, too; whichever comes first."""
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    backbone = load_backbone(str(base), device="cpu", dtype="float32")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"seed": 1, "layer": 1},
        "asked": {"seed": 2, "layer": 2, "query_size": 32, "encoder": "pooled"},
    }
    for name, kind in kinds.items():
        model = memory_on(backbone, **kind)
        model.save_pretrained(tmp_path / "alone" / name)
        options: dict[str, Any] = {"max_shard_size": "60KB"} if name == "asked" else {}
        model.save_pretrained(tmp_path / "merged" / name, merge_base=True, **options)
    query = torch.nn.functional.normalize(torch.randn(2, 32), dim=-1)
    alone: Any = MemoryStack.load({n: tmp_path / "alone" / n for n in kinds}, dtype="float32")
    expected = logits(alone, query_vector=query)
    beside: Any = MemoryStack.load(
        {"plain": tmp_path / "alone/plain", "asked": tmp_path / "merged/asked"}, dtype="float32"
    )
    assert torch.equal(logits(beside, query_vector=query), expected)
    shutil.rmtree(base)
    merged: Any = MemoryStack.load({n: tmp_path / "merged" / n for n in kinds}, dtype="float32")
    assert torch.equal(logits(merged, query_vector=query), expected)
    given = merged.encode_queries(["Who found wild honey?"])
    torch.testing.assert_close(given, alone.encode_queries(["Who found wild honey?"]))
    merged.remove("plain")
    merged.add("plain", tmp_path / "alone/plain")
    assert torch.equal(logits(merged, query_vector=query), expected)


def test_an_encoder_inside_a_folder_is_used(
    tmp_path: Path, tiny_backbone: Backbone, memory_on: MemoryOn, sentence_folder: Path
) -> None:
    encoder = Path(shutil.copytree(sentence_folder, tmp_path / "sentences"))
    model = memory_on(tiny_backbone, query_size=32, encoder=str(encoder))
    expected = model.encode_queries(["Who found wild honey?"])
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    shutil.rmtree(encoder)
    stack: Any = MemoryStack.load({"asked": tmp_path / "merged"}, dtype="float32")
    torch.testing.assert_close(stack.encode_queries(["Who found wild honey?"]), expected)


@pytest.mark.usefixtures("hub")
def test_pushed_to_a_hub_and_fetched(tmp_path: Path, stack: Any) -> None:  # noqa: ANN401
    stack.set_lambda("plain", 0.25)
    assert stack.push_to_hub("me/stack", commit_message="Three") == "me/stack: Three"
    stack.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/again")
    for name in ("me/stack", "me/again"):
        loaded: Any = MemoryStack.from_pretrained(name, dtype="float32")
        assert loaded.lambdas == stack.lambdas
        assert torch.equal(logits(loaded), logits(stack))
    with pytest.raises(ArtifactError, match="me/none is neither a folder nor a repository"):
        MemoryStack.from_pretrained("me/none")


def test_a_stack_never_holds_its_base(tmp_path: Path, stack: Any) -> None:  # noqa: ANN401
    with pytest.raises(ConfigError, match=r"stack\.single\(name\)\.save_pretrained"):
        stack.save_pretrained(tmp_path / "stack", merge_base=True)
    assert not (tmp_path / "stack").exists()
    stack.single("plain").save_pretrained(tmp_path / "plain", merge_base=True)
    loaded: Any = MLPMemForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(loaded), logits(stack.single("plain")))


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "plain", "items"])
def test_names_that_are_no_folder_names_or_taken_are_refused(
    stack: Any,  # noqa: ANN401
    folders: dict[str, Path],
    name: str,
) -> None:
    with pytest.raises(ConfigError, match="cannot be named"):
        stack.add(name, folders["plain"])


def test_what_is_not_there_is_named(stack: Any) -> None:  # noqa: ANN401
    for action in (stack.remove, stack.single, lambda name: stack.set_lambda(name, 0.5)):
        with pytest.raises(ConfigError, match="no memory 'none' in the stack; it has plain, gated"):
            action("none")
    with pytest.raises(ConfigError, match=r"lambda = 1\.2"):
        stack.set_lambda("plain", 1.2)
    with pytest.raises(ConfigError, match="give one folder"):
        MemoryStack.load({})
