"""What is written in one turn of the event loop goes out in one piece, in order, and nothing of it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from service.lingering import MOST_HELD_BYTES, LingeringTransport


class Wire:
    """The transport below, and the protocol above."""

    def __init__(self) -> None:
        self.told: list[bytes | str] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.told.append(bytes(data))

    def write_eof(self) -> None:
        self.told.append("eof")

    def close(self) -> None:
        self.told.append("close")
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def hears_more(self) -> bool:
        return False

    def set_protocol(self, protocol: object) -> None: ...
    def resume_reading(self) -> None: ...
    def part(self) -> None: ...


class MidUpload(Wire):
    def hears_more(self) -> bool:
        return True


LARGE = bytes(MOST_HELD_BYTES + 1)


def told(steps: Callable[[LingeringTransport], object], wire: Wire | None = None) -> list[bytes | str]:
    """What the transport below is told during the steps and one turn of the loop after them."""
    wire = wire or Wire()

    async def main() -> None:
        steps(LingeringTransport(wire, wire))  # type: ignore[arg-type]  # all that is asked of a protocol here
        await asyncio.sleep(0)

    asyncio.run(main())
    return wire.told


def test_head_and_body_are_one_piece() -> None:
    assert told(lambda to: (to.write(b"head"), to.write(b"body"))) == [b"headbody"]


def test_a_turn_later_is_another_piece() -> None:
    wire = Wire()
    assert told(lambda to: to.write(b"one"), wire) == [b"one"]
    assert told(lambda to: to.write(b"two"), wire) == [b"one", b"two"]


def test_what_is_flushed_goes_at_once_and_once() -> None:
    assert told(lambda to: (to.write(b"one"), to.flush(), to.write(b"two"))) == [b"one", b"two"]


def test_what_is_large_is_neither_held_nor_copied_nor_overtaken() -> None:
    wire = Wire()
    assert told(lambda to: (to.write(b"head"), to.write(LARGE), wire.told.append("now")), wire) == [
        b"head",
        LARGE,
        "now",
    ]


def test_many_small_pieces_are_held_up_to_a_bound() -> None:
    sizes: list[int] = []

    def steps(to: LingeringTransport) -> None:
        for _ in range(100):
            to.write(bytes(1000))
            sizes.append(to.get_write_buffer_size())

    assert sum(len(piece) for piece in told(steps)) == 100_000
    assert max(sizes) <= MOST_HELD_BYTES


@pytest.mark.parametrize(("wire", "end"), [(Wire(), "close"), (MidUpload(), "eof")])
def test_the_last_word_goes_before_the_end(wire: Wire, end: str) -> None:
    assert told(lambda to: (to.write(b"last"), to.close(), to.write(b"more")), wire)[:2] == [b"last", end]
    assert b"more" not in wire.told


def test_nothing_goes_to_a_client_that_was_cut_off() -> None:
    assert told(lambda to: (to.write(b"late"), to.abort())) == ["close"]


def test_what_is_held_is_not_taken() -> None:
    taken: list[int] = []
    told(lambda to: (to.write(b"head"), taken.append(to.taken_bytes), to.flush(), taken.append(to.taken_bytes)))
    assert taken == [0, 4]
