"""The fast way for a few rows gives the bits of torch's own, and is taken only where it may be."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mlpmem_rag import few_rows
from mlpmem_rag.few_rows import ExactLinear, Linear, few, other_order, quicken, same_bits

FEW = few_rows.FEW
MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(inner: int, outer: int, *, bias: bool = False) -> Linear:
    made = Linear(inner, outer, bias=bias).bfloat16()
    made.load_state_dict({name: drawn(*value.shape) for name, value in made.state_dict().items()})
    return made


@pytest.fixture
def exchanged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each exchanged product had."""
    seen: list[int] = []
    original = few_rows._exchanged

    def counting(rows: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(rows))
        return original(rows, weight)

    few(torch.bfloat16)  # its trials are not counted
    monkeypatch.setattr(few_rows, "_exchanged", counting)
    return seen


@pytest.mark.skipif(not same_bits(), reason="the two ways differ on this machine")
@pytest.mark.parametrize("shape", [(96, 40), (576, 192), (64, 3000), (1536, 576)])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2,), (3, 5), (1, 13), (FEW,)], ids=str)
def test_every_bit_is_torchs(
    shape: tuple[int, int], lead: tuple[int, ...], exchanged: list[int]
) -> None:
    made, x = layer(*shape), drawn(*lead, shape[0], seed=1)
    with torch.inference_mode():
        found = made(x)
        assert torch.equal(found, F.linear(x, made.weight))
    assert found.is_contiguous()
    assert exchanged == [x.numel() // shape[0]]


@pytest.mark.parametrize(
    ("made", "x"),
    [
        (layer(8, 4), drawn(FEW + 1, 8)),
        (layer(8, 4), drawn(0, 8)),
        (layer(8, 4, bias=True), drawn(2, 8)),
        (layer(8, 4).float(), drawn(65, 8, dtype=torch.float32)),
        (layer(8, 4).double(), drawn(2, 8, dtype=torch.float64)),
    ],
    ids=["many rows", "no rows", "bias", "many rows, float32", "float64"],
)
def test_what_is_left_to_torch(made: Linear, x: Tensor, exchanged: list[int]) -> None:
    with torch.inference_mode():
        assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    assert not exchanged


def test_training_is_left_to_torch(exchanged: list[int]) -> None:
    made = layer(8, 4)
    made(drawn(2, 8)).sum().backward()
    assert made.weight.grad is not None
    assert not exchanged


def test_a_machine_on_which_bits_differ_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, exchanged: list[int]
) -> None:
    monkeypatch.setattr(few_rows, "same_bits", lambda: False)
    monkeypatch.setattr(few_rows, "few", few.__wrapped__)
    made, x = layer(8, 4), drawn(2, 8)
    with torch.inference_mode():
        assert torch.equal(made(x), F.linear(x, made.weight))
    assert not exchanged


def test_the_trial_tells_differing_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    original = few_rows._exchanged
    monkeypatch.setattr(few_rows, "_exchanged", lambda x, w: original(x, w) * (1 + 2**-7))
    assert not same_bits.__wrapped__()


def test_a_quickened_model_says_the_same(family_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.bfloat16)
    quick = copy.deepcopy(plain)
    quicken(quick)
    assert not [module for module in quick.modules() if type(module) is nn.Linear]
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(quick(ids).logits, plain(ids).logits)
    assert quick.state_dict().keys() == plain.state_dict().keys()


@pytest.fixture(params=[True, False], ids=["AMD", "Intel"])
def amd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is taken for one of AMD's."""
    found: bool = request.param
    monkeypatch.setattr(few_rows, "is_amd", lambda _: found)
    monkeypatch.setattr(few_rows, "few", few.__wrapped__)
    return found


@MKL
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(1,), (1, 1), (2,), (3, 5), (64,)], ids=str)
def test_float32_is_right_in_another_order(
    lead: tuple[int, ...], bias: bool, amd: bool, exchanged: list[int]
) -> None:
    made = layer(576, 192, bias=bias).float()
    x = drawn(*lead, 576, seed=1, dtype=torch.float32)
    with torch.inference_mode():
        found = made(x)
        right = F.linear(x.double(), made.weight.double(), made.bias.double() if bias else None)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-4)
    rows = x.numel() // 576
    assert exchanged == ([rows] if amd or rows == 15 else [])


@MKL
def test_a_quickened_model_in_float32_is_exact_outside_another_order(
    family_folder: Path, amd: bool, exchanged: list[int]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32)
    quick = copy.deepcopy(plain)
    quicken(quick)
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(quick(ids).logits, plain(ids).logits)
        assert not exchanged
        with other_order():
            torch.testing.assert_close(quick(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        assert bool(exchanged) == any(isinstance(m, ExactLinear) for m in quick.modules())
        exchanged.clear()
        quick(ids)
    assert not exchanged


@pytest.mark.parametrize("rows", [1, 4])
def test_weights_from_a_mapped_file_give_the_same_bits(rows: int) -> None:
    """They begin anywhere there, and MKL's sums depend on it."""
    made = layer(576, 192).float()
    other = layer(576, 192).float()
    place = torch.empty(576 * 192 + 32)
    shifted = place[2 + (-place.data_ptr() % 64) // 4 :][: 576 * 192].view(192, 576)
    shifted.copy_(made.weight.data)
    other.weight.data = shifted
    x = drawn(rows, 576, seed=1, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(made(x), other(x))
    assert torch.equal(other.weight, made.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_is_left_whole(dtype: torch.dtype, exchanged: list[int]) -> None:
    made = layer(16, 8).to(dtype)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    x = drawn(2, 16, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(compiled(x), F.linear(x, made.weight))
    assert not exchanged
