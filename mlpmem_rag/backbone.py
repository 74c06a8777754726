"""The frozen base language model: token ids in, hidden states at one layer out.

The only module that knows architectures and where weights come from. There is no table of model
families: the decoder layers and, inside one, the MLP sublayer are found by their structure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.embedded import embedded_model_path
from mlpmem_rag.errors import BaseModelError, ConfigError
from mlpmem_rag.hardware import resolve_device, resolve_dtype
from mlpmem_rag.tap import HiddenTap

DEFAULT_DEPTH = 0.7
"""Relative depth of the layer whose hidden states are the keys (paper, section 5.5)."""

STORED = "stored"


@dataclass(frozen=True)
class MLPShape:
    """The feed-forward sublayer of the base: the memory's blocks are built alike."""

    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool


@dataclass(frozen=True)
class BaseReference:
    """What identifies a base model, so that a memory is never used with another one."""

    name: str
    revision: str | None
    weights: str
    tokenizer: str
    vocab_size: int


@dataclass(frozen=True)
class Prefix:
    """What the layers up to the tap remember of a beginning that many sequences share."""

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Backbone:
    """A frozen base model, its tokenizer, and the layer whose MLP input is the memory's key."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layer: int
    reference: BaseReference

    @property
    def device(self) -> torch.device:
        """Where the base model computes."""
        return self.model.device

    @property
    def mlp(self) -> nn.Module:
        """The module whose input is tapped."""
        return mlp_sublayer(decoder_layers(self.model)[self.layer], self.hidden_size)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(text_config(self.model).hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(decoder_layers(self.model))

    @property
    def context_window(self) -> int:
        """Most tokens the base model takes at once."""
        return context_window(self.model)

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states at the input of the layer's MLP sublayer; later layers are not run.

        *Shapes:* ids (B, T), mask (B, T) -> (B, T, D).
        """
        body: nn.Module = self.model.base_model
        with HiddenTap(self.mlp, stop=True).listen() as tap:
            body(input_ids=token_ids, attention_mask=attention_mask, use_cache=False)
        return tap.hidden.reshape(*token_ids.shape, -1)

    @torch.inference_mode()
    def prefix(self, token_ids: Sequence[int]) -> Prefix:
        """Keys and values of tokens that many sequences begin with. *Shape:* (P,)."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(token_ids)], device=self.device)
        body: nn.Module = self.model.base_model
        with HiddenTap(self.mlp, stop=True).listen():
            body(input_ids=ids, past_key_values=cache, use_cache=True)
        cached: Any = cache.layers[: self.layer + 1]  # later layers have not run
        layers = [(layer.keys, layer.values) for layer in cached]
        return Prefix(len(token_ids), tuple(layers))

    @torch.inference_mode()
    def hidden_after(self, prefix: Prefix, token_ids: Tensor) -> Tensor:
        """Like `hidden`, for what follows a prefix; right padding changes nothing on its left.

        *Shape:* ids (B, T) -> (B, T, D).
        """
        batch, length = token_ids.shape
        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(prefix.layers):
            shape = (batch, -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), number)
        mask = torch.ones(batch, prefix.length + length, dtype=torch.long, device=self.device)
        body: nn.Module = self.model.base_model
        with HiddenTap(self.mlp, stop=True).listen() as tap:
            body(input_ids=token_ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return tap.hidden.reshape(batch, length, -1)

    @torch.inference_mode()
    def next_token_log_probs(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-probability of each next token. *Shapes:* (B, T), (B, T) -> (B, T-1)."""
        logits: Tensor = self.model(
            input_ids=token_ids, attention_mask=attention_mask, use_cache=False
        ).logits[:, :-1]
        chosen = logits.gather(-1, token_ids[:, 1:, None]).squeeze(-1).float()
        # One row at a time: a float32 copy of B x T x vocabulary would be gigabytes.
        normaliser = torch.stack([row.float().logsumexp(-1) for row in logits])
        return chosen - normaliser


