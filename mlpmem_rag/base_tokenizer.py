"""`AutoTokenizer.from_pretrained` of a memory folder gives the base model's tokenizer."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from mlpmem_rag.configuration import MemoryStackConfig, MLPMemConfig
from mlpmem_rag.embedded import embedded_model_path
from mlpmem_rag.errors import ArtifactError


class BaseTokenizer(PreTrainedTokenizerFast):
    """Never made: loading it loads what the memory's configuration names."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The tokenizer of the base model that a memory belongs to.

        Raises:
            ArtifactError: the memory names no base model.
        """
        folder = pretrained_model_name_or_path
        revision = kwargs.pop("revision", None) or "main"
        for name in ("_commit_hash", "subfolder"):
            kwargs.pop(name, None)
        config = AutoConfig.from_pretrained(folder, revision=revision)
        if isinstance(config, MemoryStackConfig):  # all of its memories have the same base
            member = next(iter(config.members))
            config = AutoConfig.from_pretrained(folder, subfolder=member, revision=revision)
        if config.base is None:
            raise ArtifactError(
                f"{pretrained_model_name_or_path} names no base model and has no tokenizer of its "
                "own; load the tokenizer that the base model was saved with"
            )
        name, revision = config.base["name"], config.base["revision"]
        path = str(embedded_model_path(name) or name)
        return AutoTokenizer.from_pretrained(path, *args, revision=revision, **kwargs)


AutoTokenizer.register(MLPMemConfig, fast_tokenizer_class=BaseTokenizer, exist_ok=True)
