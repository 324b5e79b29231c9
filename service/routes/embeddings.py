"""Speech embeddings of one or several clips."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from service.engine import Outputs, Part
from service.errors import InvalidSamplesError, NoSpeechError, NotFoundError, TaskUnsupportedError
from service.intake import Clip, deadline_of
from service.queueing import Priority
from service.routes.common import (
    AUDIO_ERRORS,
    Infers,
    ModelParameter,
    audio_body,
    clock_of,
    model_info,
    named,
    problems,
    runtime_of,
)
from service.routes.direct import DirectRoute
from service.runtime import together
from service.schemas import EmbeddingEntry, EmbeddingsAnswer
from service.speech import measure

router = APIRouter(prefix="/v1/embeddings", tags=["embeddings"], route_class=DirectRoute)

Kind = Literal["speaker", "utterance", "frames"]
Encoding = Literal["float", "base64"]
# Written at once, some milliseconds of the event loop: two minutes of frames take half a second, for few kilobytes of
# silence. A multiple of three, so that pieces of base64 join without padding.
FRAMES_AT_ONCE = 96
EXAMPLE = {
    "model": {"name": "sotto-edge", "version": 1},
    "type": "speaker",
    "dim": 192,
    "data": [{"index": 0, "embedding": [0.021, -0.113, 0.054], "duration_s": 1.0}],
}


@dataclass(frozen=True, slots=True)
class _Embedded:
    """A clip's vector [D], or its frames [T, D]."""

    values: npt.NDArray[np.float32]
    duration_s: float


@router.post(
    "",
    summary="Embed clips",
    response_model=EmbeddingsAnswer,
    response_model_exclude_none=True,
    responses={
        200: {"content": {"application/json": {"example": EXAMPLE}}},
        **problems(*AUDIO_ERRORS, InvalidSamplesError, NoSpeechError, NotFoundError, TaskUnsupportedError),
    },
    openapi_extra=audio_body(several=True),
)
async def embed(
    request: Request,
    caller: Infers,  # noqa: ARG001  the check is what it is for
    type: Annotated[Kind, Query(description="Whose voice, what is said, or the latter frame by frame.")] = "speaker",
    encoding: Annotated[Encoding, Query(description="Numbers, or base64 of little-endian float32.")] = "float",
    model: ModelParameter = None,
) -> Response:
    """One entry a clip, in order. `speaker` and `utterance` vectors have unit length."""
    runtime, clock = runtime_of(request), clock_of(request)
    deadline = deadline_of(request, runtime.settings)
    engine = await runtime.engine_for(model, deadline, "speaker" if type == "speaker" else "embedding")
    clips = await runtime.uploads.receive(request, clock, deadline, at_most=runtime.settings.clips_per_request)

    part: Part = "speaker" if type == "speaker" else "all"
    # Who sends many clips at once waits for them all, so they give way to those who sent one.
    priority = Priority.CLIP if len(clips) == 1 else Priority.BULK

    async def one(clip: Clip) -> _Embedded:
        waveform = await runtime.decode(engine, clip, clock, deadline)
        if type == "speaker" and measure(waveform).speech_s == 0:
            raise NoSpeechError("holds silence or steady noise only; it has no speaker")
        outputs = await runtime.infer(engine, waveform, clock, deadline, part, priority=priority)
        with clock.stage("postprocess"):
            return _Embedded(_pick(outputs, type), waveform.duration_s)

    found = await together(named(index, len(clips), one(clip)) for index, clip in enumerate(clips))
    info = engine.manifest
    body = EmbeddingsAnswer(
        model=model_info(engine),
        type=type,
        dim=engine.speaker.dim if type == "speaker" else info.embedding.dim,
        frame_hop_s=info.embedding.frame_hop_s if type == "frames" else None,
        data=[],
    )
    if type == "frames":
        return StreamingResponse(_written(body, found, encoding), media_type="application/json")
    body.data.extend(
        EmbeddingEntry(
            index=index,
            embedding=one.values.tolist() if encoding == "float" else _base64(one.values),
            duration_s=one.duration_s,
        )
        for index, one in enumerate(found)
    )
    return Response(body.model_dump_json(exclude_none=True), media_type="application/json")


async def _written(body: EmbeddingsAnswer, found: list[_Embedded], encoding: Encoding) -> AsyncIterator[str]:
    """The answer, frames piece by piece: others have their turn in between, and a client that does not read costs no
    memory but what is still to be written. Empties `found`."""
    head, _, tail = body.model_dump_json(exclude_none=True).rpartition("[]")
    yield f"{head}["
    found.reverse()
    for index in range(len(found)):
        one = found.pop()
        opening, closing = ("[", "]") if encoding == "float" else ('"', '"')
        yield f'{"," if index else ""}{{"index":{index},"embedding":{opening}'
        for first in range(0, len(one.values), FRAMES_AT_ONCE):
            piece = one.values[first : first + FRAMES_AT_ONCE]
            if encoding == "base64":
                yield _base64(piece)
            else:
                yield ("," if first else "") + json.dumps(piece.tolist(), separators=(",", ":"))[1:-1]
            await asyncio.sleep(0)
        yield f'{closing},"frames":{len(one.values)},"duration_s":{one.duration_s}}}'
    yield f"]{tail}"


def _pick(outputs: Outputs, kind: Kind) -> npt.NDArray[np.float32]:
    if kind == "speaker":
        return outputs.speaker_embedding
    return outputs.embedding if kind == "utterance" else outputs.frames


def _base64(values: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()
