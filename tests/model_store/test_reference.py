"""How a model is named."""

from __future__ import annotations

import pytest

from model_store import LocalStore, ModelNotFoundError, ModelReference

NONSENSE = [
    "",
    "@",
    "@3",
    "tiny@",
    "tiny@0",
    "tiny@01",
    "tiny@-1",
    "tiny@+1",
    "tiny@1.0",
    "tiny@1e3",
    "tiny@٣",
    "tiny@9999999999",
    "tiny@1@2",
    "tiny@Production",
    "tiny@a_b",
    "tiny@../x",
    "tiny@" + "a" * 32,
    "Tiny",
    "ti ny",
    " tiny",
    "tiny ",
    "tiny\n",
    "tiny@3\n",
    "tiny\x00",
    "tíny",
    "-tiny",
    "ti_ny",
    "tiny.onnx",
    ".",
    "..",
    "../tiny",
    "a/b",
    "/etc",
    "tiny/../../etc",
    "tiny%2f..",
    "tiny#1",
    "a" * 64,
    "a" * 100_000,
]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("tiny", ModelReference("tiny")),
        ("tiny@3", ModelReference("tiny", version=3)),
        ("tiny@999999999", ModelReference("tiny", version=999_999_999)),
        ("tiny@production", ModelReference("tiny", alias="production")),
        ("sotto-edge@a-2", ModelReference("sotto-edge", alias="a-2")),
        ("7", ModelReference("7")),
        ("a" * 63, ModelReference("a" * 63)),
    ],
)
def test_a_reference_is_a_name_and_maybe_a_version_or_an_alias(text: str, reference: ModelReference) -> None:
    assert ModelReference.parse(text) == reference


@pytest.mark.parametrize("text", ["tiny", "tiny@3", "tiny@production"])
def test_a_reference_prints_as_it_was_written(text: str) -> None:
    assert str(ModelReference.parse(text)) == text


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: ascii(text[:20]))
def test_nonsense_names_no_model(text: str) -> None:
    with pytest.raises(ModelNotFoundError):
        ModelReference.parse(text)


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: ascii(text[:20]))
def test_a_store_answers_nonsense_like_any_unknown_name(store: LocalStore, text: str) -> None:
    with pytest.raises(ModelNotFoundError):
        store.resolve(text)


def test_a_long_reference_is_not_repeated_in_full() -> None:
    with pytest.raises(ModelNotFoundError) as refused:
        ModelReference.parse("A" * 100_000)
    assert len(str(refused.value)) < 200
