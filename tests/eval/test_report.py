"""A report's figures by hand, its file, and what a damaged one says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlpmem_eval.cost import Setup, break_even, cost_of
from mlpmem_eval.render import write_report
from mlpmem_eval.schema import SCHEMA_VERSION, Report, load_report
from mlpmem_rag.errors import ConfigError


def test_accuracy_counts_answerable_questions_that_were_answered(report: Report) -> None:
    memory = report.arms["memory"]
    assert (memory.n, memory.answered, memory.failed) == (5, 7, 1)  # 6 answerable, one failed
    assert memory.em == pytest.approx(4 / 5)
    rag = report.arms["rag"]
    assert (rag.n, rag.em, rag.contains) == (6, 0.5, 1.0)
    assert rag.hit_rate == pytest.approx(4 / 8)  # d0 to d3 were found for their own questions
    assert memory.hit_rate is None
    low, high = rag.intervals["em"]
    assert low < 0.5 < high


def test_latency_covers_every_answer(report: Report) -> None:
    rag = report.arms["rag"]
    totals = np.array([1000 + 20 * n for n in range(8)])
    assert rag.total_ms is not None
    assert rag.total_ms.p50 == pytest.approx(np.median(totals))
    assert rag.total_ms.p95 == pytest.approx(np.quantile(totals, 0.95))
    parts = (rag.retrieval_ms, rag.prefill_ms, rag.decode_ms, rag.other_ms)
    assert sum(part.mean for part in parts if part) == pytest.approx(rag.total_ms.mean)
    assert rag.prompt_tokens == pytest.approx(303.5)
    assert rag.answers_per_second == pytest.approx(1.0)


def test_confidence_is_judged_with_what_cannot_be_answered(report: Report) -> None:
    found = report.arms["memory"].abstention
    assert found is not None
    # Sure in the order of the questions: 0, 1, 2, 4 are right, 5 is wrong, 6 and 7 unanswerable.
    assert found.n == 7
    assert found.auroc_right == 1.0
    assert found.auroc_answerable == 1.0
    assert found.curve[3] == pytest.approx((4 / 7, 0.0, 0.5))
    assert found.curve[-1][:2] == pytest.approx((1.0, 3 / 7))
    assert report.arms["rag"].abstention is None


def test_arms_disagree_where_one_is_right_and_one_is_wrong(report: Report) -> None:
    by_id = {entry.id: entry for entry in report.questions}
    assert by_id["q1"].disagree
    assert not by_id["q6"].disagree  # nothing is right or wrong there
    assert by_id["q3"].arms["memory"].error == "ValueError: <b>broken</b>"
    assert by_id["q3"].arms["memory"].em is None


def test_every_pair_is_compared_on_what_both_answered(report: Report) -> None:
    pairs = {(p.a, p.b, p.metric): p for p in report.pairs}
    assert {(a, b) for a, b, _ in pairs} == {
        ("base", "rag"),
        ("base", "memory"),
        ("rag", "memory"),
    }
    assert pairs["rag", "memory", "em"].n == 5
    assert pairs["rag", "memory", "total_ms"].n == 7
    mine = pairs["rag", "memory", "em"]
    assert (mine.a_only, mine.b_only) == (1, 3)  # q5, and q0, q2, q4


def test_costs_break_even_and_projection(report: Report) -> None:
    (line,) = report.cost.break_even
    assert (line.arm, line.against, line.extra_setup_seconds) == ("memory", "rag", 70.0)
    rag, memory = report.arms["rag"].total_ms, report.arms["memory"].total_ms
    assert rag is not None
    assert memory is not None
    assert line.questions == pytest.approx(70 / ((rag.mean - memory.mean) / 1000))
    projected = {(p.arm, p.factor): p for p in report.cost.projections}
    assert projected["rag", 10].disk_bytes == 50_000
    assert projected["rag", 10].total_ms == pytest.approx(rag.mean + 9 * 60)  # search: 100 - 40 ms
    assert projected["memory", 100].disk_bytes == 100_000
    assert projected["memory", 100].total_ms == pytest.approx(memory.mean)
    assert projected["memory", 100].setup_seconds == 7200
    assert report.cost.assumptions


def test_nothing_is_projected_where_the_search_cannot_be_told_apart(report: Report) -> None:
    inside = Setup({"datastore": 3.0}, grows={"datastore": 9000})  # searched while decoding
    cost = cost_of(
        {"knn": inside, "base": Setup({})}, dict.fromkeys(("knn", "base"), report.arms["base"])
    )
    assert {projection.arm for projection in cost.projections} == {"base"}


def test_break_even_at_its_ends() -> None:
    assert break_even(0.0, 1.0) == 0.0
    assert break_even(10.0, 0.5) == 20.0
    assert break_even(10.0, 0.0) is None


def test_a_report_survives_its_file(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert load_report(tmp_path) == report
    assert load_report(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    memory = content["arms"]["memory"]
    assert {"n", "em", "f1", "contains", "prompt_tokens", "completion_tokens"} <= set(memory)
    assert {"p50", "p95"} <= set(memory["ttft_ms"])
    assert {"p50", "p95"} <= set(memory["total_ms"])
    assert {"pairs", "cost", "settings", "questions"} <= set(content)
    assert content["questions"][1]["arms"]["rag"]["text"] == "answer 1"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "schema_version 3"),
        ({"arms": {"a": {}}}, "arms.a.n: Field required"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ],
)
def test_a_report_of_another_shape_is_refused(
    report: Report, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(report.model_dump_json()) | change))
    with pytest.raises(ConfigError, match=told):
        load_report(path)


def test_no_report_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        load_report(tmp_path)
