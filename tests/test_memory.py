"""The memory network: its parts, its size, its start."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mlpmem_rag.backbone import MLPShape
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory import Memory, MemoryConfig, derive_config, new_memory
from mlpmem_rag.mixing import mix

SHAPES = {
    "gated": MemoryConfig(16, 24, num_blocks=2, activation="silu", gated=True, vocab_size=7),
    "plain": MemoryConfig(16, 24, num_blocks=2, activation="gelu_new", gated=False, vocab_size=7),
}
CORPUS_TOKENS = torch.tensor([1, 4, 5, 9, 20, 21, 29])


def randomised(config: MemoryConfig) -> Memory:
    """A memory none of whose parameters is 0 or 1."""
    memory = new_memory(config, CORPUS_TOKENS, None, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return memory


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(2))


def gated_by_hand(w: dict[str, Tensor], x: Tensor) -> Tensor:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    for n in range(2):
        y = norm(x, w[f"layers.{n}.input_layernorm.weight"])
        gate, up = (y @ w[f"layers.{n}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"layers.{n}.mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def plain_by_hand(w: dict[str, Tensor], x: Tensor) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    for n in range(2):
        y = norm(x, f"layers.{n}.input_layernorm")
        y = y @ w[f"layers.{n}.mlp.up_proj.weight"].T + w[f"layers.{n}.mlp.up_proj.bias"]
        y = F.gelu(y, approximate="tanh") @ w[f"layers.{n}.mlp.down_proj.weight"].T
        x = x + y + w[f"layers.{n}.mlp.down_proj.bias"]
    return norm(x, "norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize(("kind", "by_hand"), [("gated", gated_by_hand), ("plain", plain_by_hand)])
def test_forward_equals_the_formulas(kind: str, by_hand: object) -> None:
    assert callable(by_hand)
    memory, x = randomised(SHAPES[kind]), hidden(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(memory(x), by_hand(memory.state_dict(), x))
        expected = (memory(x) / 0.7).log_softmax(-1)
        torch.testing.assert_close(memory.log_probs(x, temperature=0.7), expected)


@pytest.mark.parametrize(("kind", "by_hand"), [("gated", gated_by_hand), ("plain", plain_by_hand)])
def test_gradients_equal_those_of_the_formulas(kind: str, by_hand: object) -> None:
    assert callable(by_hand)
    memory, x = randomised(SHAPES[kind]), hidden(5)
    names, parameters = zip(*memory.named_parameters(), strict=True)
    ours = torch.autograd.grad(memory(x).logsumexp(-1).sum(), parameters)
    theirs = by_hand(dict(zip(names, parameters, strict=True)), x).logsumexp(-1).sum()
    for mine, expected in zip(ours, torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, expected)


class _Made(TorchDispatchMode):
    """Notes every tensor of a shape that is made, and knows which of them are still held."""

    def __init__(self, *shape: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape = shape
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self._shape:
            self._made.append(weakref.ref(out))
        return out

    @property
    def held(self) -> int:
        """Storages that are alive, views counted once."""
        alive = [tensor for ref in self._made if (tensor := ref()) is not None]
        return len({tensor.untyped_storage().data_ptr() for tensor in alive})


@pytest.mark.parametrize(("kind", "inputs"), [("gated", 2), ("plain", 1)])
def test_a_step_holds_what_goes_into_an_activation_and_not_what_comes_of_it(
    kind: str, inputs: int
) -> None:
    memory, x = randomised(SHAPES[kind]), hidden(5)
    with _Made(5, 24) as made:
        out = memory(x)
        assert made.held == inputs * 2  # blocks
    assert out.requires_grad


@pytest.mark.parametrize("kind", SHAPES)
def test_restricted_head_equals_a_full_one_with_the_rest_at_minus_infinity(kind: str) -> None:
    memory, x = randomised(SHAPES[kind]), hidden(4)
    base = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    full = torch.full((4, 30), -torch.inf)
    with torch.no_grad():
        full[:, CORPUS_TOKENS] = memory(x)
        mixed = mix(base, memory.log_probs(x), memory.corpus_tokens, 1.0)
    torch.testing.assert_close(mixed.exp(), full.softmax(-1))


@pytest.mark.parametrize(
    ("size", "num_layers", "blocks"),
    [("small", 32, 2), ("base", 30, 3), ("large", 32, 8), ("small", 4, 1), ("large", 4, 1)],
)
def test_size_follows_from_the_base(size: str, num_layers: int, blocks: int) -> None:
    config = derive_config(MLPShape(16, 24, "silu", True), num_layers, 7, size)
    assert config == dataclasses.replace(SHAPES["gated"], num_blocks=blocks)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="'huge' is not known; choose one of small, base, large"):
        derive_config(MLPShape(16, 24, "silu", True), 4, 7, "huge")


@pytest.mark.parametrize("kind", SHAPES)
def test_the_seed_decides_and_the_global_state_is_left_alone(kind: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        new_memory(SHAPES[kind], CORPUS_TOKENS, None, seed=s).state_dict() for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    "kind",
    [
        "gated",
        pytest.param(
            "plain",
        ),
    ],
)
def test_blocks_start_as_the_identity(kind: str) -> None:
    head = torch.randn(7, 16, generator=torch.Generator().manual_seed(4))
    memory, x = new_memory(SHAPES[kind], CORPUS_TOKENS, head, seed=0), hidden(4)
    with torch.no_grad():
        torch.testing.assert_close(memory(x), memory.norm(x) @ head.T)
    assert torch.equal(memory.corpus_tokens, CORPUS_TOKENS)


def test_a_head_of_another_width_is_not_taken() -> None:
    head = torch.ones(7, 12)
    memory = new_memory(SHAPES["gated"], CORPUS_TOKENS, head, seed=0)
    drawn = new_memory(SHAPES["gated"], CORPUS_TOKENS, None, seed=0)
    assert torch.equal(memory.lm_head.weight, drawn.lm_head.weight)


# Query-aware.


def aware(kind: str, scale: float = 1.0) -> Memory:
    config = dataclasses.replace(SHAPES[kind], query_size=6, hidden_scale=scale)
    return randomised(config)


def queries(*shape: int) -> Tensor:
    vectors = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(5))
    return F.normalize(vectors, dim=-1)


@pytest.mark.parametrize(("kind", "by_hand"), [("gated", gated_by_hand), ("plain", plain_by_hand)])
def test_a_query_stands_beside_the_hidden_state(kind: str, by_hand: object) -> None:
    """Both of unit variance: the state by its scale, the vector of length 1 by its width."""
    assert callable(by_hand)
    memory, x, query = aware(kind, scale=2.5), hidden(4), queries(4)
    assert memory(x, query).shape == (4, 7)
    with torch.no_grad():
        both = torch.cat([x / 2.5, query * 6**0.5], -1)
        torch.testing.assert_close(memory(x, query), by_hand(memory.state_dict(), both))
        expected = (memory(x, query) / 0.7).log_softmax(-1)
        torch.testing.assert_close(memory.log_probs(x, query, 0.7), expected)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_query_of_a_sequence_serves_all_its_positions(kind: str) -> None:
    memory, x, query = aware(kind), hidden(2, 3), queries(2)
    with torch.no_grad():
        found = memory(x, query[:, None])
        assert found.shape == (2, 3, 7)
        for line in range(2):
            for place in range(3):
                alone = memory(x[line, place], query[line])
                torch.testing.assert_close(found[line, place], alone)
        assert not torch.allclose(found, memory(x, query.flip(0)[:, None]), atol=0.01)


@pytest.mark.parametrize("kind", SHAPES)
def test_no_query_is_the_zero_vector(kind: str) -> None:
    memory, x = aware(kind), hidden(2, 3)
    with torch.no_grad():
        assert torch.equal(memory(x), memory(x, torch.zeros(2, 1, 6)))
        assert not torch.allclose(memory(x), memory(x, queries(2)[:, None]), atol=0.01)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_memory_without_query_width_reads_the_state_alone(kind: str) -> None:
    memory, x = randomised(SHAPES[kind]), hidden(2, 3)
    with torch.no_grad():
        assert torch.equal(memory(x, queries(2)[:, None]), memory(x))
    assert derive_config(MLPShape(16, 24, "silu", True), 20, 7, "base").width == 16


def test_a_query_of_another_number_format_is_taken() -> None:
    memory = aware("gated").to(torch.bfloat16)
    with torch.no_grad():
        found = memory(hidden(4), queries(4))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, memory(hidden(4), queries(4).bfloat16()))
        assert memory.log_probs(hidden(4), queries(4)).dtype == torch.float32


def test_the_query_comes_with_a_gradient() -> None:
    memory, query = aware("gated"), queries(4).requires_grad_()
    memory(hidden(4), query).square().sum().backward()
    assert query.grad is not None
    assert query.grad.abs().min() > 0


def test_the_width_of_the_query_is_derived_and_widens_every_part() -> None:
    shape = MLPShape(16, 24, "silu", True)
    config = derive_config(shape, 20, 7, "base", query_size=6, hidden_scale=2.5)
    expected = dataclasses.replace(SHAPES["gated"], query_size=6, hidden_scale=2.5)
    assert config == expected
    sizes = {name: tuple(t.shape) for name, t in Memory(config).state_dict().items()}
    assert sizes["layers.1.mlp.up_proj.weight"] == (24, 22)
    assert sizes["layers.1.mlp.down_proj.weight"] == (22, 24)
    assert sizes["norm.weight"] == (22,)
    assert sizes["lm_head.weight"] == (7, 22)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_query_says_nothing_at_first(kind: str) -> None:
    """The head starts from the base's for the state, and from zero for the query."""
    head = torch.randn(7, 16, generator=torch.Generator().manual_seed(4))
    config = dataclasses.replace(SHAPES[kind], query_size=6)
    memory = new_memory(config, CORPUS_TOKENS, head, seed=0)
    assert torch.equal(memory.lm_head.weight[:, :16], head)
    assert not memory.lm_head.weight[:, 16:].any()
    with torch.no_grad():
        x, query = hidden(4), queries(4)
        normed = memory.norm(torch.cat([x, query * 6**0.5], -1))
        torch.testing.assert_close(memory(x, query), normed[:, :16] @ head.T)
