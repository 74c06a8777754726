"""The configuration of a base model with its memory, as transformers' Auto classes see it.

Light on purpose: it is imported as soon as transformers' own Auto classes are, so that they know
the model type. The model itself is imported when the first configuration is made.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.integrity import is_inside

MODEL_TYPE = "mlpmem"
STACK_TYPE = "mlpmem-stack"


class MLPMemConfig(PreTrainedConfig):
    """`config.json` of a memory.

    Attributes:
        base: what identifies the base model, the fields of `BaseReference`; None where the base
            model is known by its weights alone.
        base_config: the base model's own configuration. Only a folder with the base model inside
            has it in its `config.json`.
        layer: decoder layer whose MLP input the memory reads.
        memory: shape of the memory, the fields of `MemoryConfig`.
        memory_lambda: mixing weight, 0 (base alone) to 1 (memory as far as its gate lets it).
        memory_temperature: divides the memory's logits.
        encoder: makes the query vectors, by the name that `load_encoder` takes.
        gate: adapts lambda to each token, the fields of `Gate`.
        confidence: probability that an answer is right, the fields of `Confidence`.
    """

    model_type = MODEL_TYPE
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012  as transformers has it

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        layer: int = 0,
        memory: dict[str, Any] | None = None,
        memory_lambda: float = 0.0,
        memory_temperature: float = 1.0,
        encoder: str = "none",
        gate: dict[str, Any] | None = None,
        confidence: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        self.base_config: PreTrainedConfig | None = None  # the base class asks for it
        self.base = base
        self.layer = layer
        self.memory = memory
        self.memory_lambda = memory_lambda
        self.memory_temperature = memory_temperature
        self.encoder = encoder
        self.gate = gate
        self.confidence = confidence
        super().__init__(**kwargs)
        # Only now: the base class would reset how a loaded base model attends.
        self.base_config = base_config
        if base_config is not None and "attn_implementation" in kwargs:
            base_config._attn_implementation = kwargs["attn_implementation"]
        importlib.import_module("mlpmem_rag.model")  # registers itself; the Auto classes ask next

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:  # noqa: ANN401
        """The base's own, which decides how key-value caches are laid out."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to `config.json`: all that decides output, defaults or not."""
        mine = ("layer", "memory_lambda", "memory_temperature", "encoder", "gate", "confidence")
        return {**super().to_diff_dict(), **{name: getattr(self, name) for name in mine}}


class MemoryStackConfig(PreTrainedConfig):
    """`config.json` of a stack of memories on one base model.

    Attributes:
        base_config: the base model's own configuration; not in `config.json`.
        members: the memories by name, each with its mixing weight; a memory's own folder lies in
            the folder of the stack, under its name.
        memory_lambda: multiplies every member's weight; 0 is the base model alone.
    """

    model_type = STACK_TYPE
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012  as transformers has it

    def __init__(
        self,
        base_config: PreTrainedConfig | None = None,
        members: dict[str, float] | None = None,
        memory_lambda: float = 1.0,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        self.base_config: PreTrainedConfig | None = None  # the base class asks for it
        self.members = members or {}
        for name in self.members:
            if not is_inside(name):
                raise ArtifactError(
                    f"a memory of a stack is named {name!r}; allowed are names that a folder below "
                    "the stack's can have on every system"
                )
        self.memory_lambda = memory_lambda
        super().__init__(**kwargs)
        self.base_config = base_config
        importlib.import_module("mlpmem_rag.stack")  # registers itself

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:  # noqa: ANN401
        """The base's own, which decides how key-value caches are laid out."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


AutoConfig.register(MODEL_TYPE, MLPMemConfig, exist_ok=True)
AutoConfig.register(STACK_TYPE, MemoryStackConfig, exist_ok=True)
