"""What a bundle saves against a HuBERT of the same heads; a small one here."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import HubertConfig, HubertModel

from model_store import Manifest
from model_store.store import open_bundle
from training.errors import MeasurementError
from training.evaluation import beside_base as module
from training.evaluation.beside_base import beside_base
from training.evaluation.report import _base, _itself

SMALL = HubertConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    conv_dim=(32,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)


def test_it_has_the_bundle_s_heads_and_both_are_timed(made_draft: tuple[Path, Manifest]) -> None:
    folder, manifest = made_draft
    found = beside_base(open_bundle(folder), SMALL, runs=2)
    trunk = sum(parameter.numel() for parameter in HubertModel(SMALL).parameters())
    # Without its stand-in for what is masked; labels and background, and a speaker embedding from weighted layers.
    heads = (1 + len(manifest.keywords.labels)) * (SMALL.hidden_size + 1)
    assert trunk + heads < found.parameters < trunk + heads + 20 * SMALL.hidden_size * manifest.speaker.dim
    assert found.own_bytes == manifest.files["model.onnx"].size
    assert found.base_bytes > 4 * trunk * 0.9
    assert found.smaller == pytest.approx(1 - found.own_bytes / found.base_bytes)
    assert found.faster == pytest.approx(1 - found.own.one_thread / found.base.one_thread)
    assert min(found.own.one_thread, found.base.one_thread, found.base.all_threads) > 0


def test_the_row_says_both_figures(made_draft: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HubertConfig", lambda: SMALL)
    monkeypatch.setattr(module, "RUNS", 2)
    figures = _base(open_bundle(made_draft[0]))
    assert [figure.unit for figure in figures] == ["%", "%"]
    assert figures[0].value < 100
    assert "M parameters" in figures[0].detail
    with pytest.raises(MeasurementError, match="needs the bundle itself"):
        _itself("base", None)
