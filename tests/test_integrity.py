"""Every file of a memory, every kind of damage: refused, with the file named."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlpmem_rag import integrity
from mlpmem_rag.artifact import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    load_manifest,
    load_memory,
    load_settings,
)
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.checkpoint import open_folder
from mlpmem_rag.configuration import MemoryStackConfig
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.integrity import Verify, is_inside, parse_entry, sha256, verify_mode
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.tensors import is_finite, parse_shape
from mlpmem_rag.verification import verify_folder

ALONE = (CONFIG, WEIGHTS, CARD, MANIFEST)
MERGED = (*ALONE, "generation_config.json", "tokenizer.json", "tokenizer_config.json")
FOLDERS = {"alone": ALONE, "merged": MERGED}
FILES = [(kind, name) for kind, names in FOLDERS.items() for name in names]


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_backbone: Backbone,
    memory_on: Callable[..., MLPMemForCausalLM],
) -> Path:
    """A memory in both forms, and another one of the same shape."""
    folder = tmp_path_factory.mktemp("memories")
    for seed, kinds in enumerate((["alone", "merged"], ["alone-other", "merged-other"])):
        model = memory_on(tiny_backbone, seed=seed)
        for kind in kinds:
            model.save_pretrained(folder / kind, merge_base=kind.startswith("merged"))
    return folder


@pytest.fixture
def copy(tmp_path: Path, pristine: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(pristine / kind, tmp_path / kind))


def flip(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    changed[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit": flip,
    "cut": lambda content, dice: content[: dice.randrange(1, len(content))],
    "empty": lambda content, dice: b"",
    "longer": lambda content, dice: content + dice.randbytes(9),
    "zeroed": lambda content, dice: bytes(len(content)),
    "noise": lambda content, dice: dice.randbytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("kind", "name"), [f for f in FILES if f[1] not in (CARD, MANIFEST)])
def test_a_damaged_file_is_refused_by_name(
    copy: Callable[[str], Path], kind: str, name: str, damage: str
) -> None:
    folder = copy(kind)
    assert set(load_manifest(folder).files) == set(FOLDERS[kind]) - {MANIFEST}
    for seed in range(5):
        content = (folder / name).read_bytes()
        changed = DAMAGES[damage](content, random.Random(seed))
        (folder / name).write_bytes(changed)
        said = "SHA-256 is" if len(changed) == len(content) else f"it has {len(changed)} bytes"
        with pytest.raises(ArtifactError, match=rf"{folder / name} was changed .*{said}"):
            open_folder(folder)
        with pytest.raises(ArtifactError, match=str(folder / name)):
            open_folder(folder, Verify.fast)
        assert verify_folder(folder).problems[0].startswith(str(folder / name))
        (folder / name).write_bytes(content)
    open_folder(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "zeroed", "noise"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_damaged_manifest_is_refused_by_name(
    copy: Callable[[str], Path], kind: str, damage: str
) -> None:
    folder = copy(kind)
    content = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(DAMAGES[damage](content, random.Random(0)))
    with pytest.raises(ArtifactError, match=str(folder / MANIFEST)):
        open_folder(folder)


@pytest.mark.parametrize("how", Verify)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_missing_file_is_refused_by_name(
    copy: Callable[[str], Path], kind: str, name: str, how: Verify
) -> None:
    folder = copy(kind)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{folder}.*{name}"):
        open_folder(folder, how)
    (folder / name).mkdir()
    with pytest.raises(ArtifactError, match=f"{folder}.*{name}"):
        open_folder(folder, how)


@pytest.mark.parametrize(("kind", "name"), [f for f in FILES if f[1] in (CONFIG, WEIGHTS)])
def test_the_file_of_another_memory_is_refused_by_name(
    copy: Callable[[str], Path], pristine: Path, kind: str, name: str
) -> None:
    """Of the same size, as that of another run of the same training would be."""
    folder, other = copy(kind), pristine / f"{kind}-other" / name
    if name == WEIGHTS:
        assert other.stat().st_size == (folder / name).stat().st_size
        shutil.copyfile(other, folder / name)
    else:
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(text.replace('lambda": 0.4', 'lambda": 0.5'))
    with pytest.raises(ArtifactError, match=f"{folder / name} was changed.*SHA-256"):
        open_folder(folder)


@pytest.mark.parametrize("kind", FOLDERS)
def test_two_swapped_files_are_refused(copy: Callable[[str], Path], kind: str) -> None:
    folder = copy(kind)
    names = [name for name in FOLDERS[kind] if name not in (MANIFEST, CARD)]
    for first, second in itertools.pairwise(names):
        (folder / first).rename(folder / "held")
        (folder / second).rename(folder / first)
        (folder / "held").rename(folder / second)
        found = verify_folder(folder).problems
        assert {problem.split(" was ")[0] for problem in found} == {
            str(folder / name) for name in (first, second)
        }
        with pytest.raises(ArtifactError, match=r"was changed or is damaged"):
            open_folder(folder, Verify.fast)
        (folder / first).rename(folder / "held")
        (folder / second).rename(folder / first)
        (folder / "held").rename(folder / second)
    open_folder(folder)


def test_the_fast_check_reads_no_large_file(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says it does not find it does not find."""
    folder = copy("alone")
    monkeypatch.setattr(integrity, "SMALL_BYTES", (folder / WEIGHTS).stat().st_size - 1)
    (folder / WEIGHTS).write_bytes(flip((folder / WEIGHTS).read_bytes(), random.Random(3)))
    open_folder(folder, Verify.fast)
    with pytest.raises(ArtifactError, match=WEIGHTS):
        open_folder(folder)
    (folder / CONFIG).write_bytes(flip((folder / CONFIG).read_bytes(), random.Random(3)))
    with pytest.raises(ArtifactError, match=CONFIG):
        open_folder(folder, Verify.fast)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION - 1, None, "2", [2]])
