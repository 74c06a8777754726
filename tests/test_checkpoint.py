"""The model as a folder: what transformers saves and loads, alone or with its base model inside."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    pipeline,
)

from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import CARD, CONFIG, ENCODER, MANIFEST, WEIGHTS, save_artifact
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.configuration import MLPMemConfig
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.gate import Gate
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory, load_model

IDS = torch.tensor([[0, 40, 81, 122, 163, 204]])
GATE = Gate(asked=(0.3, -0.2, -0.4, 0.1, 0.05, 0.2), plain=(0.1, 0.1, 0.2, 0.0, 0.1, -0.5))
MemoryOn = Callable[..., MLPMemForCausalLM]


def logits(model: Any, **inputs: object) -> Tensor:  # noqa: ANN401
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, **inputs).logits
    return out


@pytest.fixture
def base_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A base model that a test may take away."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


@pytest.fixture
def backbone(base_folder: Path) -> Backbone:
    """The base model of that folder."""
    return load_backbone(str(base_folder), device="cpu", dtype="float32")


@pytest.fixture
def model(backbone: Backbone, memory_on: MemoryOn) -> MLPMemForCausalLM:
    """A memory with everything that a memory can have."""
    return memory_on(backbone, query_size=32, encoder="pooled", gate=GATE)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The same base model but for one number."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "other"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


# The Auto classes know it.

ORDERS = {
    "mlpmem_rag first": "import mlpmem_rag\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport mlpmem_rag",
    "a module first": "import mlpmem_rag.backbone\nfrom transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_it_whatever_is_imported_first(
    tmp_path: Path, model: MLPMemForCausalLM, order: str
) -> None:
    model.save_pretrained(tmp_path / "memory")
    code = (
        f"{ORDERS[order]}\nfrom transformers import AutoTokenizer\n"
        f"folder = {str(tmp_path / 'memory')!r}\n"
        "print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)\n"
        "print(AutoTokenizer.from_pretrained(folder)('the harbour')['input_ids'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    name, ids = ran.stdout.splitlines() or [ran.stderr, ""]
    assert name == "MLPMemForCausalLM", ran.stderr
    assert model.tokenizer is not None
    assert json.loads(ids) == model.tokenizer("the harbour")["input_ids"]


def test_importing_the_package_alone_imports_no_transformers() -> None:
    code = "import sys, mlpmem_rag; print({'torch', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_an_untrained_model_comes_from_a_configuration(model: MLPMemForCausalLM) -> None:
    config = MLPMemConfig(
        base_config=model.base.config, layer=2, memory=model.config.memory, memory_lambda=0.5
    )
    fresh: Any = AutoModelForCausalLM.from_config(config)
    assert isinstance(fresh, MLPMemForCausalLM)
    names = {name: p.shape for name, p in fresh.named_parameters()}
    assert names == {name: p.shape for name, p in model.named_parameters()}
    assert not torch.equal(logits(fresh), logits(model))
    total = logits(fresh).double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)  # of 300 float32


def test_a_configuration_that_only_names_its_base_makes_no_model(model: MLPMemForCausalLM) -> None:
    config = MLPMemConfig(base=model.config.base, memory=model.config.memory)
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(config)


# The memory alone.


def test_saved_and_loaded_it_is_the_same(
    tmp_path: Path, model: MLPMemForCausalLM, base_folder: Path
) -> None:
    query = torch.nn.functional.normalize(torch.randn(1, 32), dim=-1)
    model.save_pretrained(tmp_path / "memory")
    files = {path.name for path in (tmp_path / "memory").iterdir()}
    assert files == {CONFIG, WEIGHTS, MANIFEST, CARD}
    size = (tmp_path / "memory" / WEIGHTS).stat().st_size
    assert size < sum(p.nbytes for p in model.memory.state_dict().values()) + 4096, "no base inside"
    for load in (AutoModelForCausalLM, MLPMemForCausalLM):
        loaded = load.from_pretrained(tmp_path / "memory", dtype="float32")
        assert torch.equal(logits(loaded), logits(model))
        assert torch.equal(logits(loaded, query_vector=query), logits(model, query_vector=query))
        assert loaded.config.base["name"] == str(base_folder)
        assert not loaded.training


def test_trained_folders_are_read_and_written_alike(
    tmp_path: Path, model: MLPMemForCausalLM
) -> None:
    """What training wrote keeps its manifest and card through any number of saves."""
    model.save_pretrained(tmp_path / "first")
    manifest = json.loads((tmp_path / "first" / MANIFEST).read_text())
    manifest["corpus"] = {"documents": 7}
    (tmp_path / "first" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "first" / CARD).write_text("# A card\n")
    MLPMemForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = json.loads((tmp_path / "second" / MANIFEST).read_text())
    assert again["corpus"] == {"documents": 7}
    assert again["created"] == manifest["created"]
    assert (tmp_path / "second" / CARD).read_text() == "# A card\n"
    assert (tmp_path / "second" / CONFIG).read_text() == (tmp_path / "first" / CONFIG).read_text()


def test_a_changed_lambda_is_saved(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    model.memory_lambda = 0.77
    for merge in (False, True):
        model.save_pretrained(tmp_path / str(merge), merge_base=merge)
        loaded = MLPMemForCausalLM.from_pretrained(tmp_path / str(merge))
        assert loaded.memory_lambda == 0.77


def test_settings_can_be_given_when_loading(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    expected = logits(model, memory_lambda=0.9)
    for merge in (False, True):
        folder = tmp_path / str(merge)
        model.save_pretrained(folder, merge_base=merge)
        for load in (AutoModelForCausalLM, MLPMemForCausalLM):
            loaded = load.from_pretrained(folder, memory_lambda=0.9, dtype="float32")
            assert torch.equal(logits(loaded), expected)
        config = AutoConfig.from_pretrained(folder, memory_lambda=0.9)
        loaded = MLPMemForCausalLM.from_pretrained(folder, config=config, dtype="float32")
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("merge", [False, True])
def test_dtype_and_attention_can_be_chosen(
    tmp_path: Path, model: MLPMemForCausalLM, merge: bool
) -> None:
    model.save_pretrained(tmp_path / "memory", merge_base=merge)
    loaded = MLPMemForCausalLM.from_pretrained(
        tmp_path / "memory", dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu"
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.base.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.1, atol=0.3)


def test_loading_information_is_given_where_asked(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    for merge in (False, True):
        model.save_pretrained(tmp_path / str(merge), merge_base=merge)
        loaded, info = MLPMemForCausalLM.from_pretrained(
            tmp_path / str(merge), output_loading_info=True
        )
        assert isinstance(loaded, MLPMemForCausalLM)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


@pytest.mark.parametrize(
    "options", [{"device_map": {"base": 0, "memory": "cpu"}}, {"device_map": "balanced"}]
)
def test_a_spread_over_devices_is_refused(
    tmp_path: Path, model: MLPMemForCausalLM, options: dict[str, Any]
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="give one device"):
        MLPMemForCausalLM.from_pretrained(tmp_path, **options)


def test_options_it_does_not_know_are_refused(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="max_memory: not for a memory"):
        MLPMemForCausalLM.from_pretrained(tmp_path, max_memory={0: "1GB"})
    with pytest.raises(ConfigError, match=r"lambda = 1\.5"):
        MLPMemForCausalLM.from_pretrained(tmp_path, memory_lambda=1.5)


def test_another_base_model_is_refused(
    tmp_path: Path, model: MLPMemForCausalLM, other_folder: Path
) -> None:
    model.save_pretrained(tmp_path / "memory")
    with pytest.raises(ArtifactError, match=r"\(weights [0-9a-f]{16}\), not on .*"):
        MLPMemForCausalLM.from_pretrained(tmp_path / "memory", base_model=str(other_folder))


def test_a_base_model_that_moved_can_be_named(
    tmp_path: Path, model: MLPMemForCausalLM, base_folder: Path
) -> None:
    model.save_pretrained(tmp_path / "memory")
    moved = base_folder.rename(tmp_path / "moved")
    loaded = MLPMemForCausalLM.from_pretrained(
        tmp_path / "memory", base_model=str(moved), dtype="float32"
    )
    assert torch.equal(logits(loaded), logits(model))


# With the base model inside.


def test_merged_nothing_else_is_needed(
    tmp_path: Path, model: MLPMemForCausalLM, base_folder: Path
) -> None:
    text = "Question: Who found the ledger of 1887?\nAnswer:"
    assert model.tokenizer is not None
    prompt = model.tokenizer(text, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    model.save_pretrained(tmp_path / "memory", merge_base=True)
    shutil.rmtree(base_folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert torch.equal(logits(loaded), logits(model))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "memory")
    prompt = tokenizer(text, return_tensors="pt")
    found = loaded.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected), "the question is found and encoded without the base folder"
    assert not any(p.requires_grad for p in loaded.base.parameters())
    assert all(p.requires_grad for p in loaded.memory.parameters())


def test_merged_folders_are_loaded_by_the_rest_of_the_library(
    tmp_path: Path, model: MLPMemForCausalLM, base_folder: Path
) -> None:
    whole = MemoryModel(model, model.backbone.tokenizer, model.query_encoder)
    expected = whole.answer("Who?", max_new_tokens=5)
    model.save_pretrained(tmp_path / "memory", merge_base=True)
    shutil.rmtree(base_folder)
    loaded, backbone, settings = load_model(tmp_path / "memory", device="cpu", dtype="float32")
    assert torch.equal(logits(loaded), logits(model))
    assert backbone.model is loaded.base
    assert settings.memory == model.memory.config
    again = MemoryModel.load(tmp_path / "memory", device="cpu", dtype="float32")
    found = again.answer("Who?", max_new_tokens=5)
    assert found.text == expected.text
    with pytest.raises(ConfigError, match="holds its own base model"):
        load_model(tmp_path / "memory", base_model=str(base_folder))
    with pytest.raises(ConfigError, match="holds its own base model"):
        MLPMemForCausalLM.from_pretrained(tmp_path / "memory", base_model=str(base_folder))


def test_merged_folders_hold_nothing_that_runs(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    model.save_pretrained(tmp_path, merge_base=True)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".md"}


def test_weights_in_several_files(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    model.save_pretrained(tmp_path, merge_base=True, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    listed = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert {shard.name for shard in shards} < set(listed)
    loaded = MLPMemForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match=r"is [0-9a-f]{16}…, the manifest says [0-9a-f]"):
        MLPMemForCausalLM.from_pretrained(tmp_path)


def test_one_form_replaces_the_other(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    folder = tmp_path / "memory"
    model.save_pretrained(folder, merge_base=True, max_shard_size="60KB")
    model.save_pretrained(folder, merge_base=False)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, MANIFEST, CARD}
    alone = MLPMemForCausalLM.from_pretrained(folder, dtype="float32")
    assert torch.equal(logits(alone), logits(model))
    model.save_pretrained(folder, merge_base=True)
    assert [path.name for path in folder.glob("*.safetensors*")] == [WEIGHTS]
    inside = MLPMemForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(inside), logits(model))
    assert inside.source is not None
    assert inside.source.merged


def test_a_merged_folder_stays_one_when_saved_again(
    tmp_path: Path, model: MLPMemForCausalLM, base_folder: Path
) -> None:
    model.save_pretrained(tmp_path / "one", merge_base=True)
    shutil.rmtree(base_folder)
    MLPMemForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert torch.equal(logits(MLPMemForCausalLM.from_pretrained(tmp_path / "two")), logits(model))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json", "generation_config.json"])
def test_every_changed_file_is_refused(tmp_path: Path, model: MLPMemForCausalLM, name: str) -> None:
    model.save_pretrained(tmp_path, merge_base=True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=f"{name} was changed.*the manifest says"):
        MLPMemForCausalLM.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}"):
        MLPMemForCausalLM.from_pretrained(tmp_path)


def test_another_tokenizer_is_refused(
    tmp_path: Path, model: MLPMemForCausalLM, bare_folder: Path
) -> None:
    model.tokenizer = AutoTokenizer.from_pretrained(bare_folder)
    model.query_encoder = constant_encoder()
    model.save_pretrained(tmp_path, merge_base=True)
    with pytest.raises(ArtifactError, match=r"fingerprint [0-9a-f]{16}.*\([0-9a-f]{16}\)"):
        MLPMemForCausalLM.from_pretrained(tmp_path)


def constant_encoder() -> Any:  # noqa: ANN401
    """An encoder that is nobody's file."""

    class Constant:
        name, size = "constant", 32

        def encode(self, texts: list[str]) -> Any:  # noqa: ANN401
            return torch.ones(len(texts), 32).numpy()

    return Constant()


