"""The memory folder: what is saved comes back, and what was changed is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mlpmem_rag import artifact
from mlpmem_rag.artifact import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    WORK,
    Manifest,
    MemorySettings,
    load_manifest,
    load_memory,
    load_settings,
    save_artifact,
    verify_files,
)
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.confidence import Confidence
from mlpmem_rag.errors import ArtifactError, BaseModelError
from mlpmem_rag.gate import Gate
from mlpmem_rag.integrity import sha256
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import attach_memory, load_model

FILES = (CONFIG, WEIGHTS, MANIFEST, CARD)
MAPS = Path("/proc/self/maps")
IDS = torch.tensor([[0, 40, 81, 122, 163, 204]])


def random_memory(backbone: Backbone, seed: int = 0) -> tuple[MemorySettings, Memory]:
    config = MemoryConfig(backbone.hidden_size, 24, 1, "silu", gated=True, vocab_size=50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        memory = Memory(config).requires_grad_(False)
    memory.corpus_tokens = torch.arange(seed + 5, seed + 55)
    lambda_ = 0.4 + seed / 100
    return MemorySettings(backbone.reference, backbone.layer, config, lambda_, 1.3), memory


def manifest() -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        created="2020-02-02T02:02:02+00:00",
        run="r",
        corpus={"documents": 3},
        training={"seed": 0, "tau": None},
        figures={"seconds": {"distil": 1.5}},
        versions={"torch": "2"},
    )


def save(folder: Path, backbone: Backbone, seed: int = 0) -> None:
    settings, memory = random_memory(backbone, seed)
    save_artifact(folder, settings, memory, manifest(), f"# Card {seed}\n")


def logits(folder: Path, base_model: str | None = None) -> Tensor:
    model, _, _ = load_model(folder, base_model=base_model, device="cpu", dtype="float32")
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and its checksum too, so that only what it says can be wrong."""
    (folder / name).write_bytes(content)
    said = json.loads((folder / MANIFEST).read_text())
    said["files"][name] = {"sha256": sha256(folder / name), "bytes": len(content)}
    (folder / MANIFEST).write_text(json.dumps(said))


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    rewrite(folder, CONFIG, json.dumps(config | changes).encode())


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "changed")
    rewrite(folder, WEIGHTS, (folder / "changed").read_bytes())
    (folder / "changed").unlink()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    """A saved memory that no test changes."""
    folder = tmp_path_factory.mktemp("memories") / "memory"
    save(folder, tiny_backbone)
    return folder


@pytest.fixture
def folder(tmp_path: Path, pristine: Path) -> Path:
    """A saved memory."""
    return Path(shutil.copytree(pristine, tmp_path / "memory"))


@pytest.fixture
def no_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model is too much work to be loaded for a memory that is refused anyway."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("the base model was loaded")

    monkeypatch.setattr("mlpmem_rag.model.load_referenced", fail)


# What is saved comes back.


def test_a_loaded_memory_gives_identical_logits(folder: Path, tiny_backbone: Backbone) -> None:
    settings, memory = random_memory(tiny_backbone)
    model = attach_memory(tiny_backbone, memory, settings)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        base = model(input_ids=IDS, memory_lambda=0.0).logits.log_softmax(-1)
    assert torch.equal(logits(folder), expected)
    assert not torch.allclose(expected, base)


@pytest.mark.skipif(not MAPS.is_file(), reason="this system does not list what is mapped")
def test_a_cast_memory_does_not_keep_its_file_mapped(folder: Path) -> None:
    memory = load_memory(folder, load_settings(folder).memory)
    assert str(folder / WEIGHTS) in MAPS.read_text()
    memory.to(torch.bfloat16)
    assert str(folder / WEIGHTS) not in MAPS.read_text()


def test_settings_and_manifest_come_back(folder: Path, tiny_backbone: Backbone) -> None:
    settings, _ = random_memory(tiny_backbone)
    assert load_settings(folder) == settings
    found = load_manifest(folder)
    assert replace(found, files={}) == manifest()
    assert {name: entry["bytes"] for name, entry in found.files.items()} == {
        name: (folder / name).stat().st_size for name in (CONFIG, WEIGHTS, CARD)
    }
    verify_files(folder, found)


