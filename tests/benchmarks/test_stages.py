"""Study and targets beside other ways to the same rows and votes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import roofline, study, targets
from benchmarks.figures import Needs
from benchmarks.setup import Setup
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.neighbors import Neighbors
from mlpmem_rag.prompts import prompt_ids, unlike
from mlpmem_rag.study import BATCH_TOKENS, study_rows
from mlpmem_rag.targets import build_targets

from .checks import check


@pytest.fixture
def few(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Few questions, and no second model for their vectors."""
    monkeypatch.setattr(study, "QUESTIONS", 9)
    monkeypatch.setattr(study, "ENCODER", "pooled")
    monkeypatch.setattr("mlpmem_rag.study.BATCH_TOKENS", 90)
    return setup


def test_the_study_suite_counts_what_is_read(few: Setup) -> None:
    figures = study.run(few)
    for figure in figures:
        check(figure)
        assert figure.ratio is not None
    states, beginning, vectors = figures
    backbone = study.reading_backbone(few.backbone)
    assert backbone.layer == 2, "55 % of four layers"
    asked = study.asked_questions(few, backbone)
    noted = study.noted_batches(backbone, [one.question for one in asked])
    asking = [[{"role": "user", "content": one.question.text}] for one in asked]
    prompts = [prompt_ids(backbone.tokenizer, messages) for messages in asking]
    shared = min(unlike(prompts[0], prompts[0], prompt) for prompt in prompts)
    assert beginning.details["tokens_read_once"] == shared == len(noted.beginning) > 1
    read = sum(one.prompt + one.answer - 1 - shared for one in asked)
    assert states.details["questions"] == len(asked) == 9
    assert states.details["tokens"] == read
    assert states.details["batches"] == len(noted.batches) > 1
    assert vectors.details["texts"] == len(asked) + len({one.question.source for one in asked})
    # Two layers whole and the attention of the third; keys only of the answers' tokens.
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32
    assert states.needs is not None
    assert states.needs.flops > 2 * (3 * attention + 2 * 3 * 32 * 48) + 4 * shared * 32 * 3
    answers = sum(one.answer for one in asked)
    weights = (3 * attention + 2 * 3 * 32 * 48) * 4 / BATCH_TOKENS
    assert states.needs.bytes == pytest.approx(weights + 2 * 32 * answers / read)


def test_a_cpu_is_asked_few_questions_of_middle_length(few: Setup) -> None:
    there = replace(few)
    there.__dict__["backbone"] = few.backbone
    there.device = "cuda"
    backbone = study.reading_backbone(few.backbone)
    asked, everything = (study.asked_questions(where, backbone) for where in (few, there))
    lengths, others = ([one.prompt + one.answer for one in some] for some in (asked, everything))
    assert len(asked) == 9
    assert sum(n < min(lengths) for n in others) > 0 < sum(n > max(lengths) for n in others)


def test_bare_passes_give_the_states_that_the_stage_keeps(few: Setup) -> None:
    backbone = study.reading_backbone(few.backbone)
    asked = study.asked_questions(few, backbone)
    questions = [one.question for one in asked]
    noted = study.noted_batches(backbone, questions)
    shared = len(noted.beginning)
    once = list(study.states(backbone, noted))
    anew = list(study.states_of_whole_prompts(backbone, noted))
    for part, whole, ids in zip(once, anew, noted.batches, strict=True):
        assert part.shape[:2] == ids.shape
        torch.testing.assert_close(part, whole[:, shared:], rtol=1e-4, atol=1e-4)
    kept = torch.from_numpy(study_rows(backbone, None, questions).keys)
    given = torch.cat([part.half().flatten(0, 1) for part in once])
    assert all(bool((given == key).all(-1).any()) for key in kept)


def test_without_a_common_beginning_every_prompt_is_read_whole(few: Setup) -> None:
    backbone = study.reading_backbone(few.backbone)
    noted = study.Noted(backbone.model, backbone.tokenizer, backbone.layer, backbone.reference)
    noted.hidden(torch.arange(5, 15)[None], torch.ones(1, 10))
    (once,), (anew,) = study.states(backbone, noted), study.states_of_whole_prompts(backbone, noted)
    assert torch.equal(once, anew)


def test_the_targets_suite_counts_the_votes_of_every_row(setup: Setup) -> None:
    (figure,) = targets.run(setup)
    check(figure)
    num_rows, k = setup.neighbors.ids.shape
    assert k == 1024 < num_rows
    assert figure.details == {"rows": num_rows}
    assert figure.what == f"targets, votes of {k:,} neighbours"
    assert figure.needs == roofline.vote_needs(k, 128)


def test_row_by_row_gives_what_the_stage_stores(setup: Setup) -> None:
    next_tokens = np.asarray(setup.datastore.next_tokens)
    ids = np.array(setup.neighbors.ids)
    distances = np.array(setup.neighbors.distances)
    ids[3, 40:], distances[3, 40:] = -1, np.inf  # as an approximate search leaves them
    found = Neighbors(ids, distances)
    tau = float(distances[:, :10].mean())
    stored = build_targets(found, next_tokens, setup.work / "compared", tau=tau)
    token_ids, probs = targets.row_by_row(found, next_tokens, tau)
    assert (token_ids[:, 0] >= 0).all()
    assert (token_ids >= 0).sum() == pytest.approx((stored.token_ids >= 0).sum(), rel=1e-3)
    width = int(next_tokens.max()) + 1
    np.testing.assert_allclose(
        dense(token_ids, probs, width),
        dense(stored.token_ids, stored.probs, width),
        rtol=2e-3,
        atol=2e-6,
    )


def dense(token_ids: np.ndarray, probs: np.ndarray, width: int) -> np.ndarray:
    """*Shapes:* (N, M), (N, M) -> (N, W)."""
    out = np.zeros((len(token_ids), width + 1))
    np.put_along_axis(out, token_ids.astype(np.int64), probs, 1)  # -1 is the last column
    return out[:, :width]


def test_what_votes_and_shared_beginnings_need_is_counted_by_hand(tiny_backbone: Backbone) -> None:
    assert roofline.vote_needs(1024, 128) == Needs(10 * 1024, 8 * 1024 + 6 * 128, "float32")
    plain = roofline.forward_needs(tiny_backbone, [3], 10)
    after = roofline.forward_needs(tiny_backbone, [3], 10, shared=5, kept=0.25)
    assert after.flops - plain.flops == 4 * 5 * 32 * 4  # five more, of width 32, in four layers
    assert plain.bytes - after.bytes == 2 * 32 * 0.75
    assert replace(after, flops=0.0, bytes=0.0) == replace(plain, flops=0.0, bytes=0.0)
