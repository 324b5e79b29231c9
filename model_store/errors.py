"""StoreError
├─ BundleError         a bundle is malformed, altered, or breaks the graph contract
├─ ModelNotFoundError  no such name, version or alias
└─ AliasError          an alias cannot be moved as asked
"""


class StoreError(Exception):
    """Root of what the store raises on purpose."""


class BundleError(StoreError):
    """The bundle must not be served; the message names the file and the fault."""


class ModelNotFoundError(StoreError):
    """Nothing in the store answers to the reference."""


class AliasError(StoreError):
    """The alias name or the version it should point to is not acceptable."""