def test_gate_confidence_and_encoder_come_back(folder: Path, tiny_backbone: Backbone) -> None:
    settings, memory = random_memory(tiny_backbone)
    gate = Gate((0.1, -1 / 3, 2.0, 0.0, 1e-7, 5.0), (0.2,) * 6)
    confidence = Confidence((0.5, -0.25, 1 / 7, 0.0, 3.0, -2.0, 1.5, -0.5, 1.0))
    settings = replace(settings, encoder="pooled", gate=gate, confidence=confidence)
    save_artifact(folder, settings, memory, manifest(), "# Card\n")
    assert load_settings(folder) == settings
    model, backbone, found = load_model(folder, device="cpu", dtype="float32")
    assert found == settings
    assert backbone.layer == settings.layer
    with torch.no_grad():
        expected = attach_memory(tiny_backbone, memory, settings)(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
        ungated = attach_memory(tiny_backbone, memory, replace(settings, gate=None))
        assert not torch.allclose(ungated(input_ids=IDS).logits, expected, atol=0.01)


def test_an_encoder_of_another_width_is_refused(folder: Path, tiny_backbone: Backbone) -> None:
    settings, memory = random_memory(tiny_backbone)
    save_artifact(folder, replace(settings, encoder="pooled"), memory, manifest(), "# Card\n")
    with pytest.raises(ArtifactError, match=r"'pooled' gives vectors of width 32, .* width 0;"):
        MemoryModel.load(folder, device="cpu", dtype="float32")


def test_the_folder_holds_only_json_safetensors_and_text(folder: Path) -> None:
    shutil.rmtree(folder / WORK)
    assert {path.name for path in folder.rglob("*")} == set(FILES)
    for name in (CONFIG, MANIFEST):
        json.loads((folder / name).read_text(encoding="utf-8"))
    raw = (folder / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert 8 + int.from_bytes(raw[:8], "little") + max(ends) == len(raw), "nothing but tensors"


def test_saving_again_replaces_the_earlier_memory(folder: Path, tiny_backbone: Backbone) -> None:
    before = logits(folder)
    save(folder, tiny_backbone, seed=9)
    save(folder.parent / "other", tiny_backbone, seed=9)
    assert torch.equal(logits(folder), logits(folder.parent / "other"))
    assert not torch.equal(logits(folder), before)
    assert (folder / CARD).read_text() == "# Card 9\n"
    assert {path.name for path in folder.rglob("*")} == {*FILES, WORK}


@pytest.mark.parametrize("writer", ["save_file", "write_json"])
def test_a_full_disk_leaves_the_earlier_memory(
    folder: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = logits(folder)
    monkeypatch.setattr(artifact, writer, full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, tiny_backbone, seed=9)
    assert torch.equal(logits(folder), before)


@pytest.mark.parametrize("renames", range(4))
def test_a_crash_between_renames_is_never_mistaken_for_a_memory(
    folder: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    before = logits(folder)
    rename, done = Path.replace, 0

    def crash(source: Path, target: Path) -> Path:
        nonlocal done
        if target.parent == folder:
            if done == renames:
                raise KeyboardInterrupt
            done += 1
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(folder, tiny_backbone, seed=9)
    if renames == 0:
        assert torch.equal(logits(folder), before)
    else:
        with pytest.raises(ArtifactError, match=CONFIG):
            load_model(folder)
    save(folder, tiny_backbone, seed=9)
    assert not torch.equal(logits(folder), before)


# Changed files are refused before anything heavy is loaded.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def replace_by_another(path: Path) -> None:
    path.write_bytes((path.parent.parent / "other" / path.name).read_bytes())


@pytest.mark.usefixtures("no_base_model")
@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip, replace_by_another])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_changed_file_is_refused_by_name(
    folder: Path, tiny_backbone: Backbone, name: str, damage: Callable[[Path], None]
) -> None:
    save(folder.parent / "other", tiny_backbone, seed=9)
    damage(folder / name)
    with pytest.raises(ArtifactError, match=name):
        load_model(folder)


@pytest.mark.usefixtures("no_base_model")
@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_a_missing_or_half_manifest_is_refused(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    damage(folder / MANIFEST)
    with pytest.raises(ArtifactError, match=MANIFEST):
        load_model(folder)


@pytest.mark.usefixtures("no_base_model")
def test_the_manifest_of_another_memory_is_refused(folder: Path, tiny_backbone: Backbone) -> None:
    save(folder.parent / "other", tiny_backbone, seed=9)
    replace_by_another(folder / MANIFEST)
    with pytest.raises(ArtifactError, match=CONFIG):
        load_model(folder)


def test_no_flipped_bit_in_the_manifest_goes_further_than_its_text(folder: Path) -> None:
    """Whatever a flip hits, the memory is either intact or refused in words."""
    good = (folder / MANIFEST).read_bytes()
    files = json.loads(good)["files"]
    refusals = []
    for place in range(len(good)):
        content = bytearray(good)
        content[place] ^= 1
        (folder / MANIFEST).write_bytes(content)
        try:
            found = load_manifest(folder)
            verify_files(folder, found)
        except ArtifactError as error:
            refusals.append(str(error))
        else:
            for name in (CONFIG, WEIGHTS):
                assert found.files[name]["sha256"] == files[name]["sha256"]
    assert len(refusals) > 2 * 64
    assert all(str(folder) in message for message in refusals)


def test_the_card_may_be_edited_but_not_missing(folder: Path) -> None:
    before = logits(folder)
    (folder / CARD).write_text("# My own words\n")
    assert torch.equal(logits(folder), before)
    (folder / CARD).unlink()
    with pytest.raises(ArtifactError, match=CARD):
        load_model(folder)


@pytest.mark.parametrize("what", ["nothing there", "a file", "an empty folder", "a base model"])
def test_what_is_no_memory_is_refused(tmp_path: Path, tiny_folder: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.write_text("x")
    elif what == "an empty folder":
        path.mkdir()
    elif what == "a base model":
        path = tiny_folder
    with pytest.raises(ArtifactError, match=rf"{path} is not a memory: it has no {MANIFEST}"):
        load_model(path)


@pytest.mark.usefixtures("no_base_model")
@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"\xff\xfe",
        f'{{"format_version": {FORMAT_VERSION}}}'.encode(),
        b'{"files": []}',
    ],
)
def test_a_manifest_of_another_form_is_refused(folder: Path, content: bytes) -> None:
    if content.startswith(b'{"files"'):
        said = json.loads((folder / MANIFEST).read_text())
        content = json.dumps(said | json.loads(content)).encode()
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=MANIFEST):
        load_model(folder)


@pytest.mark.usefixtures("no_base_model")
def test_a_newer_format_is_refused_with_both_versions(folder: Path) -> None:
    said = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(said | {"format_version": 7}))
    with pytest.raises(ArtifactError, match=rf"version 7, this program reads {FORMAT_VERSION}"):
        load_model(folder)


