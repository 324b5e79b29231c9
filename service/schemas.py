"""What the routes answer, as the OpenAPI document shows it. Fields are only ever added within v1."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelInfo(_Answer):
    """Which bundle answered."""

    name: str
    version: int


class DetectionInfo(_Answer):
    """One keyword event; `spoken_by_speaker` only where a speaker was named."""

    keyword: str
    score: float
    start_s: float
    end_s: float
    spoken_by_speaker: bool | None = None


class RankedKeyword(_Answer):
    """A keyword and its best score in the clip."""

    keyword: str
    score: float


class DetectAnswer(_Answer):
    """Events above threshold in time order, and the clip-level ranking."""

    model: ModelInfo
    duration_s: float
    detections: list[DetectionInfo]
    top: list[RankedKeyword]


class KeywordEntry(_Answer):
    """A label that can be detected."""

    keyword: str
    language: str
    word: str
    threshold: float


class KeywordsAnswer(_Answer):
    """All labels of the model, and where their thresholds come from."""

    model: ModelInfo
    thresholds_from: str
    keywords: list[KeywordEntry]


class EnrolmentClip(_Answer):
    """What became of one clip."""

    accepted: bool
    speech_s: float
    snr_db: float
    clipped_ratio: float
    reason: Literal["no_speech", "too_short", "too_noisy", "clipped", "different_speaker"] | None


class EnrolAnswer(_Answer):
    """The profile after this request, and each clip's fate."""

    speaker_id: str
    status: Literal["enrolling", "enrolled"]
    enrollments: int
    speech_s: float
    required_speech_s: float
    clips: list[EnrolmentClip]


class Claim(_Answer):
    """`score` is a log-likelihood ratio in nats; accepted where it reaches `threshold`."""

    speaker_id: str
    accepted: bool
    score: float
    probability: float
    threshold: float
    cosine: float


class VerifyAnswer(Claim):
    """The claim, and how much voice it rests on."""

    speech_s: float
    snr_db: float
    model: ModelInfo


class IdentifiedCandidate(_Answer):
    """One profile's score, as verify gives it."""

    speaker_id: str
    score: float
    probability: float
    cosine: float


class IdentifyAnswer(_Answer):
    """The best candidates, best first; `identified` is the first one where its score reaches the threshold."""

    candidates: list[IdentifiedCandidate]
    identified: str | None
    compared: int
    skipped: int
    threshold: float
    speech_s: float
    snr_db: float
    model: ModelInfo


class SpeakerAnswer(_Answer):
    """One profile."""

    speaker_id: str
    status: Literal["enrolling", "enrolled"]
    enrollments: int
    speech_s: float
    required_speech_s: float
    models: list[ModelInfo]
    created_at: datetime
    updated_at: datetime


class SpeakersAnswer(_Answer):
    """A page of profiles; `next_cursor` is null on the last one."""

    speakers: list[SpeakerAnswer]
    next_cursor: str | None


class EmbeddingEntry(_Answer):
    """One clip's embedding: numbers, or base64 of little-endian float32. Frames are [T][dim]."""

    index: int
    embedding: list[float] | list[list[float]] | str
    frames: int | None = None
    duration_s: float


class EmbeddingsAnswer(_Answer):
    """Embeddings in the order of the clips."""

    model: ModelInfo
    type: Literal["speaker", "utterance", "frames"]
    dim: int
    frame_hop_s: float | None = None
    data: list[EmbeddingEntry]


class KeywordsPart(_Answer):
    """As in /v1/keywords/detect."""

    detections: list[DetectionInfo]
    top: list[RankedKeyword]


class AnalyzedSpeaker(_Answer):
    """The voice in the clip: its embedding and quality, and the claim where one was made."""

    embedding: list[float]
    speech_s: float
    snr_db: float
    verification: Claim | None = None


class AnalyzedEmbedding(_Answer):
    """The utterance embedding."""

    dim: int
    embedding: list[float]


class AnalyzeAnswer(_Answer):
    """The parts that were asked for; the others are null."""

    model: ModelInfo
    duration_s: float
    keywords: KeywordsPart | None = None
    speaker: AnalyzedSpeaker | None = None
    embedding: AnalyzedEmbedding | None = None


class OperatingPointEntry(_Answer):
    """The threshold of verify and identify where `false_accept_rate` is asked for."""

    false_accept_rate: float
    threshold: float


class ModelVersion(_Answer):
    """One published version."""

    version: int
    digest: str
    loaded: bool
    created_at: datetime
    licence: str
    parameters: int
    keywords: int
    tasks: list[Literal["keywords", "speaker", "embedding"]]
    speaker_space: str | None = Field(description="Versions in which this is the same share speakers' profiles.")
    operating_points: list[OperatingPointEntry]
    metrics: list[dict[str, Any]]


class ModelAnswer(_Answer):
    """A model with its versions and aliases."""

    name: str
    aliases: dict[str, int]
    versions: list[ModelVersion]


class AliasMove(BaseModel):
    """Which version an alias shall mean."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1, le=999_999_999)


class AliasAnswer(_Answer):
    """Where the alias points now, and what requests without `model` get."""

    name: str
    alias: str
    version: int
    default: ModelInfo


class ModelsAnswer(_Answer):
    """All models of the store; `default` is what requests without `model` get."""

    default: ModelInfo
    models: list[ModelAnswer]


class HealthAnswer(_Answer):
    """The process is up; `stuck` where only a new one helps."""

    status: Literal["ok", "stuck"]


class ReadyAnswer(_Answer):
    """Whether requests should be sent here, and what is missing if not."""

    ready: bool
    checks: dict[str, bool]
