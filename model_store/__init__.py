"""Versioned model bundles: the one contract between `training` and `service`."""

from model_store.errors import AliasError, BundleError, ModelNotFoundError, StoreError
from model_store.manifest import (
    AudioLimits,
    Calibration,
    EmbeddingInfo,
    FileEntry,
    GraphInfo,
    Keyword,
    KeywordInfo,
    Lineage,
    Manifest,
    Metric,
    OperatingPoint,
    SpeakerInfo,
    StreamInfo,
)
from model_store.reference import ModelReference
from model_store.store import Bundle, LocalStore, builtin_store_path
from model_store.verify import verify_bundle

__all__ = [
    "AliasError",
    "AudioLimits",
    "Bundle",
    "BundleError",
    "Calibration",
    "EmbeddingInfo",
    "FileEntry",
    "GraphInfo",
    "Keyword",
    "KeywordInfo",
    "Lineage",
    "LocalStore",
    "Manifest",
    "Metric",
    "ModelNotFoundError",
    "ModelReference",
    "OperatingPoint",
    "SpeakerInfo",
    "StoreError",
    "StreamInfo",
    "builtin_store_path",
    "verify_bundle",
]
