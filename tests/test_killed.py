"""Killed at any moment, the same command ends with the same memory as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlpmem_rag.artifact import CONFIG, MANIFEST, WEIGHTS, WORK, load_manifest, verify_files
from mlpmem_rag.corpus import Document
from mlpmem_rag.lock import OWNER

PAPER = ("start", "datastore", "neighbors", "targets", "base", "distil", "refit", "save")
SELF_STUDY = ("questions", "study", "distil", "calibration", "refit", "save")
MADE = {
    "paper": ("datastore", "neighbors", "targets", "base"),
    "self-study": ("datastore", "neighbors", "targets", "study", "questions"),
}
When = dict[str, Any]
"""The moment at which a training dies, as `dying.py` takes it."""
FACT = re.compile(r"In (.+?), (.+?) found (.+?)\. ")


@dataclass
class Trainings:
    """Starts trainings that may be killed; see `dying.py`."""

    server: subprocess.Popen[str]
    configs: dict[str, dict[str, Any]]
    corpus: Path

    def run(self, recipe: str, out: Path, when: When, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        """How it ended (0 or minus the signal), and how much happened in each stage."""
        request = {
            "config": {**self.configs[recipe], **options},
            "corpus": str(self.corpus),
            "out": str(out),
            "when": when,
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def trainings(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_documents: list[Document]
) -> Iterator[Trainings]:
    folder = tmp_path_factory.mktemp("killed")
    corpus, questions = folder / "corpus", folder / "own.jsonl"
    corpus.mkdir()
    lines = []
    for document in tiny_documents:
        (corpus / document.source).write_text(document.text)
        found = FACT.match(document.text)
        assert found is not None
        where, who, what = found.groups()
        for end in ("?", "??", ", then?"):
            for text, answer in ((f"Who found {what} in {where}", who), ("Did they", "yes")):
                row = {"question": f"{text} {who}{end}", "answer": answer}
                lines.append(json.dumps({**row, "doc_ids": [document.source]}))
    questions.write_text("\n".join(lines))
    paper = {
        "recipe": "paper",
        "base_model": str(tiny_folder),
        "device": "cpu",
        "dtype": "float32",
        "window": 48,
        "neighbors": 8,
        "distill": {"epochs": 3, "batch_rows": 256, "learning_rate": 1e-2},
    }
    study = {"recipe": "self-study", "encoder": "pooled", "questions": [str(questions)]}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "dying.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Trainings(server, {"paper": paper, "self-study": paper | study}, corpus)


@dataclass
class Whole:
    """A training that nothing interrupted, and how much happened in it."""

    out: Path
    counts: dict[str, int]


@pytest.fixture(scope="module")
def whole(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    found = {}
    for recipe in trainings.configs:
        out = tmp_path_factory.mktemp("whole") / recipe
        answer = trainings.run(recipe, out, {"count": True})
        assert answer["exit"] == 0
        found[recipe] = Whole(out, answer["counts"])
    return found


def moment_in(stage: str, whole: Whole, dice: random.Random) -> When:
    return {"stage": stage, "event": dice.randint(1, whole.counts[stage])}


def any_moment(whole: Whole, dice: random.Random) -> When:
    stage = dice.choice([s for s in whole.counts if s not in ("renames", "end")])
    kinds = [
        moment_in(stage, whole, dice),
        {"rename": dice.randint(1, whole.counts["renames"])},
        {"seconds": dice.uniform(0.0, 0.5)},
    ]
    return dice.choice(kinds)


def assert_same(out: Path, whole: Whole, recipe: str) -> None:
    """Byte for byte the same targets and memory, and nothing half-written beside them."""
    for name in (WEIGHTS, CONFIG):
        assert (out / name).read_bytes() == (whole.out / name).read_bytes(), name
    verify_files(out, load_manifest(out))
    for stage in MADE[recipe]:
        arrays = sorted(p.name for p in (whole.out / WORK / stage).glob("*.npy"))
        assert sorted(p.name for p in (out / WORK / stage).glob("*.npy")) == arrays
        for name in arrays:
            made = (out / WORK / stage / name).read_bytes()
            assert made == (whole.out / WORK / stage / name).read_bytes(), (stage, name)
    assert not (out / WORK / OWNER).exists()


def check_resumed(
    trainings: Trainings, whole: Whole, recipe: str, out: Path, kills: list[When]
) -> int:
    """Kill a run again and again, then let it end. The number of times that it died."""
    deaths = 0
    for when in kills:
        ended = trainings.run(recipe, out, when)["exit"]
        assert ended in (0, -signal.SIGKILL), when
        deaths += ended != 0
    assert trainings.run(recipe, out, {})["exit"] == 0, kills
    assert_same(out, whole, recipe)
    return deaths


PLACES = [
    *(("paper", stage) for stage in PAPER),
    *(("self-study", stage) for stage in SELF_STUDY),
]


FULL = [p for p in PLACES if p[1] not in ("start", "base") and p != ("self-study", "refit")]


@pytest.mark.parametrize(("recipe", "stage"), PLACES)
def test_killed_at_a_random_moment_of_a_stage(
    tmp_path: Path, trainings: Trainings, whole: dict[str, Whole], recipe: str, stage: str
) -> None:
    dice = random.Random(f"{recipe} {stage}")
    when = moment_in(stage, whole[recipe], dice)
    assert check_resumed(trainings, whole[recipe], recipe, tmp_path / "memory", [when]) == 1


@pytest.mark.parametrize("recipe", MADE)
def test_killed_at_random_moments_again_and_again(
    tmp_path: Path, trainings: Trainings, whole: dict[str, Whole], recipe: str
) -> None:
    dice = random.Random(recipe)
    torn = {"rename": dice.randint(1, whole[recipe].counts["renames"] // 2)}
    timed = {"seconds": dice.uniform(0.05, 0.15)}
    late = moment_in("save", whole[recipe], dice)
    kills: list[When] = [timed, torn, late]
    assert check_resumed(trainings, whole[recipe], recipe, tmp_path / "memory", kills) == 3


def test_killed_while_another_training_replaces_it(
    tmp_path: Path, trainings: Trainings, whole: dict[str, Whole]
) -> None:
    """The earlier memory is there and whole up to the moment in which the new one takes over."""
    dice = random.Random(0)
    for stage in ("datastore", "refit"):
        out = Path(shutil.copytree(whole["paper"].out, tmp_path / stage))
        # Not the last ones: another layer may take an epoch less.
        when = {"stage": stage, "event": dice.randint(1, whole["paper"].counts[stage] // 3)}
        assert trainings.run("paper", out, when, layer=1)["exit"] == -signal.SIGKILL
        verify_files(out, load_manifest(out))
        assert (out / WEIGHTS).read_bytes() == (whole["paper"].out / WEIGHTS).read_bytes()
        # What was there before is not taken for what is half removed.
        assert trainings.run("paper", out, {})["exit"] == 0
        (out / MANIFEST).unlink()
        assert trainings.run("paper", out, {})["exit"] == 0
        assert_same(out, whole["paper"], "paper")


@pytest.mark.parametrize(("recipe", "stage"), FULL)
def test_a_disk_that_is_full_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, trainings: Trainings, whole: dict[str, Whole], recipe: str, stage: str
) -> None:
    answer = trainings.run(recipe, tmp_path / "memory", {"full": stage})
    assert (answer["exit"], answer["counts"].get("refused")) == (1, 1)
    assert trainings.run(recipe, tmp_path / "memory", {})["exit"] == 0
    assert_same(tmp_path / "memory", whole[recipe], recipe)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_killed_at_many_moments(
    tmp_path: Path, trainings: Trainings, whole: dict[str, Whole], seed: int
) -> None:
    dice = random.Random(seed)
    recipe = dice.choice(list(MADE))
    kills = [any_moment(whole[recipe], dice) for _ in range(dice.randint(1, 4))]
    check_resumed(trainings, whole[recipe], recipe, tmp_path / "memory", kills)
