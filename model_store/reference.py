"""How a model is named: `name`, `name@3`, `name@alias`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model_store.errors import AliasError, ModelNotFoundError
from model_store.manifest import NAME_PATTERN

DEFAULT_ALIAS = "production"
ALIAS_PATTERN = r"^[a-z][a-z0-9-]{0,30}$"


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A parsed reference; at most one of `version` and `alias` is set."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Raises ModelNotFoundError for text that can name no model."""
        name, at, rest = text.partition("@")
        if not re.fullmatch(NAME_PATTERN, name):
            raise ModelNotFoundError(f"{text[:80]!r} names no model; write name, name@3 or name@alias")
        if not at:
            return cls(name)
        if re.fullmatch(r"[1-9][0-9]{0,8}", rest):
            return cls(name, version=int(rest))
        if is_alias(rest):
            return cls(name, alias=rest)
        raise ModelNotFoundError(f"{text[:80]!r}: after @ comes a version number or an alias")

    def __str__(self) -> str:
        suffix = self.version if self.version is not None else self.alias
        return self.name if suffix is None else f"{self.name}@{suffix}"


def is_alias(text: str) -> bool:
    return re.fullmatch(ALIAS_PATTERN, text) is not None


def check_alias(alias: str) -> str:
    """The alias itself; raises AliasError where it could not be told from a version or a path."""
    if not is_alias(alias):
        raise AliasError(f"alias {alias[:80]!r} must be lower-case letters, digits and dashes, starting with a letter")
    return alias
