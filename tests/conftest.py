"""Tiny random base models with a real tokenizer, and a corpus to go with them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.config import TrainConfig
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory
from mlpmem_rag.pipeline import train

_HEADS: dict[str, Any] = {"num_attention_heads": 4, "max_position_embeddings": 96}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    **_HEADS,
}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **ids: LlamaConfig(num_key_value_heads=2, **_SIZES, **ids),
    "mistral": lambda **ids: MistralConfig(num_key_value_heads=2, **_SIZES, **ids),
    "qwen2": lambda **ids: Qwen2Config(num_key_value_heads=2, **_SIZES, **ids),
    "qwen3": lambda **ids: Qwen3Config(num_key_value_heads=2, head_dim=8, **_SIZES, **ids),
    "gemma": lambda **ids: GemmaConfig(num_key_value_heads=1, head_dim=8, **_SIZES, **ids),
    "phi": lambda **ids: PhiConfig(**_SIZES, **ids),
    "gpt2": lambda **ids: GPT2Config(
        n_embd=32, n_layer=4, n_head=4, n_positions=96, n_inner=48, **ids
    ),
    "gpt_neox": lambda **ids: GPTNeoXConfig(**_SIZES, **ids),
    "opt": lambda **ids: OPTConfig(
        hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=4, **_HEADS, **ids
    ),
}

_PLACES = ("the harbour", "a mountain hut", "the old mill", "Lake Orsa")
_THINGS = ("three copper lamps", "a map of the tunnels", "wild honey", "the ledger of 1887")
_PEOPLE = ("Ines Maro", "the night watchman", "Dr. Tollen", "two surveyors")
_ENDS = (
    "Nobody asked about it again until the spring floods came.",
    "It was sold for 42 crowns, which was far too little!",
    "Why it had been left there remains an open question.",
    "The second report, written by another hand, says the opposite.",
)


def _texts() -> list[str]:
    """Sixteen short texts: each place once with each thing, in different words and lengths."""
    return [
        f"In {_PLACES[n % 4]}, {_PEOPLE[(n + n // 4) % 4]} found {_THINGS[n // 4]}. "
        + " ".join(_ENDS[: 1 + (n * 7) % 4])
        for n in range(16)
    ]


def train_tokenizer(*, special: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with `special` it puts <s> in front and knows </s> and <pad>."""
    tokens = ["<s>", "</s>", "<pad>"] if special else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if not special:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_model(folder: Path, family: str, *, special: bool = True) -> Path:
    """A random causal model of the family and its tokenizer, as a Hugging Face folder."""
    tokenizer = train_tokenizer(special=special)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config = FAMILIES[family](vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # far from the near-zero start of a real training
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers, width 32, 300 tokens, on disk."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_folder`, its tokenizer without BOS, EOS and padding token."""
    return save_model(tmp_path_factory.mktemp("models") / "bare-llama", "llama", special=False)


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model folder of each family; its name is the family's."""
    return save_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder: Path) -> Backbone:
    """The tiny Llama, loaded as the library loads any base model."""
    return load_backbone(str(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A sentence-transformers model of the tiny Llama's own weights, width 32."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("models") / "sentences"
    transformer = Transformer(str(tiny_folder), max_seq_length=32)
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_documents() -> list[Document]:
    """Sixteen documents of one to five sentences."""
    return [
        Document(id=f"doc-{n}", text=text, title=None, source=f"doc-{n}.txt")
        for n, text in enumerate(_texts())
    ]


@pytest.fixture(scope="session")
def quick_training() -> dict[str, Any]:
    """Settings of a training of half a second on any of the tiny models."""
    return {
        "recipe": "paper",
        "device": "cpu",
        "dtype": "float32",
        "window": 48,
        "neighbors": 8,
        "distill": DistillConfig(epochs=3, batch_rows=256, learning_rate=1e-2),
    }


@pytest.fixture(scope="session")
def memory_of(
    quick_training: dict[str, Any],
    tiny_documents: list[Document],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], Path]:
    """Trains on the tiny documents for half a second; gives the memory's folder."""

    def make(base_model: Path) -> Path:
        out = tmp_path_factory.mktemp("memories") / base_model.name
        config = TrainConfig(base_model=str(base_model), **quick_training)
        train(Corpus(tuple(tiny_documents)), out=out, config=config)
        return out

    return make


@pytest.fixture(scope="session")
def tiny_memory(tiny_folder: Path, memory_of: Callable[[Path], Path]) -> Path:
    """A memory on the tiny Llama, whose tokenizer has no chat template."""
    return memory_of(tiny_folder)


@pytest.fixture
def before_forward() -> Iterator[Callable[[torch.nn.Module, Callable[[int], object]], None]]:
    """Has a function called before each forward pass of a model, with the pass's number."""
    handles = []

    def register(model: torch.nn.Module, call: Callable[[int], object]) -> None:
        passes = itertools.count(1)

        def hook(*_: object) -> None:
            call(next(passes))

        # Where every pass begins, of a whole model or of its first layers alone.
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        handles.append(embeddings.register_forward_pre_hook(hook))

    yield register
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="session")
def datastore_of() -> Callable[..., Datastore]:
    """Makes a datastore of hand-made keys and next tokens."""

    def make(keys: npt.ArrayLike, next_tokens: npt.ArrayLike | None = None) -> Datastore:
        stored: npt.NDArray[Any] = np.asarray(keys, dtype=np.float16)
        none = np.zeros(len(stored), dtype=np.int32)
        tokens = none if next_tokens is None else np.asarray(next_tokens, dtype=np.int32)
        return Datastore((stored,), tokens, none, np.arange(len(stored), dtype=np.int32))

    return make


@pytest.fixture(scope="session")
def memory_on() -> Callable[..., MLPMemForCausalLM]:
    """Puts a random memory on a base model."""

    def make(
        backbone: Backbone,
        *,
        seed: int = 0,
        query_size: int = 0,
        vocab_size: int = 90,
        lambda_: float = 0.4,
        **settings: Any,  # noqa: ANN401
    ) -> MLPMemForCausalLM:
        config = MemoryConfig(
            backbone.hidden_size,
            24,
            2,
            "silu",
            gated=True,
            vocab_size=vocab_size,
            query_size=query_size,
            hidden_scale=2.0,
        )
        memory = Memory(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in memory.parameters():
            mean = float(parameter.ndim == 1)
            torch.nn.init.normal_(parameter, mean=mean, std=0.2, generator=generator)
        order = torch.randperm(290, generator=generator)[:vocab_size] + 5
        memory.corpus_tokens = order.sort().values
        found = MemorySettings(backbone.reference, backbone.layer, config, lambda_, 1.3)
        return attach_memory(backbone, memory, replace(found, **settings))

    return make


class FolderHub:
    """Stands in for the hub's client and for what downloads from it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id: str, **_: object) -> Any:  # noqa: ANN401
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Repository", (), {"repo_id": repo_id})()

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str | None = None, **_: object
    ) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"{repo_id}: {commit_message}"

    def download(self, name: str, **options: Any) -> str:  # noqa: ANN401
        assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in options["allow_patterns"])
        if not (self.root / name).is_dir():
            raise OSError(f"Repository {name} not found")
        return str(self.root / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    """A hub below a folder."""
    there = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(checkpoint, "HfApi", lambda token=None: there)
    monkeypatch.setattr(checkpoint, "snapshot_download", there.download)
    return there