def load_backbone(
    name_or_path: str,
    *,
    layer: int | None = None,
    depth: float = DEFAULT_DEPTH,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
) -> Backbone:
    """Load a base model by hub id, local folder or embedded name.

    Args:
        name_or_path: what to load; embedded names need no network.
        layer: index of the decoder layer to tap, negative from the end; None: by `depth`.
        depth: where to tap as a share of the layers, if no layer is given.
        device: `auto`, `cpu`, `cuda`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`; `stored`: as its files have it.
        revision: commit or branch on the hub.

    Raises:
        BaseModelError: the model cannot be loaded or has no standard decoder stack.
        ConfigError: layer, device or dtype outside what is allowed.
    """
    torch_device = resolve_device(device)
    torch_dtype = None if dtype == STORED else resolve_dtype(dtype, torch_device)
    model, tokenizer = _load(name_or_path, revision)
    num_layers = len(decoder_layers(model))
    reference = BaseReference(
        name=name_or_path,
        revision=getattr(model.config, "_commit_hash", None) or revision,
        weights=weights_fingerprint(model),  # before the cast: the same for every dtype
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocab_size=model.get_output_embeddings().weight.shape[0],
    )
    nn.Module.to(model, device=torch_device).eval().requires_grad_(False)
    for parameter in model.parameters() if torch_dtype else ():
        # Not model.to(dtype): that would round the buffers too, rotary frequencies among them.
        parameter.data = parameter.data.to(torch_dtype)
    backbone = Backbone(model, tokenizer, resolve_layer(layer, num_layers, depth), reference)
    _check_causal(backbone)  # refuse now rather than in the middle of the work
    return backbone


def load_referenced(
    reference: BaseReference, given: str | None, *, device: str, dtype: str
) -> Backbone:
    """The base model that a memory names, or the one given in its stead; see `load_backbone`.

    Whether it is the right one, `artifact.check_base` tells.
    """
    if given is not None:
        return load_backbone(given, device=device, dtype=dtype)
    return load_backbone(reference.name, revision=reference.revision, device=device, dtype=dtype)


def _check_causal(backbone: Backbone) -> None:
    """Refuse a model whose hidden states depend on what comes later.

    Raises:
        BaseModelError: they do, as in BERT or XLNet.
    """
    token_ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=backbone.device)
    token_ids %= backbone.reference.vocab_size
    first, second = backbone.hidden(token_ids, torch.ones_like(token_ids)).float()
    *before, last = (first - second).abs().amax(-1)  # only the last token differs
    if max(before) > 1e-3 * last:
        raise BaseModelError(
            f"base model {backbone.reference.name!r} ({backbone.model.config.model_type}) looks "
            "ahead; a decoder-only causal language model is needed"
        )


