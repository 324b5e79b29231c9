"""All configuration, from environment variables prefixed `SOTTO_`, read once at start."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from model_store import builtin_store_path
from model_store.inference import Provider

Scope = Literal["infer", "enrol", "admin"]
PREFIX = "SOTTO_"
# Two CPUs hear 300 in real time on the slowest day, 400 on another (`benchmarks/results.md`).
STREAMS_PER_CPU = 150
CGROUP = Path("/sys/fs/cgroup")


class ApiKey(BaseModel):
    """A key is configured by its SHA-256 only; `sotto keys new` makes one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    scopes: tuple[Scope, ...] = ("infer", "enrol")
    tenant: str = Field(default="default", pattern=r"^[A-Za-z0-9_.-]{1,64}$")


class Settings(BaseSettings):
    """Frozen; an unknown `SOTTO_` variable is an error, because it is a typo."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on; other than loopback needs API keys.")
    port: int = Field(default=8000, ge=0, le=65535)
    data_dir: Path = Field(default=Path(".sotto"), description="Holds the SQLite file of the speaker profiles.")
    database_url: str | None = Field(default=None, repr=False, description="SQLAlchemy URL in place of SQLite.")
    ready_without_profiles: bool = Field(
        default=False,
        description="Stay ready while the profile database does not answer: all but the routes of speakers still work.",
    )
    models_dir: Path = Field(default_factory=builtin_store_path, description="Folder of the model store.")
    model: str = Field(default="sotto-edge", description="Default model: name, name@version or name@alias.")
    load_on_request: bool = Field(default=True, description="Load what `model` names; else only what aliases move to.")
    models_memory_bytes: int = Field(
        default=3 * 2**27, ge=2**20, description="Beyond this (an estimate), models not used lately are unloaded."
    )
    models_refresh_s: float = Field(
        default=10.0, ge=0, description="How often to look whether the default model's alias has moved; 0: never."
    )

    api_keys: tuple[ApiKey, ...] = Field(default=(), repr=False, description="JSON list; see `sotto keys new`.")
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description="JSON list of the origins whose pages may use the service from a browser, such as "
        '`["https://example.org"]`; `*` is all. Needs API keys. What is refused before a route has it, for want of '
        "time or of connections, a page sees as a network error.",
    )
    rate_per_minute: int = Field(default=0, ge=0, description="Requests a minute for each key; 0 is unlimited.")

    max_upload_bytes: int = Field(default=16 * 2**20, ge=1024)
    uploads_bytes: int = Field(
        default=2**28, ge=1024, description="Bodies of all requests together; past it, 503 to who uploads more."
    )
    longest_audio_s: float = Field(default=120.0, gt=0, le=600)
    request_timeout_s: float = Field(default=10.0, gt=0, le=120, description="Default and greatest deadline.")
    clips_per_request: int = Field(default=16, ge=1, le=256)

    inference_threads: int = Field(default=0, ge=0, le=256, description="Graph calls at once; 0: measured at start.")
    intra_op_threads: int = Field(default=0, ge=0, le=64, description="Threads in one call; 0: measured at start.")
    provider: Provider = Field(default="cpu", description="Where graphs run; `cuda` needs onnxruntime-gpu.")
    decode_threads: int = Field(default=0, ge=0, le=256, description="Concurrent decodes; 0: one a CPU.")
    max_batch: int = Field(default=16, ge=1, le=256, description="Clips or streams in one graph call at most.")
    clips_a_call: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Clips in one graph call while none waits long; 0: measured at start, one, four or `max_batch`.",
    )
    max_batch_audio_s: float = Field(default=32.0, gt=0, description="Cap on padded audio in one graph call.")
    call_timeout_s: float = Field(
        default=30.0, gt=0, description="A graph call or a decoder that takes longer is given up."
    )
    max_queued_audio_s: float = Field(default=1200.0, gt=0, description="Beyond this much waiting audio: 503.")

    stream_message_bytes: int = Field(
        default=2**18, ge=1024, description="Largest message on a stream; each may keep one in memory."
    )
    stream_idle_s: float = Field(default=60.0, gt=0, description="A stream without a message for this long is closed.")
    stream_send_timeout_s: float = Field(default=10.0, gt=0, description="As is one that does not read for this long.")

    profiles_memory_bytes: int = Field(
        default=2**26,
        ge=0,
        description="For vectors to identify among; of a tenant with more, all are read each time.",
    )
    enroll_required_speech_s: float = Field(default=2.0, gt=0)
    prior: float = Field(default=0.5, gt=0, lt=1, description="Prior of the claimed identity, for `probability`.")

    shutdown_grace_s: float = Field(default=20.0, gt=0, description="Longest drain after SIGTERM.")
    shutdown_delay_s: float = Field(default=0.0, ge=0, description="Serve on, not ready, this long after SIGTERM.")
    limit_connections: int = Field(
        default=1000, ge=1, description="Who comes past this many gets probes and metrics only, until some have gone."
    )
    max_streams: int = Field(
        default_factory=lambda given: _streams_of_a_machine(given["limit_connections"]),
        ge=0,
        description="WebSocket streams open at once; default: 150 for each CPU, up to half of `limit_connections`.",
    )
    keep_alive_s: int = Field(
        default=75,
        ge=1,
        description="An idle connection is kept for so long, longer than load balancers keep theirs, unless "
        "`limit_connections` are open and another comes: then those idle for longest (at least 1 s) make room.",
    )
    head_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a request's line and headers.")
    least_body_rate: int = Field(
        default=1000,
        ge=0,
        description="Bytes a second. Bodies that come in more slowly, after five seconds, get 408; clients that read "
        "more slowly for `send_timeout_s` are cut off.",
    )
    send_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="A client that reads nothing for this long, or less than `least_body_rate` asks, is cut off.",
    )
    unread_bytes: int = Field(
        default=2**28,
        ge=0,
        description="Answers that clients have not read yet, of all together; past it, those are cut off that have had "
        "the longest to read.",
    )
    access_log: bool = Field(
        default=False, description="Log every request; else changes, refused callers and failures only."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_variables(cls, values: dict[str, Any]) -> dict[str, Any]:
        known = {PREFIX + name.upper() for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return values

    @field_validator("api_keys")
    @classmethod
    def _distinct_names(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        names = [key.name for key in keys]
        if len(set(names)) != len(names):
            raise ValueError("two API keys share a name")
        return keys

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Settings:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"SOTTO_HOST={self.host} can be reached from other machines, and no API key is configured. "
                "Make a key with `sotto keys new`, put the line it prints into the environment, or listen on 127.0.0.1."
            )
        return self

    @field_validator("cors_origins")
    @classmethod
    def _plain_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            # Compared as browsers send them: in lower case, without the port that goes without saying.
            port = {"http": ":80", "https": ":443"}.get(origin.partition("://")[0], "")
            plain = re.fullmatch(r"https?://[^/\s?#@*A-Z]+", origin) and not origin.endswith(port)
            if origin != "*" and not plain:
                raise ValueError(
                    f"{origin!r} is no origin: scheme, host and perhaps port, in lower case and without the scheme's "
                    "own port, such as https://example.org; `*` is all of them, and stands alone"
                )
        return origins

    @model_validator(mode="after")
    def _pages_with_keys(self) -> Settings:
        if self.cors_origins and not self.api_keys:
            raise ValueError("SOTTO_CORS_ORIGINS needs API keys: without them pages of other origins are refused")
        return self

    @model_validator(mode="after")
    def _room_for_one(self) -> Settings:
        if self.uploads_bytes < self.max_upload_bytes:
            raise ValueError(
                f"SOTTO_UPLOADS_BYTES={self.uploads_bytes} is less than one upload may have, "
                f"SOTTO_MAX_UPLOAD_BYTES={self.max_upload_bytes}"
            )
        return self

    @property
    def profiles_url(self) -> str:
        """SQLAlchemy URL of the profile database."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'profiles.sqlite3'}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _streams_of_a_machine(connections: int) -> int:
    """As many as it hears in real time, with connections left for others."""
    return min(STREAMS_PER_CPU * available_cpus(), -(-connections // 2))


def available_cpus() -> int:
    """CPUs this process may use: the affinity mask, lowered to the cgroup's quota where there is one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    for quota, period in (_cgroup_v2(), _cgroup_v1()):
        if quota > 0 and period > 0:
            cpus = min(cpus, max(1, int(quota / period)))
    return cpus


def _cgroup_v2() -> tuple[float, float]:
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return (0.0, 0.0) if quota == "max" else (float(quota), float(period))
    except (OSError, ValueError):
        return 0.0, 0.0


def _cgroup_v1() -> tuple[float, float]:
    folder = CGROUP / "cpu"
    try:
        return float((folder / "cpu.cfs_quota_us").read_text()), float((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return 0.0, 0.0
