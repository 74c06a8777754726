"""What a refusal says, word for word: what was given, what is allowed, what to do.

And the last value that is not refused, on each side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlpmem_rag import integrity
from mlpmem_rag.artifact import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    Manifest,
    MemorySettings,
    check_base,
    file_problems,
    load_manifest,
    load_memory,
    load_settings,
    parse_reference,
    save_artifact,
)
from mlpmem_rag.backbone import BaseReference
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.integrity import Verify, problems, read_json, verify_mode
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.tensors import (
    check_drafts,
    check_headers,
    check_tokens,
    parse_shape,
    read_headers,
    read_tensors,
)

SHAPE = MemoryConfig(8, 12, 1, "silu", gated=True, vocab_size=5)
BASE = BaseReference("hub/base", None, "w" * 20, "t" * 20, 30)


def refusal(call: Callable[..., object], *given: object, **options: object) -> str:
    with pytest.raises((ArtifactError, ConfigError, ValueError)) as caught:
        call(*given, **options)
    return str(caught.value)


def entry(content: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


# Files and their manifest.


def test_each_problem_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good", "longer", "other", "edited", "closed", "odd"):
        (tmp_path / name).write_bytes(b"12345")
    read = integrity.sha256

    def read_if_allowed(path: Path) -> str:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        if path.name == "odd":
            raise OSError("it went away")
        return read(path)

    monkeypatch.setattr(integrity, "sha256", read_if_allowed)
    listed = {
        "good": entry(b"12345"),
        "longer": entry(b"1234"),
        "other": entry(b"54321"),
        "edited": entry(b"1"),
        "gone": entry(b"1"),
        "gone-too": entry(b"1"),
        "../up": entry(b"1"),
        "none": {},
        "closed": entry(b"12345"),
        "odd": entry(b"12345"),
    }
    said = list(
        problems(
            tmp_path,
            listed,
            required=("card", "good"),
            editable=("edited", "gone-too"),
            how=Verify.full,
        )
    )
    found, expected = (hashlib.sha256(text).hexdigest()[:16] for text in (b"12345", b"54321"))
    assert said == [
        f"the manifest of {tmp_path} lists no card; train again",
        f"{tmp_path}/longer was changed or is damaged: it has 5 bytes, the manifest says 4; train "
        "again or copy the folder anew",
        f"{tmp_path}/other was changed or is damaged: its SHA-256 is {found}…, the manifest says "
        f"{expected}…; train again or copy the folder anew",
        f"{tmp_path}/gone is missing; train again or copy the folder anew",
        f"{tmp_path}/gone-too is missing; train again or copy the folder anew",
        f"the manifest of {tmp_path} lists '../up', which is not in the folder",
        f"the manifest of {tmp_path} says no SHA-256 and size of none; train again",
        f"{tmp_path}/closed cannot be read (Permission denied)",
        f"{tmp_path}/odd cannot be read (it went away)",
    ]


@pytest.mark.parametrize(("small", "said"), [(5, 1), (4, 0)])
def test_the_fast_check_reads_files_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int, said: int
) -> None:
    monkeypatch.setattr(integrity, "SMALL_BYTES", small)
    (tmp_path / "a").write_bytes(b"12345")
    listed = {"a": entry(b"54321")}
    assert len(list(problems(tmp_path, listed, required=(), editable=(), how=Verify.fast))) == said
    assert len(list(problems(tmp_path, listed, required=(), editable=(), how=Verify.full))) == 1


def test_an_empty_file_may_be_listed(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    listed = {"a": entry(b"")}
    assert not list(problems(tmp_path, listed, required=(), editable=(), how=Verify.full))


def test_each_problem_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    monkeypatch.setattr(integrity, "MAX_JSON_BYTES", 9)
    for content, said in {
        '{"a": 10}\n': f"{path} has 10 bytes, allowed are 9",
        "nothing": f"{path} is damaged (Expecting value: line 1 column 1 (char 0)); train again",
        "[1]": f"{path} is damaged (no JSON object); train again",
    }.items():
        path.write_text(content)
        assert refusal(read_json, path) == said
    path.write_text('{"a": 10}')
    assert read_json(path) == {"a": 10}
    path.write_bytes('{"ü":1}'.encode())
    assert read_json(path) == {"ü": 1}
    path.unlink()
    assert refusal(read_json, path) == f"{path} cannot be read (No such file or directory)"


def test_a_way_to_verify_that_there_is_not() -> None:
    assert refusal(verify_mode, "quick") == "verify = 'quick': allowed are full, fast"


# Shapes.


LIMITS = {
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "num_blocks": (0, 2**12),
    "vocab_size": (1, 2**24),
    "query_size": (0, 2**20),
    "num_questions": (0, 2**24),
    "draft_size": (0, 2**12),
    "inner_size": (0, 2**20),
}


@pytest.mark.parametrize("name", LIMITS)
def test_sizes_from_the_first_to_the_last_that_is_allowed(name: str) -> None:
    low, high = LIMITS[name]
    for value in (low, high):
        assert getattr(parse_shape({**asdict(SHAPE), name: value}), name) == value
    for other in (low - 1, high + 1, True, float(low)):
        assert refusal(parse_shape, {**asdict(SHAPE), name: other}) == (
            f"memory.{name} is {other!r}, allowed are {low} to {high}"
        )


@pytest.mark.parametrize("name", ["hidden_scale", "norm_eps"])
def test_scales_are_above_zero(name: str) -> None:
    for scale in (1, 1e-300, 1e300):
        assert getattr(parse_shape({**asdict(SHAPE), name: scale}), name) == scale
    refused: list[object] = [0, -1.0, math.inf, math.nan, True, "1"]
    for value in refused:
        assert refusal(parse_shape, {**asdict(SHAPE), name: value}) == (
            f"memory.{name} is {value!r}, allowed are numbers above 0"
        )


@pytest.mark.parametrize("other", [{"gated": 1}, {"activation": None}])
def test_kinds_of_blocks(other: dict[str, object]) -> None:
    gated, activation = other.get("gated", True), other.get("activation", "silu")
    assert refusal(parse_shape, asdict(SHAPE) | other) == (
        f"memory.gated {gated!r}, memory.activation {activation!r}"
    )


# Tensors.


def write(folder: Path, changes: dict[str, Tensor | None], prefix: str = "") -> Path:
    tensors: dict[str, Tensor | None] = {
        **Memory(SHAPE).state_dict(),
        "corpus_tokens": torch.arange(5),
        **changes,
    }
    path = folder / WEIGHTS
    kept = {prefix + name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file({**kept, "other.weight": torch.ones(2)}, path)
    return path


def opened(path: Path, prefix: str = "", shape: MemoryConfig = SHAPE) -> dict[str, Tensor]:
    headers = read_headers([path], prefix)
    return read_tensors(headers, list(check_headers(headers, shape, path)), prefix)


@pytest.mark.parametrize("prefix", ["", "memory."])
def test_tensors_are_those_that_were_written(tmp_path: Path, prefix: str) -> None:
    head = torch.arange(40.0).view(5, 8)
    path = write(tmp_path, {"lm_head.weight": head}, prefix)
    assert opened(path, prefix).keys() == Memory(SHAPE).state_dict().keys()
    assert torch.equal(opened(path, prefix)["lm_head.weight"], head)
    memory = load_memory(tmp_path, SHAPE, inside=bool(prefix))
    assert torch.equal(memory.lm_head.weight, head)
    assert not memory.training


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lm_head.weight": torch.zeros(5, 9)},
            "tensor lm_head.weight has shape (5, 9), the configuration says (5, 8); train again",
        ),
        (
            {"lm_head.weight": None},
            "tensor lm_head.weight has shape None, the configuration says (5, 8); train again",
        ),
        (
            {"lm_head.weight": torch.zeros(5, 8, dtype=torch.int64)},
            "tensor lm_head.weight holds I64, allowed are F16, BF16, F32, F64; train again",
        ),
        (
            {"corpus_tokens": torch.arange(5.0)},
            "tensor corpus_tokens holds F32, allowed are I64; train again",
        ),
        (
            {"lm_head.weight": torch.full((5, 8), torch.inf)},
            "tensor lm_head.weight is not finite; train again",
        ),
    ],
)
def test_each_problem_of_a_tensor(
    tmp_path: Path, changes: dict[str, Tensor | None], said: str
) -> None:
    path = write(tmp_path, changes)
    assert refusal(opened, path) == f"{path}: {said}"


def test_blocks_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, {})
    tensors = len(read_headers([path], ""))
    for blocks, said in {
        tensors: "tensor layers.1.",
        tensors + 1: f"{tensors} tensors for {tensors + 1} blocks; train again",
    }.items():
        shape = parse_shape({**asdict(SHAPE), "num_blocks": blocks})
        assert refusal(opened, path, shape=shape).startswith(f"{path}: {said}")


def test_an_activation_that_there_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, {})
    shape = parse_shape({**asdict(SHAPE), "activation": "no such"})
    said = refusal(opened, path, shape=shape)
    assert said.startswith(
        f"{tmp_path}/config.json describes a memory that cannot be built (KeyError: "
    )
    assert said.endswith("); train again")


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(b"x" * 100)
    said = refusal(read_headers, [path], "")
    assert said.startswith(f"{path} cannot be read (")
    assert said.endswith("); train again")


def test_token_ids_from_the_first_to_the_last(tmp_path: Path) -> None:
    check_tokens(torch.tensor([0, 29]), tmp_path, 30)
    check_tokens(torch.tensor([7]), tmp_path, None)
    check_tokens(torch.tensor([0, 10**6]), tmp_path, None)
    for ids in ([-1, 3], [3, 3], [4, 3], [0, 5, 5]):
        assert refusal(check_tokens, torch.tensor(ids), tmp_path, 30) == (
            f"{tmp_path}: corpus_tokens are not ascending token ids; train again"
        )
    assert refusal(check_tokens, torch.tensor([0, 30]), tmp_path, 30) == (
        f"{tmp_path}: corpus_tokens go up to 30, the base model has 30 tokens; train again"
    )


def test_drafts_from_none_to_the_last_token(tmp_path: Path) -> None:
    check_drafts(torch.tensor([[-1, 29]]), tmp_path, 30)
    check_drafts(torch.tensor([[10**6]]), tmp_path, None)
    check_drafts(torch.zeros(0, 8), tmp_path, 30)
    for ids, low, high in (([[-2, 3]], -2, 3), ([[5], [30]], 5, 30)):
        assert refusal(check_drafts, torch.tensor(ids), tmp_path, 30) == (
            f"{tmp_path}: drafts go from {low} to {high}, allowed are the base model's 30 token "
            "ids, and -1 for none; train again"
        )


# A memory's own files.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    memory = Memory(SHAPE)
    memory.corpus_tokens = torch.arange(5)
    manifest = Manifest(FORMAT_VERSION, "2020", "r", {}, {}, {}, {})
    save_artifact(
        tmp_path / "m", MemorySettings(BASE, 2, SHAPE, 0.5, 1.0), memory, manifest, "# Card\n"
    )
    return tmp_path / "m"


def change(path: Path, **values: object) -> None:
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != ...}))


def test_each_problem_of_the_settings(folder: Path) -> None:
    path, good = folder / CONFIG, (folder / CONFIG).read_text()
    range_ = (
        f"{path} has lambda {{}} (allowed 0 to 1) and temperature {{}} (allowed above 0); "
        "train again"
    )
    for values, said in (
        ({"memory_lambda": 1.5}, range_.format(1.5, 1.0)),
        ({"memory_lambda": -0.5}, range_.format(-0.5, 1.0)),
        ({"memory_temperature": 0}, range_.format(0.5, 0.0)),
        ({"memory_temperature": math.inf}, range_.format(0.5, "inf")),
        ({"layer": None}, f"{path} is damaged (TypeError: "),
        (
            {"model_type": "llama"},
            f"{path} describes a 'llama', not a 'mlpmem'; give a folder written by mlpmem-rag "
            "train",
        ),
        (
            {"gate": {"asked": [math.nan], "plain": [0.0]}},
            f"{path} is damaged (ValueError: weights that are not finite); train again",
        ),
    ):
        change(path, **values)
        assert refusal(load_settings, folder).startswith(said)
        path.write_text(good)
    for lambda_, temperature in ((0, 1e-9), (1, 1e9)):
        change(path, memory_lambda=lambda_, memory_temperature=temperature)
        found = load_settings(folder)
        assert (found.memory_lambda, found.memory_temperature) == (lambda_, temperature)


@pytest.mark.parametrize("name", ["name", "weights", "tokenizer", "revision", "vocab_size"])
def test_each_field_of_the_base_is_of_its_kind(name: str) -> None:
    assert parse_reference(asdict(BASE)) == BASE
    said = refusal(parse_reference, {**asdict(BASE), name: 3.5})
    assert said == "base: a field of another kind"


def test_each_problem_of_the_manifest(folder: Path) -> None:
    path, good = folder / MANIFEST, (folder / MANIFEST).read_text()
    kinds = {
        "str": ("created", "run"),
        "dict": ("corpus", "training", "figures", "versions", "files"),
    }
    cases: list[tuple[Mapping[str, object], str]] = [
        (
            {"format_version": 9},
            f"{path} has format version 9, this program reads {FORMAT_VERSION}; update mlpmem-rag "
            "or train again",
        ),
        (
            {"format_version": ...},
            f"{path} has format version None, this program reads {FORMAT_VERSION}; update "
            "mlpmem-rag or train again",
        ),
        ({"run": ...}, f"{path} is damaged ("),
        *(
            ({name: 3}, f"{path} is damaged ({name}: no {kind}); train again")
            for kind, names in kinds.items()
            for name in names
        ),
    ]
    for values, said in cases:
        change(path, **values)
        assert refusal(load_manifest, folder).startswith(said)
        path.write_text(good)
    path.unlink()
    assert refusal(load_manifest, folder) == (
        f"{folder} is not a memory: it has no {MANIFEST}; give a folder written by mlpmem-rag train"
    )


def test_a_manifest_lists_settings_card_and_weights(folder: Path) -> None:
    found = load_manifest(folder)
    assert list(found.files) == [CONFIG, WEIGHTS, CARD]
    assert not list(file_problems(folder, found))
    found.files.clear()
    assert list(file_problems(folder, found)) == [
        f"the manifest of {folder} lists no {name}; train again" for name in (WEIGHTS, CONFIG, CARD)
    ]


@pytest.mark.parametrize("name", ["vocab_size", "tokenizer", "weights"])
def test_another_base(name: str) -> None:
    settings = MemorySettings(BASE, 2, SHAPE, 0.5, 1.0)
    check_base(settings, replace(BASE, name="moved"))
    value = 31 if name == "vocab_size" else "x" * 20
    other = BaseReference(**{**asdict(BASE), "name": "hub/other", name: value})
    assert refusal(check_base, settings, other) == (
        f"this memory was trained on 'hub/base' ({name} {str(getattr(BASE, name))[:16]}), not on "
        f"'hub/other' ({name} {str(value)[:16]}); load it with the base model it belongs to, or "
        "train one for this base"
    )