def _load(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = str(embedded_model_path(name) or name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise BaseModelError(
                f"base model {name!r} is an encoder-decoder ({config.model_type}); "
                "a decoder-only causal language model is needed"
            )
        if quantised := getattr(config, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise BaseModelError(
                f"base model {name!r} is quantised ({method}); a memory needs the weights as they "
                "were published, give the unquantised model"
            )
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,  # nothing is unpickled
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"base model {name!r} cannot be loaded ({_first_line(error)}); give a hub id, "
            "a local folder with config.json, tokenizer and safetensors, or the embedded "
            "'smollm2-135m-instruct'"
        ) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise BaseModelError(
            f"base model {name!r} is incomplete: {len(missing)} weights are missing, the first is "
            f"{missing[0]}; get its files again"
        )
    return model, tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def text_config(model: PreTrainedModel) -> Any:  # noqa: ANN401  every model has its own class
    """The configuration of the language part of a model."""
    return model.config.get_text_config(decoder=True)


def context_window(model: PreTrainedModel) -> int:
    """Most tokens the model takes at once (1,024 where its configuration does not say)."""
    return int(getattr(text_config(model), "max_position_embeddings", None) or 1024)


def resolve_layer(layer: int | None, num_layers: int, depth: float = DEFAULT_DEPTH) -> int:
    """Index of the tapped layer. None means at that depth; negative counts from the end.

    Raises:
        ConfigError: no such layer.
    """
    if layer is None:
        return min(num_layers - 1, round(depth * num_layers))
    if not -num_layers <= layer < num_layers:
        raise ConfigError(
            f"layer {layer} does not exist: the base model has {num_layers} decoder layers, "
            f"numbered 0 to {num_layers - 1}"
        )
    return layer % num_layers


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers, found as the list of `num_hidden_layers` equal modules.

    Raises:
        BaseModelError: there is no such list.
    """
    expected = getattr(text_config(model), "num_hidden_layers", None)
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == expected
            and len({type(layer) for layer in module}) == 1
        ):
            return module
    raise BaseModelError(
        f"base model of type {model.config.model_type!r} has no uniform stack of {expected} "
        "decoder layers; choose a decoder-only model such as Llama, Qwen, Gemma, GPT-2 or OPT"
    )


def mlp_sublayer(layer: nn.Module, hidden_size: int) -> nn.Module:
    """The feed-forward part of a decoder layer: what has weights and is not attention.

    Where a layer holds the two matrices themselves (OPT), the one that takes the hidden state.

    Raises:
        BaseModelError: the layer has no attention, or nothing beside it.
    """
    children = dict(layer.named_children())
    attention = [name for name in children if "attn" in name or "attention" in name]
    attends = any(p.ndim >= 2 for name in attention for p in children[name].parameters())
    with_weights = [
        module
        for name, module in children.items()
        if name not in attention and any(p.ndim >= 2 for p in module.parameters())
    ]
    for module in with_weights:
        takes_hidden = not isinstance(module, nn.Linear) or module.in_features == hidden_size
        if attends and takes_hidden:
            return module
    raise BaseModelError(
        f"decoder layer {type(layer).__name__} is not attention followed by an MLP "
        f"(its parts: {', '.join(children)}); choose a standard decoder-only model"
    )


def mlp_shape(model: PreTrainedModel, layer: int) -> MLPShape:
    """Width, activation and kind of the base's feed-forward sublayer."""
    hidden_size = int(text_config(model).hidden_size)
    block = decoder_layers(model)[layer]
    mlp = mlp_sublayer(block, hidden_size)
    holder = block if isinstance(mlp, nn.Linear) else mlp
    attention = {
        id(p)
        for name, child in holder.named_children()
        if "attn" in name or "attention" in name
        for p in child.parameters()
    }
    matrices = [p for p in holder.parameters() if p.ndim == 2 and id(p) not in attention]
    widths = [w for p in matrices if hidden_size in p.shape and (w := max(p.shape)) > hidden_size]
    config = text_config(model)
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((a for n in names if (a := getattr(config, n, None))), "silu")
    return MLPShape(
        hidden_size=hidden_size,
        intermediate_size=min(widths, default=4 * hidden_size),
        activation=str(activation),
        gated=len(widths) >= 3 or (len(widths) == 2 and max(widths) == 2 * min(widths)),
    )


def output_embedding(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Rows of the base's output head, float32. *Shapes:* (V,) -> (V, D')."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight.detach()[token_ids.to(weight.device)].float().cpu()


def weights_fingerprint(model: PreTrainedModel, samples: int = 256) -> str:
    """SHA-256 over name, shape and evenly spaced values of every weight.

    Reads a few kilobytes a tensor, so it costs milliseconds for any model size.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // samples)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides how text becomes token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        description: dict[str, Any] = {"vocab": tokenizer.get_vocab()}
    else:
        description = json.loads(backend.to_str())
        # Set by each call, not part of what the tokenizer is.
        description.pop("padding", None)
        description.pop("truncation", None)
    text = json.dumps(description, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