@pytest.mark.parametrize("kind", FOLDERS)
def test_another_format_is_refused_with_both_versions(
    copy: Callable[[str], Path], kind: str, version: object
) -> None:
    folder = copy(kind)
    said = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**said, "format_version": version}))
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} has format .* reads {FORMAT_VERSION}"):
        open_folder(folder)


def test_loading_takes_the_mode_by_name(copy: Callable[[str], Path]) -> None:
    folder = copy("alone")
    with pytest.raises(ConfigError, match="verify = 'quick': allowed are full, fast"):
        MemoryModel.load(folder, verify="quick")
    assert [verify_mode(name) for name in ("full", "fast")] == list(Verify)


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_intact_is_found_so_without_the_base_model(
    copy: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpmem_rag.model.load_referenced", lambda *_, **__: pytest.fail("loaded"))
    found = verify_folder(copy(kind))
    assert (found.problems, found.how) == ((), Verify.full)


# A manifest of someone who means harm: checksums are right, the rest is not.


def forge(folder: Path, **files: object) -> None:
    said = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**said, "files": {**said["files"], **files}}))


def forge_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    kept = {**load_file(folder / WEIGHTS), **tensors}
    save_file({name: t for name, t in kept.items() if t is not None}, folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    forge(folder, **{WEIGHTS: {"sha256": sha256(folder / WEIGHTS), "bytes": size}})


OUTSIDE = [
    "../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "./config.json", "a//b", "a/",
    "C:\\secret", "c:secret", "\\\\server\\share", "..\\secret", "a\\..\\..\\b", "nul\x00byte",
    "line\nbreak", "half\ud800", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_folder_are_refused(copy: Callable[[str], Path], name: str) -> None:
    assert not is_inside(name)
    folder = copy("alone")
    (folder.parent / "secret").write_text("x")
    forge(folder, **{name: {"sha256": sha256(folder.parent / "secret"), "bytes": 1}})
    with pytest.raises(ArtifactError, match="which is not in the folder"):
        open_folder(folder)
    with pytest.raises(ArtifactError, match="a memory of a stack is named"):
        MemoryStackConfig(members={name: 1.0})


def test_names_below_the_folder_are_allowed() -> None:
    for name in ("a", "a/b.json", "..a", "encoder/1_Pooling/config.json", "Ærø (2).txt", "...."):
        assert is_inside(name)


@pytest.mark.parametrize(
    "entry",
    [
        None, 3, [], {}, "x", {"sha256": "a" * 64}, {"bytes": 3}, {"sha256": "a" * 64, "bytes": -1},
        {"sha256": "a" * 64, "bytes": True}, {"sha256": "a" * 64, "bytes": 1.0},
        {"sha256": "a" * 63, "bytes": 1}, {"sha256": "A" * 64, "bytes": 1},
        {"sha256": 3, "bytes": 1}, {"sha256": "a" * 64 + "\n", "bytes": 1},
    ],
)  # fmt: skip
def test_an_entry_that_says_nothing_is_refused(copy: Callable[[str], Path], entry: object) -> None:
    assert parse_entry(entry) is None
    folder = copy("alone")
    forge(folder, **{CONFIG: entry})
    with pytest.raises(ArtifactError, match=f"says no SHA-256 and size of {CONFIG}"):
        open_folder(folder)


@pytest.mark.parametrize("depth", [100_000])
def test_json_that_is_nested_too_deeply_is_refused(copy: Callable[[str], Path], depth: int) -> None:
    folder = copy("alone")
    (folder / MANIFEST).write_text("[" * depth)
    with pytest.raises(ArtifactError, match=f"{MANIFEST} is damaged"):
        open_folder(folder)


def test_json_that_is_too_large_is_not_read(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("alone")
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no space, but would take a terabyte to be read
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} has {2**40} bytes, allowed are"):
        open_folder(folder)


SHAPES = [
    ("num_blocks", 10**9), ("num_blocks", -1), ("num_blocks", 3.0), ("num_blocks", True),
    ("hidden_size", 2**40), ("hidden_size", 0), ("hidden_size", "32"), ("vocab_size", 10**12),
    ("hidden_scale", 0.0), ("hidden_scale", float("nan")), ("hidden_scale", float("inf")),
    ("norm_eps", -1.0), ("gated", 1), ("activation", 3), ("query_size", -5), ("num_questions", -1),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SHAPES)
@pytest.mark.parametrize("kind", FOLDERS)
def test_shapes_out_of_all_bounds_are_refused_before_anything_is_made(
    copy: Callable[[str], Path], kind: str, field: str, value: object
) -> None:
    folder = copy(kind)
    config = json.loads((folder / CONFIG).read_text())
    config["memory"][field] = value
    (folder / CONFIG).write_text(json.dumps(config))
    size = (folder / CONFIG).stat().st_size
    forge(folder, **{CONFIG: {"sha256": sha256(folder / CONFIG), "bytes": size}})
    (problem,) = verify_folder(folder).problems
    assert f"{folder / CONFIG} is damaged" in problem
    assert f"memory.{field}" in problem
    with pytest.raises(ValueError, match=field):
        parse_shape(config["memory"])


def test_more_blocks_than_tensors_are_refused_before_they_are_made(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("alone")
    settings = load_settings(folder)
    monkeypatch.setattr("mlpmem_rag.tensors.Memory", lambda _: pytest.fail("made"))
    shape = parse_shape({**vars(settings.memory), "num_blocks": 4096})
    with pytest.raises(ArtifactError, match="tensors for 4096 blocks"):
        load_memory(folder, shape)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.arange(90).flip(0), "not ascending token ids"),
        (torch.zeros(90, dtype=torch.int64), "not ascending token ids"),
        (torch.arange(90) - 1, "not ascending token ids"),
        (torch.arange(90) + 211, "go up to 300, the base model has 300 tokens"),
        (torch.arange(90, dtype=torch.int32), "holds I32, allowed are I64"),
        (torch.arange(90.0), "holds F32, allowed are I64"),
        (torch.arange(90).reshape(9, 10), r"has shape \(9, 10\)"),
        (None, "has shape None"),
    ],
)
def test_token_ids_that_cannot_be_are_refused(
    copy: Callable[[str], Path], tensor: torch.Tensor | None, said: str
) -> None:
    folder = copy("alone")
    forge_weights(folder, corpus_tokens=tensor)
    with pytest.raises(ArtifactError, match=said):
        MemoryModel.load(folder, device="cpu")
    assert len(verify_folder(folder).problems) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_single_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((400, 400), 3.0, dtype=dtype)
    assert is_finite(tensor), "although the sum of all is beyond half precision"
    tensor[123, 45] = value
    assert not is_finite(tensor)
    assert is_finite(torch.empty((0, 7), dtype=dtype))


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_memory_inside_is_checked_as_one_alone_is(copy: Callable[[str], Path], kind: str) -> None:
    """transformers would make up the missing tensor."""
    folder = copy(kind)
    prefix = "memory." if kind == "merged" else ""
    forge_weights(folder, **{f"{prefix}lm_head.weight": None})
    with pytest.raises(ArtifactError, match=r"tensor lm_head.weight has shape None"):
        MemoryModel.load(folder, device="cpu")
    forge_weights(folder, **{f"{prefix}lm_head.weight": torch.full((90, 32), torch.nan)})
    with pytest.raises(ArtifactError, match=r"tensor lm_head.weight is not finite"):
        MemoryModel.load(folder, device="cpu")
    forge_weights(folder, **{f"{prefix}lm_head.weight": torch.ones(90, 32, dtype=torch.int64)})
    with pytest.raises(ArtifactError, match=r"lm_head.weight holds I64, allowed are F16"):
        MemoryModel.load(folder, device="cpu")


