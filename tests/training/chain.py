"""Tiny models and recipes of every stage after `sotto pretrain`, for the files of tests that stand on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HubertConfig, HubertModel

from training.distil import DistilRecipe
from training.finetune import FinetuneRecipe
from training.pretrain import PretrainRecipe

TEACHER_SHAPE = {"hidden_size": 16, "layers": 2, "heads": 2, "feed_forward": 32, "conv_channels": 8}
SCHEDULE = {"steps": 8, "batch_size": 8, "checkpoint_every": 4, "watch_every": 4, "workers": 0}


@dataclass(frozen=True)
class Chain:
    """A teacher and a student distilled from it."""

    data: Path
    cache: Path
    teacher: Path
    distilled: Path


def tiny_hubert(**changes: object) -> HubertModel:
    """Two layers of 16, always with the same weights."""
    settings = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return HubertModel(HubertConfig(**{**settings, **changes}))


def pretrain_recipe(data: Path, **changes: object) -> PretrainRecipe:
    schedule = {"steps": 6, "checkpoint_every": 2, "watch_every": 3, "workers": 0, "peak_learning_rate": 1e-3}
    settings = {
        "name": "tiny", "data": data, "shape": TEACHER_SHAPE, "batch_s": 8.0, "fold": 0.1,
        "passes": [{"clusters": 6, "schedule": schedule}, {"clusters": 8, "layer": 1, "schedule": schedule}],
    }  # fmt: skip
    return PretrainRecipe.model_validate({**settings, **changes})


def distil_recipe(data: Path, **changes: object) -> DistilRecipe:
    settings = {"name": "d", "data": data, "layers": 1, "targets": (1, 2), "batch_s": 8.0, "fold": 0.1}
    return DistilRecipe.model_validate({**settings, "schedule": SCHEDULE, **changes})


def tune_recipe(data: Path, **changes: object) -> FinetuneRecipe:
    schedule = {**SCHEDULE, "peak_learning_rate": 3e-3}
    settings = {"name": "f", "data": data, "speaker_dim": 8, "sampling": {"crop_s": 1.0}, "schedule": schedule}
    return FinetuneRecipe.model_validate({**settings, **changes})
