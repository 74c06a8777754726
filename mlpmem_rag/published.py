"""Memories published with the paper, taken into this library's form.

Their weights are those of a Llama-like stack (`layers.N.input_layernorm`, `mlp.gate_proj|up_proj|
down_proj`, `norm`, `lm_head`) or of a GPT-2-like one (`h.N.ln_1`, `mlp.c_fc|c_proj`, `ln_f`,
`lm_head`), with `embedding_transform` in front where memory and base differ in width. They know
no query vector and cover the base's whole vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import Backbone, resolve_layer
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.mixing import check_lambda
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory

LAST_LAYER = -1
"""What published memories read where nothing else is said."""
PLAIN_NAMES = {
    r"^h\.(\d+)\.ln_1\.": r"layers.\1.input_layernorm.",
    r"^h\.(\d+)\.mlp\.c_fc\.": r"layers.\1.mlp.up_proj.",
    r"^h\.(\d+)\.mlp\.c_proj\.": r"layers.\1.mlp.down_proj.",
    r"^ln_f\.": "norm.",
}


def published_model(
    folder: str | Path,
    backbone: Backbone,
    *,
    layer: int | None = None,
    memory_lambda: float = 0.25,
    memory_temperature: float = 1.0,
) -> MLPMemForCausalLM:
    """Put a published memory on its base model; `save_pretrained` keeps it in this form.

    Args:
        folder: with `config.json` and safetensors, or with these in `knn_generator/`.
        backbone: the base model that the memory was trained beside.
        layer: what it reads; None: as the checkpoint says, else the last.
        memory_lambda: mixing weight; published checkpoints do not hold theirs.
        memory_temperature: nor this.

    Raises:
        ArtifactError: the checkpoint is incomplete, pickled, or does not fit the base model.
        ConfigError: lambda outside 0..1, or no such layer.
    """
    folder = Path(folder)
    inside = folder / "knn_generator"
    weights = inside if inside.is_dir() else folder
    if layer is None:
        said = _json(folder / "mlp_memory_config.json").get("layer_position")
        layer = LAST_LAYER if said is None else int(said)
    memory = published_memory(_tensors(weights), _json(weights / "config.json"))
    _check_fit(memory.config, backbone)
    settings = MemorySettings(
        base=backbone.reference,
        layer=resolve_layer(layer, backbone.num_layers),
        memory=memory.config,
        memory_lambda=check_lambda(memory_lambda),
        memory_temperature=memory_temperature,
    )
    return attach_memory(backbone, memory, settings)


def published_memory(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Memory:
    """A memory from published weights.

    Args:
        tensors: by the names of the checkpoint.
        config: its `config.json`, which has the activation and the norms' epsilon.

    Raises:
        ArtifactError: tensors are missing, left over, or of shapes that do not go together.
    """
    gated = not any(name.startswith("h.") for name in tensors)
    renamed = dict(tensors) if gated else {_plain(n): _turned(n, t) for n, t in tensors.items()}
    head, up = renamed.get("lm_head.weight"), renamed.get("layers.0.mlp.up_proj.weight")
    if head is None or up is None:
        raise ArtifactError(
            "this is no published memory: it lacks lm_head.weight or the first block's MLP "
            f"(it has {', '.join(sorted(tensors)[:4])}, …)"
        )
    transform = renamed.get("embedding_transform.weight")
    blocks = {int(m[1]) for name in renamed if (m := re.match(r"layers\.(\d+)\.", name))}
    try:
        shape = MemoryConfig(
            hidden_size=head.shape[1] if transform is None else transform.shape[1],
            intermediate_size=up.shape[0],
            num_blocks=len(blocks),
            activation=str(config["hidden_act" if gated else "activation_function"]),
            gated=gated,
            vocab_size=head.shape[0],
            norm_eps=float(config["rms_norm_eps" if gated else "layer_norm_epsilon"]),
            inner_size=0 if transform is None else transform.shape[0],
        )
        memory = Memory(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the checkpoint's config.json lacks a field that a memory needs, or has an unknown "
            f"one ({type(error).__name__}: {error})"
        ) from error
    renamed["corpus_tokens"] = torch.arange(shape.vocab_size)
    renamed |= {"questions": memory.questions, "drafts": memory.drafts}  # it was taught none
    try:
        memory.load_state_dict(renamed)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"the published weights do not go together: {reason}") from error
    return memory.requires_grad_(True).eval()


def _plain(name: str) -> str:
    """A name of the GPT-2 form as this library has it."""
    for pattern, replacement in PLAIN_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _turned(name: str, tensor: Tensor) -> Tensor:
    """GPT-2 keeps the matrices of its MLP with the input first."""
    turned = ".mlp." in name and tensor.ndim == 2
    return tensor.T.contiguous() if turned else tensor


def _check_fit(config: MemoryConfig, backbone: Backbone) -> None:
    for what, found, expected in (
        ("reads hidden states of width", config.hidden_size, backbone.hidden_size),
        ("predicts tokens up to", config.vocab_size, backbone.reference.vocab_size),
    ):
        if found != expected:
            raise ArtifactError(
                f"this memory {what} {found}, the base model {backbone.reference.name!r} has "
                f"{expected}; give the base model that it was trained beside"
            )


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        what = f"only {pickled.name}, which is pickled" if pickled else "no *.safetensors"
        raise ArtifactError(
            f"{folder} has {what}; nothing is unpickled here: save its weights as safetensors "
            "first, on a machine where you trust them"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file} cannot be read ({error}); get it again") from error
    return tensors


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file but the memory's own settings."""
    if not path.is_file() and path.name != "config.json":
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); get the checkpoint again") from error
    return content if isinstance(content, dict) else {}
