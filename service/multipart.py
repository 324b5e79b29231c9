"""multipart/form-data -> the bytes of its `audio` parts, from a body that is already bounded and in memory.

The parser is python-multipart's; nothing is spooled to disk and the number of parts is capped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import DeadlineExceededError, MalformedBodyError

AUDIO_PART = b"audio"
MOST_HEADER_BYTES = 4096
# Parsed between two looks at the clock: a tenth of a second at worst, where every few bytes are almost a boundary.
PIECE_BYTES = 2**18


@dataclass(slots=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)


def audio_parts(body: bytes, content_type: str, *, at_most: int, deadline: float) -> list[tuple[bytes, str]]:
    """(bytes, content type) of every part named `audio`, in order. Blocking. Raises MalformedBodyError, and
    DeadlineExceededError where it takes until after `deadline`, on time.monotonic."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedBodyError("multipart/form-data without a boundary")
    parts = _parse(body, boundary, at_most=at_most, deadline=deadline)
    found = []
    for part in parts:
        _, disposition = parse_options_header(part.headers.get(b"content-disposition", b""))
        if disposition.get(b"name") == AUDIO_PART:
            kind = part.headers.get(b"content-type", b"application/octet-stream").decode("latin-1")
            found.append((bytes(part.data), kind))
    if not found:
        raise MalformedBodyError("the form has no part named `audio`")
    return found


def _parse(body: bytes, boundary: bytes, *, at_most: int, deadline: float) -> list[_Part]:
    parts: list[_Part] = []
    name, value = bytearray(), bytearray()
    ended = False

    def begin() -> None:
        if len(parts) >= at_most:
            raise MalformedBodyError(f"more than {at_most} parts")
        parts.append(_Part())

    def header_name(data: bytes, start: int, end: int) -> None:
        name.extend(data[start:end])
        limit()

    def header_value(data: bytes, start: int, end: int) -> None:
        value.extend(data[start:end])
        limit()

    def limit() -> None:
        if len(name) + len(value) > MOST_HEADER_BYTES:
            raise MalformedBodyError(f"a part's header is longer than {MOST_HEADER_BYTES} bytes")

    def header_end() -> None:
        parts[-1].headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def content(data: bytes, start: int, end: int) -> None:
        parts[-1].data += data[start:end]

    def finish() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": header_name,
                "on_header_value": header_value,
                "on_header_end": header_end,
                "on_part_data": content,
                "on_end": finish,
            },
        )
        for first in range(0, len(body), PIECE_BYTES):
            if first and time.monotonic() >= deadline:
                raise DeadlineExceededError("the deadline passed while the form was parsed")
            parser.write(body[first : first + PIECE_BYTES])
        parser.finalize()
    except FormParserError as error:
        raise MalformedBodyError(f"the form does not parse: {error}") from error
    if not ended:
        raise MalformedBodyError("the form breaks off before its closing boundary")
    return parts