@pytest.mark.parametrize("kind", ["alone", "merged"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("memory_temperature", 0.0),
        ("memory_temperature", "a"),
        ("memory_lambda", 3.0),
        ("gate", {"scale": "x"}),
        ("confidence", {"weights": ["x"]}),
        ("base", {"name": "only"}),
    ],
)
def test_settings_are_checked_in_both_forms(
    copy: Callable[[str], Path], kind: str, setting: str, value: object
) -> None:
    folder = copy(kind)
    reseal(folder, **{setting: value})
    assert verify_folder(folder).problems
    with pytest.raises(ArtifactError, match=CONFIG):
        MLPMemForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layer", 99),
        ("base_config", {"model_type": "no such"}),
        ("base_config", "x"),
        ("base_config", {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "a--b.C"}}),
    ],
)
def test_a_base_model_inside_is_one_that_transformers_knows(
    copy: Callable[[str], Path], setting: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks to run code"))
    folder = copy("merged")
    reseal(folder, **{setting: value})
    with pytest.raises((ArtifactError, ConfigError)):
        MLPMemForCausalLM.from_pretrained(folder)
    if "auto_map" not in str(value):  # whether there is such a class shows when it is made
        assert verify_folder(folder).problems


def reseal(folder: Path, **settings: object) -> None:
    """Change settings, and the checksums with them."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    size = (folder / CONFIG).stat().st_size
    forge(folder, **{CONFIG: {"sha256": sha256(folder / CONFIG), "bytes": size}})
