"""Copies to hand on: the same answers in every number format, with and without the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from mlpmem_rag.artifact import (
    CARD,
    CONFIG,
    ENCODER,
    MANIFEST,
    WEIGHTS,
    WORK,
    load_manifest,
    load_memory,
    load_settings,
    save_artifact,
)
from mlpmem_rag.backbone import load_backbone
from mlpmem_rag.errors import ArtifactError, ConfigError, OutputError
from mlpmem_rag.export import export_memory
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.output import output_folder

IDS = torch.tensor([[0, 40, 81, 122, 163, 204]])


def logits(folder: Path, dtype: str) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, query_vector=torch.full((1, 32), 32**-0.5)).logits
    return out


@pytest.fixture
def base_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A base model in bfloat16, which a test may take away."""
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    shutil.copytree(tiny_folder, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def memory(
    tmp_path: Path,
    base_folder: Path,
    sentence_folder: Path,
    memory_on: Callable[..., MLPMemForCausalLM],
) -> Path:
    """As training leaves it: float32 weights beside a bfloat16 base, and `work/`."""
    backbone = load_backbone(str(base_folder), device="cpu", dtype="float32")
    model = memory_on(backbone, query_size=32, encoder=str(sentence_folder))
    folder = tmp_path / "memory"
    model.save_pretrained(folder)
    (folder / CARD).write_text("# A card\n")
    (folder / WORK).mkdir()
    (folder / WORK / "questions.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_its_base_inside_it_answers_the_same(
    tmp_path: Path, memory: Path, base_folder: Path, dtype: str
) -> None:
    expected = logits(memory, dtype)
    export_memory(memory, tmp_path / "whole", merge_base=True)
    shutil.rmtree(base_folder)
    assert torch.equal(logits(tmp_path / "whole", dtype), expected)
    assert (tmp_path / "whole" / CARD).read_text() == "# A card\n"
    assert (tmp_path / "whole" / ENCODER).is_dir()
    assert not (tmp_path / "whole" / WORK).exists()


def test_each_weight_keeps_its_number_format(tmp_path: Path, memory: Path) -> None:
    export_memory(memory, tmp_path / "whole", merge_base=True)
    with safe_open(tmp_path / "whole" / WEIGHTS, "pt") as file:
        kinds = {
            name.split(".")[0]: str(file.get_slice(name).get_dtype())
            for name in file.keys()  # noqa: SIM118
            if name.endswith("weight")
        }
    assert kinds == {"base": "BF16", "memory": "F32"}


def test_there_and_back_it_is_the_same_memory(tmp_path: Path, memory: Path) -> None:
    export_memory(memory, tmp_path / "whole", merge_base=True)
    export_memory(tmp_path / "whole", tmp_path / "back", merge_base=False)
    assert {p.name for p in (tmp_path / "back").iterdir()} == {CONFIG, WEIGHTS, MANIFEST, CARD}
    for name in (CONFIG, WEIGHTS, CARD):
        assert (tmp_path / "back" / name).read_bytes() == (memory / name).read_bytes()


def test_an_encoder_that_has_read_the_corpus_goes_everywhere(
    tmp_path: Path, memory: Path, sentence_folder: Path
) -> None:
    settings = load_settings(memory)
    recalling = replace(settings, memory=replace(settings.memory, recalls=True))
    weights = load_memory(memory, settings.memory)
    own = tmp_path / "own"
    save_artifact(own, recalling, weights, load_manifest(memory), "# Card\n", sentence_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(own)
    model.save_pretrained(tmp_path / "saved")
    export_memory(own, tmp_path / "whole", merge_base=True)
    export_memory(tmp_path / "whole", tmp_path / "back", merge_base=False)
    for name in ("saved", "back"):
        listed = load_manifest(tmp_path / name).encoder_files
        assert any(file.endswith(".safetensors") for file in listed)
        assert all((tmp_path / name / file).is_file() for file in listed)
    # Another memory at the same place takes it away.
    save_artifact(own, settings, weights, load_manifest(memory), "# Card\n")
    assert not load_manifest(own).encoder_files
    assert not list((own / ENCODER).rglob("*.safetensors"))


@pytest.mark.parametrize("merge_base", [False, True])
def test_a_copy_in_the_same_form_has_the_same_files(
    tmp_path: Path, memory: Path, merge_base: bool
) -> None:
    if merge_base:
        export_memory(memory, tmp_path / "whole", merge_base=True)
        memory = tmp_path / "whole"
    out = tmp_path / "copy"
    export_memory(memory, out, merge_base=merge_base)
    (out / "mine.txt").write_text("stays")
    export_memory(memory, out, merge_base=merge_base)
    listed = json.loads((memory / MANIFEST).read_text())["files"]
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == {*listed, MANIFEST, "mine.txt"}
    for name in (*listed, MANIFEST):
        assert (out / name).read_bytes() == (memory / name).read_bytes()


def test_one_form_replaces_the_other(tmp_path: Path, memory: Path) -> None:
    for merge_base in (True, False):
        export_memory(memory, tmp_path / "out", merge_base=merge_base)
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert found == {CONFIG, WEIGHTS, MANIFEST, CARD}


def test_a_base_model_that_moved_can_be_named(
    tmp_path: Path, memory: Path, base_folder: Path
) -> None:
    expected = logits(memory, "float32")
    moved = base_folder.rename(tmp_path / "moved")
    export_memory(memory, tmp_path / "whole", merge_base=True, base_model=str(moved))
    assert torch.equal(logits(tmp_path / "whole", "float32"), expected)


def test_what_cannot_be_copied_is_refused(tmp_path: Path, memory: Path) -> None:
    with pytest.raises(ConfigError, match="the memory itself"):
        export_memory(memory, memory / ".." / "memory", merge_base=True)
    manifest = json.loads((memory / MANIFEST).read_text())
    (tmp_path / "secret").write_text("…")
    outside = {**manifest, "files": {**manifest["files"], "../secret": {"sha256": "0", "bytes": 1}}}
    (memory / MANIFEST).write_text(json.dumps(outside))
    with pytest.raises(ArtifactError, match=r"lists '\.\./secret', which is not in the folder"):
        export_memory(memory, tmp_path / "copy", merge_base=False)
    (memory / MANIFEST).write_text(json.dumps(manifest))
    (memory / WEIGHTS).write_bytes((memory / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="was changed or is damaged"):
        export_memory(memory, tmp_path / "copy", merge_base=False)
    assert not (tmp_path / "copy").exists()


def test_a_copy_replaces_a_memory_and_nothing_else(tmp_path: Path, memory: Path) -> None:
    other = tmp_path / "project"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"holds no memory \(README.md\)"):
        export_memory(memory, other, merge_base=False)
    assert (other / "README.md").read_text() == "mine"
    copy = tmp_path / "copy"
    for _ in range(2):
        export_memory(memory, copy, merge_base=False)
    with (
        output_folder(copy),
        pytest.raises(OutputError, match="another run is writing"),
    ):
        export_memory(memory, copy, merge_base=False)
