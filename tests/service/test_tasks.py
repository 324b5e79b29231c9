"""A model of keywords alone beside one that also tells speakers apart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from model_store import LocalStore
from model_store.golden import pack, unpack
from model_store.graph import part_of
from service.app import create_app
from service.settings import Settings
from tests.conftest import LOCAL, encoded, voice

WAV = {"Content-Type": "audio/wav"}
CLIP = encoded(voice(2.0))
SPOKEN = ("keyword_logits", "embedding", "frames")
# (path, query) of all that asks about speakers.
ABOUT_SPEAKERS = (
    ("/v1/speakers/ada/enrollments", {}),
    ("/v1/speakers/ada/verify", {}),
    ("/v1/speakers/identify", {}),
    ("/v1/embeddings", {}),
    ("/v1/analyze", {"tasks": ["keywords", "speaker"]}),
    ("/v1/analyze", {"speaker_id": "ada"}),
)


@pytest.fixture(scope="module")
def client(builtin_store: LocalStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The built-in model as `whole`, and what of it knows keywords as `words`, by default."""
    folder = tmp_path_factory.mktemp("tasks")
    store = LocalStore(folder / "models")
    bundle = builtin_store.resolve("sotto-edge")
    manifest = bundle.manifest
    files = {name: bundle.read(name) for name in manifest.files}
    store.publish(manifest.model_copy(update={"name": "whole"}), files)
    clip, outputs = unpack(files["golden.npz"])
    files["model.onnx"] = part_of(files["model.onnx"], SPOKEN)
    files["golden.npz"] = pack(clip, {name: outputs[name] for name in SPOKEN})
    store.publish(manifest.model_copy(update={"name": "words", "speaker": None}), files)
    settings = Settings.model_validate(
        {"data_dir": folder / "data", "models_dir": store.root, "model": "words", "inference_threads": 1}
    )
    with TestClient(create_app(settings), LOCAL) as made:
        yield made


def test_keywords_are_those_of_the_whole_model(client: TestClient) -> None:
    own, whole = (
        client.post("/v1/keywords/detect", params={"model": name}, content=CLIP, headers=WAV).json()
        for name in ("words", "whole")
    )
    assert own["model"]["name"] == "words"
    assert [one["keyword"] for one in own["top"]] == [one["keyword"] for one in whole["top"]]


@pytest.mark.parametrize(("path", "query"), ABOUT_SPEAKERS)
def test_what_is_asked_about_speakers_is_refused(client: TestClient, path: str, query: dict[str, str]) -> None:
    refused = client.post(path, params=query, content=CLIP, headers=WAV)
    assert (refused.status_code, refused.json()["code"]) == (409, "task_unsupported")
    assert "words@1 has no task speaker; it has keywords, embedding" in refused.json()["detail"]


def test_another_model_may_be_asked_about_speakers(client: TestClient) -> None:
    found = client.post("/v1/embeddings", params={"model": "whole"}, content=CLIP, headers=WAV)
    assert found.status_code == 200
    assert found.json()["dim"] == 192


def test_everything_is_everything_that_the_model_can_do(client: TestClient) -> None:
    found = client.post("/v1/analyze", content=CLIP, headers=WAV).json()
    assert {"keywords", "embedding"} <= found.keys()
    assert "speaker" not in found
    assert "speaker" in client.post("/v1/analyze", params={"model": "whole"}, content=CLIP, headers=WAV).json()


def test_speech_embeddings_are_given(client: TestClient) -> None:
    found = client.post("/v1/embeddings", params={"type": "utterance"}, content=CLIP, headers=WAV)
    assert found.status_code == 200


def test_models_say_what_they_can_do(client: TestClient) -> None:
    tasks = {name: client.get(f"/v1/models/{name}").json()["versions"][0]["tasks"] for name in ("words", "whole")}
    assert tasks == {"words": ["keywords", "embedding"], "whole": ["keywords", "speaker", "embedding"]}
