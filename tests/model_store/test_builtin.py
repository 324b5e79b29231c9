"""The models that ship with the package are sound as they lie there."""

from __future__ import annotations

import pytest

from model_store import LocalStore, builtin_store_path, verify_bundle
from tests.conftest import references

STORE = LocalStore(builtin_store_path())
BUNDLES = references(STORE)
if not BUNDLES:
    pytest.skip(f"needs a bundle in {builtin_store_path()}; there is none", allow_module_level=True)


@pytest.mark.parametrize("reference", BUNDLES)
def test_every_built_in_bundle_verifies(reference: str) -> None:
    verify_bundle(STORE.resolve(reference))


@pytest.mark.parametrize("name", STORE.names())
def test_every_built_in_model_has_a_production_version(name: str) -> None:
    assert STORE.aliases(name)["production"] in STORE.versions(name)


@pytest.mark.parametrize("reference", BUNDLES)
def test_nothing_in_a_built_in_bundle_is_pickled(reference: str) -> None:
    kinds = {name.rpartition(".")[2] for name in STORE.resolve(reference).manifest.files}
    assert kinds <= {"onnx", "npz", "f32", "md", "json"}
