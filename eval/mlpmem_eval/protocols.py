"""Each protocol of the paper as a section of figures; `bench` decides which can be run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_eval import published
from mlpmem_eval.answerers import ChatAnswerer, QueryEngineAnswerer
from mlpmem_eval.bench_schema import Line, Section
from mlpmem_eval.growth import FACTORS, QUESTIONS, Sized, first_tokens, grown_index
from mlpmem_eval.knn import LAMBDAS, NeighborMemory
from mlpmem_eval.latency import recording
from mlpmem_eval.perplexity import FITTED_SHARE, TextFigures
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rag import native_engine
from mlpmem_eval.schema import Report
from mlpmem_eval.statistics import mean_interval
from mlpmem_eval.twin import sharing_base
from mlpmem_eval.workbench import Workbench
from mlpmem_rag.heldout import Perplexities
from mlpmem_rag.index import FLAT_MAX_ROWS
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.progress import OnProgress, ignore_progress

Floats = npt.NDArray[np.float64]


def perplexity_section(
    name: str, title: str, figures: Perplexities, *, with_teacher: bool, settings: dict[str, object]
) -> Section:
    """Perplexities of the same tokens, and what the memory makes of the base's."""
    found = {"base": figures.base, "knn": figures.teacher, "memory": figures.memory}
    lines = [
        Line(what=arm, value=value, n=figures.tokens, published=published.PERPLEXITY[arm])
        for arm, value in found.items()
        if arm != "knn" or with_teacher
    ]
    printed = published.PERPLEXITY
    ratio = Line(
        what="memory / base",
        value=figures.memory / figures.base,
        interval=(figures.ratio_low, figures.ratio_high),
        n=figures.tokens,
        published=printed["memory"] / printed["base"],
    )
    return Section(
        name=name,
        title=title,
        unit="perplexity",
        lines=[*lines, ratio],
        settings=settings,
        differs=list(published.DIFFERS["perplexity"]),
    )


def text_section(figures: TextFigures) -> Section:
    """Perplexity of a given text."""
    return perplexity_section(
        "perplexity",
        "Perplexity of the text",
        figures.perplexities,
        with_teacher=figures.teacher_lambda is not None,
        settings={"knn_lambda": figures.teacher_lambda, "fitted_share": FITTED_SHARE},
    )


def question_section(report: Report) -> Section:
    """How right each arm's answers are, in percent."""
    lines = [
        Line(
            what=f"{name}, {label}",
            value=100 * value,
            interval=(100 * arm.intervals[metric][0], 100 * arm.intervals[metric][1]),
            n=arm.n,
            published=published.QUESTIONS.get(name) if metric == "em" else None,
        )
        for name, arm in report.arms.items()
        for metric, label in (("em", "exact match"), ("f1", "F1"))
        if (value := getattr(arm, metric)) is not None
    ]
    return Section(
        name="questions",
        title="Open-domain questions",
        unit="percent",
        lines=lines,
        settings={"arms": {name: arm.settings for name, arm in report.arms.items()}},
        differs=list(published.DIFFERS["questions"]),
    )


def speed_section(report: Report) -> Section:
    """How many times faster one arm is than another, paired by question."""
    lines = []
    for what, printed in published.TIMES_FASTER.items():
        measure, pair = what.split(", ")
        upper, lower = pair.split(" / ")
        if {upper, lower} <= set(report.arms):
            ratios = _ratios(report, measure, upper, lower)
            if len(ratios):
                low, high = mean_interval(np.log(ratios))
                value = float(np.exp(np.log(ratios).mean()))
                interval = (float(np.exp(low)), float(np.exp(high)))
                lines.append(
                    Line(
                        what=what, value=value, interval=interval, n=len(ratios), published=printed
                    )
                )
    return Section(
        name="speed",
        title="Speed on these questions",
        unit="times (geometric mean over questions)",
        lines=lines,
        settings={"machine": report.settings.get("machine")},
        differs=list(published.DIFFERS["speed"]),
    )


def _ratios(report: Report, measure: str, upper: str, lower: str) -> Floats:
    """One ratio for each question that both arms answered. *Shape:* (N,)."""
    pairs = []
    for entry in report.questions:
        a, b = entry.arms[upper], entry.arms[lower]
        if a.error is not None or b.error is not None:
            continue
        if measure == "first token":
            pairs.append((a.ttft_ms, b.ttft_ms))
        elif measure == "answer":
            pairs.append((a.total_ms, b.total_ms))
        elif a.completion_tokens and b.completion_tokens:
            pairs.append((a.completion_tokens / a.total_ms, b.completion_tokens / b.total_ms))
    both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return both[:, 0] / both[:, 1]


def preference_section(right: Mapping[str, Floats], *, seed: int = 0) -> Section:
    """How often the right answer is the more probable one, in percent."""

    def line(what: str, values: Floats) -> Line:
        low, high = mean_interval(100 * values, seed=seed)
        return Line(
            what=what,
            value=float(100 * values.mean()),
            interval=(low, high),
            n=len(values),
            published=published.PREFERENCE.get(what),
        )

    gain = line("memory - base", right["memory"] - right["base"])
    return Section(
        name="preference",
        title="Right answers against made-up ones",
        unit="percent",
        lines=[*(line(arm, values) for arm, values in right.items()), gain],
        settings={"scored by": "mean log-probability a token"},
        differs=list(published.DIFFERS["preference"]),
    )


def growth_section(
    bench: Workbench,
    questions: Sequence[EvalQuestion],
    teacher: Callable[[], NeighborMemory] | None,
    *,
    factors: Sequence[int] = FACTORS,
    on_progress: OnProgress = ignore_progress,
) -> Section:
    """Time to the first token, the corpus so many times as large."""

    def one_token(memory: MemoryModel, lambda_: float | None = None) -> MLPMemLLM:
        return MLPMemLLM.from_model(memory, lambda_=lambda_, max_new_tokens=1)

    arms = [Sized(ChatAnswerer("memory", one_token(bench.memory)), 1)]
    index = bench.index("rag", None).index
    for factor in factors:
        grown = grown_index(index, bench.embedding, factor)
        engine = native_engine(grown, one_token(bench.memory, 0.0))
        arms.append(Sized(QueryEngineAnswerer("rag", engine), factor))
    if teacher is not None:
        for factor in factors:
            if (knn := _grown_knn(bench.memory, teacher(), factor)) is not None:
                arms.append(Sized(ChatAnswerer("knn", one_token(knn)), factor))
    with recording() as recorder:
        found = first_tokens(arms, questions[:QUESTIONS], recorder, on_progress=on_progress)
    return Section(
        name="corpus size",
        title="Time to the first token by corpus size",
        unit="ms, median",
        lines=[
            Line(
                what=f"{times.arm}, any size"
                if times.arm == "memory"
                else f"{times.arm}, {times.factor}×",
                value=times.median,
                n=len(times.milliseconds),
            )
            for times in found
        ],
        settings={"passages": len(index.docstore.docs), "factors": list(factors)},
        differs=list(published.DIFFERS["corpus size"]),
    )


def _grown_knn(memory: MemoryModel, grown: NeighborMemory, factor: int) -> MemoryModel | None:
    """kNN-LM on so many times its rows; None where these would no longer be searched one by one."""
    if grown.num_rows * factor > FLAT_MAX_ROWS:
        return None
    grown.add_far_rows(grown.num_rows * (factor - 1))
    return sharing_base(memory, grown, LAMBDAS[0])
