"""The settings of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlpmem_rag.backbone import DEFAULT_DEPTH, Backbone
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.embedded import MINILM, SMOLLM2
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.hardware import dtype_name
from mlpmem_rag.lessons import StudyConfig
from mlpmem_rag.memory import SIZES
from mlpmem_rag.neighbors import MAX_NEIGHBORS
from mlpmem_rag.questions import RULES
from mlpmem_rag.split import check_held_out
from mlpmem_rag.targets import check_tau

RECIPES = ("self-study", "paper")
DEPTHS = {"self-study": 0.55, "paper": DEFAULT_DEPTH}
"""Where a memory reads, as a share of the base's layers: for answers a bit earlier than the paper
for text (docs/experiments.md), which is also sooner there."""

PAPER_OPTIMISATION = DistillConfig()
STUDY_OPTIMISATION = DistillConfig(learning_rate=1e-3, epochs=8, batch_rows=512, patience=8)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. What follows from the base model or the corpus is not among them.

    Attributes:
        recipe: `self-study`: a query-aware memory that learns the corpus and answers to questions
            written from it. `paper`: kNN targets from the corpus alone.
        base_model: hub id, local folder or embedded name.
        size: `small`, `base` or `large` memory.
        layer: decoder layer to read; None: at the depth that suits the recipe.
        device: `auto`, `cpu`, `cuda`.
        dtype: number format of the base; `auto`, `float32`, `bfloat16`, `float16`.
        seed: of the held-out documents, the initial weights and the order of rows.
        window: tokens the base sees at once, at most its context window.
        neighbors: k, at most 1024.
        tau: temperature of the neighbours' votes; None: derived from the distances.
        held_out: share of the rows for validation, and as much again for the test figures.
        alpha: share of the KL term in the loss of corpus rows (paper 0.4).
        encoder: makes the query vectors; see `mlpmem_rag.query.load_encoder`.
        questions: who writes the questions: `rules`, `base-model`, or jsonl files of one's own.
        study: how their answers are learned.
        distill: the optimisation; None: what suits the recipe.
    """

    recipe: str = "self-study"
    base_model: str = SMOLLM2
    size: str = "base"
    layer: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    window: int = 1024
    neighbors: int = MAX_NEIGHBORS
    tau: float | None = None
    held_out: float = 0.1
    alpha: float = 0.4
    encoder: str = MINILM
    questions: tuple[str, ...] = (RULES,)
    study: StudyConfig = field(default_factory=StudyConfig)
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        """Check what no stage checks by itself.

        Raises:
            ConfigError: a value outside what is allowed.
        """
        if self.recipe not in RECIPES:
            raise ConfigError(f"recipe {self.recipe!r} is not known; choose {', '.join(RECIPES)}")
        if self.size not in SIZES:
            raise ConfigError(f"size {self.size!r} is not known; choose {', '.join(SIZES)}")
        check_held_out(self.held_out)
        if self.tau is not None:
            check_tau(self.tau)
        if not 1 <= self.neighbors <= MAX_NEIGHBORS:
            raise ConfigError(f"neighbors = {self.neighbors}: allowed are 1 to {MAX_NEIGHBORS}")
        if self.window < 16:
            raise ConfigError(f"window = {self.window}: allowed are 16 tokens or more")


def resolve_config(config: TrainConfig | None, options: dict[str, Any]) -> TrainConfig:
    """Settings with single fields replaced; None means not given and replaces nothing.

    Raises:
        ConfigError: no such setting.
    """
    config = config or TrainConfig()
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := set(given) - set(asdict(config)):
        raise ConfigError(
            f"unknown setting(s) {', '.join(sorted(unknown))}; "
            f"allowed are {', '.join(asdict(config))}"
        )
    return replace(config, **given)


def optimisation(config: TrainConfig) -> DistillConfig:
    """The settings of the optimisation, with the run's seed."""
    by_recipe = PAPER_OPTIMISATION if config.recipe == "paper" else STUDY_OPTIMISATION
    return replace(config.distill or by_recipe, seed=config.seed)


def resolved(config: TrainConfig, backbone: Backbone) -> TrainConfig:
    """With what `auto` and None turned out to be on this machine and base model."""
    return replace(
        config,
        distill=optimisation(config),
        layer=backbone.layer,
        device=backbone.device.type,
        dtype=dtype_name(backbone.model.dtype),
        window=min(config.window, backbone.context_window),
    )