def test_a_base_without_a_name_must_go_inside(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    config = MLPMemConfig(base_config=model.base.config, layer=2, memory=model.config.memory)
    fresh = MLPMemForCausalLM(config)
    with pytest.raises(ConfigError, match="merge_base=True"):
        fresh.save_pretrained(tmp_path / "alone", merge_base=False)
    fresh.save_pretrained(tmp_path / "inside")
    loaded = MLPMemForCausalLM.from_pretrained(tmp_path / "inside")
    assert torch.equal(logits(loaded, memory_lambda=0.5), logits(fresh, memory_lambda=0.5))


def test_a_failed_save_leaves_the_earlier_memory(
    tmp_path: Path, model: MLPMemForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory"
    model.save_pretrained(folder, merge_base=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", fail)
    model.memory_lambda = 0.1
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder, merge_base=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_quantisation_is_refused_by_both_forms(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    for merge in (False, True):
        model.save_pretrained(tmp_path / str(merge), merge_base=merge)
        for load in (AutoModelForCausalLM, MLPMemForCausalLM):
            with pytest.raises(ConfigError, match="quantization_config: not for a memory"):
                load.from_pretrained(
                    tmp_path / str(merge), quantization_config=BitsAndBytesConfig(load_in_8bit=True)
                )


# To the hub and back, with a hub that is a folder.


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("merge", [False, True])
def test_pushed_to_a_hub_and_fetched(model: MLPMemForCausalLM, merge: bool) -> None:
    address = model.push_to_hub("me/memory", merge_base=merge, commit_message="First")
    assert address == "me/memory: First"
    loaded = MLPMemForCausalLM.from_pretrained("me/memory", dtype="float32")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.source is not None
    assert loaded.source.merged == merge


@pytest.mark.usefixtures("hub")
def test_saving_can_push_too(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    model.save_pretrained(tmp_path / "memory", push_to_hub=True, repo_id="me/other")
    loaded = MLPMemForCausalLM.from_pretrained("me/other", dtype="float32")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.usefixtures("hub")
def test_what_is_neither_folder_nor_repository_is_refused() -> None:
    with pytest.raises(ArtifactError, match="me/none is neither a folder nor a repository"):
        MLPMemForCausalLM.from_pretrained("me/none")


# As part of transformers.


def test_a_pipeline_takes_the_folder(tmp_path: Path, model: MLPMemForCausalLM) -> None:
    model.save_pretrained(tmp_path / "memory")
    generate = pipeline("text-generation", model=str(tmp_path / "memory"), dtype="float32")
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    (found,) = generate("In the old mill, two surveyors", **settings)
    assert model.tokenizer is not None
    prompt = model.tokenizer("In the old mill, two surveyors", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    new = ids[0, prompt["input_ids"].shape[1] :]
    assert found["generated_text"] == model.tokenizer.decode(new, skip_special_tokens=True)


def test_a_sentence_encoder_travels_inside(
    tmp_path: Path,
    backbone: Backbone,
    memory_on: MemoryOn,
    base_folder: Path,
    sentence_folder: Path,
) -> None:
    folder = Path(shutil.copytree(sentence_folder, tmp_path / "sentences"))
    model = memory_on(backbone, query_size=32, encoder=str(folder))
    expected = model.encode_queries(["Who found the lamps?"])
    model.save_pretrained(tmp_path / "memory", merge_base=True)
    shutil.rmtree(folder)
    shutil.rmtree(base_folder)
    assert (tmp_path / "memory" / ENCODER).is_dir()
    loaded = MLPMemForCausalLM.from_pretrained(tmp_path / "memory")
    torch.testing.assert_close(loaded.encode_queries(["Who found the lamps?"]), expected)
    asked = MemoryModel.load(tmp_path / "memory", device="cpu", dtype="float32")
    assert asked.encoder is not None
    weights = next((tmp_path / "memory" / ENCODER).rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"encoder/.* was changed or is damaged"):
        MLPMemForCausalLM.from_pretrained(tmp_path / "memory")


def test_a_folder_of_training_is_read(
    tmp_path: Path, backbone: Backbone, model: MLPMemForCausalLM
) -> None:
    """Written without transformers, by the function that training calls."""
    from mlpmem_rag.artifact import parse_settings
    from mlpmem_rag.checkpoint import _origin

    settings = parse_settings(model.config.to_dict())
    manifest, _ = _origin(model)
    save_artifact(tmp_path / "trained", settings, model.memory, manifest, "# Card\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype="float32")
    assert torch.equal(logits(loaded), logits(attach_memory(backbone, model.memory, settings)))


def test_a_memory_beside_its_base_is_loaded_as_it_was_trained(
    tmp_path: Path, tiny_backbone: Backbone, memory_on: Callable[..., MLPMemForCausalLM]
) -> None:
    memory_on(tiny_backbone, query_size=32, encoder="pooled").save_pretrained(tmp_path / "memory")
    others: list[dict[str, Any]] = [{"layer": 0}, {"encoder": "none"}, {"confidence": {"w": [1]}}]
    for other in others:
        with pytest.raises(ConfigError, match=f"{next(iter(other))}: cannot be other than"):
            MLPMemForCausalLM.from_pretrained(tmp_path / "memory", **other)
    for merged in (False, True):
        folder = tmp_path / f"temperature-{merged}"
        memory_on(tiny_backbone).save_pretrained(folder, merge_base=merged)
        with pytest.raises(ConfigError, match="memory_temperature = 0"):
            MLPMemForCausalLM.from_pretrained(folder, memory_temperature=0.0)
