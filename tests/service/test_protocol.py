"""Clients that are slow, greedy or many, against a service in a process of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from service.protocol import LEAST_IDLE_S, MOST_HEAD_BYTES, NOT_ACCEPTED
from tests.conftest import RunningService, encoded, start_service, stop_service, voice
from tests.service.threads import PATIENCE_S, until

HEAD = (
    b"POST /v1/keywords/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\nContent-Length: 100000\r\n\r\n"
)


LARGE = 8 * 1024 * 1024


def dial(service: RunningService) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(service.url.rsplit(":", 1)[1])), timeout=PATIENCE_S)
    connection.settimeout(PATIENCE_S)
    return connection


def trickle(connection: socket.socket, data: bytes, every_s: float) -> bytes:
    """Send byte by byte until the other end answers; the answer, up to its end."""
    connection.settimeout(every_s)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            answer = connection.recv(65_536)
        except TimeoutError:
            continue
        connection.settimeout(PATIENCE_S)
        return answer + everything(connection)
    raise AssertionError("everything was sent and nothing was answered")


def crowded(tmp_path: Path, started: list[RunningService], stack: ExitStack) -> RunningService:
    """A service with as many connections as it takes, none of which has asked for anything."""
    service = start_service(tmp_path, limit_connections="4")
    started.append(service)
    for _ in range(4):
        stack.enter_context(dial(service))
    return service


def is_served(connection: socket.socket, request: bytes) -> bool:
    """Whether it is answered with 200 on it."""
    connection.sendall(request)
    return connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


def lives(connection: socket.socket) -> bool:
    """Whether /healthz is answered on it."""
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b'"ok"}') and (part := connection.recv(65_536)):
        answer += part
    return answer.startswith(b"HTTP/1.1 200 ")


def everything(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(65_536):
        answer += part
    return answer


def answer_of(connection: socket.socket) -> bytes:
    """One answer to its end: head and body may come in pieces of their own."""
    answer = b""
    while (head := answer.partition(b"\r\n\r\n"))[1] == b"" or len(head[2]) < length_of(head[0]):
        part = connection.recv(65_536)
        assert part, answer
        answer += part
    return answer


def length_of(head: bytes) -> int:
    return int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])


def problem(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)["code"]


def test_a_head_that_trickles_in_is_cut_off(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, head_timeout_s="0.5")
    started.append(service)
    with dial(service) as connection:
        assert problem(trickle(connection, b"GET /healthz HTTP/1.1\r\nX-Long: " + b"a" * 600, 0.1)) == (
            408,
            "request_too_slow",
        )
    # Who says nothing at all is not waited for either.
    with dial(service) as connection:
        assert problem(connection.recv(65_536)) == (408, "request_too_slow")


def test_the_second_request_of_a_connection_has_its_own_time(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, head_timeout_s="1.0")
    started.append(service)
    with httpx.Client() as client:
        for pause_s in (0.0, 1.5, 1.5):
            time.sleep(pause_s)
            assert client.get(service.url + "/healthz").status_code == 200


def test_a_body_that_trickles_in_is_cut_off(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, request_timeout_s="60")
    started.append(service)
    with dial(service) as connection:
        connection.sendall(HEAD)
        assert problem(trickle(connection, bytes(600), 0.1)) == (408, "request_too_slow")


def test_a_head_without_end_is_cut_off(service: RunningService) -> None:
    with dial(service) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        answer = b""
        try:
            for number in range(1 + MOST_HEAD_BYTES // 1000):
                connection.sendall(b"X-%d: %s\r\n" % (number, b"a" * 1000))
            answer = connection.recv(65_536)
        except ConnectionError:
            pytest.fail("cut off without a word")
        assert problem(answer) == (431, "head_too_large")


CHUNKED = HEAD.replace(b"Content-Length: 100000", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize("endless", [b"X-Long: %s\r\n" % (b"a" * 1000), b"a" * 1000], ids=["many", "one"])
def test_trailers_without_end_are_cut_off(service: RunningService, endless: bytes) -> None:
    answer, sent_bytes = b"", 0
    with dial(service) as connection:
        connection.sendall(CHUNKED + b"5\r\n12345\r\n0\r\n" + (b"" if endless.endswith(b"\n") else b"X-Long: "))
        connection.settimeout(0.001)
        while not answer and sent_bytes < 2**22:
            connection.sendall(endless)
            sent_bytes += len(endless)
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65_536)
        connection.settimeout(PATIENCE_S)
        assert problem(answer + everything(connection)) == (431, "head_too_large")
    # A piece of the kernel's beside the cap.
    assert sent_bytes < MOST_HEAD_BYTES + 2**18


def test_the_extensions_of_a_chunk_end_as_well(service: RunningService) -> None:
    with dial(service) as connection:
        connection.sendall(CHUNKED + b"5;long=" + b"a" * (MOST_HEAD_BYTES + 2**18))
        assert problem(everything(connection)) == (431, "head_too_large")


def test_a_trailer_is_read_and_is_no_header(service: RunningService) -> None:
    clip = encoded(voice(1.0))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (clip[:1000], clip[1000:]))
    with dial(service) as connection:
        for _ in range(2):
            connection.sendall(CHUNKED + chunks + b"0\r\nX-Checksum: 1\r\nX-Request-Timeout-Ms: nonsense\r\n\r\n")
            assert answer_of(connection).startswith(b"HTTP/1.1 200 ")


def test_many_small_chunks_are_no_trailers(service: RunningService) -> None:
    clip = encoded(voice(1.0))
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in clip)
    assert len(chunks) - len(clip) > 4 * MOST_HEAD_BYTES
    with dial(service) as connection:
        connection.sendall(CHUNKED + chunks + b"0\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_in_a_crowd_only_probes_are_answered(tmp_path: Path, started: list[RunningService]) -> None:
    clip = encoded(voice(1.0))
    with ExitStack() as stack:
        service = crowded(tmp_path, started, stack)
        refused = service.post("/v1/keywords/detect", clip)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        for path in ("/healthz", "/readyz", "/metrics"):
            assert service.get(path).status_code == 200
    until(lambda: service.post("/v1/keywords/detect", clip).status_code == 200)


def test_who_reads_only_after_sending_everything_hears_why_it_was_refused(
    tmp_path: Path, started: list[RunningService]
) -> None:
    with ExitStack() as stack:
        service = crowded(tmp_path, started, stack)
        late = stack.enter_context(dial(service))
        late.sendall(HEAD.replace(b"100000", b"%d" % LARGE) + bytes(LARGE))
        assert problem(everything(late)) == (503, "overloaded")


def test_who_never_stops_sending_is_cut_off(tmp_path: Path, started: list[RunningService]) -> None:
    with ExitStack() as stack:
        service = crowded(tmp_path, started, stack)
        endless = stack.enter_context(dial(service))
        endless.sendall(HEAD.replace(b"100000", b"%d" % 2**40))
        with pytest.raises(ConnectionError):
            endless.sendall(bytes(2**28))
    until(lambda: service.get("/v1/models").status_code == 200)


def test_uploads_together_take_no_more_memory_than_there_is_for_them(
    tmp_path: Path, started: list[RunningService]
) -> None:
    service = start_service(tmp_path, max_upload_bytes="1000000", uploads_bytes="1000000")
    started.append(service)
    small, large = encoded(voice(1.0)), encoded(voice(10.0))
    with dial(service) as half:
        half.sendall(HEAD.replace(b"100000", b"1000000") + bytes(900_000))
        until(lambda: "sotto_upload_bytes 900000.0" in service.get("/metrics").text)
        assert service.post("/v1/keywords/detect", small).status_code == 200
        refused = service.post("/v1/keywords/detect", large)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    until(lambda: service.post("/v1/keywords/detect", large).status_code == 200)
    assert "sotto_upload_bytes 0.0" in service.get("/metrics").text


def test_a_stream_in_a_crowd_is_refused_in_words_on_a_used_connection_too(
    tmp_path: Path, started: list[RunningService]
) -> None:
    with ExitStack() as stack:
        service = crowded(tmp_path, started, stack)
        used = stack.enter_context(dial(service))
        assert lives(used)
        used.sendall(UPGRADE + b"\r\n")
        assert problem(used.recv(65_536)) == (503, "overloaded")


def three_for_two(
    tmp_path: Path, started: list[RunningService], stack: ExitStack
) -> tuple[bytes, tuple[socket.socket, ...]]:
    """A request with a clip, and three connections to a service that takes two."""
    service = start_service(tmp_path, limit_connections="2")
    started.append(service)
    clip = encoded(voice(1.0))
    request = HEAD.replace(b"100000", b"%d" % len(clip)) + clip
    return request, tuple(stack.enter_context(dial(service)) for _ in range(3))


def test_who_was_there_before_the_crowd_is_served(tmp_path: Path, started: list[RunningService]) -> None:
    with ExitStack() as stack:
        request, (first, second, third) = three_for_two(tmp_path, started, stack)
        # Neither is idle: one has sent a part of its head, one nothing yet.
        first.sendall(request[:50])
        for _ in range(3):
            third.sendall(request)
            assert problem(third.recv(65_536)) == (503, "overloaded"), "and is kept"
        first.sendall(request[50:])
        assert first.recv(65_536).startswith(b"HTTP/1.1 200 ")
        assert is_served(second, request)
        # Nobody is sent away for good: once the service has noticed that there is room.
        second.close()
        until(lambda: is_served(third, request))


def test_the_connection_that_is_idle_for_longest_makes_room(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, limit_connections="3")
    started.append(service)
    clip = encoded(voice(1.0))
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(dial(service)) for _ in range(3))
        assert all(lives(connection) for connection in (second, first, third))
        # A client's pool, or a load balancer's, may still hold these.
        time.sleep(LEAST_IDLE_S)
        assert all(lives(connection) for connection in (second, first))
        assert service.post("/v1/keywords/detect", clip).status_code == 200
        assert third.recv(65_536) == b""
        assert all(lives(connection) for connection in (first, second))


def test_who_came_in_a_crowd_is_served_once_others_are_idle(tmp_path: Path, started: list[RunningService]) -> None:
    with ExitStack() as stack:
        request, (first, second, third) = three_for_two(tmp_path, started, stack)
        assert all(lives(connection) for connection in (first, second))
        # Those two may be about to ask again.
        third.sendall(request)
        assert problem(third.recv(65_536)) == (503, "overloaded")
        time.sleep(LEAST_IDLE_S)
        until(lambda: is_served(third, request))
        assert first.recv(65_536) == b""


def test_idle_connections_never_keep_probes_out(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, limit_connections="2")
    started.append(service)
    with ExitStack() as stack:
        crowd = [stack.enter_context(dial(service)) for _ in range(NOT_ACCEPTED * 2)]
        assert all(lives(connection) for connection in crowd)
        time.sleep(LEAST_IDLE_S)
        assert all(service.get("/healthz").status_code == 200 for _ in range(3))


def test_whoever_does_not_read_is_cut_off(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, send_timeout_s="0.5")
    started.append(service)
    clip = encoded(voice(110.0))
    # More than the kernel would take off the service's hands.
    assert len(service.post("/v1/embeddings?type=frames", clip).content) > 2**23
    head = (
        "POST /v1/embeddings?type=frames HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\n"
        f"Content-Length: {len(clip)}\r\n\r\n"
    )
    with dial(service) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head.encode() + clip)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        until(lambda: connections(service) == 0)


UPGRADE = (
    b"GET /v1/keywords/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


def test_a_handshake_that_breaks_the_rules_is_answered_and_ends_nothing_else(
    tmp_path: Path, started: list[RunningService]
) -> None:
    service = start_service(tmp_path)
    started.append(service)
    with dial(service) as connection:
        # More than websockets takes, less than we do.
        connection.sendall(UPGRADE + b"X-Long: " + b"a" * 9000 + b"\r\n\r\n")
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 4")
    with dial(service) as connection:
        connection.sendall(UPGRADE + b"\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 101")
        assert stop_service(service) == 0
    assert "Traceback" not in service.log.read_text()


def test_an_empty_line_after_an_answer_keeps_no_connection(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, keep_alive_s="1")
    started.append(service)
    for after in (b"\r\n", b"\r\n\r\n"):
        with dial(service) as connection:
            assert lives(connection)
            connection.sendall(after)
            assert connection.recv(65_536) == b""


def test_a_body_after_its_answer_gets_no_second_one(service: RunningService) -> None:
    with dial(service) as connection:
        connection.sendall(HEAD.replace(b"audio/wav", b"text/html"))
        answer = connection.recv(65_536)
        connection.sendall(bytes(1_000))
        while part := connection.recv(65_536):
            answer += part
    assert answer.count(b"HTTP/1.1") == 1
    assert problem(answer) == (415, "unsupported_media_type")


def test_whoever_pings_and_does_not_read_is_cut_off(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, send_timeout_s="0.5")
    started.append(service)
    pings = (bytes([0x89, 0x80 | 125]) + bytes(4) + bytes(125)) * 1000
    with dial(service) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(UPGRADE + b"\r\n")
        connection.settimeout(0.2)

        def gone() -> bool:
            try:
                connection.sendall(pings)
            except TimeoutError:
                pass
            except OSError:
                return True
            return connections(service) == 0

        until(gone)
    assert service.get("/healthz").status_code == 200


def connections(service: RunningService) -> int:
    """To the service, from others than who asks here."""
    port = int(service.url.rsplit(":", 1)[1])
    lines = Path(f"/proc/{service.process.pid}/net/tcp").read_text().splitlines()[1:]
    inodes = {line.split()[9] for line in lines if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "01"}
    return len(inodes)
