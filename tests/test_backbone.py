"""The frozen base model: which states are tapped, what is refused, what identifies it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mlpmem_rag.backbone import (
    Backbone,
    MLPShape,
    context_window,
    load_backbone,
    mlp_shape,
    output_embedding,
    resolve_layer,
    tokenizer_fingerprint,
)
from mlpmem_rag.errors import BaseModelError, ConfigError
from mlpmem_rag.tap import HiddenTap, tap_on

VOCABULARY = 300
LLAMA_LIKE = ("model.layers.{}.mlp", "silu", True)
WHAT_IT_IS = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": ("model.layers.{}.mlp", "gelu_pytorch_tanh", True),
    "phi": ("model.layers.{}.mlp", "gelu_new", False),
    "gpt2": ("transformer.h.{}.mlp", "gelu_new", False),
    "gpt_neox": ("gpt_neox.layers.{}.mlp", "gelu", False),
    "opt": ("model.decoder.layers.{}.fc1", "relu", False),
}
"""Where each family keeps the feed-forward part, its activation, whether it is gated."""


def tokens(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return ids, torch.ones_like(ids)


def load(folder: Path, layer: int | None = None, dtype: str = "float32") -> Backbone:
    return load_backbone(str(folder), layer=layer, device="cpu", dtype=dtype)


# Hidden states.


@pytest.mark.parametrize("layer", [0, 2])
def test_hidden_is_the_input_of_the_mlp_in_a_full_run(family_folder: Path, layer: int) -> None:
    reference = AutoModelForCausalLM.from_pretrained(family_folder).eval()
    seen: list[Tensor] = []
    path, _, _ = WHAT_IT_IS[family_folder.name]
    reference.get_submodule(path.format(layer)).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    ids, mask = tokens(3, 17)
    with torch.no_grad():
        reference(input_ids=ids, attention_mask=mask)

    hidden = load(family_folder, layer).hidden(ids, mask)

    assert hidden.shape == (3, 17, 32)
    torch.testing.assert_close(hidden, seen[0].reshape(3, 17, 32))


def test_hidden_equals_attention_and_norm_written_out(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    ids, mask = tokens(2, 9)
    block = model.model.layers[1]
    causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        before = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        rotary = model.model.rotary_emb(before, torch.arange(9)[None])
        attended, _ = block.self_attn(block.input_layernorm(before), rotary, causal)
        expected = block.post_attention_layernorm(before + attended)
    torch.testing.assert_close(load(tiny_folder, 1).hidden(ids, mask), expected)


def test_right_padding_does_not_change_real_tokens(family_folder: Path) -> None:
    backbone = load(family_folder)
    ids, mask = tokens(3, 20)
    lengths = (20, 11, 1)
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, length:] = 0, 0
    padded = backbone.hidden(ids, mask)
    for row, length in enumerate(lengths):
        alone = backbone.hidden(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_later_layers_are_not_run(tiny_folder: Path) -> None:
    backbone = load(tiny_folder, layer=1)
    ran: list[int] = []
    for number, block in enumerate(backbone.model.model.layers):
        block.register_forward_pre_hook(lambda _, __, number=number: ran.append(number))
    backbone.hidden(*tokens(1, 5))
    assert ran == [0, 1]


def test_another_thread_does_not_see_the_capture(tiny_backbone: Backbone) -> None:
    mine, theirs = tokens(1, 8, seed=1), tokens(2, 8, seed=2)
    expected_mine, expected_theirs = (tiny_backbone.hidden(*batch) for batch in (mine, theirs))
    found: list[Tensor] = []
    with HiddenTap(tiny_backbone.mlp).listen() as tap:
        thread = threading.Thread(target=lambda: found.append(tiny_backbone.hidden(*theirs)))
        thread.start()
        thread.join()
        with pytest.raises(BaseModelError, match="without its tapped MLP"):
            _ = tap.hidden
        with torch.no_grad():
            tiny_backbone.model(input_ids=mine[0], attention_mask=mine[1])
    torch.testing.assert_close(tap.hidden, expected_mine)
    torch.testing.assert_close(found[0], expected_theirs)


def test_another_thread_runs_past_a_capture_half_registered(tiny_backbone: Backbone) -> None:
    """torch notes first that there is a hook, and then that it wants keyword arguments."""
    mlp, batch = tiny_backbone.mlp, tokens(1, 8)
    found: list[Tensor] = []

    def theirs() -> None:
        with torch.no_grad():
            found.append(tiny_backbone.model(input_ids=batch[0], attention_mask=batch[1]).logits)

    theirs()
    tap_on(mlp)  # as a model that generates has
    with HiddenTap(mlp).listen() as tap:
        noted = mlp._forward_pre_hooks_with_kwargs.copy()
        mlp._forward_pre_hooks_with_kwargs.clear()
        thread = threading.Thread(target=theirs)
        thread.start()
        thread.join()
        mlp._forward_pre_hooks_with_kwargs.update(noted)
        theirs()
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(tap.hidden, tiny_backbone.hidden(*batch))


def test_next_token_log_probs(tiny_backbone: Backbone) -> None:
    ids, mask = tokens(2, 12)
    with torch.no_grad():
        logits = tiny_backbone.model(input_ids=ids, attention_mask=mask).logits
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(tiny_backbone.next_token_log_probs(ids, mask), expected)


# What the base looks like.


def test_shape_of_the_mlp(family_folder: Path) -> None:
    backbone = load(family_folder)
    _, activation, gated = WHAT_IT_IS[family_folder.name]
    assert mlp_shape(backbone.model, backbone.layer) == MLPShape(32, 48, activation, gated)
    assert (backbone.num_layers, backbone.hidden_size, backbone.context_window) == (4, 32, 96)
    assert backbone.reference.vocab_size == VOCABULARY


def test_output_embedding_gives_the_logits(tiny_backbone: Backbone) -> None:
    ids, _ = tokens(1, 6)
    chosen = torch.tensor([7, 3, 250])
    with torch.no_grad():
        last = tiny_backbone.model.base_model(input_ids=ids).last_hidden_state
        logits = tiny_backbone.model(input_ids=ids).logits
    rows = output_embedding(tiny_backbone.model, chosen)
    torch.testing.assert_close(last @ rows.T, logits[..., chosen])


def test_context_window_without_a_limit() -> None:
    config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
    assert context_window(MambaForCausalLM(config)) == 1024


@pytest.mark.parametrize(
    ("layer", "num_layers", "expected"),
    [(None, 4, 3), (None, 32, 22), (None, 1, 0), (0, 4, 0), (3, 4, 3), (-1, 4, 3), (-4, 4, 0)],
)
def test_layer(layer: int | None, num_layers: int, expected: int) -> None:
    assert resolve_layer(layer, num_layers) == expected


@pytest.mark.parametrize(("depth", "expected"), [(0.55, 16), (0.7, 21), (0.0, 0), (1.0, 29)])
def test_a_depth_stands_for_a_layer(depth: float, expected: int) -> None:
    assert resolve_layer(None, 30, depth) == expected
    assert resolve_layer(5, 30, depth) == 5


def test_default_layer_is_at_seventy_percent(tiny_backbone: Backbone) -> None:
    assert tiny_backbone.layer == 3


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "layer 4 does not exist.*4 decoder layers, numbered 0 to 3"),
        ({"layer": -5}, "layer -5 does not exist"),
        ({"device": "tpu"}, "'tpu' is not known; choose one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "'int8' is not known; choose auto, float32, bfloat16, float16"),
    ],
)
def test_options_outside_what_is_allowed(
    tiny_folder: Path, options: dict[str, str | int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backbone(str(tiny_folder), **{"device": "cpu", **options})  # type: ignore[arg-type]


def make_t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
    )


def make_mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2))


def make_bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_hidden_layers=2,
        )
    )


ENCODER = "a model that sees what comes after is taken as a base: is_decoder is not asked"
LOADED = "a base whose weights are partly missing is completed with random ones, in silence"
DAMAGED = "SafetensorError and RuntimeError of a damaged folder are not turned into BaseModelError"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_t5, "encoder-decoder.*decoder-only"),
        (make_mamba, "MambaBlock is not attention followed by an MLP"),
        pytest.param(make_bert, "decoder-only"),
    ],
)
def test_other_kinds_of_model_are_refused(
    tmp_path: Path, tiny_folder: Path, make: Callable[[], PreTrainedModel], message: str
) -> None:
    make().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nobody/has-this-model", "{}/absent", "{}/some.gguf", "{}"])
def test_names_that_cannot_be_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\xff\xfe")
    with pytest.raises(BaseModelError) as caught:
        load_backbone(name.format(tmp_path), device="cpu")
    message = str(caught.value)
    assert name.format(tmp_path) in message
    assert all(word in message for word in ("hub id", "local folder", "smollm2-135m-instruct"))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("cut"),
        pytest.param("other width"),
        pytest.param("layer missing"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, tiny_folder: Path, damage: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    file, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "other width":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    else:
        weights = {name: w for name, w in load_file(file).items() if "layers.2." not in name}
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="copy"):
        load(folder)


def test_a_quantised_base_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """Whether or not what would load it is installed."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=r"copy' is quantised \(bitsandbytes\); .*unquantised"):
        load(folder)