# What the files say, checksums aside.


@pytest.mark.usefixtures("no_base_model")
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("memory_lambda", -0.1),
        ("memory_lambda", 1.5),
        ("memory_lambda", float("nan")),
        ("memory_lambda", "much"),
        ("memory_temperature", 0),
        ("memory_temperature", -1),
        ("memory_temperature", float("nan")),
        ("memory_temperature", float("inf")),
        ("layer", None),
        ("base", {"name": "x"}),
        ("memory", {"hidden_size": 32}),
        ("memory", None),
        ("gate", {"asked": [0.0] * 6}),
        ("gate", {"asked": [0.0] * 6, "plain": [0.0] * 5}),
        ("gate", {"asked": [0.0] * 6, "plain": [0.0] * 5 + [float("nan")]}),
        ("gate", {"asked": [0.0] * 6, "plain": 3}),
        ("gate", [0.0]),
        ("gate", "open"),
        ("confidence", {"weights": [0.0] * 6}),
        ("confidence", {"weights": [0.0] * 6 + [float("inf")]}),
        ("confidence", {"weights": None}),
        ("confidence", 0.5),
    ],
)
def test_settings_out_of_range_are_refused(folder: Path, setting: str, value: object) -> None:
    rewrite_config(folder, **{setting: value})
    with pytest.raises(ArtifactError, match=CONFIG):
        load_model(folder)


@pytest.mark.usefixtures("no_base_model")
@pytest.mark.parametrize(("setting", "value"), [("activation", "no such"), ("num_blocks", None)])
def test_a_shape_that_cannot_be_built_is_refused(folder: Path, setting: str, value: object) -> None:
    shape = json.loads((folder / CONFIG).read_text())["memory"]
    rewrite_config(folder, memory=shape | {setting: value})
    with pytest.raises(ArtifactError, match=CONFIG):
        load_model(folder)


