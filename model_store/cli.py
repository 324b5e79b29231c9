"""`sotto models ...`: look at a store, publish into it, move aliases, verify."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from model_store.errors import StoreError
from model_store.manifest import Manifest
from model_store.reference import check_alias
from model_store.store import MANIFEST, Bundle, LocalStore, builtin_store_path, open_bundle
from model_store.verify import check_space, verify_bundle

app = typer.Typer(no_args_is_help=True, help="Versioned model bundles.")
console = Console()

Store = Annotated[Path, typer.Option("--store", help="Folder of the store.", envvar="SOTTO_MODELS_DIR")]
BUILTIN = builtin_store_path()


@app.command("list")
def list_models(store: Store = BUILTIN) -> None:
    """Every model with its versions and aliases."""
    table = Table("model", "versions", "aliases")
    local = LocalStore(store)
    try:
        for name in local.names():
            aliases = ", ".join(f"{alias} -> {version}" for alias, version in local.aliases(name).items())
            table.add_row(name, ", ".join(map(str, local.versions(name))), aliases)
    except StoreError as error:
        raise _refused(error) from error
    console.print(table)


@app.command()
def show(model: str, store: Store = BUILTIN) -> None:
    """The manifest of MODEL (name, name@3 or name@alias) as JSON."""
    bundle = _resolve(store, model)
    console.print_json(json.dumps({"digest": bundle.digest, **bundle.manifest.model_dump(mode="json")}))


Space = Annotated[
    str | None,
    typer.Option("--space", help="Published version, NAME@3, with which speakers' profiles are shared; checked."),
]


@app.command()
def publish(folder: Path, store: Store = BUILTIN, alias: str | None = None, space: Space = None) -> None:
    """Verify the bundle in FOLDER, add it to the store under the next version, and print that."""
    try:
        if alias is not None:
            check_alias(alias)
        draft = open_bundle(folder)
        verify_bundle(draft)
        local = LocalStore(store)
        manifest = draft.manifest if space is None else _in_space(draft, local.resolve(space))
        files = {name: draft.read(name) for name in manifest.files}
        published = local.publish(manifest, files)
        if alias is not None:
            local.set_alias(published.manifest.name, alias, published.manifest.version)
    except StoreError as error:
        raise _refused(error) from error
    typer.echo(f"{published.manifest.name}@{published.manifest.version}")


@app.command()
def alias(model: str, name: str, version: int, store: Store = BUILTIN) -> None:
    """Point alias NAME of MODEL at VERSION."""
    try:
        LocalStore(store).set_alias(model, name, version)
    except StoreError as error:
        raise _refused(error) from error
    typer.echo(f"{model}@{name} -> {version}")


@app.command()
def verify(model: str, store: Store = BUILTIN) -> None:
    """Check every file, the graph and the golden clip of MODEL, which may also be a folder."""
    folder = Path(model)
    try:
        # Of text that is too long for a path, `Path.is_file` raises.
        bundle = open_bundle(folder) if os.path.isfile(folder / MANIFEST) else LocalStore(store).resolve(model)
        verify_bundle(bundle)
    except StoreError as error:
        raise _refused(error) from error
    typer.echo(f"{bundle.manifest.name}@{bundle.manifest.version} is sound: {bundle.digest}")


def _in_space(draft: Bundle, other: Bundle) -> Manifest:
    """Raises BundleError."""
    check_space(draft, other)
    assert draft.manifest.speaker is not None
    speaker = draft.manifest.speaker.model_copy(update={"space": other.manifest.speaker_space})
    return draft.manifest.model_copy(update={"speaker": speaker})


def _resolve(store: Path, model: str) -> Bundle:
    try:
        return LocalStore(store).resolve(model)
    except StoreError as error:
        raise _refused(error) from error


def _refused(error: StoreError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
