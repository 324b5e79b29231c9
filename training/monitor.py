"""A look at a run in progress, on the calibration fold: nothing is selected by it, only seen."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.audio_cache import SAMPLE_RATE_HZ
from training.objectives.spotting import event_log_odds
from training.students.edge import Edge

if TYPE_CHECKING:
    from training.run import Prepared

CLIPS_PER_CORPUS = 300
CHUNK = 64


@torch.no_grad()
def watch(student: Edge, prepared: Prepared) -> dict[str, float]:
    """Clip accuracy for each corpus with keywords, and the share of nearest neighbours (cosine, within
    the corpus) that are the same speaker's."""
    class_of = {label: index for index, label in enumerate(prepared.labels, start=1)}
    by_corpus = defaultdict(list)
    for clip in prepared.monitor:
        by_corpus[clip.corpus].append(clip)
    seen: dict[str, float] = {}
    for corpus, clips in sorted(by_corpus.items()):
        clips = clips[:: max(1, len(clips) // CLIPS_PER_CORPUS)]
        right, embeddings = [], []
        for start in range(0, len(clips), CHUNK):
            chunk = [prepared.cache.read(clip.path) for clip in clips[start : start + CHUNK]]
            lengths = torch.tensor([len(samples) for samples in chunk])
            batch = torch.zeros(len(chunk), max(int(lengths.max()), SAMPLE_RATE_HZ // 10))
            for row, samples in enumerate(chunk):
                batch[row, : len(samples)] = torch.from_numpy(samples)
            out = student(batch, lengths)
            right.append(event_log_odds(out.keyword_logits, out.mask).argmax(dim=1))
            embeddings.append(out.speaker_embedding)
        predicted = torch.cat(right).tolist()
        if any(clip.keyword for clip in clips):
            truth = [class_of.get(clip.label, 0) for clip in clips]
            seen[f"accuracy-{corpus}"] = float(np.mean([a == b for a, b in zip(truth, predicted, strict=True)]))
        speakers = [clip.speaker for clip in clips]
        if student.shape.tells_speakers and len({name for name in speakers if name}) > 1:
            similarity = torch.cat(embeddings) @ torch.cat(embeddings).T
            similarity.fill_diagonal_(-2.0)
            nearest = similarity.argmax(dim=1).tolist()
            same = [speakers[i] == speakers[j] for i, j in enumerate(nearest) if speakers[i] and speakers[j]]
            seen[f"nearest-{corpus}"] = float(np.mean(same))
    return seen