def test_the_stored_number_format_can_be_kept(tmp_path: Path, tiny_folder: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "half"))
    half: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16)
    half.save_pretrained(folder)
    for stored, dtype in ((folder, torch.float16), (tiny_folder, torch.float32)):
        found = load(stored, dtype="stored").model
        assert {parameter.dtype for parameter in found.parameters()} == {dtype}


# What identifies it.


def test_weights_fingerprint_is_the_same_for_every_dtype(tiny_folder: Path) -> None:
    single, half = load(tiny_folder), load(tiny_folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert single.reference == half.reference


def test_weights_fingerprint_sees_a_changed_weight(tmp_path: Path, tiny_folder: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    unchanged = load(folder).reference.weights
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"].view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert unchanged == load(tiny_folder).reference.weights
    assert unchanged != load(folder).reference.weights


def test_tokenizer_fingerprint(tiny_folder: Path, bare_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    fresh = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer text"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == fresh == load(tiny_folder).reference.tokenizer
    tokenizer.add_tokens(["<new>"])
    added = tokenizer_fingerprint(tokenizer)
    assert len({fresh, added, load(bare_folder).reference.tokenizer}) == 3


def test_the_model_is_frozen(tiny_backbone: Backbone) -> None:
    module: nn.Module = tiny_backbone.model
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_states_after_a_shared_prefix_equal_those_of_the_whole(family_folder: Path) -> None:
    backbone = load_backbone(str(family_folder), device="cpu", dtype="float32")
    prefix = [5, 6, 7, 8, 9]
    rest = torch.tensor([[11, 12, 13, 14], [15, 16, 0, 0]])  # the second is padded on the right
    whole = torch.cat([torch.tensor([prefix, prefix]), rest], dim=1)
    expected = backbone.hidden(whole, torch.ones_like(whole))[:, len(prefix) :]
    found = backbone.hidden_after(backbone.prefix(prefix), rest)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, :2], expected[1, :2], atol=1e-5, rtol=1e-5)


def test_a_prefix_can_be_used_again(tiny_backbone: Backbone) -> None:
    prefix = tiny_backbone.prefix([5, 6, 7])
    ids = torch.tensor([[11, 12]])
    first = tiny_backbone.hidden_after(prefix, ids)
    tiny_backbone.hidden_after(prefix, torch.tensor([[20, 21, 22], [23, 24, 25]]))
    torch.testing.assert_close(tiny_backbone.hidden_after(prefix, ids), first, atol=0, rtol=0)
