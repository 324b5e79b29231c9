"""How fast a stream is read, and how long its audio has waited."""

from __future__ import annotations

import pytest

from service.pacing import BURST_S, FURTHEST_AHEAD_S, MESSAGES_PER_S, Pacing

MESSAGE_S = 0.25


def test_what_was_waited_for_has_not_waited() -> None:
    pacing = Pacing(100.0)
    for now in (100.3, 100.5, 107.0, 107.1):
        assert pacing.rest_s(now) == 0
        pacing.came(MESSAGE_S, now, waited=True)
        assert pacing.due == now


def test_a_microphone_that_is_not_kept_up_with_shows_its_backlog() -> None:
    """Messages of 0.25 s, each of which takes 0.4 s."""
    pacing, now, delays = Pacing(0.0), 0.25, []
    for number in range(10):
        pacing.came(MESSAGE_S, now, waited=number == 0)
        now += 0.4
        delays.append(now - pacing.due)
    assert delays == pytest.approx([0.4 + 0.15 * number for number in range(10)])


def test_a_backlog_is_over_once_there_is_nothing_to_read() -> None:
    pacing = Pacing(0.0)
    pacing.came(MESSAGE_S, 1.0, waited=True)
    pacing.came(MESSAGE_S, 4.0, waited=False)
    assert 4.0 - pacing.due == pytest.approx(2.75)
    pacing.came(MESSAGE_S, 4.1, waited=True)
    assert pacing.due == 4.1


def test_a_file_that_is_read_faster_than_it_plays_does_not_wait() -> None:
    pacing, now = Pacing(0.0), 0.0
    # The large one is followed by a rest that is the client's own doing.
    for seconds in (8.0, 8.0, 0.02, 1.0, 0.02, 8.0, 0.02):
        now += pacing.rest_s(now)
        pacing.came(seconds, now, waited=False)
        assert pacing.due == pytest.approx(now)
        now += 0.01


def test_a_file_that_is_read_more_slowly_than_it_plays_waits() -> None:
    pacing, now = Pacing(0.0), 0.0
    for _ in range(10):
        assert pacing.rest_s(now) == 0
        pacing.came(1.0, now, waited=False)
        now += 1.5
    assert now - pacing.due == pytest.approx(6.0)


def test_no_stream_is_read_far_ahead_of_the_clock() -> None:
    pacing = Pacing(0.0)
    pacing.came(FURTHEST_AHEAD_S, 0.0, waited=True)
    assert pacing.rest_s(0.0) == 0
    pacing.came(3.0, 0.0, waited=True)
    assert (pacing.ahead_s(1.0), pacing.rest_s(1.0)) == (FURTHEST_AHEAD_S + 2, 2)


def test_only_so_many_messages_are_read_a_second() -> None:
    pacing = Pacing(0.0)
    for _ in range(MESSAGES_PER_S):
        pacing.came(0.0, 0.0, waited=False)
    assert pacing.rest_s(0.0) == 0
    for _ in range(MESSAGES_PER_S):
        pacing.came(0.0, 0.0, waited=False)
    assert pacing.rest_s(0.5) == 2.0 - 0.5 - BURST_S


def test_messages_that_are_handed_on_together_count_each() -> None:
    pacing = Pacing(0.0)
    pacing.came(0.0, 0.0, waited=True, messages=2 * MESSAGES_PER_S)
    assert pacing.rest_s(0.0) == pytest.approx(2.0 - BURST_S)