def test_the_configuration_of_another_model_is_refused(folder: Path, tiny_folder: Path) -> None:
    rewrite(folder, CONFIG, (tiny_folder / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match="'llama', not a 'mlpmem'"):
        load_model(folder)


HEAD = "lm_head.weight"


@pytest.mark.usefixtures("no_base_model")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors[HEAD][3, 4].fill_(torch.nan), "lm_head.weight is not finite"),
        (lambda tensors: tensors[HEAD][3, 4].fill_(-torch.inf), "lm_head.weight is not finite"),
        (lambda tensors: tensors.pop(HEAD), r"lm_head.weight has shape None, .* \(50, 32\)"),
        (
            lambda tensors: tensors.update({HEAD: torch.zeros(49, 32)}),
            r"lm_head.weight has shape \(49, 32\), the configuration says \(50, 32\)",
        ),
        (
            lambda tensors: tensors.update(corpus_tokens=torch.arange(49)),
            r"corpus_tokens has shape \(49,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    rewrite_weights(folder, change)
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS}: tensor {said}"):
        load_model(folder)


@pytest.mark.usefixtures("no_base_model")
@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x80\x04}q\x00."])
def test_weights_that_are_no_safetensors_are_refused(folder: Path, content: bytes) -> None:
    rewrite(folder, WEIGHTS, content)
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS} cannot be read"):
        load_model(folder)


def test_the_weights_of_a_memory_of_another_shape_are_refused(folder: Path) -> None:
    config = load_settings(folder).memory
    with pytest.raises(ArtifactError, match=r"\(24, 32\).*\(25, 32\)"):
        load_memory(folder, replace(config, intermediate_size=25))


# Another base model.


def resized(source: Path, target: Path) -> Path:
    """The same base model with ten more tokens, which its tokenizer does not use."""
    shutil.copytree(source, target)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(310, mean_resizing=False)
    model.save_pretrained(target)
    return target


def retrained(source: Path, target: Path) -> Path:
    """The same base model, one weight a little different."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 0.01
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def retokenized(source: Path, target: Path) -> Path:
    """The same base model, its tokenizer without the <s> in front."""
    shutil.copytree(source, target)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    return target


@pytest.mark.parametrize(
    ("change", "what"),
    [(resized, "vocab_size"), (retokenized, "tokenizer"), (retrained, "weights")],
)
def test_another_base_model_is_refused_with_both_values(
    folder: Path,
    tmp_path: Path,
    tiny_folder: Path,
    tiny_backbone: Backbone,
    change: Callable[[Path, Path], Path],
    what: str,
) -> None:
    other = str(change(tiny_folder, tmp_path / "other"))
    given = load_backbone(other, device="cpu", dtype="float32").reference
    expected = tiny_backbone.reference
    differing = {
        field.name
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != getattr(expected, field.name)
    }
    assert what in differing <= {what, "name", "weights"}
    with pytest.raises(ArtifactError) as caught:
        load_model(folder, base_model=other, device="cpu")
    message = str(caught.value)
    for name in (str(tiny_folder), other, what):
        assert name in message
    for reference in (expected, given):
        assert f"({what} {str(getattr(reference, what))[:16]})" in message


def test_a_shallower_base_model_is_refused_as_another_one(
    folder: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    """Not as one without the memory's layer, which would send the user looking for a layer."""
    config = AutoConfig.from_pretrained(tiny_folder, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="this memory was trained on"):
        load_model(folder, base_model=str(tmp_path), device="cpu")


def test_another_layer_width_is_refused_with_both_values(tiny_backbone: Backbone) -> None:
    settings, _ = random_memory(tiny_backbone)
    narrow = replace(settings.memory, hidden_size=16)
    with pytest.raises(ArtifactError, match="width 16, the base model has 32"):
        attach_memory(tiny_backbone, Memory(narrow), replace(settings, memory=narrow))


def test_the_base_model_may_have_moved(folder: Path, tmp_path: Path, tiny_folder: Path) -> None:
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    expected = logits(folder)
    rewrite_config(folder, base=config["base"] | {"name": str(tmp_path / "gone")})
    with pytest.raises(BaseModelError, match=str(tmp_path / "gone")):
        load_model(folder)
    assert torch.equal(logits(folder, base_model=str(moved)), expected)
