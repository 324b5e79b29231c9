"""Aliases: names that move from version to version in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model_store import AliasError, BundleError, LocalStore, ModelNotFoundError
from tests.model_store.bundles import Draft


@pytest.fixture
def three(store: LocalStore, hollow: Draft) -> LocalStore:
    """A store with versions 1 to 3 of `tiny`."""
    for _ in range(3):
        store.publish(hollow.manifest, hollow.files)
    return store


def alias_file(store: LocalStore, alias: str) -> Path:
    folder = store.root / "tiny" / "aliases"
    folder.mkdir(exist_ok=True)
    return folder / alias


def version_of(store: LocalStore, reference: str) -> int:
    return store.resolve(reference).manifest.version


def test_a_bare_name_is_the_newest_version(three: LocalStore) -> None:
    assert version_of(three, "tiny") == 3


def test_a_bare_name_is_the_production_version_where_there_is_one(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 1)
    assert version_of(three, "tiny") == 1


def test_another_alias_does_not_change_what_a_bare_name_is(three: LocalStore) -> None:
    three.set_alias("tiny", "canary", 1)
    assert version_of(three, "tiny") == 3


def test_a_version_is_not_moved_by_an_alias(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 1)
    assert version_of(three, "tiny@2") == 2


def test_an_alias_moves_forth_and_back(three: LocalStore) -> None:
    seen = []
    for version in (1, 3, 1):
        three.set_alias("tiny", "production", version)
        seen.append(version_of(three, "tiny@production"))
    assert seen == [1, 3, 1]


def test_rolling_back_brings_back_the_same_bundle(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 2)
    before = three.resolve("tiny")
    three.set_alias("tiny", "production", 3)
    three.set_alias("tiny", "production", 2)
    assert three.resolve("tiny") == before


def test_all_aliases_are_listed(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 1)
    three.set_alias("tiny", "canary", 3)
    assert three.aliases("tiny") == {"canary": 3, "production": 1}


def test_moving_an_alias_leaves_one_plain_file(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 1)
    three.set_alias("tiny", "production", 2)
    assert os.listdir(three.root / "tiny" / "aliases") == ["production"]
    assert alias_file(three, "production").read_text() == "2\n"


def test_whoever_has_the_alias_open_reads_it_whole(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 1)
    with alias_file(three, "production").open() as stream:
        three.set_alias("tiny", "production", 2)
        assert stream.read() == "1\n"


def test_an_unknown_alias_is_answered_with_those_there_are(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 1)
    three.set_alias("tiny", "canary", 3)
    with pytest.raises(ModelNotFoundError, match="'tiny' has no alias 'best'; there are: canary, production"):
        three.resolve("tiny@best")


def test_an_unknown_alias_where_there_are_none(three: LocalStore) -> None:
    with pytest.raises(ModelNotFoundError, match="'tiny' has no alias 'production'; there are: none"):
        three.resolve("tiny@production")


@pytest.mark.parametrize("version", [0, 4, -1, 10**12])
def test_an_alias_cannot_point_at_a_version_that_is_not_there(three: LocalStore, version: int) -> None:
    with pytest.raises(AliasError, match=f"'tiny' has no version {version}; there are: 1, 2, 3"):
        three.set_alias("tiny", "production", version)


def test_a_refused_move_leaves_the_alias_where_it_was(three: LocalStore) -> None:
    three.set_alias("tiny", "production", 2)
    with pytest.raises(AliasError):
        three.set_alias("tiny", "production", 4)
    assert version_of(three, "tiny") == 2


@pytest.mark.parametrize("name", ["tony", "../tiny", "", "x" * 5000])
def test_an_alias_of_an_unknown_model_is_refused(three: LocalStore, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        three.set_alias(name, "production", 1)


@pytest.mark.parametrize(
    "alias", ["", "3", "Production", "../x", "a/b", ".hidden", "-a", "a_b", "a\n", "a" * 32, "prod@2"]
)
def test_an_alias_is_told_from_versions_and_paths(three: LocalStore, alias: str) -> None:
    with pytest.raises(AliasError, match="must be lower-case letters"):
        three.set_alias("tiny", alias, 1)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"0", b"-1", b"1.5", b"01", b"two", b"../2", b"1 2", b"\xff", "٣".encode(), b"9" * 10]
)
def test_an_alias_file_with_garbage_is_refused(three: LocalStore, content: bytes) -> None:
    alias_file(three, "production").write_bytes(content)
    with pytest.raises(BundleError, match=r"tiny@production holds .*, not a version"):
        three.resolve("tiny")


def test_an_alias_file_that_is_too_long_is_refused(three: LocalStore) -> None:
    alias_file(three, "production").write_bytes(b"1" + b"\n" * 32)
    with pytest.raises(BundleError, match="has 33 bytes, allowed are 32"):
        three.resolve("tiny")


@pytest.mark.parametrize("content", ["1", "1\n", " 1 \r\n"])
def test_an_alias_file_written_by_hand_is_read(three: LocalStore, content: str) -> None:
    alias_file(three, "production").write_text(content)
    assert version_of(three, "tiny") == 1


def test_an_alias_file_that_points_at_no_version(three: LocalStore) -> None:
    alias_file(three, "production").write_text("9\n")
    with pytest.raises(ModelNotFoundError, match="'tiny' has no version 9; there are: 1, 2, 3"):
        three.resolve("tiny")


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_a_link_as_alias_file_is_refused(three: LocalStore, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").write_text("1\n")
    alias_file(three, "production").symlink_to(tmp_path / target)
    with pytest.raises(BundleError, match="links are not followed"):
        three.resolve("tiny")


def test_a_hard_link_as_alias_file_is_refused(three: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("1\n")
    os.link(tmp_path / "elsewhere", alias_file(three, "production"))
    with pytest.raises(BundleError, match="2 hard links"):
        three.resolve("tiny")


def test_a_linked_folder_of_aliases_is_refused(three: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "production").write_text("1\n")
    (three.root / "tiny" / "aliases").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="aliases is a link"):
        three.resolve("tiny")


@pytest.mark.parametrize("reference", ["tiny", "tiny@production", "tiny@3"])
def test_a_broken_alias_does_not_stop_the_others(three: LocalStore, reference: str) -> None:
    three.set_alias("tiny", "production", 3)
    alias_file(three, "canary").write_bytes(b"garbage")
    assert version_of(three, reference) == 3


@pytest.mark.parametrize("name", ["README", "production~", ".production.1.ab", "0"])
def test_a_file_that_cannot_be_an_alias_is_passed_over(three: LocalStore, name: str) -> None:
    three.set_alias("tiny", "production", 2)
    alias_file(three, name).write_text("3\n")
    assert three.aliases("tiny") == {"production": 2}


def test_an_alias_that_moves_while_it_is_read(three: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was opened is by then no longer in any folder; its content is whole all the same."""
    three.set_alias("tiny", "production", 1)
    opened = os.open

    def then_moved(path: Path, flags: int) -> int:
        descriptor = opened(path, flags)
        if Path(path).name == "production":
            monkeypatch.undo()
            three.set_alias("tiny", "production", 2)
        return descriptor

    monkeypatch.setattr(os, "open", then_moved)
    assert version_of(three, "tiny") == 1
    assert version_of(three, "tiny") == 2


class Overtaken(LocalStore):
    """Just after versions were listed for the first time, the next is published and becomes production."""

    def __init__(self, root: Path, draft: Draft) -> None:
        super().__init__(root)
        self._draft: Draft | None = draft

    def versions(self, name: str) -> list[int]:
        found = super().versions(name)
        if self._draft is not None:
            draft, self._draft = self._draft, None
            published = LocalStore(self.root).publish(draft.manifest, draft.files)
            LocalStore(self.root).set_alias(name, "production", published.manifest.version)
        return found


def test_a_version_published_while_its_alias_is_resolved(three: LocalStore, hollow: Draft) -> None:
    assert version_of(Overtaken(three.root, hollow), "tiny@production") == 4
