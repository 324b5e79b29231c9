"""BentoML around the graph: one worker process a core."""

import os
from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmarks.spotting import Spotter


@bentoml.service(workers=len(os.sched_getaffinity(0)), traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Detector:
    def __init__(self) -> None:
        self.spotter = Spotter()

    @bentoml.api(route="/detect")
    def detect(self, audio: Annotated[Path, ContentType("audio/wav")], /) -> dict:
        return self.spotter(audio.read_bytes())
