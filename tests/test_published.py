"""Published memories: the same logits as a plain rewrite of their blocks, on random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from mlpmem_cli.app import app
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.published import published_memory, published_model

WIDTH, INNER, BLOCKS, TOKENS = 32, 40, 3, 300
IDS = torch.tensor([[0, 40, 81, 122, 163, 204], [0, 7, 14, 21, 28, 35]])
GATED = {"hidden_act": "silu", "rms_norm_eps": 1e-3}
PLAIN = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-3}


def gated_weights(width: int = WIDTH) -> dict[str, Tensor]:
    names = {"norm.weight": (width,), "lm_head.weight": (TOKENS, width)}
    for n in range(BLOCKS):
        names |= {
            f"layers.{n}.input_layernorm.weight": (width,),
            f"layers.{n}.mlp.gate_proj.weight": (INNER, width),
            f"layers.{n}.mlp.up_proj.weight": (INNER, width),
            f"layers.{n}.mlp.down_proj.weight": (width, INNER),
        }
    return drawn(names)


def plain_weights(width: int = WIDTH) -> dict[str, Tensor]:
    names = {"ln_f.weight": (width,), "ln_f.bias": (width,), "lm_head.weight": (TOKENS, width)}
    for n in range(BLOCKS):
        names |= {
            f"h.{n}.ln_1.weight": (width,),
            f"h.{n}.ln_1.bias": (width,),
            f"h.{n}.mlp.c_fc.weight": (width, INNER),
            f"h.{n}.mlp.c_fc.bias": (INNER,),
            f"h.{n}.mlp.c_proj.weight": (INNER, width),
            f"h.{n}.mlp.c_proj.bias": (width,),
        }
    return drawn(names)


def drawn(shapes: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) * 0.3 for n, s in sorted(shapes.items())}


def gated_logits(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Written down from the architecture, without a module of this library."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * weight

    x = transformed(w, x)
    for n in range(BLOCKS):
        y = norm(x, w[f"layers.{n}.input_layernorm.weight"])
        gate = y @ w[f"layers.{n}.mlp.gate_proj.weight"].T
        up = y @ w[f"layers.{n}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"layers.{n}.mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def plain_logits(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Likewise, in the form of GPT-2."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-3)
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = transformed(w, x)
    for n in range(BLOCKS):
        y = norm(x, f"h.{n}.ln_1")
        y = y @ w[f"h.{n}.mlp.c_fc.weight"] + w[f"h.{n}.mlp.c_fc.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ w[f"h.{n}.mlp.c_proj.weight"] + w[f"h.{n}.mlp.c_proj.bias"]
    return norm(x, "ln_f") @ w["lm_head.weight"].T


def transformed(w: dict[str, Tensor], x: Tensor) -> Tensor:
    if "embedding_transform.weight" not in w:
        return x
    return x @ w["embedding_transform.weight"].T + w["embedding_transform.bias"]


FORMS: dict[str, Any] = {
    "gated": (gated_weights, gated_logits, GATED),
    "plain": (plain_weights, plain_logits, PLAIN),
}


def checkpoint(folder: Path, form: str, width: int = WIDTH) -> dict[str, Tensor]:
    """Write a published memory and return its weights."""
    weights: dict[str, Tensor] = FORMS[form][0](width)
    if width != WIDTH:
        inward = {
            "embedding_transform.weight": (width, WIDTH),
            "embedding_transform.bias": (width,),
        }
        weights |= drawn(inward)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FORMS[form][2]))
    return weights


@pytest.mark.parametrize("width", [WIDTH, 24])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_published_block(tmp_path: Path, form: str, width: int) -> None:
    weights = checkpoint(tmp_path, form, width)
    states = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = published_memory(weights, FORMS[form][2])(states)
    expected = FORMS[form][1](weights, states)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folded", [False, True])
def test_on_its_base_it_mixes_as_the_paper_says(
    tmp_path: Path, tiny_backbone: Backbone, form: str, folded: bool
) -> None:
    """With the layer that the checkpoint names, or the last; saved, it stays what it is."""
    weights = checkpoint(tmp_path / "knn_generator" if folded else tmp_path, form)
    if folded:
        (tmp_path / "mlp_memory_config.json").write_text('{"layer_position": 1}')
    model = published_model(tmp_path, tiny_backbone, memory_lambda=0.3, memory_temperature=2.0)
    layer = tiny_backbone.model.model.layers[1 if folded else 3]
    states: list[Tensor] = []
    handle = layer.mlp.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        base = tiny_backbone.model(input_ids=IDS).logits.double().softmax(-1)
        handle.remove()
        found = model(input_ids=IDS).logits.double().exp()
    p_memory = (FORMS[form][1](weights, states[0]).double() / 2.0).softmax(-1)
    torch.testing.assert_close(found, 0.3 * p_memory + 0.7 * base, rtol=1e-3, atol=1e-7)
    model.save_pretrained(tmp_path / "kept")
    again = MLPMemForCausalLM.from_pretrained(tmp_path / "kept", dtype="float32")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits.double().exp(), found)


def test_the_command_writes_a_memory(tmp_path: Path, tiny_folder: Path) -> None:
    checkpoint(tmp_path / "published", "gated")
    command = ["convert", str(tmp_path / "published"), "--out", str(tmp_path / "memory")]
    ran = CliRunner().invoke(app, [*command, "--base-model", str(tiny_folder), "--lambda", "0.4"])
    assert ran.exit_code == 0, ran.output
    assert MLPMemForCausalLM.from_pretrained(tmp_path / "memory").memory_lambda == 0.4


def test_pickled_weights_are_refused(tmp_path: Path, tiny_backbone: Backbone) -> None:
    checkpoint(tmp_path, "gated")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"only pytorch_model\.bin, which is pickled"):
        published_model(tmp_path, tiny_backbone)


def test_weights_that_do_not_go_together_are_refused() -> None:
    weights = gated_weights()
    lacking = {n: t for n, t in weights.items() if n != "layers.1.mlp.gate_proj.weight"}
    with pytest.raises(ArtifactError, match=r"Missing key.*layers\.1\.mlp\.gate_proj"):
        published_memory(lacking, GATED)
    with pytest.raises(ArtifactError, match=r"Unexpected key.*attention"):
        published_memory(weights | {"layers.0.attention.weight": torch.ones(2)}, GATED)
    with pytest.raises(ArtifactError, match=r"no published memory.*wte"):
        published_memory({"wte.weight": torch.ones(3)}, PLAIN)


def test_another_base_model_is_refused(tmp_path: Path, tiny_backbone: Backbone) -> None:
    checkpoint(tmp_path, "gated")
    narrow = {n: t[..., :16] for n, t in gated_weights().items() if "down" not in n}
    narrow |= {n: t[:16] for n, t in gated_weights().items() if "down" in n}
    save_file({n: t.contiguous() for n, t in narrow.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"of width 16, the base model .* has 32"):
        published_model(tmp_path, tiny_backbone)
    checkpoint(tmp_path, "gated")
    with pytest.raises(ConfigError, match="layer 7 does not exist"):
        published_model(tmp_path, tiny_backbone, layer=7)


@pytest.mark.parametrize("config", [{}, {"hidden_act": "no such", "rms_norm_eps": 1e-3}])
def test_an_incomplete_configuration_is_refused(
    tmp_path: Path, tiny_backbone: Backbone, config: dict[str, object]
) -> None:
    head = {"lm_head.weight": torch.zeros(300, 32)}
    save_file(
        {**head, "layers.0.mlp.up_proj.weight": torch.zeros(64, 32)}, tmp_path / "m.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mlp_memory_config.json").write_text('{"layer_position": null}')
    with pytest.raises(ArtifactError, match=r"lacks a field that a memory needs"):
        published_model(tmp_path, tiny_backbone, memory_lambda=0.5)
