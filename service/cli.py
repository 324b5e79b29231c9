"""`sotto serve`, `sotto keys` and `sotto profiles`."""

from __future__ import annotations

import gc
import json
import shlex
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from model_store import StoreError
from service.auth import DEFAULT_TENANT, hash_key, new_key
from service.errors import ServiceError, faults_of
from service.settings import ApiKey, Settings

app = typer.Typer(help="The service.")
keys = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(keys, name="keys")
profiles = typer.Typer(no_args_is_help=True, help="The database of speakers' profiles.")
app.add_typer(profiles, name="profiles")


@app.command()
def serve() -> None:
    """Serve, in the foreground. Configured by SOTTO_* variables (SOTTO_HOST, SOTTO_PORT, SOTTO_DATA_DIR, ...)."""
    # Nothing that is made from here to the first request is garbage worth looking for (`Server.startup`).
    gc.disable()
    from service.server import run

    try:
        settings = Settings()
        status = run(settings)
    except ValidationError as error:
        for fault in error.errors():
            name = "SOTTO_" + "_".join(map(str, fault["loc"])).upper() if fault["loc"] else "settings"
            typer.echo(f"error: {name}: {fault['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from error
    except StoreError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except ServiceError as error:
        raise _failed(error) from error
    sys.exit(status)


def _failed(error: ServiceError) -> typer.Exit:
    cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ else ""
    typer.echo(f"error: {error}{cause}", err=True)
    return typer.Exit(1)


@keys.command("new")
def new(
    name: str = "default",
    scope: list[str] = ["infer", "enrol"],  # noqa: B006  typer copies it
    tenant: Annotated[str, typer.Option(help="Keys of one tenant share their speakers; others see none of them.")] = (
        DEFAULT_TENANT
    ),
) -> None:
    """Make an API key; prints the secret once, and the configuration that accepts it."""
    secret = new_key()
    try:
        entry = ApiKey.model_validate(
            {"name": name, "sha256": hash_key(secret), "scopes": scope, "tenant": tenant}
        ).model_dump(mode="json")
    except ValidationError as error:
        typer.echo(f"error: {faults_of(error.errors())}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"key (give this to the caller, it is not stored): {secret}")
    typer.echo(f"SOTTO_API_KEYS={shlex.quote(json.dumps([entry]))}")


@profiles.command("copy")
def copy(
    source: Annotated[str, typer.Argument(help="A SQLite file, or a database's URL.")],
    destination: Annotated[
        str | None, typer.Argument(help="Likewise, without speakers; default: what the service uses.")
    ] = None,
) -> None:
    """Copy all speakers, as they are at one moment, into a database that has none: a backup, its return, or another
    kind of database. The service may run meanwhile; what it then changes is not in the copy."""
    from service.speakers.copying import CopyError, copy_profiles, url_of

    try:
        to = url_of(Settings().profiles_url if destination is None else destination)
        count = copy_profiles(url_of(source), to)
    except CopyError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except ServiceError as error:
        raise _failed(error) from error
    typer.echo(f"speakers copied to {to.render_as_string()}: {count}")
