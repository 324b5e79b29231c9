"""How fast a stream is read, and since when its audio has waited. Arithmetic on the times that it is given."""

from __future__ import annotations

# A stream further ahead of the clock than this is a file, not a microphone, and takes its turn among clips; further
# than that, it is not read until the clock has caught up. Microphones' buffers hold less than either.
AHEAD_S = 2.0
FURTHEST_AHEAD_S = 10.0
# Microphones send 50 messages of 20 ms a second; more than this on average are not read.
MESSAGES_PER_S = 200
# So much of them may come at once.
BURST_S = 1.0


class Pacing:
    """Of one stream, which begins now; seconds on any one clock.

    A message that the stream had to wait for came when it was read. One that was there already had come before that,
    nobody knows when: it lay in the connection, which is not read while the stream is busy. A microphone sent it as
    much later than the one before as its audio lasts, so it is `due` then, and what is due and not read is a backlog.
    Of a file, which comes faster than it plays, it is how far the reading falls behind playing it.
    """

    def __init__(self, now: float) -> None:
        self._began = now
        self._audio_s = 0.0
        self._messages = 0
        # When the latest message had come or, at the latest, would have from a microphone.
        self.due = now

    def ahead_s(self, now: float) -> float:
        """How much more audio has come than time has passed."""
        return self._audio_s - (now - self._began)

    def rest_s(self, now: float) -> float:
        """How long not to read, so that no stream takes more than its share. A client's haste is no backlog."""
        early_s = self._messages / MESSAGES_PER_S - (now - self._began)
        rest_s = max(0.0, self.ahead_s(now) - FURTHEST_AHEAD_S, early_s - BURST_S)
        if rest_s:
            self.due = max(self.due, now + rest_s)
        return rest_s

    def came(self, audio_s: float, now: float, *, waited: bool, messages: int = 1) -> None:
        """A message with so much audio is read, or `messages` of them; `waited` where it, or the last, was not there
        yet."""
        self._audio_s += audio_s
        self._messages += messages
        self.due = now if waited else min(now, self.due + audio_s)
