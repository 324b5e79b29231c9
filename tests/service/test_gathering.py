"""Small messages, put together for whom they are too little by themselves."""

from __future__ import annotations

import time

import pytest

from service.websocket import MOST_GATHERED, Gathering

Delivered = list[tuple[bytes, int]]


@pytest.fixture
def delivered() -> Delivered:
    return []


@pytest.fixture
def gathering(delivered: Delivered) -> Gathering:
    return Gathering(lambda data, messages: delivered.append((data, messages)))


def test_nothing_is_kept_of_whom_nobody_asked_for_more(gathering: Gathering, delivered: Delivered) -> None:
    for data in (b"ab", b"", b"c"):
        gathering.add(data)
    assert delivered == [(b"ab", 1), (b"", 1), (b"c", 1)]


def test_what_is_too_little_waits_for_more(gathering: Gathering, delivered: Delivered) -> None:
    gathering.want(5)
    for data in (b"ab", b"cd", b"ef", b"gh"):
        gathering.add(data)
    assert delivered == [(b"abcdef", 3)]
    assert gathering.take() == b"gh"


def test_what_has_become_enough_is_delivered_at_once(gathering: Gathering, delivered: Delivered) -> None:
    gathering.want(5)
    gathering.add(b"abc")
    gathering.want(4)
    assert delivered == []
    gathering.want(3)
    assert delivered == [(b"abc", 1)]


def test_no_more_than_so_many_are_kept_however_small(gathering: Gathering, delivered: Delivered) -> None:
    gathering.want(10**6)
    for _ in range(MOST_GATHERED + 1):
        gathering.add(b"")
    assert delivered == [(b"", MOST_GATHERED)]


def test_a_flush_delivers_what_there_is(gathering: Gathering, delivered: Delivered) -> None:
    gathering.want(5)
    gathering.flush()
    assert delivered == []
    gathering.add(b"ab")
    gathering.flush()
    gathering.flush()
    assert delivered == [(b"ab", 1)]


def test_what_is_taken_is_not_delivered(gathering: Gathering, delivered: Delivered) -> None:
    gathering.want(5)
    gathering.add(b"ab")
    assert gathering.take() == b"ab"
    gathering.add(b"cdefg")
    assert delivered == [(b"cdefg", 1)]


def test_it_is_known_when_the_latest_came(gathering: Gathering) -> None:
    gathering.want(5)
    begin = time.monotonic()
    gathering.add(b"a")
    assert begin <= gathering.heard_at <= time.monotonic()
