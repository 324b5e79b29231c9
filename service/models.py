"""The models that are loaded: the default one, and others that were asked for by name.

A model is verified, loaded and warmed beside those that serve, and takes part only then; what runs keeps
its own reference, so that a model which is replaced or unloaded ends with its last request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from model_store import Bundle, BundleError, LocalStore, ModelNotFoundError, StoreError
from service.engine import Engine
from service.errors import ModelUnusableError, NotFoundError

# After a bundle did not load.
TRY_AGAIN_S = 60.0
# That look into the store, and load.
THREADS = 4

log = logging.getLogger(__name__)

T = TypeVar("T")
Load = Callable[[Bundle], Engine]
Changed = Callable[[Engine], None]


class Models:
    """Loaded engines by digest, least recently used first. All methods but `start` belong to the event loop."""

    def __init__(
        self,
        store: LocalStore,
        default: str,
        *,
        load: Load,
        load_on_request: bool,
        most_bytes: int,
        became_default: Changed,
        unloaded: Changed,
    ) -> None:
        self._store = store
        self._reference = default
        self._load = load
        self._load_on_request = load_on_request
        self._most_bytes = most_bytes
        self._became_default = became_default
        self._unloaded = unloaded
        self._loaded: OrderedDict[str, Engine] = OrderedDict()
        self._default: Engine | None = None
        # Loading takes all of a CPU for a while, so one model at a time.
        self._loading = asyncio.Lock()
        # Digest -> why a bundle did not load, and when it may be tried again: checks cost a core for a while, and what
        # failed may have been the disk.
        self._unusable: dict[str, tuple[str, float]] = {}
        self._refreshing = asyncio.Lock()
        self._coming: dict[str, asyncio.Task[Engine]] = {}
        # A store on a network may never answer, and for threads of asyncio's own its end would wait.
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="models")

    def start(self) -> None:
        """Load the default model. Blocking. Raises model_store.StoreError."""
        self._adopt(self._load(self._store.resolve(self._reference)))

    def close(self, patience_s: float) -> bool:
        """Stop all threads; False where some were still in a call that long after. Blocking."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + patience_s
        for thread in self.threads._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads._threads)

    @property
    def default(self) -> Engine:
        """The engine of requests that name no model."""
        if self._default is None:
            raise RuntimeError("no model is loaded yet")
        return self._default

    def is_loaded(self, digest: str) -> bool:
        """Whether the bundle with this digest serves."""
        return digest in self._loaded

    @property
    def memory_bytes(self) -> int:
        """An estimate of what all loaded models hold."""
        return sum(engine.memory_bytes for engine in self._loaded.values())

    @property
    def loading(self) -> bool:
        """Whether some model is."""
        return bool(self._coming)

    async def named(self, reference: str | None) -> Engine:
        """The engine that a `model` parameter names, loaded if need be. Raises NotFoundError, ModelUnusableError."""
        if reference is None:
            return self.default
        bundle = await self._resolve(reference)
        if not self._load_on_request and not self.is_loaded(bundle.digest):
            raise NotFoundError(f"{reference} is not loaded")
        return await self._ensure(bundle)

    async def move_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias at a version that loads, and serve by it from the next request on.

        Raises NotFoundError, ModelUnusableError: then nothing has changed.
        """
        await self._ensure(await self._resolve(f"{name}@{version}"))
        try:
            await self._beside(lambda: self._store.set_alias(name, alias, version))
        except StoreError as error:
            raise ModelUnusableError(str(error)) from error
        except OSError as error:
            raise ModelUnusableError(f"the store cannot be written: {error.strerror or error}") from error
        await self.refresh()

    async def refresh(self) -> None:
        """Serve what the default's name means now: someone may have moved its alias. A version that does not
        load leaves the old one in place, and is logged."""
        # One at a time, or a slower one could end last and bring an older answer.
        async with self._refreshing:
            try:
                bundle = await self._resolve(self._reference)
                if bundle.digest != self.default.bundle.digest:
                    self._adopt(await self._ensure(bundle))
            except (NotFoundError, ModelUnusableError) as error:
                log.error("%s is not served, %s stays: %s", self._reference, self.default.manifest.version, error)

    async def _resolve(self, reference: str) -> Bundle:
        try:
            return await self._beside(lambda: self._store.resolve(reference))
        except (ModelNotFoundError, BundleError) as error:
            raise NotFoundError(str(error)) from error

    async def _ensure(self, bundle: Bundle) -> Engine:
        """Loaded, once for all who wait. Whoever stops waiting leaves the loading to the others."""
        digest = bundle.digest
        engine = self._touched(digest)
        if engine is not None:
            return engine
        reason, again = self._unusable.get(digest, ("", 0.0))
        if time.monotonic() < again:
            raise ModelUnusableError(reason)
        task = self._coming.get(digest)
        if task is None:
            task = self._coming[digest] = asyncio.create_task(self._load_beside(bundle))
            task.add_done_callback(lambda _: self._coming.pop(digest, None))
        try:
            return await asyncio.shield(task)
        except StoreError as error:
            self._unusable[digest] = str(error), time.monotonic() + TRY_AGAIN_S
            raise ModelUnusableError(str(error)) from error

    async def _load_beside(self, bundle: Bundle) -> Engine:
        async with self._loading:
            engine = await self._beside(lambda: self._load(bundle))
        self._keep(engine)
        return engine

    async def _beside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def _touched(self, digest: str) -> Engine | None:
        engine = self._loaded.get(digest)
        if engine is not None:
            self._loaded.move_to_end(digest)
        return engine

    def _keep(self, engine: Engine) -> None:
        self._loaded[engine.bundle.digest] = engine
        for digest in list(self._loaded):
            if self.memory_bytes <= self._most_bytes:
                break
            if digest not in (engine.bundle.digest, self.default.bundle.digest):
                self._unloaded(self._loaded.pop(digest))

    def _adopt(self, engine: Engine) -> None:
        before, self._default = self._default, engine
        self._keep(engine)
        self._became_default(engine)
        if before is not None and before.bundle.digest != engine.bundle.digest:
            self._loaded.pop(before.bundle.digest, None)
            self._unloaded(before)
